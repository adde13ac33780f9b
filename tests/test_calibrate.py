"""Calibration equals numpy on tensors that ONNX Runtime gives, in pieces and shards, and goes on after a crash."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from small_models import mlp, weights, write
from test_cli import nmonnx as run
from tiny_llama import CONFIG, write_folder
from tiny_llama import weights as llama_weights

from nmonnx.calibrate import calibrate
from nmonnx.convert import convert
from nmonnx.errors import RunError, UsageError
from nmonnx.models import build
from nmonnx.recipe import Recipe
from nmonnx.stats import Stats

TOKENS = np.random.default_rng(3).integers(0, CONFIG["vocab_size"], 130)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrate")
    write_folder(folder / "source", CONFIG, llama_weights(CONFIG))
    build(folder / "source", folder / "model")
    return folder / "model" / "model.onnx"


def same(a: Stats, b: Stats) -> None:
    assert a.seen.keys() == b.seen.keys()
    for name in a.seen:
        for field in ("mean", "rms", "abs_max", "sample"):
            np.testing.assert_allclose(getattr(a.of(name), field), getattr(b.of(name), field), rtol=1e-5, atol=1e-6)


def test_feeds_are_seen_as_numpy_sees_them(tmp_path: Path) -> None:
    path = write(mlp(), tmp_path / "model.onnx")
    feeds = [{"x": weights(2, 9, 32, seed=seed)} for seed in (5, 6)]
    stats = calibrate(path, feeds=feeds)
    up = onnx.numpy_helper.to_array(next(t for t in onnx.load(path).graph.initializer if t.name == "up"))
    x = np.concatenate([feed["x"].reshape(-1, 32) for feed in feeds])
    hidden = np.maximum(x @ up, 0)
    (_, first), (_, second) = stats.seen.items()
    np.testing.assert_allclose(first.abs_max, np.abs(x).max(axis=0))
    np.testing.assert_allclose(second.abs_max, np.abs(hidden).max(axis=0), rtol=1e-5)
    rows = {row.astype(np.float16).tobytes() for row in x}
    assert all(row.tobytes() in rows for row in first.sample)


def test_a_text_is_read_in_windows_and_shards_merge(llama: Path) -> None:
    all_of_it = calibrate(llama, TOKENS, window=32, sample=16)
    assert {s.tokens for s in all_of_it.seen.values()} == {4 * 31}  # the tail and each window's first token are out
    shards = [calibrate(llama, TOKENS[:64], window=32, sample=16)]
    shards.append(calibrate(llama, TOKENS[64:], window=32, sample=16, first=64))
    same(Stats.merge(shards), all_of_it)


def test_layers_on_one_activation_share_what_was_seen(llama: Path) -> None:
    stats = calibrate(llama, TOKENS, window=32)
    assert len({id(seen) for seen in stats.seen.values()}) < len(stats.seen)


def test_a_run_that_was_cut_short_goes_on(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmonnx.calibrate.SAVE_EVERY", 0.0)
    whole = calibrate(llama, TOKENS, window=32)
    seen: list[int] = []

    def crash(done: int, _: int) -> None:
        seen.append(done)
        if len(seen) == 2:
            raise KeyboardInterrupt

    checkpoint = tmp_path / "s.partial.npz"
    with pytest.raises(KeyboardInterrupt):
        calibrate(llama, TOKENS, window=32, checkpoint=checkpoint, progress=crash)
    rest: list[int] = []
    again = calibrate(llama, TOKENS, window=32, checkpoint=checkpoint, progress=lambda done, _: rest.append(done))
    assert rest == [96, 128]  # the first two of four windows were not read again
    assert not checkpoint.exists()
    assert again.save(tmp_path / "a.npz").read_bytes() == whole.save(tmp_path / "b.npz").read_bytes()


def test_what_cannot_be_calibrated_is_refused(llama: Path, tmp_path: Path) -> None:
    path = write(mlp(), tmp_path / "model.onnx")
    out = convert(path, tmp_path / "sparse.onnx", Recipe()).out
    assert out
    with pytest.raises(UsageError, match="converted already"):
        calibrate(out, feeds=[{"x": weights(1, 2, 32)}])
    with pytest.raises(RunError, match="not finite"):
        calibrate(path, feeds=[{"x": np.full((1, 2, 32), np.nan, np.float32)}])
    with pytest.raises(UsageError, match="a text or feeds"):
        calibrate(path)


def test_the_command_writes_the_file_once(tmp_path: Path) -> None:
    write(mlp(), tmp_path / "model.onnx")
    np.savez(tmp_path / "feed.npz", x=weights(1, 6, 32))
    arguments = ["calibrate", "model.onnx", "--feeds", "feed.npz", "-o", "stats.npz"]
    first = run(*arguments, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert len(Stats.load(tmp_path / "stats.npz").seen) == 2
    second = run(*arguments, cwd=tmp_path)
    assert second.returncode == 2
    assert "--overwrite" in second.stderr
