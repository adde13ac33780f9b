"""`Op`: one node of a graph as the functions of the table see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto

Result = torch.Tensor | tuple[torch.Tensor | None, ...]
Run = Callable[..., Result]
"""(op, *inputs) -> output or outputs. An input that is left out is None or not there."""

_TORCH: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float32,
    TensorProto.BFLOAT16: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT16: torch.int64,
    TensorProto.UINT32: torch.int64,
    TensorProto.UINT64: torch.int64,
    TensorProto.BOOL: torch.bool,
}


@dataclass(frozen=True, eq=False)
class Op:
    """inputs and outputs are names, "" for one left out; `opset` is the version of the default operator set.
    `store` keeps what a function wants to work out once."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: dict[str, Any]
    opset: int
    store: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, node: NodeProto, opset: int, read: Callable[[TensorProto], np.ndarray]) -> Op:
        domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}::"
        attrs = {a.name: _attribute(a, read) for a in node.attribute}
        name = node.name or next((o for o in node.output if o), "")
        return cls(domain + node.op_type, name, tuple(node.input), tuple(node.output), attrs, opset)

    def get(self, name: str, default: Any = None) -> Any:
        return self.attrs.get(name, default)


def dtype_of(elem: int) -> torch.dtype:
    """The type that computes for an ONNX type: float16 and bfloat16 are computed in float32. KeyError if there is
    none."""
    return _TORCH[elem]


def tensor_of(values: np.ndarray) -> torch.Tensor:
    """A copy of `values` in the type that computes for theirs."""
    if values.dtype == np.float16:
        return torch.from_numpy(values.astype(np.float32))
    if values.dtype in (np.uint16, np.uint32, np.uint64):
        return torch.from_numpy(values.astype(np.int64))
    return torch.from_numpy(np.array(values, order="C"))


def _attribute(attribute: onnx.AttributeProto, read: Callable[[TensorProto], np.ndarray]) -> Any:
    if attribute.type == onnx.AttributeProto.TENSOR:
        return tensor_of(read(attribute.t))
    value = onnx.helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value
