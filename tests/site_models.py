"""Small models for the tests of nmonnx.sites, and the product of one layer as ONNX Runtime computes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper, numpy_helper

from nmonnx.onnx_file.graph import Model, load
from nmonnx.sites import Site

RNG = np.random.default_rng(7)
_NUMPY: dict[int, type] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.DOUBLE: np.float64,
}


def parse(
    tmp_path: Path, text: str, weights: dict[str, np.ndarray] | None = None, ir: int = 9, opset: int = 20
) -> Model:
    """The model with this graph in ONNX's text syntax, `weights` as its initializers."""
    imports = f'["" : {opset}, "com.microsoft" : 1, "local" : 1]'
    proto = onnx.parser.parse_model(f"<ir_version: {ir}, opset_import: {imports}>\n{text}")
    proto.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in (weights or {}).items())
    return saved(tmp_path, proto)


def saved(tmp_path: Path, proto: ModelProto) -> Model:
    onnx.save(proto, tmp_path / "model.onnx")
    return load(tmp_path / "model.onnx")


def matrix(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.asarray(RNG.standard_normal(shape)).astype(dtype)


def run_layer(proto: ModelProto, site: Site) -> np.ndarray:
    """What the layer does to the unit matrix, less what it does to zeros (its bias): the weight it multiplies
    with. The model is cut before the layer, or before the quantiser when the layer takes integer codes."""
    own = site.node.inputs[0 if site.node.inputs[0].inputs else site.splice[0][1]].name
    takes_codes = site.splice[0][0] is not site.node and site.op not in ("MatMul", "Gemm", "Einsum")
    port = next(i for i, t in enumerate(site.node.inputs) if t.name == own or takes_codes)
    feed = site.activation.name if takes_codes else site.node.inputs[port].name
    session = ort.InferenceSession(_cut(proto, feed, site).SerializeToString(), _plain_options())
    batch = (1,) if site.op == "Einsum" else site.weight().shape[:-2]
    unit: np.ndarray = np.broadcast_to(np.eye(site.k, dtype=_NUMPY[site.elem]), (*batch, site.k, site.k))
    on_unit, on_zero = (session.run(None, {feed: x})[0].astype(np.float32) for x in (unit, np.zeros_like(unit)))
    return (on_unit - on_zero).reshape(site.weight().shape)


def _cut(proto: ModelProto, feed: str, site: Site) -> ModelProto:
    made = {o: n for n in proto.graph.node for o in n.output}
    wanted, nodes = [_float_output(proto, site)], []
    output, done = wanted[0], {feed}
    while wanted:
        name = wanted.pop()
        node = made.get(name)
        if name in done or node is None:
            continue
        done.add(name)
        nodes.append(node)
        wanted.extend(i for i in node.input if i)
    used = {i for n in nodes for i in n.input}
    graph = helper.make_graph(
        [n for n in proto.graph.node if any(n is m for m in nodes)],
        "layer",
        [helper.make_tensor_value_info(feed, site.elem, None)],
        [helper.make_empty_tensor_value_info(output)],
        [t for t in proto.graph.initializer if t.name in used],
    )
    return helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)


def _float_output(proto: ModelProto, site: Site) -> str:
    """The layer's output; for MatMulInteger what Cast and Mul make of it."""
    name = site.output
    for op in ("Cast", "Mul") if site.op == "MatMulInteger" else ():
        name = next(n.output[0] for n in proto.graph.node if n.op_type == op and name in n.input)
    return name


def _plain_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return options


def without_names(model: ModelProto) -> ModelProto:
    """The same model with numbers for tensor names, nameless nodes and no metadata."""
    numbers: dict[str, str] = {}

    def number(name: str) -> str:
        return numbers.setdefault(name, f"t{len(numbers)}") if name else ""

    def strip(graph: onnx.GraphProto) -> None:
        for value in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
            value.name = number(value.name)
        for node in graph.node:
            node.name = ""
            del node.metadata_props[:]
            node.input[:] = [number(i) for i in node.input]
            node.output[:] = [number(o) for o in node.output]
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    strip(attribute.g)

    strip(model.graph)
    return model
