"""Named tensors: the one data structure that federated learning moves about. Pure functions; imports torch alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
"""Detached tensors by name, like a ``state_dict``."""


def match(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Return the names that fit at least one shell pattern, in the order of ``names``.

    Args:
        names: Names of tensors, such as the keys of a ``state_dict``.
        patterns: Shell patterns (``*``, ``?``, ``[...]``), case-sensitive. ``head`` alone also stands for ``head.*``.

    Raises:
        ValueError: If a pattern fits no name. A misspelt pattern would otherwise share or freeze nothing, unnoticed.
    """
    names = list(names)
    chosen: set[str] = set()
    for pattern in patterns:
        fits = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not fits:
            modules = {name.rpartition(".")[0] for name in names}
            close = get_close_matches(pattern.rstrip("*."), [*names, *modules], n=4, cutoff=0.3)
            raise ValueError(f"the pattern {pattern!r} fits no tensor of the model; close names: {', '.join(close) or names[:4]}")
        chosen.update(fits)
    return [name for name in names if name in chosen]


def snapshot(state: Mapping[str, Tensor], names: Iterable[str] | None = None) -> State:
    """Copy tensors to the CPU, detached, so that later training of the original leaves the copy alone.

    Args:
        state: Tensors by name.
        names: Which of them; all by default.
    """
    return {name: state[name].detach().to("cpu", copy=True) for name in (state if names is None else names)}


def load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors into a module in place; parameters keep their identity, so optimizers and references stay valid.

    Raises:
        ValueError: If a name or a shape is not the module's, or a tensor of the module is missing.
    """
    own = module.state_dict()
    if own.keys() != state.keys():
        raise ValueError(f"the state does not fit the model: {difference(state, own)}")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)} in the model, but {tuple(state[name].shape)} in the state")
            tensor.copy_(state[name])


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], most: int = 4) -> str:
    """Say in words how two states differ in names and shapes; empty if they do not.

    Args:
        found: The state that came.
        expected: The state that was expected.
        most: How many names to give per kind of difference.
    """

    def some(names: Iterable[str]) -> str:
        names = list(names)
        return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

    parts = []
    if missing := [name for name in expected if name not in found]:
        parts.append(f"missing {some(missing)}")
    if extra := [name for name in found if name not in expected]:
        parts.append(f"unexpected {some(extra)}")
    unlike = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    if unlike:
        parts.append(f"other shapes: {some(unlike)}")
    return "; ".join(parts)


class RunningMean:
    """A weighted mean of states that are added one at a time, in memory of one state.

    The sum is kept in float64: with example counts as weights the mean of equal states is then that state to the bit,
    and the result hardly depends on the order. A tensor that some states lack is averaged over those that hold it.
    Integer tensors (BatchNorm's ``num_batches_tracked``) are counters, for which a mean means nothing: the largest stays.
    """

    def __init__(self) -> None:
        self._sums: State = {}
        self._weights: dict[str, float] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, state: Mapping[str, Tensor], weight: float) -> None:
        """Add one state.

        Args:
            state: Tensors by name.
            weight: Its weight, at least 0.
        """
        if not weight >= 0:
            raise ValueError(f"a weight must be at least 0, got {weight}")
        for name, tensor in state.items():
            tensor = tensor.detach()
            seen = name in self._sums
            if not tensor.is_floating_point():
                self._sums[name] = torch.maximum(self._sums[name], tensor) if seen else tensor.clone()
            elif seen:
                self._sums[name].add_(tensor, alpha=weight)
            else:
                self._sums[name] = tensor.to(torch.float64).mul_(weight) if tensor.dtype != torch.float64 else tensor * weight
            self._weights[name] = self._weights.get(name, 0.0) + weight
            self._dtypes[name] = tensor.dtype

    def compute(self) -> State:
        """Return the mean of what was added; a tensor whose weights are all 0 is left out."""
        return {
            name: (total / self._weights[name]).to(self._dtypes[name]) if total.is_floating_point() else total.clone()
            for name, total in self._sums.items()
            if self._weights[name] > 0
        }


def weighted_mean(states: Iterable[Mapping[str, Tensor]], weights: Iterable[float]) -> State:
    """Average states, per tensor over those that hold it (see :class:`RunningMean`).

    Args:
        states: The states; consumed one at a time.
        weights: One weight for each, at least 0.
    """
    mean = RunningMean()
    for state, weight in zip(states, weights, strict=True):
        mean.add(state, weight)
    return mean.compute()


def num_bytes(state: Mapping[str, Tensor]) -> int:
    """Return the size of a state on the wire: the bytes of its tensors, without names or framing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def all_finite(state: Mapping[str, Tensor]) -> bool:
    """Tell whether no tensor holds NaN or an infinity."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in state.values() if tensor.is_floating_point())
