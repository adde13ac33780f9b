"""Corrections folded into constants: against the formula in stock operators, and against validation and diff."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from corrected_models import NODES, K, N, layer, random_correction, unfolded, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import model, write
from test_treatment import stats_of

from nmonnx.convert import Conversion, convert
from nmonnx.diff import diff, to_text
from nmonnx.errors import InputError, UsageError
from nmonnx.feeds import Feed
from nmonnx.library import make_session
from nmonnx.onnx_file.graph import load
from nmonnx.onnx_file.identity import model_sha256
from nmonnx.passes import fold_corrections
from nmonnx.pattern import Pattern
from nmonnx.pruning.recipe import Recipe
from nmonnx.records.corrections import Correction, Corrections
from nmonnx.sites import find_sites
from nmonnx.validate import validate

FUSED = Recipe(pattern=Pattern(4, 8), kernel="fused")
PRUNED = Recipe(pattern=Pattern(4, 8), kernel="prune")
X = np.random.default_rng(3).standard_normal((7, K)).astype(np.float16)
EVERY = {"weight", "bias", "scale", "low", "shift"}
CASES = [(spelling, EVERY, kind) for spelling in NODES for kind in (np.float32, np.float16)]
CASES += [("Gemm transB", {part}, np.float32) for part in sorted(EVERY)]


def fitted(source: Path, recipe: Recipe, correction: Correction, names: list[str] | None = None) -> Corrections:
    names = names or [find_sites(load(source)).sites[0].name]
    fit = Corrections(dict.fromkeys(names, correction), model_sha256(source), recipe.to_json(), "by hand")
    return Corrections.load(fit.save(source.with_suffix(".npz")))


def folded(
    folder: Path, proto: onnx.ModelProto, recipe: Recipe, correction: Correction, names: list[str] | None = None
) -> tuple[Path, Path, Conversion]:
    source = write(proto, folder / "model.onnx")
    done = convert(source, folder / "sparse.onnx", recipe, True, fit=fitted(source, recipe, correction, names))
    assert done.out is not None
    return source, done.out, done


def result(done: Conversion):  # type: ignore[no-untyped-def]
    return next(p for p in done.passes if p.name == "fold-corrections")


def run(path: Path, x: np.ndarray, library: bool = True) -> np.ndarray:
    return make_session(path, library=library).run(None, {"x": x})[0]


def failed(source: Path, out: Path, x: np.ndarray) -> list[str]:
    file = source.with_suffix(".npz")
    fit = Corrections.load(file) if file.is_file() else None
    report = validate(source, out, feeds=[Feed("x", {"x": x})], fit=fit)
    return [f"{c.name}: {c.detail}" for c in report.checks if not c.passed]


@pytest.mark.parametrize("recipe", [FUSED, PRUNED], ids=["fused", "prune"])
@pytest.mark.parametrize("spelling, parts, kind", CASES)
def test_folded_is_what_the_formula_says(tmp_path, spelling, parts, recipe, kind):
    proto, weight, bias = layer(spelling, kind)
    if spelling == "MatMul + Add":
        assert bias.any()
    correction = random_correction(parts)
    source, out, done = folded(tmp_path, proto, recipe, correction)
    assert (result(done).changed, result(done).left) == (1, {})
    session = onnxruntime.InferenceSession(unfolded(weight, bias, correction, 4, 8).SerializeToString())
    want = session.run(None, {"x": X.astype(np.float32)})[0]
    near = {"rtol": 1e-4, "atol": 1e-3} if kind is np.float32 else {"rtol": 1e-2, "atol": 0.5}
    if spelling == "Cast" and kind is np.float32:
        near = {"rtol": 1e-3, "atol": 0.05}  # W' is stored as fp16, as W was
    for library in (True, False):
        np.testing.assert_allclose(run(out, X.astype(kind), library), want, **near)
    assert failed(source, out, X.astype(kind)) == []


@settings(deadline=None, max_examples=6)
@given(st.sets(st.sampled_from(["weight", "bias", "scale", "low", "shift"])), st.sampled_from([FUSED, PRUNED]))
def test_with_every_channel_kept_a_shift_changes_nothing(tmp_path_factory, parts, recipe):
    proto = layer("Gemm transB")[0]
    dense = replace(recipe, pattern=Pattern(8, 8))
    with_shift = random_correction(parts | {"shift"})
    without = replace(with_shift, shift=None)
    folder = tmp_path_factory.mktemp("dense")
    outs = []
    for name, correction in (("a", with_shift), ("b", without)):
        (folder / name).mkdir()
        outs.append(run(folded(folder / name, proto, dense, correction)[1], X.astype(np.float32)))
    np.testing.assert_allclose(outs[0], outs[1], rtol=1e-3, atol=1e-3)


def test_a_stored_weight_keeps_its_type_and_its_layout(tmp_path):
    for spelling, name, kind, shape in (
        ("Cast", "half", np.float16, (K, N)),
        ("Transpose", "wt", np.float32, (N, K)),
        ("Gemm transB", "wt", np.float32, (N, K)),
    ):
        proto = layer(spelling)[0]
        correction = random_correction({"weight"})
        _, out, done = folded(tmp_path, proto, PRUNED, correction)
        new = {k: v for k, v in weights_of(onnx.load(out)).items() if k.endswith("/weight")}
        assert [(v.dtype, v.shape) for v in new.values()] == [(np.dtype(kind), shape)]
        assert name not in weights_of(onnx.load(out))
        assert result(done).bytes == 0


def shared() -> onnx.ModelProto:
    """Every weight and bias has two readers, one of them a graph output or no linear layer."""
    rng = np.random.default_rng(5)
    return model(
        f"""shared (float[t, {K}] x) => (float[t, {N}] y, float[t, {N}] z, float[{N}] kept, float[{K}, {N}] seen) {{
            y = Gemm(x, w, b)
            s = Sin(x)
            z = Gemm(s, w, b)
            kept = Neg(b)
            seen = Neg(w)
        }}""",
        w=rng.standard_normal((K, N)).astype(np.float32),
        b=rng.standard_normal(N).astype(np.float32),
    )


@pytest.mark.parametrize("recipe", [FUSED, PRUNED], ids=["fused", "prune"])
def test_what_others_read_is_cloned_and_told(tmp_path, recipe):
    x = X.astype(np.float32)
    plain = convert(write(shared(), tmp_path / "plain.onnx"), tmp_path / "plain-sparse.onnx", recipe)
    source, out, done = folded(tmp_path, shared(), recipe, random_correction({"weight", "bias"}))
    before, after = (make_session(p).run(None, {"x": x}) for p in (plain.out, out))
    assert not np.allclose(before[0], after[0])
    for a, b in zip(before[1:], after[1:], strict=True):
        assert a.tobytes() == b.tobytes()
    assert result(done).bytes == 4 * K * N + 4 * N
    assert failed(source, out, x) == []


def test_diff_names_the_new_weight_and_bias(tmp_path):
    source, out, _ = folded(tmp_path, layer("MatMul + Add")[0], PRUNED, random_correction({"weight", "bias", "low"}))
    words = to_text(diff(source, out))
    for name in ("weight", "added", "low_a", "low_b"):
        assert f"/{name}" in words


@pytest.mark.parametrize("recipe", [FUSED, PRUNED], ids=["fused", "prune"])
@pytest.mark.parametrize("what", ["weight", "bias", "low_a"])
def test_a_constant_with_another_sign_fails_validation(tmp_path, recipe, what):
    source, out, _ = folded(tmp_path, layer("Gemm")[0], recipe, random_correction({"weight", "bias", "low"}))
    assert failed(source, out, X.astype(np.float32)) == []
    proto = onnx.load(out)
    tensor = next(t for t in proto.graph.initializer if t.name.endswith(f"/{what}"))
    tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(proto, out)
    assert failed(source, out, X.astype(np.float32)) != []


def test_a_fold_with_the_wrong_sign_of_the_shift_fails_validation(tmp_path, monkeypatch):
    right = fold_corrections.added_bias
    monkeypatch.setattr(
        fold_corrections, "added_bias", lambda c, site, shift, w: right(c, site, None if shift is None else -shift, w)
    )
    source, out, _ = folded(tmp_path, layer("Gemm")[0], FUSED, random_correction({"shift", "weight"}))
    assert any("make up for the shift" in said for said in failed(source, out, X.astype(np.float32)))


@pytest.mark.parametrize("recipe", [FUSED, PRUNED], ids=["fused", "prune"])
@pytest.mark.parametrize(
    "wrong, parts", [("folded_weight", "low"), ("folded_weight", "weight"), ("added_bias", "bias")]
)
def test_a_fold_that_is_slightly_wrong_is_told_from_the_pruning(tmp_path, monkeypatch, wrong, parts, recipe):
    right = getattr(fold_corrections, wrong)
    monkeypatch.setattr(fold_corrections, wrong, lambda *given: 1.001 * right(*given))
    source, out, _ = folded(tmp_path, layer("Gemm")[0], recipe, random_correction({parts}))
    assert [said.split(":")[0] for said in failed(source, out, X.astype(np.float32))] == [
        "folded layers equal their corrections, unfolded"
    ]
    source.with_suffix(".npz").unlink()  # it is the file of corrections that tells
    assert failed(source, out, X.astype(np.float32)) == []


def spoilt(proto: onnx.ModelProto, how: str) -> None:
    """Something that a correction would not have left behind."""
    graph, site = proto.graph, recorded_name(proto)
    first = next(node for node in graph.node if node.name.endswith("/low_a"))
    if how == "reads its own sum":
        first.input[0] = "twin"
    elif how == "has another reader":
        graph.node.append(onnx.helper.make_node("Neg", [first.output[0]], ["seen"]))
        graph.output.append(onnx.helper.make_tensor_value_info("seen", 1, ["t", 4]))
    elif how == "is not recorded":
        entry = next(p for p in proto.metadata_props if p.key == "nmonnx.fit")
        entry.value = entry.value.replace(f'"{site}"', '"another"')
    elif how == "is added twice":
        end = next(node for node in graph.node if node.output[0] == "y")
        end.output[0] = "once"
        graph.node.append(onnx.helper.make_node("Add", ["once", end.input[1]], ["y"], "again"))
        graph.node[-1].metadata_props.extend(end.metadata_props)


def recorded_name(proto: onnx.ModelProto) -> str:
    recorded = next(p.value for p in proto.metadata_props if p.key == "nmonnx.sites")
    return json.loads(recorded)[0]["name"]


@pytest.mark.parametrize("recipe", [FUSED, PRUNED], ids=["fused", "prune"])
@pytest.mark.parametrize("how", ["reads its own sum", "has another reader", "is not recorded", "is added twice"])
def test_a_low_rank_that_is_not_the_one_folded_fails_without_running(tmp_path, recipe, how):
    proto = model(
        f"low (float[t, {K}] x, float[t, {K}] twin) => (float[t, {N}] y, float[t, {K}] z) {{"
        " y = MatMul(x, w) z = Neg(twin) }",
        w=np.eye(K, N, dtype=np.float32),
    )
    source, out, _ = folded(tmp_path, proto, recipe, random_correction({"bias", "low", "shift"}))
    feed = Feed("x", {"x": X.astype(np.float32), "twin": X.astype(np.float32)})
    for feeds in ([feed], []):
        assert [c.detail for c in validate(source, out, feeds=feeds).checks if not c.passed] == []
    changed = onnx.load(out)
    spoilt(changed, how)
    onnx.save(changed, out)
    faults = [f"{c.name}: {c.detail}" for c in validate(source, out, feeds=[]).checks if not c.passed]
    assert faults


def test_a_layer_with_a_factor_is_left_alone(tmp_path):
    proto = model(
        f"half (float[t, {K}] x) => (float[t, {N}] y) {{ y = Gemm<alpha = 0.5>(x, w) }}",
        w=np.eye(K, N, dtype=np.float32),
    )
    source, out, done = folded(tmp_path, proto, PRUNED, random_correction({"bias", "shift"}))
    assert list(result(done).left.values()) == ["alpha is 0.5, not 1"]
    assert failed(source, out, X.astype(np.float32)) == []


def test_a_weight_from_a_constant_node_is_replaced(tmp_path):
    proto = layer("MatMul")[0]
    (stored,) = proto.graph.initializer
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], [stored.name], value=stored))
    del proto.graph.initializer[:]
    source, out, done = folded(tmp_path, proto, PRUNED, random_correction({"weight"}))
    assert (result(done).changed, result(done).left) == (1, {})
    assert failed(source, out, X.astype(np.float32)) == []


def test_a_stack_of_weights_is_left_alone(tmp_path):
    proto = model(
        f"stack (float[2, t, {K}] x) => (float[2, t, {N}] y) {{ y = MatMul(x, w) }}", w=np.ones((2, K, N), np.float32)
    )
    _, _, done = folded(tmp_path, proto, PRUNED, random_correction({"bias"}))
    assert list(result(done).left.values()) == ["its weight has 3 axes, not 2"]


def test_layers_behind_one_quantiser_have_one_shift(tmp_path):
    proto = model(
        f"""one (float[t, {K}] x) => (float[t, {N}] y, float[t, {N}] z) {{
            q, s, o = DynamicQuantizeLinear(x)
            y = com.microsoft.MatMulIntegerToFloat(q, a, s, sa, o)
            z = com.microsoft.MatMulIntegerToFloat(q, b, s, sa, o)
        }}""",
        a=np.eye(K, N).astype(np.int8),
        b=np.eye(K, N).astype(np.int8) * 2,
        sa=np.float32(0.5),
    )
    source = write(proto, tmp_path / "model.onnx")
    first, second = (site.name for site in find_sites(load(source)).sites)
    for other, count in ((9, 0), (2, 2)):
        sites = {first: random_correction({"shift"}), second: random_correction({"shift"}, seed=other)}
        fit = Corrections(sites, model_sha256(source), PRUNED.to_json(), "")
        done = convert(source, tmp_path / "sparse.onnx", PRUNED, True, fit=fit)
        assert result(done).changed == count
        assert failed(source, done.out, X.astype(np.float32)) == []


def nbits() -> onnx.ModelProto:
    rng = np.random.default_rng(6)
    return model(
        f"nbits (float[t, {K}] x) => (float[t, {N}] y) {{"
        f" y = com.microsoft.MatMulNBits<K = {K}, N = {N}, bits = 4, block_size = 16>(x, codes, scales) }}",
        codes=rng.integers(0, 256, (N, 2, 8)).astype(np.uint8),
        scales=rng.uniform(0.1, 1, (N, 2)).astype(np.float32),
    )


def test_a_scale_and_a_bias_fold_into_a_quantised_layer(tmp_path):
    correction = random_correction({"scale", "bias", "shift"})
    source, out, done = folded(tmp_path, nbits(), FUSED, correction)
    weight = find_sites(load(source)).sites[0].weight()
    assert result(done).left == {}
    session = onnxruntime.InferenceSession(unfolded(weight, np.zeros(N), correction, 4, 8).SerializeToString())
    want = session.run(None, {"x": X.astype(np.float32)})[0]
    np.testing.assert_allclose(run(out, X.astype(np.float32)), want, rtol=1e-2, atol=0.2)
    assert failed(source, out, X.astype(np.float32)) == []


def test_layers_of_one_prune_agree_on_its_shift(tmp_path):
    """One of two quantised layers behind a prune has a correction; the other gets what makes up for the shift alone."""
    proto, twin = nbits(), nbits().graph.node[0]
    twin.output[0], twin.name = "z", "twin"
    proto.graph.node.append(twin)
    proto.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, ["t", N]))
    source = write(proto, tmp_path / "model.onnx")
    recipe = replace(FUSED, mitigations=("s-pts",), kernel="auto")
    fit = fitted(source, recipe, random_correction({"bias"}))
    done = convert(source, tmp_path / "sparse.onnx", recipe, stats=stats_of(source), fit=fit)
    assert failed(source, done.out, X.astype(np.float32)) == []
    assert (result(done).changed, result(done).left) == (1, {})
    assert next(p for p in done.passes if p.name == "fold-shift").changed == 1


def test_a_shift_that_another_layer_cannot_have_is_left_alone(tmp_path):
    """A product with an activation function inside takes the shift from the prune that a corrected layer shares."""
    proto = model(
        f"two (float[t, {K}] x) => (float[t, {N}] y, float[t, {N}] z) {{"
        f' y = MatMul(x, w) z = com.microsoft.FusedGemm<activation = "Relu">(x, c, b) }}',
        w=np.eye(K, N, dtype=np.float32),
        c=np.eye(K, N, dtype=np.float32),
        b=np.ones(N, np.float32),
    )
    source = write(proto, tmp_path / "model.onnx")
    recipe = replace(PRUNED, mitigations=("s-pts",))
    first = next(s.name for s in find_sites(load(source)).sites if s.op == "MatMul")
    fit = fitted(source, recipe, random_correction({"bias"}), [first])
    done = convert(source, tmp_path / "sparse.onnx", recipe, stats=stats_of(source), fit=fit)
    assert failed(source, done.out, X.astype(np.float32)) == []
    (reason,) = result(done).left.values()
    assert "its shift cannot be made up for" in reason


@pytest.mark.parametrize("part", ["weight", "low"])
def test_a_new_weight_of_a_quantised_layer_is_refused(tmp_path, part):
    source, out, done = folded(tmp_path, nbits(), FUSED, random_correction({part}))
    (reason,) = result(done).left.values()
    assert "quantised anew" in reason
    assert failed(source, out, X.astype(np.float32)) == []


def test_the_weight_of_the_embedding_is_not_stored_twice(tmp_path):
    table = np.random.default_rng(7).standard_normal((N, K)).astype(np.float32)
    proto = model(
        f"tied (int64[t] ids) => (float[t, {N}] y) {{ e = Gather(w, ids) t = Transpose(w) y = MatMul(e, t) }}", w=table
    )
    source = write(proto, tmp_path / "model.onnx")
    recipe = replace(FUSED, lm_head=True)
    done = convert(source, None, recipe, fit=fitted(source, recipe, random_correction({"weight"})))
    (reason,) = result(done).left.values()
    assert "embedding" in reason


def test_of_several_layers_each_gets_its_own_shift(tmp_path):
    proto = model(
        f"two (float[t, {K}] x) => (float[t, {N}] y, float[t, {N}] z) {{ y = MatMul(x, a) z = MatMul(x, c) }}",
        a=np.eye(K, N, dtype=np.float32),
        c=np.eye(K, N, dtype=np.float32) * 2,
    )
    source = write(proto, tmp_path / "model.onnx")
    first, second = (site.name for site in find_sites(load(source)).sites)
    sites = {first: random_correction({"shift"}), second: random_correction({"shift"}, seed=9)}
    fit = Corrections(sites, model_sha256(source), FUSED.to_json(), "")
    done = convert(source, tmp_path / "sparse.onnx", FUSED, fit=fit)
    assert failed(source, done.out, X.astype(np.float32)) == []
    treatments = done.plan.treatments
    assert not np.array_equal(treatments[first].shift, treatments[second].shift)


@pytest.mark.parametrize("external", [False, True])
def test_new_weights_go_where_the_others_are(tmp_path, external):
    source = write(layer("MatMul")[0], tmp_path / "model.onnx", external)
    before = source.with_name("model.onnx.data").read_bytes() if external else b""
    correction = random_correction({"weight"})
    (tmp_path / "else").mkdir()
    for out in (tmp_path / "sparse.onnx", tmp_path / "else" / "sparse.onnx"):
        convert(source, out, FUSED, fit=fitted(source, FUSED, correction))
        assert out.with_name("sparse.onnx.data").exists() == external
        new = next(v for k, v in weights_of(onnx.load(out)).items() if k.endswith("/weight"))
        np.testing.assert_array_equal(new, correction.weight)
    assert not external or source.with_name("model.onnx.data").read_bytes() == before


@pytest.mark.parametrize(
    "flaw, said",
    [
        ({"weight": np.zeros((K, 3), np.float32)}, "of another model"),
        ({"bias": np.full(N, np.nan, np.float32)}, "not finite"),
        ({"low": (np.zeros((K, 2), np.float32), np.zeros((3, N), np.float32))}, "of another model"),
    ],
)
def test_corrections_that_do_not_fit_the_layer_are_refused(tmp_path, flaw, said):
    with pytest.raises(InputError, match=said):
        folded(tmp_path, layer("MatMul")[0], FUSED, Correction(**flaw))


@pytest.mark.parametrize(
    "change",
    [
        {"pattern": Pattern(2, 8)},
        {"patterns": (("other", Pattern(2, 8)),)},
        {"criterion": "wina"},
        {"share": "separate"},
        {"mitigations": ("bias",)},
        {"mitigations": ("var",)},
    ],
    ids=lambda c: next(iter(c)),
)
def test_another_recipe_is_refused(tmp_path, change):
    source = write(layer("MatMul")[0], tmp_path / "model.onnx")
    fit = fitted(source, FUSED, random_correction({"bias"}))
    with pytest.raises(UsageError, match=f"fitted for {next(iter(change))} "):
        convert(source, None, replace(FUSED, **change), fit=fit)


def test_another_model_is_refused(tmp_path):
    source = write(layer("MatMul")[0], tmp_path / "model.onnx")
    fit = fitted(source, FUSED, random_correction({"bias"}))
    with pytest.raises(UsageError, match="another model"):
        convert(write(layer("Gemm")[0], tmp_path / "other.onnx"), None, FUSED, fit=fit)


def test_a_mitigation_that_must_be_fitted_needs_its_file(tmp_path):
    source = write(layer("MatMul")[0], tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="nmonnx fit"):
        convert(source, None, replace(FUSED, mitigations=("least-squares",)))


@pytest.mark.parametrize(
    "names",
    [
        ("least-squares", "bias1"),
        ("output-scale", "static-var"),
        ("var", "static-var"),
        ("bias", "ls"),
        ("r-sparse", "least-squares"),
        ("l-pts", "s-pts"),
        ("l-pts", "s-pts-median"),
        ("d-pts", "l-pts"),
        ("d-pts", "distil"),
    ],
)
def test_mitigations_that_exclude_each_other_are_refused(names):
    with pytest.raises(UsageError, match="give one"):
        Recipe(mitigations=names)
