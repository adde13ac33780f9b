"""Calibration in shards: the text cut at window boundaries, each part a job with its own checkpoint and result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np

import nmonnx
from nmonnx.calibration.calibrate import calibrate
from nmonnx.digest import array_sha256, file_sha256
from nmonnx.errors import ModelError, NmonnxError, RunError, UsageError
from nmonnx.onnx_file.graph import load
from nmonnx.onnx_file.model_config import read_config
from nmonnx.parallel import Workers
from nmonnx.records.stats import Stats

SHARD = 16
"""Windows of a shard. Shards do not depend on the number of jobs, so neither does what they add up to."""


@dataclass(frozen=True)
class _Shard:
    """Tokens first to last of the text in the file `tokens`; the result goes to `place`."""

    model: Path
    tokens: Path
    first: int
    last: int
    window: int
    sample: int
    threads: int
    place: Path


def calibrate_shards(
    model_path: str | Path,
    tokens: np.ndarray,
    folder: str | Path,
    workers: Workers,
    window: int = 1024,
    max_tokens: int | None = None,
    sample: int = 512,
    threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
    label: str = "",
) -> Stats:
    """As `calibrate` on a text, by several workers: shards of 16 windows, merged in their order.

    Counts, largest magnitudes, samples and medians' terms are those of one run; float64 sums differ from it in the
    order of addition alone (1e-12), and are bit-equal for any number of workers and any backend. `folder` holds the
    tokens, finished shards and checkpoints: a run that was cut short goes on there; it is left for the caller to
    remove. `progress` is called with (shards done, all).

    Raises what `calibrate` raises, RunError when a shard fails.
    """
    path, folder = Path(model_path).absolute(), Path(folder).absolute()
    tokens = np.asarray(tokens)[:max_tokens]
    window = min(window, read_config(path).context or window)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as e:
        raise ModelError(f"the folder {folder} cannot be written: {e.strerror}") from e
    shards = _cut(path, tokens, folder, window, sample, threads or workers.threads())
    missing = [shard for shard in shards if not shard.place.exists()]
    if missing:
        _store(tokens, shards[0].tokens)
    ready = len(shards) - len(missing)
    with workers.open() as pool:
        for done, reason in enumerate(pool.run(_run, missing), ready + 1):
            if reason:
                raise RunError(reason)
            if progress:
                progress(done, len(shards))
    merged = Stats.merge([Stats.load(shard.place) for shard in shards])
    words = f"{sum(s.last - s.first for s in shards) // window} windows of {window} tokens, empty cache, no BOS"
    protocol = f"{words}, first token of each left out"
    return Stats(merged.seen, merged.source, f"{label}: {protocol}" if label else protocol, merged.unseen)


def _cut(path: Path, tokens: np.ndarray, folder: Path, window: int, sample: int, threads: int) -> list[_Shard]:
    """The shards, their results named by everything that they depend on."""
    if len(tokens) < 2 * window:
        raise UsageError(f"a text of {len(tokens)} tokens has less than two windows to share out; use one job")
    content = [nmonnx.__version__, file_sha256(path), load(path).data_stamps(), array_sha256(tokens), window, sample]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    whole, size = len(tokens) // window * window, SHARD * window
    return [
        _Shard(
            *(path, folder / f"{digest}.npy", first, min(first + size, whole), window, sample, threads),
            folder / f"{digest}-{first}.npz",
        )
        for first in range(0, whole, size)
    ]


def _store(tokens: np.ndarray, place: Path) -> None:
    with NamedTemporaryFile(prefix=".", suffix=".npy", dir=place.parent, delete=False) as file:
        np.save(file, tokens)
    Path(file.name).replace(place)


def _run(shard: _Shard) -> str:
    """Runs where the worker is; why it failed, or ""."""
    try:
        stats = calibrate(
            shard.model,
            np.load(shard.tokens)[shard.first : shard.last],
            window=shard.window,
            sample=shard.sample,
            threads=shard.threads,
            checkpoint=shard.place.with_suffix(".partial.npz"),
            first=shard.first,
        )
        stats.save(shard.place)
    except (NmonnxError, OSError) as e:
        return str(e)
    return ""
