"""The constants that a folded layer computes with, instead of or beside those of the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import helper

from nmonnx.passes.bodies import FUSED
from nmonnx.validate.additions import Addition
from nmonnx.validate.claims import Claim
from nmonnx.validate.pair import Pair
from nmonnx.validate.scopes import Key, Trail


@dataclass(frozen=True, eq=False)
class FoldedLayer:
    """pair      None when nothing was folded
    constants    the declared ones, by what they are
    transposed   the new weight is stored as [N, K]
    addition     what is added behind the layer
    fused        the op has the bias
    bias         the correction has a bias of its own, so that the new one is not known from the weight alone
    """

    pair: Pair | None = None
    constants: dict[str, Key] | None = None
    transposed: bool = False
    addition: Addition | None = None
    fused: bool = False
    bias: bool = False

    @property
    def corrected(self) -> bool:
        return self.pair is not None

    @property
    def rounds(self) -> int:
        """How often the result is rounded to its type on the way."""
        behind = self.addition
        return 1 + (0 if behind is None else (behind.values is not None) + 3 * (behind.low is not None))

    @property
    def rounding(self) -> float:
        """Of the coarsest type that a new constant is stored in; 0 when there is none."""
        types = {self._values(key).dtype for key in (self.constants or {}).values()}
        return max((float(np.finfo(t).eps) for t in types if t.kind == "f"), default=0.0)

    def weight(self, original: np.ndarray) -> np.ndarray:
        """[K, N] float32: the new weight, or the `original` one, with its new scales."""
        if self._key("W"):
            values = self._values(self._key("W")).astype(np.float32)
            return values.T if self.transposed else values
        if self._key("scales"):
            new, old = (v.reshape(original.shape[1], -1)[:, 0].astype(np.float32) for v in self._both("scales"))
            return original * np.divide(new, old, out=np.ones_like(old), where=old != 0)
        return original

    def added(self, x: np.ndarray) -> np.ndarray:
        """[R, N] or [1, 1] float64: what is added behind the layer to rows x [R, K]."""
        return self._behind(x, np.asarray)

    def room(self, x: np.ndarray) -> np.ndarray:
        """The same of magnitudes: how large the sums are that get rounded."""
        return self._behind(x, np.abs)

    def more_bias(self) -> np.ndarray:
        """[N] or [1]: by how much the bias of a layer that is not fused has grown."""
        if self.fused or not self._key("bias"):
            return np.zeros(1)
        new, old = self.biases()
        return new.astype(np.float64) - old

    def biases(self) -> tuple[np.ndarray, np.ndarray]:
        """[N] or [1]: the new bias in a layer that is not fused, and that of the original."""
        new, old = self._both("bias") if self._key("bias") else (np.zeros(1, np.float32), np.zeros(1))
        return new.reshape(-1), old.reshape(-1)

    def _behind(self, x: np.ndarray, size: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        total, behind = np.zeros((1, 1)), self.addition
        if behind is not None and behind.low is not None:
            a, b = (size(part.astype(np.float64)) for part in behind.low)
            total = size(x.astype(np.float64)) @ a @ b
        if behind is not None and behind.values is not None:
            total = total + size(behind.values.astype(np.float64))
        return total

    def _key(self, what: str) -> Key | None:
        return (self.constants or {}).get(what)

    def _values(self, key: Key | None) -> np.ndarray:
        values = self.pair.constant(key) if self.pair is not None and key else None
        return np.zeros(1) if values is None else values

    def _both(self, what: str) -> tuple[np.ndarray, np.ndarray]:
        """The new values and those of the original that they stand for."""
        key, pair = self._key(what), self.pair
        assert key is not None and pair is not None
        home = pair.old.find(key[0], pair.claims.constants[key[1]].replaces)
        stored = pair.old.initializer(home) if home else None
        return self._values(key), np.zeros(1) if stored is None else pair.in_before.array(stored)


def folded_of(pair: Pair, claim: Claim, trail: Trail) -> FoldedLayer:
    """What was folded into one layer."""
    if claim.name not in pair.claims.fitted:
        return FoldedLayer()
    known = pair.claims.constants
    constants = {known[key[1]].input: key for key in trail.leaves | _stored(pair, trail) if key[1] in known}
    addition = pair.additions.get(claim.name)
    swapped = "W" in constants and _is_transposed(pair, constants["W"], trail)
    has_bias = "bias" in pair.claims.fitted[claim.name]
    return FoldedLayer(pair, constants, swapped, addition, claim.kernel in FUSED, has_bias)


def _stored(pair: Pair, trail: Trail) -> set[Key]:
    """What the nodes on the way read themselves."""
    found = (pair.new.find(scope, name) for (scope, _), node in trail.nodes.items() for name in node.input if name)
    return {key for key in found if key}


def _is_transposed(pair: Pair, key: Key, trail: Trail) -> bool:
    """Whether the tensor reaches its layer with its axes swapped."""
    swapped = False
    on_the_way = {id(node) for node in trail.nodes.values()}
    while True:
        _, node = pair.readers[key][0]
        swapped ^= node.op_type == "Transpose"
        if id(node) in on_the_way:
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            return swapped ^ bool(attributes.get("transB", 0))
        key = (key[0], node.output[0])
