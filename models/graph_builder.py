"""`GraphBuilder`: nodes, shapes and weights of one graph, the weights still unread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

import nmonnx

MICROSOFT = "com.microsoft"
OPSET, IR_VERSION = 22, 10  # what the onnxruntime-genai builder writes
Shape = Sequence[int | str]


@dataclass(frozen=True)
class Weight:
    """An initializer to be: `read` gives its values when it is time to write them."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class GraphBuilder:
    """`dtype` is the type of activations and of weights that say no other."""

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.weights: dict[str, Weight] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._values: dict[str, onnx.ValueInfoProto] = {}

    def input(self, name: str, shape: Shape, kind: Any = None) -> None:
        self._inputs.append(self._info(name, shape, kind))

    def output(self, name: str, shape: Shape) -> None:
        self._outputs.append(self._info(name, shape))

    def weight(self, name: str, shape: Shape, read: Callable[[], np.ndarray], dtype: np.dtype | None = None) -> str:
        """Declare an initializer once; returns its name."""
        dims = tuple(int(d) for d in shape)
        self.weights.setdefault(name, Weight(name, dims, dtype or self.dtype, read))
        return name

    def node(
        self,
        op: str,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[tuple[str, Shape]],
        attrs: Mapping[str, Any] | None = None,
        domain: str = "",
        kind: Any = None,
    ) -> str:
        """Append a node with the given outputs (name, shape); returns the first one's name."""
        node = helper.make_node(op, list(inputs), [value for value, _ in outputs], name=name, domain=domain)
        node.attribute.extend(helper.make_attribute(k, v) for k, v in (attrs or {}).items())
        self._nodes.append(node)
        self._values |= {value: self._info(value, shape, kind) for value, shape in outputs if value}
        return outputs[0][0]

    def int64(self, value: int | Sequence[int]) -> str:
        """A constant, shared by all that ask for the same value; returns its name."""
        array = np.array(value, np.int64)
        name = f"/model/constants/INT64/{value if array.ndim == 0 else list(array.tolist())}"
        if name not in self._values:
            tensor = onnx.numpy_helper.from_array(array, name)
            node = name.replace("constants", "constant_nodes")
            self.node("Constant", node, [], [(name, array.shape)], {"value": tensor}, kind=np.dtype(np.int64))
        return name

    def model(self) -> onnx.ModelProto:
        """The model, with its initializers left out."""
        ends = {v.name for v in (*self._inputs, *self._outputs)}
        values = [v for name, v in self._values.items() if name not in ends]
        graph = helper.make_graph(self._nodes, "main_graph", self._inputs, self._outputs, value_info=values)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=IR_VERSION,
            producer_name="nmonnx.models",
            producer_version=nmonnx.__version__,
        )

    def _info(self, name: str, shape: Shape, kind: Any = None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, element_type(kind or self.dtype), list(shape))


def element_type(dtype: np.dtype) -> TensorProto.DataType:
    return helper.np_dtype_to_tensor_dtype(dtype)
