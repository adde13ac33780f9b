"""Run one custom op in ONNX Runtime, on a chosen SIMD target of the library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from nmonnx.errors import ModelError
from nmonnx.library import get_library_path, register

_KINDS = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.float64): TensorProto.DOUBLE,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(bool): TensorProto.BOOL,
}


def targets() -> list[str]:
    """Names of the SIMD targets that this CPU has, or a single one that skips where there is no library."""
    try:
        get_library_path()
    except ModelError:
        return []
    with target("?"), pytest.raises(ModelError) as error:
        register(ort.SessionOptions())
    return str(error.value).split("these are:")[1].split()


@contextmanager
def target(name: str) -> Iterator[None]:
    """Register the library with this SIMD target; "" takes the best one."""
    before = os.environ.get("NMONNX_TARGET")
    os.environ["NMONNX_TARGET"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["NMONNX_TARGET"]
        else:
            os.environ["NMONNX_TARGET"] = before


class Op:
    """A session of one node whose inputs have free shapes; inputs that are None get an empty name."""

    def __init__(
        self,
        op: str,
        inputs: dict[str, np.ndarray | None],
        simd: str = "",
        threads: int = 1,
        outputs: int = 1,
        **attributes,
    ) -> None:
        names = [name if value is not None else "" for name, value in inputs.items()]
        while names and not names[-1]:
            names.pop()
        given = {name: value for name, value in inputs.items() if value is not None}
        kind = _KINDS[next(iter(given.values())).dtype]
        ends = ["y", "y1", "y2"][:outputs]
        node = helper.make_node(op, names, ends, domain="ai.nmonnx", **attributes)
        graph = helper.make_graph(
            [node],
            "op",
            [helper.make_tensor_value_info(n, _KINDS[v.dtype], [None] * v.ndim) for n, v in given.items()],
            [helper.make_tensor_value_info(end, kind, None) for end in ends],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.nmonnx", 1)]
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        with target(simd):
            register(options)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def __call__(self, **inputs: np.ndarray | None) -> np.ndarray:
        return self.outputs(**inputs)[0]

    def outputs(self, **inputs: np.ndarray | None) -> list[np.ndarray]:
        return self._session.run(None, {name: value for name, value in inputs.items() if value is not None})


def run(op: str, inputs: dict[str, np.ndarray | None], simd: str = "", threads: int = 1, **attributes) -> np.ndarray:
    return Op(op, inputs, simd, threads, **attributes)(**inputs)


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the last bit: NaN payloads and the sign of zero count."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    bits = f"u{got.itemsize}"
    np.testing.assert_array_equal(got.view(bits), expected.view(bits))
