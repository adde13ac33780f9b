"""`Model`: one ONNX file, opened for editing without its weights.

`load` reads and checks the skeleton and imports it into onnx-graphsurgeon. Passes edit
`model.graph`; `nmonnx.onnx_file.save` writes it back over the original protobuf, so that nothing that
graphsurgeon does not carry (metadata, doc strings, types, unused initializers) is lost.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from nmonnx.errors import InputError
from nmonnx.onnx_file.check import check_readable, check_runnable
from nmonnx.onnx_file.tensors import TensorReader, all_tensors, is_external, size_of, why
from nmonnx.onnx_file.weight_pruning import PrunedWeight

DOMAIN = "ai.nmonnx"
"""Operator domain of the custom ops."""

DOMAIN_VERSION = 1

gs.logger.G_LOGGER.severity = logging.CRITICAL  # its warnings go to stdout, where the data goes


@dataclass(frozen=True)
class Transposed:
    """A new initializer that is a stored 2-D weight with its axes swapped, written when the model is saved."""

    name: str
    source: TensorProto

    @property
    def elem(self) -> int:
        return self.source.data_type

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(self.source.dims)[::-1]

    @property
    def how(self) -> str:
        return "transposed"


@dataclass(frozen=True, eq=False)
class Computed:
    """A new initializer whose values are made when they are wanted, so that no two weights are in memory at a time.

    elem, dims   TensorProto element type and shape
    values       the array, of that type and shape; called once for each time that it is needed
    source       name of the stored tensor that holds the same values in another layout, "" for new ones
    """

    name: str
    elem: int
    dims: tuple[int, ...]
    values: Callable[[], np.ndarray]
    source: str = ""


@dataclass(frozen=True, eq=False)
class NewWeight:
    """A weight that a pass stored in another form than the original has it.

    form    "fp16", "int8" or "int4"
    error   |W' - W| / |W|, Frobenius norms
    values  W' as float32 [K, N], made when it is wanted
    """

    form: str
    error: float
    values: Callable[[], np.ndarray]


@dataclass(eq=False)
class Model:
    """A model that passes may edit.

    proto     the skeleton as it was read; never changed
    graph     the same as onnx-graphsurgeon graph; what passes edit
    tensors   reader of the weights, which stay on disk
    constants new small initializers, by name
    repacked  new initializers made from stored weights, by name
    computed  new initializers of any size whose values are made as the model is saved, by name
    functions model-local functions to add
    metadata  entries to add to the model's metadata_props
    notes     metadata_props that passes add to nodes, by id(gs node)
    heirs     for a node that took the place of an original one: that one, whose metadata and doc string go on
    declared  new constants that do something: name -> {input of the op, sha256 of the values, tensor that it replaces}
    alive     nodes whose id is a key above, so that no other node is given it when a pass takes one out
    shapeless tensors whose recorded shape is dropped, because something now computes with it
    ends      site name -> the tensor that has the layer's result, where nodes were added behind its `NMMatMul`
    settled   names of sites whose bias makes up for their shift already
    weights   site name -> the weight of another form that its op reads
    """

    path: Path
    proto: ModelProto
    graph: gs.Graph
    tensors: TensorReader
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    repacked: dict[str, Transposed | PrunedWeight] = field(default_factory=dict)
    computed: dict[str, Computed] = field(default_factory=dict)
    functions: list[onnx.FunctionProto] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    notes: dict[int, dict[str, str]] = field(default_factory=dict)
    heirs: dict[int, NodeProto] = field(default_factory=dict)
    declared: dict[str, dict[str, str]] = field(default_factory=dict)
    shapeless: set[str] = field(default_factory=set)
    ends: dict[str, str] = field(default_factory=dict)
    settled: set[str] = field(default_factory=set)
    weights: dict[str, NewWeight] = field(default_factory=dict)
    origin: dict[int, NodeProto] = field(default_factory=dict)
    alive: list[gs.Node] = field(default_factory=list)

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return next((o.version for o in self.proto.opset_import if o.domain in ("", "ai.onnx")), 1)

    def props_of(self, node: gs.Node) -> dict[str, str]:
        """metadata_props of a node of the original (dynamo exports name the module here)."""
        proto = self.origin.get(id(node))
        return {p.key: p.value for p in getattr(proto, "metadata_props", ())} if proto is not None else {}

    def data_files(self) -> set[Path]:
        """The files that hold external data."""
        return {self.tensors.span(t)[0] for t in all_tensors(self.proto) if is_external(t)}

    def data_stamps(self) -> list[list[str | int]]:
        """[name, size, time in ns] of the data files, which stand for the weights in them, as JSON gives them back.
        Raises InputError."""
        try:
            return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(self.data_files())]
        except OSError as e:
            raise InputError(f"{self.path}: its data file cannot be read: {e.strerror}") from e

    def scopes(self) -> Iterator[tuple[str, gs.Graph]]:
        """Every graph that holds nodes, with its path: the main graph (""), the If/Loop bodies inside it, and
        the bodies of model-local functions ("function:NAME", or "function:DOMAIN:NAME[:OVERLOAD]" where functions
        share a name)."""
        yield from _scopes("", self.graph)
        for function, path in zip(self.graph.functions, _function_paths(self.proto), strict=True):
            yield from _scopes(path, function)


def load(path: str | Path) -> Model:
    """Open a model without its weights. Raises InputError when the file is not a model that ONNX Runtime
    would take: not ONNX, truncated, invalid, or with external data that is missing or out of bounds."""
    path = Path(path)
    proto = read_skeleton(path)
    check_runnable(proto, path)
    reader = TensorReader(path)
    for tensor in all_tensors(proto):
        if is_external(tensor):
            reader.span(tensor)
    try:
        graph = gs.import_onnx(proto)
    except Exception as e:
        raise InputError(f"{path}: the graph cannot be read: {e}") from e
    model = Model(path, proto, graph, reader)
    _pair(graph, proto.graph, model)
    for function, body in zip(graph.functions, proto.functions, strict=True):
        _pair(function, body, model)
    return model


def read_skeleton(path: Path) -> ModelProto:
    """Parse the protobuf without external data and check what needs no weights. Raises InputError."""
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder, not an ONNX file{_hint(path)}")
        size = size_of(path)
        if size == 0:
            raise InputError(f"{path} is empty (0 bytes); the export or the download failed, get it again")
    except FileNotFoundError as e:
        raise InputError(f"{path} does not exist") from e
    except (OSError, ValueError) as e:
        raise InputError(f"{str(path)[:200]!r} cannot be read: {why(e)}") from e
    try:
        proto = onnx.load(path, load_external_data=False)
    except OSError as e:
        raise InputError(f"{path} cannot be read: {why(e)}") from e
    except (DecodeError, ValueError) as e:
        raise InputError(
            f"{path} is not a valid ONNX file, or an incomplete download ({size} bytes): {e}".rstrip(". ")
        ) from e
    check_readable(proto, path)
    return proto


def _hint(folder: Path) -> str:
    inside = sorted(p.name for p in folder.glob("*.onnx"))
    return f"; did you mean {folder / inside[0]}?" if inside else ""


def _pair(graph: gs.Graph, proto: GraphProto | onnx.FunctionProto, model: Model) -> None:
    for node, original in zip(graph.nodes, proto.node, strict=True):
        model.origin[id(node)] = original
        model.alive.append(node)
        for attribute in original.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _pair(node.attrs[attribute.name], attribute.g, model)


def _function_paths(proto: ModelProto) -> list[str]:
    """Paths of the function bodies. nmonnx's own functions, which come with a conversion, change no other's path."""
    count = Counter(f.name for f in proto.functions if f.domain != DOMAIN)
    paths = []
    for function in proto.functions:
        parts = [function.name]
        if count[function.name] + (function.domain == DOMAIN) > 1:
            overload = getattr(function, "overload", "")  # onnx before 1.16 has none
            parts = [function.domain, function.name, *([overload] if overload else [])]
        paths.append(":".join(["function", *parts]))
    return paths


def _scopes(path: str, graph: gs.Graph) -> Iterator[tuple[str, gs.Graph]]:
    yield path, graph
    for node in graph.nodes:
        for name, value in node.attrs.items():
            if isinstance(value, gs.Graph):
                yield from _scopes(f"{path}/{node.name or node.outputs[0].name}.{name}".lstrip("/"), value)
