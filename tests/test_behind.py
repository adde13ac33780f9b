"""What makes up for a shift or a center, in every spelling of a layer: in the fused op, or in stock ops behind it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from small_models import model, weights, write
from test_passes_functions import MODELS as FUNCTIONS
from test_passes_functions import source_of
from test_treatment import stats_of

from nmonnx.convert import Conversion, convert
from nmonnx.feeds import Feed
from nmonnx.library import make_session
from nmonnx.onnx_file.graph import load
from nmonnx.pattern import Pattern
from nmonnx.pruning.recipe import Recipe
from nmonnx.reference import center_of, prune
from nmonnx.sites import find_sites
from nmonnx.validate import validate

K, N = 32, 6
RNG = np.random.default_rng(0)
DYNAMIC = "q, sx, zx = DynamicQuantizeLinear(x) "
FLOAT = {
    "MatMul": "y = MatMul(x, w)",
    "Gemm": "y = Gemm<alpha = 0.5, beta = 2.0>(x, w, b)",
    "Gemm transB": "y = Gemm<transB = 1>(x, wt, b)",
    "MatMul and Add": "p = MatMul(x, w) y = Add(p, b)",
    "weight behind a Transpose": "t = Transpose<perm = [1, 0]>(wt) y = MatMul(x, t)",
    "FusedMatMul": "y = com.microsoft.FusedMatMul<alpha = 2.0>(x, w)",
    "MatMulNBits": f"y = com.microsoft.MatMulNBits<K = {K}, N = {N}, bits = 4, block_size = 16>(x, c, s)",
}
QUANTISED = {
    "weight behind DequantizeLinear": "v = DequantizeLinear(i, si, zi) y = MatMul(x, v)",
    "MatMulNBits with a bias": f"y = com.microsoft.MatMulNBits<K = {K}, N = {N}, bits = 4, block_size = 16>"
    '(x, c, s, "", "", b)',
    "DynamicQuantizeMatMul": "y = com.microsoft.DynamicQuantizeMatMul(x, i, si, zi, b)",
    "MatMulIntegerToFloat": DYNAMIC + "y = com.microsoft.MatMulIntegerToFloat(q, i, sx, si, zx, zi)",
    "MatMulInteger": DYNAMIC
    + "m = MatMulInteger(q, i, zx, zi) f = Cast<to = 1>(m) g = Mul(sx, si) p = Mul(f, g) y = Add(b, p)",
    "QGemm": DYNAMIC + 'y = com.microsoft.QGemm(q, sx, zx, i, si, zi, "")',
}
SPELLINGS = [(name, np.float32) for name in FLOAT | QUANTISED] + [(name, np.float16) for name in FLOAT]


def layer(nodes: str, kind: type = np.float32, **outputs: int) -> onnx.ModelProto:
    """x [t, K] -> outputs, by default y [t, N], with those of the constants that the nodes read."""
    stored = {
        "w": weights(K, N, seed=1, dtype=kind),
        "wt": weights(N, K, seed=2, dtype=kind),
        "b": weights(N, seed=3, dtype=kind),
        "c": np.random.default_rng(4).integers(0, 256, (N, 2, 8)).astype(np.uint8),
        "s": (np.abs(weights(N, 2, seed=5)) + 0.1).astype(kind),
        "i": np.random.default_rng(6).integers(-99, 99, (K, N)).astype(np.int8),
        "si": np.asarray(np.float32(0.03)),
        "zi": np.asarray(np.int8(3)),
    }
    elem = "float" if kind == np.float32 else "float16"
    ends = ", ".join(f"{elem}[t, {width}] {name}" for name, width in (outputs or {"y": N}).items())
    text = f"layer ({elem}[t, {K}] x) => ({ends}) {{ {nodes} }}"
    read = {i for node in model(text).graph.node for i in node.input}
    return model(text, **{name: values for name, values in stored.items() if name in read})


def moved(x: np.ndarray, done: Conversion, site: str) -> tuple[np.ndarray, np.ndarray]:
    """What the layer is given, P(x - eta), and eta [K] or [t, 1]."""
    treatment = done.plan.treatments[site]
    n, m = treatment.pattern.n, treatment.pattern.m
    given = prune(x, n, m, treatment.scale, treatment.shift, treatment.order, treatment.variance, treatment.center)
    return given, center_of(x, treatment.center) if treatment.center else treatment.shift


def converted(tmp_path: Path, proto: onnx.ModelProto, **recipe) -> tuple[Path, Path, Conversion]:
    source = write(proto, tmp_path / "in.onnx")
    made = Recipe.from_dict({"pattern": "4:8", **recipe})
    stats = stats_of(source) if made.needs else None
    return source, tmp_path / "out.onnx", convert(source, tmp_path / "out.onnx", made, stats=stats)


@pytest.mark.parametrize("mitigation", ["s-pts", "d-pts-mean"])
@pytest.mark.parametrize("kernel", ["fused", "prune"])
@pytest.mark.parametrize(("spelling", "kind"), SPELLINGS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_layer_gives_what_the_original_makes_of_the_moved_activation_and_the_rest(
    tmp_path: Path, spelling: str, kind: type, kernel: str, mitigation: str
) -> None:
    """y = layer(P(x - eta)) + eta W, of the original layer as ONNX Runtime runs it."""
    source, out, done = converted(
        tmp_path, layer((FLOAT | QUANTISED)[spelling], kind), kernel=kernel, mitigations=[mitigation]
    )
    assert [p.left for p in done.passes if p.name.startswith("fold")] == [{}, {}, {}]
    x = (weights(9, K, seed=7) + 1).astype(kind)
    site = find_sites(load(source)).sites[0]
    given, eta = moved(x, done, site.name)
    alone = make_session(source).run(None, {"x": given})[0].astype(np.float64)
    if done.records[0]["kernel"] == "NMMatMulNBits":  # which leaves out that the original quantises what it is given
        bias = make_session(source).run(None, {"x": np.zeros_like(given)})[0]
        alone = given.astype(np.float64) @ site.weight() + bias
    want = alone + np.broadcast_to(eta, x.shape).astype(np.float64) @ (site.alpha * site.weight())
    limit = 3e-2 if kind == np.float16 else 2e-4
    for library in (True, False):
        got = make_session(out, library=library).run(None, {"x": x})[0]
        assert got.dtype == kind
        np.testing.assert_allclose(got, want, rtol=limit, atol=limit * np.abs(want).max())
    report = validate(source, out, feeds=[Feed("x", {"x": x})])
    assert [(c.name, c.detail) for c in report.checks if not c.passed] == []


@pytest.mark.parametrize("mitigation", ["s-pts", "d-pts"])
@pytest.mark.parametrize("share", ["joint", "separate"])
def test_layers_behind_one_quantiser_share_a_prune_and_each_is_made_up_for(
    tmp_path: Path, share: str, mitigation: str
) -> None:
    nodes = DYNAMIC + " ".join(
        f"{y} = com.microsoft.MatMulIntegerToFloat(q, {w}, sx, si, zx, zi)"
        for y, w in zip("abc", ("i", "i", "j"), strict=True)
    )
    proto = layer(nodes, a=N, b=N, c=N)
    proto.graph.initializer.append(numpy_helper.from_array(RNG.integers(-99, 99, (K, N)).astype(np.int8), "j"))
    source, out, done = converted(tmp_path, proto, share=share, mitigations=[mitigation])
    x = weights(9, K, seed=8) + 1
    sites = find_sites(load(source)).sites
    given, eta = moved(x, done, sites[0].name)
    for site, name in zip(sites, "abc", strict=True):
        alone = make_session(source).run([name], {"x": given})[0]
        want = alone + np.broadcast_to(eta, x.shape) @ site.weight()
        np.testing.assert_allclose(make_session(out).run([name], {"x": x})[0], want, rtol=1e-4, atol=1e-3)
    assert sum(node.op_type == "NMPrune" for node in onnx.load(out).graph.node) == 1


@pytest.mark.parametrize("kernel", ["fused", "prune"])
@pytest.mark.parametrize("mitigation", ["s-pts", "d-pts"])
def test_other_readers_of_weight_bias_and_activation_see_what_they_saw(
    tmp_path: Path, mitigation: str, kernel: str
) -> None:
    nodes = "y = Gemm(x, w, b) o = Sin(x) p = MatMul(o, u) r = Add(p, b) ww = Neg(w) bb = Neg(b)"
    proto = layer(nodes, y=N, r=N, o=K, ww=N)
    proto.graph.output.append(onnx.helper.make_tensor_value_info("bb", TensorProto.FLOAT, [N]))
    proto.graph.initializer.append(numpy_helper.from_array(weights(K, N, seed=9), "u"))
    source, out, _ = converted(tmp_path, proto, kernel=kernel, mitigations=[mitigation], include=["w"])
    feed, others = {"x": weights(5, K)}, ["r", "o", "ww", "bb"]
    before, after = (make_session(path).run(others, feed) for path in (source, out))
    assert [a.tobytes() for a in before] == [b.tobytes() for b in after]
    assert all(c.passed for c in validate(source, out, feeds=[Feed("x", feed)]).checks)


@pytest.mark.parametrize("kernel", ["fused", "prune"])
@pytest.mark.parametrize("center", ["mean", "median"])
@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("kind", [np.float32, np.float16], ids=lambda k: k.__name__)
def test_d_pts_is_the_dense_formula_of_the_paper(
    tmp_path: Path, kind: type, variance: bool, center: str, kernel: str
) -> None:
    """Y = (nu ((X - eta) * M) + eta) W, in torch, with the dense operand that nmonnx never makes."""
    torch = pytest.importorskip("torch")
    tied = np.random.default_rng(2).integers(-2, 3, (7, K))
    equal, outliers = np.repeat(np.arange(-3, 4)[:, None], K, axis=1), weights(7, K, seed=3) + 40 * np.eye(7, K)
    x = np.concatenate([weights(7, K, seed=1), tied, equal, outliers]).astype(kind)
    proto = layer(FLOAT["MatMul"], kind)
    mitigations = ["d-pts" if center == "median" else "d-pts-mean", *["var"] * variance]
    _, out, _ = converted(tmp_path, proto, kernel=kernel, mitigations=mitigations)
    w = torch.tensor(numpy_helper.to_array(proto.graph.initializer[0])).float()
    dense = torch.tensor(x).float()
    eta = (dense.mean(-1) if center == "mean" else dense.median(-1).values)[:, None]
    z = (dense - eta).to(torch.tensor(x).dtype).float()
    groups = (dense - eta).abs().view(len(x), -1, 8)
    best = groups.sort(dim=-1, descending=True, stable=True).indices[..., :4]
    kept = torch.zeros_like(groups).scatter_(-1, best, 1)
    sparse = z * kept.view_as(z)
    if variance:
        nu = (z.var(-1, keepdim=True) / sparse.var(-1, keepdim=True)).sqrt().clamp(max=4)
        sparse = sparse * torch.where(nu.isfinite(), nu, torch.ones_like(nu))
    want = (sparse + eta) @ w
    limit = 2e-2 if kind == np.float16 else 1e-4
    for library in (True, False):
        got = make_session(out, library=library).run(None, {"x": x})[0]
        np.testing.assert_allclose(got, want, rtol=limit, atol=limit * float(want.abs().max()))


@pytest.mark.parametrize("kernel", ["fused", "prune"])
@pytest.mark.parametrize("mitigation", ["d-pts", "d-pts-mean"])
def test_a_token_with_nan_is_nan_and_the_others_are_not(tmp_path: Path, mitigation: str, kernel: str) -> None:
    _, out, _ = converted(tmp_path, layer(FLOAT["MatMul"]), kernel=kernel, mitigations=[mitigation])
    x = weights(4, K)
    x[2, 5] = np.nan
    for library in (True, False):
        got = make_session(out, library=library).run(None, {"x": x})[0]
        np.testing.assert_array_equal(np.isnan(got).all(axis=1), [False, False, True, False])


STATIC = "q = QuantizeLinear(x, sq, zq) d = DequantizeLinear(q, sq, zq) y = MatMul(d, w)"
REFUSALS = {
    "fixed range": (STATIC, "quantised with a fixed range"),
    "activation function inside": (
        'y = com.microsoft.FusedGemm<activation = "Relu">(x, w, b)',
        "applies an activation function too",
    ),
    "integer product with another reader": (
        DYNAMIC + "m = MatMulInteger(q, i, zx, zi) f = Cast<to = 1>(m) g = Mul(sx, si) p = Mul(f, g) h = Neg(f)"
        " y = Add(h, p)",
        "its integer product has other readers",
    ),
}


@pytest.mark.parametrize("mitigation", ["s-pts", "d-pts"])
@pytest.mark.parametrize(("nodes", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_where_it_would_not_be_exact_the_layer_is_told(
    tmp_path: Path, nodes: str, reason: str, mitigation: str
) -> None:
    proto = layer(nodes)
    static = {"sq": np.asarray(np.float32(0.05)), "zq": np.asarray(np.uint8(128))}
    read = {i for node in proto.graph.node for i in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in static.items() if n in read)
    source, out, done = converted(tmp_path, proto, mitigations=[mitigation])
    left = [reason for p in done.passes if p.name.startswith("fold") for reason in p.left.values()]
    assert len(left) == 1 and reason in left[0]
    plain = tmp_path / "plain.onnx"
    convert(source, plain, Recipe(pattern=Pattern(4, 8)))
    feed = {"x": weights(5, K)}
    got, want = (make_session(path).run(None, feed)[0] for path in (out, plain))
    assert got.tobytes() == want.tobytes()


def _tampered(out: Path, how: str) -> None:
    proto = onnx.load(out)
    add = next(node for node in proto.graph.node if node.op_type == "Add")
    mul = next((node for node in proto.graph.node if node.op_type == "Mul"), None)
    if how == "value":
        stored = next(t for t in proto.graph.initializer if t.name.endswith(("/added", "/row_sum")))
        stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored) * np.float32(1.01), stored.name))
    elif how == "subtracted":
        add.op_type = "Sub"
    elif how == "twice":
        again = proto.graph.node.add()
        again.CopyFrom(add)
        again.name, again.input[0], again.output[0], add.output[0] = "again", "once", "y", "once"
    elif how == "unmarked":
        del (mul or add).metadata_props[:]
    elif how == "gone":
        layer_node = next(node for node in proto.graph.node if node.output[0] == add.input[0])
        layer_node.output[0] = "y"
        proto.graph.node.remove(add)
    onnx.save(proto, out)


@pytest.mark.parametrize("how", ["value", "subtracted", "twice", "unmarked", "gone"])
@pytest.mark.parametrize("mitigation", ["s-pts", "d-pts"])
def test_an_addition_that_was_changed_after_the_conversion_is_seen(tmp_path: Path, mitigation: str, how: str) -> None:
    source, out, _ = converted(tmp_path, layer(FLOAT["MatMul"]), kernel="prune", mitigations=[mitigation])
    assert all(c.passed for c in validate(source, out, feeds=[]).checks)
    _tampered(out, how)
    failed = [c for c in validate(source, out, feeds=[]).checks if not c.passed]
    assert failed


@pytest.mark.parametrize("kernel", ["fused", "prune"])
@pytest.mark.parametrize("mitigation", ["s-pts", "d-pts"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_inside_functions_it_is_made_up_for_exactly_when_every_channel_is_kept(
    tmp_path: Path, name: str, mitigation: str, kernel: str
) -> None:
    source = source_of(tmp_path, *FUNCTIONS[name][:2])
    recipe = Recipe(pattern=Pattern(4, 4), mitigations=(mitigation,), kernel=kernel)
    out = tmp_path / "out.onnx"
    convert(source, out, recipe, stats=stats_of(source) if recipe.needs else None)
    feed = {"x": weights(3, 8, seed=1)} | ({"k": np.ones((), np.float32)} if "k)" in FUNCTIONS[name][0] else {})
    want = make_session(source).run(None, feed)[0]
    for library in (True, False):
        np.testing.assert_allclose(make_session(out, library=library).run(None, feed)[0], want, rtol=1e-4, atol=1e-4)
    assert [(c.name, c.detail) for c in validate(source, out, feeds=[Feed("x", feed)]).checks if not c.passed] == []
