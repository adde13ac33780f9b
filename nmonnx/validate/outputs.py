"""Compare the outputs of the two models on the same feeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nmonnx.errors import RunError
from nmonnx.evaluation.metrics import LogitTally, Tally
from nmonnx.feeds import Feed, Signature
from nmonnx.feeds.sample import explain
from nmonnx.validate.result import Check, OutputRecord, Thresholds, counted, held

if TYPE_CHECKING:
    import onnxruntime as ort

_CLOSENESS = ("max_abs", "mean_abs", "relative", "snr_db", "cosine")

Outputs = list[dict[str, np.ndarray]]
"""For each feed the outputs by name."""


def run_feeds(session: ort.InferenceSession, path: Path, feeds: Sequence[Feed]) -> Outputs:
    """Run every feed. Raises RunError, naming the feed."""
    from onnxruntime import RunOptions

    quiet = RunOptions()
    quiet.log_severity_level = 4  # a failure is raised with its reason, not logged as well
    names = [o.name for o in session.get_outputs()]
    results = []
    for feed in feeds:
        try:
            results.append(dict(zip(names, session.run(names, feed.arrays, quiet), strict=True)))
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
       token was written is not defined. Rows (of the last axis) that overflow in the original may overflow elsewhere;
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
    counts = {r.name: sum(_strange(a[r.name], b[r.name]) for a, b in zip(old, new, strict=True)) for r in floats}
    strange = [f"{name!r}: {count} values" for name, count in counts.items() if count]
    checks.append(counted("NaN and Inf are only where the original has them", len(floats), strange, "outputs"))
    for record in [r for r in records if r.logits] or floats:
        checks += _against_limits(record, thresholds)
    for record in records:
        if old[0][record.name].dtype.kind != "f":
            checks.append(Check(f"{record.name}: equal", record.closeness.equal, None, True, "share of equal values"))
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


def _strange(old: np.ndarray, new: np.ndarray) -> int:
    """NaN and Inf in `new` that `old` has not, in rows that `old` can express: -Inf there masks, it is no overflow."""
    a, b = np.atleast_1d(old), np.atleast_1d(new)
    overflows = (np.isnan(a) | np.isposinf(a)).any(axis=-1, keepdims=True)
    return int((~np.isfinite(b) & (a != b) & ~overflows).sum())


def _against_limits(record: OutputRecord, thresholds: Thresholds) -> Iterator[Check]:
    limits = thresholds if record.closeness.elements else Thresholds()  # no value is within no limit
    for metric in _CLOSENESS:
        yield held(metric, f"{record.name}: {metric}", getattr(record.closeness, metric), limits)
    if record.logits:
        details = {"kl": "nats, mean of", "top1": "share of", "top5": "mean shared of five,"}
        for metric, detail in details.items():
            value, positions = getattr(record.logits, metric), record.logits.positions
            yield held(metric, f"{record.name}: {metric}", value, limits, f"{detail} {positions} positions")
