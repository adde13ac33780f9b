"""What validation measured, and whether it is within the limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nmonnx.errors import UsageError
from nmonnx.evaluation.metrics import Closeness, LogitCloseness
from nmonnx.pruning.recipe import Recipe

_SHOWN = 3

_MOST = {"max_abs", "mean_abs", "relative", "kl", "ppl_ratio"}
"""Limits that are the most; the others are the least."""

GREEDY = "greedy continuation is equal"
PPL_RATIO = "perplexity ratio"
KEPT_ENERGY = "kept energy of a layer's input"

_NAMES = {"greedy": GREEDY, "ppl_ratio": PPL_RATIO, "kept_energy": KEPT_ENERGY}

_MISSING = {
    **dict.fromkeys(("kl", "top1", "top5"), "no output holds logits"),
    "greedy": "the model is no text decoder, or no tokens were asked for",
    "ppl_ratio": "give a text decoder, a tokenizer and a text",
    "kept_energy": "no pruned layer saw a token",
}
"""What a limit lacks when nothing measured it."""


@dataclass(frozen=True)
class Check:
    """One comparison: what, measured, limit (None: measured only), passed, the words to it, and the field of
    `Thresholds` that it is about ("" when it is proven or only measured)."""

    name: str
    value: float
    limit: float | None
    passed: bool
    detail: str = ""
    metric: str = ""


@dataclass(frozen=True)
class Thresholds:
    """Limits that the user sets; None asks for nothing. Raises UsageError for NaN, which nothing meets.

    max_abs, mean_abs, relative, kl  most; snr_db, cosine, top1, top5  least: of the logits, or of every
                                     floating-point output of a model without logits
    greedy                           least share of the greedy continuation that is equal, up to the first difference
    ppl_ratio                        most perplexity of the converted model, in units of the original's
    kept_energy                      least share of the energy of the activation that a site keeps
    """

    max_abs: float | None = None
    mean_abs: float | None = None
    relative: float | None = None
    snr_db: float | None = None
    cosine: float | None = None
    kl: float | None = None
    top1: float | None = None
    top5: float | None = None
    greedy: float | None = None
    ppl_ratio: float | None = None
    kept_energy: float | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            if (limit := getattr(self, f.name)) is not None and math.isnan(limit):
                raise UsageError(f"the limit of {f.name} is NaN, which nothing meets; give a number")


@dataclass(frozen=True)
class OutputRecord:
    """One graph output over all feeds; `logits` is there when it holds logits."""

    name: str
    closeness: Closeness
    logits: LogitCloseness | None = None


@dataclass(frozen=True)
class SiteRecord:
    """One linear layer: what the conversion says of it, and for a pruned one what was measured (None: not measured,
    `note` says why).

    tokens           rows of its activation that were seen
    kept_energy      sum(pruned^2) / sum(x^2) of the original's activation
    density          share of non-zero values in the converted model's pruned activation
    error            ||(x - pruned x) W|| / ||x W|| on the original's activation: this layer's own error
    error_propagated ||y' - y|| / ||y|| of its output in the two models, with the errors of the layers before it
    """

    name: str
    role: str
    block: int | None
    k: int
    n: int
    status: str
    pattern: str = ""
    kernel: str = ""
    reason: str = ""
    tokens: int = 0
    kept_energy: float | None = None
    density: float | None = None
    error: float | None = None
    error_propagated: float | None = None
    note: str = ""


@dataclass(frozen=True)
class LanguageRecord:
    """greedy            mean share of the continuation equal up to the first difference, None when not measured
    prompts, new_tokens  prompts continued, tokens written for each
    ppl_original, ppl_converted, ppl_error  perplexities and the standard error of log(ppl ratio) over windows
    protocol             how perplexity was measured
    """

    greedy: float | None = None
    prompts: int = 0
    new_tokens: int = 0
    ppl_original: float | None = None
    ppl_converted: float | None = None
    ppl_error: float | None = None
    protocol: str = ""


@dataclass(frozen=True)
class Report:
    """Everything about one pair of models. `skipped` says what could not be measured, with the reason."""

    original: Path
    converted: Path
    recipe: Recipe
    checks: tuple[Check, ...]
    outputs: tuple[OutputRecord, ...] = ()
    sites: tuple[SiteRecord, ...] = ()
    language: LanguageRecord = field(default_factory=LanguageRecord)
    feeds: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """(check, measured, limit, "pass"/"FAIL"/"" when there is no limit, detail), as text."""
        return [
            (
                c.name,
                _number(c.value),
                "" if c.limit is None else _number(c.limit),
                "" if c.limit is None and c.passed else "pass" if c.passed else "FAIL",
                c.detail,
            )
            for c in self.checks
        ]

    def site_rows(self) -> list[tuple[str, ...]]:
        """(site, role, pattern, kernel, kept energy, density, error, propagated error, reason or note), as text."""
        rows = []
        for s in self.sites:
            measured = (s.kept_energy, s.density, s.error, s.error_propagated)
            cells = ("" if v is None else _number(v) for v in measured)
            rows.append((s.name, s.role, s.pattern, s.kernel or s.status, *cells, s.reason or s.note))
        return rows

    def data(self) -> dict[str, Any]:
        """The report as JSON values; infinities and NaN as text, since JSON has none."""
        return _jsonable(
            {
                "passed": self.passed,
                "original": str(self.original),
                "converted": str(self.converted),
                "recipe": {**asdict(self.recipe), "pattern": str(self.recipe.pattern)},
                "checks": [asdict(c) for c in self.checks],
                "outputs": [asdict(o) for o in self.outputs],
                "sites": [asdict(s) for s in self.sites],
                "language": asdict(self.language),
                "feeds": list(self.feeds),
                "skipped": [{"what": what, "reason": reason} for what, reason in self.skipped],
            }
        )

    def to_json(self) -> str:
        """`data` with schema version, versions of the tools and SHA-256 of the two .onnx files."""
        from nmonnx import report

        title = f"validation of {self.converted.name}"
        return report.to_json(report.Report(title, data=self.data(), inputs=(self.original, self.converted)))


def counted(name: str, total: int, faults: Sequence[str], what: str) -> Check:
    """A check that none of `total` things is at fault; the value is how many are right, the limit all of them."""
    if not faults:
        return Check(name, total, total, True, f"{total} {what}")
    shown = "; ".join(faults[:_SHOWN])
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return Check(name, max(0, total - len(faults)), total, False, shown + more)


def held(metric: str, name: str, value: float, limits: Thresholds, detail: str = "") -> Check:
    """A check that `value` is within the limit of `metric`, a field of `Thresholds`, if there is one."""
    limit = getattr(limits, metric)
    within = limit is None or (value <= limit if metric in _MOST else value >= limit)
    return Check(name, value, limit, within, detail, metric)


def unmeasured(checks: Sequence[Check], limits: Thresholds, reason: str = "") -> list[Check]:
    """A failed check for every limit that none of `checks` is about: what was not measured is not within it. `reason`
    says why nothing at all was measured."""
    measured = {check.metric for check in checks if check.limit is not None}
    return [
        Check(_NAMES.get(metric, metric), math.nan, limit, False, _not_measured(reason or _MISSING.get(metric)), metric)
        for metric, limit in asdict(limits).items()
        if limit is not None and metric not in measured
    ]


def _not_measured(reason: str | None) -> str:
    return f"not measured: {reason or 'no floating-point output has values'}"


def _number(value: float) -> str:
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e6):
        return str(int(value))
    return f"{value:.4g}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
