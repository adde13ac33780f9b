"""Paired rounds: several runs timed in turn in one process, and the interval of a median."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

LEAST_SECONDS = 2e-3
"""A run is repeated within a round until it takes this long, so that the clock's steps do not count."""


@dataclass(frozen=True)
class Interval:
    """low, high   between which the median lies
    confidence  with this probability at least
    """

    low: float
    high: float
    confidence: float


def paired(runs: Sequence[Callable[[], object]], rounds: int, least: float = LEAST_SECONDS) -> np.ndarray:
    """Seconds of each run, [rounds, len(runs)]. Every round times all of them, in the opposite order of the round
    before, so that what changes on the machine from round to round, and who goes first, is the same for all. Each run
    goes three times before the first round."""
    repeats = [max(1, math.ceil(least / max(1e-7, seconds(run, 3)))) for run in runs]
    times = np.empty((rounds, len(runs)))
    for index in range(rounds):
        for column in range(len(runs))[:: -1 if index % 2 else 1]:
            times[index, column] = seconds(runs[column], repeats[column])
    return times


def seconds(run: Callable[[], object], repeats: int = 1) -> float:
    """Seconds of one of `repeats` runs, on average."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def median_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval | None:
    """The narrowest pair of order statistics, equally far from both ends, between which the median of whatever
    independent values were drawn from lies with a probability of at least `level`; no distribution is assumed. None
    for values too few to tell: fewer than 6 at 95 %."""
    ordered, count = np.sort(np.asarray(values, np.float64)), len(values)
    outside = below = 0.5**count  # P(at most `rank` of the values are below the median), rank = 0
    rank = -1
    while 2 * below <= 1 - level and 2 * (rank + 2) <= count:
        rank, outside = rank + 1, below
        below += math.comb(count, rank + 1) * 0.5**count
    if rank < 0:
        return None
    return Interval(float(ordered[rank]), float(ordered[-1 - rank]), 1 - 2 * outside)
