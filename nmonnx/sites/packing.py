"""Packed weights of ONNX Runtime's contributed operators, as float32 [K, N]."""

from __future__ import annotations

import math

import numpy as np

from nmonnx.errors import InputError
from nmonnx.onnx_file.tensors import unpack_bits

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
_FP4 = (0.0, 5.208333333e-03, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)


def nbits_values(
    k: int,
    n: int,
    bits: int,
    block: int,
    codes: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None = None,
    g_idx: np.ndarray | None = None,
) -> np.ndarray:
    """MatMulNBits: codes [N, blocks, block * bits / 8] with the low bits first, scales [N, blocks] (or flat),
    zero points packed along the blocks, or of the type of the scales, or 2^(bits - 1) when left out."""
    blocks = -(-k // block)
    values = _unpack(codes.reshape(n, -1), bits)[:, : blocks * block].astype(np.float32)
    scale = scales.astype(np.float32).reshape(n, blocks)
    if zeros is None:
        zero = np.full((n, blocks), 1 << (bits - 1), np.float32)
    elif zeros.dtype == np.uint8:
        zero = _unpack(zeros.reshape(n, -1), bits)[:, :blocks].astype(np.float32)
    else:
        zero = zeros.astype(np.float32).reshape(n, blocks)
    group = np.arange(k) // block if g_idx is None else g_idx[:k]
    return np.ascontiguousarray(((values[:, :k] - zero[:, group]) * scale[:, group]).T)


def bnb4_values(k: int, n: int, block: int, kind: int, codes: np.ndarray, absmax: np.ndarray) -> np.ndarray:
    """MatMulBnb4: flat codes of [N, K], the high nibble first, FP4 (kind 0) or NF4 (kind 1) times the block's
    largest magnitude."""
    packed = codes.reshape(-1).view(np.uint8)
    nibbles = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[: n * k]
    table = np.array(_NF4 if kind == 1 else (*_FP4, *(-v for v in _FP4)), np.float32)
    scale = np.repeat(absmax.astype(np.float32).reshape(-1), block)[: n * k]
    return np.ascontiguousarray((table[nibbles] * scale).reshape(n, k).T)


def expert_values(
    k: int, bits: int, kind: str, codes: np.ndarray, scales: np.ndarray | None = None, zeros: np.ndarray | None = None
) -> np.ndarray:
    """QMoE with integer codes [E, N, K * bits / 8], scales [E, N] or [E, N, blocks], as [E, K, N]."""
    if kind != "int" or scales is None:
        raise InputError(f"expert weights quantised as {kind!r} cannot be read; only integer ones can")
    experts, n = codes.shape[:2]
    scale = scales.astype(np.float32).reshape(experts, n, -1)
    blocks = scale.shape[2]
    values = _unpack(codes.reshape(experts * n, -1), bits)[:, :k].reshape(experts, n, k).astype(np.float32)
    zero: np.ndarray | np.float32 = np.float32(1 << (bits - 1))
    if zeros is not None:
        rows = 1 if zeros.ndim == 2 else n  # without blocks the zero points of all columns are packed in one row
        flat = _unpack(zeros.reshape(experts * rows, -1), bits)[:, : n * blocks // rows]
        zero = _along_k(flat.reshape(experts, n, blocks).astype(np.float32), k)
    return ((values - zero) * _along_k(scale, k)).transpose(0, 2, 1)


def _along_k(per_block: np.ndarray, k: int) -> np.ndarray:
    return np.repeat(per_block, math.ceil(k / per_block.shape[2]), axis=2)[..., :k]


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """[rows, bytes] -> [rows, bytes * 8 / bits], the low bits first."""
    if bits not in (2, 4, 8):
        raise InputError(f"weights of {bits} bits cannot be read; 2, 4 and 8 can")
    return unpack_bits(packed.view(np.uint8), bits)
