"""Named tensors: the one data structure that federated learning moves about. Pure functions; imports torch alone."""

from __future__ import annotations

import operator
import zlib
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fl_lightning.checks import at_least

State = dict[str, Tensor]
"""Detached tensors by name, like a ``state_dict``."""


class DeclaredState:
    """An object that says which of its attributes a checkpoint holds."""

    saved: tuple[str, ...] = ()
    """Names of attributes that must survive a restart: tensors, plain values, and lists and dicts of them."""

    def state_dict(self) -> dict[str, Any]:
        """Return the attributes that are :attr:`saved`, by name."""
        return {name: getattr(self, name) for name in self.saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        for name in self.saved:
            value = state_dict[name]
            setattr(self, name, copy(value) if isinstance(value, (dict, list)) else value)


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
            raise ValueError(
                f"the pattern {pattern!r} fits no tensor of the model; close names: {', '.join(close) or names[:4]}"
            )
        chosen.update(fits)
    return [name for name in names if name in chosen]


def snapshot(state: Mapping[str, Tensor], names: Iterable[str] | None = None) -> State:
    """Copy tensors to the CPU, detached, so that later training of the original leaves the copy alone.

    Args:
        state: Tensors by name.
        names: Which of them; all by default.
    """
    chosen = {name: state[name].detach() for name in (state if names is None else names)}
    if all(tensor.is_cpu for tensor in chosen.values()):
        return {name: tensor.clone() for name, tensor in chosen.items()}
    moved = move(list(chosen.values()), torch.device("cpu"))
    return {name: tensor.clone() for name, tensor in zip(chosen, moved, strict=True)}


def move(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors to a device, in one transfer for each type of number; what comes are views of what was transferred.

    A transfer between CPU and accelerator costs the same waiting for one number as for a million.
    """
    places: dict[torch.dtype, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.dtype, []).append(place)
    found = list(tensors)
    for group in places.values():
        flat = torch.cat([tensors[place].reshape(-1) for place in group]).to(device)
        for place, part in zip(group, flat.split([tensors[place].numel() for place in group]), strict=True):
            found[place] = part.view(tensors[place].shape)
    return found


@dataclass(frozen=True)
class Layout:
    """How tensors lie behind one another in vectors, one vector for each type of number.

    Attributes:
        parts: Name, type and shape of each tensor, in order.
    """

    parts: tuple[tuple[str, torch.dtype, torch.Size], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """Return the layout of tensors in their order."""
        return cls(tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()))

    def join(self, tensors: Mapping[str, Tensor]) -> dict[torch.dtype, Tensor]:
        """Copy tensors into vectors; what they have before their own dimensions stays, such as (K, ...) to (K, n)."""
        groups: dict[torch.dtype, list[Tensor]] = {}
        for name, dtype, shape in self.parts:
            tensor = tensors[name]
            lead = tensor.shape[: tensor.ndim - len(shape)]
            groups.setdefault(dtype, []).append(tensor.reshape(*lead, shape.numel()))
        return {dtype: torch.cat(group, dim=-1) for dtype, group in groups.items()}

    def views(self, vectors: Mapping[torch.dtype, Tensor]) -> State:
        """Return the tensors that lie in vectors: views, which see what becomes of the vectors."""
        pieces = {
            dtype: iter(vector.split([shape.numel() for _, kind, shape in self.parts if kind == dtype], dim=-1))
            for dtype, vector in vectors.items()
        }
        found = {}
        for name, dtype, shape in self.parts:
            piece = next(pieces[dtype])
            found[name] = piece.view(piece.shape[:-1] + shape)
        return found


class Packed(State):
    """Tensors that are views of one vector for each type of number: what happens to all of them is one operation.

    Args:
        layout: Where each lies.
        vectors: The vectors.
        views: The tensors; None: those that ``layout`` finds.
        finite: Whether all numbers are known to be finite, or known not to be; None: nobody looked.
    """

    def __init__(
        self,
        layout: Layout,
        vectors: Mapping[torch.dtype, Tensor],
        views: State | None = None,
        finite: bool | None = None,
    ) -> None:
        super().__init__(layout.views(vectors) if views is None else views)
        self.layout = layout
        self.finite = finite
        self._vectors = dict(vectors)
        self._views = tuple(self.values())

    @property
    def vectors(self) -> dict[torch.dtype, Tensor] | None:
        """The vectors; None if somebody put another tensor in the place of a view."""
        whole = len(self) == len(self._views) and all(map(operator.is_, self.values(), self._views))
        return self._vectors if whole else None

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as the vectors alone."""
        vectors = self.vectors
        return (dict, (dict(self),)) if vectors is None else (Packed, (self.layout, vectors, None, self.finite))


def pack(state: Mapping[str, Tensor], names: Iterable[str] | None = None) -> Packed:
    """Copy tensors to where they are, detached, side by side.

    Args:
        state: Tensors by name, on one device.
        names: Which of them; all by default.
    """
    chosen = {name: state[name].detach() for name in (state if names is None else names)}
    layout = Layout.of(chosen)
    return Packed(layout, layout.join(chosen))


class DeviceCopy:
    """The copy of a state on a device, made anew when the state holds other tensors, or one that was written to.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._known: list[tuple[Tensor, int]] = []
        self._copy: State = {}

    def __call__(self, state: Mapping[str, Tensor]) -> State:
        """Return the tensors of a state there; those that are there already are themselves."""
        now = [(tensor, tensor._version) for tensor in state.values()]
        known = len(now) == len(self._known) and self._copy.keys() == state.keys()
        if not known or any(a is not b or m != n for (a, m), (b, n) in zip(now, self._known, strict=True)):
            self._copy = dict(zip(state, bring(list(state.values()), self.device), strict=True))
            self._known = now
        return dict(self._copy)


def bring(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return tensors on a device: those that lie elsewhere are moved (see :func:`move`)."""
    moved = iter(move([tensor for tensor in tensors if tensor.device != device], device))
    return [tensor if tensor.device == device else next(moved) for tensor in tensors]


def with_prefix(prefix: str, state: Mapping[str, Tensor]) -> State:
    """Return the same tensors under longer names, so that several parties may put theirs into one message."""
    return {prefix + name: tensor for name, tensor in state.items()}


def without_prefix(prefix: str, state: Mapping[str, Tensor]) -> State:
    """Return what :func:`with_prefix` put in, and nothing else, under its own names."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors into a module in place; parameters keep their identity, so optimizers and references stay valid."""
    overwrite(module.state_dict(), state)


def overwrite(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy tensors over others of the same names and shapes.

    Args:
        own: What is written to, on any device.
        state: What is written, on any device.
    """
    if own.keys() != state.keys():
        raise ValueError(f"the state does not fit the model: {difference(state, own)}")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            shapes = f"shape {tuple(tensor.shape)} in the model, but {tuple(state[name].shape)} in the state"
            raise ValueError(f"{name} has {shapes}")
    targets, sources = list(own.values()), [state[name] for name in own]
    if len({tensor.device for tensor in targets}) == 1 and not targets[0].is_cpu:
        sources = bring(sources, targets[0].device)
    with torch.no_grad():
        torch._foreach_copy_(targets, sources)


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
    Integer tensors (BatchNorm's ``num_batches_tracked``) are counters, for which a mean means nothing: the largest
    stays. States that are :class:`Packed` alike are added by one operation each, where they lie.
    """

    def __init__(self) -> None:
        self._sums: State = {}
        self._layout: Layout | None = None  # while `_sums` are views of `_vectors`
        self._vectors: dict[torch.dtype, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, state: Mapping[str, Tensor], weight: float) -> None:
        """Add one state.

        Args:
            state: Tensors by name.
            weight: Its weight, at least 0.
        """
        at_least("weight", weight, 0)
        vectors = state.vectors if isinstance(state, Packed) else None
        if isinstance(state, Packed) and vectors and (not self._sums or self._layout == state.layout):
            self._add_vectors(vectors, state.layout, weight)
        else:
            self._layout = None
            self._add_tensors(state, weight)
        for name, tensor in state.items():
            self._weights[name] = self._weights.get(name, 0.0) + weight
            self._dtypes[name] = tensor.dtype

    def _add_vectors(self, vectors: Mapping[torch.dtype, Tensor], layout: Layout, weight: float) -> None:
        for dtype, vector in vectors.items():
            known = self._vectors.get(dtype)
            if known is None:
                self._vectors[dtype] = vector.to(torch.float64) * weight if dtype.is_floating_point else vector.clone()
            elif dtype.is_floating_point:
                known.add_(vector.to(known.device), alpha=weight)
            else:
                torch.maximum(known, vector.to(known.device), out=known)
        if self._layout is None:
            self._layout, self._sums = layout, layout.views(self._vectors)

    def _add_tensors(self, state: Mapping[str, Tensor], weight: float) -> None:
        sums: list[Tensor] = []
        terms: list[Tensor] = []
        for name, tensor in state.items():
            seen = name in self._sums
            tensor = tensor.detach().to(self._sums[name].device) if seen else tensor.detach()
            if not tensor.is_floating_point():
                self._sums[name] = torch.maximum(self._sums[name], tensor) if seen else tensor.clone()
            elif seen:
                sums.append(self._sums[name])
                terms.append(tensor)
            else:
                self._sums[name] = tensor.to(torch.float64) * weight
        if sums:
            torch._foreach_add_(sums, terms, alpha=weight)

    def compute(self) -> State:
        """Return the mean of what was added, :class:`Packed` if that was; a tensor whose weights are all 0 is out."""
        if self._layout is not None:
            [weight] = set(self._weights.values())
            vectors = {
                dtype: (total / weight).to(dtype) if dtype.is_floating_point else total.clone()
                for dtype, total in self._vectors.items()
            }
            return Packed(self._layout, vectors) if weight > 0 else {}
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


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Tell whether two states are the same to the bit."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def checksum(tensor: Tensor) -> int:
    """Return a number that differs between two tensors of one shape, but by chance once in four billion times."""
    content = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(content.numpy().data)


Versions = list[tuple[str, Tensor, int]]
"""Which tensors a state holds, and how often each had been written to."""


def versions(state: Mapping[str, Tensor]) -> Versions:
    """Note which tensors a state holds, for :func:`same_versions`."""
    # Tensors made in inference mode count no writes, but then nothing can write to them outside of it.
    return [(name, tensor, 0 if tensor.is_inference() else tensor._version) for name, tensor in state.items()]


def same_versions(one: Versions, other: Versions) -> bool:
    """Tell whether two states hold the very same tensors, not written to in between."""
    return len(one) == len(other) and all(
        name == name2 and tensor is tensor2 and version == version2
        for (name, tensor, version), (name2, tensor2, version2) in zip(one, other, strict=True)
    )


def all_finite(state: Mapping[str, Tensor]) -> bool:
    """Tell whether no tensor holds NaN or an infinity."""
    vectors = state.vectors if isinstance(state, Packed) else None
    if isinstance(state, Packed) and vectors is not None and state.finite is not None:
        return state.finite
    tensors = [tensor for tensor in (vectors or state).values() if tensor.is_floating_point()]
    # A sum is not finite if a term is not, and sums are much cheaper. Only the sum of huge numbers needs a second look.
    if not tensors or bool(torch.stack([tensor.sum() for tensor in tensors]).sum().isfinite()):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
