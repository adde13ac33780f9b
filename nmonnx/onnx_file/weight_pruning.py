"""Pruning of weights by magnitude, the baseline WT of arXiv 2509.22166."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from nmonnx.pattern import Pattern, Share
from nmonnx.reference import keep_mask


@dataclass(frozen=True)
class PrunedWeight:
    """A new initializer that is a stored 2-D weight with its small values set to 0, made when the model is saved.

    channels  axis of `source` that holds the input channels K
    """

    name: str
    source: TensorProto
    pattern: Pattern
    channels: int

    @property
    def elem(self) -> int:
        return self.source.data_type

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(self.source.dims)

    @property
    def how(self) -> str:
        return f"pruned {self.pattern}"

    def values(self, stored: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(prune_weight(stored, self.pattern, self.channels))


def prune_weight(weight: np.ndarray, pattern: Pattern, channels: int = 0) -> np.ndarray:
    """`weight` [K, N], or [N, K] with `channels` 1, without its small values, as its authors do it: N:M along K for
    each output, unstructured by one threshold of the layer, of which what equals it stays."""
    if isinstance(pattern, Share):
        size = np.abs(weight.astype(np.float32)).reshape(-1)
        dropped = size.size - size.size * pattern.n // pattern.m
        if not dropped:
            return weight
        bound = np.partition(size, dropped)[dropped] if dropped < size.size else np.inf
        mask = ~(size < bound).reshape(weight.shape)
    else:
        mask = np.moveaxis(keep_mask(np.moveaxis(weight, channels, -1), pattern.n, pattern.m), -1, channels)
    return np.where(mask, weight, np.zeros((), weight.dtype))
