"""Calibration in shards: the same statistics for any backend, also when it is killed and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_calibrate import TOKENS, WINDOW, llama  # noqa: F401
from test_cli import nmonnx

from nmonnx.calibration import shards
from nmonnx.calibration.calibrate import calibrate
from nmonnx.calibration.shards import calibrate_shards
from nmonnx.errors import RunError, UsageError
from nmonnx.models import build
from nmonnx.parallel import Workers
from nmonnx.records.stats import Stats

SETTINGS: dict = {"window": WINDOW, "sample": 40, "threads": 1}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD", 2)


def test_shards_add_up_to_the_whole(llama, tmp_path, small):  # noqa: F811
    told: list[tuple[int, int]] = []
    step = lambda *done: told.append(done)  # noqa: E731
    own = calibrate_shards(llama, TOKENS, tmp_path / "p", Workers(), **SETTINGS, progress=step, label="t")
    whole = calibrate(llama, TOKENS, **SETTINGS, label="t")
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert (own.protocol, own.source, own.unseen) == (whole.protocol, whole.source, whole.unseen)
    assert list(own.seen) == list(whole.seen)
    for site, want in whole.seen.items():
        seen = own.of(site)
        assert seen.tokens == want.tokens and seen.sums is not None and want.sums is not None
        np.testing.assert_array_equal(seen.sample, want.sample)
        np.testing.assert_array_equal(seen.abs_max, want.abs_max)
        np.testing.assert_allclose(seen.sums.total, want.sums.total, rtol=1e-12, atol=1e-10)
        np.testing.assert_allclose(seen.sums.square, want.sums.square, rtol=1e-12)
        assert seen.token_median == pytest.approx(want.token_median, rel=1e-12)


@pytest.mark.parametrize("backend", ["loky", "dask"])
def test_every_backend_gives_the_same_bytes(llama, tmp_path, small, backend):  # noqa: F811
    pytest.importorskip("joblib")
    if backend == "dask":
        pytest.importorskip("distributed")
    one = calibrate_shards(llama, TOKENS, tmp_path / "one", Workers(), **SETTINGS).save(tmp_path / "one.npz")
    two = calibrate_shards(llama, TOKENS, tmp_path / "two", Workers(backend, 2), **SETTINGS).save(tmp_path / "two.npz")
    assert one.read_bytes() == two.read_bytes()


def test_finished_shards_are_not_run_again(llama, tmp_path, small):  # noqa: F811
    def crash(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_shards(llama, TOKENS, tmp_path / "p", Workers(), **SETTINGS, progress=crash)
    told: list[int] = []
    calibrate_shards(llama, TOKENS, tmp_path / "p", Workers(), **SETTINGS, progress=lambda a, b: told.append(a))
    assert told == [2, 3]


def test_a_shard_that_fails_says_why_and_a_short_text_is_refused(llama, tmp_path, small):  # noqa: F811
    with pytest.raises(RunError, match="the tokenizer that belongs"):
        calibrate_shards(llama, TOKENS + 600, tmp_path / "p", Workers(), **SETTINGS)
    with pytest.raises(UsageError, match="less than two windows"):
        calibrate_shards(llama, TOKENS[: WINDOW + 3], tmp_path / "p", Workers(), **SETTINGS)


def test_a_killed_calibration_goes_on(shared: Path, tmp_path: Path):
    pytest.importorskip("joblib")
    if not (shared / "models" / "stories260K").is_dir():
        pytest.skip("the model stories260K is not there")
    model = build(shared / "models" / "stories260K", tmp_path / "built")
    (tmp_path / "t.txt").write_text("Once upon a time there was a little cat. " * 600)
    arguments = ["calibrate", model, "--text", tmp_path / "t.txt", "--window", 32, "--jobs", 2, "--threads", 1]
    arguments += ["-o", tmp_path / "s.npz"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    words = [sys.executable, "-m", "nmonnx.cli", *map(str, arguments)]
    run = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = tmp_path / "s.parts"
    while run.poll() is None and len(list(parts.glob("*-*.npz"))) < 3:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and not (tmp_path / "s.npz").exists()
    before = {p.name: p.stat().st_mtime_ns for p in parts.glob("*-[0-9]*.npz") if "partial" not in p.name}
    link = tmp_path / "kept"
    link.mkdir()
    for name in before:
        os.link(parts / name, link / name)  # the folder is removed at the end, its files are to be seen after that
    assert nmonnx(*arguments).returncode == 0
    assert {p.name: p.stat().st_mtime_ns for p in link.iterdir()} == before and len(before) >= 3
    assert not parts.exists()
    assert nmonnx(*arguments[:-1], tmp_path / "again.npz").returncode == 0
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "s.npz").read_bytes()
    assert len(Stats.load(tmp_path / "s.npz").seen) == len(Stats.load(tmp_path / "again.npz").seen)
