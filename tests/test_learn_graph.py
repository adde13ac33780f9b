"""The torch interpreter against ONNX Runtime: graphs of every kind of exporter, single operators, gradients."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import pytest
from conftest import SHARED
from small_models import model, weights, write

from nmonnx.errors import UsageError
from nmonnx.feeds import make_feeds, signature
from nmonnx.library import make_session
from nmonnx.onnx_file.graph import load
from nmonnx.sites import find_sites

torch = pytest.importorskip("torch")
from nmonnx.learn import TorchGraph  # noqa: E402

ZOO = SHARED / "zoo"
GRAPHS = (
    *("falcon-dynamo-fp32", "falcon-ts-fp32", "gemma2-dynamo-fp32", "gemma2-optimum-fp32", "gemma3-ts-kv-fp32"),
    *("gpt2-dynamo-fp32", "gpt2-optimum-O2", "gpt2-ts-fp32", "gptneox-optimum-fp32", "llama-dynamo-fp32"),
    *("llama-dynamo-kv-fp32", "llama-dynamo-noopt-fp32", "llama-dynamo-op23-fp32", "llama-genai-fp32"),
    *("llama-genai-int4", "llama-genai-int4-asym", "llama-genai-int4qdq", "llama-genai-int8", "llama-optimum-fp32"),
    *("llama-ortopt-all", "llama-ortq-bnb4", "llama-ortq-q4qdq", "llama-ts-fp16", "llama-ts-fp32", "opt-dynamo-fp32"),
    *("opt-ts-fp32", "phi-ts-fp32", "phi3-dynamo-kv-fp32", "qwen3-dynamo-kv-fp32"),
    *("qwen3moe-optimum-fp32", "gptoss-optimum-fp32", "smollm-genai-fp32", "smollm-genai-fp32-shared"),
)
COARSE = ("fp16", "int4", "int8", "q4qdq")
"""Graphs that ONNX Runtime computes in float16, or with activations rounded to 8 bits."""


@pytest.mark.parametrize("name", GRAPHS)
def test_logits_equal_onnx_runtime(name):
    path = ZOO / name / "model.onnx"
    if not path.exists():
        pytest.skip("the zoo is not here")
    session = make_session(path, 1)
    sig = signature(session, path)
    feeds = make_feeds(sig, np.random.default_rng(0).integers(0, 60, (1, 8)), 0)
    logits = sig.first("logits").name
    expected = session.run([logits], feeds)[0].astype(np.float32)
    with torch.no_grad():
        got = TorchGraph(load(path)).run(feeds, [logits])[logits].numpy()
    coarse = any(word in name for word in COARSE)
    np.testing.assert_allclose(got, expected, rtol=0, atol=(2e-2 if coarse else 2e-4) * max(1, np.abs(expected).max()))


def _one(text: str, opset: int = 23, **constants: np.ndarray) -> onnx.ModelProto:
    return model(text, opset, 10, **constants)


OPERATORS = {
    "pad-free slice backwards": (
        "y = Slice(x, starts, ends, axes, steps)",
        {"starts": [-1], "ends": [-9], "axes": [1], "steps": [-2]},
    ),
    "gemm": (
        "z = Reshape(x, flat) y = Gemm<alpha=0.5, beta=2.0, transB=1>(z, w, b)",
        {"flat": [-1, 8], "w": weights(5, 8), "b": weights(5)},
    ),
    "split": ("a, b = Split<axis=2>(x, sizes) y = Sub(a, b)", {"sizes": [4, 4]}),
    "rms": ("y = RMSNormalization(x, w)", {"w": weights(8)}),
    "layer norm": ("y = LayerNormalization(x, w, b)", {"w": weights(8), "b": weights(8)}),
    "swiglu by parts": ("s = Sigmoid(x) y = Mul(x, s)", {}),
    "gelu": ('y = Gelu<approximate="tanh">(x)', {}),
    "erf": ("e = Erf(x) y = Mul(e, x)", {}),
    "quick gelu": ("y = com.microsoft.QuickGelu<alpha=1.5>(x)", {}),
    "where": ("m = Less(x, zero) y = Where(m, zero, x)", {"zero": weights(1) * 0}),
    "trilu": ("y = Trilu<upper=0>(x)", {}),
    "mean": ("y = ReduceMean<keepdims=0>(x, axes)", {"axes": [1]}),
    "gather": ("y = Gather<axis=1>(x, picked)", {"picked": [[0, -1], [2, 1]]}),
    "expand": ("m = ReduceMax(x, axes) y = Expand(m, shape)", {"axes": [2], "shape": [2, 4, 3]}),
    "attention": ("y = Attention<q_num_heads=2, kv_num_heads=1, is_causal=1>(x, k, k)", {"k": weights(2, 4, 4)}),
    "softcap": ("y = Attention<q_num_heads=2, kv_num_heads=2, softcap=1.5>(x, x, x)", {}),
    "heads of one query": ("y = com.microsoft.MultiHeadAttention<num_heads=2, unidirectional=1>(x, x, x)", {}),
    "rotary": (
        "p = com.microsoft.RotaryEmbedding<num_heads=2, interleaved=1>(x, pos, c, s) y = Identity(p)",
        {"pos": [[0, 1, 2, 3], [2, 3, 4, 5]], "c": weights(8, 2), "s": weights(8, 2, seed=1)},
    ),
    "skip norm": (
        "a, b, c, d = com.microsoft.SkipLayerNormalization(x, x, w, b0, b1) y = Add(a, d)",
        {"w": weights(8), "b0": weights(8, seed=1), "b1": weights(8, seed=2)},
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_equals_onnx_runtime(name, tmp_path):
    text, constants = OPERATORS[name]
    arrays = {k: np.array(v, np.int64) if isinstance(v, list) else v for k, v in constants.items()}
    path = write(_one(f"one (float[2, 4, 8] x) => (float[a, b, c] y) {{ {text} }}", **arrays), tmp_path / "one.onnx")
    proto = onnx.load(path)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(proto, path)
    x = weights(2, 4, 8, seed=9)
    expected = make_session(path, 1).run(None, {"x": x})[0]
    got = TorchGraph(load(path)).run({"x": x}, ["y"])["y"].numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def _mlp(tmp_path):
    text = """two (float[b, t, 8] x) => (float[b, t, 4] y) {
        h = MatMul(x, up) a = Tanh(h) f = Reshape(a, flat) g = Gemm(f, down, bias) y = Reshape(g, back) }"""
    arrays = {"up": weights(8, 6), "down": weights(6, 4, seed=1), "bias": weights(4, seed=2)}
    return load(write(_one(text, flat=np.array([-1, 6]), back=np.array([1, -1, 4]), **arrays), tmp_path / "m.onnx"))


def test_gradients_at_the_inputs_of_sites_are_finite_differences(tmp_path):
    opened = _mlp(tmp_path)
    graph, (_, down) = TorchGraph(opened), find_sites(opened).sites
    x, seen = weights(1, 3, 8, seed=3), []

    def loss(added: float) -> torch.Tensor:
        def leaf(value: torch.Tensor) -> torch.Tensor:
            seen.append((value.detach() + added * torch.eye(3, 6)).requires_grad_())
            return seen[-1]

        return graph.run({"x": x}, ["y"], inputs={down: leaf})["y"].square().sum()

    loss(0.0).backward()
    slope = (loss(1e-2) - loss(-1e-2)) / 2e-2
    assert seen[0].grad[range(3), range(3)].sum().item() == pytest.approx(slope.item(), rel=1e-2)


def test_a_product_takes_the_place_of_x_w_and_leaves_the_bias(tmp_path):
    opened = _mlp(tmp_path)
    graph, (up, down) = TorchGraph(opened), find_sites(opened).sites
    x = weights(1, 3, 8, seed=3)
    dense = graph.run({"x": x}, ["y"])["y"]
    same = {site: partial(torch.matmul, other=torch.tensor(site.weight())) for site in (up, down)}
    assert torch.allclose(graph.run({"x": x}, ["y"], products=same)["y"], dense, atol=1e-6)
    none = graph.run({"x": x}, ["y"], products={down: lambda v: torch.zeros(len(v), 4)})["y"]
    assert torch.allclose(none, torch.tensor(weights(4, seed=2)).expand(1, 3, 4))


def test_an_unknown_operator_and_a_missing_input_are_named(tmp_path):
    graph = TorchGraph(load(write(_one("o (float[2, 3] x) => (float[2, 3] y) { y = Asinh(x) }"), tmp_path / "a.onnx")))
    with pytest.raises(UsageError, match="operator Asinh"):
        graph.run({"x": weights(2, 3)}, ["y"])
    with pytest.raises(UsageError, match="input 'x'"):
        graph.run({}, ["y"])
