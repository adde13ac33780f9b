"""Multiply some rows of what a layer saw with its weight: its own error, and whether its op and biases are right."""

from __future__ import annotations

import math

import numpy as np

from nmonnx.errors import InputError
from nmonnx.evaluation.metrics import relative
from nmonnx.reference import center_of
from nmonnx.sites import Site
from nmonnx.validate.probe import Probe
from nmonnx.validate.unfolded import beyond_unfolded, is_measured

ROWS = 64
"""Rows of an activation that are multiplied with the weight; bounds time."""

_LARGEST_WEIGHT = 1 << 28
"""Weights with more elements than this are not multiplied again."""

_BLOCK = 1 << 22
"""Elements of a weight that are widened to float64 at once; bounds memory."""


def multiply(probe: Probe, site: Site | None) -> None:
    """The layer's own error, and for a fused op how far its output is beyond rounding, on some rows."""
    claim = probe.claim
    if site is None or not probe.tokens or claim.k * claim.n > _LARGEST_WEIGHT:
        return
    try:
        weight = site.weight()
    except InputError as e:
        probe.note = str(e)
        return
    if weight.shape != (claim.k, claim.n):
        probe.note = f"its error is not measured: its weight has shape {list(weight.shape)}"
        return
    original, weight = weight, probe.own_weight() if probe.own_weight else probe.folded.weight(weight)
    if not probe.folded.bias and (np.any(probe.options.get("shift", 0)) or probe.own_bias is not None):
        probe.misfold = _misfold(probe, site.alpha * weight)
    if probe.correction is not None and is_measured(probe, site):
        probe.beyond = beyond_unfolded(probe, probe.correction, original, ROWS)
    if probe.center:
        probe.missum = _missum(probe, site.alpha * weight)
    x = np.concatenate(probe.before)[:ROWS].astype(np.float32)
    if "dense" in probe.options:
        probe.options["dense"] = np.concatenate(probe.dense)[:ROWS]
    with np.errstate(invalid="ignore", over="ignore"):
        lost = (x - np.concatenate(probe.chosen)[:ROWS]) @ original if probe.chosen else probe.lost(x, original, weight)
        products = (lost, x @ original)
        lost, whole = (np.linalg.norm(rows.astype(np.float64)) for rows in products)
    probe.error = relative(float(lost), float(whole))
    if probe.fused:
        probe.excess = _excess(probe, weight)


def _misfold(probe: Probe, weight: np.ndarray) -> float:
    """Largest difference of the bias, or of what is added behind the layer, from what it should be: the original's bias
    + shift W. In units of rounding."""
    shift = np.broadcast_to(probe.options.get("shift", np.zeros(1)), probe.claim.k)
    if probe.fused:
        made = probe.options.get("bias", np.zeros(1, np.float32)).reshape(-1)
        return _beyond_rounding(made, shift, weight, probe.own_bias)
    behind = probe.addition.values if probe.addition is not None else None
    if behind is None and probe.folded.corrected:
        new, old = probe.folded.biases()
        return _beyond_rounding(new, shift, weight, old)
    return math.inf if behind is None else _beyond_rounding(behind, shift, weight)


def _missum(probe: Probe, weight: np.ndarray) -> float:
    """The same of what the rows of the weight add up to."""
    made = probe.options.get("row_sum") if probe.fused else getattr(probe.addition, "values", None)
    return math.inf if made is None else _beyond_rounding(made, np.ones(probe.claim.k), weight)


def _beyond_rounding(made: np.ndarray, rows: np.ndarray, weight: np.ndarray, own: np.ndarray | None = None) -> float:
    """Largest |made - (own + rows W)| in units of the rounding of float32 sums and of the type of `made`."""
    wide, rows = weight.astype(np.float64), rows.astype(np.float64)
    start = np.zeros(1) if own is None else own.reshape(-1).astype(np.float64)
    bound = np.abs(start) + np.abs(rows) @ np.abs(wide)
    unit = np.finfo(made.dtype).eps + np.finfo(np.float32).eps
    gap = np.abs(made.astype(np.float64) - (start + rows @ wide))
    return float(np.where(gap == 0, 0.0, gap / np.maximum(unit * bound, np.finfo(made.dtype).tiny)).max(initial=0.0))


def _excess(probe: Probe, weight: np.ndarray) -> float:
    """Largest |y - reference| in units of what rounding explains: float32 sums in any order, and the rounding of y."""
    x, y, dense = (np.concatenate(part)[:ROWS] for part in zip(*probe.after, strict=True))
    if "dense" in probe.options:
        probe.options["dense"] = dense
    bias = probe.options.get("bias", np.zeros(1, np.float32)).reshape(-1).astype(np.float64)
    pruned = probe.prune(x).astype(np.float64)
    if probe.center:  # one more channel, for which every column of the weight is its row_sum
        pruned = np.hstack([pruned, center_of(x, probe.center, probe.options.get("shift")).astype(np.float64)])
        weight = np.vstack([weight, probe.options["row_sum"]])
    more = np.broadcast_to(bias + probe.folded.added(x), y.shape)
    room = np.broadcast_to(np.abs(bias) + probe.folded.room(x), y.shape)
    width = max(1, _BLOCK // probe.claim.k)
    blocks = [slice(start, start + width) for start in range(0, probe.claim.n, width)]
    rounds = probe.folded.rounds
    steps = probe.step * np.abs(probe.prune(x).astype(np.float64)).max(axis=1, initial=0, keepdims=True)
    steps = steps * (pruned != 0) if probe.step else np.zeros((1, len(weight)))
    parts = (_excess_of(pruned, weight[:, b], more[:, b], room[:, b], y[:, b], rounds, steps) for b in blocks)
    return max(parts, default=0.0)


def _excess_of(
    pruned: np.ndarray,
    weight: np.ndarray,
    more: np.ndarray,
    room: np.ndarray,
    y: np.ndarray,
    rounds: int,
    steps: np.ndarray,
) -> float:
    """`more` [R, N] is added to the product, in sums as large as `room`, with so many `rounds` to the type of y. Each
    of `pruned` may be rounded by as much as `steps` before."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        want = pruned @ weight + more
        bound = np.abs(pruned) @ np.abs(weight) + room
        unit = rounds * np.finfo(y.dtype).eps + (len(weight) + 1) * np.finfo(np.float32).eps
        gap = np.maximum(np.abs(y - want) - steps @ np.abs(weight), 0)
        ratio = np.where(gap == 0, 0.0, gap / (unit * bound))
        alike = np.where(np.isfinite(want), _overflows(want, bound, y, unit), same(want.astype(y.dtype), y))
    ratio = np.where(np.isfinite(want) & np.isfinite(y), ratio, np.where(alike, 0.0, np.inf))
    return float(np.nan_to_num(ratio, nan=np.inf).max(initial=0.0))


def _overflows(want: np.ndarray, bound: np.ndarray, y: np.ndarray, unit: float) -> np.ndarray:
    """Where `y` may be what it is, Inf or NaN, though the sum is finite: because a partial sum leaves the range of
    float32, or because the sum rounds to Inf in y's own type."""
    partial = bound * (1 + unit) >= np.finfo(np.float32).max
    rounded = (np.abs(want) + unit * bound >= np.finfo(y.dtype).max) & (y == np.copysign(np.inf, want))
    return partial | rounded


def same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Equal in value and sign of zero, or both NaN."""
    return ((a == b) & (np.signbit(a) == np.signbit(b))) | (np.isnan(a) & np.isnan(b))


def close(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Equal up to the rounding of a factor that is computed in float32, of sums over all channels."""
    unit = 4 * np.finfo(a.dtype).eps + 64 * np.finfo(np.float32).eps
    with np.errstate(invalid="ignore", over="ignore"):
        return same(a, b) | (np.abs(a.astype(np.float64) - b) <= unit * np.abs(b.astype(np.float64)))
