"""`Linears`: writes the linear layers and other weights of a source into a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from nmonnx.errors import InputError
from nmonnx.models import q4
from nmonnx.models.graph_builder import MICROSOFT, GraphBuilder
from nmonnx.models.source import Source

_UINT8 = np.dtype(np.uint8)


@dataclass(frozen=True)
class Linears:
    """Every tensor taken from `source` is checked against the shape that the graph needs, and noted."""

    source: Source
    graph: GraphBuilder
    int4: bool
    taken: set[str] = field(default_factory=set)

    def write(
        self,
        path: str,
        modules: Sequence[tuple[str, int]],
        x: str,
        k: int,
        output: str = "",
        exact: bool = True,
    ) -> str:
        """x @ W.T + b of one module (name, outputs) or of several packed ones: node `path`/MatMul, and
        `path`/Add for a bias; returns the output's name. A module without a lossless int4 form is refused
        when `exact`, else it keeps its values."""
        weights = [self._take(f"{module}.weight", (n, k)) for module, n in modules]
        biases = self._biases(modules)
        y = output if output and not biases else f"{path}/MatMul/output_0"
        write = self._nbits if self.int4 and self._is_lossless(weights, exact) else self._matmul
        write(path, weights, x, y, k, sum(n for _, n in modules))
        if biases:
            y = self._bias(path, biases, y, output or f"{path}/Add/output_0", sum(n for _, n in modules))
        return y

    def plain(self, name: str, tensor: str, shape: tuple[int, ...]) -> str:
        """A tensor as it is stored, as initializer `name`."""
        return self.graph.weight(name, shape, partial(self.source.array, self._take(tensor, shape)))

    def transposed(self, name: str, tensor: str, shape: tuple[int, int]) -> str:
        """A matrix [N, K] stored as [K, N], as initializer `name`."""
        return self.graph.weight(name, shape[::-1], partial(self._columns, [self._take(tensor, shape)]))

    def has(self, tensor: str) -> bool:
        return tensor in self.source.names()

    def rows(self, tensor: str) -> int:
        if not self.has(tensor):
            raise InputError(f"{self.source.path}: tensor {tensor!r} is missing; the file is incomplete or foreign")
        return self.source.shape(tensor)[0]

    def refuse_untaken(self) -> None:
        """Raises InputError when the source holds weights that the graph does not use: another architecture."""
        derived = {"lm_head.weight"} if self.source.config.tied else set()
        left = sorted(set(self.source.names()) - self.taken - derived)
        left = [t for t in left if not t.endswith("rotary_emb.inv_freq")]
        if left:
            raise InputError(
                f"{self.source.path}: tensor {left[0]!r} (and {len(left) - 1} others) has no place in this recipe;"
                " the model is of another architecture"
            )

    def _take(self, tensor: str, shape: tuple[int, ...]) -> str:
        self.rows(tensor)
        found = self.source.shape(tensor)
        if found != shape:
            raise InputError(
                f"{self.source.path}: tensor {tensor!r} has shape {list(found)}, the configuration asks for"
                f" {list(shape)}"
            )
        self.taken.add(tensor)
        return tensor

    def _biases(self, modules: Sequence[tuple[str, int]]) -> list[str]:
        found = [(f"{module}.bias", n) for module, n in modules if self.has(f"{module}.bias")]
        if found and len(found) != len(modules):
            raise InputError(f"{self.source.path}: only {found[0][0]!r} has a bias; build without fuse_qkv")
        return [self._take(name, (n,)) for name, n in found]

    def _is_lossless(self, tensors: list[str], exact: bool) -> bool:
        other = next((t for t in tensors if self.source.kind(t) not in q4.LOSSLESS), None)
        if other and exact:
            raise InputError(
                f"{self.source.path}: tensor {other!r} is {self.source.kind(other)}; int4 takes over the"
                f" {' and '.join(q4.LOSSLESS)} blocks of a GGUF file and never rounds. Build fp32 and quantise"
                " that, or give a GGUF file of such blocks"
            )
        return other is None

    def _matmul(self, path: str, weights: list[str], x: str, y: str, k: int, n: int) -> None:
        weight = self.graph.weight(f"{_dotted(path)}.MatMul.weight", (k, n), partial(self._columns, weights))
        self.graph.node("MatMul", f"{path}/MatMul", [x, weight], [(y, _tokens(n))])

    def _nbits(self, path: str, weights: list[str], x: str, y: str, k: int, n: int) -> None:
        name, blocks = f"{_dotted(path)}.MatMul.weight", k // q4.BLOCK
        inputs = [
            x,
            self.graph.weight(f"{name}_Q4", (n, blocks, 16), partial(self._q4, weights, "codes"), _UINT8),
            self.graph.weight(f"{name}_scales", (n, blocks), partial(self._q4, weights, "scales")),
            self.graph.weight(f"{name}_zero_points", (n, blocks), partial(self._q4, weights, "zero_points")),
        ]
        # Level 1: activations stay fp32 (level 4 would round them to int8).
        attrs = {"K": k, "N": n, "accuracy_level": 1, "bits": 4, "block_size": q4.BLOCK}
        self.graph.node("MatMulNBits", f"{path}/MatMul_Q4", inputs, [(y, _tokens(n))], attrs, MICROSOFT)

    def _bias(self, path: str, biases: list[str], x: str, y: str, n: int) -> str:
        bias = self.graph.weight(f"{_dotted(path)}.Add.bias", (n,), partial(self._joined, biases))
        return self.graph.node("Add", f"{path}/Add", [x, bias], [(y, _tokens(n))])

    def _joined(self, tensors: list[str]) -> np.ndarray:
        parts = [self.source.array(t) for t in tensors]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _columns(self, tensors: list[str]) -> np.ndarray:
        return self._joined(tensors).T

    def _q4(self, tensors: list[str], part: str) -> np.ndarray:
        return getattr(q4.Q4Blocks.stack([self.source.q4(t) for t in tensors]), part)


def _dotted(path: str) -> str:
    return path.strip("/").replace("/", ".")


def _tokens(n: int) -> tuple[str, str, int]:
    return ("batch_size", "sequence_length", n)
