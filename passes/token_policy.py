"""Which tokens of a call stay dense, worked out in the graph from its inputs in stock ops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from nmonnx.errors import UsageError
from nmonnx.feeds.signature import Port, input_ports
from nmonnx.passes.token_rows import TokenRows

OLDEST_OPSET = 11


@dataclass(frozen=True)
class TokenPolicy:
    """phase         "prefill": prune only calls with more than one token in a row; "decode": only those with one
    dense_prefix  tokens at positions before this one stay dense
    """

    phase: str = "both"
    dense_prefix: int = 0

    @property
    def keeps_some(self) -> bool:
        """Whether any token may stay dense."""
        return self.phase != "both" or self.dense_prefix > 0

    @property
    def by_token(self) -> bool:
        """Whether tokens of one call may differ."""
        return self.dense_prefix > 0

    def nodes(self, model: ModelProto) -> list[NodeProto]:
        """Nodes for the main graph of the original `model`; the last one makes `dense`, bool: [1], or by token [B * S].

        1. A call has S tokens in a row: axis 1 of the token ids or of the embeddings.
        2. Positions are those of the graph's input; else what its attention mask [B, total] counts up to each of the
           last S columns; else from the length of the cache on, which is 0 where the graph has none.

        Raises UsageError when the graph has no such inputs, only calls of the other phase, or an opset before 11.
        """
        made = _Nodes(model.graph)
        ports = input_ports(model.graph)
        opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
        if opset < OLDEST_OPSET:
            raise UsageError(f"opset {opset} is too old to tell tokens apart in the graph, which needs {OLDEST_OPSET}")
        tokens = next((p for p in ports if p.role in ("tokens", "embeds")), None)
        if tokens is None:
            raise UsageError(
                "phase and dense_prefix need a graph that takes token ids or embeddings [batch, length, ...]"
            )
        self._refuse_length(tokens)
        shape = made.add("Shape", "shape", tokens.name)
        one = made.constant("one", 1)
        length = made.add("Gather", "length", shape, one)
        parts = []
        if self.phase != "both":
            single = made.add("Equal", "single", length, one)
            parts.append(single if self.phase == "prefill" else made.add("Not", "several", single))
        if self.dense_prefix:
            positions = _positions(made, ports, length, one)
            early = made.add("Less", "early", positions, made.constant("prefix", self.dense_prefix))
            rows = made.add("Slice", "rows", shape, made.constant("nought", [0]), made.constant("two", [2]))
            parts.append(made.add("Expand", "each", early, rows))
        either = made.add("Or", "either", *parts) if len(parts) == 2 else parts[0]
        made.add("Reshape", "", either, made.constant("flat", [-1]))
        return made.nodes

    def _refuse_length(self, tokens: Port) -> None:
        length = tokens.shape[1]
        if isinstance(length, int) and self.phase == ("decode" if length > 1 else "prefill"):
            raise UsageError(
                f"the rows of tokens in {tokens.name!r} have the fixed length {length}, so with phase {self.phase}"
                " nothing would ever be pruned"
            )

    def refusal(self, rows: TokenRows, scope: str, activation: str, role: str) -> str:
        """Why a layer in the scope at path `scope` cannot be told; "" when it can."""
        if scope.startswith("function:"):
            return "it lies in a function, which does not see the inputs of the graph: every token is pruned"
        return rows.refusal(scope, activation, role) if self.by_token else ""


class _Nodes:
    """Nodes with names that nothing in the graph has."""

    def __init__(self, graph: GraphProto) -> None:
        self.nodes: list[NodeProto] = []
        taken = set(_names(graph))
        self.base = "nmonnx/dense"
        while any(name.startswith(self.base) for name in taken):
            self.base += "_"

    def add(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        output = f"{self.base}/{name}" if name else self.base
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, values: int | list[int]) -> str:
        return self.add("Constant", name, value=numpy_helper.from_array(np.array(values, np.int64)))


def _positions(made: _Nodes, ports: tuple[Port, ...], length: str, one: str) -> str:
    """The tensor of positions as int64, [B, S] or what expands to that."""
    by_role = {port.role: port for port in reversed(ports)}
    positions, mask, past = (by_role.get(role) for role in ("positions", "mask", "past"))
    if positions is not None and len(positions.shape) in (1, 2):
        return made.add("Cast", "positions", positions.name, to=TensorProto.INT64)
    if mask is not None:
        seen = made.add("CumSum", "seen", made.add("Cast", "mask", mask.name, to=TensorProto.INT64), one)
        axis = made.constant("axis", [1])
        total = made.add("Gather", "total", made.add("Shape", "mask_shape", mask.name), axis)
        before = made.add("Sub", "before", total, length)
        return made.add("Sub", "positions", made.add("Slice", "last", seen, before, total, axis), one)
    if {"state", "use_cache", "seqlens"} & by_role.keys():
        raise UsageError(
            "dense_prefix needs the positions of the tokens, and the graph takes neither position ids nor an attention"
            " mask, and a cache whose length does not tell them; export it with position_ids"
        )
    start = made.constant("start", 0)
    if past is not None:
        axis = made.constant("past_axis", past.axis)
        start = made.add("Gather", "past", made.add("Shape", "past_shape", past.name), axis)
    return made.add("Range", "positions", start, made.add("Add", "end", start, length), one)


def _names(graph: GraphProto) -> Iterator[str]:
    """Every name of a node or tensor, those of subgraphs too."""
    yield from (t.name for t in (*graph.input, *graph.output, *graph.initializer, *graph.node))
    for node in graph.node:
        yield from node.output
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _names(attribute.g)
