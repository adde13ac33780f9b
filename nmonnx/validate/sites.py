"""Measure every pruned layer on its own: what it keeps, its error, and that its op does what the reference says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from nmonnx.calibration.taps import Tapped
from nmonnx.evaluation.metrics import relative
from nmonnx.feeds import Feed
from nmonnx.pattern import Pattern, Share
from nmonnx.pruning.emulated import OPS
from nmonnx.records.corrections import Corrections
from nmonnx.sites import Site
from nmonnx.validate.pair import Pair
from nmonnx.validate.probe import Probe, probe_of
from nmonnx.validate.products import ROWS, close, multiply, same
from nmonnx.validate.result import Check, SiteRecord, counted

_AT_ONCE = 128
"""Layers whose tensors are fetched in one run; bounds memory."""


def measure_sites(
    pair: Pair, sites: Sequence[Site], feeds: Sequence[Feed], threads: int, fit: Corrections | None = None
) -> tuple[list[SiteRecord], list[Check]]:
    """A record for every claimed layer, and checks that each op computes what the reference does on the activation
    that it saw; and that every layer corrected by `fit` does what the formula says, not folded. `sites` are those of
    the original, for their weights. Raises RunError when a model does not run."""
    probes = [probe_of(pair, claim) for claim in pair.claims.sites]
    for probe in probes:
        if fit is not None and probe.claim.name in pair.claims.fitted:
            probe.correction = fit.sites.get(probe.claim.name)
    tapped = [p for p in probes if p.node is not None]
    if tapped and feeds:
        _run(pair, tapped, feeds, threads)
        weights = {site.name: site for site in sites}
        for probe in tapped:
            multiply(probe, weights.get(probe.claim.name))
    return [_record(p) for p in probes], _checks(tapped) if feeds else []


def _run(pair: Pair, probes: Sequence[Probe], feeds: Sequence[Feed], threads: int) -> None:
    names = [p.names() for p in probes]
    old = Tapped(pair.in_before.path, pair.before, pair.in_before, (n for a, _ in names for n in a), threads)
    new = Tapped(pair.in_after.path, pair.after, pair.in_after, (n for _, b in names for n in b), threads)
    for feed in feeds:
        for group in _batches(probes):
            before = old.run(feed.arrays, [n for p in group for n in p.names()[0]])
            after = new.run(feed.arrays, [n for p in group for n in p.names()[1]])
            for probe in group:
                _see(probe, before, after)


def _see(probe: Probe, before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> None:
    claim = probe.claim
    x = before[claim.activation]
    if x.ndim == 0 or x.shape[-1] != claim.k:
        probe.note = f"its activation has shape {list(x.shape)}, not {claim.k} channels in the last axis"
        return
    x = x.reshape(-1, claim.k)
    probe.options |= {slot: after[name] for slot, name in probe.computed.items()}
    probe.tokens += len(x)
    kept = probe.select(x)
    probe.energy += _square(probe.moved(x))
    probe.kept += _square(kept)
    probe.before.append(_sample(x))
    if claim.kernel in OPS:
        probe.chosen.append(_sample(probe.computes_with(x)))
    probe.dense.append(_sample(_dense_of(probe, len(x))))
    if probe.correction is not None:
        probe.outputs.append(_sample(before[claim.output].reshape(-1, claim.n)))
    _see_outputs(probe, before[claim.output], after[claim.output])
    _see_op(probe, after)


def _see_outputs(probe: Probe, old: np.ndarray, new: np.ndarray) -> None:
    if old.dtype.kind == "f" and old.shape == new.shape:
        probe.compares_outputs = True
        probe.signal += _square(old)
        with np.errstate(invalid="ignore"):
            probe.drift += _square(new.astype(np.float64) - old)


def _see_op(probe: Probe, after: Mapping[str, np.ndarray]) -> None:
    assert probe.node is not None
    x = after[probe.claim.activation].reshape(-1, probe.claim.k)
    want = probe.prune(x)
    got = want if probe.fused else after[probe.node.output[0]].reshape(-1, probe.claim.k)
    probe.elements += got.size
    probe.nonzero += int(np.count_nonzero(got))
    if probe.fused or probe.correction is not None:
        y = after[probe.claim.output]
        rows = (x, y.reshape(-1, y.shape[-1]), _dense_of(probe, len(x)))
        probe.after.append((_sample(rows[0]), _sample(rows[1]), _sample(rows[2])))
    if probe.fused:
        return
    alike = close(got, want) if probe.variance else same(got, want)
    probe.wrong_values += int((~alike).sum())
    if not _counts(probe):
        return
    sparse = ~_dense_of(probe, len(x))
    if probe.variance:  # a token of no variance is multiplied by 0 (Eq. 5)
        sparse &= want.any(axis=1)
    order, z, got = probe.options.get("order"), probe.moved(x)[sparse], got[sparse]
    probe.wrong_groups += _wrong_groups(
        z if order is None else z[:, order], got if order is None else got[:, order], probe.pattern
    )


def _counts(probe: Probe) -> bool:
    """Whether n of every m channels stay that are not zero; the smallest are zeros first."""
    return not isinstance(probe.pattern, Share) and probe.claim.kernel != "NMAnti"


def _dense_of(probe: Probe, tokens: int) -> np.ndarray:
    """Which tokens of this run keep all their channels."""
    return np.broadcast_to(probe.options.get("dense", np.zeros(1, bool)).reshape(-1), tokens)


def _wrong_groups(x: np.ndarray, pruned: np.ndarray, pattern: Pattern) -> int:
    """Groups that do not keep exactly n non-zero values, or all of them where the activation has fewer."""
    starts = np.arange(0, x.shape[1], pattern.m)
    if not x.size:
        return 0
    had, has = (np.add.reduceat(a != 0, starts, axis=1, dtype=np.int64) for a in (x, pruned))
    return int((has != np.minimum(had, pattern.n)).sum())


def _checks(probes: Sequence[Probe]) -> list[Check]:
    seen = [p for p in probes if p.tokens]
    alone, fused = [p for p in seen if not p.fused], [p for p in seen if p.excess is not None]
    values = [f"{p.claim.name!r}: {p.wrong_values} values differ" for p in alone if p.wrong_values]
    groups = [f"{p.claim.name!r}: {p.wrong_groups} groups" for p in alone if p.wrong_groups]
    grouped = [p for p in alone if _counts(p)]
    products = [f"{p.claim.name!r}: {p.excess:.3g} times what rounding explains" for p in fused if _is_beyond(p.excess)]
    moved = [
        *_fold_check("folded biases make up for the shift", "layers with a shift", {p: p.misfold for p in seen}),
        *_fold_check("row sums make up for the center", "layers with a center", {p: p.missum for p in seen}),
        *_fold_check("folded layers equal their corrections, unfolded", "layers", {p: p.beyond for p in seen}),
    ]
    return [
        *moved,
        counted("pruned activations equal the reference bit for bit", len(alone), values, "layers with NMPrune"),
        counted("every group keeps exactly N of its non-zero values", len(grouped), groups, "layers with NMPrune"),
        counted("fused layers equal the reference up to rounding", len(fused), products, "fused layers"),
    ]


def _fold_check(name: str, what: str, measured: Mapping[Probe, float | None]) -> list[Check]:
    known = {probe: excess for probe, excess in measured.items() if excess is not None}
    faults = [
        f"{probe.claim.name!r}: {excess:.3g} times what rounding explains"
        for probe, excess in known.items()
        if excess > 1
    ]
    return [counted(name, len(known), faults, what)] if known else []


def _is_beyond(excess: float | None) -> bool:
    return excess is not None and excess > 1


def _record(probe: Probe) -> SiteRecord:
    c = probe.claim
    note = probe.note or ("" if probe.tokens or not c.pruned else "not measured: no tokens were seen")
    record = SiteRecord(c.name, c.role, c.block, c.k, c.n, c.status, c.pattern, c.kernel, c.reason, note=note)
    if not probe.tokens:
        return record
    return replace(
        record,
        tokens=probe.tokens,
        kept_energy=probe.kept / probe.energy if probe.energy else 1.0,
        density=probe.nonzero / probe.elements if probe.elements else None,
        error=probe.error,
        error_propagated=relative(math.sqrt(probe.drift), math.sqrt(probe.signal)) if probe.compares_outputs else None,
    )


def _square(x: np.ndarray) -> float:
    """Sum of the squares of the finite values."""
    wide = x.astype(np.float64).reshape(-1)
    wide = wide[np.isfinite(wide)]
    return float(wide @ wide)


def _sample(rows: np.ndarray) -> np.ndarray:
    """Some rows, evenly spread."""
    step = max(1, len(rows) // (ROWS // 4))
    return rows[::step][: ROWS // 4].copy()


def _batches(probes: Sequence[Probe]) -> Iterator[Sequence[Probe]]:
    return (probes[i : i + _AT_ONCE] for i in range(0, len(probes), _AT_ONCE))
