"""A sweep: the same results on every backend and as `evaluate`'s, each written once, also when it is killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import nmonnx

from nmonnx.convert import convert
from nmonnx.errors import InputError, UsageError
from nmonnx.evaluation.evaluate import evaluate
from nmonnx.fitting.fit import Fit, fit
from nmonnx.inference.text import encode, load_tokenizer
from nmonnx.models import build
from nmonnx.pruning.recipe import Recipe
from nmonnx.sweeps.grid import Grid
from nmonnx.sweeps.pareto import compare
from nmonnx.sweeps.sweep import Measured, kept_shares, sweep_folder

CUT = ("--window", 16, "--windows", 2, "--threads", 1)
FORTY = (
    *("--patterns", "2:4,4:8,8:16,16:32", "--criteria", "act,amber,wina,sqrt-wina,amber-code"),
    *("--mitigations", "none,var", "--text", "t.txt", *CUT, "--jobs", 2),
)


@pytest.fixture(scope="module")
def folder(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (shared / "models" / "stories260K").is_dir():
        pytest.skip("the model stories260K is not there")
    folder = tmp_path_factory.mktemp("sweep")
    build(shared / "models" / "stories260K", folder)
    (folder / "t.txt").write_text("Once upon a time there was a little girl who had a red ball. " * 5)
    return folder


def results(folder: Path) -> dict[str, dict]:
    return {p.name: json.loads(p.read_text()) for p in (folder / "results").glob("*.json")}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (folder / "results").glob("*.json")}


def workers_of(group: int) -> list[str]:
    """Processes of a group that are not dead."""
    found = subprocess.run(["ps", "-eo", "pgid=,stat=,pid="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in found.splitlines()]
    return [pid for pgid, state, pid in rows if int(pgid) == group and not state.startswith("Z")]


@pytest.fixture(scope="module")
def killed(folder: Path) -> tuple[Path, dict[str, tuple[int, int]]]:
    """A sweep over loky that was killed in the middle and started again; what was there when it was killed."""
    pytest.importorskip("joblib")
    arguments = [sys.executable, "-m", "nmonnx.cli", "sweep", "model.onnx", *map(str, FORTY), "-o", "loky"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    quiet = subprocess.DEVNULL
    run = subprocess.Popen(arguments, cwd=folder, env=env, stdout=quiet, stderr=quiet, start_new_session=True)
    while run.poll() is None and len(list(folder.glob("loky/results/*.json"))) < 10:
        time.sleep(0.02)
    before = stamps(folder / "loky")
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    for _ in range(50):  # its workers end by themselves
        if not workers_of(run.pid):
            break
        time.sleep(0.2)
    assert not workers_of(run.pid)
    again = nmonnx("sweep", "model.onnx", *FORTY, "-o", "loky", cwd=folder)
    assert again.returncode == 0, again.stderr
    return folder / "loky", before


def test_a_killed_sweep_goes_on_and_writes_each_result_once(killed):
    done, before = killed
    after = stamps(done)
    assert 10 <= len(before) < 41 and len(after) == 41  # the dense model is one
    assert {name: after[name] for name in before} == before
    assert not list((done / "work").iterdir())
    assert not list((done / "results").glob(".*"))


def test_a_finished_sweep_runs_nothing(killed, folder):
    done, _ = killed
    before = stamps(done)
    again = nmonnx("sweep", "model.onnx", *FORTY, "-o", "loky", "--report", "loky/r.md", cwd=folder)
    assert again.returncode == 0 and stamps(done) == before
    assert "40 recipes" in (done / "r.md").read_text()


def test_a_dask_scheduler_with_two_workers_gives_the_same(killed, folder):
    pytest.importorskip("distributed")
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster:
        where = ("--backend", "dask", "--scheduler", cluster.scheduler_address)
        run = nmonnx("sweep", "model.onnx", *FORTY, *where, "-o", "dask", cwd=folder)
    assert run.returncode == 0, run.stderr
    assert results(folder / "dask") == results(killed[0])
    assert (folder / "dask" / "results.csv").read_text() == (killed[0] / "results.csv").read_text()


def test_a_sweep_measures_what_evaluate_measures(folder):
    arguments = ("--patterns", "8:16,2:4", "--text", "t.txt", *CUT)
    run = nmonnx("sweep", "model.onnx", *arguments, "-o", "pair", cwd=folder)
    assert run.returncode == 0, run.stderr
    convert(folder / "model.onnx", folder / "s.onnx", Recipe.from_dict({"pattern": "8:16"}, "test"), overwrite=True)
    tokens = encode(load_tokenizer(folder), (folder / "t.txt").read_text())
    models = [folder / "model.onnx", folder / "s.onnx"]
    score = evaluate(models, tokens, 16, max_windows=2, threads=1).models[1].text
    row = next(r for r in csv.DictReader((folder / "pair" / "results.csv").open()) if r["recipe"] == "8:16")
    assert score is not None
    assert float(row["ppl"]) == score.perplexity.ppl
    assert float(row["difference"]) == score.difference
    assert float(row["difference_error"]) == score.difference_error


def test_what_is_fitted_is_fitted_for_each_recipe(folder):
    grid = ("--mitigations", "none,bias,bias+output-scale", "--patterns", "4:8", "--text", "t.txt", *CUT)
    run = nmonnx("sweep", "model.onnx", *grid, "-o", "fitted", cwd=folder)
    assert run.returncode == 0 and "Not run, 4:8 bias: needs --fit-text" in run.stdout
    run = nmonnx("sweep", "model.onnx", *grid, "--fit-text", "t.txt", "-o", "fitted", cwd=folder)
    assert run.returncode == 0, run.stderr
    found = {r["recipe"]: float(r["difference"]) for r in csv.DictReader((folder / "fitted" / "results.csv").open())}
    assert list(found) == sorted(found, key=found.__getitem__) and len(set(found.values())) == 3
    recipe = Recipe.from_dict({"pattern": "4:8", "mitigations": ["bias"]}, "test")
    tokens = encode(load_tokenizer(folder), (folder / "t.txt").read_text())
    fix = fit(folder / "model.onnx", recipe, folder / "fix.npz", tokens, how=Fit(16, threads=1))
    convert(folder / "model.onnx", folder / "s.onnx", recipe, overwrite=True, fit=fix)
    score = evaluate([folder / "model.onnx", folder / "s.onnx"], tokens, 16, max_windows=2, threads=1).models[1].text
    assert score is not None and found["4:8 bias"] == score.difference


def test_the_search_finds_the_cheapest_within_the_budget(folder):
    text = ("--text", "t.txt", "--tokenizer", "tokenizer.json", "--threads", 1)
    assert nmonnx("calibrate", "model.onnx", *text, "--window", 16, "-o", "stats.npz", cwd=folder).returncode == 0
    weigh = ("sensitivity", "model.onnx", *text, "--window", 16, "--windows", 1, "-o", "sens.json")
    assert nmonnx(*weigh, cwd=folder).returncode == 0
    files = ("--stats", "stats.npz", "--sensitivity", "sens.json")
    arguments = ("sweep", "model.onnx", "--text", "t.txt", *CUT, *files, "--budget-loss", 0.2, "-o", "search")
    run = nmonnx(*arguments, cwd=folder)
    assert run.returncode == 0, run.stderr
    assert "Cheapest within 0.2000 nats" in run.stdout
    before = stamps(folder / "search")
    assert nmonnx(*arguments, cwd=folder).stdout == run.stdout and stamps(folder / "search") == before
    rows = list(csv.DictReader((folder / "search" / "results.csv").open()))
    fits = [row for row in rows if float(row["difference"]) <= 0.2]
    cheapest = min(fits, key=lambda row: float(row["kept"]))
    assert float(cheapest["kept"]) < 1
    # the answer is a recipe file of `convert`, and measures what was claimed
    out = nmonnx("convert", "model.onnx", "-c", "search/recipe.yaml", "-o", "a.onnx", "--overwrite", cwd=folder)
    assert out.returncode == 0, out.stderr
    tokens = encode(load_tokenizer(folder), (folder / "t.txt").read_text())
    score = evaluate([folder / "model.onnx", folder / "a.onnx"], tokens, 16, max_windows=2, threads=1).models[1].text
    assert score is not None and score.difference == float(cheapest["difference"])


def test_a_grid_lists_what_cannot_be_and_names_each_recipe_once():
    grid = Grid(["8:16", "8:16", 496, "9:8"], mitigations=["none", "s-pts", "s-pts+s-pts-scalar"], criteria=["act"])
    recipes, impossible = grid.build()
    assert list(recipes) == ["8:16"]
    assert impossible["8:16 s-pts"] == "needs --stats"
    assert "two choices" in impossible["8:16 s-pts+s-pts-scalar"]
    assert "9:8" in impossible
    assert list(grid.build(["stats"])[0]) == ["8:16", "8:16 s-pts"]


def test_a_grid_file_and_flags(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("patterns: [8:16, 2:4]\nbase: {include: [down]}\nrecipes: [{pattern: 4:8, mitigations: [var]}]\n")
    recipes, _ = Grid.read(file, {"criteria": ["act", "amber"]}).build()
    assert list(recipes) == ["8:16", "8:16 amber", "2:4", "2:4 amber", "4:8 recipe 1"]
    assert all(recipe.include == ("down",) for recipe in recipes.values())
    file.write_text("patterns: [8:16]\n  base: {}\n")
    with pytest.raises(InputError, match=r"grid\.yaml, line 2 cannot be read: expected"):
        Grid.read(file, {})
    file.write_text("pattern: 8:16\n")
    with pytest.raises(UsageError, match="unknown key 'pattern'"):
        Grid.read(file, {})


def test_the_front_holds_what_nothing_dominates():
    def measured(kept: float, nll: float) -> Measured:
        return Measured("", nll, 1.0, (nll, nll), (5, 5), kept, kept, "", 1)

    found = {"a": measured(0.5, 2.0), "b": measured(0.5, 1.9), "c": measured(0.6, 1.9), "d": measured(0.7, 1.1)}
    rows = compare(measured(1.0, 1.0), found)
    assert [(row.label, row.best) for row in rows] == [("b", True), ("a", False), ("c", False), ("d", True)]
    assert rows[0].difference == pytest.approx(0.9)


def test_kept_shares_count_dense_layers_in_the_second_alone():
    records = [
        {"status": "pruned", "k": 16, "n": 10, "pattern": "4:16"},
        {"status": "pruned", "k": 16, "n": 30, "pattern": "8:16"},
        {"status": "left", "k": 16, "n": 60},
    ]
    assert kept_shares(records) == ((40 + 240) / 640, (40 + 240 + 960) / 1600)
    assert kept_shares([{"k": 8, "n": 2, "status": "pruned", "pattern": "50%"}]) == (0.5, 0.5)


def test_a_folder_is_for_one_sweep_at_a_time(tmp_path):
    with sweep_folder(tmp_path), pytest.raises(UsageError, match="another sweep runs"), sweep_folder(tmp_path):
        pass


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--backend", "mpi"), "not one of loky, dask, ray"),
        (("--scheduler", "tcp://x:1"), "loky has none"),
        (("--budget-loss", "0.1"), "needs --stats and --sensitivity"),
        (("--criteria", "act,none-such"), "criterion 'none-such' is not one of act"),
        (("--mitigations", "s-pts"), "no recipe of the grid can be"),
        (("--presets", "bset"), "preset 'bset' is not one of"),
    ],
)
def test_what_cannot_be_is_one_sentence(folder, flags, words):
    run = nmonnx("sweep", "model.onnx", "--text", "t.txt", *flags, "-o", "wrong", cwd=folder)
    assert run.returncode == 2 and words in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert not (folder / "wrong").exists()
