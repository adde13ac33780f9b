"""Criteria, orders, shifts and mixed patterns in whole models: against numpy, the fallback functions and validation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from small_models import mlp, model, weights, write

from nmonnx.convert import Conversion, convert
from nmonnx.errors import UsageError
from nmonnx.feeds import Feed
from nmonnx.library import make_session
from nmonnx.onnx_file.graph import load
from nmonnx.onnx_file.identity import model_sha256
from nmonnx.passes.behind import product_with
from nmonnx.pattern import Pattern
from nmonnx.pruning.recipe import Recipe
from nmonnx.records.stats import Seen, Stats
from nmonnx.sites import Site, find_sites
from nmonnx.validate import validate

ZOO = Path(__file__).parent.parent.parent / "shared" / "zoo"

BAKED = ("mixtral-ts-fp32", "gptoss-ts-fp32")

BASE = Recipe(pattern=Pattern(4, 8), kernel="fused")
RECIPES = {
    "wina": replace(BASE, criterion="wina"),
    "amber separate": replace(BASE, criterion="amber", share="separate"),
    "pcs": replace(BASE, criterion="pcs"),
    "order": replace(BASE, order="deal"),
    "s-pts": replace(BASE, mitigations=("s-pts",)),
    "s-pts-scalar": replace(BASE, mitigations=("s-pts-scalar",)),
    **{name: replace(BASE, mitigations=(name,)) for name in ("s-pts-median", "s-pts-mode", "s-pts-scalar-mode")},
    "s-pts prune only": replace(BASE, mitigations=("s-pts", "var"), kernel="prune"),
    "d-pts": replace(BASE, mitigations=("d-pts",)),
    "d-pts-mean var": replace(BASE, mitigations=("d-pts-mean", "var"), criterion="wina"),
    "d-pts prune only": replace(BASE, mitigations=("d-pts",), kernel="prune"),
    "d-pts-mean var prune only": replace(BASE, mitigations=("d-pts-mean", "var"), kernel="prune", share="separate"),
    "var": replace(BASE, mitigations=("var",)),
    "var prune only": replace(BASE, mitigations=("var",), kernel="prune"),
    "all": replace(BASE, criterion="sqrt-wina", order="deal", mitigations=("s-pts", "var"), share="separate"),
    "prune only": replace(BASE, criterion="wina", order="deal", kernel="prune"),
}


def stats_of(path: Path, seed: int = 0) -> Stats:
    """Statistics as if from calibration, of random activations."""
    rng = np.random.default_rng(seed)

    def seen(k: int) -> Seen:
        x = (rng.standard_normal((64, k)) * rng.uniform(0.1, 4, k) + rng.standard_normal(k)).astype(np.float32)
        rms = np.sqrt(np.square(x).mean(axis=0))
        return Seen(64, x.mean(axis=0), rms, np.abs(x).max(axis=0), float(np.median(x)), x.astype(np.float16))

    return Stats({site.name: seen(site.k) for site in find_sites(load(path)).sites}, model_sha256(path), "random")


def branches() -> onnx.ModelProto:
    """Two layers on one activation, one of them with a bias; one weight has two readers, one bias too."""
    return model(
        """branches (float[t, 32] x) => (float[t, 24] y, float[t, 24] z, float[24] kept) {
            a = Gemm(x, w, bias)
            b = MatMul(x, v)
            y = Add(a, b)
            c = Tanh(y)
            d = MatMul(c, s)
            e = Sin(y)
            z = Gemm(e, s, bias)
            kept = Identity(bias)
        }""",
        w=weights(32, 24, seed=3),
        v=weights(32, 24, seed=4),
        s=weights(24, 24, seed=5),
        bias=weights(24, seed=6),
    )


def converted(tmp_path: Path, proto: onnx.ModelProto, recipe: Recipe) -> tuple[Path, Path, Conversion]:
    source = write(proto, tmp_path / "model.onnx")
    stats = stats_of(source) if recipe.needs else None
    done = convert(source, tmp_path / "sparse.onnx", recipe, stats=stats)
    assert done.out is not None
    return source, done.out, done


def kept(x: np.ndarray, done: Conversion, site: str) -> np.ndarray:
    """What a layer computes with, token by token and group by group: eta + nu * pruned (x - eta), where eta is the
    shift or the center of the token."""
    treatment = done.plan.treatments[site]
    n, m = treatment.pattern.n, treatment.pattern.m
    k = x.shape[-1]
    scale = np.ones(k) if treatment.scale is None else treatment.scale
    shift = np.zeros(k) if treatment.shift is None else np.broadcast_to(treatment.shift, k)
    order = np.arange(k) if treatment.order is None else treatment.order
    out = np.zeros(x.shape)
    for row, token in zip(out, x, strict=True):
        if treatment.center:
            shift = np.full(k, token.mean() if treatment.center == "mean" else np.sort(token)[(k - 1) // 2])
        score = np.abs(token - shift) * scale
        for start in range(0, k, m):
            group = order[start : start + m]
            best = group[np.argsort(-score[group], kind="stable")[:n]]
            row[best] = (token - shift)[best]
        if treatment.variance and row.var() > 0:
            row *= min((token - shift).std() / row.std(), 4)
        row += shift
    return out


@pytest.mark.parametrize("library", [True, False], ids=["kernel", "fallback"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_converted_model_computes_what_the_formulas_say(tmp_path: Path, name: str, library: bool) -> None:
    source, out, done = converted(tmp_path, mlp(), RECIPES[name])
    up, down = (onnx.numpy_helper.to_array(t).astype(np.float64) for t in onnx.load(source).graph.initializer)
    x = np.random.default_rng(7).standard_normal((5, 32)).astype(np.float32)
    first, second = (site.name for site in done.selection.chosen)
    hidden = np.maximum(kept(x, done, first) @ up, 0)
    want = kept(hidden.astype(np.float32), done, second) @ down
    got = make_session(out, library=library).run(None, {"x": x[None]})[0][0]
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_shared_weights_and_biases_stay_and_validation_agrees(tmp_path: Path, name: str) -> None:
    source, out, _ = converted(tmp_path, branches(), RECIPES[name])
    report = validate(source, out, feeds=[Feed("x", {"x": weights(9, 32, seed=8)})])
    assert [c.name for c in report.checks if not c.passed] == []
    feed = {"x": weights(9, 32, seed=9)}
    before, after = (make_session(path).run(["kept"], feed)[0] for path in (source, out))
    assert before.tobytes() == after.tobytes()


@pytest.mark.parametrize("name", ["s-pts", "s-pts-scalar", "all"])
def test_a_shift_is_made_up_for_exactly_when_every_channel_is_kept(tmp_path: Path, name: str) -> None:
    source, out, _ = converted(tmp_path, branches(), replace(RECIPES[name], pattern=Pattern(8, 8)))
    feed = {"x": weights(9, 32, seed=10)}
    for dense, sparse in zip(*(make_session(path).run(None, feed) for path in (source, out)), strict=True):
        np.testing.assert_allclose(sparse, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["s-pts", "d-pts"])
def test_a_layer_that_cannot_be_fused_is_made_up_for_behind_it(tmp_path: Path, name: str) -> None:
    """Its weight is stored as [N, K] and has another reader, so no repacked copy is made."""
    proto = model(
        """left (float[t, 32] x) => (float[t, 24] y, float[t, 24] z, float[24, 32] w_out, float[24, 32] v_out) {
            y = Gemm <alpha = 0.5, transB = 1> (x, w)
            vt = Transpose <perm = [1, 0]> (v)
            z = MatMul(x, vt)
            w_out = Sin(w)
            v_out = Sin(v)
        }""",
        w=weights(24, 32, seed=1),
        v=weights(24, 32, seed=2),
    )
    source, out, done = converted(tmp_path, proto, RECIPES[name])
    assert [p.left for p in done.passes if p.name.startswith("fold")] == [{}, {}, {}]
    feed = {"x": weights(4, 32)}
    report = validate(source, out, feeds=[Feed("x", feed)])
    assert [c.name for c in report.checks if not c.passed] == []
    w, v = (onnx.numpy_helper.to_array(t).T for t in proto.graph.initializer)
    first, second = (site.name for site in done.selection.chosen)
    y, z = make_session(out).run(["y", "z"], feed)
    np.testing.assert_allclose(y, 0.5 * kept(feed["x"], done, first) @ w, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(z, kept(feed["x"], done, second) @ v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kernel", "told"), [("fused", {"y"}), ("prune", {"y", "z"})])
@pytest.mark.parametrize("name", ["s-pts", "d-pts"])
def test_where_it_cannot_be_made_up_for_every_layer_of_the_prune_stays_unmoved_and_is_told(
    tmp_path: Path, name: str, kernel: str, told: set[str]
) -> None:
    proto = model(
        """shared (float[t, 32] x) => (float[t, 24] y, float[t, 24] z) {
            y = com.microsoft.GemmFastGelu(x, w)
            z = MatMul(x, v)
        }""",
        w=weights(32, 24, seed=1),
        v=weights(32, 24, seed=2),
    )
    _, out, done = converted(tmp_path, proto, replace(RECIPES[name], kernel=kernel))
    fold = next(p for p in done.passes if p.left and p.name.startswith("fold"))
    assert set(fold.left) == told
    assert all("GemmFastGelu" in reason for reason in fold.left.values())
    ops = {node.output[0]: node for node in onnx.load(out).graph.node if node.domain == "ai.nmonnx"}
    moved = {name for name, node in ops.items() if any(a.name == "center" and a.i for a in node.attribute)}
    moved |= {name for name, node in ops.items() if any(i.endswith("/shift") for i in node.input)}
    assert moved == {"z"} - told


def test_a_constant_that_was_changed_after_the_conversion_is_seen(tmp_path: Path) -> None:
    source, out, _ = converted(tmp_path, mlp(), RECIPES["wina"])
    proto = onnx.load(out)
    scale = next(t for t in proto.graph.initializer if t.name.endswith("/scale"))
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(0.5), scale.name))
    onnx.save(proto, out)
    report = validate(source, out, feeds=[Feed("x", {"x": weights(1, 4, 32)})])
    assert any("is new and does something" in c.detail for c in report.checks if not c.passed)


@pytest.mark.parametrize("kernel", ["fused", "prune"])
@pytest.mark.parametrize(
    ("name", "check"),
    [("s-pts", "folded biases make up for the shift"), ("d-pts", "row sums make up for the center")],
)
@pytest.mark.parametrize("proto", [mlp(), branches()], ids=["mlp", "branches"])
def test_a_fold_that_is_wrong_is_seen_as_such(
    tmp_path: Path, proto: onnx.ModelProto, name: str, check: str, kernel: str, monkeypatch
) -> None:
    """What makes up for it has the wrong sign; hashes and claims are all in order."""
    for place in ("fold_shift", "fold_center"):
        monkeypatch.setattr(f"nmonnx.passes.{place}.product_with", lambda *given: -product_with(*given))
    source, out, _ = converted(tmp_path, proto, replace(RECIPES[name], kernel=kernel))
    report = validate(source, out)
    assert [c.name for c in report.checks if not c.passed] == [check]


def test_plain_magnitude_reads_no_weight(tmp_path: Path, monkeypatch) -> None:
    def read(self):  # type: ignore[no-untyped-def]
        raise AssertionError(f"the weight of {self.name} was read")

    monkeypatch.setattr(Site, "weight", read)
    source = write(mlp(), tmp_path / "model.onnx")
    convert(source, tmp_path / "act.onnx", BASE)
    with pytest.raises(AssertionError, match="was read"):
        convert(source, tmp_path / "wina.onnx", RECIPES["wina"])


def test_patterns_of_single_layers(tmp_path: Path) -> None:
    recipe = Recipe.from_dict({"pattern": "4:8", "patterns": {"*down*": "6:8"}, "kernel": "fused"})
    assert Recipe.from_dict(__import__("json").loads(recipe.to_json())) == recipe
    source, out, done = converted(tmp_path, mlp(), recipe)
    assert [r["pattern"] for r in done.records] == ["4:8", "6:8"]
    report = validate(source, out, feeds=[Feed("x", {"x": weights(1, 4, 32)})])
    assert all(c.passed for c in report.checks)


def test_a_vector_of_ones_own(tmp_path: Path) -> None:
    source = write(mlp(), tmp_path / "model.onnx")
    names = {site.name: site.k for site in find_sites(load(source)).sites}
    np.savez(tmp_path / "c.npz", **{name: np.arange(1, k + 1, dtype=np.float32) for name, k in names.items()})
    done = convert(source, tmp_path / "own.onnx", replace(BASE, criterion=str(tmp_path / "c.npz")))
    for name, k in names.items():
        np.testing.assert_allclose(done.plan.treatments[name].scale, np.arange(1, k + 1) / k, rtol=1e-6)
    np.savez(tmp_path / "c.npz", other=np.ones(3))
    with pytest.raises(UsageError, match="it must hold"):
        convert(source, tmp_path / "own2.onnx", replace(BASE, criterion=str(tmp_path / "c.npz")))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"criterion": "best"}, "criterion 'best' is not one of act"),
        ({"mitigations": ["s-pts", "s-pts-scalar"]}, "two choices of one shift"),
        ({"mitigations": ["d-pts", "s-pts-mode"]}, "d-pts and s-pts-mode exclude each other"),
        ({"mitigations": ["d-pts", "d-pts-mean"]}, "two choices of one shift"),
        ({"patterns": {"q": "4:8"}, "allocate": "forward"}, "exclude each other"),
        ({"patterns": ["4:8"]}, "must map selectors to patterns"),
    ],
)
def test_recipes_that_do_not_compose_are_refused(data: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Recipe.from_dict(data)


def test_what_the_recipe_needs_is_asked_for(tmp_path: Path) -> None:
    source = write(mlp(), tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="needs --stats"):
        convert(source, None, replace(BASE, order="deal"))
    foreign = replace(stats_of(source), source="0" * 64)
    with pytest.raises(UsageError, match="measured on another model than"):
        convert(source, None, replace(BASE, order="deal"), stats=foreign)


def test_a_layer_that_calibration_could_not_see_is_pruned_by_magnitude_and_told(tmp_path: Path) -> None:
    source = write(mlp(), tmp_path / "model.onnx")
    stats = stats_of(source)
    first, second = stats.seen
    partial = Stats({first: stats.of(first)}, stats.source, "partial", {second: "inside a function"})
    recipe = RECIPES["all"]
    done = convert(source, tmp_path / "sparse.onnx", recipe, stats=partial)
    assert done.plan.plain == {second: "no statistics, inside a function"}
    assert done.plan.treatments[first].order is not None
    assert done.plan.treatments[second].constants() == {}


@pytest.mark.skipif(not ZOO.is_dir(), reason="the zoo of exported graphs is not beside this checkout")
@pytest.mark.parametrize("path", sorted(ZOO.rglob("*.onnx"))[::9], ids=lambda p: p.stem)
def test_the_zoo_with_every_constant(tmp_path: Path, path: Path) -> None:
    recipe = replace(RECIPES["all"], kernel="auto", pattern=Pattern(8, 16))
    if path.parent.name in BAKED:
        pytest.skip("its trace fixed which tokens go to which expert, so it runs with no other activations")
    try:
        convert(path, tmp_path / "act.onnx", Recipe())
    except UsageError:
        pytest.skip("nothing to prune in it")
    convert(path, tmp_path / "all.onnx", recipe, stats=stats_of(path))
    plain, report = (validate(path, tmp_path / name) for name in ("act.onnx", "all.onnx"))
    failed = {c.name: c.detail for c in report.checks if not c.passed}
    assert failed.keys() <= {c.name for c in plain.checks if not c.passed}, failed
