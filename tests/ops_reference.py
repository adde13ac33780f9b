"""The op contract in numpy, written for reading: one group after the other, no trick shared with the kernels."""

from __future__ import annotations

import numpy as np


def kept(x, keep: int, group: int, scale=None, shift=None, order=None) -> np.ndarray:
    """Boolean mask of the kept channels, in the shape of `x` [..., K]."""
    x = np.asarray(x)
    channels = x.shape[-1]
    rows = _score(x, scale, shift).reshape(-1, channels) if x.size else np.zeros((0, channels), np.float32)
    places = np.arange(channels) if order is None else np.asarray(order)
    mask = np.zeros(rows.shape, bool)
    for row, score in zip(mask, rows, strict=True):
        for start in range(0, channels, group):
            members = places[start : start + group]
            values = np.where(np.isnan(score[members]), np.inf, score[members])
            is_nan = np.isnan(score[members])
            best = np.lexsort((np.arange(len(members)), -values, ~is_nan))  # NaN first, ties to the lowest index
            row[members[best[:keep]]] = True
    return mask.reshape(x.shape)


def prune(x, keep: int, group: int, scale=None, shift=None, order=None) -> np.ndarray:
    """y of NMPrune."""
    x = np.asarray(x)
    with np.errstate(all="ignore"):
        z = x if shift is None else _shifted(x, shift).astype(x.dtype)
    return np.where(kept(x, keep, group, scale, shift, order), z, np.zeros((), x.dtype))


def matmul(x, w, keep: int, group: int, bias=None, scale=None, shift=None, order=None) -> np.ndarray:
    """y of NMMatMul in float64; w [K, N], bias [N] or [1]."""
    y = prune(x, keep, group, scale, shift, order).astype(np.float64) @ np.asarray(w, np.float64)
    return y if bias is None else y + np.asarray(bias, np.float64)


def _shifted(x: np.ndarray, shift) -> np.ndarray:
    wide = x.astype(np.float64 if x.dtype == np.float64 else np.float32)
    return wide - np.asarray(shift, np.float32)


def _score(x: np.ndarray, scale, shift) -> np.ndarray:
    with np.errstate(all="ignore"):
        z = x if shift is None else _shifted(x, shift)
        score = np.abs(z.astype(np.float32))
        if scale is None:
            return score
        scale = np.asarray(scale, np.float32)
        return np.where(scale == 0, np.float32(0), score * scale)
