"""The README's commands, run as they stand, on a small language model."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_cli import nmonnx

from nmonnx.models import build

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMANDS = [line.strip().partition("  #")[0] for line in README.splitlines() if line.startswith("    nmonnx ")]
DIFFERENT = {"diff": 1}


@pytest.fixture(scope="module")
def folder(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (shared / "models" / "stories260K").is_dir():
        pytest.skip("the model stories260K is not there")
    folder = tmp_path_factory.mktemp("readme")
    build(shared / "models" / "stories260K", folder)
    (folder / "train.txt").write_text("Once upon a time there was a little cat. " * 300)
    (folder / "recipe.yaml").write_text("pattern: 4:16\n")
    (folder / "text.txt").write_text("Once upon a time there was a little girl. " * 40)
    (folder / "test.txt").write_text("Once upon a time there was a little girl. " * 100)
    return folder


def test_the_readme_shows_every_command_of_the_main_line():
    shown = {shlex.split(command)[1] for command in COMMANDS}
    assert shown >= {"inspect", "convert", "validate", "diff", "generate"}


def test_every_command_runs_in_order(folder):
    for command in COMMANDS:
        arguments = shlex.split(command)[1:]
        if {"best-learned", "learned.npz"} & set(arguments) and find_spec("torch") is None:
            continue
        if "block:4-27" in arguments:  # the example is of a larger model
            arguments[arguments.index("block:4-27")] = "block:1-3"
        for left in folder.glob("model-*.onnx"):
            left.unlink()
        run = nmonnx(*arguments, cwd=folder)
        assert run.returncode == DIFFERENT.get(arguments[0], 0), f"{command}\n{run.stdout}{run.stderr}"


def test_the_make_targets_exist():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in re.findall(r"^    make ([a-z]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:.*##", makefile, re.MULTILINE)
    assert (
        shutil.which("make") is None
        or "list the targets"
        in subprocess.run(
            ["make", "-s", "-C", str(Path(__file__).parents[1])], capture_output=True, text=True, check=True
        ).stdout
    )


def test_the_python_example_runs(folder):
    nmonnx("convert", "model.onnx", "-o", "sparse.onnx", "--overwrite", cwd=folder)
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example
    code = example[1].replace('"sparse.onnx"', repr(str(folder / "sparse.onnx")))
    scope: dict = {}
    exec(code, scope)
    assert scope["session"].get_inputs()[0].name == "input_ids"
