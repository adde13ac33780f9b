"""How `NMMatMulNBits` may use a weight of whole numbers, exactly, whatever way it is stored; or why it may not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from nmonnx.errors import InputError
from nmonnx.nbits import DEFAULT_ZERO, SMALLEST_BLOCK, blocks_of
from nmonnx.onnx_file.tensors import type_name, unpack_bits
from nmonnx.sites.constant import Constant, Dequantised
from nmonnx.sites.site import FusableCodes

Fusing = tuple[FusableCodes | None, str]
"""How the op may use the weight, or None and why not."""

_FORMS: dict[int, tuple[int, int]] = {
    TensorProto.INT8: (8, 0),
    TensorProto.UINT8: (8, -128),
    TensorProto.INT4: (4, 8),
    TensorProto.UINT4: (4, 0),
}
"""Type of stored codes -> their bits, and what is added to them."""

_SCALES = (TensorProto.FLOAT, TensorProto.FLOAT16)


@dataclass(frozen=True, eq=False)
class Packed:
    """The constants of a `MatMulNBits`: codes [N, blocks, bytes] with the low bits first, scales [N, blocks], zero
    points packed as the codes are, or of the type of the scales, or left out."""

    k: int
    n: int
    bits: int
    block: int
    accuracy_level: int
    codes: Constant
    scales: Constant
    zeros: Constant | None
    bias: gs.Tensor | None

    def fusing(self) -> Fusing:
        stored, zeros = self.codes.stored, self.zeros
        if self.bits not in DEFAULT_ZERO:
            return None, f"its weight has {self.bits} bits; NMMatMulNBits takes 4 and 8"
        if self.block % SMALLEST_BLOCK and self.block < self.k:
            return None, f"its blocks have {self.block} channels; those of NMMatMulNBits a multiple of {SMALLEST_BLOCK}"
        if stored is None:
            return None, self.codes.indirect
        if self.scales.elem not in _SCALES:
            return None, f"its scales are {type_name(self.scales.elem)}"
        if zeros is not None and zeros.elem not in (TensorProto.UINT8, self.scales.elem):
            return None, f"its zero points are {type_name(zeros.elem)}"
        return FusableCodes(
            self.bits,
            self.block,
            stored.tensor,
            _sources(self.codes, self.scales, zeros),
            self._codes,
            lambda: np.ascontiguousarray(self.scales.read().reshape(self.n, -1).T),
            self._zeros,
            self.accuracy_level,
            self.bias,
        ), ""

    def _codes(self) -> np.ndarray:
        codes = unpack_bits(self.codes.read().reshape(self.n, -1).view(np.uint8), self.bits)[:, : self.k]
        return np.ascontiguousarray(_moved(codes, -128).T if self.bits == 8 else codes.T)

    def _zeros(self) -> np.ndarray | None:
        if self.zeros is None:
            return None
        values = self.zeros.read().reshape(self.n, -1)
        if values.dtype == np.uint8:
            values = unpack_bits(values, self.bits)[:, : blocks_of(self.k, self.block)]
        return _unless_default(_moved(values, -128).T if self.bits == 8 else values.T, self.bits)


@dataclass(frozen=True, eq=False)
class Plain:
    """A weight whose codes are elements of a tensor, stored as [K, N] or with the axes swapped. Scale and zero point
    are one in all, one a column, or one a block of channels: `shape` is theirs, seen as [K, N]."""

    k: int
    n: int
    codes: Constant
    scale: Constant
    zero: Constant | None
    swapped: bool
    shape: Callable[[np.ndarray], np.ndarray]
    block: int
    output: gs.Tensor | None = None
    bias: gs.Tensor | None = None

    def fusing(self) -> Fusing:
        stored = self.codes.stored
        if stored is None:
            return None, self.codes.indirect
        if self.codes.elem not in _FORMS:
            return None, f"its codes are {type_name(self.codes.elem)}; NMMatMulNBits takes 4 and 8 bits"
        if self.scale.elem not in _SCALES:
            return None, f"its scales are {type_name(self.scale.elem)}"
        return FusableCodes(
            _FORMS[self.codes.elem][0],
            self.block,
            stored.tensor,
            _sources(self.codes, self.scale, self.zero),
            self._codes,
            lambda: self._rows(self.scale.read()),
            self._zeros,
            bias=self.bias,
            output=self.output,
        ), ""

    def _codes(self) -> np.ndarray:
        values = self.codes.read()
        return np.ascontiguousarray(self._whole(values.T if self.swapped else values))

    def _zeros(self) -> np.ndarray | None:
        values = np.zeros((), np.int8) if self.zero is None else self.zero.read()
        return _unless_default(self._rows(self._whole(values)), _FORMS[self.codes.elem][0])

    def _whole(self, values: np.ndarray) -> np.ndarray:
        bits, add = _FORMS[self.codes.elem]
        return _moved(values, add).astype(np.uint8 if bits == 4 else np.int8)

    def _rows(self, values: np.ndarray) -> np.ndarray:
        shape = (blocks_of(self.k, self.block), self.n)
        return np.ascontiguousarray(np.broadcast_to(self.shape(values), shape))


def dequantised(how: Dequantised, transposed: bool) -> Fusing:
    """That of a 2-D weight behind `DequantizeLinear`, read as [N, K] when `transposed`."""
    swapped = how.transposed != transposed
    k, n = how.codes.shape[::-1] if swapped else how.codes.shape
    along_k, rank = how.axis % 2 == (1 if swapped else 0), len(how.scale.shape)
    each = how.block or -(-k // how.scale.shape[how.axis % 2]) if rank == 2 and along_k else k
    if along_k and rank == 1 and how.scale.shape[0] > 1:
        return None, "every channel of its weight has a scale of its own"
    if each % SMALLEST_BLOCK and each < k:
        return None, f"its blocks have {each} channels; those of NMMatMulNBits a multiple of {SMALLEST_BLOCK}"
    if rank == 2 and not along_k and how.block not in (0, 1):
        return None, "its scales are one a block of columns"
    shape = partial(_seen, swapped=swapped)
    return Plain(k, n, how.codes, how.scale, how.zero, swapped, shape, each).fusing()


def _sources(codes: Constant, scales: Constant, zeros: Constant | None) -> dict[str, str]:
    """Names of what the inputs of the op are made of."""
    return {"W": codes.name, "scales": scales.name, **({"zeros": zeros.name} if zeros is not None else {})}


def _seen(values: np.ndarray, swapped: bool) -> np.ndarray:
    """Scales of a weight with two axes, as rows of [blocks, N]."""
    if values.ndim < 2:
        return values.reshape(1, -1)
    return values.T if swapped else values


def _moved(values: np.ndarray, by: int) -> np.ndarray:
    """Codes or zero points by so much higher, as int8, or of their own floating-point type. Raises InputError for
    fractions that would be rounded."""
    if values.dtype.kind != "f":
        return (values.astype(np.int16) + by).astype(np.int8)
    moved = values + values.dtype.type(by)
    if not np.array_equal(moved.astype(np.float64), values.astype(np.float64) + by):
        raise InputError("its zero points are fractions that the type of the scales cannot hold around 0")
    return moved


def _unless_default(values: np.ndarray, bits: int) -> np.ndarray | None:
    return None if (values == DEFAULT_ZERO[bits]).all() else np.ascontiguousarray(values)
