"""One pruned layer under measurement: its op, the op's options, and sums over what was seen of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from onnx import NodeProto

from nmonnx.passes.bodies import CENTER_VALUES, FUSED, NEEDED
from nmonnx.pattern import Pattern
from nmonnx.pruning.emulated import OPS, select
from nmonnx.records.corrections import Correction
from nmonnx.reference import Center, center_of, prune
from nmonnx.validate.additions import Addition
from nmonnx.validate.claims import Claim
from nmonnx.validate.folded_layer import FoldedLayer, folded_of
from nmonnx.validate.pair import Pair
from nmonnx.validate.stored_weights import own_weight, values_of


@dataclass(eq=False)
class Probe:
    """One layer, and sums over what was seen of it. `before` are rows of the original's activation, `chosen` what is
    kept of them where that depends on the whole call, `dense` says which of them keep all channels; `after` rows of the
    converted model's activation, of its output, and the same of them. `options` are the op's inputs beside x and W;
    those that are no stored values, but `computed` by nodes such as a Cast, are fetched by tensor name in each run.
    `own_bias` is what a folded bias stands for in the original; `misfold` how far the folded one is from what it should
    be, `missum` the same of what the rows of the weight add up to. `addition` is added behind the layer, `folded` what
    a correction changed, `correction` what it should be, `outputs` the original's of the rows `before`, and `beyond`
    how far the layer is from that. `own_weight` makes the weight of a fused op that is stored in another way."""

    claim: Claim
    node: NodeProto | None
    note: str = ""
    options: dict[str, np.ndarray] = field(default_factory=dict)
    computed: dict[str, str] = field(default_factory=dict)
    own_bias: np.ndarray | None = None
    addition: Addition | None = None
    folded: FoldedLayer = field(default_factory=lambda: FoldedLayer())
    own_weight: Callable[[], np.ndarray] | None = None
    correction: Correction | None = None
    outputs: list[np.ndarray] = field(default_factory=list)
    beyond: float | None = None
    misfold: float | None = None
    missum: float | None = None
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
    chosen: list[np.ndarray] = field(default_factory=list)
    after: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    dense: list[np.ndarray] = field(default_factory=list)
    error: float | None = None
    excess: float | None = None

    @property
    def pattern(self) -> Pattern:
        return Pattern.parse(self.claim.pattern)

    @property
    def fused(self) -> bool:
        return self.claim.kernel in FUSED

    @property
    def step(self) -> float:
        """Half a step of the whole numbers that `NMMatMulNBits` may round an activation to, in parts of the largest."""
        if self.claim.kernel != "NMMatMulNBits" or self.node is None:
            return 0.0
        asked = {a.name: a.i for a in self.node.attribute}
        return 0.5 / ((1 << (7 if asked.get("accuracy_level") == 4 else 15)) - 1)

    @property
    def variance(self) -> bool:
        """Whether the op restores the variance of each token."""
        return self.node is not None and any(a.name == "variance" and a.i for a in self.node.attribute)

    @property
    def center(self) -> Center | None:
        """What the op centres each token on."""
        asked = next((a.i for a in self.node.attribute if a.name == "center"), 0) if self.node is not None else 0
        return next((center for center, value in CENTER_VALUES.items() if value == asked), None)

    def moved(self, x: np.ndarray) -> np.ndarray:
        """What the op ranks: x - shift - center."""
        return prune(x, 1, 1, shift=self.options.get("shift"), center=self.center)

    def taken(self, x: np.ndarray) -> np.ndarray:
        """What that takes from x, and something else makes up for: [K], or [T, 1]."""
        shift = self.options.get("shift", np.zeros(1, np.float32))
        return shift + center_of(x, self.center, shift) if self.center else shift

    def select(self, x: np.ndarray, variance: bool = False) -> np.ndarray:
        """The kept values of x - shift - center."""
        n, m = self.pattern.n, self.pattern.m
        slots: tuple[str, ...]
        choose: Callable[..., np.ndarray]
        if self.claim.kernel in OPS:
            slots, choose = ("scale", "shift", "threshold"), partial(select, self.claim.kernel)
        else:
            slots, choose = ("scale", "shift", "order", "dense"), prune
        criterion: dict[str, Any] = {slot: self.options.get(slot) for slot in slots}
        return choose(x, n, m, **criterion, variance=variance, center=self.center)

    def prune(self, x: np.ndarray) -> np.ndarray:
        """What the op makes of x."""
        return self.select(x, self.variance)

    def computes_with(self, x: np.ndarray) -> np.ndarray:
        """What the layer computes with: the pruned activation and what is made up for."""
        return self.prune(x) + self.taken(x)

    def lost(self, x: np.ndarray, original: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """What the layer's output lacks on rows x; `weight` is the new one."""
        if not self.folded.corrected:
            return (x - self.computes_with(x)) @ original
        return x @ original - (self.prune(x) @ weight + self.more_bias() + self.folded.added(x))

    def more_bias(self) -> np.ndarray:
        """[N] or [1]: by how much the bias in the layer has grown."""
        own = np.zeros(1) if self.own_bias is None else self.own_bias.reshape(-1)
        return self.options.get("bias", np.zeros(1)).reshape(-1) - own + self.folded.more_bias()

    def names(self) -> tuple[list[str], list[str]]:
        """Tensors to tap in the original and in the converted model."""
        assert self.node is not None
        names = [self.claim.activation, self.claim.output]
        own = [] if self.fused else [self.node.output[0]]
        return names, [*names, *own, *self.computed.values()]


def probe_of(pair: Pair, claim: Claim) -> Probe:
    if not claim.pruned:
        return Probe(claim, None)
    trail = pair.new_trail(claim)
    if claim.scope or pair.new.find("", claim.activation) is None or trail is None:
        return Probe(claim, None, "inside a subgraph or function, whose tensors cannot be seen from outside")
    ops = list(trail.own.values())
    if len(ops) != 1:
        return Probe(claim, None, "it has no op of its own")
    probe = Probe(claim, ops[0], addition=pair.additions.get(claim.name))
    for slot, key in pair.inputs_of("", ops[0]).items():
        if slot in (*NEEDED, "zeros"):
            continue
        values = pair.constant(key)
        if values is None:
            probe.computed[slot] = key[1]
        else:
            probe.options[slot] = values
        if slot == "bias":
            probe.own_bias = _replaced(pair, key[1])
    probe.folded = folded_of(pair, claim, trail)
    stored = own_weight(pair, claim) if probe.fused and (claim.weights or claim.kernel == "NMMatMulNBits") else None
    if stored is not None:
        probe.own_weight = lambda: values_of(stored)
    return probe


def _replaced(pair: Pair, name: str) -> np.ndarray | None:
    """Values of the tensor of the original that a declared constant stands for."""
    declared = pair.claims.constants.get(name)
    key = pair.old.find("", declared.replaces) if declared else None
    stored = pair.old.initializer(key) if key else None
    return None if stored is None else pair.in_before.array(stored)
