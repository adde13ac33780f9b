"""Which tokens stay dense in a converted model: whether the nodes that say so are those of its recipe."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import NodeProto

from nmonnx.diff.compare import label
from nmonnx.errors import UsageError
from nmonnx.passes.token_policy import TokenPolicy
from nmonnx.passes.token_rows import TokenRows
from nmonnx.validate.pair import Pair
from nmonnx.validate.result import Check, counted
from nmonnx.validate.scopes import Key


def check_policy(pair: Pair, nodes: Mapping[Key, NodeProto]) -> Check | None:
    """Whether every op of the main graph that can be told which tokens stay dense is; None where none does."""
    policy = _policy(pair)
    if not policy.keeps_some:
        return None
    dense, rows = dense_key(nodes), TokenRows(pair.before.graph)
    faults, claims = [], [c for c in pair.claims.pruned if not c.scope]
    told = [c for c in claims if not policy.refusal(rows, c.scope, c.activation, c.role)]
    for claim in told:
        trail = pair.new_trail(claim)
        ops = list(trail.own.values()) if trail else []
        if dense is None or any(pair.inputs_of("", node).get("dense") != dense for node in ops):
            faults.append(f"{claim.name!r} does not know")
    return counted("pruned layers know which tokens stay dense", len(told), faults, "layers")


def dense_key(nodes: Mapping[Key, NodeProto]) -> Key | None:
    """The tensor that the last of the nodes makes."""
    return ("", list(nodes.values())[-1].output[0]) if nodes else None


def policy_nodes(pair: Pair) -> dict[Key, NodeProto]:
    """The nodes that work out which tokens stay dense, by (scope path, label); the last one makes the tensor. Empty
    where the recipe keeps none dense, or the nodes differ from what it asks for in any way."""
    policy = _policy(pair)
    if not policy.keeps_some:
        return {}
    try:
        wanted = policy.nodes(pair.before)
    except UsageError:
        return {}
    made = [(pair.new.maker(("", node.output[0])), node) for node in wanted]
    nodes = {("", label(node)): node for node, asked in made if node is not None and _is_same(node, asked)}
    return nodes if len(nodes) == len(wanted) else {}


def _policy(pair: Pair) -> TokenPolicy:
    return TokenPolicy(pair.claims.recipe.phase, pair.claims.recipe.dense_prefix)


def _is_same(node: NodeProto, asked: NodeProto) -> bool:
    bare = NodeProto()
    bare.CopyFrom(node)
    del bare.metadata_props[:]
    bare.ClearField("doc_string")
    return bare == asked
