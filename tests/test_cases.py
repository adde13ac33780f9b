"""The models from real bug reports, judged by their own judge through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nmonnx.library import get_library_path


def test_every_case_gives_what_it_expects(shared: Path, tmp_path: Path) -> None:
    judge = shared / "cases" / "run_cases.py"
    if not judge.is_file():
        pytest.skip("the cases are not there")
    results = tmp_path / "results.jsonl"
    convert = f"{sys.executable} -m nmonnx.cli convert {{model}} --pattern {{pattern}} -o {{out}}"
    command = [sys.executable, str(judge), "--convert", convert, "--library", str(get_library_path())]
    paths = os.pathsep.join(p for p in sys.path if p)
    run = subprocess.run(
        [*command, "--json", str(results)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    verdicts = [json.loads(line) for line in results.read_text().splitlines()]
    assert verdicts, run.stderr
    assert [(v["id"], v["fails"]) for v in verdicts if not v["passed"]] == []
