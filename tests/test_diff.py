"""A diff names every change of a model, nothing else, and folds repeated layers without losing one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from nmonnx.diff import NodeEdit, RewireEdit, TensorEdit, diff, fold, to_json, to_text
from nmonnx.diff.compare import Comparison
from nmonnx.diff.functions import function_paths
from nmonnx.diff.weights import same_values
from nmonnx.errors import InputError
from nmonnx.onnx_file.tensors import TensorReader

LAYERS, ROLES = 3, ("q", "k", "v")


def stack(layers: int = LAYERS) -> ModelProto:
    """`layers` times q, k, v linears on one activation, an If with a linear in it, and a function."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    x = "x"
    for i in range(layers):
        for role in ROLES:
            name = f"/layers.{i}/{role}_proj"
            weights.append(numpy_helper.from_array(rng.standard_normal((8, 8)).astype(np.float32), f"{name}.weight"))
            nodes.append(helper.make_node("MatMul", [x, f"{name}.weight"], [f"{name}/y"], name=f"{name}/MatMul"))
        nodes.append(
            helper.make_node("Sum", [f"/layers.{i}/{r}_proj/y" for r in ROLES], [f"/layers.{i}/y"], name=f"sum.{i}")
        )
        x = f"/layers.{i}/y"
    inner = helper.make_graph(
        [helper.make_node("MatMul", [x, "inner.weight"], ["inner_y"], name="inner")],
        "then",
        [],
        [helper.make_tensor_value_info("inner_y", TensorProto.FLOAT, ["t", 8])],
        [numpy_helper.from_array(np.eye(8, dtype=np.float32), "inner.weight")],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", [x], ["other_y"], name="other")],
        "else",
        [],
        [helper.make_tensor_value_info("other_y", TensorProto.FLOAT, ["t", 8])],
    )
    nodes.append(helper.make_node("If", ["flag"], ["picked"], name="choose", then_branch=inner, else_branch=other))
    nodes.append(helper.make_node("Twice", ["picked"], ["y"], name="twice", domain="local"))
    function = helper.make_function(
        "local", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"], name="add")],
        [helper.make_opsetid("", 18)],
    )  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "stack",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", 8]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["t", 8])],
        weights,
    )
    model = helper.make_model(
        graph,
        functions=[function],
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("local", 1)],
        ir_version=8,
    )
    onnx.checker.check_model(model)
    return model


def node(model: ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def prune_all(model: ModelProto) -> None:
    """Layers prune their input; q and k in front of the linear layer, v in one fused node."""
    for i in reversed(range(LAYERS)):
        x = node(model, f"/layers.{i}/q_proj/MatMul").input[0]
        for role in ("q", "k"):
            node(model, f"/layers.{i}/{role}_proj/MatMul").input[0] = f"/layers.{i}/pruned"
        fused = node(model, f"/layers.{i}/v_proj/MatMul")
        fused.op_type, fused.domain = "NMMatMul", "ai.nmonnx"
        fused.attribute.extend([helper.make_attribute("keep", 2), helper.make_attribute("group", 4)])
        prune = helper.make_node(
            "NMPrune", [x], [f"/layers.{i}/pruned"], f"/layers.{i}/NMPrune", domain="ai.nmonnx", keep=2, group=4
        )
        model.graph.node.insert(0, prune)
    model.opset_import.append(helper.make_opsetid("ai.nmonnx", 1))


def write(folder: Path, name: str, model: ModelProto, external: bool = False) -> Path:
    path = folder / name
    onnx.save(model, path, save_as_external_data=external, location=f"{name}.data", size_threshold=0)
    return path


def changed(tmp_path: Path, change: Callable[[ModelProto], object]) -> list:
    before, after = stack(), stack()
    change(after)
    return diff(write(tmp_path, "a.onnx", before), write(tmp_path, "b.onnx", after))


def set_value(message, field: str, value) -> None:
    setattr(message, field, value)


def then_branch(model: ModelProto) -> onnx.GraphProto:
    return next(a.g for a in node(model, "choose").attribute if a.name == "then_branch")


def flip(tensor: TensorProto) -> None:
    raw = bytearray(tensor.raw_data)
    raw[-1] ^= 1
    tensor.raw_data = bytes(raw)


Q1 = "/layers.1/q_proj/MatMul"
CHANGES = {
    "an IR version": (lambda m: set_value(m, "ir_version", 9), ("field", "changed", "", "ir_version")),
    "a producer": (lambda m: set_value(m, "producer_name", "p"), ("field", "changed", "", "producer_name")),
    "an opset version": (lambda m: set_value(m.opset_import[0], "version", 19), ("opset", "changed", "", "ai.onnx")),
    "an added opset": (lambda m: m.opset_import.add(domain="d", version=1), ("opset", "added", "", "d")),
    "added metadata": (lambda m: m.metadata_props.add(key="k", value="v"), ("metadata", "added", "", "model")),
    "an input's shape": (
        lambda m: set_value(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 4),
        ("value", "changed", "", "x"),
    ),
    "an output's type": (
        lambda m: set_value(m.graph.output[0].type.tensor_type, "elem_type", TensorProto.FLOAT16),
        ("value", "changed", "", "y"),
    ),
    "an added value info": (
        lambda m: m.graph.value_info.add(name="picked"),
        ("value", "added", "", "picked"),
    ),
    "an inserted node": (
        lambda m: m.graph.node.insert(0, helper.make_node("Relu", ["x"], ["r"], name="relu")),
        ("node", "added", "", "relu"),
    ),
    "a removed node": (lambda m: m.graph.node.remove(node(m, Q1)), ("node", "removed", "", Q1)),
    "another op": (lambda m: set_value(node(m, "sum.1"), "op_type", "Mean"), ("node", "changed", "", "sum.1")),
    "a rewired input": (lambda m: node(m, Q1).input.__setitem__(0, "x"), ("wire", "changed", "", Q1)),
    "a renamed output": (lambda m: node(m, Q1).output.__setitem__(0, "r"), ("wire", "changed", "", Q1)),
    "a renamed node": (lambda m: set_value(node(m, Q1), "name", "r"), ("attribute", "changed", "", "r")),
    "an added attribute": (
        lambda m: node(m, "sum.1").attribute.append(helper.make_attribute("alpha", 0.5)),
        ("attribute", "added", "", "sum.1"),
    ),
    "a flipped weight bit": (
        lambda m: flip(m.graph.initializer[4]),
        ("initializer", "changed", "", "/layers.1/k_proj.weight"),
    ),
    "an added initializer": (
        lambda m: m.graph.initializer.append(numpy_helper.from_array(np.zeros(2), "z")),
        ("initializer", "added", "", "z"),
    ),
    "a removed initializer": (
        lambda m: m.graph.initializer.pop(),
        ("initializer", "removed", "", "/layers.2/v_proj.weight"),
    ),
    "a weight in a subgraph": (
        lambda m: flip(then_branch(m).initializer[0]),
        ("initializer", "changed", "choose.then_branch", "inner.weight"),
    ),
    "a node in a subgraph": (
        lambda m: set_value(then_branch(m).node[0], "op_type", "Mul"),
        ("node", "changed", "choose.then_branch", "inner"),
    ),
    "a node in a function": (
        lambda m: set_value(m.functions[0].node[0], "op_type", "Mul"),
        ("node", "changed", "function:Twice", "add"),
    ),
    "a removed function": (lambda m: m.functions.pop(), ("function", "removed", "", "local::Twice")),
    "a function's doc string": (
        lambda m: set_value(m.functions[0], "doc_string", "d"),
        ("field", "changed", "function:Twice", "function doc_string"),
    ),
    "a function's metadata": (
        lambda m: m.functions[0].metadata_props.add(key="k", value="v"),
        ("metadata", "added", "function:Twice", "local::Twice"),
    ),
    "a function's value info": (
        lambda m: m.functions[0].value_info.add(name="b"),
        ("value", "added", "function:Twice", "b"),
    ),
    "the overload that a node calls": (
        lambda m: set_value(node(m, "twice"), "overload", "other"),
        ("node", "changed", "", "twice"),
    ),
    "a node's device": (
        lambda m: node(m, Q1).device_configurations.add(configuration_id="c"),
        ("attribute", "changed", "", Q1),
    ),
    "an input's doc string": (
        lambda m: set_value(m.graph.input[0], "doc_string", "d"),
        ("field", "changed", "", "doc_string of input x"),
    ),
    "an input's metadata": (
        lambda m: m.graph.input[0].metadata_props.add(key="k", value="v"),
        ("metadata", "added", "", "x"),
    ),
    "an input's denotation": (
        lambda m: set_value(m.graph.input[0].type, "denotation", "IMAGE"),
        ("value", "changed", "", "x"),
    ),
    "a dimension's denotation": (
        lambda m: set_value(m.graph.input[0].type.tensor_type.shape.dim[0], "denotation", "DATA_BATCH"),
        ("value", "changed", "", "x"),
    ),
    "an initializer's doc string": (
        lambda m: set_value(m.graph.initializer[0], "doc_string", "d"),
        ("field", "changed", "", "doc_string of initializer /layers.0/q_proj.weight"),
    ),
    "an initializer's metadata": (
        lambda m: m.graph.initializer[0].metadata_props.add(key="k", value="v"),
        ("metadata", "added", "", "/layers.0/q_proj.weight"),
    ),
    "training info": (
        lambda m: set_value(m.training_info.add().algorithm, "name", "sgd"),
        ("field", "changed", "", "training_info"),
    ),
    "a quantisation annotation": (
        lambda m: m.graph.quantization_annotation.add(tensor_name="x"),
        ("field", "changed", "", "graph quantization_annotation"),
    ),
    "the order of the inputs": (
        lambda m: m.graph.input.append(m.graph.input.pop(0)),
        ("field", "changed", "", "graph input order"),
    ),
    "a function's signature": (
        lambda m: m.functions[0].attribute.append("k"),
        ("function", "changed", "", "local::Twice"),
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_one_change_is_one_edit(case, tmp_path):
    if case == "a node's device" and not hasattr(onnx.NodeProto(), "device_configurations"):
        pytest.skip(f"onnx {onnx.__version__} knows no devices")
    change, expected = CHANGES[case]
    edits = changed(tmp_path, change)
    assert [(e.kind, e.change, e.scope, e.name) for e in edits] == [expected]


def test_the_shape_that_a_sparse_initializer_spans_is_compared():
    def with_sparse(width: int) -> ModelProto:
        proto = stack()
        values = numpy_helper.from_array(np.ones(2, np.float32), "s")
        indices = numpy_helper.from_array(np.array([0, 3]), "s_indices")
        proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [width]))
        return proto

    reader = TensorReader(Path("unused"))
    (edit,) = Comparison(reader, reader).models(with_sparse(8), with_sparse(9))
    assert (edit.kind, edit.name) == ("initializer", "s") and edit.before != edit.after


def test_functions_that_share_a_name_have_scopes_of_their_own():
    """As `Model.scopes` names them; what nmonnx adds changes no path."""
    body = helper.make_function("d", "F", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], [])
    protos = []
    for domain, name, overload in (("d", "F", ""), ("d", "F", "o"), ("e", "F", ""), ("d", "NMPrune", "")):
        proto = onnx.FunctionProto()
        proto.CopyFrom(body)
        proto.domain, proto.name, proto.overload = domain, name, overload
        protos.append(proto)
    added = helper.make_function("ai.nmonnx", "NMPrune", ["a"], ["b"], [], [])
    assert function_paths([*protos, added]) == {
        "d::F": "function:d:F",
        "d::F:o": "function:d:F:o",
        "e::F": "function:e:F",
        "d::NMPrune": "function:NMPrune",
        "ai.nmonnx::NMPrune": "function:ai.nmonnx:NMPrune",
    }


def test_moving_a_node_is_one_edit_whatever_it_jumps_over(tmp_path):
    def move(model):
        moved = onnx.NodeProto()
        moved.CopyFrom(model.graph.node[1])
        del model.graph.node[1]
        model.graph.node.insert(7, moved)

    (edit,) = changed(tmp_path, move)
    assert (edit.kind, edit.name, edit.before, edit.after) == ("order", "/layers.0/k_proj/MatMul", "1", "7")


def test_a_model_does_not_differ_from_itself_however_its_weights_are_stored(tmp_path):
    inline = write(tmp_path, "inline.onnx", stack())
    outside = write(tmp_path, "outside.onnx", stack(), external=True)
    assert diff(inline, outside) == [] and to_text([]) == "no difference"


def test_zoo_models_do_not_differ_from_themselves(shared):
    for path in sorted((shared / "zoo").glob("*/*.onnx"))[::4]:
        assert diff(path, path) == [], path


def test_a_conversion_is_told_as_what_was_done_to_each_kind_of_layer(tmp_path):
    assert to_text(changed(tmp_path, prune_all)).splitlines() == [
        "+ 1: opset 1 (ai.nmonnx)",
        "+ 3 layers x 1: node NMPrune 2:4 (/layers.{0..2}/NMPrune)",
        "~ 2: input 0 of MatMul: x -> /layers.0/pruned (/layers.0/{q,k}_proj/MatMul)",
        "~ 3 layers x 1: node MatMul -> NMMatMul 2:4 (/layers.{0..2}/v_proj/MatMul)",
        "~ 2 layers x 2: input 0 of MatMul: /layers.{0,1}/y -> /layers.{1,2}/pruned (/layers.{1,2}/{q,k}_proj/MatMul)",
    ]


def test_metadata_that_a_new_op_brings_is_part_of_it_and_metadata_that_is_lost_is_told():
    def change(model):
        replaced = node(model, "sum.1")
        replaced.op_type = "Mean"
        del replaced.metadata_props[:]
        replaced.metadata_props.add(key="new", value="1")

    before, after = stack(), stack()
    node(before, "sum.1").metadata_props.add(key="scope", value="1")
    change(after)
    reader = TensorReader(Path("unused"))
    edits = list(Comparison(reader, reader).models(before, after))
    assert [(e.kind, e.change, e.name) for e in edits] == [
        ("node", "changed", "sum.1"),
        ("metadata", "removed", "sum.1"),
    ]


def test_every_edit_is_in_exactly_one_fold(tmp_path):
    edits = changed(tmp_path, prune_all)
    folded = [edit for group in fold(edits) for edit in group.edits]
    assert len(folded) == len(edits) and set(folded) == set(edits)


def test_names_that_differ_in_one_part_share_a_line_and_different_patterns_do_not():
    edits = [
        NodeEdit("", f"/model/layers.{i}/{part}_proj/MatMul", "MatMul", f"NMMatMul {keep}:16")
        for i in range(30)
        for part, keep in (("attn/q", 8), ("attn/o", 8), ("mlp/up", 8), ("mlp/down", 4))
    ]
    assert to_text(edits).splitlines() == [
        "~ 30 layers x 3: node MatMul -> NMMatMul 8:16 (/model/layers.{0..29}/attn/{q,o}_proj/MatMul,"
        " /model/layers.{0..29}/mlp/up_proj/MatMul)",
        "~ 30 layers x 1: node MatMul -> NMMatMul 4:16 (/model/layers.{0..29}/mlp/down_proj/MatMul)",
    ]


def test_wires_that_cross_between_layers_are_not_told_as_straight_ones():
    def wire(i, j):
        return RewireEdit("", f"layers.{i}", f"x.{i}", f"pruned.{j}", "MatMul", "input 0")

    straight = to_text([wire(i, i) for i in range(4)])
    crossed = to_text([wire(i, (i + 1) % 4) for i in range(4)])
    assert straight == "~ 4 layers x 1: input 0 of MatMul: x.{0..3} -> pruned.{0..3} (layers.{0..3})"
    assert crossed == "~ 4 layers x 1: input 0 of MatMul: x.{0..3} -> pruned.{0..3} in another order (layers.{0..3})"


def test_digests_do_not_keep_changed_weights_apart():
    edits = [TensorEdit("", f"w.{i}", "FLOAT[8, 8]", "FLOAT[8, 8]", f"{i}", f"{i + 100}") for i in range(5)]
    assert to_text(edits) == "~ 5 layers x 1: initializer FLOAT[8, 8]: other bytes (w.{0..4})"


def test_json_carries_schema_versions_digests_of_both_files_and_every_edit(tmp_path):
    edits = changed(tmp_path, prune_all)
    a, b = tmp_path / "a.onnx", tmp_path / "b.onnx"
    document = json.loads(to_json(edits, a, b))
    assert document["schema_version"] == 1 and document["versions"]["onnx"] == onnx.__version__
    digests = [entry["sha256"] for entry in document["inputs"]]
    assert digests == [_sha256sum(a), _sha256sum(b)] and digests[0] != digests[1]
    assert len(document["edits"]) == len(edits) and not document["identical"]
    assert sum(f["count"] for f in document["folds"]) == len(edits)


def _sha256sum(path: Path) -> str:
    return os.popen(f"sha256sum '{path}'").read().split()[0]


def test_weights_at_the_same_place_of_the_same_file_are_not_read(tmp_path, monkeypatch):
    a = write(tmp_path, "a.onnx", stack(), external=True)
    b = tmp_path / "b.onnx"
    shutil.copyfile(a, b)
    monkeypatch.setattr("nmonnx.diff.weights.pieces", lambda *_: pytest.fail("weights were read"))
    assert diff(a, b) == []


def test_weights_in_another_folder_are_compared_by_their_bytes(tmp_path):
    (tmp_path / "other").mkdir()
    a, b = stack(), stack()
    flip(b.graph.initializer[0])
    edits = diff(write(tmp_path, "m.onnx", a, external=True), write(tmp_path / "other", "m.onnx", b, external=True))
    assert [(e.kind, e.name) for e in edits] == [("initializer", "/layers.0/q_proj.weight")]


def test_weights_are_compared_in_pieces_wherever_they_lie(tmp_path, monkeypatch):
    monkeypatch.setattr("nmonnx.diff.weights._PIECE", 100)
    path = write(tmp_path, "m.onnx", stack(), external=True)
    reader = TensorReader(path)
    outside = onnx.load(path, load_external_data=False).graph.initializer[0]
    inside, other = stack().graph.initializer[0], stack().graph.initializer[0]
    flip(other)
    assert same_values(outside, reader, inside, reader) and not same_values(outside, reader, other, reader)


def test_a_missing_weight_file_is_said_in_one_sentence(tmp_path):
    path = write(tmp_path, "m.onnx", stack(), external=True)
    copy = tmp_path / "sub" / "m.onnx"
    copy.parent.mkdir()
    shutil.copyfile(path, copy)
    with pytest.raises(InputError, match=r"m\.onnx\.data.*is missing; copy it beside the model"):
        diff(path, copy)
