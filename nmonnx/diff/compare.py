"""Find the edits that lead from one model to another, scope by scope."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeVar

from google.protobuf.message import Message
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from nmonnx.diff.describe import attribute_text, op_text, signature, value_text
from nmonnx.diff.edits import (
    AttributeEdit,
    Edit,
    FieldEdit,
    FunctionEdit,
    MetadataEdit,
    NodeEdit,
    OpsetEdit,
    OrderEdit,
    RewireEdit,
    TensorEdit,
    ValueEdit,
)
from nmonnx.diff.fields import field_texts
from nmonnx.diff.functions import called, function_key, function_paths
from nmonnx.diff.match import Pair, match_nodes
from nmonnx.diff.weights import same_values, shape_text
from nmonnx.onnx_file.tensors import TensorReader

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class Comparison:
    """Readers of the two models' tensors; the methods yield edits in the order of the files."""

    in_a: TensorReader
    in_b: TensorReader

    def models(self, a: ModelProto, b: ModelProto) -> Iterator[Edit]:
        yield from _fields("", "", a, b)
        yield from _texts(OpsetEdit, "", _opsets(a), _opsets(b))
        yield from _metadata("", "model", "model", a, b)
        yield from self.graphs("", a.graph, b.graph)
        yield from self.functions(a, b)

    def graphs(self, scope: str, a: GraphProto, b: GraphProto) -> Iterator[Edit]:
        yield from _fields(scope, "graph ", a, b)
        yield from _metadata(scope, "graph", a.name, a, b)
        for side, ports_a, ports_b in (("input", a.input, b.input), ("output", a.output, b.output)):
            order = f"graph {side} order"
            yield from _texts(FieldEdit, scope, {order: _order(ports_a, ports_b)}, {order: _order(ports_b, ports_a)})
        for role, values_a, values_b in (
            ("input", a.input, b.input),
            ("output", a.output, b.output),
            ("value", a.value_info, b.value_info),
        ):
            yield from self.values(scope, role, values_a, values_b)
        yield from self.nodes(scope, a.node, b.node)
        yield from self.initializers(scope, a, b)

    def values(self, scope: str, role: str, a: Iterable[ValueInfoProto], b: Iterable[ValueInfoProto]) -> Iterator[Edit]:
        for name, before, after in _pairs({v.name: v for v in a}, {v.name: v for v in b}):
            texts = _said(before, value_text), _said(after, value_text)
            if texts[0] != texts[1]:
                yield ValueEdit(scope, name, *texts, role)
            if before is not None and after is not None:
                yield from _details(scope, role, name, before, after)

    def functions(self, a: ModelProto, b: ModelProto) -> Iterator[Edit]:
        old, new = ({function_key(f): f for f in m.functions} for m in (a, b))
        paths = function_paths(b.functions)
        for key, before, after in _pairs(old, new):
            if before is None or after is None or signature(before) != signature(after):
                yield FunctionEdit("", key, _said(before, signature), _said(after, signature))
            if before is not None and after is not None:
                scope = paths[key]
                yield from _fields(scope, "function ", before, after)
                yield from _metadata(scope, "function", key, before, after)
                yield from _texts(OpsetEdit, scope, _opsets(before), _opsets(after))
                values = (getattr(f, "value_info", ()) for f in (before, after))  # newer than some onnx releases
                yield from self.values(scope, "value", *values)
                yield from self.nodes(scope, before.node, after.node)

    def nodes(self, scope: str, a: Sequence[NodeProto], b: Sequence[NodeProto]) -> Iterator[Edit]:
        pairs = match_nodes(a, b)
        moved = _moved(pairs)
        for index, pair in enumerate(pairs):
            yield from self.node(scope, pair)
            if index in moved and pair.before is not None and pair.after is not None:
                positions = (str(pair.position_before), str(pair.position_after))
                yield OrderEdit(scope, label(pair.after), *positions, op=pair.after.op_type)

    def node(self, scope: str, pair: Pair) -> Iterator[Edit]:
        a, b = pair.before, pair.after
        if a is None or b is None:
            only = a if a is not None else b
            assert only is not None
            yield NodeEdit(
                scope, label(only), _said(a, op_text), _said(b, op_text), tuple(only.input), tuple(only.output)
            )
            return
        name, same_op = label(b), called(a) == called(b)
        if not same_op:
            yield NodeEdit(scope, name, op_text(a), op_text(b), tuple(b.input), tuple(b.output))
        if a.name != b.name:
            yield AttributeEdit(scope, name, a.name, b.name, b.op_type, "name")
        yield from _rewired(scope, name, b.op_type, "input", a.input, b.input)
        yield from _rewired(scope, name, b.op_type, "output", a.output, b.output)
        if same_op:
            yield from self.attributes(scope, name, a, b)
        for edit in _metadata(scope, "node", name, a, b):
            if same_op or edit.change != "added":  # what a new op carries is part of the new op
                yield edit

    def attributes(self, scope: str, name: str, a: NodeProto, b: NodeProto) -> Iterator[Edit]:
        if a.doc_string != b.doc_string:
            yield AttributeEdit(scope, name, a.doc_string, b.doc_string, b.op_type, "doc_string")
        for field, said_a, said_b in _changes(field_texts(a), field_texts(b)):
            yield AttributeEdit(scope, name, said_a, said_b, b.op_type, field)
        old, new = ({x.name: x for x in node.attribute} for node in (a, b))
        for key, before, after in _pairs(old, new):
            if before is not None and after is not None and before.type == after.type:
                if before.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
                    yield from self.bodies(f"{scope}/{name}.{key}".lstrip("/"), before, after)
                    continue
                if self._same_attribute(before, after):
                    continue
            old_text = None if before is None else attribute_text(before, self.in_a)
            new_text = None if after is None else attribute_text(after, self.in_b)
            yield AttributeEdit(scope, name, old_text, new_text, b.op_type, key)

    def bodies(self, scope: str, a: AttributeProto, b: AttributeProto) -> Iterator[Edit]:
        if a.type == AttributeProto.GRAPH:
            yield from self.graphs(scope, a.g, b.g)
            return
        for index, (before, after) in enumerate(zip_longest(a.graphs, b.graphs, fillvalue=GraphProto())):
            yield from self.graphs(f"{scope}[{index}]", before, after)

    def initializers(self, scope: str, a: GraphProto, b: GraphProto) -> Iterator[Edit]:
        old, new = ({stored.name: stored for stored in _stored(graph)} for graph in (a, b))
        for name, before, after in _pairs(old, new):
            if before is not None and after is not None:
                yield from _details(scope, "initializer", name, before.tensors[0], after.tensors[0])
                if self._same(before, after):
                    continue
            yield TensorEdit(
                scope,
                name,
                _said(before, _shape),
                _said(after, _shape),
                _digest(before, self.in_a),
                _digest(after, self.in_b),
            )

    def _same_attribute(self, before: AttributeProto, after: AttributeProto) -> bool:
        if before.type == AttributeProto.TENSOR and not (before.ref_attr_name or after.ref_attr_name):
            return same_values(before.t, self.in_a, after.t, self.in_b)
        return before.SerializeToString(deterministic=True) == after.SerializeToString(deterministic=True)

    def _same(self, before: _Stored, after: _Stored) -> bool:
        return (len(before.tensors), before.dims) == (len(after.tensors), after.dims) and all(
            same_values(x, self.in_a, y, self.in_b) for x, y in zip(before.tensors, after.tensors, strict=True)
        )


@dataclass(frozen=True)
class _Stored:
    """An initializer: a tensor, or the values and indices of a sparse one and the shape that they span."""

    name: str
    tensors: tuple[TensorProto, ...]
    dims: tuple[int, ...] = ()


def _said(thing: V | None, describe: Callable[[V], str]) -> str | None:
    return None if thing is None else describe(thing)


def label(node: NodeProto) -> str:
    """How a node is called: its name, or its first output when it has none."""
    return node.name or next((o for o in node.output if o), node.op_type)


def _stored(graph: GraphProto) -> Iterator[_Stored]:
    for tensor in graph.initializer:
        yield _Stored(tensor.name, (tensor,))
    for sparse in graph.sparse_initializer:
        yield _Stored(sparse.values.name, (sparse.values, sparse.indices), tuple(sparse.dims))


def _shape(stored: _Stored) -> str:
    whole = f" of {list(stored.dims)}" if stored.dims else ""
    return " with indices ".join(shape_text(t) for t in stored.tensors) + whole


def _digest(stored: _Stored | None, reader: TensorReader) -> str:
    return "+".join(reader.sha256(t) for t in (stored.tensors if stored is not None else ()))


def _order(ports: Iterable[ValueInfoProto], others: Iterable[ValueInfoProto]) -> str:
    """Names of the ports that both graphs have, in order."""
    names = {v.name for v in others}
    return ", ".join(v.name for v in ports if v.name in names)


def _opsets(owner: ModelProto | FunctionProto) -> dict[str, str]:
    return {o.domain or "ai.onnx": str(o.version) for o in owner.opset_import}


def _texts(
    make: Callable[[str, str, str | None, str | None], Edit], scope: str, a: Mapping[str, str], b: Mapping[str, str]
) -> Iterator[Edit]:
    for name, before, after in _changes(a, b):
        yield make(scope, name, before, after)


def _fields(scope: str, owner: str, a: Message, b: Message) -> Iterator[Edit]:
    for field, before, after in _changes(field_texts(a), field_texts(b)):
        yield FieldEdit(scope, f"{owner}{field}", before, after)


def _details(scope: str, role: str, name: str, a: Message, b: Message) -> Iterator[Edit]:
    """What a value or an initializer that both models have carries beside its type and its bytes."""
    for field, before, after in _changes(field_texts(a), field_texts(b)):
        yield FieldEdit(scope, f"{field} of {role} {name}", before, after)
    yield from _metadata(scope, role, name, a, b)


def _metadata(scope: str, owner: str, name: str, a, b) -> Iterator[Edit]:  # type: ignore[no-untyped-def]
    old, new = ({p.key: p.value for p in getattr(x, "metadata_props", ())} for x in (a, b))
    for key, before, after in _changes(old, new):
        yield MetadataEdit(scope, name, before, after, owner, key)


def _rewired(scope: str, name: str, op: str, side: str, a: Iterable[str], b: Iterable[str]) -> Iterator[Edit]:
    old, new = dict(enumerate(_trimmed(a))), dict(enumerate(_trimmed(b)))
    for slot, before, after in _changes(old, new):
        yield RewireEdit(scope, name, before, after, op, f"{side} {slot}")


def _trimmed(names: Iterable[str]) -> list[str]:
    """Without the empty names at the end, which mean the same as no name."""
    kept = list(names)
    while kept and not kept[-1]:
        kept.pop()
    return kept


def _changes(a: Mapping[K, str], b: Mapping[K, str]) -> Iterator[tuple[K, str | None, str | None]]:
    return ((key, before, after) for key, before, after in _pairs(a, b) if before != after)


def _pairs(a: Mapping[K, V], b: Mapping[K, V]) -> Iterator[tuple[K, V | None, V | None]]:
    """(key, value in a, value in b) of every key, those of `b` in its order, then those only `a` has."""
    for key in b:
        yield key, a.get(key), b[key]
    for key in a:
        if key not in b:
            yield key, a[key], None


def _moved(pairs: Sequence[Pair]) -> set[int]:
    """Indices of the pairs that must move to turn one order into the other: all but a longest increasing run."""
    both = [i for i, p in enumerate(pairs) if p.before is not None and p.after is not None]
    tails: list[int] = []
    ends: list[int] = []
    previous: dict[int, int] = {}
    for i in both:
        position = pairs[i].position_before
        at = bisect_left(tails, position)
        previous[i] = ends[at - 1] if at else -1
        tails[at : at + 1] = [position]
        ends[at : at + 1] = [i]
    keep, at = set(), ends[-1] if ends else -1
    while at >= 0:
        keep.add(at)
        at = previous[at]
    return set(both) - keep
