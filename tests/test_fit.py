"""`nmonnx fit`: what is fitted on which tokens, and the way from the text to the converted model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_llama
from small_models import mlp, write
from test_calibrate import TOKENS, WINDOW, activations
from test_cli import refused
from typer.testing import CliRunner

from nmonnx.cli import app
from nmonnx.convert import convert
from nmonnx.errors import UsageError
from nmonnx.fitting.fit import Fit, fit
from nmonnx.library import make_session
from nmonnx.models import build
from nmonnx.onnx_file.graph import load
from nmonnx.pattern import Pattern
from nmonnx.pruning.mitigations import CLOSED_FORM
from nmonnx.pruning.recipe import Recipe
from nmonnx.records.corrections import Corrections
from nmonnx.reference import prune
from nmonnx.sites import find_sites
from nmonnx.validate import validate

RECIPE = Recipe(pattern=Pattern(4, 8), kernel="fused", mitigations=("bias",))
HOW = Fit(window=WINDOW, threads=1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer decoder with a KV cache."""
    folder = tmp_path_factory.mktemp("llama")
    source = tiny_llama.write_folder(folder / "source", tiny_llama.CONFIG, tiny_llama.weights(tiny_llama.CONFIG))
    return build(source, folder / "built")


@pytest.fixture
def toy(tmp_path: Path) -> tuple[Path, list[dict[str, np.ndarray]]]:
    """An MLP, and feeds whose channels hang together, so that there is something to make up for."""
    rng = np.random.default_rng(4)
    mix = rng.standard_normal((4, 32))
    feeds = [{"x": (rng.standard_normal((1, 50, 4)) @ mix + 0.5).astype(np.float32)} for _ in range(10)]
    return write(mlp(), tmp_path / "model.onnx"), feeds


def test_first_tokens_and_held_out_windows_are_not_fitted_to(llama, tmp_path):
    found = fit(llama, RECIPE, tmp_path / "fit.npz", TOKENS, how=HOW)
    assert "the last 1 of 5 held out" in found.protocol
    seen = activations(llama, TOKENS)
    sites = {site.name: site for site in find_sites(load(llama)).sites}
    assert len(found.sites) >= 1
    for name, correction in found.sites.items():
        x = seen[name].reshape(-1, WINDOW, sites[name].k)[:4, 1:].reshape(-1, sites[name].k).astype(np.float64)
        share = 1 / (x**2).sum(axis=1)
        lost = share @ (x - prune(x, 4, 8)) @ sites[name].weight() / share.sum()
        np.testing.assert_allclose(correction.bias, lost, rtol=1e-3, atol=1e-5)


def test_every_layer_is_corrected_or_refused_with_a_reason(llama, tmp_path):
    found = fit(llama, RECIPE, tmp_path / "fit.npz", TOKENS, how=HOW)
    names = {site.name for site in find_sites(load(llama)).sites if site.role != "lm_head"}
    assert found.sites.keys() | found.refused.keys() == names
    assert not found.sites.keys() & found.refused.keys()
    assert all("would be" in reason for reason in found.refused.values())


def test_a_layer_that_is_pruned_but_was_not_fitted_is_told(llama, tmp_path):
    fit(llama, replace(RECIPE, include=("down",)), tmp_path / "fit.npz", TOKENS, how=HOW)
    done = convert(llama, tmp_path / "s.onnx", RECIPE, fit=Corrections.load(tmp_path / "fit.npz"))
    told = next(p for p in done.passes if p.name == "fold-corrections").left
    others = {r["name"] for r in done.records if r["status"] == "pruned" and r["role"] != "down"}
    assert others == {name for name, reason in told.items() if reason == "it was no part of the fit"}


def test_memory_changes_nothing_but_the_number_of_runs(toy, tmp_path):
    path, feeds = toy
    recipe = Recipe(pattern=Pattern(4, 8), mitigations=("least-squares",))
    totals = []
    for name, memory in (("one", 1 << 30), ("two", 1)):
        told: list[tuple[int, int]] = []
        how = Fit(memory=memory)
        fit(path, recipe, tmp_path / f"{name}.npz", feeds=feeds, how=how, progress=lambda *a, told=told: told.append(a))
        totals.append(told[-1])
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    assert totals == [(10, 10), (20, 20)]


def test_a_run_that_was_cut_short_goes_on_and_gives_the_same_file(toy, tmp_path):
    path, feeds = toy
    how = Fit(memory=1)
    fit(path, RECIPE, tmp_path / "whole.npz", feeds=feeds, how=how)
    told: list[int] = []

    def cut(done: int, total: int) -> None:
        told.append(done)
        if done == 13 and len(told) == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(path, RECIPE, tmp_path / "fit.npz", feeds=feeds, how=how, progress=cut)
    fit(path, RECIPE, tmp_path / "fit.npz", feeds=feeds, how=how, progress=cut)
    assert told[13] == 11  # the first group is there
    assert (tmp_path / "whole.npz").read_bytes() == (tmp_path / "fit.npz").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("kernel", ["fused", "prune"])
@pytest.mark.parametrize("name", [name for name in CLOSED_FORM if name != "static-var"])
def test_a_fit_folds_validates_and_brings_the_output_nearer(toy, tmp_path, name, kernel):
    path, feeds = toy
    recipe = Recipe(pattern=Pattern(4, 8), kernel=kernel, mitigations=(name,), rank=4)
    found = fit(path, recipe, tmp_path / "fit.npz", feeds=feeds)
    done = convert(path, tmp_path / "sparse.onnx", recipe, fit=found)
    plain = convert(path, tmp_path / "plain.onnx", Recipe(pattern=Pattern(4, 8), kernel=kernel))
    assert [c.detail for c in validate(path, done.out).checks if not c.passed] == []
    fold = next(p for p in done.passes if p.name == "fold-corrections")
    assert (fold.changed, fold.left) == (len(found.sites), found.refused)
    assert found.sites, found.refused
    want, before, after = (make_session(p).run(None, feeds[-1])[0] for p in (path, plain.out, done.out))
    if len(found.sites) == 2:
        assert np.linalg.norm(after - want) < np.linalg.norm(before - want)


def test_what_does_not_help_is_refused_with_the_figures(toy, tmp_path):
    path, feeds = toy
    recipe = Recipe(pattern=Pattern(4, 8), kernel="fused", mitigations=("static-var",))
    found = fit(path, recipe, tmp_path / "fit.npz", feeds=feeds)
    assert not found.sites
    assert all("held-out tokens would be 0." in reason for reason in found.refused.values())
    plain = convert(path, tmp_path / "plain.onnx", Recipe(pattern=Pattern(4, 8), kernel="fused"))
    done = convert(path, tmp_path / "sparse.onnx", recipe, fit=found)
    a, b = (make_session(p.out).run(None, feeds[0])[0] for p in (plain, done))
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"ridge": 0.0}, "above 0"),
        ({"ridge": float("nan")}, "above 0"),
        ({"hold_out": 1.0}, "between 0 and 1"),
        ({"window": 1}, "at least 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, said):
    with pytest.raises(UsageError, match=said):
        Fit(**change)


def test_what_cannot_be_fitted_is_refused(toy, llama, tmp_path):
    path, feeds = toy
    out = tmp_path / "fit.npz"
    with pytest.raises(UsageError, match="one of them"):
        fit(path, RECIPE, out)
    with pytest.raises(UsageError, match="no mitigation to fit"):
        fit(path, Recipe(), out, feeds=feeds)
    with pytest.raises(UsageError, match="too few"):
        fit(path, RECIPE, out, feeds=feeds[:1])
    with pytest.raises(UsageError, match="give --text"):
        fit(path, Recipe(mitigations=("l-pts",)), out, feeds=feeds)
    sparse = convert(path, tmp_path / "sparse.onnx", Recipe(pattern=Pattern(4, 8), kernel="fused")).out
    with pytest.raises(UsageError, match="converted already"):
        fit(sparse, RECIPE, out, feeds=feeds)
    assert not out.exists()


def test_from_the_command_line_to_a_valid_model(toy, tmp_path):
    path, feeds = toy
    for i, feed in enumerate(feeds[:4]):
        np.savez(tmp_path / f"feed{i}.npz", **feed)
    given = [a for i in range(4) for a in ("--feeds", tmp_path / f"feed{i}.npz")]
    said = command("fit", path, "-p", "4:8", "--mitigation", "bias", *given, "--report", tmp_path / "r.json")
    assert "layers corrected; bias" in said
    found, sparse = tmp_path / "model-fit.npz", tmp_path / "sparse.onnx"
    said = command("convert", path, "--fit", found, "-o", sparse)
    assert "Corrections folded" in said and "pruned to 4:8" in said
    assert [c.detail for c in validate(path, sparse).checks if not c.passed] == []
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report["corrected"]) == Corrections.load(found).sites.keys()
    assert "fitted for pattern 4:8" in refused(tmp_path, 2, "convert", path, "-p", "2:8", "--fit", found)


def command(*arguments: object) -> str:
    run = CliRunner().invoke(app, list(map(str, arguments)))
    assert run.exit_code == 0, (run.output, run.exception)
    return run.output
