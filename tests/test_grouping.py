"""The channel order and the allocation, against what they promise."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nmonnx.pruning.allocate import Choice, allocate
from nmonnx.pruning.grouping import deal, lost, swap, unstructured
from nmonnx.reference import keep_mask


@given(st.integers(1, 100), st.sampled_from([1, 2, 4, 8, 16]), st.integers(0, 99))
def test_the_order_is_a_permutation_that_spreads_the_strongest(channels: int, group: int, seed: int) -> None:
    strength = np.random.default_rng(seed).random(channels)
    order = deal(strength, group)
    assert sorted(order.tolist()) == list(range(channels))
    groups = [order[start : start + group] for start in range(0, channels, group)]
    strongest = set(np.argsort(-strength)[: len(groups)].tolist())
    assert all(len(strongest & set(g.tolist())) == 1 for g in groups)


@settings(max_examples=40)
@given(st.integers(1, 80), st.sampled_from([(1, 2), (2, 4), (8, 16)]), st.integers(0, 99))
def test_exchanges_keep_a_permutation_and_crowd_groups_no_more(channels, pattern, seed) -> None:
    keep, group = pattern
    score = np.random.default_rng(seed).random((20, channels)).astype(np.float32)
    before = deal(score.mean(axis=0), group)
    after = swap(before, score, keep, group)
    assert sorted(after.tolist()) == list(range(channels))
    wanted = unstructured(score, keep, group)
    assert _crowding(wanted, after, group) <= _crowding(wanted, before, group)


def _crowding(wanted: np.ndarray, order: np.ndarray, group: int) -> int:
    starts = np.arange(0, len(order), group)
    return int(np.square(np.add.reduceat(wanted[:, order], starts, axis=1, dtype=np.int64)).sum())


def test_channels_wanted_together_are_parted_until_nothing_is_lost() -> None:
    rng = np.random.default_rng(1)
    first = rng.random(200) < 0.5
    half = np.arange(32) < 16
    score = np.where(half == first[:, None], 2.0, 1.0).astype(np.float32) + rng.random((200, 32), np.float32) / 8
    told = lost(score, 8, 16, swap(np.arange(32), score, 8, 16))
    assert told.bound == told.order < told.lie
    assert lost(score, 16, 16, np.arange(32)) == lost(np.zeros((3, 32)), 8, 16, np.arange(32))  # nothing is lost


@settings(max_examples=30)
@given(st.integers(1, 50), st.integers(1, 4), st.integers(0, 99))
def test_no_order_beats_the_bound(channels: int, keep: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    score = rng.normal(size=(9, channels)).astype(np.float32) ** 2
    order = rng.permutation(channels)
    told = lost(score, keep, 4, order)
    whole = float(np.square(score, dtype=np.float64).sum())
    dropped = float((np.square(score, dtype=np.float64) * ~keep_mask(score, keep, 4, None, None, order)).sum())
    assert told.bound <= told.order + 1e-12
    assert abs(told.order - dropped / whole) < 1e-12


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
