"""The weights of `NMMatMulNBits`, in numpy: how 8-bit and 4-bit numbers lie, what they are worth, how they are made.

A weight [K, N] is (codes - zeros) * scales, with a row of scales [N] and of zeros [N] for each block of `block_size`
channels; the last block may be shorter. Codes of 8 bits are int8 and lie as they are. Codes of 4 bits are 0..15 and lie
in chunks of 32 columns: byte j of a chunk holds that of column j in its low nibble, that of column 16 + j in its high.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nmonnx.errors import InputError

CHUNK = 32
"""Columns of 4 bits that lie together."""

DEFAULT_ZERO = {4: 8, 8: 0}
"""Bits -> the zero point where none is given."""

BITS = {"int8": 8, "int4": 4}
"""Words for a weight of so many bits."""

BLOCK_SIZE = 32
"""Channels that share a scale in a weight quantised here."""

SMALLEST_BLOCK = 16
"""A block that does not cover every channel is a multiple of so many."""

_SEARCHED = {4: (1.0, 0.92, 0.85), 8: (1.0,)}
"""Bits -> factors of the scale that `quantise` tries: clipping a few may cost less than coarser steps for all."""


@dataclass(frozen=True, eq=False)
class Quantised:
    """W as it lies, scales [blocks, N] (float32 or float16), and zeros [blocks, N] or None for the default."""

    bits: int
    block_size: int
    data: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """The inputs of the op."""
        found = {"W": self.data, "scales": self.scales, "zeros": self.zeros}
        return {slot: values for slot, values in found.items() if values is not None}

    def values(self) -> np.ndarray:
        """float32 [K, N]."""
        channels, columns = self.data.shape[0], self.scales.shape[1]
        codes = (unpack(self.data, columns) if self.bits == 4 else self.data).astype(np.float32)
        zero = DEFAULT_ZERO[self.bits] if self.zeros is None else along(self.zeros, self.block_size, channels)
        return (codes - zero) * along(self.scales, self.block_size, channels)


@dataclass(frozen=True, eq=False)
class Half:
    """A weight in float16 [K, N]."""

    data: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        return {"W": self.data}

    def values(self) -> np.ndarray:
        return self.data.astype(np.float32)


def in_form(weight: np.ndarray, form: str) -> Quantised | Half:
    """A weight [K, N] as "fp16", "int8" or "int4". Raises InputError, with the reason alone, where it has none."""
    if form in BITS:
        return quantise(weight, BITS[form])
    with np.errstate(over="ignore"):
        half = weight.astype(np.float16)
    if not np.isfinite(half).all():
        raise InputError("it holds values that are not finite, or beyond the range of float16")
    return Half(half)


def relative_norm(gap: np.ndarray, of: np.ndarray) -> float:
    """|gap| / |of|, Frobenius norms; 0 for a weight of zeros."""
    size = float(np.linalg.norm(of))
    return float(np.linalg.norm(gap)) / size if size else 0.0


def along(rows: np.ndarray, block_size: int, channels: int) -> np.ndarray:
    """A row for each block [blocks, N] -> float32, one for each channel [K, N], or [1, N] where one block has all."""
    wide = rows.astype(np.float32)
    return wide if len(wide) == 1 else np.repeat(wide, block_size, axis=0)[:channels]


def blocks_of(channels: int, block_size: int) -> int:
    return -(-channels // block_size)


def packed_shape(channels: int, columns: int, bits: int) -> tuple[int, int]:
    """Shape of W as it lies."""
    return (channels, columns if bits == 8 else CHUNK // 2 * -(-columns // CHUNK))


def pack(codes: np.ndarray) -> np.ndarray:
    """Codes of 4 bits, uint8 [K, N] -> as they lie, [K, 16 * ceil(N / 32)]; columns that are not there are 0."""
    channels, columns = codes.shape
    padded = np.pad(codes.astype(np.uint8, copy=False), ((0, 0), (0, -columns % CHUNK)))
    halves = padded.reshape(channels, -1, 2, CHUNK // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(channels, -1)


def unpack(data: np.ndarray, columns: int) -> np.ndarray:
    """The reverse of `pack`."""
    chunks = data.reshape(len(data), -1, CHUNK // 2)
    return np.concatenate([chunks & 15, chunks >> 4], axis=2).reshape(len(data), -1)[:, :columns]


def quantise(weight: np.ndarray, bits: int, block_size: int = BLOCK_SIZE) -> Quantised:
    """A weight float32 [K, N], rounded to the nearest of 2^bits steps around 0 in each block of each column.

    The value of the largest magnitude gets the lowest code, -2^(bits - 1), or where that spares squared error a little
    less: the best of a few scales is taken. They are float16, or float32 where one is out of that range. Raises
    InputError, with the reason alone, for values that are not finite.
    """
    if not np.isfinite(weight).all():
        raise InputError("it holds values that are not finite")
    channels, columns = weight.shape
    blocks, lowest = blocks_of(channels, block_size), -(1 << (bits - 1))
    padded = np.pad(weight.astype(np.float32, copy=False), ((0, blocks * block_size - channels), (0, 0)))
    cut = padded.reshape(blocks, block_size, columns)
    high, low = cut.max(axis=1), cut.min(axis=1)
    widest = np.where(high > -low, high, low) / np.float32(lowest)
    kind = np.float16 if _fits_half(widest) else np.float32
    best, scales, codes = np.full(widest.shape, np.inf, np.float32), np.zeros_like(widest), np.zeros(cut.shape, np.int8)
    for factor in _SEARCHED[bits]:
        tried = (widest * np.float32(factor)).astype(kind).astype(np.float32)
        rounded = _rounded(cut, tried[:, None], lowest)
        error = np.square(rounded * tried[:, None] - cut).sum(axis=1)
        better = error < best
        best, scales = np.where(better, error, best), np.where(better, tried, scales)
        np.copyto(codes, rounded.astype(np.int8), where=better[:, None])
    whole = codes.reshape(-1, columns)[:channels]
    data = whole if bits == 8 else pack(whole.astype(np.int16) + DEFAULT_ZERO[4])
    return Quantised(bits, block_size, np.ascontiguousarray(data), scales.astype(kind))


def in_half(scales: np.ndarray) -> np.ndarray:
    """The same scales in float16 if every one is a float16, else as they are."""
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    return half if np.array_equal(half.astype(scales.dtype), scales) else scales


def _rounded(cut: np.ndarray, scales: np.ndarray, lowest: int) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(scales == 0, np.float32(0), cut / scales)
    return np.clip(np.rint(steps), lowest, -1 - lowest)


def _fits_half(scales: np.ndarray) -> bool:
    """Whether no scale loses more than a rounding in float16."""
    size, limits = np.abs(scales), np.finfo(np.float16)
    return bool(((size == 0) | ((size >= 2 * limits.tiny) & (size <= limits.max))).all())
