"""The demo, on a model small enough for a test: it builds nothing where a model lies already."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cli import nmonnx, refused

from nmonnx.models import build


@pytest.fixture(scope="module")
def folder(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (shared / "models" / "stories260K").is_dir():
        pytest.skip("the model stories260K is not there")
    folder = tmp_path_factory.mktemp("demo")
    build(shared / "models" / "stories260K", folder)
    return folder


def test_it_shows_perplexity_text_and_speed_of_both_and_where_the_files_are(folder):
    run = nmonnx("demo", "-o", folder, "--windows", 1, "-n", 4, "--report", folder / "demo.json", cwd=folder)
    assert run.returncode == 0, run.stderr
    for words in ("perplexity", "tokens/s", "dense: ", "sparse: ", str(folder / "model-8x16.onnx")):
        assert words in run.stdout
    assert "100%" in run.stderr


def test_a_missing_text_is_refused_before_any_work(tmp_path):
    assert "no.txt" in refused(tmp_path, 2, "demo", "--text", "no.txt")


def test_a_file_as_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert "no folder" in refused(tmp_path, 2, "demo", "-o", "file")
