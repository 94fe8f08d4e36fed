"""Taking times on a machine that does other things too."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping

from fl_lightning.run.environment import environment

Contender = Callable[[], None]


def interleaved(
    contenders: Mapping[str, Contender],
    repeats: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time several functions in turn, so that what disturbs one disturbs all.

    Args:
        contenders: What to time, by name.
        repeats: How often each, at least 1.
        warm_up: Untimed calls of each before.
        clock: Tells the time.

    Returns:
        Seconds of every call, by name. The garbage of one contender is collected before the next begins.
    """
    for contender in contenders.values():
        for _ in range(warm_up):
            contender()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            gc.collect()
            start = clock()
            contender()
            seconds[name].append(clock() - start)
    return seconds


def ratios(seconds: Mapping[str, list[float]], name: str, base: str = "bare") -> list[float]:
    """What one took over what another took just before or after, for each repeat, in order of size."""
    return sorted(one / other for one, other in zip(seconds[name], seconds[base], strict=True))


def ratio(seconds: Mapping[str, list[float]], name: str, base: str = "bare") -> float:
    """The median of the ratios of neighbouring calls: a machine that slows down slows both."""
    return statistics.median(ratios(seconds, name, base))


def spread(seconds: Mapping[str, list[float]], name: str, base: str = "bare") -> str:
    """The middle half of the ratios of neighbouring calls, as text."""
    found = ratios(seconds, name, base)
    quarter = len(found) // 4
    return f"{found[quarter]:.2f}-{found[-1 - quarter]:.2f}"


def circumstances() -> str:
    """Versions, commit and kind of machine, as one line."""
    found = environment()
    commit, chip = found.get("commit", "unknown"), found.get("accelerator", f"{platform.machine()} CPU")
    return f"commit {commit}, Python {found['python']}, torch {found['torch']}, lightning {found['lightning']}, {chip}"
