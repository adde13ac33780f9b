"""Ops without a kernel, for research: what is not N:M with a constant c[K], by name, and what each means in numpy.

They are functions of stock ops in the file (`nmonnx.passes.emulate_prune`): slower than the dense model, same results
with and without the library.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nmonnx.reference import Center, prune, scores, variance_ratio

SCOPES = ("token", "call", "threshold")
DYNAMIC = ("clact", "anti")
"""Criteria that are no constant factor of the score."""

_PAD = -1.7e308
_NAN = 1.5e308
_HUGE = 1e300


@dataclass(frozen=True)
class Emulated:
    """score   "scale": |x| * scale. "clact": |x_ij| ||x_:j|| / ||x_i:|| (Eq. 4 of arXiv 2509.22166), the norm of a
               channel over all tokens of the call, padding and other sequences included, as its authors compute it; of
               one token |x|, so that prefill in pieces and decoding choose otherwise. "anti": -|x|, the smallest stay
    scope   "group": keep of every group channels. "token": floor(K * keep / group) channels of each token. "call": that
            share of all elements of the call, by one ranking (the authors' form of unstructured CLACT and Amber).
            "threshold": what scores above a constant (TEAL, arXiv 2408.14690)
    inputs  of the op, by position; all are given
    """

    score: str
    scope: str
    inputs: tuple[str, ...]


OPS = {
    "NMTopK": Emulated("scale", "token", ("x", "scale")),
    "NMTopKCall": Emulated("scale", "call", ("x", "scale")),
    "NMThreshold": Emulated("scale", "threshold", ("x", "scale", "threshold")),
    "NMClact": Emulated("clact", "group", ("x",)),
    "NMClactTopK": Emulated("clact", "token", ("x",)),
    "NMClactTopKCall": Emulated("clact", "call", ("x",)),
    "NMAnti": Emulated("anti", "group", ("x",)),
    "NMAntiTopK": Emulated("anti", "token", ("x",)),
    "NMAntiTopKCall": Emulated("anti", "call", ("x",)),
}
"""By name, in the domain of the other ops. Attributes: keep and group."""


def emulated_op(criterion: str, share: bool, scope: str) -> str:
    """The op that prunes by `criterion`, to a share or to N:M; "" where `NMPrune` does it."""
    score = criterion if criterion in DYNAMIC else "scale"
    asked = (score, scope if share else "group")
    return next((name for name, op in OPS.items() if (op.score, op.scope) == asked), "")


def select(
    op: str,
    x: np.ndarray,
    keep: int,
    group: int,
    scale: np.ndarray | None = None,
    threshold: np.ndarray | None = None,
    shift: np.ndarray | None = None,
    variance: bool = False,
    center: Center | None = None,
) -> np.ndarray:
    """What an op of `OPS` makes of all tokens of a call: x - shift - center [..., K] with +0 where a channel is
    dropped, with `variance` times `variance_ratio`, as `nmonnx.reference.prune` does.

    NaN ranks above Inf and always stays where a rank decides; of equal scores the first in its group, token or call
    stays; a channel with scale 0 scores 0. Scores are float32, those of CLACT float64.
    """
    rule = OPS[op]
    flat = x.reshape(-1, x.shape[-1])
    rows = prune(flat, 1, 1, shift=shift, center=center)
    score = _score(rule, scores(flat, None, shift, center), scale)
    if rule.scope == "threshold":
        assert threshold is not None
        mask = score > threshold.astype(np.float64)
    else:
        mask = _ranked(rule.scope, score, keep, group)
    kept = np.where(mask, rows, np.zeros((), x.dtype))
    if variance:
        with np.errstate(over="ignore", invalid="ignore"):
            kept = (kept.astype(np.float64) * variance_ratio(rows, kept)).astype(x.dtype)
    return kept.reshape(x.shape)


def threshold_of(sample: np.ndarray, scale: np.ndarray | None, keep: int, group: int) -> np.ndarray:
    """[1] float32: the score that, of `sample` [R, K], a share keep / group lies above: the layer's threshold of TEAL.
    With the norms of the weights as `scale` it is the channel-wise threshold t / ||W_j|| of CHESS (EMNLP 2024)."""
    size = np.abs(sample.astype(np.float32))
    ranked = np.sort((size if scale is None else size * scale).reshape(-1))
    dropped = ranked.size - ranked.size * keep // group
    return ranked[dropped - 1 : dropped].astype(np.float32)


def _score(rule: Emulated, size: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """float64 [T, K], finite; NaN above all. `size` are the magnitudes, float32."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        if rule.score == "scale" and scale is not None:
            size = np.where(scale == 0, np.float32(0), size * scale.astype(np.float32))
        exact = size.astype(np.float64)
        if rule.score == "clact" and len(size) != 1:
            square = exact * exact
            weighed = exact * np.sqrt(square.sum(axis=0)) / (np.sqrt(square.sum(axis=1, keepdims=True)) + 1e-8)
            exact = np.where(exact == 0, 0.0, weighed)
    finite = np.minimum(exact, _HUGE)
    return np.where(np.isnan(exact), _NAN, -finite if rule.score == "anti" else finite)


def _ranked(scope: str, score: np.ndarray, keep: int, group: int) -> np.ndarray:
    tokens, channels = score.shape
    if scope == "group":
        pad = -channels % group
        padded = np.pad(score, ((0, 0), (0, pad)), constant_values=_PAD)
        return _best(padded.reshape(-1, group), keep).reshape(tokens, channels + pad)[:, :channels]
    if scope == "token":
        return _best(score, channels * keep // group)
    return _best(score.reshape(1, -1), score.size * keep // group).reshape(score.shape)


def _best(score: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(score.shape, bool)
    np.put_along_axis(mask, np.argsort(-score, axis=1, kind="stable")[:, :count], True, axis=1)
    return mask
