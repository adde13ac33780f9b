"""`Q4Blocks`: 4-bit GGUF blocks as com.microsoft::MatMulNBits takes them, without a second rounding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK = 32
"""Input channels that share one scale."""

LOSSLESS = {"Q4_0": 18, "Q4_1": 20}
"""GGUF types whose blocks map exactly, with their bytes a block."""


@dataclass(frozen=True)
class Q4Blocks:
    """w = (code - zero_point) * scale.

    codes        uint8 [N, K / 32, 16]: two codes a byte, the lower channel in the lower nibble
    scales       float32 [N, K / 32]
    zero_points  float32 [N, K / 32]
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray

    @classmethod
    def stack(cls, parts: list[Q4Blocks]) -> Q4Blocks:
        """Several matrices of one K, one below the other along N."""
        return cls(
            np.concatenate([p.codes for p in parts]),
            np.concatenate([p.scales for p in parts]),
            np.concatenate([p.zero_points for p in parts]),
        )


def from_gguf(rows: np.ndarray, kind: str) -> Q4Blocks:
    """Repack the rows of a Q4_0 or Q4_1 tensor, uint8 [N, K / 32 * bytes a block].

    Q4_1 says w = d * code + m, so the zero point is -m / d; Q4_0 says w = d * (code - 8).
    """
    blocks = rows.reshape(rows.shape[0], -1, LOSSLESS[kind])
    codes, scales = _interleave(blocks[:, :, -16:]), _half(blocks, 0)
    if kind == "Q4_0":
        return Q4Blocks(codes, scales, np.full_like(scales, 8.0))
    minimum, flat = _half(blocks, 2), scales == 0
    # A block without spread (d = 0) holds the one value m: code 1, scale m.
    codes[flat] = 0x11
    zero_points = np.divide(-minimum, scales, out=np.zeros_like(scales), where=~flat)
    return Q4Blocks(codes, np.where(flat, minimum, scales), zero_points)


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, :, start : start + 2]).view(np.float16)[..., 0].astype(np.float32)


def _interleave(packed: np.ndarray) -> np.ndarray:
    """GGUF keeps channels 0..15 in the low nibbles and 16..31 in the high ones."""
    channels = np.concatenate([packed & 15, packed >> 4], axis=-1)
    return channels[..., 0::2] | channels[..., 1::2] << 4
