"""`Accumulator`: sums over the tokens of one activation, the same however the tokens are cut into pieces."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_LARGEST = float(np.finfo(np.float16).max)


class Accumulator:
    """Statistics of rows [T, K] that come in pieces: float64 sums, the largest magnitudes, and a sample of the rows.

    The sample is of the `size` rows with the smallest hash of their index, so that it depends neither on how the rows
    are cut into pieces nor on the order in which pieces come or are merged.

    k       channels
    size    most rows of the sample
    rows    rows that were added, all of them
    tokens  rows that count: those that are no sink (see `add`)
    total, square, median  sums over the rows that count: x [K], x * x [K], and the lower median of each row
    abs_max  [K], over all rows
    index    [R], ascending: the indices of the sampled rows
    sample   [R, K] float16, what is out of its range clipped
    """

    def __init__(self, k: int, size: int) -> None:
        self.k, self.size = k, size
        self.rows = self.tokens = 0
        self.median = 0.0
        self.total, self.square = np.zeros(k), np.zeros(k)
        self.abs_max = np.zeros(k, np.float32)
        self._index, self._keys = np.zeros(0, np.int64), np.zeros(0, np.uint64)
        self._sample = np.zeros((0, k), np.float16)

    def add(self, x: np.ndarray, index: np.ndarray | None = None, sink: np.ndarray | None = None) -> None:
        """Add rows [T, K]. `index` [T]: their place among all rows, each place once (default: they follow the rows
        before); `sink` [T], bool: rows that count in `abs_max` alone. Raises ValueError for values that are not
        finite."""
        if index is None:
            index = np.arange(self.rows, self.rows + len(x))
        largest = np.maximum(x.max(axis=0, initial=0), -x.min(axis=0, initial=0)).astype(np.float32)
        if not np.isfinite(largest).all():
            raise ValueError("values that are not finite")
        self.rows += len(x)
        self.abs_max = np.maximum(self.abs_max, largest)
        if sink is not None and sink.any():
            x, index = x[~sink], index[~sink]
        if not len(x):
            return
        wide = x.astype(np.float64)
        self.tokens += len(x)
        self.total += wide.sum(axis=0)
        self.square += np.einsum("tk,tk->k", wide, wide)
        middle = (self.k - 1) // 2
        self.median += float(np.partition(x, middle, axis=1)[:, middle].sum(dtype=np.float64))
        self._take(x, index)

    def merge(self, other: Accumulator) -> None:
        """Add what `other` has seen, other rows of the same activation. Raises ValueError when its K differs."""
        if other.k != self.k:
            raise ValueError(f"{other.k} channels are not {self.k}")
        self.size = max(self.size, other.size)
        self.rows, self.tokens = self.rows + other.rows, self.tokens + other.tokens
        self.median += other.median
        self.total, self.square = self.total + other.total, self.square + other.square
        self.abs_max = np.maximum(self.abs_max, other.abs_max)
        self._take(other._sample, other._index)

    @property
    def index(self) -> np.ndarray:
        return np.sort(self._index)

    @property
    def sample(self) -> np.ndarray:
        return self._sample[np.argsort(self._index, kind="stable")]

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, as arrays to store."""
        counts = np.array([self.size, self.rows, self.tokens], np.int64)
        return {
            "counts": counts,
            "median": np.array(self.median),
            "total": self.total,
            "square": self.square,
            "abs_max": self.abs_max,
            "index": self.index,
            "sample": self.sample,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Accumulator:
        """The inverse of `arrays`. Raises KeyError or ValueError for arrays that are no accumulator's."""
        size, rows, tokens = (int(n) for n in arrays["counts"])
        new = cls(len(arrays["total"]), size)
        new.rows, new.tokens, new.median = rows, tokens, float(arrays["median"])
        new.total, new.square, new.abs_max = (arrays[name] for name in ("total", "square", "abs_max"))
        new._index, new._sample = arrays["index"], arrays["sample"]
        new._keys = _hash(new._index)
        if any(a.shape != (new.k,) for a in (new.square, new.abs_max)) or new._sample.shape != (len(new._index), new.k):
            raise ValueError("arrays of different sizes")
        sums = (new.total, new.square, new.abs_max, np.array(new.median))
        if not all(np.isfinite(a).all() for a in sums) or min(rows, tokens, *new.square, *new.abs_max) < 0:
            raise ValueError("sums that no activations have")
        return new

    def _take(self, x: np.ndarray, index: np.ndarray) -> None:
        """Let rows into the sample; those that they put out give them their place."""
        keys = _hash(index)
        old = len(self._keys)
        if old == self.size:
            near = keys < self._keys.max(initial=0)
            x, index, keys = x[near], index[near], keys[near]
        if not len(x):
            return
        best = np.argsort(np.concatenate([self._keys, keys]), kind="stable")[: self.size]
        new = best[best >= old] - old
        free = np.setdiff1d(np.arange(old), best)
        grown = len(best) - old
        if grown:
            free = np.concatenate([free, np.arange(old, old + grown)])
            self._sample = np.concatenate([self._sample, np.empty((grown, self.k), np.float16)])
            self._index, self._keys = np.resize(self._index, len(best)), np.resize(self._keys, len(best))
        self._sample[free] = np.clip(x[new], -_LARGEST, _LARGEST)
        self._index[free], self._keys[free] = index[new], keys[new]


def _hash(index: np.ndarray) -> np.ndarray:
    """splitmix64, which gives every index another key."""
    z = index.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
