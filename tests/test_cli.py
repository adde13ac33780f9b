"""The command line: exit codes, one sentence on stderr, nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import pytest
from onnx import TensorProto, helper
from small_models import mlp, write


def nmonnx(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(
        [sys.executable, "-m", "nmonnx.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, "NO_COLOR": "1"},
        check=False,
    )


def refused(folder: Path, code: int, *arguments: object) -> str:
    before = sorted(p.name for p in folder.iterdir())
    run = nmonnx(*arguments, cwd=folder)
    assert run.returncode == code, run.stderr
    assert run.stdout == ""
    assert run.stderr.startswith("nmonnx: error: ")
    assert len(run.stderr.strip().splitlines()) == 1
    assert sorted(p.name for p in folder.iterdir()) == before
    return run.stderr


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(mlp(64, 64), tmp_path / "model.onnx")


def test_the_main_line_inspect_convert_validate_diff(model, tmp_path):
    assert "2 linear layers" in nmonnx("inspect", model).stdout
    done = nmonnx("convert", model, "--pattern", "8:16")
    assert done.returncode == 0, done.stderr
    assert "2 of 2 linear layers pruned to 8:16" in done.stdout
    sparse = tmp_path / "model-8x16.onnx"
    checked = nmonnx("validate", model, sparse)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert nmonnx("diff", model, sparse).returncode == 1
    assert nmonnx("diff", model, model).returncode == 0


def test_a_failed_threshold_is_exit_code_1(model, tmp_path):
    nmonnx("convert", model, "--pattern", "2:16")
    checked = nmonnx("validate", model, tmp_path / "model-2x16.onnx", "--min-snr", "100")
    assert checked.returncode == 1
    assert "FAIL" in checked.stdout


def test_reports_are_written_in_every_format(model, tmp_path):
    for suffix in ("json", "md", "html"):
        report = tmp_path / f"report.{suffix}"
        assert nmonnx("convert", model, "--dry-run", "--report", report).returncode == 0
        assert "8:16" in report.read_text()
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["schema_version"] == 1
    assert len(data["inputs"][0]["sha256"]) == 64
    assert [s["status"] for s in data["sites"]] == ["pruned", "pruned"]
    assert not list(tmp_path.glob("model-*"))


def test_quiet_says_nothing(model):
    run = nmonnx("convert", model, "--quiet")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_a_recipe_file_is_read_and_flags_win(model, tmp_path):
    (tmp_path / "recipe.yaml").write_text("pattern: 4:16\nkernel: prune\n")
    report = tmp_path / "r.json"
    run = nmonnx("convert", model, "-c", tmp_path / "recipe.yaml", "--kernel", "fused", "--dry-run", "--report", report)
    assert run.returncode == 0, run.stderr
    recipe = json.loads(report.read_text())["recipe"]
    assert (recipe["pattern"], recipe["kernel"]) == ("4:16", "fused")


class TestBadInput:
    @pytest.mark.parametrize("pattern", ["16:8", "0:16", "8", "8:65", "8:16:32", "-8:16", "a:b", "8:0"])
    def test_a_wrong_pattern(self, model, tmp_path, pattern):
        assert pattern in refused(tmp_path, 2, "convert", model, f"--pattern={pattern}")

    def test_no_model(self, tmp_path):
        (tmp_path / "m.onnx").write_text("not a model")
        assert "not a valid ONNX file" in refused(tmp_path, 2, "convert", "m.onnx")
        assert "does not exist" in refused(tmp_path, 2, "inspect", "no.onnx")

    def test_an_existing_output(self, model, tmp_path):
        (tmp_path / "o.onnx").write_text("mine")
        assert "--overwrite" in refused(tmp_path, 2, "convert", model, "-o", "o.onnx")
        assert (tmp_path / "o.onnx").read_text() == "mine"
        assert nmonnx("convert", model, "-o", tmp_path / "o.onnx", "--overwrite").returncode == 0

    def test_an_output_folder_that_is_not_there(self, model, tmp_path):
        assert "'no'" in refused(tmp_path, 2, "convert", model, "-o", "no/o.onnx")

    def test_a_selector_that_matches_nothing(self, model, tmp_path):
        assert "lm_heat" in refused(tmp_path, 2, "convert", model, "--exclude", "lm_heat")

    def test_a_model_converted_already(self, model, tmp_path):
        nmonnx("convert", model, "-o", tmp_path / "o.onnx")
        assert "already" in refused(tmp_path, 2, "convert", "o.onnx", "-o", "p.onnx")

    def test_no_linear_layer(self, tmp_path):
        proto = mlp()
        del proto.graph.node[2], proto.graph.node[0]
        proto.graph.node[0].input[0], proto.graph.node[0].output[0] = "x", "y"
        write(proto, tmp_path / "m.onnx")
        assert "no linear layer" in refused(tmp_path, 2, "convert", "m.onnx")

    def test_bfloat16(self, tmp_path):
        proto = mlp()
        for tensor in proto.graph.initializer:
            tensor.CopyFrom(
                helper.make_tensor(tensor.name, TensorProto.BFLOAT16, tensor.dims, np.ones(tensor.dims).ravel())
            )
        for value in (*proto.graph.input, *proto.graph.output):
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
        write(proto, tmp_path / "m.onnx")
        assert "BFLOAT16" in refused(tmp_path, 2, "convert", "m.onnx")

    def test_missing_external_data(self, tmp_path):
        write(mlp(), tmp_path / "m.onnx", external=True)
        os.unlink(tmp_path / "m.onnx.data")
        assert "missing" in refused(tmp_path, 2, "convert", "m.onnx")

    def test_an_unknown_kernel_and_an_unknown_key(self, model, tmp_path):
        assert "fast" in refused(tmp_path, 2, "convert", model, "--kernel", "fast")
        (tmp_path / "r.yaml").write_text("patern: 8:16\n")
        assert "patern" in refused(tmp_path, 2, "convert", model, "-c", "r.yaml")

    def test_a_recipe_of_wrong_types(self, model, tmp_path):
        for line in (
            "lm_head: 'no'",
            "include: 5",
            "include: [1, 2]",
            "include:",
            "pattern: 8",
            "schema_version: 99",
            "- a",
        ):
            (tmp_path / "r.yaml").write_text(line)
            assert "r.yaml" in refused(tmp_path, 2, "convert", model, "-c", "r.yaml") or line == "pattern: 8"

    def test_an_empty_flag(self, model, tmp_path):
        assert "''" in refused(tmp_path, 2, "convert", model, "--pattern", "")
        assert "''" in refused(tmp_path, 2, "convert", model, "--kernel", "")

    def test_a_report_that_cannot_be_written(self, model, tmp_path):
        (tmp_path / "folder.json").mkdir()
        assert "folder" in refused(tmp_path, 2, "convert", model, "--report", "folder.json")
        assert "/proc/r.json" in refused(tmp_path, 2, "convert", model, "--report", "/proc/r.json")

    def test_an_output_name_that_no_file_can_have(self, model, tmp_path):
        assert "too long" in refused(tmp_path, 2, "convert", model, "-o", "x" * 300 + ".onnx")

    def test_a_converted_model_whose_functions_were_inlined(self, model, tmp_path):
        nmonnx("convert", model, "-o", tmp_path / "o.onnx")
        onnx.save(onnx.inliner.inline_local_functions(onnx.load(tmp_path / "o.onnx")), tmp_path / "i.onnx")
        assert "already" in refused(tmp_path, 2, "convert", "i.onnx", "-o", "p.onnx")

    def test_a_full_disk(self, model, tmp_path):
        code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
        code += "; import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import sys"
        code += f"; sys.argv = ['nmonnx', 'convert', {str(model)!r}]; from nmonnx.cli import main; main()"
        paths = os.pathsep.join(p for p in sys.path if p)
        run = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
            check=False,
        )
        assert run.returncode == 3, run.stderr
        assert "cannot write" in run.stderr
        assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]

    def test_validating_a_model_that_was_not_converted(self, model, tmp_path):
        assert "no nmonnx.recipe" in refused(tmp_path, 2, "validate", model, model)

    def test_a_report_of_unknown_format(self, model, tmp_path):
        assert ".json" in refused(tmp_path, 2, "inspect", model, "--report", "r.pdf")


def test_inspecting_a_converted_model_says_what_was_done(model, tmp_path):
    nmonnx("convert", model, "-o", tmp_path / "o.onnx")
    assert "2 of 2 linear layers pruned" in nmonnx("inspect", tmp_path / "o.onnx").stdout
    assert "NMPrune 8:16" in nmonnx("inspect", tmp_path / "o.onnx", "-v").stdout


def test_usage_errors_are_one_sentence(tmp_path):
    assert "'model'" in refused(tmp_path, 2, "convert")
    assert "--frobnicate" in refused(tmp_path, 2, "convert", "m.onnx", "--frobnicate")
    assert "explode" in refused(tmp_path, 2, "explode")


def test_debug_shows_the_traceback_wherever_it_stands(tmp_path):
    for arguments in (("--debug", "inspect", "no.onnx"), ("inspect", "no.onnx", "--debug")):
        assert "Traceback" in nmonnx(*arguments, cwd=tmp_path).stderr


def test_help_says_what_n_counts():
    assert "KEPT" in nmonnx("convert", "--help").stdout


def test_start_up_imports_nothing_heavy():
    heavy = ("torch", "transformers", "onnxruntime", "onnx")
    code = f"import sys, nmonnx.cli; print([m for m in {heavy} if m in sys.modules])"
    paths = os.pathsep.join(p for p in sys.path if p)
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        check=True,
    )
    assert run.stdout.strip() == "[]"


def test_the_output_carries_recipe_source_and_layers(model, tmp_path):
    nmonnx("convert", model, "-o", tmp_path / "o.onnx")
    props = {p.key: p.value for p in onnx.load(tmp_path / "o.onnx").metadata_props}
    assert json.loads(props["nmonnx.recipe"])["pattern"] == "8:16"
    assert len(props["nmonnx.source"]) == 64
    assert [s["k"] for s in json.loads(props["nmonnx.sites"])] == [64, 64]
