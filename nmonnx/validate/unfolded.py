"""A corrected layer by the formula of its correction, not folded: an error of a fold is not one of the pruning."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nmonnx.records.corrections import Correction
from nmonnx.sites import Site
from nmonnx.validate.probe import Probe

_EXACT = ("MatMul", "Gemm")
"""Layers that multiply what they are given; others quantise it first, which no rounding explains."""


def is_measured(probe: Probe, site: Site) -> bool:
    """Whether the layer computes what its formula says up to rounding."""
    exact = site.op in _EXACT or (site.op == "MatMulNBits" and site.node.attrs.get("accuracy_level", 0) < 2)
    fused = probe.claim.kernel == "NMMatMul"  # NMMatMulNBits rounds what it is given too
    return (
        bool(probe.outputs and probe.after) and not probe.step and (fused or (exact and site.splice[0][0] is site.node))
    )


def beyond_unfolded(probe: Probe, correction: Correction, weight: np.ndarray, rows: int) -> float:
    """Largest |y - want| in units of rounding, on some rows that the converted model saw, where in float64

        want = nu (P(x - shift) (weight - A B)) scale + x A B + own + bias + shift (weight - A B) scale

    with the names of `Correction`. nu P(x - shift) is what the op of the file makes of x, and `own` what the layer of
    the original adds to x W, as it was measured there; `weight` [K, N] is that of the original. Rounded are W' and b'
    to the types in which they are stored, every sum, in any order, to float32, and y to its type."""
    dense, old = (np.concatenate(part)[:rows].astype(np.float64) for part in (probe.before, probe.outputs))
    x, y, _ = (np.concatenate(part)[:rows] for part in zip(*probe.after, strict=True))
    kept = probe.prune(x).astype(np.float64)
    shift = np.broadcast_to(probe.options.get("shift", np.zeros(1)), probe.claim.k)
    low = correction.low or (np.zeros((probe.claim.k, 1)), np.zeros((1, probe.claim.n)))
    new = weight if correction.weight is None else correction.weight
    scale = np.ones(1) if correction.scale is None else correction.scale
    bias = np.zeros(1) if correction.bias is None else correction.bias

    def layer(part: Callable[[np.ndarray], np.ndarray], minus: float) -> np.ndarray:
        """The formula; or, of magnitudes, how large the sums are that get rounded."""
        a, b = (part(m.astype(np.float64)) for m in low)
        rest = part(new.astype(np.float64)) + minus * (a @ b)
        made = part(bias.astype(np.float64)) + part(kept) @ rest * part(scale) + part(x.astype(np.float64)) @ a @ b
        return made + part(shift.astype(np.float64)) @ rest * part(scale)

    own = (old - dense @ weight.astype(np.float64)).mean(axis=0)
    size = np.abs(dense) @ np.abs(weight.astype(np.float64)) + np.abs(old)
    sums = (probe.claim.k + low[0].shape[1] + 8) * np.finfo(np.float32).eps
    unit = probe.folded.rounding + probe.folded.rounds * np.finfo(y.dtype).eps + sums
    bound = unit * (layer(np.abs, 1.0) + size.mean(axis=0))
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.abs(y.astype(np.float64) - (layer(np.asarray, -1.0) + own))
        ratio = np.where(gap == 0, 0.0, gap / np.maximum(bound, np.finfo(np.float32).tiny))
    return float(np.nan_to_num(ratio, nan=np.inf).max(initial=0.0))
