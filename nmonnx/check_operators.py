"""Operators of the default domain that do not exist, or whose operands ONNX Runtime does not take together."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto
from onnx.defs import OpSchema

from nmonnx.errors import InputError

_DEFAULT = ("", "ai.onnx")
_ONLY_IN_ONNX_RUNTIME = {
    *("Affine", "Crop", "DynamicSlice", "GRUUnit", "GivenTensorFill", "ImageScaler", "LayerNormalization"),
    *("MeanVarianceNormalization", "MemcpyFromHost", "MemcpyToHost", "ParametricSoftplus", "Scale", "ScaledTanh"),
    *("SimplifiedLayerNormalization", "ThresholdedRelu", "DisentangledAttention_TRT", "EfficientNMS_TRT"),
    *("MultilevelCropAndResize_TRT", "PyramidROIAlign_TRT"),
}
"""What ONNX Runtime has in the default domain beyond ONNX, or in older opsets than ONNX."""


class _Known(NamedTuple):
    """Element type of a value, 0 when it is not known, and its sizes, 0 where they are not."""

    elem: int = 0
    shape: tuple[int, ...] | None = None


class _Rules(NamedTuple):
    """What a schema says of inputs and outputs: the names of their types, None for an input that may have any."""

    least: int
    most: int
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]


_UNKNOWN = _Known()


def check_operators(proto: ModelProto, called: Iterable[FunctionProto], path: Path) -> None:
    """Raise InputError for an operator that the model's opset lacks, one with too few or too many inputs, inputs of
    different types where ONNX asks for one, and a MatMul or Gemm whose operands differ in channels. Types and sizes
    are followed from graph inputs and initializers; bodies of `called` functions, which ONNX Runtime inlines with the
    model's opset, are searched for unknown operators only."""
    opset = default_opset(proto.opset_import)
    own = {f.name for f in proto.functions if f.domain in _DEFAULT}
    known = ChainMap({i.name: _declared(i) for i in proto.graph.input})
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
    """One pass over the nodes in their order, which learns the types of their outputs."""

    def __init__(self, opset: int, own: set[str], where: str) -> None:
        self.opset, self.own, self.where = opset, own, where

    def names(self, nodes: Sequence[NodeProto]) -> None:
        for node in nodes:
            self._rules(node)
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    self.names(attribute.g.node)

    def graph(self, graph: GraphProto, known: ChainMap[str, _Known]) -> None:
        known.update({t.name: _Known(t.data_type, tuple(t.dims)) for t in graph.initializer})
        for node in graph.node:
            made = self._node(node, known)
            known.update(dict.fromkeys(node.output, _UNKNOWN) | made)
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    # what a Loop declares of its inputs may change from turn to turn
                    self.graph(attribute.g, known.new_child({i.name: _UNKNOWN for i in attribute.g.input}))

    def _node(self, node: NodeProto, known: Mapping[str, _Known]) -> dict[str, _Known]:
        """What is known of the outputs, after the inputs were checked."""
        rules = self._rules(node)
        if rules is None:
            return {}
        self._check_count(node, rules)
        if not node.output:
            return {}
        types = self._bind(node, rules, known)
        made = {out: _Known(types.get(kind, 0)) for out, kind in zip(node.output, rules.outputs, strict=False)}
        for attribute in node.attribute:
            if (node.op_type, attribute.name) == ("Constant", "value"):
                made[node.output[0]] = _Known(attribute.t.data_type, tuple(attribute.t.dims))
            if (node.op_type, attribute.name) == ("Cast", "to"):
                made[node.output[0]] = _Known(attribute.i)
        if node.op_type in ("MatMul", "Gemm"):
            made[node.output[0]] = _Known(made[node.output[0]].elem, self._product(node, known))
        return made

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

    def _bind(self, node: NodeProto, rules: _Rules, known: Mapping[str, _Known]) -> dict[str, int]:
        """The element type that each type name of the schema stands for."""
        types: dict[str, int] = {}
        for i, name in enumerate(node.input):
            kind = rules.inputs[min(i, len(rules.inputs) - 1)]
            elem = known.get(name, _UNKNOWN).elem if name else 0
            if kind is not None and elem:
                types.setdefault(kind, elem)
        return types

    def _product(self, node: NodeProto, known: Mapping[str, _Known]) -> tuple[int, ...] | None:
        """Sizes of x @ w. Raises InputError when the channels of the two differ."""
        x, w = known.get(node.input[0], _UNKNOWN).shape, known.get(node.input[1], _UNKNOWN).shape
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


def _declared(value: onnx.ValueInfoProto) -> _Known:
    if not value.type.HasField("tensor_type"):
        return _UNKNOWN
    tensor = value.type.tensor_type
    shape = tuple(d.dim_value for d in tensor.shape.dim) if tensor.HasField("shape") else None
    return _Known(tensor.elem_type, shape)


@lru_cache(maxsize=4096)
def _rules(op: str, opset: int) -> _Rules | None:
    """None for an operator that the opset lacks."""
    try:
        schema = onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return None
    return _Rules(
        schema.min_input,
        schema.max_input,
        tuple(f.type_str if f.is_homogeneous else None for f in schema.inputs) or (None,),
        tuple(f.type_str for f in schema.outputs if f.option != OpSchema.FormalParameterOption.Variadic),
    )
