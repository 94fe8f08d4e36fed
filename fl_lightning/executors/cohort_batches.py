"""The batches of many clients side by side: one gather a step where their examples lie in one pool."""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from fl_lightning.data.batches import Batches, IndexBatches
from fl_lightning.data.transforms import is_per_image


def stack_sizes(numbers: Sequence[int]) -> list[int]:
    """Return how many clients each step computes, so that few are computed for nothing, and few sizes occur.

    A new size may cost an accelerator a search for its fastest kernels. So the sizes are those that grow by a seventh,
    and the stack shrinks when the next smaller one will do.

    Args:
        numbers: The steps of each client, the largest first.
    """
    ladder = [1]
    while ladder[-1] < len(numbers):
        ladder.append(max(ladder[-1] + 1, ladder[-1] * 8 // 7))
    sizes = []
    size = active = len(numbers)
    for step in range(numbers[0]):
        while numbers[active - 1] <= step:
            active -= 1
        size = min(size, ladder[bisect_left(ladder, active)])
        sizes.append(size)
    return sizes


def padded_steps(
    loaders: Sequence[Batches], epochs: int, sizes: Sequence[int], device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The batches of several clients side by side.

    Args:
        loaders: The clients' batches, seeded, those of the client with the most steps first.
        epochs: How many epochs of each.
        sizes: Of how many clients each step is.
        device: Where batches are wanted.

    Yields:
        x (K, B, ...), y (K, B), and weights (K, B) which are 1 for examples and 0 for what fills up.
    """
    if one_gather_will_do(loaders):
        yield from _gathered_steps(loaders, epochs, sizes, device)
        return
    streams = [_stream(loader, epochs) for loader in loaders]
    to = partial(Tensor.to, device=device, non_blocking=True)
    size = max(max(loader.sizes) for loader in loaders)
    for count in sizes:
        batches = [next(stream, None) for stream in streams[:count]]
        first = batches[0]
        assert first is not None
        xs, ys, weights = [], [], torch.zeros(count, size)
        for index, batch in enumerate(batches):
            x, y = batch if batch is not None else (first[0][:0], first[1][:0])
            weights[index, : len(y)] = 1.0
            xs.append(_fill(x, size))
            ys.append(_fill(y, size))
        yield to(torch.stack(xs)), to(torch.stack(ys)), to(weights)


def one_gather_will_do(loaders: Sequence[Batches]) -> bool:
    """Whether the examples of all clients lie in one pool and are made ready in one way: then a step is one index."""
    first = loaders[0]
    return is_per_image(first.transforms) and all(
        isinstance(loader, IndexBatches)
        and type(loader) is type(first)
        and len(loader.transforms) == len(first.transforms)
        and all(map(operator.is_, loader.transforms, first.transforms))
        and loader.source is first.source
        and (loader.normalization.mean, loader.normalization.std) == (first.normalization.mean, first.normalization.std)
        for loader in loaders
    )


def _gathered_steps(
    loaders: Sequence[Batches], epochs: int, sizes: Sequence[int], device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """As :func:`padded_steps`, but the host says nothing per client and step; what fills up is some other example."""
    first = loaders[0]
    assert isinstance(first, IndexBatches)
    pool = first.source
    size = max(max(loader.sizes) for loader in loaders)
    # Everything that the clients draw, one client and epoch after another, and where in the block of all steps it goes.
    plans = [loader.plan_epoch() for loader in loaders if isinstance(loader, IndexBatches) for _ in range(epochs)]
    counts = [number for loader in loaders for number in loader.sizes * epochs]
    steps = [step for loader in loaders for step in range(epochs * len(loader))]
    clients = [client for client, loader in enumerate(loaders) for _ in range(epochs * len(loader))]
    lengths = torch.tensor(counts)
    begins = (torch.tensor(steps) * len(loaders) + torch.tensor(clients)) * size
    inner = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    places = begins.repeat_interleave(lengths) + inner

    def block(parts: Sequence[Tensor]) -> Tensor:
        values = torch.cat(list(parts))
        block = values.new_zeros(len(sizes) * len(loaders) * size, *values.shape[1:]).index_copy_(0, places, values)
        return block.view(len(sizes), len(loaders), size, *values.shape[1:])

    index = block([order for order, _ in plans])
    weights = block([torch.ones(len(places))]).to(device)
    drawn = [block(parts).to(pool.device) for parts in zip(*(parts for _, parts in plans), strict=True)]
    index = index.to(pool.device)
    for step, count in enumerate(sizes):
        images, labels = pool.gather(index[step, :count].flatten())
        prepared = first.prepare_planned(images, [parts[step, :count].flatten(0, 1) for parts in drawn])
        x, y = (tensor.to(device, non_blocking=True) for tensor in (prepared, labels))
        yield x.unflatten(0, (count, size)), y.unflatten(0, (count, size)), weights[step, :count]


def _stream(loader: Batches, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(epochs):
        yield from loader


def _fill(tensor: Tensor, size: int) -> Tensor:
    if len(tensor) == size:
        return tensor
    return torch.cat([tensor, tensor.new_zeros((size - len(tensor), *tensor.shape[1:]))])
