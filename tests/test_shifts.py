"""Every shift against a plain reading of its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmonnx.pruning.shifts import SHIFTS
from nmonnx.records.stats import Seen


def seen_of(sample: np.ndarray) -> Seen:
    """Statistics of nothing but these tokens."""
    x = sample.astype(np.float16)
    wide = x.astype(np.float64)
    median = float(np.mean([sorted(token)[(len(token) - 1) // 2] for token in wide])) if len(x) else 0.0
    mean = wide.mean(axis=0) if len(x) else np.zeros(x.shape[1])
    zeros = np.zeros(x.shape[1], np.float32)
    return Seen(len(x), mean.astype(np.float32), zeros, zeros, median, x)


def half_sample_mode(values: list[float]) -> float:
    values = sorted(values)
    while len(values) > 2:
        half = 2 if len(values) == 3 else math.ceil(len(values) / 2)
        spans = [(values[i + half - 1] - values[i], i) for i in range(len(values) - half + 1)]
        start = min(spans)[1]
        values = values[start : start + half]
    return sum(values) / len(values)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_shifts_of_each_channel(tokens: int, channels: int, seed: int, tied: bool) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.integers(-2, 3, (tokens, channels)) if tied else rng.standard_normal((tokens, channels))).astype(
        np.float16
    )
    seen, columns = seen_of(x), x.astype(np.float64).T.tolist()
    np.testing.assert_allclose(SHIFTS["s-pts"](seen), [np.mean(c) for c in columns], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(SHIFTS["s-pts-median"](seen), [sorted(c)[(len(c) - 1) // 2] for c in columns])
    np.testing.assert_allclose(SHIFTS["s-pts-mode"](seen), [half_sample_mode(c) for c in columns], rtol=1e-6)
    np.testing.assert_allclose(SHIFTS["s-pts-scalar-mean"](seen), [np.mean(columns)], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(SHIFTS["s-pts-scalar"](seen), [seen.token_median], rtol=1e-6)


def test_modes_find_the_peak_that_mean_and_median_miss() -> None:
    rng = np.random.default_rng(0)
    x = np.where(rng.random((512, 8)) < 0.4, rng.normal(-1, 0.05, (512, 8)), rng.uniform(0, 8, (512, 8)))
    seen = seen_of(x)
    assert np.abs(SHIFTS["s-pts-mode"](seen) + 1).max() < 0.15
    assert abs(SHIFTS["s-pts-scalar-mode"](seen)[0] + 1) < 0.05
    assert SHIFTS["s-pts-scalar-mean"](seen)[0] > 1 and SHIFTS["s-pts-median"](seen).min() > 0


def test_the_density_peak_is_that_of_the_whole_kernel_estimate() -> None:
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(0.5, 0.3, 300), rng.normal(3, 1, 300)]).reshape(60, 10)
    seen = seen_of(values)
    flat = seen.sample.astype(np.float64).reshape(-1)
    first, third = np.percentile(flat, (25, 75), method="lower")
    bandwidth = 0.9 * min(flat.std(), (third - first) / 1.34) * flat.size**-0.2
    grid = np.linspace(flat.min(), flat.max(), 4000)
    density = np.exp(-0.5 * ((grid[:, None] - flat) / bandwidth) ** 2).sum(axis=1)
    assert abs(SHIFTS["s-pts-scalar-mode"](seen)[0] - grid[density.argmax()]) < 5e-3


@pytest.mark.parametrize("name", SHIFTS)
def test_equal_values_and_no_sample_are_legal(name: str) -> None:
    for sample in (np.full((6, 4), 2.0), np.full((1, 4), 2.0)):
        np.testing.assert_array_equal(np.broadcast_to(SHIFTS[name](seen_of(sample)), 4), np.full(4, 2.0))
    assert np.isfinite(SHIFTS[name](seen_of(np.zeros((0, 4))))).all()


@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift_has_one_number_or_one_a_channel_in_float32(name: str) -> None:
    shift = SHIFTS[name](seen_of(np.random.default_rng(2).standard_normal((9, 5))))
    assert shift.dtype == np.float32 and shift.shape == ((1,) if "scalar" in name else (5,))
