"""Closed-form fits: what makes up best, in the mean over calibration tokens, for the pruning of one layer.

With u = x - shift and v = nu P(u) each fit looks for v W' + c close to u W, in the weighted mean over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nmonnx.fitting.moments import Moments, pruned, token_weights
from nmonnx.pruning.treatment import Treatment
from nmonnx.records.corrections import Correction

VARIANCE = ("static-var",)
"""Fits that need the variance of what is pruned."""

MATRICES = ("least-squares", "output-scale", "bias1")
"""Fits that need the Gram matrices."""


@dataclass(frozen=True)
class Judgement:
    """Weighted squared error of the output, relative to the output, on held-out tokens and on attention sinks."""

    before: float
    after: float
    sink_before: float = 0.0
    sink_after: float = 0.0

    @property
    def refusal(self) -> str:
        """Why the correction is not to be applied; "" when it helps."""
        if not self.after < self.before:
            return f"the output error on held-out tokens would be {self.after:.4f}, without it is {self.before:.4f}"
        if self.sink_after > self.sink_before + SINK_MARGIN:
            return (
                f"it moves the first token of a window: its output error would be {self.sink_after:.4f},"
                f" without it is {self.sink_before:.4f}"
            )
        return ""


SINK_MARGIN = 0.01
"""Share of a sink's output energy by which a correction may raise its error."""


def fit_layer(
    names: Sequence[str], weight: np.ndarray, moments: Moments, treatment: Treatment, ridge: float, rank: int
) -> Correction:
    """The correction of a layer with weight [K, N], for the mitigations `names` that are computed."""
    wide = weight.astype(np.float64)
    new, scale, low = wide, None, None
    if "least-squares" in names:
        new = least_squares(wide, moments, ridge, centred="bias" in names)
    if "bias1" in names:
        new = wide + kept_bias(wide, moments, ridge)[:, None]
    if "bias2" in names:
        low = (wide.mean(axis=1, keepdims=True), np.ones((1, wide.shape[1])))
    if "r-sparse" in names:
        low = truncated(wide, rank)
    sparse = new if low is None else new - low[0] @ low[1]
    if "output-scale" in names:
        scale = output_scale(wide - (0 if low is None else low[0] @ low[1]), sparse, moments)
    if "static-var" in names:
        scale = np.full(wide.shape[1], moments.nu / moments.weight)
    folded = sparse if scale is None else sparse * scale
    bias = _bias(wide, folded, low, moments, treatment, "bias" in names)
    return Correction(
        weight=_narrow(new) if new is not wide else None,
        scale=None if scale is None else _narrow(scale),
        bias=_narrow(bias) if bias.any() else None,
        low=None if low is None else (_narrow(low[0]), _narrow(low[1])),
    )


def least_squares(weight: np.ndarray, moments: Moments, ridge: float, centred: bool = False) -> np.ndarray:
    """W' that minimises E||u W - v W'||^2 + l ||W - W'||^2, with l = ridge x the mean of the diagonal of E[v v^T]; with
    a free constant besides when `centred`."""
    vv, vu = _matrices(moments, centred)
    return weight + np.linalg.solve(vv + _ridge(vv, ridge), (vu - vv) @ weight)


def kept_bias(weight: np.ndarray, moments: Moments, ridge: float) -> np.ndarray:
    """bias1: beta [K] that minimises E||(u - v) W - 1 v beta||^2, one number for all outputs, ridge towards 0."""
    vv, vu = _matrices(moments, False)
    return np.linalg.solve(vv + _ridge(vv, ridge), (vu - vv) @ weight.mean(axis=1))


def output_scale(target: np.ndarray, weight: np.ndarray, moments: Moments) -> np.ndarray:
    """[N]: for each output the factor s that minimises E(u target - s v weight)^2; 1 where the output is always 0."""
    vv, vu = _matrices(moments, False)
    both = np.einsum("kn,kn->n", weight, vu @ target)
    own = np.einsum("kn,kn->n", weight, vv @ weight)
    return np.divide(both, own, out=np.ones_like(own), where=own > 0)


def truncated(weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """R-Sparse: A [K, r] and B [r, N], A B the closest matrix of that rank to the weight (its SVD)."""
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    root = np.sqrt(values[:rank])
    return left[:, :rank] * root, root[:, None] * right[:rank]


def judge(
    weight: np.ndarray, correction: Correction, treatment: Treatment, held: np.ndarray, sinks: np.ndarray
) -> Judgement:
    """The error with the correction and without, on rows held [R, K] and sinks [S, K] float32."""
    before, after = _errors(weight, correction, treatment, held)
    return Judgement(before, after, *_errors(weight, correction, treatment, sinks))


def _errors(weight: np.ndarray, correction: Correction, treatment: Treatment, x: np.ndarray) -> tuple[float, float]:
    if not len(x):
        return 0.0, 0.0
    w = token_weights(x)[:, None]
    _, v = pruned(x, treatment)
    shift = 0 if treatment.shift is None else np.broadcast_to(treatment.shift, x.shape[1])
    target, plain = x @ weight, (v + shift) @ weight
    new = weight if correction.weight is None else correction.weight
    if correction.low is not None:
        new = new - correction.low[0] @ correction.low[1]
    if correction.scale is not None:
        new = new * correction.scale
    fixed = (v + shift) @ new + (0 if correction.bias is None else correction.bias)
    if correction.low is not None:
        fixed = fixed + x @ correction.low[0] @ correction.low[1]
    energy = float((w * target * target).sum(dtype=np.float64)) or 1.0
    before, after = (float((w * (y - target) ** 2).sum(dtype=np.float64)) / energy for y in (plain, fixed))
    return before, after


def _bias(
    weight: np.ndarray,
    folded: np.ndarray,
    low: tuple[np.ndarray, np.ndarray] | None,
    moments: Moments,
    treatment: Treatment,
    fitted: bool,
) -> np.ndarray:
    """c, the mean of what is still lacking, where it is `fitted`; and what the shift takes with it: the bias will have
    shift W', not shift W."""
    dense = weight if low is None else weight - low[0] @ low[1]
    shift = np.zeros(1) if treatment.shift is None else treatment.shift.astype(np.float64)
    bias = np.broadcast_to(shift, len(weight)) @ (dense - folded)
    if fitted:
        bias = bias + (moments.u @ dense - moments.v @ folded) / moments.weight
    return bias


def _matrices(moments: Moments, centred: bool) -> tuple[np.ndarray, np.ndarray]:
    assert moments.vv is not None and moments.vu is not None
    vv, vu = moments.vv / moments.weight, moments.vu / moments.weight
    if centred:
        v, u = moments.v / moments.weight, moments.u / moments.weight
        vv, vu = vv - np.outer(v, v), vu - np.outer(v, u)
    return vv, vu


def _ridge(vv: np.ndarray, ridge: float) -> np.ndarray:
    mean = float(np.diag(vv).mean())
    return np.eye(len(vv)) * max(ridge * mean, np.finfo(np.float32).tiny)


def _narrow(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32)
