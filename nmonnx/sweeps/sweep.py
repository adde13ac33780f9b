"""A sweep: many recipes of one model on one text, each a job that writes one result file and is never run twice."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any

import numpy as np

import nmonnx
from nmonnx.convert import convert
from nmonnx.digest import array_sha256, file_sha256
from nmonnx.errors import ModelError, NmonnxError, UsageError
from nmonnx.evaluation.perplexity import perplexity
from nmonnx.fitting.fit import Fit, fit
from nmonnx.fitting.learned import Learning
from nmonnx.inference.decoder import Decoder
from nmonnx.onnx_file.graph import load
from nmonnx.parallel import Pool
from nmonnx.pattern import Pattern
from nmonnx.pruning.recipe import Recipe
from nmonnx.records.gradients import Gradients
from nmonnx.records.sensitivity import Sensitivity
from nmonnx.records.stats import Stats

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Protocol:
    """What every recipe of a sweep is measured by, in paths: jobs read the files themselves.

    tokens      .npy file of the text's token ids [T]
    fit_tokens  the same of the text that corrections are fitted on
    model, stats, sensitivity, gradients  as `convert` takes them
    window, windows, skip      as `nmonnx.evaluation.perplexity` takes them, stride = window
    threads     ONNX Runtime's, fixed, so that a number does not depend on where it was computed
    digest      of all of the content above, but for the threads
    """

    model: Path
    tokens: Path
    fit_tokens: Path | None
    stats: Path | None
    sensitivity: Path | None
    gradients: Path | None
    window: int
    windows: int
    skip: int
    threads: int
    digest: str


@dataclass(frozen=True)
class Job:
    """A recipe (None: the dense model) to measure, and the folder of the sweep."""

    protocol: Protocol
    recipe: Recipe | None
    folder: Path

    @property
    def place(self) -> Path:
        """The result file, named by the hash of recipe, model and protocol."""
        recipe = self.recipe.to_json() if self.recipe else "dense"
        name = hashlib.sha256(f"{self.protocol.digest} {recipe}".encode()).hexdigest()[:24]
        return self.folder / "results" / f"{name}.json"


@dataclass(frozen=True)
class Measured:
    """What a result file holds.

    recipe         JSON; "" for the dense model
    nll, ppl       mean negative log-likelihood of a predicted token, nats, and its exponential
    window_nll, window_tokens  of each window, to pair with the dense model's
    kept_pruned    share of the pruned layers' weights that is read for a token
    kept           the same of all linear layers, those left dense included
    protocol       how it was measured, in words
    threads        of ONNX Runtime
    """

    recipe: str
    nll: float
    ppl: float
    window_nll: tuple[float, ...]
    window_tokens: tuple[int, ...]
    kept_pruned: float
    kept: float
    protocol: str
    threads: int

    @classmethod
    def read(cls, path: Path) -> Measured | None:
        """None when the file is not there or damaged, so that the job runs anew."""
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("schema_version") != SCHEMA_VERSION:
                return None
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None


def protocol(
    model: Path,
    tokens: np.ndarray,
    folder: Path,
    stats: Path | None = None,
    sensitivity: Path | None = None,
    window: int = 1024,
    windows: int = 8,
    skip: int = 0,
    threads: int = 1,
    gradients: Path | None = None,
    fit_tokens: np.ndarray | None = None,
) -> Protocol:
    """The protocol of a sweep; the tokens are stored in `folder`. Raises InputError when a file cannot be read."""
    measured = {"stats": stats, "sensitivity": sensitivity, "gradients": gradients}
    if stats:
        Stats.load(stats)  # what is wrong with it is said now, not by every job
    if sensitivity:
        Sensitivity.load(sensitivity)
    if gradients:
        Gradients.load(gradients)
    content: dict[str, Any] = {
        "version": [nmonnx.__version__, SCHEMA_VERSION],
        "model": [file_sha256(model), load(model).data_stamps()],
        "tokens": array_sha256(tokens),
        "cut": [window, windows, skip],
        **{name: file_sha256(path) if path else "" for name, path in measured.items()},
    }
    if fit_tokens is not None:
        content["fit_tokens"] = array_sha256(fit_tokens)
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    place = _stored(folder, tokens)
    text = None if fit_tokens is None else _stored(folder, fit_tokens)
    seen, weighed, slopes = (path.absolute() if path else None for path in measured.values())
    cut = (window, windows, skip)
    return Protocol(model.absolute(), place, text, seen, weighed, slopes, *cut, threads, digest)


def _stored(folder: Path, tokens: np.ndarray) -> Path:
    """The file of token ids, for the workers."""
    place = folder.absolute() / f"tokens-{array_sha256(tokens)[:16]}.npy"
    if not place.exists():
        _publish(place, lambda path: np.save(path, tokens))
    return place


def run_jobs(
    jobs: Sequence[Job], pool: Pool, progress: Callable[[int, int], None] | None = None
) -> tuple[dict[Job, Measured], dict[Job, str]]:
    """Measure what has no result yet: (results, reasons why some could not be measured; they are tried again by the
    next call)."""
    results = {job: found for job in jobs if (found := Measured.read(job.place))}
    missing = [job for job in jobs if job not in results]
    failed: dict[Job, str] = {}
    if progress:
        progress(len(results), len(jobs))
    for done, (index, reason) in enumerate(pool.run(_run, list(enumerate(missing))), len(results) + 1):
        if reason:
            failed[missing[index]] = reason
        if progress:
            progress(done, len(jobs))
    for job in missing:
        found = Measured.read(job.place)
        if found:
            results[job] = found
        elif job not in failed:
            failed[job] = f"{job.place} was not written; do all workers see the folder?"
    return {job: results[job] for job in jobs if job in results}, failed


@contextmanager
def sweep_folder(folder: Path) -> Iterator[None]:
    """The folder of a sweep, with what a killed run left in it removed, for one sweep at a time. Raises UsageError
    when another sweep uses it, ModelError when it cannot be written."""
    try:
        for name in ("results", "work"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise UsageError(f"another sweep runs in {folder}; wait for it or choose another folder") from e
            for left in (folder / "work").iterdir():
                shutil.rmtree(left, ignore_errors=True)
            yield
    except OSError as e:
        raise ModelError(f"the folder {folder} cannot be written: {e.strerror or e}") from e


def _run(numbered: tuple[int, Job]) -> tuple[int, str]:
    """Runs where the worker is; (number of the job, why it failed or "")."""
    number, job = numbered
    try:
        if Measured.read(job.place) is None:
            data = {"schema_version": SCHEMA_VERSION, **asdict(_measure(job))}
            _publish(job.place, lambda path: path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8"))
    except (NmonnxError, OSError) as e:  # as words: an error class of its own may not survive pickling
        return number, str(e)
    return number, ""


def _measure(job: Job) -> Measured:
    given, recipe = job.protocol, job.recipe
    if recipe is None:
        return _score(given, given.model, "", (1.0, 1.0))
    files: dict[str, tuple[Any, Path | None]] = {
        "stats": (Stats, given.stats),
        "sensitivity": (Sensitivity, given.sensitivity),
        "gradients": (Gradients, given.gradients),
    }
    measured: dict[str, Any] = {n: kind.load(path) for n, (kind, path) in files.items() if path and n in recipe.needs}
    with TemporaryDirectory(prefix=job.place.stem, dir=job.folder / "work") as folder:
        out, fitted = Path(folder) / "model.onnx", None
        if recipe.fitted and given.fit_tokens:
            how, learning = Fit(given.window, threads=given.threads), Learning(window=min(given.window, 512))
            text = np.load(given.fit_tokens)
            fitted = fit(given.model, recipe, Path(folder) / "fit.npz", text, how=how, learning=learning, **measured)
        done = convert(given.model, out, recipe, fit=fitted, **measured)
        return _score(given, out, recipe.to_json(), kept_shares(done.records))


def kept_shares(records: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Shares of the weights read, by elements: (of the pruned layers, of all linear layers whose size is known)."""
    pruned = [(r["k"] * r["n"], Pattern.parse(r["pattern"])) for r in records if r["status"] == "pruned"]
    read, weights = sum(size * p.n / p.m for size, p in pruned), sum(size for size, _ in pruned)
    dense = sum(r["k"] * r["n"] for r in records if r["status"] != "pruned")
    return read / weights, (read + dense) / (weights + dense)


def _score(given: Protocol, path: Path, recipe: str, kept: tuple[float, float]) -> Measured:
    decoder = Decoder(path, threads=given.threads)
    found = perplexity(decoder, np.load(given.tokens), given.window, None, given.windows, skip_windows=given.skip)
    if not math.isfinite(found.nll):
        raise ModelError("the model gives NaN or infinite predictions with this recipe")
    return Measured(
        recipe, found.nll, found.ppl, found.window_nll, found.window_tokens, *kept, found.protocol, given.threads
    )


def _publish(place: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name, then link it to its own unless it is there already: it is written once, even
    when a worker of a killed run is still at it."""
    with NamedTemporaryFile(prefix=".", suffix=place.suffix, dir=place.parent, delete=False) as file:
        staged = Path(file.name)
    try:
        write(staged)
        os.chmod(staged, 0o644)
        if place.suffix == ".json" and place.exists() and Measured.read(place) is None:
            place.unlink()  # damaged
        with suppress(FileExistsError):
            os.link(staged, place)
    finally:
        staged.unlink(missing_ok=True)
