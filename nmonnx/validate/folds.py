"""Account for the constants that a correction brings to a pruned layer, beside what is added behind it."""

from __future__ import annotations

from collections.abc import Iterator

from nmonnx.diff.compare import label
from nmonnx.digest import array_sha256
from nmonnx.validate.changes import Explained
from nmonnx.validate.claims import Claim
from nmonnx.validate.pair import Pair
from nmonnx.validate.scopes import Key, Trail

FOLDED = ("W", "scales", "bias")
"""What a declared constant may be beside an input of an op."""


class Folds:
    def __init__(self, pair: Pair, explained: Explained) -> None:
        self.pair, self.explained = pair, explained

    def is_declared(self, key: Key) -> bool:
        """Whether the tensor is new and declared."""
        return self.pair.old.find(*key) is None and key[1] in self.pair.claims.constants

    def faults(self, claim: Claim, trail: Trail, optional: set[Key]) -> Iterator[str]:
        """What is wrong with the new constants of one layer; those that are right are explained. `optional` are inputs
        of ops, which are checked on their own."""
        for key in trail.leaves - optional:
            if self.is_declared(key):
                yield from self._faults_of(claim, key)

    def _faults_of(self, claim: Claim, key: Key) -> Iterator[str]:
        declared, values = self.pair.claims.constants[key[1]], self.pair.constant(key)
        if values is None:
            yield f"constant {key[1]!r} is not stored"
        elif declared.input not in FOLDED or not (claim.weights or claim.name in self.pair.claims.fitted):
            yield f"constant {key[1]!r} is new, and no correction of this layer is recorded"
        elif array_sha256(values) != declared.sha256:
            yield f"constant {key[1]!r} is not what was folded"
        else:
            self.explained.added.add(key)
            self.explained.replaced.add(declared.replaces)
            replaced = self.pair.old.find(claim.scope, declared.replaces)
            constant = self.pair.old.maker(replaced) if replaced else None
            if replaced and constant is not None and constant.op_type == "Constant":
                self.explained.dropped.add((replaced[0], label(constant)))
            for scope, node in self.pair.readers.get(key, ()):
                slots = [f"input {slot}" for slot, name in enumerate(node.input) if name == key[1]]
                for slot in slots:
                    self.explained.rewired.setdefault(((scope.path, label(node)), slot), set()).add(key[1])
