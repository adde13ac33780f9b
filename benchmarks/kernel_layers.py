"""Models of many equal layers, dense and sparse, whose weights do not fit any cache; for `kernels.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from nmonnx.library import DOMAIN, register
from nmonnx.nbits import BITS, BLOCK_SIZE, Quantised, packed_shape
from nmonnx.pattern import Pattern

FORMS = ("fp32", "fp16", "int8", "int4")
"""How the weights are stored. Their dense counterparts: MatMul in float32 for the first two, MatMulNBits of accuracy
level 4 with blocks of 32 for the others."""

_MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Layers:
    """`count` layers [k, n] that read one activation, each with a weight of its own, since ONNX Runtime shares equal
    constants."""

    k: int
    n: int
    form: str
    count: int

    @property
    def bits(self) -> int:
        return BITS.get(self.form, 0)

    def dense(self, threads: int) -> onnxruntime.InferenceSession:
        if not self.bits:
            return self._session(threads, lambda i: (_node("MatMul", i, "w"), {"w": self._weight(i)}))
        attributes = {"K": self.k, "N": self.n, "bits": self.bits, "block_size": BLOCK_SIZE, "accuracy_level": 4}

        def layer(i: int) -> tuple[onnx.NodeProto, dict[str, np.ndarray]]:
            shape = (self.n, self.k // BLOCK_SIZE, BLOCK_SIZE * self.bits // 8)
            codes = _rng(i).integers(0, 256, shape, dtype=np.uint8)
            return _node("MatMulNBits", i, "w", "s", domain=_MICROSOFT, **attributes), {
                "w": codes,
                "s": np.ascontiguousarray(self._scales(i).T),
            }

        return self._session(threads, layer)

    def sparse(self, threads: int, pattern: Pattern, panel_tokens: int = 0) -> onnxruntime.InferenceSession:
        return self._session(threads, partial(self._sparse, pattern, panel_tokens))

    def pruned(self, threads: int, pattern: Pattern) -> onnxruntime.InferenceSession:
        """`NMPrune` in front of every dense layer in fp32."""

        def layer(i: int) -> tuple[onnx.NodeProto, dict[str, np.ndarray]]:
            return helper.make_node("MatMul", [f"p{i}", f"w{i}"], [f"y{i}"]), {"w": self._weight(i)}

        prunes = [_custom("NMPrune", ["x"], f"p{i}", pattern) for i in range(self.count)]
        return self._session(threads, layer, prunes)

    def read_bytes(self, pattern: Pattern) -> float:
        """Of one layer, by one token: the kept rows and, of whole numbers, every scale."""
        row = {"fp32": 4 * self.n, "fp16": 2 * self.n}.get(self.form) or packed_shape(1, self.n, self.bits)[1]
        scales = 4 * self.k // BLOCK_SIZE * self.n if self.bits else 0
        return row * self.k * pattern.n / pattern.m + scales

    def _sparse(self, pattern: Pattern, panel_tokens: int, i: int) -> tuple[onnx.NodeProto, dict[str, np.ndarray]]:
        if not self.bits:
            weight = self._weight(i).astype(np.float16 if self.form == "fp16" else np.float32)
            return _custom("NMMatMul", ["x", f"w{i}"], f"y{i}", pattern, panel_tokens=panel_tokens), {"w": weight}
        w = self._quantised(i)
        attributes = {"bits": w.bits, "block_size": w.block_size, "accuracy_level": 4, "panel_tokens": panel_tokens}
        node = _custom("NMMatMulNBits", ["x", f"w{i}", f"s{i}"], f"y{i}", pattern, **attributes)
        return node, {"w": w.data, "s": w.scales}

    def _quantised(self, i: int) -> Quantised:
        data = _rng(i).integers(0, 256, packed_shape(self.k, self.n, self.bits), dtype=np.uint8)
        return Quantised(self.bits, BLOCK_SIZE, data if self.bits == 4 else data.view(np.int8), self._scales(i))

    def _scales(self, i: int) -> np.ndarray:
        return _rng(i).uniform(0.001, 0.01, (self.k // BLOCK_SIZE, self.n)).astype(np.float32)

    def _weight(self, i: int) -> np.ndarray:
        return _rng(i).standard_normal((self.k, self.n), np.float32)

    def _session(self, threads: int, layer, before=()) -> onnxruntime.InferenceSession:  # type: ignore[no-untyped-def]
        nodes, constants = list(before), []
        for i in range(self.count):
            node, arrays = layer(i)
            nodes.append(node)
            constants += [numpy_helper.from_array(values, f"{name}{i}") for name, values in arrays.items()]
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", self.k])
        ys = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["T", self.n]) for i in range(self.count)]
        return session(nodes, [x], ys, threads, constants)


def _rng(i: int) -> np.random.Generator:
    return np.random.default_rng(i)


def _node(op: str, i: int, *weights: str, domain: str = "", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, ["x", *(f"{w}{i}" for w in weights)], [f"y{i}"], domain=domain, **attributes)


def _custom(op: str, inputs: list[str], output: str, pattern: Pattern, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], domain=DOMAIN, keep=pattern.n, group=pattern.m, **attributes)


def prune_session(pattern: Pattern | None, threads: int, elem: int = TensorProto.FLOAT) -> onnxruntime.InferenceSession:
    """`NMPrune` alone; without a pattern ONNX Runtime's Abs, one pass over the same tensor."""
    node = helper.make_node("Abs", ["x"], ["y"]) if pattern is None else _custom("NMPrune", ["x"], "y", pattern)
    x, y = (helper.make_tensor_value_info(name, elem, ["T", "K"]) for name in "xy")
    return session([node], [x], [y], threads)


def session(nodes, inputs, outputs, threads: int, constants=()) -> onnxruntime.InferenceSession:  # type: ignore[no-untyped-def]
    graph = helper.make_graph(nodes, "bench", inputs, outputs, list(constants))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(_MICROSOFT, 1), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    register(options)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def activations(tokens: int, channels: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((tokens, channels), np.float32)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def shapes(text: str) -> Iterator[tuple[int, int]]:
    for part in text.split(","):
        k, n = part.split("x")
        yield int(k), int(n)
