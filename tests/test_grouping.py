"""The channel order and the allocation, against what they promise."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nmonnx.allocate import Choice, allocate
from nmonnx.grouping import deal


@given(st.integers(1, 100), st.sampled_from([1, 2, 4, 8, 16]), st.integers(0, 99))
def test_the_order_is_a_permutation_that_spreads_the_strongest(channels: int, group: int, seed: int) -> None:
    strength = np.random.default_rng(seed).random(channels)
    order = deal(strength, group)
    assert sorted(order.tolist()) == list(range(channels))
    groups = [order[start : start + group] for start in range(0, channels, group)]
    strongest = set(np.argsort(-strength)[: len(groups)].tolist())
    assert all(len(strongest & set(g.tolist())) == 1 for g in groups)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 4), st.floats(0.3, 1.0))
def test_the_allocation_fits_and_is_near_the_best(seed: int, count: int, keep: float) -> None:
    rng = np.random.default_rng(seed)
    choices = [
        Choice(int(rng.integers(1, 5)) * 100, np.append(np.sort(rng.random(3))[::-1], 0.0)) for _ in range(count)
    ]
    kept = allocate(choices, keep)
    budget = keep * sum(c.weights for c in choices)
    least = sum(c.weights for c in choices) / 4

    def cost(ns: tuple[int, ...]) -> float:
        return sum(c.weights * n / 4 for c, n in zip(choices, ns, strict=True))

    def loss(ns: tuple[int, ...]) -> float:
        return sum(float(c.losses[n - 1]) for c, n in zip(choices, ns, strict=True))

    assert cost(tuple(kept)) <= max(budget, least) + 1e-6
    fitting = [ns for ns in itertools.product(range(1, 5), repeat=count) if cost(ns) <= max(budget, least) + 1e-6]
    # the hull's steps are optimal but for the last one that did not fit
    largest_step = max(float(c.losses[0]) for c in choices)
    assert loss(tuple(kept)) <= min(map(loss, fitting)) + largest_step


def test_everything_is_kept_when_the_bytes_allow_it() -> None:
    assert allocate([Choice(10, np.array([3.0, 1.0, 0.0])), Choice(20, np.array([1.0, 0.5, 0.0]))], 1.0) == [3, 3]
