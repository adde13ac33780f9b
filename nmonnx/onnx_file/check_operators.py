"""Operators of the default domain that do not exist, or whose operands do not fit."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto

from nmonnx.errors import InputError

_DEFAULT = ("", "ai.onnx")
_Sizes = tuple[int, ...] | None
"""Sizes of a value, 0 where they are not known; None when not even their number is."""

_ONLY_IN_ONNX_RUNTIME = {
    *("Affine", "Crop", "DynamicSlice", "GRUUnit", "GivenTensorFill", "ImageScaler", "LayerNormalization"),
    *("MeanVarianceNormalization", "MemcpyFromHost", "MemcpyToHost", "ParametricSoftplus", "Scale", "ScaledTanh"),
    *("SimplifiedLayerNormalization", "ThresholdedRelu", "DisentangledAttention_TRT", "EfficientNMS_TRT"),
    *("MultilevelCropAndResize_TRT", "PyramidROIAlign_TRT"),
}
"""What ONNX Runtime has in the default domain beyond ONNX, or in older opsets than ONNX."""


class _Rules(NamedTuple):
    """Least and most inputs that a schema allows."""

    least: int
    most: int


def check_operators(proto: ModelProto, called: Iterable[FunctionProto], path: Path) -> None:
    """Raise InputError for an operator that the model's opset lacks, one with too few or too many inputs, and a MatMul
    or Gemm whose operands differ in channels. Sizes are followed from graph inputs and initializers through products;
    bodies of `called` functions, which ONNX Runtime inlines with the model's opset, are searched for unknown
    operators only. Operands of different types pass: graphs for other providers mix them."""
    opset = default_opset(proto.opset_import)
    own = {f.name for f in proto.functions if f.domain in _DEFAULT}
    known = ChainMap({i.name: _sizes(i) for i in proto.graph.input})
    _Walk(opset, own, str(path)).graph(proto.graph, known)
    for function in called:
        newest = max(opset, default_opset(function.opset_import))
        _Walk(newest, own, f"{path}, function {function.name!r}").names(function.node)


def default_opset(imports: Iterable[OperatorSetIdProto]) -> int:
    """Version of the default domain: the newest that is stated, the newest there is when none is."""
    return max((o.version for o in imports if o.domain in _DEFAULT), default=onnx.defs.onnx_opset_version())


def label(node: NodeProto) -> str:
    """How a sentence names a node: "node 'up_proj' (MatMul)"."""
    return f"node {node.name or next(iter(node.output), '')!r} ({node.op_type})"


class _Walk:
    """One pass over the nodes in their order, which learns the sizes of products."""

    def __init__(self, opset: int, own: set[str], where: str) -> None:
        self.opset, self.own, self.where = opset, own, where

    def names(self, nodes: Sequence[NodeProto]) -> None:
        for node in nodes:
            self._rules(node)
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    self.names(attribute.g.node)

    def graph(self, graph: GraphProto, known: ChainMap[str, _Sizes]) -> None:
        known.update({t.name: tuple(t.dims) for t in graph.initializer})
        for node in graph.node:
            known.update(dict.fromkeys(node.output) | self._node(node, known))
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    # what a Loop declares of its inputs may change from turn to turn
                    self.graph(attribute.g, known.new_child(dict.fromkeys(i.name for i in attribute.g.input)))

    def _node(self, node: NodeProto, known: Mapping[str, _Sizes]) -> dict[str, _Sizes]:
        """What is known of the outputs, after the inputs were checked."""
        rules = self._rules(node)
        if rules is None:
            return {}
        self._check_count(node, rules)
        if not node.output:
            return {}
        if node.op_type in ("MatMul", "Gemm"):
            return {node.output[0]: self._product(node, known)}
        if node.op_type == "Constant":
            value = next((tuple(a.t.dims) for a in node.attribute if a.name == "value"), None)
            return {node.output[0]: value}
        return {}

    def _rules(self, node: NodeProto) -> _Rules | None:
        if node.domain not in _DEFAULT or node.op_type in self.own:
            return None
        rules = _rules(node.op_type, self.opset)
        if rules is None and node.op_type not in _ONLY_IN_ONNX_RUNTIME:
            raise InputError(
                f"{self.where}: {label(node)}: opset {self.opset} has no operator of that name; export with the opset"
                " that has it, or give the domain that it belongs to"
            )
        return rules

    def _check_count(self, node: NodeProto, rules: _Rules) -> None:
        count = len(node.input)
        while count > rules.most and not node.input[count - 1]:
            count -= 1
        if not rules.least <= count <= rules.most:
            expected = f"{rules.least}" if rules.least == rules.most else f"{rules.least} to {rules.most}"
            raise InputError(f"{self.where}: {label(node)} has {count} inputs, not {expected}; export it again")

    def _product(self, node: NodeProto, known: Mapping[str, _Sizes]) -> _Sizes:
        """Sizes of x @ w. Raises InputError when the channels of the two differ."""
        x, w = known.get(node.input[0]), known.get(node.input[1])
        flip = {a.name for a in node.attribute if a.name in ("transA", "transB") and a.i}
        x = x[::-1] if x and "transA" in flip else x
        w = w[::-1] if w and "transB" in flip else w
        if not x or not w or (node.op_type == "Gemm" and (len(x), len(w)) != (2, 2)):
            return None
        k, rows = x[-1], w[-2] if len(w) > 1 else w[0]
        if k > 0 and rows > 0 and k != rows:
            raise InputError(
                f"{self.where}: {label(node)} multiplies {node.input[0]!r} of {k} channels by {node.input[1]!r},"
                f" which takes {rows}; export it again"
            )
        return (*x[:-1], w[1]) if len(x) > 1 and len(w) == 2 else None


def _sizes(value: onnx.ValueInfoProto) -> _Sizes:
    tensor = value.type.tensor_type
    return tuple(d.dim_value for d in tensor.shape.dim) if tensor.HasField("shape") else None


@lru_cache(maxsize=4096)
def _rules(op: str, opset: int) -> _Rules | None:
    """None for an operator that the opset lacks."""
    try:
        schema = onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return None
    return _Rules(schema.min_input, schema.max_input)
