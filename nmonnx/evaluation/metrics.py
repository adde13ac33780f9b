"""How close one array is to another, added up over any number of pairs of any type."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_CHUNK = 1 << 20
_TOP = 5


@dataclass(frozen=True)
class Closeness:
    """How close `b` is to `a`, over the elements that are finite in both.

    elements   elements compared; with none everything counts as equal
    equal      share of the elements that are equal (NaN equals NaN)
    unmatched  elements that are NaN or Inf in one array and not the same in the other; with any, max_abs is inf
    max_abs    largest |a - b|
    mean_abs   mean |a - b|
    relative   ||a - b|| / ||a||
    snr_db     20 log10(||a|| / ||a - b||), inf when equal
    cosine     of the angle between a and b
    """

    elements: int
    equal: float
    unmatched: int
    max_abs: float
    mean_abs: float
    relative: float
    snr_db: float
    cosine: float


@dataclass(frozen=True)
class LogitCloseness:
    """How close the predictions from logits `b` are to those from `a`, over positions.

    positions  rows compared
    kl         mean KL(softmax(a) || softmax(b)) in nats
    kl_max     the largest of a position
    top1       share of the positions with the same best token
    top5       mean share of the five best tokens of `a` that are among the five best of `b`
    """

    positions: int
    kl: float
    kl_max: float
    top1: float
    top5: float


def closeness(a: np.ndarray, b: np.ndarray) -> Closeness:
    """Compare two arrays of one shape. Raises ValueError when the shapes differ."""
    tally = Tally()
    tally.add(a, b)
    return tally.result()


def logit_closeness(a: np.ndarray, b: np.ndarray) -> LogitCloseness:
    """Compare two arrays of logits [..., vocabulary]. Raises ValueError when the shapes differ."""
    tally = LogitTally()
    tally.add(a, b)
    return tally.result()


class Tally:
    """Adds up what `Closeness` needs, in float64, a piece at a time."""

    def __init__(self) -> None:
        self._elements = self._equal = self._unmatched = self._finite = 0
        self._largest = self._total = 0.0
        self._aa = self._bb = self._ab = self._dd = 0.0

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Count a pair of arrays of one shape. Raises ValueError when the shapes differ."""
        _same_shape(a, b)
        flat_a, flat_b = a.reshape(-1), b.reshape(-1)
        self._elements += a.size
        for start in range(0, a.size, _CHUNK):
            self._add(flat_a[start : start + _CHUNK], flat_b[start : start + _CHUNK])

    def result(self) -> Closeness:
        signal, error = math.sqrt(self._aa), math.sqrt(self._dd)
        return Closeness(
            elements=self._elements,
            equal=self._equal / self._elements if self._elements else 1.0,
            unmatched=self._unmatched,
            max_abs=math.inf if self._unmatched else self._largest,
            mean_abs=self._total / self._finite if self._finite else 0.0,
            relative=relative(error, signal),
            snr_db=_decibel(signal, error),
            cosine=self._cosine(),
        )

    def _add(self, a: np.ndarray, b: np.ndarray) -> None:
        if a.dtype.kind not in "fiub" or b.dtype.kind not in "fiub":  # strings
            same = a == b
            self._equal += int(same.sum())
            self._unmatched += int((~same).sum())
            return
        same = (a == b) | (_is_nan(a) & _is_nan(b))
        self._equal += int(same.sum())
        x, y = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(x) & np.isfinite(y)
        self._unmatched += int((~finite & ~same).sum())
        x, y = x[finite], y[finite]
        error = np.abs(x - y)
        self._finite += x.size
        self._largest = max(self._largest, float(error.max(initial=0.0)))
        self._total += float(error.sum())
        self._aa += float(x @ x)
        self._bb += float(y @ y)
        self._ab += float(x @ y)
        self._dd += float(error @ error)

    def _cosine(self) -> float:
        lengths = math.sqrt(self._aa) * math.sqrt(self._bb)
        if lengths == 0:
            return 1.0 if self._aa == self._bb else 0.0
        return max(-1.0, min(1.0, self._ab / lengths))


class LogitTally:
    """Adds up what `LogitCloseness` needs, some rows at a time."""

    def __init__(self) -> None:
        self._positions = 0
        self._kl = self._kl_max = self._top1 = self._top5 = 0.0

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Count a pair of logits [..., vocabulary]. Raises ValueError when the shapes differ."""
        _same_shape(a, b)
        for x, y in _rows(a, b):
            kl = _kl(x, y)
            best_x, best_y = _best(x, 1), _best(y, 1)
            self._positions += len(x)
            self._kl += float(kl.sum())
            self._kl_max = max(self._kl_max, float(kl.max()))
            self._top1 += float(_shared(best_x, best_y).sum())
            self._top5 += float(_shared(_best(x, _TOP), _best(y, _TOP)).sum())

    def result(self) -> LogitCloseness:
        n = self._positions
        if not n:
            return LogitCloseness(0, 0.0, 0.0, 1.0, 1.0)
        return LogitCloseness(n, self._kl / n, self._kl_max, self._top1 / n, self._top5 / n)


def relative(error: float, signal: float) -> float:
    """error / signal; 0 when there is no error, inf when there is no signal to compare it with."""
    if error == 0:
        return 0.0
    return error / signal if signal else math.inf


def _same_shape(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise ValueError(f"arrays of shapes {list(a.shape)} and {list(b.shape)} cannot be compared")


def _is_nan(x: np.ndarray) -> np.ndarray:
    return np.isnan(x) if x.dtype.kind == "f" else np.zeros(x.shape, bool)


def _decibel(signal: float, error: float) -> float:
    if error == 0:
        return math.inf
    return 20 * math.log10(signal / error) if signal else -math.inf


def _rows(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    vocabulary = a.shape[-1] if a.ndim else 1
    if a.size == 0:
        return
    x, y = a.reshape(-1, vocabulary), b.reshape(-1, vocabulary)
    step = max(1, _CHUNK // vocabulary)
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        yield x[rows].astype(np.float64), y[rows].astype(np.float64)


def _kl(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Per row; inf where a distribution is not one (NaN, or +Inf, among the logits)."""
    log_p, log_q = log_softmax(x), log_softmax(y)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    kl = terms.sum(axis=-1)
    broken = np.isnan(log_p).any(axis=-1) | np.isnan(log_q).any(axis=-1)
    return np.where(broken, np.inf, np.maximum(kl, 0.0))


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Log-probabilities of logits [..., V] in their type; sums in float64. NaN where a row has NaN or +Inf."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        shifted = x - x.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(x.dtype)


def _best(x: np.ndarray, count: int) -> np.ndarray:
    """Indices [rows, count] of the largest logits; NaN is below everything."""
    ranked = np.where(np.isnan(x), -np.inf, x)
    count = min(count, x.shape[-1])
    if count == 1:
        return ranked.argmax(axis=-1)[:, None]
    return np.argpartition(ranked, -count, axis=-1)[:, -count:]


def _shared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Share of the indices of each row of `a` that are in the same row of `b`."""
    return (a[:, :, None] == b[:, None, :]).any(axis=-1).mean(axis=-1)
