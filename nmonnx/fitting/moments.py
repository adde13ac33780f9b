"""`Moments`: weighted sums over the tokens of what one prune takes and gives, and the tokens kept to judge a fit on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from nmonnx.pruning.treatment import Treatment
from nmonnx.reference import variance_ratio

KEPT = 2048
"""Held-out tokens that are kept of each activation, at most; of attention sinks a tenth."""


def pruned(x: np.ndarray, treatment: Treatment) -> tuple[np.ndarray, np.ndarray]:
    """For rows x [R, K] float32, finite: u = x - shift and v = nu P(u). As `reference.prune`, but faster; of equal
    scores any may stay."""
    n, m = treatment.pattern.n, treatment.pattern.m
    u = x if treatment.shift is None else x - treatment.shift.astype(np.float32)
    score = np.abs(u) if treatment.scale is None else np.abs(u) * treatment.scale.astype(np.float32)
    order = np.arange(x.shape[1]) if treatment.order is None else treatment.order
    padding = -len(order) % m
    groups = np.pad(score[:, order], [(0, 0), (0, padding)], constant_values=-1).reshape(len(x), -1, m)
    mask = np.zeros(groups.shape, bool)
    if n < m:
        np.put_along_axis(mask, np.argpartition(groups, m - n, axis=-1)[..., m - n :], True, axis=-1)
    else:
        mask[:] = True
    kept = np.empty(x.shape, bool)
    kept[:, order] = mask.reshape(len(x), -1)[:, : len(order)]
    v = np.where(kept, u, np.float32(0))
    return u, v * variance_ratio(u, v) if treatment.variance else v


def token_weights(x: np.ndarray) -> np.ndarray:
    """[R] float32: the inverse of the squared norm of each row, so that no token outweighs the others; 0 for a row of
    zeros."""
    square = np.einsum("rk,rk->r", x, x, dtype=np.float64)
    return np.divide(1, square, out=np.zeros_like(square), where=square > 0).astype(np.float32)


@dataclass(eq=False)
class Moments:
    """Sums over tokens with weights w, of u = x - shift and v = nu P(u):

    weight    sum of w
    nu        sum of w sqrt(Var[u] / Var[v]), of a fit that needs the `variance`
    u, v      [K], sums of w u and w v
    vv, vu    [K, K], sums of w v v^T and w v u^T; None where no fit needs them
    """

    k: int
    matrices: bool
    variance: bool = False
    weight: float = 0.0
    nu: float = 0.0
    u: np.ndarray = field(init=False)
    v: np.ndarray = field(init=False)
    vv: np.ndarray | None = None
    vu: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.u, self.v = np.zeros(self.k), np.zeros(self.k)
        if self.matrices:
            self.vv, self.vu = np.zeros((self.k, self.k)), np.zeros((self.k, self.k))

    def add(self, x: np.ndarray, treatment: Treatment) -> None:
        """Count rows x [R, K] float32."""
        w = token_weights(x)
        u, v = pruned(x, treatment)
        self.weight += float(w.sum(dtype=np.float64))
        if self.variance:
            self.nu += float((w * variance_ratio(u, v)[:, 0]).sum(dtype=np.float64))
        self.u += w @ u
        self.v += w @ v
        if self.vv is not None and self.vu is not None:
            weighted = v.T * w
            self.vv += weighted @ v
            self.vu += weighted @ u

    @staticmethod
    def bytes(k: int, matrices: bool) -> int:
        """Memory of the sums."""
        return 8 * (2 * k * k if matrices else 0) + 16 * k


@dataclass(eq=False)
class Rows:
    """The first of the rows that come every so often: `every` so many, `most` at most."""

    k: int
    most: int
    every: int = 1
    parts: list[np.ndarray] = field(default_factory=list)
    seen: int = 0
    count: int = 0

    def add(self, x: np.ndarray) -> None:
        first = -self.seen % self.every
        self.seen += len(x)
        chosen = x[first :: self.every][: self.most - self.count]
        if len(chosen):
            self.parts.append(chosen.astype(np.float32))
            self.count += len(chosen)

    def all(self) -> np.ndarray:
        return np.concatenate(self.parts) if self.parts else np.zeros((0, self.k), np.float32)
