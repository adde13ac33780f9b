"""`Recipe`: what a conversion does, immutable, as JSON or YAML, stored in the converted model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nmonnx.errors import InputError, UnknownWord, UsageError
from nmonnx.pattern import Pattern, Share
from nmonnx.pruning.criteria import CALIBRATED, CRITERIA
from nmonnx.pruning.emulated import DYNAMIC, SCOPES, emulated_op
from nmonnx.pruning.mitigations import FITTED, check_together
from nmonnx.pruning.shifts import CENTERS, SHIFTS
from nmonnx.yaml_file import read_yaml

KERNELS = ("auto", "prune", "fused")
FALLBACKS = ("function", "none")
WEIGHTS = ("keep", "fp16", "int8", "int4")
SHARES = ("joint", "separate")
PRUNED = ("activations", "weights")
ORDERS = ("none", "deal", "swap")
MITIGATIONS = (*SHIFTS, *CENTERS, "var", *FITTED)
PHASES = ("both", "prefill", "decode")
ALLOCATIONS = ("uniform", "forward", "fisher")
DEFAULT_PATTERN = Pattern(8, 16)
SCHEMA_VERSION = 1
_EVERY_TOKEN = {"phase": "both", "dense_prefix": 0}


_WORDS = {
    "criterion": (*CRITERIA, *DYNAMIC),
    "scope": SCOPES,
    "prune": PRUNED,
    "share": SHARES,
    "order": ORDERS,
    "allocate": ALLOCATIONS,
    "phase": PHASES,
    "kernel": KERNELS,
    "fallback": FALLBACKS,
    "weights": WEIGHTS,
}


@dataclass(frozen=True)
class Recipe:
    """pattern   keep n of every m input channels of each chosen linear layer, or a share of them
    include   selectors of the layers to prune; empty: every one but lm_head
    exclude   selectors of layers to leave dense
    dense_blocks numbers of blocks to leave dense; -1 is the last one
    lm_head   prune lm_head too
    criterion what makes a channel worth keeping, see `criteria`; or the path of an .npz with a vector [K] for
              each layer; "clact" and "anti" are no constant factor of the score, see `emulated`
    scope     how a share is kept: "token": the best channels of each token; "call": the best elements of all tokens of
              a call; "threshold": what scores above a calibrated threshold of the layer (TEAL; with "wina" CHESS)
    prune     "activations"; "weights": those of small magnitude are 0 in the file, the activations stay dense (the
              baseline WT of arXiv 2509.22166)
    share     "joint": layers that read one activation share one prune, with a joint criterion; "separate": one each
    order     "deal": cut the groups of each layer along its channels dealt by calibrated rms; "swap": the same, then
              channels that are wanted in the same tokens are parted; "none": as they lie
    mitigations corrections: one of `shifts.SHIFTS`, such as "s-pts" (shift by the calibrated mean of each
              channel, folded into biases), or "d-pts" (by the median of each token) or "d-pts-mean" (by its mean);
              "var" (restore the variance of each token, that of what is left after the shift); and those whose
              constants `nmonnx fit` finds, see `mitigations`
    rank      of the low rank that "r-sparse" keeps dense
    allocate  "forward": a kept N for each layer, from its measured sensitivity, at the weight bytes of `pattern`;
              "fisher": the same from the measured gradients of the loss;
              "uniform": the same N everywhere
    patterns  selector -> pattern of the layers that it matches, the last one wins; others have `pattern`
    phase     "prefill": prune only calls with several tokens in a row; "decode": only those with one; "both"
    dense_prefix tokens at positions before this one stay dense
    kernel    "auto": prune and multiply in one op where that pays; "fused": wherever it can be done;
              "prune": prune only, the linear layers stay as they are
    weights   "fp16", "int8", "int4": store the weights of the fused layers so; "keep": as they are
    fallback  "function": embed the ops as model-local functions of stock ops, so that the file runs without
              the library; "none": do not
    """

    pattern: Pattern = DEFAULT_PATTERN
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    dense_blocks: tuple[int, ...] = ()
    lm_head: bool = False
    criterion: str = "act"
    scope: str = "token"
    prune: str = "activations"
    share: str = "joint"
    order: str = "none"
    mitigations: tuple[str, ...] = ()
    rank: int = 64
    allocate: str = "uniform"
    patterns: tuple[tuple[str, Pattern], ...] = ()
    phase: str = "both"
    dense_prefix: int = 0
    kernel: str = "auto"
    weights: str = "keep"
    fallback: str = "function"

    def __post_init__(self) -> None:
        for key, known in _WORDS.items():
            value = getattr(self, key)
            if value not in known and not (key == "criterion" and value.endswith(".npz")):
                also = " or an .npz file" if key == "criterion" else ""
                raise UnknownWord(f"{key} {value!r} is not one of {', '.join(known)}{also}")
        if not 0 <= self.dense_prefix < 1 << 31:
            size = "negative" if self.dense_prefix < 0 else "more than any text has"
            raise UsageError(f"dense_prefix {self.dense_prefix} is {size}; it is a number of tokens")
        unknown = [m for m in self.mitigations if m not in MITIGATIONS]
        if unknown:
            also = "it is a criterion; the mitigations are" if unknown[0] in CRITERIA else "it is not one of"
            raise UnknownWord(f"mitigation {unknown[0]!r}: {also} {', '.join(MITIGATIONS)}")
        check_together(self.mitigations)
        if self.fitted and any(getattr(self, key) != value for key, value in _EVERY_TOKEN.items()):
            raise UsageError(
                f"mitigation {self.fitted[0]} is folded into weights, which dense tokens meet too; leave phase and"
                " dense_prefix out"
            )
        if self.rank < 1:
            raise UsageError(f"rank {self.rank} must be 1 or more")
        if self.patterns and self.allocate != "uniform":
            raise UsageError("patterns for single layers and an allocation exclude each other; give one of them")
        if self.weights != "keep" and (self.kernel == "prune" or self.prune == "weights" or self.emulated):
            raise UsageError(
                f"weights {self.weights} are for the ops that prune and multiply in one, and there is none"
            )
        if self.prune == "weights":
            plain = {"criterion": "act", "scope": "token", "mitigations": (), "allocate": "uniform", "order": "none"}
            wrong = [key for key, value in {**plain, **_EVERY_TOKEN}.items() if getattr(self, key) != value]
            if wrong:
                raise UsageError(f"weights are pruned by their magnitude alone; leave {wrong[0]} out")
        if self.emulated:
            self._refuse_without_kernel()

    @property
    def emulated(self) -> str:
        """The op of `emulated` that prunes, "" where the kernels do. Raises UsageError for what there is not."""
        if self.prune == "weights":
            return ""
        shares = {isinstance(pattern, Share) for pattern in (self.pattern, *(p for _, p in self.patterns))}
        if len(shares) > 1:
            raise UsageError("patterns mix N:M and shares kept; convert with one kind")
        share = shares.pop()
        if self.scope != "token" and not share:
            raise UsageError(f"scope {self.scope!r} is how a share is kept, but {self.pattern} is N:M; write 50%")
        op = emulated_op(self.criterion, share, self.scope)
        if self.criterion in DYNAMIC and not op:
            raise UsageError(f"criterion {self.criterion!r} has no threshold; take scope token or call")
        return op

    def _refuse_without_kernel(self) -> None:
        """Refuse what the ops of stock operators do not do. Raises UsageError."""
        what = f"pattern {self.pattern} with criterion {self.criterion} has no kernel, it is made of stock operators"
        if self.fitted:
            raise UsageError(f"{what}: nothing that is fitted, such as {self.fitted[0]}")
        if self.kernel == "fused":
            raise UsageError(f"{what}: kernel fused cannot be")
        if any(getattr(self, key) != value for key, value in _EVERY_TOKEN.items()):
            raise UsageError(f"{what}: no phase and no dense prefix")
        if self.allocate != "uniform":
            raise UsageError(f"{what}: no allocation")
        if self.order != "none":
            raise UsageError(f"{what}: an order of the channels cannot be or does not matter")
        if self.scope == "threshold" and any(p.n == p.m for p in (self.pattern, *(p for _, p in self.patterns))):
            raise UsageError("a threshold that keeps 100% is none; take less")

    @property
    def fitted(self) -> tuple[str, ...]:
        """The mitigations that need `nmonnx fit`."""
        return tuple(m for m in self.mitigations if m in FITTED)

    @property
    def needs(self) -> tuple[str, ...]:
        """What must be measured on the model first: "stats", "sensitivity", "gradients"."""
        stats = (
            self.scope == "threshold"
            or self.order != "none"
            or self.allocate == "forward"
            or self.criterion in CALIBRATED
        )
        stats = stats or bool(set(SHIFTS) & set(self.mitigations))
        gradients = self.allocate == "fisher" or self.criterion == "grad"
        return ("stats",) * stats + ("sensitivity",) * (self.allocate == "forward") + ("gradients",) * gradients

    def to_json(self) -> str:
        patterns = {selector: str(pattern) for selector, pattern in self.patterns}
        own = {"pattern": str(self.pattern), "patterns": patterns}
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self), **own})

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "recipe") -> Recipe:
        """Raises UsageError on an unknown key or a wrong value, naming it."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(str(k) for k in set(data) - known - {"schema_version"})
        if unknown:
            raise UnknownWord(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
        if data.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
            raise UsageError(f"{where}: schema_version {data['schema_version']!r}; this release reads {SCHEMA_VERSION}")
        return cls(**{key: _value(key, value, where) for key, value in data.items() if key in known})

    @classmethod
    def read(cls, path: Path, flags: dict[str, Any] | None = None) -> Recipe:
        """Read a recipe from a .yaml or .json file; `flags` win over it. Raises InputError or UsageError."""
        data = read_yaml(path, "recipe")
        if data is not None and not isinstance(data, dict):
            raise InputError(f"recipe {path} is not a mapping; write for example 'pattern: 8:16'")
        return cls.from_dict({**(data or {}), **(flags or {})}, str(path))


def _value(key: str, value: object, where: str) -> Any:
    """A value of a recipe in its proper type. Raises UsageError when it has another."""
    if key == "pattern":
        return Pattern.parse(_pattern_text(value))
    if key in ("include", "exclude", "mitigations"):
        selectors = [value] if isinstance(value, str) else value
        if not isinstance(selectors, (list, tuple)) or not all(isinstance(s, str) and s for s in selectors):
            raise UsageError(f"{where}: {key} must be a word or a list of words, not {value!r}")
        return tuple(selectors)
    if key == "dense_blocks":
        numbers = [value] if isinstance(value, int) else value
        if not isinstance(numbers, (list, tuple)) or not all(type(n) is int for n in numbers):
            raise UsageError(f"{where}: dense_blocks must be a list of block numbers such as [0, -1], not {value!r}")
        return tuple(numbers)
    if key == "patterns":
        if not isinstance(value, dict) or not all(isinstance(selector, str) for selector in value):
            raise UsageError(f"{where}: patterns must map selectors to patterns, such as 'down: 12:16', not {value!r}")
        return tuple((selector, Pattern.parse(_pattern_text(text))) for selector, text in value.items())
    expected = {"lm_head": bool, "rank": int, "dense_prefix": int}.get(key, str)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        words = {bool: "true or false", int: "a whole number", str: "a word"}
        raise UsageError(f"{where}: {key} must be {words[expected]}, not {value!r}")
    return value


def _pattern_text(value: object) -> str:
    # YAML 1.1 reads an unquoted 8:16 as the base-60 number 496
    sixty = isinstance(value, int) and not isinstance(value, bool) and value >= 60
    return f"{value // 60}:{value % 60}" if sixty else str(value)  # type: ignore[operator]
