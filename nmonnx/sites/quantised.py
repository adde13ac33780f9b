"""How a linear layer with a quantised weight may be written, one reader an operator.

A new spelling is a reader (tracer, scope, node) -> Linear, Left or None, and a line in `QUANTISED`.
DequantizeLinear in front of an ordinary product is not here: the weight side is traced through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from nmonnx.errors import InputError
from nmonnx.sites.constant import Constant, NotConstant
from nmonnx.sites.linear import Left, Linear, Reader, Reading, float32, no_weight
from nmonnx.sites.packing import bnb4_values, expert_values, nbits_values
from nmonnx.sites.scope import Scope, input_of
from nmonnx.sites.spellings import MICROSOFT, unreachable_down
from nmonnx.sites.trace import Tracer

_PRUNE_ONLY = "its weight is quantised"


def _matmul_nbits(tracer: Tracer, scope: Scope, node: gs.Node) -> Reading:
    found = _constants(tracer, scope, node, {1: "codes", 2: "scales", 3: "zeros", 4: "g_idx"})
    if isinstance(found, NotConstant):
        return no_weight(found)
    k, n, bits, block = (int(node.attrs[a]) for a in ("K", "N", "bits", "block_size"))
    if node.attrs.get("weight_prepacked", 0):
        return Left("its weight is packed for one kind of device (weight_prepacked)", k=k, n=n)
    codes, scales = found["codes"], found["scales"]

    def read() -> np.ndarray:
        values = {name: c.read() for name, c in found.items()}
        return nbits_values(k, n, bits, block, **values)

    return Linear(k, n, scales.elem, codes, read, not_fusable=_PRUNE_ONLY)


def _matmul_bnb4(tracer: Tracer, scope: Scope, node: gs.Node) -> Reading:
    found = _constants(tracer, scope, node, {1: "codes", 2: "absmax"})
    if isinstance(found, NotConstant):
        return no_weight(found)
    k, n, block, kind = (int(node.attrs[a]) for a in ("K", "N", "block_size", "quant_type"))
    codes, absmax = found["codes"], found["absmax"]
    if not node.attrs.get("transB", 1):
        return Left("transB=0: its weight is packed along the outputs", k=k, n=n)

    def read() -> np.ndarray:
        return bnb4_values(k, n, block, kind, codes.read(), absmax.read())

    return Linear(k, n, absmax.elem, codes, read, not_fusable=_PRUNE_ONLY)


def _qmoe(tracer: Tracer, scope: Scope, node: gs.Node) -> Reading:
    inputs = {2: "up", 3: "scales", 4: "bias", 5: "down", 11: "zeros"}
    found = _constants(tracer, scope, node, inputs)
    if isinstance(found, NotConstant):
        return no_weight(found)
    up, down = found["up"], found["down"]
    bits = int(node.attrs.get("fc1_expert_weight_bits") or node.attrs.get("expert_weight_bits", 4))
    down_bits = int(node.attrs.get("fc2_expert_weight_bits") or node.attrs.get("expert_weight_bits", 4))
    bits, down_bits = (8, 8) if up.elem != TensorProto.UINT8 else (bits, down_bits)
    k, n = up.shape[2] * 8 // bits, up.shape[1]
    kind = node.attrs.get("quant_type", "int")
    typed = found.get("bias") or found.get("scales")
    if typed is None:
        return Left("the type of its activation is not known", k=k, n=n, role="experts")

    def read() -> np.ndarray:
        values = {name: c.read() for name, c in found.items() if name in ("scales", "zeros")}
        return expert_values(k, bits, kind, up.read(), **values)

    return Linear(
        k,
        n,
        typed.elem,
        up,
        read,
        not_fusable="its experts are inside one node, whose input alone can be pruned",
        role="experts",
        inner=(unreachable_down(node, down.shape[2] * 8 // down_bits, down.shape[1], down.name),),
    )


def _integer(weight: int, scale: int | None, zero: int, codes: bool = True) -> Reader:
    """A reader of `activation codes @ weight codes`: inputs that hold the weight, its scale and zero point."""

    def read_node(tracer: Tracer, scope: Scope, node: gs.Node) -> Reading:
        if isinstance(tracer.trace(scope, input_of(node, 0)), Constant):
            return Left("the weight is on the left: the channels are the last axis but one of the activation")
        found = _constants(tracer, scope, node, {weight: "weight", zero: "zero"})
        if isinstance(found, NotConstant):
            return no_weight(found)
        stored = found["weight"]
        if len(stored.shape) < 2:
            return Left(f"its quantised weight has {len(stored.shape)} axes", linear=False)
        swap = bool(node.attrs.get("transB", 0))
        n, k = stored.shape[-2:] if swap else stored.shape[::-1][:2]
        if node.attrs.get("transA", 0):
            return Left("transA=1: the channels are the first axis of the activation", k=k, n=n)
        scales = _scale_after(tracer, scope, node) if scale is None else tracer.trace(scope, input_of(node, scale))

        def read() -> np.ndarray:
            if isinstance(scales, NotConstant):
                raise InputError(f"weight {stored.name!r}: {scales.reason}, so its values are not known")
            zeros = float32(found["zero"]) if "zero" in found else np.float32(0)
            values = float32(stored).swapaxes(-1, -2) if swap else float32(stored)
            return (values - _per_column(zeros)) * _per_column(float32(scales))

        role = "qkv" if node.op == "QAttention" else ""
        return Linear(k, n, TensorProto.FLOAT, stored, read, codes=codes, not_fusable=_PRUNE_ONLY, role=role)

    return read_node


def _per_column(values: np.ndarray) -> np.ndarray:
    """One value, one a column [N], or one a column of each matrix [E, N], against [..., K, N]."""
    return values if values.ndim < 2 or values.shape[-2] == 1 else values[..., None, :]


def _scale_after(tracer: Tracer, scope: Scope, node: gs.Node) -> Constant | NotConstant:
    """The weight's scale of a MatMulInteger: -> Cast -> Mul(Mul(activation scale, weight scale))."""
    for cast in scope.uses_of(node.outputs[0].name):
        for use in scope.uses_of(cast.node.outputs[0].name) if cast.node.op == "Cast" else ():
            factor = scope.producer(use.node.inputs[1 - use.port]) if use.node.op == "Mul" else None
            for tensor in factor[1].inputs if factor and factor[1].op == "Mul" else ():
                scale = tracer.trace(factor[0], tensor) if factor else None
                if isinstance(scale, Constant):
                    return scale
    return NotConstant("no constant scale follows the product")


def _unknown_packing(tracer: Tracer, scope: Scope, node: gs.Node) -> Reading:
    k, n = (node.attrs.get(a, 0) for a in ("K", "N"))
    return Left(f"operator {node.op} is not handled", k=k, n=n)


def _constants(
    tracer: Tracer, scope: Scope, node: gs.Node, wanted: Mapping[int, str]
) -> dict[str, Constant] | NotConstant:
    """The constants at the given inputs, those left out omitted; the first that is not constant instead."""
    found: dict[str, Constant] = {}
    for index, name in wanted.items():
        tensor = input_of(node, index)
        if tensor is None:
            continue
        constant = tracer.trace(scope, tensor)
        if isinstance(constant, NotConstant):
            return constant
        found[name] = constant
    return found


QUANTISED: Mapping[tuple[str, str], Callable[[Tracer, Scope, gs.Node], Reading]] = {
    ("", "MatMulInteger"): _integer(weight=1, scale=None, zero=3),
    ("", "QLinearMatMul"): _integer(weight=3, scale=4, zero=5),
    (MICROSOFT, "DynamicQuantizeMatMul"): _integer(weight=1, scale=2, zero=3, codes=False),
    (MICROSOFT, "MatMulIntegerToFloat"): _integer(weight=1, scale=3, zero=5),
    (MICROSOFT, "QGemm"): _integer(weight=3, scale=4, zero=5),
    (MICROSOFT, "QAttention"): _integer(weight=1, scale=4, zero=7),
    (MICROSOFT, "MatMulNBits"): _matmul_nbits,
    (MICROSOFT, "MatMulBnb4"): _matmul_bnb4,
    (MICROSOFT, "QMoE"): _qmoe,
    **dict.fromkeys(
        [
            *((MICROSOFT, "MatMulNBitsMlp"), (MICROSOFT, "MatMulNBitsQkv"), (MICROSOFT, "MatMulNBitsQLoRA")),
            *((MICROSOFT, "MatMulFpQ4"), (MICROSOFT, "GemmFloat8"), (MICROSOFT, "QOrderedMatMul")),
            *((MICROSOFT, "QOrderedAttention"), (MICROSOFT, "LongformerAttention")),
            *((MICROSOFT, "MatMulBlockQuantizedFp4Weight"), (MICROSOFT, "MatMulBlockQuantizedFp8Weight")),
        ],
        _unknown_packing,
    ),
}
