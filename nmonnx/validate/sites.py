"""Measure every pruned layer on its own: what it keeps, its error, and that its op does what the reference says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from onnx import NodeProto

from nmonnx.errors import InputError
from nmonnx.feeds import Feed
from nmonnx.metrics import relative
from nmonnx.pattern import Pattern
from nmonnx.reference import prune
from nmonnx.sites import Site
from nmonnx.taps import Tapped
from nmonnx.validate.claims import Claim
from nmonnx.validate.pair import Pair
from nmonnx.validate.result import Check, SiteRecord, counted

_AT_ONCE = 128
"""Layers whose tensors are fetched in one run; bounds memory."""

_ROWS = 64
"""Rows of an activation that are multiplied with the weight; bounds time."""

_LARGEST_WEIGHT = 1 << 28
"""Weights with more elements than this are not multiplied again."""

_BLOCK = 1 << 22
"""Elements of a weight that are widened to float64 at once; bounds memory."""


def measure_sites(
    pair: Pair, sites: Sequence[Site], feeds: Sequence[Feed], threads: int
) -> tuple[list[SiteRecord], list[Check]]:
    """A record for every claimed layer, and checks that each op computes what the reference does on the activation
    that it saw. `sites` are those of the original, for their weights. Raises RunError when a model does not run."""
    probes = [_probe(pair, claim) for claim in pair.claims.sites]
    tapped = [p for p in probes if p.node is not None]
    if tapped and feeds:
        _run(pair, tapped, feeds, threads)
        weights = {site.name: site for site in sites}
        for probe in tapped:
            _multiply(probe, weights.get(probe.claim.name))
    return [_record(p) for p in probes], _checks(tapped) if feeds else []


@dataclass
class _Probe:
    """One layer, and sums over what was seen of it. `before` are rows of the original's activation, `after` pairs of
    rows of the converted model's activation and output. `options` are the op's inputs beside x and W; those that are no
    stored values, but `computed` by nodes such as a Cast, are fetched by tensor name in each run. `own_bias` is what a
    folded bias stands for in the original; `misfold` how far the folded one is from what it should be."""

    claim: Claim
    node: NodeProto | None
    note: str = ""
    options: dict[str, np.ndarray] = field(default_factory=dict)
    computed: dict[str, str] = field(default_factory=dict)
    own_bias: np.ndarray | None = None
    misfold: float | None = None
    tokens: int = 0
    energy: float = 0.0
    kept: float = 0.0
    elements: int = 0
    nonzero: int = 0
    wrong_groups: int = 0
    wrong_values: int = 0
    signal: float = 0.0
    drift: float = 0.0
    compares_outputs: bool = False
    before: list[np.ndarray] = field(default_factory=list)
    after: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    error: float | None = None
    excess: float | None = None

    @property
    def pattern(self) -> Pattern:
        return Pattern.parse(self.claim.pattern)

    @property
    def fused(self) -> bool:
        return self.claim.kernel == "NMMatMul"

    @property
    def variance(self) -> bool:
        """Whether the op restores the variance of each token."""
        return self.node is not None and any(a.name == "variance" and a.i for a in self.node.attribute)

    def select(self, x: np.ndarray, variance: bool = False) -> np.ndarray:
        """The kept values of x, or of x - shift."""
        criterion: dict[str, Any] = {slot: self.options.get(slot) for slot in ("scale", "shift", "order")}
        return prune(x, self.pattern.n, self.pattern.m, **criterion, variance=variance)

    def prune(self, x: np.ndarray) -> np.ndarray:
        """What the op makes of x."""
        return self.select(x, self.variance)

    def computes_with(self, x: np.ndarray) -> np.ndarray:
        """What the layer computes with: the pruned activation and the shift, which the bias makes up for."""
        shift = self.options.get("shift")
        return self.prune(x) if shift is None else self.prune(x) + shift

    def names(self) -> tuple[list[str], list[str]]:
        """Tensors to tap in the original and in the converted model."""
        assert self.node is not None
        names = [self.claim.activation, self.claim.output]
        own = [] if self.fused else [self.node.output[0]]
        return names, [*names, *own, *self.computed.values()]


def _probe(pair: Pair, claim: Claim) -> _Probe:
    if not claim.pruned:
        return _Probe(claim, None)
    trail = pair.new_trail(claim)
    if claim.scope or pair.new.find("", claim.activation) is None or trail is None:
        return _Probe(claim, None, "inside a subgraph or function, whose tensors cannot be seen from outside")
    ops = list(trail.own.values())
    if len(ops) != 1:
        return _Probe(claim, None, "it has no op of its own")
    probe = _Probe(claim, ops[0])
    for slot, key in pair.inputs_of("", ops[0]).items():
        if slot in ("x", "W"):
            continue
        values = pair.constant(key)
        if values is None:
            probe.computed[slot] = key[1]
        else:
            probe.options[slot] = values
        if slot == "bias":
            probe.own_bias = _replaced(pair, key[1])
    return probe


def _replaced(pair: Pair, name: str) -> np.ndarray | None:
    """Values of the tensor of the original that a declared constant stands for."""
    declared = pair.claims.constants.get(name)
    key = pair.old.find("", declared.replaces) if declared else None
    stored = pair.old.initializer(key) if key else None
    return None if stored is None else pair.in_before.array(stored)


def _run(pair: Pair, probes: Sequence[_Probe], feeds: Sequence[Feed], threads: int) -> None:
    names = [p.names() for p in probes]
    old = Tapped(pair.in_before.path, pair.before, pair.in_before, (n for a, _ in names for n in a), threads)
    new = Tapped(pair.in_after.path, pair.after, pair.in_after, (n for _, b in names for n in b), threads)
    for feed in feeds:
        for group in _batches(probes):
            before = old.run(feed.arrays, [n for p in group for n in p.names()[0]])
            after = new.run(feed.arrays, [n for p in group for n in p.names()[1]])
            for probe in group:
                _see(probe, before, after)


def _see(probe: _Probe, before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> None:
    claim = probe.claim
    x = before[claim.activation]
    if x.ndim == 0 or x.shape[-1] != claim.k:
        probe.note = f"its activation has shape {list(x.shape)}, not {claim.k} channels in the last axis"
        return
    x = x.reshape(-1, claim.k)
    probe.options |= {slot: after[name] for slot, name in probe.computed.items()}
    probe.tokens += len(x)
    kept = probe.select(x)
    probe.energy += _square(x)
    probe.kept += _square(kept)
    probe.before.append(_sample(x))
    _see_outputs(probe, before[claim.output], after[claim.output])
    _see_op(probe, after)


def _see_outputs(probe: _Probe, old: np.ndarray, new: np.ndarray) -> None:
    if old.dtype.kind == "f" and old.shape == new.shape:
        probe.compares_outputs = True
        probe.signal += _square(old)
        with np.errstate(invalid="ignore"):
            probe.drift += _square(new.astype(np.float64) - old)


def _see_op(probe: _Probe, after: Mapping[str, np.ndarray]) -> None:
    assert probe.node is not None
    x = after[probe.claim.activation].reshape(-1, probe.claim.k)
    want = probe.prune(x)
    got = want if probe.fused else after[probe.node.output[0]].reshape(-1, probe.claim.k)
    probe.elements += got.size
    probe.nonzero += int(np.count_nonzero(got))
    if probe.fused:
        y = after[probe.claim.output]
        probe.after.append((_sample(x), _sample(y.reshape(-1, y.shape[-1]))))
        return
    alike = _close(got, want) if probe.variance else _same(got, want)
    probe.wrong_values += int((~alike).sum())
    order = probe.options.get("order")
    probe.wrong_groups += _wrong_groups(
        x if order is None else x[:, order], got if order is None else got[:, order], probe.pattern
    )


def _wrong_groups(x: np.ndarray, pruned: np.ndarray, pattern: Pattern) -> int:
    """Groups that do not keep exactly n non-zero values, or all of them where the activation has fewer."""
    starts = np.arange(0, x.shape[1], pattern.m)
    if not x.size:
        return 0
    had, has = (np.add.reduceat(a != 0, starts, axis=1, dtype=np.int64) for a in (x, pruned))
    return int((has != np.minimum(had, pattern.n)).sum())


def _multiply(probe: _Probe, site: Site | None) -> None:
    """The layer's own error, and for a fused op how far its output is beyond rounding, on some rows."""
    claim = probe.claim
    if site is None or not probe.tokens or claim.k * claim.n > _LARGEST_WEIGHT:
        return
    try:
        weight = site.weight()
    except InputError as e:
        probe.note = str(e)
        return
    if weight.shape != (claim.k, claim.n):
        probe.note = f"its error is not measured: its weight has shape {list(weight.shape)}"
        return
    if probe.fused and "shift" in probe.options:
        probe.misfold = _misfold(probe, weight)
    x = np.concatenate(probe.before)[:_ROWS].astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        products = ((x - probe.computes_with(x)) @ weight, x @ weight)
        lost, whole = (np.linalg.norm(rows.astype(np.float64)) for rows in products)
    probe.error = relative(float(lost), float(whole))
    if probe.fused:
        probe.excess = _excess(probe, weight)


def _misfold(probe: _Probe, weight: np.ndarray) -> float:
    """Largest difference of the bias from what it should be, the original's bias + shift W, in units of the rounding of
    float32 sums and of the bias's own type."""
    shift = np.broadcast_to(probe.options["shift"], probe.claim.k).astype(np.float64)
    own = np.zeros(1) if probe.own_bias is None else probe.own_bias.reshape(-1).astype(np.float64)
    bias = probe.options.get("bias", np.zeros(1, np.float32)).reshape(-1)
    wide = weight.astype(np.float64)
    bound = np.abs(own) + np.abs(shift) @ np.abs(wide)
    unit = np.finfo(bias.dtype).eps + np.finfo(np.float32).eps
    gap = np.abs(bias.astype(np.float64) - (own + shift @ wide))
    return float(np.where(gap == 0, 0.0, gap / np.maximum(unit * bound, np.finfo(bias.dtype).tiny)).max(initial=0.0))


def _excess(probe: _Probe, weight: np.ndarray) -> float:
    """Largest |y - reference| in units of what rounding explains: float32 sums in any order, and the rounding of y."""
    x, y = (np.concatenate(part)[:_ROWS] for part in zip(*probe.after, strict=True))
    bias = probe.options.get("bias", np.zeros(1, np.float32)).reshape(-1).astype(np.float64)
    pruned = probe.prune(x).astype(np.float64)
    width = max(1, _BLOCK // probe.claim.k)
    blocks = [slice(start, start + width) for start in range(0, probe.claim.n, width)]
    parts = (_excess_of(pruned, weight[:, b], bias[b] if bias.size > 1 else bias, y[:, b]) for b in blocks)
    return max(parts, default=0.0)


def _excess_of(pruned: np.ndarray, weight: np.ndarray, bias: np.ndarray, y: np.ndarray) -> float:
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        want = pruned @ weight + bias
        bound = np.abs(pruned) @ np.abs(weight) + np.abs(bias)
        unit = np.finfo(y.dtype).eps + (len(weight) + 1) * np.finfo(np.float32).eps
        ratio = np.where(y == want, 0.0, np.abs(y - want) / (unit * bound))
        alike = np.where(np.isfinite(want), _overflows(want, bound, y, unit), _same(want.astype(y.dtype), y))
    ratio = np.where(np.isfinite(want) & np.isfinite(y), ratio, np.where(alike, 0.0, np.inf))
    return float(np.nan_to_num(ratio, nan=np.inf).max(initial=0.0))


def _overflows(want: np.ndarray, bound: np.ndarray, y: np.ndarray, unit: float) -> np.ndarray:
    """Where `y` may be what it is, Inf or NaN, though the sum is finite: because a partial sum leaves the range of
    float32, or because the sum rounds to Inf in y's own type."""
    partial = bound * (1 + unit) >= np.finfo(np.float32).max
    rounded = (np.abs(want) + unit * bound >= np.finfo(y.dtype).max) & (y == np.copysign(np.inf, want))
    return partial | rounded


def _checks(probes: Sequence[_Probe]) -> list[Check]:
    seen = [p for p in probes if p.tokens]
    alone, fused = [p for p in seen if not p.fused], [p for p in seen if p.excess is not None]
    values = [f"{p.claim.name!r}: {p.wrong_values} values differ" for p in alone if p.wrong_values]
    groups = [f"{p.claim.name!r}: {p.wrong_groups} groups" for p in alone if p.wrong_groups]
    products = [f"{p.claim.name!r}: {p.excess:.3g} times what rounding explains" for p in fused if _is_beyond(p.excess)]
    shifted = [p for p in seen if p.misfold is not None]
    folds = [
        f"{p.claim.name!r}: {p.misfold:.3g} times what rounding explains" for p in shifted if _is_beyond(p.misfold)
    ]
    folded = [counted("folded biases make up for the shift", len(shifted), folds, "layers with a shift")]
    return [
        *(folded if shifted else []),
        counted("pruned activations equal the reference bit for bit", len(alone), values, "layers with NMPrune"),
        counted("every group keeps exactly N of its non-zero values", len(alone), groups, "layers with NMPrune"),
        counted("fused layers equal the reference up to rounding", len(fused), products, "layers with NMMatMul"),
    ]


def _is_beyond(excess: float | None) -> bool:
    return excess is not None and excess > 1


def _record(probe: _Probe) -> SiteRecord:
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
    step = max(1, len(rows) // (_ROWS // 4))
    return rows[::step][: _ROWS // 4].copy()


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Equal in value and sign of zero, or both NaN."""
    return ((a == b) & (np.signbit(a) == np.signbit(b))) | (np.isnan(a) & np.isnan(b))


def _close(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Equal up to the rounding of a factor that is computed in float32, of sums over all channels."""
    unit = 4 * np.finfo(a.dtype).eps + 64 * np.finfo(np.float32).eps
    with np.errstate(invalid="ignore", over="ignore"):
        return _same(a, b) | (np.abs(a.astype(np.float64) - b) <= unit * np.abs(b.astype(np.float64)))


def _batches(probes: Sequence[_Probe]) -> Iterator[Sequence[_Probe]]:
    return (probes[i : i + _AT_ONCE] for i in range(0, len(probes), _AT_ONCE))
