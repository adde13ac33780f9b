"""The two models side by side."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from nmonnx.tensors import TensorReader
from nmonnx.validate.claims import Claims
from nmonnx.validate.scopes import Key, Scopes

SLOTS = {"NMPrune": ("x", "scale", "shift", "order"), "NMMatMul": ("x", "W", "bias", "scale", "shift", "order")}
"""Inputs of the custom ops."""


@dataclass
class Pair:
    """The original and the converted model, opened without weights."""

    before: ModelProto
    after: ModelProto
    in_before: TensorReader
    in_after: TensorReader
    claims: Claims
    old: Scopes = field(init=False)
    new: Scopes = field(init=False)

    def __post_init__(self) -> None:
        self.old, self.new = Scopes(self.before), Scopes(self.after)

    def constant(self, key: Key) -> np.ndarray | None:
        """The values of a stored tensor of the converted model; None when it is computed."""
        tensor, maker = self.new.initializer(key), self.new.maker(key)
        if tensor is not None:
            return self.in_after.array(tensor)
        if maker is not None and maker.op_type == "Constant" and maker.attribute[0].name == "value":
            return numpy_helper.to_array(maker.attribute[0].t)
        return None

    def inputs_of(self, scope: str, node: NodeProto) -> dict[str, Key]:
        """The inputs of a custom op of the converted model by their meaning, those left out are not there."""
        keys = {}
        for name, slot in zip(node.input, SLOTS.get(node.op_type, ()), strict=False):
            key = self.new.find(scope, name) if name else None
            if key:
                keys[slot] = key
        return keys
