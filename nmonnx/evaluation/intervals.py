"""Standard errors and confidence intervals of means, of paired differences and of relative drops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def mean_error(values: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float | None]:
    """Weighted mean of independent values and its standard error, None for fewer than two of them. With equal weights
    it is s / sqrt(n); otherwise that of a ratio estimator, for means over unequal numbers of tokens."""
    x = np.asarray(values, np.float64)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    w = w / w.mean()
    mean = float((w * x).mean())
    return mean, _spread(w * (x - mean))


def student_t(degrees: int, level: float = 0.95) -> float:
    """t with P(|T| <= t) = level for Student's distribution of `degrees` degrees of freedom, by bisection."""
    low, high = 0.0, math.pi / 2  # of the angle atan(t / sqrt(degrees))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < level else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def relative_drop(base: Sequence[float], values: Sequence[float]) -> tuple[float, float | None]:
    """(mean base - mean values) / mean base of paired items, and its standard error from the items' residuals, which
    takes the correlation of the pairs into account; None for fewer than two items. `base` must not be 0 on average."""
    b, v = np.asarray(base, np.float64), np.asarray(values, np.float64)
    ratio = float(v.mean() / b.mean())
    return 1 - ratio, _spread((v - ratio * b) / b.mean())


def relative_drop_unpaired(
    base: float, value: float, base_error: float | None, error: float | None
) -> tuple[float, float | None]:
    """(base - value) / base, and its standard error from those of the two as if they were independent; None where one
    of them is unknown. `base` must not be 0."""
    ratio = value / base
    if base_error is None or error is None:
        return 1 - ratio, None
    return 1 - ratio, math.hypot(error, ratio * base_error) / abs(base)


def _spread(residuals: np.ndarray) -> float | None:
    """Standard error of a mean from its residuals."""
    count = len(residuals)
    return float(np.sqrt((residuals**2).sum() / (count * (count - 1)))) if count > 1 else None


def _within(angle: float, degrees: int) -> float:
    """P(|T| <= tan(angle) sqrt(degrees)): the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    if degrees == 1:
        return 2 * angle / math.pi
    term = total = cosine if degrees % 2 else 1.0
    for k in range(3 if degrees % 2 else 2, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if degrees % 2 else sine * total
