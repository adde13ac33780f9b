"""What the custom ops mean, in numpy: the yardstick that validation and tests measure against."""

from __future__ import annotations

from typing import Literal

import numpy as np

Center = Literal["mean", "median"]


def prune(
    x: np.ndarray,
    keep: int,
    group: int,
    scale: np.ndarray | None = None,
    shift: np.ndarray | None = None,
    order: np.ndarray | None = None,
    variance: bool = False,
    center: Center | None = None,
    dense: np.ndarray | None = None,
) -> np.ndarray:
    """Pruned z = x - shift - center, in the shape and type of `x` [..., K] (float16, float32 or float64).

    Of every `group` consecutive channels of the last axis the `keep` with the largest |z| * scale stay, the
    others become +0. `scale` and `shift` are [K] or [1]; `order` [K] is a permutation along which the groups
    are cut. Kept values are bit-exact when there is no shift and no center. `variance` multiplies them by
    `variance_ratio`; `center` is `center_of` each token. Tokens that are `dense` (bool, one for each token of x or
    one for all) keep all of z, and their ratio is 1.
    """
    z, pruned = _prune(x, keep, group, scale, shift, order, center, dense)
    if not variance:
        return pruned
    with np.errstate(over="ignore"):
        return (_wide(pruned) * variance_ratio(z, pruned)).astype(x.dtype)


def center_of(x: np.ndarray, center: Center, shift: np.ndarray | None = None) -> np.ndarray:
    """eta, the mean or the lower median of x - shift over the channels of each token, as float32 [..., 1].

    A NaN makes both NaN; of no channels both are 0. The mean adds in float64.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        values = _shifted(x, shift).astype(np.float32)
        if not values.shape[-1]:
            return np.zeros((*values.shape[:-1], 1), np.float32)
        if center == "mean":
            return values.mean(axis=-1, keepdims=True, dtype=np.float64).astype(np.float32) + np.float32(0)
    middle = (values.shape[-1] - 1) // 2
    median = np.sort(values, axis=-1)[..., middle : middle + 1]
    missing = np.isnan(values).any(axis=-1, keepdims=True)
    return np.where(missing, np.float32(np.nan), median + np.float32(0))


def variance_ratio(z: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    """nu = sqrt(Var[z] / Var[pruned]) of each token as float32 [..., 1], at most 4; 1 where there is no such number.

    Alanova et al., arXiv 2509.22166, Eq. 5. The variances are over all channels, in float64.
    """
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        before, after = (_squared_deviation(v.astype(np.float64)) for v in (z, pruned))
        ratio = np.sqrt(before / after)
    return np.where(np.isfinite(ratio), np.minimum(ratio, 4), 1).astype(np.float32)


def keep_mask(
    x: np.ndarray,
    keep: int,
    group: int,
    scale: np.ndarray | None = None,
    shift: np.ndarray | None = None,
    order: np.ndarray | None = None,
    center: Center | None = None,
    dense: np.ndarray | None = None,
) -> np.ndarray:
    """Which elements of `x` [..., K] stay, as booleans in its shape.

    1. NaN ranks above Inf, Inf above the rest; of equal scores the one that comes first in its group stays.
    2. A channel with scale 0 scores 0, whatever it holds.
    3. Scores are float32, of float64 values too.
    4. The last K mod group channels are a group of their own that keeps min(keep, K mod group).
    5. A token that is `dense` keeps every channel. Raises ValueError for another number of them than one or the tokens.
    """
    mask = _selected(x, keep, group, scale, shift, order, center)
    if dense is None:
        return mask
    shape = (*x.shape[:-1], 1)
    return mask | (dense.reshape(-1)[0] if dense.size == 1 else dense.reshape(shape))


def _selected(
    x: np.ndarray,
    keep: int,
    group: int,
    scale: np.ndarray | None,
    shift: np.ndarray | None,
    order: np.ndarray | None,
    center: Center | None,
) -> np.ndarray:
    score = scores(x, scale, shift, center)
    if order is not None:
        score = score[..., order]
    channels = score.shape[-1]
    padding = -channels % group
    padded = np.pad(score, [(0, 0)] * (score.ndim - 1) + [(0, padding)], constant_values=-np.inf)
    groups = padded.reshape(*score.shape[:-1], (channels + padding) // group, group)
    missing = np.isnan(groups)
    ranked = np.lexsort((-np.where(missing, 0, groups), ~missing), axis=-1)
    kept = np.zeros(groups.shape, bool)
    np.put_along_axis(kept, ranked[..., :keep], True, axis=-1)
    mask = kept.reshape(padded.shape)[..., :channels]
    if order is None:
        return mask
    placed = np.empty_like(mask)
    placed[..., order] = mask
    return placed


def prune_matmul(
    x: np.ndarray,
    weight: np.ndarray,
    keep: int,
    group: int,
    bias: np.ndarray | None = None,
    scale: np.ndarray | None = None,
    shift: np.ndarray | None = None,
    order: np.ndarray | None = None,
    variance: bool = False,
    center: Center | None = None,
    row_sum: np.ndarray | None = None,
    dense: np.ndarray | None = None,
) -> np.ndarray:
    """nu * (prune(x) [..., K] @ weight [K, N]) + eta * row_sum [N] + bias [N] as float64 [..., N].

    nu is 1 without `variance` and where a token is `dense`. eta is `center_of`; a center needs `row_sum`, what the
    rows of the weight add up to.
    """
    if center is not None and row_sum is None:
        raise ValueError("a center needs row_sum")
    z, pruned = _prune(x, keep, group, scale, shift, order, center, dense)
    y = pruned.astype(np.float64) @ weight.astype(np.float64)
    if variance:
        y = y * variance_ratio(z, pruned)
    if center is not None and row_sum is not None:
        y = y + center_of(x, center, shift).astype(np.float64) * row_sum.astype(np.float64)
    return y if bias is None else y + bias


def _prune(
    x: np.ndarray,
    keep: int,
    group: int,
    scale: np.ndarray | None,
    shift: np.ndarray | None,
    order: np.ndarray | None,
    center: Center | None,
    dense: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """z in the type of `x`, and z where it is kept."""
    mask = keep_mask(x, keep, group, scale, shift, order, center, dense)
    with np.errstate(over="ignore"):
        z = x if shift is None and center is None else _moved(x, shift, center).astype(x.dtype)
    return z, np.where(mask, z, np.zeros((), x.dtype))


def _squared_deviation(values: np.ndarray) -> np.ndarray:
    if not values.shape[-1]:
        return np.zeros((*values.shape[:-1], 1))
    off = values - values.mean(axis=-1, keepdims=True)
    return (off * off).sum(axis=-1, keepdims=True)


def scores(
    x: np.ndarray, scale: np.ndarray | None, shift: np.ndarray | None, center: Center | None = None
) -> np.ndarray:
    """|x - shift| * scale in the shape of `x`, float32; 0 where the scale is 0."""
    with np.errstate(invalid="ignore", over="ignore"):
        size = np.abs(_moved(x, shift, center).astype(np.float32))
        return size if scale is None else np.where(scale == 0, np.float32(0), size * scale.astype(np.float32))


def _moved(x: np.ndarray, shift: np.ndarray | None, center: Center | None) -> np.ndarray:
    shifted = _shifted(x, shift)
    if center is None:
        return shifted
    with np.errstate(invalid="ignore", over="ignore"):
        return shifted - center_of(x, center, shift).astype(shifted.dtype)


def _shifted(x: np.ndarray, shift: np.ndarray | None) -> np.ndarray:
    wide = _wide(x)
    if shift is None:
        return wide
    with np.errstate(invalid="ignore", over="ignore"):
        return wide - shift.astype(wide.dtype)


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32) if x.dtype == np.float16 else x
