"""Compare a converted model with its original: what was proven, what was measured, what is within the limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nmonnx.errors import NmonnxError, RunError
from nmonnx.feeds import Feed, Signature, sample_feeds, signature
from nmonnx.feeds.sample import explain
from nmonnx.graph import load, read_skeleton
from nmonnx.library import make_session
from nmonnx.sites import Found, find_sites
from nmonnx.tensors import TensorReader
from nmonnx.validate.claims import read_claims
from nmonnx.validate.language import Answer, Task, ask, compare_answers, make_task, text_feeds
from nmonnx.validate.outputs import Outputs, compare_outputs, run_feeds
from nmonnx.validate.pair import Pair
from nmonnx.validate.result import (
    Check,
    LanguageRecord,
    OutputRecord,
    Report,
    SiteRecord,
    Thresholds,
    at_least,
)
from nmonnx.validate.sites import measure_sites
from nmonnx.validate.structure import check_structure

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Check", "LanguageRecord", "OutputRecord", "Report", "SiteRecord", "Thresholds", "validate"]


def validate(
    original: str | Path,
    converted: str | Path,
    feeds: Sequence[Feed | Mapping[str, np.ndarray]] | None = None,
    tokenizer: Tokenizer | None = None,
    text: str | None = None,
    thresholds: Thresholds | None = None,
    threads: int = 0,
    seed: int = 0,
    new_tokens: int = 16,
    window: int = 512,
    max_windows: int | None = 8,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Compare `converted` with the `original` that it was made from.

    1. Proven from the files: see `check_structure`.
    2. Measured on `feeds`: every output, and each pruned layer. By default pieces of the text, without a text (or when
       the model takes no such calls) `sample_feeds` with `seed`.
    3. Measured on language: greedy continuations, and with a tokenizer and a text perplexity, each of `new_tokens`
       tokens and of at most `max_windows` windows of `window` tokens.

    One model is loaded at a time, but for the layers, where both are mapped. `progress` is told what is going on.
    Raises InputError when the files are no such pair, UsageError for a text without tokenizer, RunError when the
    original fails on feeds that were given. A model that cannot run at all is a failed check when the original can, and
    a note in `skipped` when it cannot either.
    """
    original, converted, limits = Path(original), Path(converted), thresholds or Thresholds()
    say = progress or (lambda _: None)
    task = make_task(tokenizer, text, new_tokens, window, max_windows, seed)
    say("comparing the files")
    pair = _open(original, converted)
    found = find_sites(load(original))
    checks = check_structure(pair, _linear_names(found))
    say("running the original")
    old = _run(original, feeds, task, seed, threads)
    if isinstance(old, str):
        sites, _ = measure_sites(pair, found.sites, [], threads)
        skipped = (("running", old),)
        return Report(original, converted, pair.claims.recipe, tuple(checks), sites=tuple(sites), skipped=skipped)
    say("running the converted model")
    try:
        new = _run(converted, old.feeds, task, seed, threads)
    except RunError as e:
        new = str(e)
    failure = new if isinstance(new, str) else ""
    checks.append(Check("the converted model runs", int(not failure), 1, not failure, failure))
    if isinstance(new, str):
        sites, _ = measure_sites(pair, found.sites, [], threads)
        return Report(original, converted, pair.claims.recipe, tuple(checks), sites=tuple(sites), feeds=old.names)
    outputs, output_checks = compare_outputs(old.outputs, new.outputs, old.feeds, old.sig, limits)
    say("measuring the layers")
    sites, site_checks = measure_sites(pair, found.sites, old.feeds, threads)
    language, language_checks = compare_answers(old.answer, new.answer, task, limits)
    checks += [*site_checks, *_energy(sites, limits), *output_checks, *language_checks]
    reasons = [("language", a.reason) for a in (old.answer, new.answer) if a.reason][:1]
    return Report(
        original=original,
        converted=converted,
        recipe=pair.claims.recipe,
        checks=tuple(checks),
        outputs=tuple(outputs),
        sites=tuple(sites),
        language=language,
        feeds=old.names,
        skipped=tuple(reasons),
    )


@dataclass
class _Run:
    """What came out of one model."""

    feeds: list[Feed]
    outputs: Outputs
    answer: Answer
    sig: Signature

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(feed.name for feed in self.feeds)


def _open(original: Path, converted: Path) -> Pair:
    before, after = read_skeleton(original), read_skeleton(converted)
    claims = read_claims(original, before, converted, after)
    return Pair(before, after, TensorReader(original), TensorReader(converted), claims)


def _linear_names(found: Found) -> list[str]:
    return [s.name for s in found.sites] + [s.name for s in found.skipped if s.linear]


def _run(
    path: Path, feeds: Sequence[Feed | Mapping[str, np.ndarray]] | None, task: Task, seed: int, threads: int
) -> _Run | str:
    """Load a model once, run the feeds and the language task, and let it go; or the reason why it does not run at all.
    Raises RunError when it fails on feeds that were given."""
    try:
        session = make_session(path, threads)
        if feeds is None:
            rng = np.random.default_rng(seed)
            feeds = text_feeds(session, path, task) or sample_feeds(session, path, rng)
    except NmonnxError as e:
        return str(e)
    except Exception as e:  # ONNX Runtime has no common class for its errors
        return f"{path}: {explain(e)}"
    named = [f if isinstance(f, Feed) else Feed(f"feed {i}", dict(f)) for i, f in enumerate(feeds)]
    outputs = run_feeds(session, path, named)
    return _Run(named, outputs, ask(session, path, task), signature(session, path))


def _energy(sites: Sequence[SiteRecord], limits: Thresholds) -> list[Check]:
    measured = [s for s in sites if s.kept_energy is not None]
    if not measured:
        return []
    worst = min(measured, key=lambda s: s.kept_energy or 0.0)
    detail = f"least of {len(measured)} layers: {worst.name}"
    return [at_least("kept energy of a layer's input", worst.kept_energy or 0.0, limits.kept_energy, detail)]
