"""Put an edited graph back over the original protobuf, so that everything no pass touched stays as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
import onnx_graphsurgeon as gs
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, helper, numpy_helper

from nmonnx.errors import InputError
from nmonnx.onnx_file.graph import DOMAIN, DOMAIN_VERSION, Computed, Model, Transposed
from nmonnx.onnx_file.weight_pruning import PrunedWeight


def weave(model: Model) -> ModelProto:
    """The model as edited, as a new protobuf. Repacked and computed weights appear with type and shape but without data
    (`nmonnx.onnx_file.save` writes that); weights that nothing reads any more are dropped.

    1. Untouched nodes are the original protobufs, byte for byte; a node whose wiring changed keeps everything else.
    2. The order of nodes is kept; a new node stands right before its first reader. An unsorted graph comes out sorted.
    3. A node that took another's place carries on its metadata and doc string.
    4. Model-level fields, graph inputs and outputs, unused initializers and value infos stay.
    """
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    _weave_graph(proto.graph, model.graph, model)
    new = [numpy_helper.from_array(values, name) for name, values in model.constants.items()]
    later: list[Transposed | PrunedWeight | Computed] = [*model.repacked.values(), *model.computed.values()]
    new += [onnx.TensorProto(name=t.name, data_type=t.elem, dims=t.dims) for t in later]
    read = _reads(proto.graph)
    proto.graph.initializer.extend(t for t in new if t.name in read)
    for body, function in zip(proto.functions, model.graph.functions, strict=True):
        _weave_function(body, function, model)
    proto.functions.extend(model.functions)
    if any(_uses_domain(body.node) for body in (proto.graph, *proto.functions)):
        _import_domain(proto.opset_import)
    entries = {p.key: p for p in proto.metadata_props}
    for key, value in model.metadata.items():
        entry = entries.get(key) or proto.metadata_props.add(key=key)
        entry.value = value
    return proto


def _weave_graph(proto: GraphProto, graph: gs.Graph, model: Model) -> None:
    before, made = _reads(proto), _makes(proto)
    nodes = [_weave_node(node, model) for node in _sorted(graph.nodes)]
    del proto.node[:]
    proto.node.extend(nodes)
    after, still_made = _reads(proto), _makes(proto)
    inputs = {i.name for i in proto.input}
    _keep(proto.initializer, lambda t: t.name in after or t.name not in before or t.name in inputs)
    _keep(proto.value_info, lambda v: v.name in still_made or v.name not in made)
    for value in proto.value_info:
        if value.name in model.shapeless:
            value.type.tensor_type.ClearField("shape")


def _weave_function(proto: FunctionProto, function: gs.Function, model: Model) -> None:
    nodes = [_weave_node(node, model) for node in _sorted(function.nodes)]
    del proto.node[:]
    proto.node.extend(nodes)
    if _uses_domain(proto.node):
        _import_domain(proto.opset_import)


def _weave_node(node: gs.Node, model: Model) -> NodeProto:
    proto = NodeProto()
    original = model.origin.get(id(node))
    if original is not None:
        proto.CopyFrom(original)
        _rename(proto.input, [t.name for t in node.inputs])
        _rename(proto.output, [t.name for t in node.outputs])
        for attribute in proto.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _weave_graph(attribute.g, node.attrs[attribute.name], model)
    else:
        inputs, outputs = [t.name for t in node.inputs], [t.name for t in node.outputs]
        proto = helper.make_node(node.op, inputs, outputs, name=node.name, domain=node.domain)
        proto.attribute.extend(helper.make_attribute(k, v) for k, v in node.attrs.items())
        old = model.heirs.get(id(node), NodeProto())
        proto.doc_string = old.doc_string
        proto.metadata_props.extend(old.metadata_props)
    for key, value in model.notes.get(id(node), {}).items():
        proto.metadata_props.add(key=key, value=value)
    return proto


def _rename(names, wanted: list[str]) -> None:  # type: ignore[no-untyped-def]
    if list(names) != wanted:
        del names[:]
        names.extend(wanted)


def _sorted(nodes: Iterable[gs.Node]) -> list[gs.Node]:
    """Stable topological order: each node after the nodes it reads from, otherwise as listed."""
    nodes = list(nodes)
    here = {id(node) for node in nodes}
    done: set[int] = set()
    waiting_for: set[int] = set()
    ordered: list[gs.Node] = []
    for start in nodes:
        stack = [(start, iter(_feeders(start)))]
        while stack:
            node, feeders = stack[-1]
            if id(node) in done:
                stack.pop()
                continue
            waiting_for.add(id(node))
            feeder = next((f for f in feeders if id(f) in here and id(f) not in done), None)
            if feeder is not None:
                if id(feeder) in waiting_for:
                    raise InputError(f"node {feeder.name or feeder.op!r} reads its own result (the graph has a cycle)")
                stack.append((feeder, iter(_feeders(feeder))))
                continue
            done.add(id(node))
            waiting_for.discard(id(node))
            ordered.append(node)
            stack.pop()
    return ordered


def _feeders(node: gs.Node) -> Iterator[gs.Node]:
    for tensor in node.inputs:
        yield from tensor.inputs
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for output in value.outputs:
                yield from output.inputs
            for inner in value.nodes:
                yield from _feeders(inner)


def _reads(graph: GraphProto) -> set[str]:
    """Names that the graph's nodes, those of its subgraphs, and its outputs read."""
    names = {o.name for o in graph.output}
    for node in graph.node:
        names.update(node.input)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                names |= _reads(attribute.g)
            elif attribute.type == onnx.AttributeProto.GRAPHS:
                names.update(*(_reads(g) for g in attribute.graphs))
    return names


def _makes(graph: GraphProto) -> set[str]:
    return {name for node in graph.node for name in node.output}


def _keep(messages, keep) -> None:  # type: ignore[no-untyped-def]
    kept = [m for m in messages if keep(m)]
    if len(kept) != len(messages):
        del messages[:]
        messages.extend(kept)


def _uses_domain(nodes) -> bool:  # type: ignore[no-untyped-def]
    return any(
        node.domain == DOMAIN
        or any(_uses_domain(a.g.node) for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
        for node in nodes
    )


def _import_domain(imports) -> None:  # type: ignore[no-untyped-def]
    if all(o.domain != DOMAIN for o in imports):
        imports.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
