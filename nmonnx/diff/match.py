"""Pair the nodes of two versions of one scope."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx import NodeProto


@dataclass(frozen=True)
class Pair:
    """A node in both versions, or in one; positions are indices in their lists, -1 where it is not."""

    before: NodeProto | None
    after: NodeProto | None
    position_before: int
    position_after: int


def match_nodes(a: Sequence[NodeProto], b: Sequence[NodeProto]) -> list[Pair]:
    """Every node of both lists once, in the order of `b`, then those that only `a` has.

    1. Nodes that make a tensor of the same name are the same node, whatever they are called; unless they do something
       else now, and a node of the old name and op is still there.
    2. Of the rest, nodes with the same name and the same op are the same node.
    """
    partner: dict[int, int] = {}
    taken: set[int] = set()
    makers = {output: i for i, node in enumerate(a) for output in node.output if output}
    kept = {_identity(node) for node in b}
    for j, node in enumerate(b):
        i = next((makers[o] for o in node.output if o in makers and makers[o] not in taken), None)
        if i is not None and (a[i].op_type == node.op_type or not a[i].name or _identity(a[i]) not in kept):
            partner[j] = i
            taken.add(i)
    named = {_identity(n): i for i, n in enumerate(a) if n.name and i not in taken}
    for j, node in enumerate(b):
        i = named.get(_identity(node))
        if j not in partner and i is not None and i not in taken:
            partner[j] = i
            taken.add(i)
    pairs = [Pair(a[partner[j]] if j in partner else None, node, partner.get(j, -1), j) for j, node in enumerate(b)]
    return pairs + [Pair(node, None, i, -1) for i, node in enumerate(a) if i not in taken]


def _identity(node: NodeProto) -> tuple[str, str, str]:
    return node.name, node.domain, node.op_type
