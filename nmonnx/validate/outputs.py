"""Compare the outputs of the two models on the same feeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nmonnx.errors import RunError
from nmonnx.feeds import Feed, Signature
from nmonnx.feeds.sample import explain
from nmonnx.metrics import LogitTally, Tally
from nmonnx.validate.result import Check, OutputRecord, Thresholds, at_least, at_most, counted

if TYPE_CHECKING:
    import onnxruntime as ort

_MOST = ("max_abs", "mean_abs", "relative")
_LEAST = ("snr_db", "cosine")

Outputs = list[dict[str, np.ndarray]]
"""For each feed the outputs by name."""


def run_feeds(session: ort.InferenceSession, path: Path, feeds: Sequence[Feed]) -> Outputs:
    """Run every feed. Raises RunError, naming the feed."""
    names = [o.name for o in session.get_outputs()]
    results = []
    for feed in feeds:
        try:
            results.append(dict(zip(names, session.run(names, feed.arrays), strict=True)))
        except Exception as e:
            raise RunError(f"{path} failed on feed {feed.name!r}: {explain(e)}") from e
    return results


def compare_outputs(
    old: Outputs,
    new: Outputs,
    feeds: Sequence[Feed],
    sig: Signature,
    thresholds: Thresholds,
) -> tuple[list[OutputRecord], list[Check]]:
    """A record for every output, and checks:

    1. same shapes and types;
    2. NaN and Inf only where the original has them, in outputs other than caches: what a cache buffer holds where no
       token was written is not defined;
    3. the metrics of the logits, or of every floating-point output of a model without logits, against the limits;
    4. of outputs of other types the share of equal values.
    """
    logits, caches = _logits_name(sig), {name for _, name in sig.cache}
    faults = list(_mismatches(old, new, feeds))
    records = [] if faults else [_record(name, old, new, logits) for name in (old[0] if old else ())]
    checks = [counted("outputs have the same shapes and types", len(old[0]) if old else 0, faults, "outputs")]
    if faults:
        return records, checks
    floats = [r for r in records if old[0][r.name].dtype.kind == "f" and r.name not in caches]
    strange = [f"{r.name!r}: {r.closeness.unmatched} values" for r in floats if r.closeness.unmatched]
    checks.append(counted("NaN and Inf are only where the original has them", len(floats), strange, "outputs"))
    for record in [r for r in records if r.logits] or floats:
        checks += _against_limits(record, thresholds)
    for record in records:
        if old[0][record.name].dtype.kind != "f":
            checks.append(at_least(f"{record.name}: equal", record.closeness.equal, None, "share of equal values"))
    return records, checks


def _logits_name(sig: Signature) -> str | None:
    """The output that holds logits: called so, or the [batch, length, vocabulary] output of a model of tokens."""
    port = sig.first("logits")
    if port is None or port.dtype.kind != "f":
        return None
    by_shape = sig.first("tokens") is not None and len(port.shape) == 3
    return port.name if "logits" in port.name.lower() or by_shape else None


def _mismatches(old: Outputs, new: Outputs, feeds: Sequence[Feed]) -> Iterator[str]:
    for feed, before, after in zip(feeds, old, new, strict=True):
        if list(before) != list(after):
            yield f"outputs are {list(after)}, not {list(before)}"
            return
        for name, a in before.items():
            b = after[name]
            if (a.dtype, a.shape) != (b.dtype, b.shape):
                yield f"{name!r} is {b.dtype} {list(b.shape)}, not {a.dtype} {list(a.shape)}, for feed {feed.name!r}"


def _record(name: str, old: Outputs, new: Outputs, logits: str | None) -> OutputRecord:
    tally, predictions = Tally(), LogitTally()
    for before, after in zip(old, new, strict=True):
        tally.add(before[name], after[name])
        if name == logits:
            predictions.add(before[name], after[name])
    return OutputRecord(name, tally.result(), predictions.result() if name == logits else None)


def _against_limits(record: OutputRecord, thresholds: Thresholds) -> Iterator[Check]:
    limits, name = asdict(thresholds), record.name
    values = asdict(record.closeness)
    for metric in _MOST:
        yield at_most(f"{name}: {metric}", values[metric], limits[metric])
    for metric in _LEAST:
        yield at_least(f"{name}: {metric}", values[metric], limits[metric])
    if record.logits:
        detail = f"{record.logits.positions} positions"
        yield at_most(f"{name}: kl", record.logits.kl, limits["kl"], f"nats, mean of {detail}")
        yield at_least(f"{name}: top1", record.logits.top1, limits["top1"], f"share of {detail}")
        yield at_least(f"{name}: top5", record.logits.top5, limits["top5"], f"mean shared of five, {detail}")
