"""Models with functions, converted: they compute what numpy says, for every kernel, with the library and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from site_models import parse, saved
from small_models import weights
from test_sites_functions import MLP, QKV, TWO, F, T, overloaded
from test_zoo import failed

from nmonnx.convert import Conversion, convert
from nmonnx.errors import UsageError
from nmonnx.feeds import Feed
from nmonnx.library import make_session
from nmonnx.pattern import Pattern
from nmonnx.pruning.recipe import Recipe
from nmonnx.reference import prune
from nmonnx.validate import validate

X = weights(3, 8, seed=1)
W = {
    name: weights(*(int(d) for d in name[1:].split("x")), seed=i)
    for i, name in enumerate(["a8x6", "b6x8", "c8x4", "d4x8", "e6x8", "f4x6", "g8x6", "h6x8", "i8x6", "j8x6"], 2)
}


def p(x: np.ndarray) -> np.ndarray:
    return prune(np.ascontiguousarray(x, np.float32), 2, 4)


def mlp(x: np.ndarray, g: str, u: str, d: str) -> np.ndarray:
    return p((p(x) @ W[g]) * (p(x) @ W[u])) @ W[d]


MODELS: dict[str, tuple[str, str, Callable[[], np.ndarray]]] = {
    "other shapes": (
        "h = local.T(x, e6x8) y = local.T(h, f4x6)", T, lambda: p(p(X) @ W["e6x8"].T) @ W["f4x6"].T,
    ),
    "one call, transposed inside": ("y = local.T(x, e6x8)", T, lambda: p(X) @ W["e6x8"].T),
    "nested, the second inside": (
        "h = local.Two(x, a8x6, b6x8) y = local.Two(h, g8x6, h6x8)",
        F + TWO,
        lambda: p(np.maximum(p(p(np.maximum(p(X) @ W["a8x6"], 0)) @ W["b6x8"]) @ W["g8x6"], 0)) @ W["h6x8"],
    ),
    "two layers on one input": (
        "h, i = local.A(x, a8x6, c8x4) s, t = local.A(x, c8x4, g8x6) y = Concat<axis = 1>(h, i, s, t)",
        QKV,
        lambda: np.concatenate([p(X) @ W[n] for n in ("a8x6", "c8x4", "c8x4", "g8x6")], 1),
    ),
    "a module": (
        "h = local.M(x, a8x6, g8x6, b6x8) y = local.M(h, i8x6, j8x6, h6x8)",
        MLP,
        lambda: mlp(mlp(X, "a8x6", "g8x6", "b6x8"), "i8x6", "j8x6", "h6x8"),
    ),
    "left in one call": (
        "t = Transpose(d4x8) u = Mul(t, k) h = local.F(x, u) y = local.F(h, d4x8)",
        F,
        lambda: p(X @ W["d4x8"].T * np.float32(1)) @ W["d4x8"],
    ),
}  # fmt: skip


def source_of(folder: Path, nodes: str, functions: str) -> Path:
    head = "float[T, 8] x, float k" if "k)" in nodes else "float[T, 8] x"
    used = {name: w for name, w in W.items() if name in nodes}
    return parse(folder, f"g ({head}) => (float[A, B] y) {{ {nodes} }}{functions}", used).path


def check(source: Path, recipe: Recipe, want: np.ndarray) -> Conversion:
    """Convert, validate and run; then 4:4 has to be the original, bit for bit."""
    out, dense = source.with_name("out.onnx"), source.with_name("dense.onnx")
    inputs = [i.name for i in onnx.load(source).graph.input]
    feeds = {name: {"x": X, "k": np.array(1, np.float32)}[name] for name in inputs}
    done = convert(source, out, recipe)
    onnx.checker.check_model(str(out))
    assert failed(validate(source, out, [Feed("test", feeds)], threads=1)) == []
    for library in (True, False) if recipe.fallback == "function" else (True,):
        np.testing.assert_allclose(make_session(out, library=library).run(None, feeds)[0], want, rtol=1e-4, atol=1e-5)
    convert(source, dense, Recipe(Pattern(4, 4), kernel=recipe.kernel if recipe.kernel != "fused" else "auto"))
    original = make_session(source, library=False).run(None, feeds)
    for library in (True, False):
        got = make_session(dense, library=library).run(None, feeds)
        assert [a.tobytes() for a in got] == [a.tobytes() for a in original]
    return done


@pytest.mark.parametrize("kernel", ["auto", "prune", "fused"])
@pytest.mark.parametrize(("nodes", "functions", "want"), MODELS.values(), ids=MODELS)
def test_every_call_of_a_function_computes_with_a_pruned_input(
    tmp_path: Path, nodes: str, functions: str, want: Callable[[], np.ndarray], kernel: str
) -> None:
    check(source_of(tmp_path, nodes, functions), Recipe(Pattern(2, 4), kernel=kernel), want())


@pytest.mark.skipif(not hasattr(onnx.FunctionProto(), "overload"), reason="this onnx knows no overloads")
def test_functions_of_one_name_are_pruned_each_in_its_own_body(tmp_path: Path) -> None:
    model = overloaded(tmp_path)
    matrices = [onnx.numpy_helper.to_array(f.node[0].attribute[0].t) for f in model.proto.functions]
    want = X
    for matrix in matrices:
        want = p(want) @ matrix
    done = check(model.path, Recipe(Pattern(2, 4), kernel="fused"), want)
    assert len(done.selection.chosen) == 3


@pytest.mark.parametrize("kernel", ["prune", "fused"])
def test_an_op_inside_a_function_brings_its_body_whatever_the_fallback(tmp_path: Path, kernel: str) -> None:
    nodes, functions, want = MODELS["a module"]
    source = source_of(tmp_path, nodes, functions)
    done = check(source, Recipe(Pattern(2, 4), kernel=kernel, fallback="none"), want())
    note = next(result.left["model"] for result in done.passes if "model" in result.left)
    assert "function" in note
    assert any(f.domain == "ai.nmonnx" for f in onnx.load(source.with_name("out.onnx")).functions)


def test_without_an_op_inside_a_function_the_fallback_is_left_out(tmp_path: Path) -> None:
    nodes, functions, want = MODELS["other shapes"]
    source = source_of(tmp_path, nodes, functions)
    check(source, Recipe(Pattern(2, 4), fallback="none"), want())
    assert {f.domain for f in onnx.load(source.with_name("out.onnx")).functions} == {"local"}


REFUSED = {
    "shapes that differ inside": (
        "h = local.R(x, a8x6) y = local.R(h, f4x6)",
        F.replace("F (", "R (").replace("c = MatMul(a, b)", "r = Relu(a) c = MatMul(r, b)"),
        r"weights of different shapes \(inline the functions",
    ),
    "a weight for the caller to give": ("y = local.F(x, k)", F, "no linear layer.*input of the graph.*as initializers"),
    "attention alone": ("r = Relu(x) t = Transpose(r) y = local.F(x, t)", F, "no linear layer.*nothing to prune$"),
}


@pytest.mark.parametrize(("nodes", "functions", "words"), REFUSED.values(), ids=REFUSED)
def test_where_nothing_can_be_pruned_the_refusal_says_why(
    tmp_path: Path, nodes: str, functions: str, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        convert(source_of(tmp_path, nodes, functions), tmp_path / "out.onnx", Recipe())


def test_a_model_in_bf16_is_refused_with_the_way_out(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> g (bfloat16[T, 8] x) => (bfloat16[T, 4] y) { y = MatMul(x, w) }'
    )
    proto.graph.initializer.append(
        onnx.helper.make_tensor("w", onnx.TensorProto.BFLOAT16, [8, 4], b"\0" * 64, raw=True)
    )
    with pytest.raises(UsageError, match=r"BFLOAT16.*\(export in fp32 or fp16\)"):
        convert(saved(tmp_path, proto).path, None, Recipe())
