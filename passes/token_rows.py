"""Whether the rows of an activation are the tokens of the call."""

from __future__ import annotations

from onnx import GraphProto, NodeProto

from nmonnx.feeds.signature import input_ports

_PICKS = ("Gather", "GatherND", "GatherElements", "Compress")
_PRODUCTS = ("MatMul", "Gemm", "MatMulNBits", "FusedMatMul")

Dim = int | str | None


class TokenRows:
    """The main graph of an original model, as far as it tells what becomes of its tokens."""

    def __init__(self, graph: GraphProto) -> None:
        self._makers = {output: node for node in graph.node for output in node.output if output}
        self._shapes: dict[str, list[Dim]] = {}
        for value in (*graph.input, *graph.value_info):
            if value.type.tensor_type.HasField("shape"):
                dims = value.type.tensor_type.shape.dim
                self._shapes[value.name] = [
                    d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims
                ]
        tokens = next((p for p in input_ports(graph) if p.role in ("tokens", "embeds")), None)
        self._call = list(tokens.shape[:2]) if tokens else []
        self._stored = {t.name for t in graph.initializer}

    def refusal(self, scope: str, activation: str, role: str) -> str:
        """Why what is said of each token of the call does not fit the rows of `activation` in the scope at path
        `scope`; "" when nothing speaks against it."""
        if ".body" in scope:
            return "it lies in a loop, whose tokens are not those of the call: every token is pruned"
        shape = self._shapes.get(activation, [])
        if len(shape) > 2 and shape[:-1] != self._call and any(isinstance(size, int) for size in shape[1:-1]):
            return f"its activation has the shape {shape}, not that of the tokens: every token is pruned"
        if not scope and self._are_picked(activation, role == "lm_head"):
            return "its activation holds only some tokens of the call: every one of them is pruned"
        return ""

    def _are_picked(self, name: str, is_head: bool) -> bool:
        """Whether a node on the way from the tokens picks rows: by a computed index, as the router of a mixture of
        experts does; or in front of lm_head, by any."""
        seen: set[str] = set()
        while name in self._makers and name not in seen:
            seen.add(name)
            node = self._makers[name]
            if node.op_type in _PICKS and node.input[0] not in self._stored and (is_head or self._is_computed(node)):
                return True
            if is_head and node.op_type == "Slice":
                return True
            is_head = is_head and node.op_type not in _PRODUCTS
            name = next(iter(node.input), "")
        return False

    def _is_computed(self, node: NodeProto) -> bool:
        maker = self._makers.get(node.input[1])
        return maker is not None and maker.op_type != "Constant"
