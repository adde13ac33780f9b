"""The two models side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from nmonnx.onnx_file.tensors import TensorReader
from nmonnx.passes.bodies import INPUTS
from nmonnx.validate.additions import Addition, take_off
from nmonnx.validate.claims import Claim, Claims
from nmonnx.validate.scopes import Key, Scope, Scopes, Trail

SLOTS = INPUTS
"""Inputs of the custom ops and of those made of stock operators."""


@dataclass
class Pair:
    """The original and the converted model, opened without weights. `plain` is the converted model without the
    `additions` behind its layers; `new` looks into that."""

    before: ModelProto
    after: ModelProto
    in_before: TensorReader
    in_after: TensorReader
    claims: Claims
    plain: ModelProto = field(init=False)
    additions: dict[str, Addition] = field(init=False)
    old: Scopes = field(init=False)
    new: Scopes = field(init=False)

    def __post_init__(self) -> None:
        self.plain, self.additions = take_off(self.after, self.in_after, self.claims.constants)
        self.old, self.new = Scopes(self.before), Scopes(self.plain)
        self._old_ends, self._new_ends = self._ends(self.old), self._ends(self.new)

    def old_trail(self, claim: Claim) -> Trail | None:
        """From the layer's activation to its output in the original; None when it lacks one of them."""
        return self._trail(self.old, claim, self._old_ends)

    def new_trail(self, claim: Claim) -> Trail | None:
        """The same in the converted model."""
        return self._trail(self.new, claim, self._new_ends)

    def constant(self, key: Key) -> np.ndarray | None:
        """The values of a stored tensor of the converted model; None when it is computed."""
        tensor, maker = self.new.initializer(key), self.new.maker(key)
        if tensor is not None:
            return self.in_after.array(tensor)
        if maker is not None and maker.op_type == "Constant" and maker.attribute[0].name == "value":
            return numpy_helper.to_array(maker.attribute[0].t)
        return None

    @cached_property
    def readers(self) -> dict[Key, list[tuple[Scope, NodeProto]]]:
        """Every tensor of the converted model with the nodes that read it."""
        return self.new.readers()

    def inputs_of(self, scope: str, node: NodeProto) -> dict[str, Key]:
        """The inputs of a custom op of the converted model by their meaning, those left out are not there."""
        keys = {}
        for name, slot in zip(node.input, SLOTS.get(node.op_type, ()), strict=False):
            key = self.new.find(scope, name) if name else None
            if key:
                keys[slot] = key
        return keys

    def _ends(self, scopes: Scopes) -> frozenset[Key]:
        return frozenset(filter(None, (scopes.find(c.scope, c.output) for c in self.claims.sites)))

    def _trail(self, scopes: Scopes, claim: Claim, ends: frozenset[Key]) -> Trail | None:
        output, activation = scopes.find(claim.scope, claim.output), scopes.find(claim.scope, claim.activation)
        return scopes.trail(output, activation, ends) if output and activation else None
