"""Validation raises no false alarm, passes no limit that it could not measure, and runs the fallback functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from small_models import mlp, model, weights, write

from nmonnx.convert import convert
from nmonnx.errors import RunError, UsageError
from nmonnx.pattern import Pattern
from nmonnx.pruning.recipe import Recipe
from nmonnx.validate import Report, Thresholds, validate

PRUNED = "each pruned layer has one op of its pattern"
NODES = "other nodes are unchanged"
AROUND = "the model around the graph is unchanged"
FUSED = "fused layers equal the reference up to rounding"
FALLBACK = "fallback functions compute what the reference does"


def failed(report: Report) -> list[str]:
    return [check.name for check in report.checks if not check.passed]


def check(report: Report, name: str):
    return next(c for c in report.checks if c.name == name)


def converted(proto: ModelProto, folder: Path, kernel: str = "fused", n: int = 2) -> tuple[Path, Path]:
    original = write(proto, folder / "m.onnx")
    convert(original, folder / "c.onnx", Recipe(Pattern(n, 4), kernel=kernel))
    return original, folder / "c.onnx"


def tampered(pair: tuple[Path, Path], change: Callable[[ModelProto], object]) -> Report:
    proto = onnx.load(pair[1])
    change(proto)
    return validate(pair[0], write(proto, pair[1].with_name("t.onnx")))


def body(proto: ModelProto, op: str) -> onnx.FunctionProto:
    return next(f for f in proto.functions if f.name == op)


ALL = Thresholds(1e9, 1e9, 1e9, -1e9, -1, 1e9, 0, 0, 0, 1e9, 0)


def test_a_limit_on_what_the_model_does_not_have_is_a_failed_check(tmp_path):
    report = validate(*converted(mlp(), tmp_path), thresholds=ALL)
    assert failed(report) == ["kl", "top1", "top5", "greedy continuation is equal", "perplexity ratio"]
    assert check(report, "kl").detail == "not measured: no output holds logits"
    assert math.isnan(check(report, "kl").value) and check(report, "kl").limit == 1e9


def test_no_limit_is_met_when_the_original_does_not_run_or_the_converted_model_does_not(tmp_path):
    def unknown(proto: ModelProto) -> ModelProto:
        next(n for n in proto.graph.node if n.op_type == "Relu").op_type = "Nobody"
        return proto

    pair = converted(mlp(), tmp_path)
    limits = Thresholds(max_abs=1e9, kept_energy=0)
    write(unknown(onnx.load(pair[1])), tmp_path / "t.onnx")
    broken = validate(pair[0], tmp_path / "t.onnx", thresholds=limits)
    assert {"max_abs", "kept energy of a layer's input"} < set(failed(broken))
    assert check(broken, "max_abs").detail == "not measured: the converted model does not run"
    foreign = mlp()
    next(n for n in foreign.graph.node if n.op_type == "Relu").domain = "com.nobody"
    foreign.opset_import.append(helper.make_opsetid("com.nobody", 1))
    report = validate(*converted(foreign, tmp_path / "..", "prune"), thresholds=limits)
    assert failed(report) == ["max_abs", "kept energy of a layer's input"]
    assert check(report, "max_abs").detail == "not measured: the original does not run"


def test_no_limit_is_met_by_outputs_without_a_value(tmp_path):
    feeds = [{"x": np.zeros((1, 0, 32), np.float32)}]
    report = validate(*converted(mlp(), tmp_path), feeds, thresholds=Thresholds(max_abs=1, kept_energy=0.1))
    assert failed(report) == ["max_abs", "kept energy of a layer's input"]


def test_a_limit_on_kept_energy_fails_when_some_layers_could_not_be_measured(tmp_path):
    """A linear layer in a branch beside one in the main graph."""
    proto = mlp()
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["a", "down"], ["inner"], "inner")],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, ["b", "t", 32])],
    )
    proto.graph.node[-1].CopyFrom(helper.make_node("If", ["flag"], ["y"], "if", then_branch=branch, else_branch=branch))
    for attribute, name in zip(proto.graph.node[-1].attribute, ("then", "else"), strict=True):
        attribute.g.node[0].name = attribute.g.node[0].output[0] = attribute.g.output[0].name = name
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    report = validate(*converted(proto, tmp_path, "prune"), thresholds=Thresholds(kept_energy=0.1))
    assert failed(report) == ["kept energy of a layer's input"]
    last = [c for c in report.checks if not c.passed][-1]
    assert "not measured in 2 layers" in last.detail and "subgraph" in last.detail


def test_nan_is_no_limit():
    with pytest.raises(UsageError, match="limit of max_abs is NaN"):
        Thresholds(max_abs=math.nan)


def test_a_bias_that_a_cast_makes_is_read_from_the_run(tmp_path):
    proto = model(
        """g (float[t, 32] x) => (float[t, 48] y) {
            w = Cast <to = 1> (w16)
            b = Cast <to = 1> (b16)
            y = Gemm(x, w, b)
        }""",
        w16=weights(32, 48, dtype=np.float16),
        b16=100 * weights(48, seed=1, dtype=np.float16),
    )
    pair = converted(proto, tmp_path)
    report = validate(*pair)
    assert report.passed, failed(report)
    assert check(report, FUSED).value == 1

    def lose_bias(m: ModelProto) -> None:
        op = next(n for n in m.graph.node if n.op_type == "NMMatMul")
        del op.input[2:]
        del m.functions[:]

    assert PRUNED in failed(tampered(pair, lose_bias))


@pytest.mark.parametrize("addend", ["x", "c"])
def test_what_a_layer_only_adds_is_not_pruned_and_must_not_be(addend, tmp_path):
    """An activation that is both factor and addend: as it is, and behind another node."""
    proto = model(
        f"""g (float[t, 32] x) => (float[t, 32] y, float[t, 32] z) {{
            c = Relu(x)
            y = Gemm(x, w, {addend})
            z = Relu(x)
        }}""",
        w=weights(32, 32),
    )
    pair = converted(proto, tmp_path, "prune")
    report = validate(*pair)
    assert report.passed, failed(report)

    def prune_addend(m: ModelProto) -> None:
        gemm = next(n for n in m.graph.node if n.op_type == "Gemm")
        reader, slot = (gemm, 2) if addend == "x" else (next(n for n in m.graph.node if n.output[0] == "c"), 0)
        reader.input[slot] = gemm.input[0]
        made = next(n for n in m.graph.node if gemm.input[0] in n.output)
        first = onnx.NodeProto()
        first.CopyFrom(made)
        m.graph.node.remove(made)
        m.graph.node.insert(0, first)

    assert NODES in failed(tampered(pair, prune_addend))


@pytest.mark.parametrize("kernel", ["prune", "fused"])
def test_values_that_overflow_in_the_original_raise_no_alarm_and_no_warning(kernel, tmp_path, recwarn):
    pair = converted(mlp(k=64), tmp_path, kernel)
    rows = np.full((1, 4, 64), 3e38, np.float32)
    rows[0, 1] *= -1
    rows[0, 2, ::2] = 1e38
    report = validate(*pair, feeds=[{"x": rows}, {"x": np.full((1, 2, 64), 1e37, np.float32)}])
    assert report.passed, failed(report)
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def functions_of_one_name(overloads: bool) -> ModelProto:
    """Two functions that share a name, in two domains or as overloads, called one after the other."""
    opset, ir = (21, 10) if overloads else (17, 8)
    names = [("a", "one"), ("a", "two")] if overloads else [("a", ""), ("b", "")]
    functions, nodes = [], []
    for i, (domain, overload) in enumerate(names):
        weight = numpy_helper.from_array(weights(32, 32, seed=i))
        lines = [
            helper.make_node("Constant", [], ["w"], value=weight),
            helper.make_node("MatMul", ["x", "w"], ["y"], name=f"mm{i}"),
        ]
        imports = [helper.make_opsetid("", opset)]
        function = helper.make_function(domain, "Lin", ["x"], ["y"], lines, imports)
        node = helper.make_node("Lin", ["xhy"[i]], ["xhy"[i + 1]], f"call{i}", domain=domain)
        if overload:
            function.overload = node.overload = overload
        functions.append(function)
        nodes.append(node)
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["t", 32]) for name in "xy"]
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in sorted({d for d, _ in names}))]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:])
    return helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=ir)


@pytest.mark.parametrize("overloads", [False, True])
def test_layers_in_functions_of_one_name_are_told_apart(overloads, tmp_path):
    report = validate(*converted(functions_of_one_name(overloads), tmp_path, "prune"))
    assert report.passed, failed(report)
    assert check(report, PRUNED).value == 2


CASES = {
    "float": (mlp(), "prune"),
    "a tail": (mlp(k=34, hidden=50), "fused"),
    "an old opset": (mlp(opset=11, ir=6), "fused"),
    "half": (
        model("h (float16[t, 32] x) => (float16[t, 8] y) { y = MatMul(x, w) }", w=weights(32, 8, dtype=np.float16)),
        "fused",
    ),
    "double": (
        model("d (double[t, 32] x) => (double[t, 8] y) { y = MatMul(x, w) }", w=weights(32, 8, dtype=np.float64)),
        "prune",
    ),
    "a bias": (
        model("b (float[t, 32] x) => (float[t, 8] y) { y = Gemm(x, w, b) }", w=weights(32, 8), b=weights(8)),
        "fused",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_honest_fallback_functions_pass(case, tmp_path):
    proto, kernel = CASES[case]
    report = validate(*converted(proto, tmp_path, kernel))
    assert report.passed, failed(report)
    assert check(report, FALLBACK).value >= 1


def change_node(op: str, **fields: str) -> Callable[[onnx.FunctionProto], None]:
    def change(function: onnx.FunctionProto) -> None:
        node = next(n for n in function.node if n.op_type == op)
        for name, value in fields.items():
            setattr(node, name, value)

    return change


def smallest(function: onnx.FunctionProto) -> None:
    next(n for n in function.node if n.op_type == "TopK").attribute.append(helper.make_attribute("largest", 0))


def dense(function: onnx.FunctionProto) -> None:
    next(n for n in function.node if n.op_type == "ScatterElements").input[0] = "values"


def infinity_first(function: onnx.FunctionProto) -> None:
    node = next(n for n in function.node if n.op_type == "Min")
    node.op_type = "Identity"
    del node.input[1:]


BROKEN = {
    "an unknown op": (change_node("Shrink", op_type="Nobody"), "does not run"),
    "no absolute value": (change_node("Abs", op_type="Identity"), "differs from the reference"),
    "infinity above NaN": (infinity_first, "differs from the reference"),
    "the smallest are kept": (smallest, "differs from the reference"),
    "nothing is dropped": (dense, "differs from the reference"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_fallback_function_that_does_something_else_is_caught(case, tmp_path):
    change, words = BROKEN[case]
    report = tampered(converted(mlp(), tmp_path, "prune"), lambda m: change(body(m, "NMPrune")))
    assert failed(report) == [FALLBACK] and words in check(report, FALLBACK).detail


def test_a_function_in_the_domain_of_the_ops_that_no_op_uses_is_a_strange_change(tmp_path):
    def add(proto: ModelProto) -> None:
        copy = proto.functions.add()
        copy.CopyFrom(body(proto, "NMPrune"))
        copy.name = "NMOther"

    assert failed(tampered(converted(mlp(), tmp_path, "prune"), add)) == [AROUND]


def test_a_model_that_fails_while_it_runs_leaves_no_line_of_the_runtime_on_stderr(tmp_path, capfd):
    proto = model(
        "g (int64[t] ids) => (float[t, 8] y) { x = Gather(embed, ids) y = MatMul(x, w) }",
        embed=weights(16, 32),
        w=weights(32, 8),
    )
    pair = converted(proto, tmp_path)
    with pytest.raises(RunError, match="failed on feed 'feed 0'"):
        validate(*pair, feeds=[{"ids": np.array([99])}])
    assert capfd.readouterr().err == ""


def test_a_wide_weight_is_checked_block_by_block_with_its_bias(tmp_path, monkeypatch):
    monkeypatch.setattr("nmonnx.validate.products._BLOCK", 100)
    proto = model(
        "b (float[t, 32] x) => (float[t, 10] y) { y = Gemm(x, w, b) }", w=weights(32, 10), b=100 * weights(10, seed=1)
    )
    pair = converted(proto, tmp_path)
    assert validate(*pair).passed

    def change_last_column(m: ModelProto) -> None:
        stored = next(t for t in m.graph.initializer if t.name == "w")
        values = numpy_helper.to_array(stored).copy()
        values[:, -1] *= 2
        stored.CopyFrom(numpy_helper.from_array(values, "w"))

    assert FUSED in failed(tampered(pair, change_last_column))
