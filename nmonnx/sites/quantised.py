"""How a linear layer with a quantised weight may be written, one reader an operator.

A new spelling is a reader (tracer, scope, node) -> Linear, Left or None, and a line in `QUANTISED`.
DequantizeLinear in front of an ordinary product is not here: the weight side is traced through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from nmonnx.errors import InputError
from nmonnx.sites.codes import Packed, Plain
from nmonnx.sites.constant import Constant, NotConstant
from nmonnx.sites.linear import Left, Linear, Reader, Reading, float32, no_weight
from nmonnx.sites.packing import bnb4_values, expert_values, nbits_values
from nmonnx.sites.scope import Scope, input_of
from nmonnx.sites.spellings import IN_ATTENTION, MICROSOFT, unreachable_down
from nmonnx.sites.trace import Tracer

_RESULT_TOO = "its result may be quantised too"


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

    quantised, reason = None, "g_idx groups its rows in an order of its own; NMMatMulNBits has them as they lie"
    if "g_idx" not in found:
        level = int(node.attrs.get("accuracy_level", 0))
        packed = Packed(k, n, bits, block, level, codes, scales, found.get("zeros"), input_of(node, 5))
        quantised, reason = packed.fusing()
    return Linear(k, n, scales.elem, codes, read, quantised=quantised, not_fusable=reason)


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

    return Linear(k, n, absmax.elem, codes, read, not_fusable="its codes stand for values of a table")


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


@dataclass(frozen=True)
class _Ports:
    """Inputs of a product of integer codes: of the weight, its scale and zero point; of the activation's scale and zero
    point; of the bias of one that makes floating-point numbers. Scales that are None follow the product."""

    weight: int
    scale: int | None
    zero: int
    activation: tuple[int | None, int] | None = None
    bias: int | None = None
    codes: bool = True
    obstacle: str = ""


def _integer(ports: _Ports) -> Reader:
    """A reader of `activation codes @ weight codes`."""

    def read_node(tracer: Tracer, scope: Scope, node: gs.Node) -> Reading:
        if isinstance(tracer.trace(scope, input_of(node, 0)), Constant):
            return Left("the weight is on the left: the channels are the last axis but one of the activation")
        found = _constants(tracer, scope, node, {ports.weight: "weight", ports.zero: "zero"})
        if isinstance(found, NotConstant):
            return no_weight(found)
        stored = found["weight"]
        if len(stored.shape) < 2:
            return Left(f"its quantised weight has {len(stored.shape)} axes", linear=False)
        swap = bool(node.attrs.get("transB", 0))
        n, k = stored.shape[-2:] if swap else stored.shape[::-1][:2]
        if node.attrs.get("transA", 0):
            return Left("transA=1: the channels are the first axis of the activation", k=k, n=n)
        after = _after(tracer, scope, node) if ports.scale is None else None
        scales = after.scale if after else tracer.trace(scope, input_of(node, ports.scale or 0))

        def read() -> np.ndarray:
            if isinstance(scales, NotConstant):
                raise InputError(f"weight {stored.name!r}: {scales.reason}, so its values are not known")
            zeros = float32(found["zero"]) if "zero" in found else np.float32(0)
            values = float32(stored).swapaxes(-1, -2) if swap else float32(stored)
            return (values - _per_column(zeros)) * _per_column(float32(scales))

        linear = Linear(k, n, TensorProto.FLOAT, stored, read, codes=ports.codes)
        role = "qkv" if node.op == "QAttention" else ""
        reason = ports.obstacle or _strange_activation(scope, node, ports, after)
        if reason or isinstance(scales, NotConstant) or len(stored.shape) != 2:
            reason = reason or "its scale is not known, or its weight has more than two axes"
            return replace(linear, not_fusable=reason, role=role)
        bias = input_of(node, ports.bias) if ports.bias is not None else None
        output = after.output if after else None
        zero = found.get("zero")
        plain = Plain(k, n, stored, scales, zero, swap, lambda v: v.reshape(1, -1), k, output, bias)
        quantised, reason = plain.fusing()
        return replace(linear, quantised=quantised, not_fusable=reason)

    return read_node


def _per_column(values: np.ndarray) -> np.ndarray:
    """One value, one a column [N], or one a column of each matrix [E, N], against [..., K, N]."""
    return values if values.ndim < 2 or values.shape[-2] == 1 else values[..., None, :]


@dataclass(frozen=True, eq=False)
class _After:
    """What follows a MatMulInteger -> Cast -> Mul(Mul(activation scale, weight scale)): the two scales, and the tensor
    that the last Mul makes, None where something else reads what lies between."""

    scale: Constant | NotConstant
    activation_scale: gs.Tensor | None = None
    output: gs.Tensor | None = None


def _after(tracer: Tracer, scope: Scope, node: gs.Node) -> _After:
    casts = [use.node for use in scope.uses_of(node.outputs[0].name)]
    for cast in casts:
        uses = scope.uses_of(cast.outputs[0].name) if cast.op == "Cast" else ()
        for use in uses:
            factor = scope.producer(use.node.inputs[1 - use.port]) if use.node.op == "Mul" else None
            for i, tensor in enumerate(factor[1].inputs if factor and factor[1].op == "Mul" else ()):
                scale = tracer.trace(factor[0], tensor) if factor else None
                if factor and isinstance(scale, Constant):
                    alone = len(casts) == len(uses) == 1
                    alone = alone and not scope.outputs & {node.outputs[0].name, cast.outputs[0].name}
                    output = use.node.outputs[0] if alone else None
                    return _After(scale, factor[1].inputs[1 - i], output)
    return _After(NotConstant("no constant scale follows the product"))


def _strange_activation(scope: Scope, node: gs.Node, ports: _Ports, after: _After | None) -> str:
    """Why the activation's codes do not stand for the floating-point tensor in front of the quantiser alone."""
    if ports.activation is None:
        return ""
    if after is not None and after.output is None:
        return "something else reads its integer result"
    made = scope.producer(node.inputs[0])
    if made is None or made[1].op != "DynamicQuantizeLinear":
        return "its activation is quantised with a fixed range"
    scale_at, zero_at = ports.activation
    scale = after.activation_scale if after is not None else input_of(node, scale_at or 0)
    zero = input_of(node, zero_at)
    given = [t.name if t is not None else "" for t in (scale, zero)]
    return "" if given == [t.name for t in made[1].outputs[1:3]] else "its activation has another scale or zero point"


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
    ("", "MatMulInteger"): _integer(_Ports(1, None, 3, activation=(None, 2))),
    ("", "QLinearMatMul"): _integer(_Ports(3, 4, 5, obstacle=_RESULT_TOO)),
    (MICROSOFT, "DynamicQuantizeMatMul"): _integer(_Ports(1, 2, 3, bias=4, codes=False)),
    (MICROSOFT, "MatMulIntegerToFloat"): _integer(_Ports(1, 3, 5, activation=(2, 4), bias=6)),
    (MICROSOFT, "QGemm"): _integer(_Ports(3, 4, 5, obstacle=_RESULT_TOO)),
    (MICROSOFT, "QAttention"): _integer(_Ports(1, 4, 7, obstacle=IN_ATTENTION)),
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
