"""Where the pruned activation is to be read: at the linear layer, or at the quantiser in front of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_graphsurgeon as gs
from onnx import TensorProto

from nmonnx.sites.constant import Constant
from nmonnx.sites.linear import Left, Linear, Product
from nmonnx.sites.scope import Scope, input_of
from nmonnx.sites.trace import Tracer

_QUANTISERS = ("DynamicQuantizeLinear", "QuantizeLinear")


@dataclass(frozen=True, eq=False)
class Splice:
    """inputs  (consumer, input index) to give the pruned tensor; direct: the consumer is the layer itself"""

    inputs: tuple[tuple[gs.Node, int], ...]
    graph: gs.Graph
    activation: gs.Tensor
    elem: int
    direct: bool


Ports = Mapping[tuple[int, int], Linear]
"""The linear layer whose activation an input (id of the node, index) is."""


def find_splice(tracer: Tracer, product: Product, linear: Linear, ports: Ports) -> Splice | Left:
    """The splice of a linear layer. Integer codes are never pruned (a code of 0 need not mean 0): the splice is
    in front of the quantiser, if all it feeds are linear layers."""
    scope, node = product.scope, product.node
    activation = node.inputs[linear.port]
    if linear.codes:
        return _before_codes(tracer, product, linear, ports)
    direct = Splice(((node, linear.port),), scope.graph, activation, linear.elem, True)
    dequantiser = scope.producer(activation)
    if not dequantiser or dequantiser[1].op != "DequantizeLinear":
        return direct
    quantiser = dequantiser[0].producer(dequantiser[1].inputs[0])
    if not quantiser or quantiser[1].op not in _QUANTISERS or not _feeds_linears(*quantiser, ports, True):
        return direct
    return _before(tracer, *quantiser)


def _before_codes(tracer: Tracer, product: Product, linear: Linear, ports: Ports) -> Splice | Left:
    left = Left("", k=linear.k, n=linear.n, initializer=linear.weight.name)
    made = product.scope.producer(product.node.inputs[linear.port])
    if made is None or made[1].op not in _QUANTISERS:
        source = made[1].op if made else "the caller"
        return Left(f"its input comes as integer codes from {source}", k=left.k, n=left.n)
    if not _feeds_linears(*made, ports, False):
        reason = f"its quantiser {made[1].name or made[1].outputs[0].name!r} feeds other nodes too"
        return Left(reason, k=left.k, n=left.n)
    return _before(tracer, *made)


def _before(tracer: Tracer, scope: Scope, quantiser: gs.Node) -> Splice:
    scale = tracer.trace(scope, input_of(quantiser, 1)) if quantiser.op == "QuantizeLinear" else None
    elem = scale.elem if isinstance(scale, Constant) else TensorProto.FLOAT
    return Splice(((quantiser, 0),), scope.graph, quantiser.inputs[0], elem, False)


def _feeds_linears(scope: Scope, quantiser: gs.Node, ports: Ports, dequantised: bool) -> bool:
    """Only linear layers read the codes (or what DequantizeLinear makes of them)."""
    names = [quantiser.outputs[0].name]
    if dequantised:
        uses = scope.uses_of(names[0])
        if names[0] in scope.outputs or any(u.node.op != "DequantizeLinear" or u.port for u in uses):
            return False
        names = [use.node.outputs[0].name for use in uses]
    return all(
        name not in scope.outputs and all(_is_port(u.node, u.port, ports, not dequantised) for u in scope.uses_of(name))
        for name in names
    )


def _is_port(node: gs.Node, index: int, ports: Ports, codes: bool) -> bool:
    linear = ports.get((id(node), index))
    return linear is not None and linear.codes == codes
