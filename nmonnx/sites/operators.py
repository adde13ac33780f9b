"""The operators that may stand between a linear layer and its stored weight, one small function each.

A new one is a function from (tracer, scope, node, depth) to the constant that the node makes, and a line in
`FOLLOWED` at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from nmonnx.onnx_file.tensors import type_name
from nmonnx.sites.constant import Constant, Dequantised, NotConstant, sparse_constant, stored_constant
from nmonnx.sites.scope import Scope, input_of

if TYPE_CHECKING:
    from nmonnx.sites.trace import Tracer

_NUMPY: dict[int, type] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.DOUBLE: np.float64,
    TensorProto.INT64: np.int64,
    TensorProto.INT32: np.int32,
}
_CODE_RANGE: dict[int, tuple[int, int]] = {
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT8: (0, 255),
    TensorProto.INT4: (-8, 7),
    TensorProto.UINT4: (0, 15),
    TensorProto.INT16: (-32768, 32767),
    TensorProto.UINT16: (0, 65535),
}


def _constant(tracer: Tracer, scope: Scope, node: gs.Node, depth: int) -> Constant | NotConstant:
    tensor, reader = node.outputs[0], tracer.model.tensors
    for attribute in tracer.model.origin[id(node)].attribute:
        if attribute.name == "value":
            return stored_constant(reader, tensor, attribute.t)
        if attribute.name == "sparse_value":
            return sparse_constant(reader, tensor.name, attribute.sparse_tensor)
        if attribute.name in ("value_float", "value_floats", "value_int", "value_ints"):
            return _numbers(tensor.name, attribute)
    return NotConstant("it is a constant of text")


def _numbers(name: str, attribute: onnx.AttributeProto) -> Constant:
    is_float = "float" in attribute.name
    elem, kind = (TensorProto.FLOAT, np.float32) if is_float else (TensorProto.INT64, np.int64)
    values = np.array(onnx.helper.get_attribute_value(attribute), kind)
    return Constant(values.shape, elem, lambda: values, name, None, "its weight is a list of numbers")


def _identity(tracer: Tracer, scope: Scope, node: gs.Node, depth: int) -> Constant | NotConstant:
    return tracer.trace(scope, input_of(node, 0), depth)


def _cast(tracer: Tracer, scope: Scope, node: gs.Node, depth: int) -> Constant | NotConstant:
    source = tracer.trace(scope, input_of(node, 0), depth)
    if isinstance(source, NotConstant):
        return source
    if node.op == "CastLike":
        like = tracer.trace(scope, input_of(node, 1), depth)
        if isinstance(like, NotConstant):
            return NotConstant("its weight is cast to the type of an activation", fixed=True)
        elem = like.elem
    else:
        elem = node.attrs["to"]
    if elem == source.elem:
        return source
    kind = _NUMPY.get(elem, np.float32)
    reason = f"its weight is cast from {type_name(source.elem)} to {type_name(elem)}"
    cast = replace(source.through(reason, source.shape, lambda w: w.astype(kind)), elem=elem)
    widened = source.stored if (source.elem, elem) == (TensorProto.FLOAT16, TensorProto.FLOAT) else None
    return replace(cast, stored=widened, indirect="") if widened else cast


def _transpose(tracer: Tracer, scope: Scope, node: gs.Node, depth: int) -> Constant | NotConstant:
    source = tracer.trace(scope, input_of(node, 0), depth)
    if isinstance(source, NotConstant):
        return source
    perm = node.attrs.get("perm") or list(reversed(range(len(source.shape))))
    if sorted(perm) != list(range(len(source.shape))):
        return NotConstant(f"Transpose {node.name!r} has perm {perm} for a weight of shape {list(source.shape)}")
    shape = tuple(source.shape[i] for i in perm)
    moved = source.through("its weight is transposed in more than two axes", shape, lambda w: w.transpose(perm))
    if source.dequantised and perm == [1, 0]:
        return replace(moved, dequantised=replace(source.dequantised, transposed=not source.dequantised.transposed))
    if source.stored and perm == [1, 0]:
        return replace(moved, stored=replace(source.stored, transposed=not source.stored.transposed), indirect="")
    return moved


def _reshape(tracer: Tracer, scope: Scope, node: gs.Node, depth: int) -> Constant | NotConstant:
    source = tracer.trace(scope, input_of(node, 0), depth)
    if isinstance(source, NotConstant):
        return source
    shape = _new_shape(tracer, scope, node, source.shape)
    if shape is None or math.prod(shape) != math.prod(source.shape):
        return NotConstant(f"its weight passes {node.op} with a shape made at run time")
    if shape == source.shape:
        return source
    return source.through(f"its weight passes {node.op}", shape, lambda w: w.reshape(shape))


def _new_shape(tracer: Tracer, scope: Scope, node: gs.Node, old: tuple[int, ...]) -> tuple[int, ...] | None:
    if node.op == "Flatten":
        axis = node.attrs.get("axis", 1)
        return math.prod(old[:axis]), math.prod(old[axis:])
    given = node.attrs.get("axes") if len(node.inputs) < 2 else tracer.ints(scope, input_of(node, 1))
    if node.op == "Reshape":
        return _reshaped(old, given, bool(node.attrs.get("allowzero", 0))) if given is not None else None
    if node.op == "Unsqueeze":
        if given is None:
            return None
        rank = len(old) + len(given)
        rest, new = iter(old), {axis % rank for axis in given}
        return tuple(1 if i in new else next(rest) for i in range(rank))
    gone = {a % len(old) for a in given} if given is not None else {i for i, d in enumerate(old) if d == 1}
    return tuple(d for i, d in enumerate(old) if i not in gone)


def _reshaped(old: tuple[int, ...], new: list[int], allow_zero: bool) -> tuple[int, ...] | None:
    shape = [old[i] if d == 0 and not allow_zero and i < len(old) else d for i, d in enumerate(new)]
    if shape.count(-1) > 1:
        return None
    known = math.prod(d for d in shape if d != -1)
    return tuple(math.prod(old) // known if d == -1 and known else d for d in shape)


def _gather(tracer: Tracer, scope: Scope, node: gs.Node, depth: int) -> Constant | NotConstant:
    source = tracer.trace(scope, input_of(node, 0), depth)
    if isinstance(source, NotConstant):
        return source
    index = tracer.trace(scope, input_of(node, 1), depth)
    if isinstance(index, NotConstant):
        return NotConstant(f"its weight is chosen from {source.name!r} at run time")
    axis = node.attrs.get("axis", 0) % len(source.shape)
    shape = source.shape[:axis] + index.shape + source.shape[axis + 1 :]
    which = index.read
    return source.through("its weight is one of several in a tensor", shape, lambda w: np.take(w, which(), axis))


def _dequantise(tracer: Tracer, scope: Scope, node: gs.Node, depth: int) -> Constant | NotConstant:
    parts = [tracer.trace(scope, input_of(node, i), depth) for i in range(len(node.inputs)) if input_of(node, i)]
    missing = next((p for p in parts if isinstance(p, NotConstant)), None)
    if missing is not None:
        return missing
    codes, scale, *rest = [p for p in parts if isinstance(p, Constant)]
    shape, axis, block = codes.shape, node.attrs.get("axis", 1), node.attrs.get("block_size", 0)
    zero = rest[0].read if rest else None

    def read() -> np.ndarray:
        values = codes.read().astype(np.float32)
        if zero is not None:
            values = values - _spread(zero().astype(np.float32), shape, axis, block)
        return values * _spread(scale.read().astype(np.float32), shape, axis, block)

    return Constant(
        shape,
        node.attrs.get("output_dtype") or scale.elem,
        read,
        codes.name,
        None,
        "its weight is quantised",
        codes.blocked or scale.blocked,
        quantised=True,
        dequantised=Dequantised(codes, scale, rest[0] if rest else None, axis, block),
    )


def _quantise(tracer: Tracer, scope: Scope, node: gs.Node, depth: int) -> Constant | NotConstant:
    parts = [tracer.trace(scope, input_of(node, i), depth) for i in range(len(node.inputs)) if input_of(node, i)]
    missing = next((p for p in parts if isinstance(p, NotConstant)), None)
    if missing is not None:
        return missing
    source, scale, *rest = [p for p in parts if isinstance(p, Constant)]
    elem = rest[0].elem if rest else node.attrs.get("output_dtype") or TensorProto.UINT8
    if elem not in _CODE_RANGE:
        return NotConstant(f"its weight is quantised to {type_name(elem)}", fixed=True)
    low, high = _CODE_RANGE[elem]
    shape, axis, block = source.shape, node.attrs.get("axis", 1), node.attrs.get("block_size", 0)

    def step(values: np.ndarray) -> np.ndarray:
        codes = np.rint(values.astype(np.float32) / _spread(scale.read().astype(np.float32), shape, axis, block))
        if rest:
            codes = codes + _spread(rest[0].read().astype(np.float32), shape, axis, block)
        return np.clip(codes, low, high)

    return replace(source.through("its weight is quantised", shape, step), elem=elem, quantised=True)


def _spread(values: np.ndarray, shape: tuple[int, ...], axis: int, block: int) -> np.ndarray:
    """Scales or zero points (one in all, one a slice of `axis`, or one a block along it) at the weight's shape."""
    if values.size == 1:
        return values.reshape(())
    axis %= len(shape)
    if values.ndim == 1:
        return values.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    each = block or -(-shape[axis] // values.shape[axis])
    return np.repeat(values, each, axis)[tuple(slice(d) for d in shape)]


FOLLOWED: dict[str, Callable[[Tracer, Scope, gs.Node, int], Constant | NotConstant]] = {
    "Constant": _constant,
    "Identity": _identity,
    "Cast": _cast,
    "CastLike": _cast,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
    "Gather": _gather,
    "DequantizeLinear": _dequantise,
    "QuantizeLinear": _quantise,
}
