"""Where the weight of a layer is read, and how a new one must be stored to stand in its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_graphsurgeon as gs
from onnx import TensorProto

from nmonnx.onnx_file.graph import Model
from nmonnx.passes.surgery import function_of
from nmonnx.sites import Site

CARRIERS = ("Transpose", "Cast", "Identity")
"""Nodes that bring a weight to its layer as it is."""

REQUANTISED = "its weight is quantised, and another one would have to be quantised anew; only a scale and a bias fold"


@dataclass(frozen=True, eq=False)
class Place:
    """Input `slot` of `node` reads the weight, as [N, K] when `transposed`, of type `elem`."""

    node: gs.Node
    slot: int
    elem: int
    transposed: bool


def weight_place(model: Model, site: Site, node: gs.Node, embedded: set[str]) -> Place | str:
    """The input that a new weight of the layer `node` shall feed, or why there is none. `embedded` are the weights that
    are looked up in too.

    1. `NMMatMul`, and MatMul or Gemm as they lie. Nodes between the stored weight and the layer are kept where they
       serve it alone, so that the new weight has the type and the layout of the stored one; else the layer reads it.
    2. Not where values are not the model's own: in functions, quantised, or with a factor alpha.
    3. Not the embedding: a weight that a Gather reads too would be stored twice.
    """
    if site.initializer in embedded:
        return f"its weight {site.initializer!r} is the embedding too (tied), and would be stored twice"
    if function_of(site.scope):
        return "it lies in a function, whose weights serve every call; inline the functions first"
    if node.op == "NMMatMul":
        behind_cast = any(producer.op == "Cast" for producer in node.inputs[1].inputs)
        elem = site.fusable.elem if site.fusable is not None and not behind_cast else site.elem
        return Place(node, 1, elem, False)
    if node.op in ("MatMulNBits", "NMMatMulNBits"):
        return REQUANTISED
    if node.domain not in (None, "", "ai.onnx") or node.op not in ("MatMul", "Gemm"):
        return f"a weight of operator {node.op} cannot be replaced"
    if node.attrs.get("alpha", 1.0) != 1.0:
        return f"alpha is {node.attrs['alpha']:g}, not 1"
    swapped = bool(node.attrs.get("transB", 0))
    return _through_carriers(model, site, node, swapped)


def embedded_weights(model: Model) -> set[str]:
    """Names of the stored weights that a Gather looks up in, quantised or through other nodes."""
    names: set[str] = set()
    for _, graph in model.scopes():
        for node in graph.nodes:
            if node.op in ("Gather", "GatherBlockQuantized", "EmbedLayerNormalization"):
                names.update(_sources(node))
    return names


def _sources(node: gs.Node) -> Iterator[str]:
    for tensor in node.inputs[: 1 if "Gather" in node.op else None]:
        yield tensor.name
        for producer in tensor.inputs:
            if producer.op in (*CARRIERS, "DequantizeLinear"):
                yield from _sources(producer)


def _through_carriers(model: Model, site: Site, node: gs.Node, swapped: bool) -> Place | str:
    place, tensor, own, transposed = Place(node, 1, site.elem, swapped), node.inputs[1], True, swapped
    last = place
    while tensor.inputs:
        carrier = tensor.inputs[0]
        if "Dequantize" in carrier.op:
            return REQUANTISED
        if carrier.op not in CARRIERS:
            return place
        own = own and len(tensor.outputs) == 1
        transposed ^= carrier.op == "Transpose"
        tensor = carrier.inputs[0]
        last = Place(carrier, 0, 0, transposed)
    stored = next((t for t in model.proto.graph.initializer if t.name == tensor.name), None)
    if not own or stored is None or stored.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16):
        return place
    return Place(last.node, last.slot, stored.data_type, last.transposed)
