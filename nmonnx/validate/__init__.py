"""Compare a converted model with its original: what was proven, what was measured, what is within the limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nmonnx.convert import refuse_foreign
from nmonnx.errors import NmonnxError, RunError
from nmonnx.feeds import Feed, Signature, sample_feeds, signature
from nmonnx.feeds.sample import explain
from nmonnx.library import make_session
from nmonnx.onnx_file.graph import load, read_skeleton
from nmonnx.onnx_file.tensors import TensorReader
from nmonnx.records.corrections import Corrections
from nmonnx.sites import Found, find_sites
from nmonnx.validate.claims import read_claims
from nmonnx.validate.fallback import check_fallback
from nmonnx.validate.language import Answer, Language, Task, ask, compare_answers, make_task, text_feeds
from nmonnx.validate.outputs import Outputs, compare_outputs, run_feeds
from nmonnx.validate.pair import Pair
from nmonnx.validate.result import (
    KEPT_ENERGY,
    Check,
    LanguageRecord,
    OutputRecord,
    Report,
    SiteRecord,
    Thresholds,
    held,
    unmeasured,
)
from nmonnx.validate.sites import measure_sites
from nmonnx.validate.stored_weights import check_stored_weights
from nmonnx.validate.structure import check_structure

__all__ = ["Check", "Language", "LanguageRecord", "OutputRecord", "Report", "SiteRecord", "Thresholds", "validate"]


def validate(
    original: str | Path,
    converted: str | Path,
    feeds: Sequence[Feed | Mapping[str, np.ndarray]] | None = None,
    language: Language | None = None,
    thresholds: Thresholds | None = None,
    threads: int = 0,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    fit: Corrections | None = None,
) -> Report:
    """Compare `converted` with the `original` that it was made from.

    1. Proven from the files: see `check_structure`; and the fallback functions on their own: see `check_fallback`.
    2. Measured on `feeds`: every output, and each pruned layer. By default pieces of the text, without a text (or when
       the model takes no such calls) `sample_feeds` with `seed`. With the corrections `fit` that were folded, each
       corrected layer also against its formula, so that an error of a fold is told from that of the pruning.
    3. Measured on `language`: greedy continuations and, with a text, perplexity.
    4. Every limit of `thresholds` is a check, a failed one when nothing measured it.

    One model is loaded at a time, but for the layers, where both are mapped. `progress` is told what is going on.
    Raises InputError when the files are no such pair, RunError when the original fails on feeds that were given. A
    model that cannot run at all is a failed check when the original can, and a note in `skipped` when it cannot either.
    """
    original, converted, limits = Path(original), Path(converted), thresholds or Thresholds()
    say = progress or (lambda _: None)
    task = make_task(language or Language(), seed)
    say("comparing the files")
    pair = _open(original, converted)
    if fit is not None:
        refuse_foreign(original, {"corrections": fit})
    found = find_sites(load(original))
    checks = [*check_structure(pair, _linear_names(found)), check_fallback(pair, found.sites)]
    checks += check_stored_weights(pair, found.sites)
    unseen, _ = measure_sites(pair, found.sites, [], threads)
    proven = Report(original, converted, pair.claims.recipe, tuple(checks), sites=tuple(unseen))
    say("running the original")
    old = _run(original, feeds, task, threads)
    if isinstance(old, str):
        missing = unmeasured([], limits, "the original does not run")
        return replace(proven, checks=(*checks, *missing), skipped=(("running", old),))
    say("running the converted model")
    new = _run_converted(converted, old.feeds, task, threads)
    failure = new if isinstance(new, str) else ""
    checks.append(Check("the converted model runs", int(not failure), 1, not failure, failure))
    if isinstance(new, str):
        missing = unmeasured([], limits, "the converted model does not run")
        return replace(proven, checks=(*checks, *missing), feeds=old.names)
    say("measuring the layers")
    sites, site_checks = measure_sites(pair, found.sites, old.feeds, threads, fit)
    outputs, output_checks = compare_outputs(old.outputs, new.outputs, old.feeds, old.sig, limits)
    record, language_checks = compare_answers(old.answer, new.answer, limits)
    measured = [*site_checks, *_energy(sites, limits), *output_checks, *language_checks]
    reasons = [("language", a.reason) for a in (old.answer, new.answer) if a.reason][:1]
    if pair.claims.fitted and fit is None:
        reasons.append(("corrected layers against their corrections", "--fit was not given"))
    return replace(
        proven,
        checks=(*checks, *measured, *unmeasured(measured, limits)),
        outputs=tuple(outputs),
        sites=tuple(sites),
        language=record,
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


def _run(path: Path, feeds: Sequence[Feed | Mapping[str, np.ndarray]] | None, task: Task, threads: int) -> _Run | str:
    """Load a model once, run the feeds and the language task, and let it go; or the reason why it does not run at all.
    Raises RunError when it fails on feeds that were given."""
    try:
        session = make_session(path, threads)
        if feeds is None:
            rng = np.random.default_rng(task.seed)
            feeds = text_feeds(session, path, task) or sample_feeds(session, path, rng)
    except NmonnxError as e:
        return str(e)
    except Exception as e:  # ONNX Runtime has no common class for its errors
        return f"{path}: {explain(e)}"
    named = [f if isinstance(f, Feed) else Feed(f"feed {i}", dict(f)) for i, f in enumerate(feeds)]
    outputs = run_feeds(session, path, named)
    return _Run(named, outputs, ask(session, path, task), signature(session, path))


def _run_converted(path: Path, feeds: Sequence[Feed], task: Task, threads: int) -> _Run | str:
    try:
        return _run(path, feeds, task, threads)
    except RunError as e:
        return str(e)


def _energy(sites: Sequence[SiteRecord], limits: Thresholds) -> list[Check]:
    """The least energy that a layer keeps; a limit on it is one on every pruned layer."""
    energies = {s.name: s.kept_energy for s in sites if s.kept_energy is not None}
    unseen = [s for s in sites if s.status == "pruned" and s.kept_energy is None]
    checks = []
    if energies:
        name, least = min(energies.items(), key=lambda item: item[1])
        checks.append(held("kept_energy", KEPT_ENERGY, least, limits, f"least of {len(energies)} layers: {name}"))
    if energies and unseen and limits.kept_energy is not None:
        detail = f"not measured in {len(unseen)} layers, such as {unseen[0].name!r}: {unseen[0].note}"
        checks.append(Check(KEPT_ENERGY, math.nan, limits.kept_energy, False, detail, "kept_energy"))
    return checks
