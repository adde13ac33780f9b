"""What ONNX Runtime refuses in a model, found before any work and said in one sentence that names the culprit.

Names and versions are here, operators and their operands in `check_operators`. What is not certain to be refused
passes: a valid model is never turned away.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto

from nmonnx.errors import InputError
from nmonnx.onnx_file.check_operators import check_operators, default_opset, label
from nmonnx.onnx_file.tensors import all_tensors, check_inline, is_external

_ML = "ai.onnx.ml"
_ML_COLUMN = 3  # of a row of VERSION_TABLE: release, IR, ai.onnx, ai.onnx.ml


def check_readable(proto: ModelProto, path: Path) -> None:
    """Raise InputError for a model that means nothing: versions that are too new or missing, names that two things
    define, inline data of another size than its shape asks for."""
    _check_versions(proto, path)
    for tensor in all_tensors(proto):
        if not is_external(tensor):
            check_inline(tensor, f"tensor {tensor.name!r} of {path}")
    _check_unique(proto.graph, str(path))


def check_runnable(proto: ModelProto, path: Path) -> None:
    """Raise InputError for a readable model that ONNX Runtime would not load all the same, as far as it shows without
    weights: names that nothing defines, unknown operators, operands whose channels do not fit."""
    _check_reads(proto.graph, [], str(path))
    called = list(_called_functions(proto))
    for function in called:
        where = f"{path}, function {function.name!r}"
        defined = _defined(function.node, function.input, where)
        _check_body(function.node, defined, function.output, [], where)
    check_operators(proto, called, path)


def _check_versions(proto: ModelProto, path: Path) -> None:
    if not proto.HasField("graph") or not proto.ir_version:
        raise InputError(f"{path} is not an ONNX model: it has no graph or no IR version")
    if proto.ir_version > onnx.IR_VERSION:
        raise InputError(
            f"{path}: IR version {proto.ir_version}; the installed onnx {onnx.__version__} supports up to"
            f" {onnx.IR_VERSION}. Upgrade onnx or export with an older IR version"
        )
    if not proto.opset_import:
        raise InputError(f"{path}: opset_import is empty, so its operators have no meaning; export it again")
    _check_opset(path, "", default_opset(proto.opset_import), onnx.defs.onnx_opset_version())
    for opset in proto.opset_import:
        if opset.domain == _ML:
            newest = max(int(row[_ML_COLUMN]) for row in onnx.helper.VERSION_TABLE)
            _check_opset(path, f"{_ML} ", max(1, opset.version), newest)


def _check_opset(path: Path, domain: str, version: int, newest: int) -> None:
    if version > newest:
        raise InputError(
            f"{path}: {domain}opset {version}; the installed onnx {onnx.__version__} supports up to {newest}."
            " Upgrade onnx or export with an older opset"
        )
    if version < 1:
        raise InputError(f"{path}: {domain}opset {version} does not exist; they count from 1, export it again")


def _check_unique(graph: GraphProto, where: str) -> None:
    _check_once((i.name for i in graph.input), "graph input", where)
    _check_once((t.name for t in graph.initializer), "initializer", where)
    _check_once((n.name for n in graph.node), "node", where)
    _defined(graph.node, _given(graph), where)
    for inner in _inner(graph.node):
        _check_unique(inner, where)


def _check_once(names: Iterable[str], what: str, where: str) -> None:
    seen: set[str] = set()
    for name in filter(None, names):
        if name in seen:
            raise InputError(f"{where}: {what} {name!r} is there twice; names must be unique, rename one")
        seen.add(name)


def _given(graph: GraphProto) -> set[str]:
    """Names that a graph defines without its nodes."""
    stored = (*graph.initializer, *(s.values for s in graph.sparse_initializer))
    return {*(i.name for i in graph.input), *(t.name for t in stored)}


def _defined(nodes: Sequence[NodeProto], given: Iterable[str], where: str) -> set[str]:
    made = set(given)
    for node in nodes:
        for output in filter(None, node.output):
            if output in made:
                raise InputError(f"{where}: tensor {output!r} is defined twice (the graph is not SSA); export it again")
            made.add(output)
    return made


def _check_reads(graph: GraphProto, outer: Sequence[set[str]], where: str) -> None:
    """`outer` are the names that the enclosing graphs define."""
    defined = _defined(graph.node, _given(graph), where)
    _check_body(graph.node, defined, (o.name for o in graph.output), outer, where)


def _check_body(
    nodes: Sequence[NodeProto], defined: set[str], wanted: Iterable[str], outer: Sequence[set[str]], where: str
) -> None:
    """What the nodes read, or the body gives back, is defined."""
    scopes = [*outer, defined]
    for node in nodes:
        for name in filter(None, node.input):
            if not any(name in scope for scope in scopes):
                raise InputError(f"{where}: {label(node)} reads {name!r}, which nothing makes; export it again")
    for inner in _inner(nodes):
        _check_reads(inner, scopes, where)
    for name in wanted:
        if name not in defined:
            raise InputError(f"{where}: nothing makes the output {name!r}; export it again")


def _inner(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    return (a.g for node in nodes for a in node.attribute if a.type == AttributeProto.GRAPH)


def _called_functions(proto: ModelProto) -> Iterator[FunctionProto]:
    """The functions that the graph reaches; the others are never looked at when the model runs."""
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    waiting = list(proto.graph.node)
    while waiting and functions:
        node = waiting.pop()
        function = functions.pop((node.domain, node.op_type, node.overload), None)
        if function is not None:
            yield function
            waiting.extend(function.node)
        for inner in _inner([node]):
            waiting.extend(inner.node)
