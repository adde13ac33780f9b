"""An independent way to write N:M pruning into a model: stock operators put into the protobuf, one chain a layer.

Shares no code with the passes. Needs opset 11; no NaN in the activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper


def prune_with_stock_ops(model: ModelProto, records: list[dict], keep: int, group: int) -> ModelProto:
    """A copy of `model` in which every layer that `records` (entries of `nmonnx.sites`) calls pruned reads a pruned
    activation."""
    model = _copy(model)
    before_quantiser: set[tuple[str, str]] = set()  # layers that share a quantised input share the prune before it
    for index, record in enumerate(r for r in records if r["status"] == "pruned"):
        nodes = _body(model, record["scope"])
        if (record["scope"], record["activation"]) in before_quantiser:
            continue
        reader, position = _reader(nodes, record["output"], record["activation"])
        if record["output"] not in reader.output:
            before_quantiser.add((record["scope"], record["activation"]))
        at = next(i for i, n in enumerate(nodes) if n is reader)
        pruned = f"stock{index}_pruned"
        chain = list(_chain(record["activation"], pruned, keep, group, record["k"], f"stock{index}_"))
        reader.input[position] = pruned
        rest = list(nodes)
        rest[at:at] = chain
        rest = [_copy(n) for n in rest]
        del nodes[:]
        nodes.extend(rest)
    return model


def load_whole(path: Path) -> ModelProto:
    """A model with its external data inside, read without onnx's own reader (which refuses hard-linked files)."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            where = {e.key: e.value for e in tensor.external_data}
            with open(path.parent / where["location"], "rb") as file:
                file.seek(int(where.get("offset", 0)))
                tensor.raw_data = file.read(int(where["length"]) if "length" in where else -1)
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
    return model


def _copy(message):  # type: ignore[no-untyped-def]
    twin = type(message)()
    twin.CopyFrom(message)
    return twin


def _body(model: ModelProto, scope: str):  # type: ignore[no-untyped-def]
    if scope.startswith("function:"):
        return next(f for f in model.functions if f"function:{f.name}" == scope).node
    return next(nodes for path, nodes in _graphs("", model.graph) if path == scope)


def _graphs(path: str, graph) -> Iterator[tuple[str, object]]:  # type: ignore[no-untyped-def]
    yield path, graph.node
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                name = f"{path}/{node.name or node.output[0]}.{attribute.name}".lstrip("/")
                yield from _graphs(name, attribute.g)


def _reader(nodes, output: str, activation: str) -> tuple[NodeProto, int]:  # type: ignore[no-untyped-def]
    makers = {o: n for n in nodes for o in n.output}
    waiting = [makers[output]]
    while waiting:
        node = waiting.pop(0)
        if activation in node.input:
            return node, list(node.input).index(activation)
        waiting += [makers[i] for i in node.input if i in makers and "quantize" in makers[i].op_type.lower()]
    raise AssertionError(f"no reader of {activation} leads to {output}")


def _chain(x: str, y: str, keep: int, group: int, channels: int, p: str) -> Iterator[NodeProto]:
    def const(name: str, values: list[int]) -> str:
        return p + name, helper.make_node(  # type: ignore[return-value]
            "Constant", [], [p + name], value=numpy_helper.from_array(np.array(values, np.int64))
        )

    def node(op: str, inputs: list[str], outputs: list[str], **attributes: object) -> NodeProto:
        return helper.make_node(op, inputs, outputs, name=f"{p}{outputs[0]}", **attributes)

    missing = -channels % group
    constants = {
        "rows": [-1, channels],
        "pads": [0, 0, 0, missing],
        "groups": [-1, group],
        "whole": [-1, channels + missing],
        "k": [keep],
        "from": [0],
        "to": [channels],
        "axis": [1],
    }
    for name, values in constants.items():
        yield const(name, values)[1]  # type: ignore[misc]
    yield node("Shape", [x], [p + "shape"])
    yield node("Reshape", [x, p + "rows"], [p + "x2"])
    yield node("Pad", [p + "x2", p + "pads"], [p + "xp"])
    yield node("Reshape", [p + "xp", p + "groups"], [p + "xg"])
    yield node("Cast", [p + "xg"], [p + "x32"], to=TensorProto.FLOAT)
    yield node("Abs", [p + "x32"], [p + "abs"])
    yield node("TopK", [p + "abs", p + "k"], [p + "best", p + "index"], axis=1)
    yield node("GatherElements", [p + "xg", p + "index"], [p + "kept"], axis=1)
    yield node("Sub", [p + "xg", p + "xg"], [p + "zero"])
    yield node("ScatterElements", [p + "zero", p + "index", p + "kept"], [p + "yg"], axis=1)
    yield node("Reshape", [p + "yg", p + "whole"], [p + "yp"])
    yield node("Slice", [p + "yp", p + "from", p + "to", p + "axis"], [p + "y2"])
    yield node("Reshape", [p + "y2", p + "shape"], [y])
