"""The fallback functions: what NMPrune and NMMatMul mean, in stock operators, bit for bit, at every opset."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from nmonnx import reference
from nmonnx.passes.emit_functions import ELEMENTS_OPSET, matmul_function, prune_function

KINDS = (np.float32, np.float16, np.float64)
NASTY = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 6e4, 1e-40, 2.0]


RANKS = {"W": 2, "bias": 1}


def session(
    op: str, text: str, opset: int, kind: type, inputs: list[str], keep: int, group: int
) -> ort.InferenceSession:
    node = helper.make_node(op, inputs, ["y"], domain="ai.nmonnx", keep=keep, group=group)
    elem = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(i, elem, [f"{i}{axis}" for axis in range(RANKS.get(i, 3))]) for i in inputs],
        [helper.make_tensor_value_info("y", elem, ["p", "q", "r"])],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("ai.nmonnx", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8, functions=[onnx.parser.parse_function(text)])
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


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
        text = prune_function(opset, (8, 16), tail=channels == 20)
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
    text = prune_function(18, (keep, group), tail=channels % group != 0)
    x = nasty((1, 3, channels), np.float32, data.draw(st.integers(0, 99)))
    got = session("NMPrune", text, 18, np.float32, ["x"], keep, group).run(None, {"x": x})[0]
    assert got.tobytes() == reference.prune(x, keep, group).tobytes()


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("opset", [11, 13, 17, 22])
def test_matmul_equals_the_reference_up_to_rounding(opset, bias):
    rng = np.random.default_rng(opset)
    x, w, b = (rng.standard_normal(s).astype(np.float32) for s in ((2, 3, 32), (32, 24), (24,)))
    text = matmul_function(opset, (8, 16), tail=False, bias=bias)
    feeds = {"x": x, "W": w} | ({"bias": b} if bias else {})
    got = session("NMMatMul", text, opset, np.float32, list(feeds), 8, 16).run(None, feeds)[0]
    want = reference.prune(x, 8, 16).astype(np.float64) @ w + (b if bias else 0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
