"""Several fits of one client, averaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from typing_extensions import override

from fl_lightning.checks import ArgumentError, at_least, one_of
from fl_lightning.client import Broadcast, Client, Fit
from fl_lightning.evaluation.predict import quality
from fl_lightning.fit.local import FitPlan, LocalTraining
from fl_lightning.seeding import derive_seed
from fl_lightning.state import State, load, weighted_mean

Recipe = Literal["uniform", "greedy"]


class Soup(FitPlan):
    """Fits a client several times from the same start and averages what comes out.

    Wortsman, Ilharco, Gadre, Roelofs, Gontijo-Lopes, Morcos, Namkoong, Farhadi, Carmon, Kornblith, Schmidt, Model
    soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time, ICML
    2022, https://arxiv.org/abs/2203.05482. The first ingredient is the plain fit, with the settings of the run; others
    differ in their seeds, and in what is drawn for them. A soup of one ingredient is that fit, to the bit. What a
    callback sends beside the model belongs to one ingredient, so callbacks that do are refused.

    Args:
        ingredients: Number of fits, at least 1, each as long as the trainer says.
        recipe: ``uniform``: the mean of all. ``greedy`` (Recipe 1 of the paper): ingredients are tried from the best
            to the worst by the task's first metric on the client's validation data, and one stays if the mean is no
            worse with it.
        draws: For each argument of the optimizer, or ``batch_size``, the values of which the further ingredients draw
            one; the draws are the same for all clients.
    """

    def __init__(
        self,
        ingredients: int = 3,
        recipe: Recipe = "uniform",
        draws: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        at_least("ingredients", ingredients, 1)
        one_of("recipe", recipe, Recipe)
        for name, values in (draws or {}).items():
            if not values:
                raise ArgumentError(f"draws.{name} must be a list of at least one value, got []")
        self.ingredients = ingredients
        self.recipe = recipe
        self.draws = {name: list(values) for name, values in (draws or {}).items()}
        self.needs_validation = recipe == "greedy" and ingredients > 1

    @override
    def fit(self, local: LocalTraining, client: Client, broadcast: Broadcast) -> Fit:
        fits = [
            local.fit_once(client, broadcast, **self.variation(local, broadcast, number))
            for number in range(self.ingredients)
        ]
        states = [whole(local, fit) for fit in fits]
        if self.needs_validation:
            return blend(fits[0], greedy_mean(states, lambda state: validated(local, client, state)))
        return blend(fits[0], mean(states))

    def variation(self, local: LocalTraining, broadcast: Broadcast, number: int) -> dict[str, Any]:
        """Return what a fit has of its own; number 0 has the seed and the settings of the run."""
        if not number:
            return {}
        drawn = self.draw(derive_seed(local.seed, "soup draws", broadcast.round, number))
        batch_size = drawn.pop("batch_size", None)
        optimizer = partial(local.optimizer, **drawn) if drawn else None
        return {"seed": derive_seed(local.seed, "soup", number), "batch_size": batch_size, "optimizer": optimizer}

    def draw(self, seed: int) -> dict[str, Any]:
        """Return one value for each argument in ``draws``."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: values[int(torch.randint(len(values), (), generator=generator))]
            for name, values in self.draws.items()
        }


def validated(local: LocalTraining, client: Client, state: State) -> float:
    """Return the task's first metric of a model on a client's validation data, such that more is better."""
    local.module.to(local.device)
    load(local.module, state)
    return quality(local.module, client.data, "val")


def whole(local: LocalTraining, fit: Fit) -> State:
    """Return all tensors of the model after a fit."""
    if fit.update.extra:
        raise ValueError(
            f"{type(local.plan).__name__} averages models, but {', '.join(list(fit.update.extra)[:2])} is sent beside "
            "each of them; leave out the callback that sends it, or set local.plan to one fit"
        )
    return {**local.initial, **fit.personal, **fit.update.state}


def mean(states: Sequence[State]) -> State:
    """Return the mean in which every state counts the same."""
    return weighted_mean(states, [1.0] * len(states))


def greedy_mean(states: Sequence[State], score: Callable[[State], float]) -> State:
    """Add states from the best to the worst, each only if the mean does not get worse by it.

    Args:
        states: The ingredients, at least one.
        score: Says how good a state is; higher is better.
    """
    scores = [score(state) for state in states]
    order = sorted(range(len(states)), key=lambda index: -scores[index])
    chosen, best = [states[order[0]]], scores[order[0]]
    for index in order[1:]:
        candidate = score(mean([*chosen, states[index]]))
        if candidate >= best:
            chosen, best = [*chosen, states[index]], candidate
    return mean(chosen)


def blend(fit: Fit, state: State) -> Fit:
    """Put other tensors of the model in the place of a fit's own."""
    update = replace(fit.update, state={name: state[name] for name in fit.update.state})
    return replace(fit, update=update, personal={name: state[name] for name in fit.personal})
