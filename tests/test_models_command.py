"""python -m nmonnx.models: path on stdout, one sentence and an exit code when it cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tiny_llama import CONFIG, weights, write_folder


def test_the_command_prints_the_path_of_what_it_built(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", CONFIG, weights(CONFIG))
    done = _run(str(folder), "-o", str(tmp_path / "out"), "--dtype", "fp16", "--fuse-qkv")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out' / 'model.onnx'}\n")
    assert Path(done.stdout.strip()).is_file()


def test_the_command_ends_with_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    done = _run(str(tmp_path / "absent"), "-o", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and "does not exist" in done.stderr and done.stderr.count("\n") == 1


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "nmonnx.models", *arguments], capture_output=True, text=True)
