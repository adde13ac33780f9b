"""The fallback functions: what NMPrune and NMMatMul mean, in stock operators, bit for bit, at every opset."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from nmonnx import reference
from nmonnx.passes.bodies import ELEMENTS_OPSET, Body, matmul_function, prune_function

KINDS = (np.float32, np.float16, np.float64)
NASTY = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 6e4, 1e-40, 2.0]


RANKS = {"W": 2, "bias": 1, "scale": 1, "shift": 1, "order": 1}


def session(
    op: str, text: str, opset: int, kind: type, inputs: list[str], keep: int, group: int
) -> ort.InferenceSession:
    node = helper.make_node(op, inputs, ["y"], domain="ai.nmonnx", keep=keep, group=group)
    elem = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    kinds = {"scale": TensorProto.FLOAT, "shift": TensorProto.FLOAT, "order": TensorProto.INT64}
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(i, kinds.get(i, elem), _shape(i)) for i in inputs if i],
        [helper.make_tensor_value_info("y", elem, ["p", "q", "r"])],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("ai.nmonnx", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8, functions=[onnx.parser.parse_function(text)])
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _shape(name: str) -> list[str]:
    return [f"{name}{axis}" for axis in range(RANKS.get(name, 3))]


def nasty(shape: tuple[int, ...], kind: type, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(kind)
    flat = x.reshape(-1)
    spots = rng.integers(0, max(flat.size, 1), flat.size // 2)
    flat[spots] = rng.choice(np.array(NASTY, kind), spots.size)
    return x


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("opset", [9, 10, 11, 12, 13, 14, 15, 17, 18, 19, 20, 21, 22, 23])
def test_prune_equals_the_reference_bit_for_bit(opset, kind):
    for channels in (32, 20):
        if channels == 20 and opset < 10:
            continue
        text = prune_function(Body(opset, (8, 16), tail=channels == 20))
        run = session("NMPrune", text, opset, kind, ["x"], 8, 16)
        shapes = [(2, 5, channels), (1, 1, channels), (7, 1, channels), (0, 3, channels)]
        for seed, shape in enumerate(shapes + [(2, 0, channels)] * (opset >= 14)):
            x = nasty(shape, kind, seed)
            got, want = run.run(None, {"x": x})[0], reference.prune(x, 8, 16)
            if opset < ELEMENTS_OPSET:  # there a kept -0 comes out as +0
                got, want = got + 0, want + 0
            assert got.shape == want.shape
            assert got.tobytes() == want.tobytes()


@settings(max_examples=40, deadline=None)
@given(group=st.sampled_from([1, 2, 3, 4, 7, 8, 16, 32, 64]), channels=st.integers(1, 70), data=st.data())
def test_any_pattern_and_any_tail(group, channels, data):
    keep = data.draw(st.integers(1, group))
    text = prune_function(Body(18, (keep, group), tail=channels % group != 0))
    x = nasty((1, 3, channels), np.float32, data.draw(st.integers(0, 99)))
    got = session("NMPrune", text, 18, np.float32, ["x"], keep, group).run(None, {"x": x})[0]
    assert got.tobytes() == reference.prune(x, keep, group).tobytes()


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("opset", [11, 13, 17, 22])
def test_matmul_equals_the_reference_up_to_rounding(opset, bias):
    rng = np.random.default_rng(opset)
    x, w, b = (rng.standard_normal(s).astype(np.float32) for s in ((2, 3, 32), (32, 24), (24,)))
    text = matmul_function(Body(opset, (8, 16), bias=bias))
    feeds = {"x": x, "W": w} | ({"bias": b} if bias else {})
    got = session("NMMatMul", text, opset, np.float32, list(feeds), 8, 16).run(None, feeds)[0]
    want = reference.prune(x, 8, 16).astype(np.float64) @ w + (b if bias else 0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS[:2], ids=lambda k: k.__name__)
@pytest.mark.parametrize("criterion", ["scale", "shift", "order", "scale order", "scale shift order"])
@pytest.mark.parametrize("channels", [32, 20], ids=["whole groups", "tail"])
def test_prune_with_scale_shift_and_order_equals_the_reference(criterion, kind, channels):
    rng = np.random.default_rng(channels)
    given = {
        "scale": np.abs(rng.standard_normal(channels)).astype(np.float32) * (rng.random(channels) > 0.2),
        "shift": rng.standard_normal(channels).astype(np.float32),
        "order": rng.permutation(channels),
    }
    given = {name: given[name].astype(np.int64 if name == "order" else np.float32) for name in criterion.split()}
    for opset in (15, 18, 23):
        text = prune_function(Body(opset, (8, 16), channels == 20, frozenset(criterion.split())))
        node_inputs = ["x", *(name if name in given else "" for name in ("scale", "shift", "order"))]
        while not node_inputs[-1]:
            node_inputs.pop()
        run = session("NMPrune", text, opset, kind, node_inputs, 8, 16)
        x = nasty((2, 3, channels), kind, opset)
        got, want = run.run(None, {"x": x, **given})[0], reference.prune(x, 8, 16, **given)
        np.testing.assert_array_equal(got, want)
