"""A kept N for each prune, at the weight bytes of one pattern: where the model is sensitive more is kept."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Choice:
    """What one prune may keep.

    weights  elements of the weights behind it, all of them read at n = m
    losses   [m]: the expected loss when n = 1..m channels of a group are kept; it falls to 0 at n = m
    """

    weights: int
    losses: np.ndarray


def allocate(choices: Sequence[Choice], keep: float, least: int = 1) -> list[int]:
    """The kept n of each choice, from `least` to m, with the least sum of losses such that the elements read, sum of
    weights * n / m, are at most `keep` times all.

    Greedy on the lower convex hull of each loss: the step that lowers the loss most for its elements is taken first,
    until none fits, which is the optimum up to the last step. The result does not depend on the order of equal steps
    but for the position of the choices.
    """
    sizes = [len(c.losses) for c in choices]
    kept = [min(least, size) for size in sizes]
    budget = keep * sum(c.weights for c in choices)
    budget -= sum(c.weights * n / size for c, n, size in zip(choices, kept, sizes, strict=True))
    steps: list[tuple[float, int, int]] = []
    for index in range(len(choices)):
        _offer(steps, choices, kept, index)
    while steps:
        _, index, n = heapq.heappop(steps)
        cost = choices[index].weights * (n - kept[index]) / sizes[index]
        if cost > budget + 1e-6:
            continue
        budget -= cost
        kept[index] = n
        _offer(steps, choices, kept, index)
    return kept


def _offer(steps: list[tuple[float, int, int]], choices: Sequence[Choice], kept: list[int], index: int) -> None:
    """Add the best next step of one choice: the one with the steepest fall of the loss for its elements."""
    losses, now = choices[index].losses, kept[index]
    if now == len(losses):
        return
    slopes = (losses[now:] - losses[now - 1]) / np.arange(1, len(losses) - now + 1)
    n = now + 1 + int(slopes.argmin())
    heapq.heappush(steps, (float(slopes.min()) / (choices[index].weights / len(losses)), index, n))
