"""Which tokens stay dense in a converted model: whether the nodes that say so are those of its recipe."""

from __future__ import annotations

from onnx import NodeProto

from nmonnx.diff.compare import label
from nmonnx.errors import UsageError
from nmonnx.passes.token_policy import TokenPolicy
from nmonnx.validate.pair import Pair
from nmonnx.validate.scopes import Key


def policy_nodes(pair: Pair) -> dict[Key, NodeProto]:
    """The nodes that work out which tokens stay dense, by (scope path, label); the last one makes the tensor. Empty
    where the recipe keeps none dense, or the nodes differ from what it asks for in any way."""
    recipe = pair.claims.recipe
    policy = TokenPolicy(recipe.phase, recipe.dense_prefix)
    if not policy.keeps_some:
        return {}
    try:
        wanted = policy.nodes(pair.before)
    except UsageError:
        return {}
    made = [(pair.new.maker(("", node.output[0])), node) for node in wanted]
    nodes = {("", label(node)): node for node, asked in made if node is not None and _is_same(node, asked)}
    return nodes if len(nodes) == len(wanted) else {}


def _is_same(node: NodeProto, asked: NodeProto) -> bool:
    bare = NodeProto()
    bare.CopyFrom(node)
    del bare.metadata_props[:]
    bare.ClearField("doc_string")
    return bare == asked
