"""Values known before a model runs: where they are stored, and how to read them when they are wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs
from onnx import SparseTensorProto, TensorProto

from nmonnx.onnx_file.tensors import TensorReader


@dataclass(frozen=True, eq=False)
class Stored:
    """A stored tensor that a constant is equal to, but for transposition and widening to float32."""

    tensor: gs.Tensor
    elem: int
    transposed: bool
    proto: TensorProto | None


@dataclass(frozen=True, eq=False)
class Dequantised:
    """What `DequantizeLinear` makes of stored codes: scale and zero are one in all, one a slice of `axis` of the codes,
    or one a block of `block` along it. `transposed`: the constant has the axes of the codes swapped."""

    codes: Constant
    scale: Constant
    zero: Constant | None
    axis: int
    block: int
    transposed: bool = False


@dataclass(frozen=True, eq=False)
class Constant:
    """Values known before the model runs, not yet read.

    name     of the initializer or Constant output at the start of the chain
    stored   the tensor it equals; None with the reason in `indirect`
    blocked  why a linear layer must not rely on these values, "" when it may
    quantised  the values come from integer codes
    dequantised  how, where they are nothing else
    """

    shape: tuple[int, ...]
    elem: int
    read: Callable[[], np.ndarray]
    name: str
    stored: Stored | None
    indirect: str = ""
    blocked: str = ""
    quantised: bool = False
    dequantised: Dequantised | None = None

    def through(self, reason: str, shape: tuple[int, ...], step: Callable[[np.ndarray], np.ndarray]) -> Constant:
        """The constant after one more operator, no longer equal to a stored tensor because of `reason`."""
        read = self.read
        indirect = self.indirect or reason
        return replace(self, shape=shape, read=lambda: step(read()), stored=None, indirect=indirect, dequantised=None)


AT_RUN_TIME = "its weight is made at run time"
"""Why most products that are no linear layer are none: those of attention."""


@dataclass(frozen=True)
class NotConstant:
    """`fixed`: made of constants only, in a way that is not followed."""

    reason: str
    fixed: bool = False


def stored_constant(reader: TensorReader, tensor: gs.Tensor, proto: TensorProto | SparseTensorProto) -> Constant:
    """The constant that a stored tensor is, known in the graph as `tensor`."""
    if isinstance(proto, SparseTensorProto):
        return sparse_constant(reader, tensor.name, proto)
    shape, elem = tuple(proto.dims), proto.data_type
    read = lambda: reader.array(proto)  # noqa: E731
    return Constant(shape, elem, read, tensor.name, Stored(tensor, elem, False, proto))


def sparse_constant(reader: TensorReader, name: str, proto: SparseTensorProto) -> Constant:
    """The constant that a sparse tensor in coordinate form is."""
    shape = tuple(proto.dims)

    def read() -> np.ndarray:
        values, indices = reader.array(proto.values), reader.array(proto.indices)
        flat = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), shape)
        dense = np.zeros(math.prod(shape), values.dtype)
        dense[flat] = values
        return dense.reshape(shape)

    return Constant(shape, proto.values.data_type, read, name, None, "its weight is stored sparse")
