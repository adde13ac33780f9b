"""What a shift moves the activation by before it is pruned: numbers from calibration, or a number of each token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from nmonnx.records.stats import Seen
    from nmonnx.reference import Center

_GRID = 4096
"""Places at which the density of all values is looked at."""


def channel_mean(seen: Seen) -> np.ndarray:
    """[K]: the mean of each channel over all calibrated tokens."""
    return seen.mean


def channel_median(seen: Seen) -> np.ndarray:
    """[K]: the lower median of each channel over the sampled tokens."""
    sample = _sample(seen)
    middle = (len(sample) - 1) // 2
    return np.partition(sample, middle, axis=0)[middle].astype(np.float32)


def channel_mode(seen: Seen) -> np.ndarray:
    """[K]: the half-sample mode of each channel over the sampled tokens (Bickel and Fruehwirth, 2006).

    Of the sorted values the half that lies closest together is taken, and so on until two are left, whose mean it is.
    Of equally close halves the lowest; of three values the closer two.
    """
    values = np.sort(_sample(seen), axis=0).astype(np.float64)
    count, columns = len(values), np.arange(values.shape[1])
    start = np.zeros(values.shape[1], np.int64)
    while count > 2:
        half = 2 if count == 3 else -(-count // 2)
        at = start + np.arange(count - half + 1)[:, None]
        width = values[at + half - 1, columns] - values[at, columns]
        start, count = start + width.argmin(axis=0), half
    return ((values[start, columns] + values[start + count - 1, columns]) / 2).astype(np.float32)


def token_median(seen: Seen) -> np.ndarray:
    """[1]: the mean over all calibrated tokens of their lower median over channels."""
    return np.array([seen.token_median], np.float32)


def token_mean(seen: Seen) -> np.ndarray:
    """[1]: the mean over all calibrated tokens of their mean over channels."""
    return np.array([seen.mean.mean(dtype=np.float64)], np.float32)


def density_peak(seen: Seen) -> np.ndarray:
    """[1]: where the density of all sampled values is highest, as SCAP takes it (arXiv 2412.07174).

    The density is a Gaussian kernel estimate with Silverman's bandwidth, 0.9 min(deviation, interquartile range / 1.34)
    n^(-1/5), on 4096 places between the 0.1th and the 99.9th percentile. Where half of the values are equal it is
    those.
    """
    values = _sample(seen).reshape(-1).astype(np.float64)
    low, first, middle, third, high = np.percentile(values, (0.1, 25, 50, 75, 99.9), method="lower")
    if first == third:
        return np.array([middle], np.float32)
    bandwidth = 0.9 * min(values.std(), (third - first) / 1.34) * len(values) ** -0.2
    counts, edges = np.histogram(values, _GRID, (low, high))
    step = edges[1] - edges[0]
    reach = min(int(np.ceil(4 * bandwidth / step)), _GRID // 2 - 1)
    kernel = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) * step / bandwidth))
    peak = int(np.convolve(counts, kernel, "same").argmax())
    return np.array([edges[peak] + step / 2], np.float32)


SHIFTS: Mapping[str, Callable[[Seen], np.ndarray]] = {
    "s-pts": channel_mean,
    "s-pts-median": channel_median,
    "s-pts-mode": channel_mode,
    "s-pts-scalar": token_median,
    "s-pts-scalar-mean": token_mean,
    "s-pts-scalar-mode": density_peak,
}
"""Fixed shifts, [K] or [1] float32 (S-PTS of Alanova et al., arXiv 2509.22166): biases make up for them."""

CENTERS: Mapping[str, Center] = {"d-pts": "median", "d-pts-mean": "mean"}
"""Shifts of each token by a number of its own (D-PTS of the same paper). Its formula has the mean, its list of
contributions and its code have the lower median."""


def _sample(seen: Seen) -> np.ndarray:
    """[R, K] float32; of no tokens the mean stands for one."""
    return seen.sample.astype(np.float32) if len(seen.sample) else seen.mean[None]
