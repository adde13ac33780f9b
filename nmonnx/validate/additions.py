"""Take off what a conversion added behind layers in stock ops, so that the rest can be compared with the original."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from nmonnx.digest import array_sha256
from nmonnx.onnx_file.graph import DOMAIN
from nmonnx.onnx_file.tensors import TensorReader
from nmonnx.validate.claims import Declared
from nmonnx.validate.scopes import Scopes

MADE_BY = ("fold-shift", "fold-center", "fold-corrections")
"""Passes whose nodes these are."""


@dataclass(frozen=True)
class Addition:
    """What is added to the output of one layer: `values` [N], or the center of each token times `values`, and x A B of
    the tensor `low_of` with (A, B) = `low`. The sum is the tensor `total`."""

    total: str
    values: np.ndarray | None = None
    centered: bool = False
    low: tuple[np.ndarray, np.ndarray] | None = None
    low_of: str = ""


@dataclass(frozen=True)
class _Parts:
    """`product` + [`center` *] `constant` + `low_of` `low_a` `low_b` -> `total`, tensor names; "" is not there."""

    product: str
    total: str
    constant: str = ""
    center: str = ""
    low_of: str = ""
    low_a: str = ""
    low_b: str = ""

    def constants(self) -> dict[str, str]:
        """What the file must declare: tensor -> what it is."""
        found = {self.constant: "row_sum" if self.center else "added", self.low_a: "low_a", self.low_b: "low_b"}
        return {name: slot for name, slot in found.items() if name}


def take_off(
    proto: ModelProto, reader: TensorReader, declared: Mapping[str, Declared]
) -> tuple[ModelProto, dict[str, Addition]]:
    """A copy of the model without what was added behind its layers, and what that was, by site.

    1. Only nodes that say that they are such an addition are looked at, and only exactly these go: an Add of a constant
       that the file declares; or an Add of such a constant times the second output of the layer's `NMPrune`, in
       float32 between Casts where the layer is in float16; or an Add of two MatMuls with such constants.
    2. The layer's product must have no other reader, nor what lies between; it gets the name of the sum back.
    3. Whatever differs stays, for others to find unexplained.
    """
    if not any(_mark(node) for nodes in _lists(proto) for node in nodes):
        return proto, {}
    plain = ModelProto()
    plain.CopyFrom(proto)
    scopes, found = Scopes(plain), {}
    constants: set[str] = set()
    readers, centers = scopes.readers(), _centers(scopes)
    for scope in scopes:
        for site, nodes in _marked(scope.nodes).items():
            parts = _parts(nodes)
            values = _values(scopes, reader, scope.path, parts, declared) if parts else None
            if parts is None or values is None:
                continue
            maker = scope.makers.get(parts.product)
            between = {parts.product, *(node.output[0] for node in nodes)} - {parts.total}
            reads = Counter(name for node in nodes for name in node.input)
            alone = all(len(readers.get((scope.path, t), ())) == reads[t] and t not in scope.outputs for t in between)
            if maker is None or not alone or (parts.center and site not in centers.get(parts.center, ())):
                continue
            maker.output[list(maker.output).index(parts.product)] = parts.total
            low = (values[parts.low_a], values[parts.low_b]) if parts.low_of else None
            found[site] = Addition(parts.total, values.get(parts.constant), bool(parts.center), low, parts.low_of)
            constants |= parts.constants().keys()
            for node in nodes:
                node.domain = _GONE
    _clean(plain, constants)
    return plain, found


_GONE = "nmonnx.gone"
"""Domain of a node that is to be removed."""


def _marked(nodes: Sequence[NodeProto]) -> dict[str, list[NodeProto]]:
    """The nodes that say they were added, by site."""
    groups: dict[str, list[NodeProto]] = {}
    for node in nodes:
        if _mark(node):
            groups.setdefault(_mark(node), []).append(node)
    return groups


def _mark(node: NodeProto) -> str:
    """The site that a node says it was added behind."""
    props = {p.key: p.value for p in node.metadata_props}
    if node.domain == DOMAIN or props.get("nmonnx.pass") not in MADE_BY:
        return ""
    try:
        names = json.loads(props.get("nmonnx.site", "[]"))
    except ValueError:
        return ""
    return names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else ""


def _parts(nodes: Sequence[NodeProto]) -> _Parts | None:
    """What the nodes of one addition compute; None when it is anything else."""
    if any(node.domain not in ("", "ai.onnx") for node in nodes):
        return None
    made = {node.output[0]: node for node in nodes}
    read = {name for node in nodes for name in node.input}
    ends = [node for node in nodes if node.output[0] not in read]
    if len(ends) != 1:
        return None
    total = ends[0].output[0]
    kinds = sorted(node.op_type for node in nodes)
    if set(kinds) <= {"Add", "MatMul"}:
        return _plain_parts(ends[0], made, kinds)
    wide = kinds == ["Add", "Cast", "Cast", "Cast", "Mul"]
    if not wide and kinds != ["Add", "Mul"]:
        return None
    if wide and (ends[0].op_type != "Cast" or _to(ends[0]) != TensorProto.FLOAT16):
        return None
    add = made.get(ends[0].input[0]) if wide else ends[0]
    mul = made.get(add.input[1]) if add is not None and add.op_type == "Add" else None
    if add is None or mul is None or mul.op_type != "Mul":
        return None
    product, center = add.input[0], mul.input[0]
    if wide:
        casts = [made.get(name) for name in (product, center)]
        if any(cast is None or cast.op_type != "Cast" or _to(cast) != TensorProto.FLOAT for cast in casts):
            return None
        product, center = (cast.input[0] for cast in casts if cast is not None)
    return _Parts(product, total, mul.input[1], center)


def _plain_parts(end: NodeProto, made: Mapping[str, NodeProto], kinds: Sequence[str]) -> _Parts | None:
    """A constant, a low rank, or first the one and then the other."""
    low: dict[str, str] = {}
    product, addend = end.input
    outer = made.get(addend)
    if outer is not None:
        inner = made.get(outer.input[0])
        if inner is None or (outer.op_type, inner.op_type) != ("MatMul", "MatMul"):
            return None
        low = {"low_of": inner.input[0], "low_a": inner.input[1], "low_b": outer.input[1]}
    first = made.get(product) if low else None
    if kinds != ["Add"] * (1 + (first is not None)) + ["MatMul"] * len(low and "ab"):
        return None
    if first is not None:
        product, addend = first.input
    constant = addend if first is not None or not low else ""
    return _Parts(product, end.output[0], constant, **low)


def _to(cast: NodeProto) -> int:
    return next((a.i for a in cast.attribute if a.name == "to"), 0)


def _centers(scopes: Scopes) -> dict[str, list[str]]:
    """The second output of each prune that centres, with the sites that the op lists."""
    found = {}
    for scope in scopes:
        for node in scope.nodes:
            asks = any(a.name == "center" and a.i for a in node.attribute)
            if node.domain == DOMAIN and asks and len(node.output) > 1:
                text = next((p.value for p in node.metadata_props if p.key == "nmonnx.site"), "[]")
                found[node.output[1]] = json.loads(text)
    return found


def _values(
    scopes: Scopes, reader: TensorReader, path: str, parts: _Parts, declared: Mapping[str, Declared]
) -> dict[str, np.ndarray] | None:
    """The constants by name; None when one is not stored as it is declared."""
    found = {}
    for name, slot in parts.constants().items():
        values, known = _stored(scopes, reader, path, name), declared.get(name)
        if values is None or known is None or (known.input, known.sha256) != (slot, array_sha256(values)):
            return None
        found[name] = values
    return found


def _stored(scopes: Scopes, reader: TensorReader, path: str, name: str) -> np.ndarray | None:
    key = scopes.find(path, name)
    stored, maker = (scopes.initializer(key), scopes.maker(key)) if key else (None, None)
    if stored is not None:
        return reader.array(stored)
    if maker is not None and maker.op_type == "Constant" and maker.attribute[0].name == "value":
        return numpy_helper.to_array(maker.attribute[0].t)
    return None


def _clean(proto: ModelProto, constants: set[str]) -> None:
    """Remove the nodes that were taken off, and their constants where nothing else reads them."""
    for nodes in _lists(proto):
        _keep(nodes, [node for node in nodes if node.domain != _GONE])
    read = {name for nodes in _lists(proto) for node in nodes for name in node.input}
    unread = constants - read - {o.name for o in proto.graph.output}
    _keep(proto.graph.initializer, [t for t in proto.graph.initializer if t.name not in unread])
    for nodes in _lists(proto):
        _keep(nodes, [n for n in nodes if n.op_type != "Constant" or n.output[0] not in unread])


def _keep(messages, kept) -> None:  # type: ignore[no-untyped-def]
    if len(kept) != len(messages):
        del messages[:]
        messages.extend(kept)


def _lists(proto: ModelProto) -> Iterator:  # type: ignore[type-arg]
    """The node list of every graph, subgraph and function."""
    stack: list[GraphProto | FunctionProto] = [proto.graph, *proto.functions]
    while stack:
        graph = stack.pop()
        yield graph.node
        stack += [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
