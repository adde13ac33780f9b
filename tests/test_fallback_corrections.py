"""The fallback functions with `variance` and `center`, and models in which only some nodes ask for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from small_models import mlp, write

from nmonnx import reference
from nmonnx.library import make_session
from nmonnx.onnx_file.graph import Model, load
from nmonnx.onnx_file.save import save
from nmonnx.passes import EmitFunctions, FuseMatMul, InsertPrune
from nmonnx.passes.bodies import Body, matmul_function, prune_function
from nmonnx.pattern import Pattern
from nmonnx.pruning.treatment import Treatment
from nmonnx.sites import find_sites

ORDER = {
    "NMPrune": ("x", "scale", "shift", "order", "dense"),
    "NMMatMul": ("x", "W", "bias", "scale", "shift", "order", "row_sum", "dense"),
}
FLOATS = ("scale", "shift", "row_sum")
OTHER = {name: TensorProto.FLOAT for name in FLOATS} | {"order": TensorProto.INT64, "dense": TensorProto.BOOL}
RANKS = {"x": 3, "W": 2}
STEP = {np.float16: 2.0**-10, np.float32: 2.0**-22, np.float64: 2.0**-22}
NASTY = [0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 6e4, 2.0]
CHOICES = (None, "mean", "median")
CORRECTIONS = [
    {"variance": True},
    {"center": "mean"},
    {"center": "median"},
    {"variance": True, "center": "mean"},
    {"variance": True, "center": "median"},
]


def run(
    op: str, opset: int, feeds: dict[str, np.ndarray], ends: tuple[str, ...] = ("y",), **attributes: int
) -> np.ndarray:
    """The last output of one op as a fallback function that can do what its node asks for, or more."""
    names = [name if name in feeds else "" for name in ORDER[op]]
    while not names[-1]:
        names.pop()
    channels, group = feeds["x"].shape[-1], attributes["group"]
    body = Body(
        opset,
        (attributes["keep"], group),
        tail=channels % group != 0,
        criterion=frozenset(feeds) & {"scale", "shift", "order"},
        bias="bias" in feeds,
        variance="variance" in attributes,
        center="center" in attributes,
        dense="dense" in feeds,
        ends=len(ends),
    )
    function = onnx.parser.parse_function({"NMPrune": prune_function, "NMMatMul": matmul_function}[op](body))
    elem = helper.np_dtype_to_tensor_dtype(feeds["x"].dtype)
    graph = helper.make_graph(
        [helper.make_node(op, names, ends, domain="ai.nmonnx", **attributes)],
        "g",
        [
            helper.make_tensor_value_info(name, OTHER.get(name, elem), [f"{name}{i}" for i in range(feeds[name].ndim)])
            for name in names
            if name
        ],
        [helper.make_tensor_value_info(e, elem, [f"{e}{i}" for i in range(feeds["x"].ndim)]) for e in ends],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("ai.nmonnx", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8, functions=[function])
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        None, feeds
    )[-1]


def as_attributes(correction: dict) -> dict[str, int]:
    """With a body that can do either, or without a center where only the variance is asked for."""
    variance = {"variance": int(correction.get("variance", False))}
    return (
        variance if correction == {"variance": True} else variance | {"center": CHOICES.index(correction.get("center"))}
    )


def row_sum_of(w: np.ndarray) -> np.ndarray:
    return w.astype(np.float32).sum(axis=0)


def nasty(rng: np.random.Generator, shape: tuple[int, ...], kind: type) -> np.ndarray:
    x = rng.standard_normal(shape).astype(kind)
    if rng.random() < 0.5:
        x.reshape(-1)[rng.integers(0, x.size, 3)] = rng.choice(np.array(NASTY, kind), 3)
    return x


@settings(max_examples=60, deadline=None)
@given(names=st.sets(st.sampled_from(["scale", "shift", "order", "dense"])), data=st.data())
def test_any_prune_equals_the_reference(names: set[str], data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    keep, group = data.draw(st.sampled_from([(2, 4), (8, 16), (1, 1), (5, 12)]))
    kind = data.draw(st.sampled_from([np.float32, np.float16] + [np.float64] * (not names)))
    x = nasty(rng, (2, 3, data.draw(st.integers(1, 70))), kind)
    given_ = {
        "scale": rng.random(x.shape[-1]).astype(np.float32),
        "shift": rng.standard_normal(x.shape[-1]).astype(np.float32),
        "order": rng.permutation(x.shape[-1]),
        "dense": rng.random(data.draw(st.sampled_from([1, 6]))) < 0.5,
    }
    given_ = {name: given_[name] for name in names}
    correction = data.draw(st.sampled_from([{}, *CORRECTIONS]))
    opset = data.draw(st.sampled_from([15, 17, 18, 21, 23]))
    got = run("NMPrune", opset, {"x": x, **given_}, keep=keep, group=group, **as_attributes(correction))
    want = reference.prune(x, keep, group, **given_, **correction)
    assert got.dtype == x.dtype
    if not correction:
        np.testing.assert_array_equal(np.signbit(got), np.signbit(want))
    np.testing.assert_allclose(got, want, rtol=STEP[kind] if correction else 0, atol=1e-7 if correction else 0)


@pytest.mark.parametrize("dense", [None, (True, False, False, True, False, True)], ids=["pruned", "some dense"])
@pytest.mark.parametrize("correction", [{}, *CORRECTIONS], ids=str)
@pytest.mark.parametrize("kind", [np.float32, np.float16], ids=lambda k: k.__name__)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("opset", [15, 18, 22])
def test_matmul_equals_the_reference_up_to_rounding(
    opset: int, bias: bool, kind: type, correction: dict, dense: tuple[bool, ...] | None
) -> None:
    rng = np.random.default_rng(opset)
    x, w, b = (rng.standard_normal(s).astype(kind) for s in ((2, 3, 40), (40, 24), (24,)))
    attributes, row_sum = as_attributes(correction), row_sum_of(w)
    feeds = {"x": x, "W": w} | ({"bias": b} if bias else {}) | ({"row_sum": row_sum} if "center" in attributes else {})
    tokens = None if dense is None else np.array(dense)
    feeds |= {} if tokens is None else {"dense": tokens}
    got = run("NMMatMul", opset, feeds, keep=8, group=16, **attributes)
    want = reference.prune_matmul(x, w, 8, 16, b if bias else None, row_sum=row_sum, **correction, dense=tokens)
    assert got.dtype == kind
    limit = 2e-2 if kind == np.float16 else 1e-5
    np.testing.assert_allclose(got, want, rtol=limit, atol=limit)


@pytest.mark.parametrize("correction", [{}, *CORRECTIONS], ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 16), (2, 0, 16), (16,), (5, 16), (2, 3, 1)], ids=str)
def test_any_rank_one_channel_and_no_tokens_are_legal(shape: tuple[int, ...], correction: dict) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    tokens = x[..., 0].size
    for given_ in ({}, {"dense": np.ones(1, bool)}, {"dense": np.arange(tokens) % 2 == 0}):
        got = run("NMPrune", 17, {"x": x, **given_}, keep=2, group=4, **as_attributes(correction))
        want = reference.prune(x, 2, 4, **correction, **given_)
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-6)
    w = np.random.default_rng(1).standard_normal((shape[-1], 5)).astype(np.float32)
    if len(shape) > 1:
        attributes, row_sum = as_attributes(correction), row_sum_of(w)
        feeds = {"x": x, "W": w} | ({"row_sum": row_sum} if "center" in attributes else {})
        want = reference.prune_matmul(x, w, 2, 4, row_sum=row_sum, **correction)
        np.testing.assert_allclose(
            run("NMMatMul", 17, feeds, keep=2, group=4, **attributes), want, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", [np.float32, np.float16], ids=lambda k: k.__name__)
@pytest.mark.parametrize("center", ["mean", "median"])
@pytest.mark.parametrize("shape", [(2, 3, 17), (17,), (0, 16)], ids=str)
def test_the_second_output_is_the_center(shape: tuple[int, ...], center: str, kind: type) -> None:
    x = (np.random.default_rng(2).standard_normal(shape) + 1).astype(kind)
    attributes = {"keep": 2, "group": 4, "variance": 1, "center": CHOICES.index(center)}
    got = run("NMPrune", 18, {"x": x}, ends=("y", "c"), **attributes)
    want = reference.center_of(x, center).astype(kind)
    assert got.shape == want.shape and got.dtype == kind
    np.testing.assert_array_equal(got, want)


def test_an_opset_that_is_too_old_is_refused_with_the_reason() -> None:
    reason = "opset 14 cannot correct the variance in a fallback function; 15 can"
    assert Body(14, (2, 4), variance=True).refusal(1) == reason
    assert Body(15, (2, 4), variance=True, center=True, dense=True).refusal(1) == ""
    assert Body(14, (2, 4), dense=True).refusal(1) == "opset 14 cannot keep tokens dense in a fallback function; 15 can"
    assert "cannot correct the variance and center in" in Body(13, (2, 4), variance=True, center=True).refusal(1)


@pytest.mark.parametrize("kernel", ["prune", "fused"])
@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
def test_where_one_node_is_corrected_the_others_stay_as_they_are(tmp_path: Path, kernel: str, correction: dict) -> None:
    """The first layer of two; with the library and without."""
    model = load(write(mlp(32, 48), tmp_path / "in.onnx"))
    sites = find_sites(model).sites
    InsertPrune({site.name: Treatment(Pattern(2, 4)) for site in sites}).apply(model, sites)
    first = next(node for node in model.graph.nodes if node.op == "NMPrune" and node.inputs[0].name == "x")
    first.attrs.update({name: value for name, value in as_attributes(correction).items() if value})
    up, down = (onnx.numpy_helper.to_array(t) for t in mlp(32, 48).graph.initializer)
    if "center" in correction and kernel == "prune":
        _add_rank_one(model, first, row_sum_of(up))
    FuseMatMul(kernel).apply(model, sites)
    if "center" in correction and kernel == "fused":
        fused = next(node for node in model.graph.nodes if node.op == "NMMatMul" and node.inputs[0].name == "x")
        model.constants["row_sum"] = row_sum_of(up)
        fused.inputs += [gs.Variable.empty() for _ in range(6 - len(fused.inputs))] + [gs.Variable("row_sum")]
    EmitFunctions().apply(model, sites)
    save(model, tmp_path / "out.onnx")
    x = np.random.default_rng(0).standard_normal((2, 3, 32)).astype(np.float32)
    hidden = reference.prune_matmul(x, up, 2, 4, row_sum=row_sum_of(up), **correction)
    hidden = np.maximum(hidden, 0).astype(np.float32)
    want = reference.prune_matmul(hidden, down, 2, 4)
    for library in (True, False):
        got = make_session(tmp_path / "out.onnx", library=library).run(None, {"x": x})[0]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def _add_rank_one(model: Model, prune: gs.Node, row_sum: np.ndarray) -> None:
    """y + center * row_sum behind the layer that reads the prune."""
    center, part, product = (gs.Variable(name) for name in ("the_center", "rank_one", "pruned_product"))
    prune.outputs.append(center)
    layer = prune.outputs[0].outputs[0]
    y = layer.outputs[0]
    layer.outputs[0] = product
    model.constants["row_sum"] = row_sum
    model.graph.nodes += [
        gs.Node("Mul", "rank_one", inputs=[center, gs.Variable("row_sum")], outputs=[part]),
        gs.Node("Add", "add_rank_one", inputs=[product, part], outputs=[y]),
    ]
