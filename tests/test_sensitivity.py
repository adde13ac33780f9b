"""Sensitivity: every number equals that of a model converted by hand; what is interrupted goes on."""

from __future__ import annotations

import glob
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_cli import nmonnx
from tiny_llama import CONFIG, Runner, weights, write_folder

from nmonnx.calibration.sensitivity import Sensitivity, measure
from nmonnx.convert import convert
from nmonnx.errors import InputError, RunError, UsageError
from nmonnx.models import build
from nmonnx.pattern import Pattern
from nmonnx.pruning.recipe import Recipe

TOKENS = np.random.default_rng(3).integers(0, CONFIG["vocab_size"], 100)
RECIPE = Recipe(Pattern(4, 16))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sensitivity")
    write_folder(folder / "source", CONFIG, weights(CONFIG))
    build(folder / "source", folder / "model")
    return folder / "model" / "model.onnx"


@pytest.fixture(scope="module")
def done(model: Path) -> Sensitivity:
    return measure(model, RECIPE, TOKENS, window=40, windows=2, threads=1)


def log_p(path: Path, rows: np.ndarray) -> np.ndarray:
    """Log-probabilities [W, T, V] in float64, from ONNX Runtime without the library."""
    logits = np.concatenate([Runner(path)(row[None]) for row in rows]).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def loss(predictions: np.ndarray, rows: np.ndarray) -> float:
    return -float(np.take_along_axis(predictions[:, :-1], rows[:, 1:, None], axis=-1).mean())


def test_each_number_is_that_of_a_model_with_only_these_layers_converted(model, done, tmp_path):
    rows = TOKENS[:80].reshape(2, 40)
    folder = shutil.copytree(model.parent, tmp_path / "copy")
    dense = log_p(model, rows)
    assert [len(g.group) for g in done.groups()] == [3, 1, 2, 1] * 2
    for group in done.groups():
        names = tuple(glob.escape(name) for name in group.group)
        sparse = convert(folder / "model.onnx", folder / "some.onnx", replace(RECIPE, include=names), True).out
        assert sparse
        pruned = log_p(sparse, rows)
        kl = (np.exp(dense) * (dense - pruned)).sum(axis=-1).mean()
        assert kl > 1e-4
        assert group.kl == pytest.approx(kl, rel=1e-3)
        assert group.nll == pytest.approx(loss(pruned, rows) - loss(dense, rows), abs=1e-5)


def test_every_layer_that_convert_would_prune_is_there(model, done):
    pruned = [r for r in convert(model, None, RECIPE).records if r["status"] == "pruned"]
    assert [(name, s.role, s.block, s.k, s.n) for name, s in done.sites.items()] == [
        (r["name"], r["role"], r["block"], r["k"], r["n"]) for r in pruned
    ]
    assert all(done.sites[other].group == site.group for site in done.sites.values() for other in site.group)
    assert set(done.by_role()) == {"q, k, v", "o", "gate, up", "down"}
    count, kl, nll = done.by_role()["gate, up"]
    gates = [s for s in done.sites.values() if s.role == "gate"]
    assert (count, kl, nll) == (2, pytest.approx(sum(s.kl for s in gates)), pytest.approx(sum(s.nll for s in gates)))


def test_keeping_every_channel_costs_nothing(model):
    done = measure(model, Recipe(Pattern(16, 16)), TOKENS, window=40, windows=1, threads=1)
    assert all(abs(s.kl) < 1e-7 and abs(s.nll) < 1e-6 for s in done.sites.values())


def test_the_selection_of_the_recipe_holds(model, done):
    some = measure(model, replace(RECIPE, include=("v", "lm_head"), exclude=("block:0",)), TOKENS, 40, 2, threads=1)
    assert [(s.role, s.block, len(s.group)) for s in some.sites.values()] == [("v", 1, 1), ("lm_head", None, 1)]
    assert 0 < next(iter(some.sites.values())).kl < next(s.kl for s in done.sites.values() if s.role == "v" and s.block)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_enough(model, done):
    model.parent.chmod(0o500)
    try:
        assert measure(model, RECIPE, TOKENS, 40, 2, threads=1) == done
    finally:
        model.parent.chmod(0o700)


def test_nothing_is_written_beside_the_model(model, done):
    assert not [f.name for f in model.parent.iterdir() if f.name.startswith("model-") or "partial" in f.name]


def test_an_interrupted_run_goes_on_and_gives_the_same_file(model, done, tmp_path):
    checkpoint, steps = tmp_path / "s.partial.json", []

    def crash(count: int, total: int) -> None:
        if count == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(model, RECIPE, TOKENS, 40, 2, 1, checkpoint, crash)
    assert len(json.loads(checkpoint.read_text())["groups"]) == 3
    again = measure(model, RECIPE, TOKENS, 40, 2, 1, checkpoint, lambda *step: steps.append(step))
    assert steps == [(count, 8) for count in range(3, 9)]
    for result, name in ((done, "a.json"), (again, "b.json")):
        result.save(tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert Sensitivity.load(tmp_path / "a.json") == done


@pytest.mark.parametrize("change", ["pattern", "tokens", "window", "weights", "damage"])
def test_a_checkpoint_of_something_else_is_not_used(model, tmp_path, change):
    folder = shutil.copytree(model.parent, tmp_path / "copy")
    checkpoint, one = tmp_path / "s.partial.json", replace(RECIPE, include=("o",))
    measure(folder / "model.onnx", one, TOKENS, 20, 1, 1, checkpoint)
    recipe, tokens, window, steps = one, TOKENS, 20, []
    if change == "pattern":
        recipe = replace(one, pattern=Pattern(8, 16))
    elif change == "tokens":
        tokens = TOKENS[1:]
    elif change == "window":
        window = 21
    elif change == "weights":
        os.utime(folder / "model.onnx.data", (1, 1))
    else:
        checkpoint.write_text(checkpoint.read_text()[:-5])
    measure(folder / "model.onnx", recipe, tokens, window, 1, 1, checkpoint, lambda *step: steps.append(step))
    assert steps[0] == (0, 2)


def damaged(good: str) -> dict[str, str]:
    def edit(**changes: object) -> str:
        return json.dumps(json.loads(good) | changes)

    name, site = next(iter(json.loads(good)["sites"].items()))
    return {
        "is not JSON or is damaged": good[:-9],
        "is not a file of": "[1]",
        "is not a file of ": '{"schema_version": 1}',
        "this release reads 1": edit(schema_version=2),
        "pattern": edit(pattern="8"),
        "should be text": edit(source=None),
        "finite number": edit(sites={name: site | {"kl": "high"}}),
        "finite number ": edit(sites={name: site | {"kl": float("nan")}}).replace("NaN", "NaN "),
        "not measured": edit(sites={name: site}),
        "own group": edit(sites={name: site | {"group": []}}),
        "whole numbers": edit(sites={name: site | {"k": 6.5}}),
        "damaged": edit(sites=[]),
    }


def test_a_file_that_is_something_else_is_refused_in_one_sentence(done, tmp_path):
    file = tmp_path / "s.json"
    with pytest.raises(InputError, match="cannot be read"):
        Sensitivity.load(file)
    for words, text in damaged(done.to_json()).items():
        file.write_text(text)
        with pytest.raises(InputError, match=words.strip()) as refusal:
            Sensitivity.load(file)
        assert len(str(refusal.value).splitlines()) == 1
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is not JSON"):
        Sensitivity.load(file)


def test_what_cannot_be_measured_is_refused(model, tmp_path):
    with pytest.raises(InputError, match="knows ids below 512"):
        measure(model, RECIPE, TOKENS + 500, 40)
    with pytest.raises(UsageError, match="at least one"):
        measure(model, RECIPE, TOKENS, 40, 0)
    with pytest.raises(UsageError, match="matches no linear layer"):
        measure(model, replace(RECIPE, include=("nothing",)), TOKENS)
    folder = shutil.copytree(model.parent, tmp_path / "copy")
    convert(folder / "model.onnx", folder / "sparse.onnx", RECIPE)
    with pytest.raises(UsageError, match="converted already"):
        measure(folder / "sparse.onnx", RECIPE, TOKENS)


def test_a_model_that_gives_nan_is_refused(tmp_path):
    tensors = weights(CONFIG)
    tensors["model.norm.weight"][:] = np.nan
    build(write_folder(tmp_path / "source", CONFIG, tensors), tmp_path / "model")
    with pytest.raises(RunError, match="NaN"):
        measure(tmp_path / "model" / "model.onnx", RECIPE, TOKENS, 40)


def test_the_command_writes_the_file_and_tells_what_costs_most(shared, tmp_path):
    if not (shared / "models" / "stories260K").is_dir():
        pytest.skip("the model stories260K is not there")
    build(shared / "models" / "stories260K", tmp_path)
    (tmp_path / "t.txt").write_text("Once upon a time there was a little girl who had a red ball. " * 20)
    arguments = ("sensitivity", "model.onnx", "--text", "t.txt", "--window", 64, "--threads", 1, "-o", "s.json")
    run = nmonnx(*arguments, "--report", "r.json", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert "Sums by role" in run.stdout and "gate, up" in run.stdout
    found = Sensitivity.load(tmp_path / "s.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert [g["kl"] for g in report["groups"]] == sorted((g.kl for g in found.groups()), reverse=True)
    assert not list(tmp_path.glob("*.partial.json"))
    again = nmonnx(*arguments, cwd=tmp_path)
    assert again.returncode == 2 and "--overwrite" in again.stderr
    quiet = nmonnx(*arguments, "--overwrite", "--quiet", "--include", "block:0", cwd=tmp_path)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    assert nmonnx(*arguments[:-1], "s.txt", cwd=tmp_path).returncode == 2
    assert nmonnx(*arguments[:-1], "no/s.json", cwd=tmp_path).returncode == 2
