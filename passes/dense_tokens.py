"""Tell every prune which tokens of a call stay dense."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs
from onnx import helper

from nmonnx.errors import UsageError
from nmonnx.onnx_file.graph import DOMAIN, Model
from nmonnx.passes.bodies import INPUTS
from nmonnx.passes.result import PassResult
from nmonnx.passes.token_policy import TokenPolicy
from nmonnx.passes.token_rows import TokenRows
from nmonnx.sites import Site


@dataclass(frozen=True)
class DenseTokens:
    """Give every custom op the input `dense`, one tensor for all, made by the nodes of `TokenPolicy`.

    1. Nothing happens where no token stays dense.
    2. Layers that cannot see the tensor prune every token, and are told with the reason: those inside functions and,
       where the tokens of a call differ, those whose activation has other tokens: see `TokenRows`.
    3. Refused where no layer could see it, or `TokenPolicy.nodes` refuses the graph.
    """

    policy: TokenPolicy
    name: str = "dense-tokens"

    def apply(self, model: Model, sites: Sequence[Site]) -> PassResult:
        if not self.policy.keeps_some:
            return PassResult(self.name)
        by_name = {site.name: site for site in sites}
        left: dict[str, str] = {}
        found: list[gs.Node] = []
        rows = TokenRows(model.proto.graph)
        for path, graph in model.scopes():
            for node in graph.nodes:
                if node.domain == DOMAIN and id(node) in model.notes and not _is_told(node):
                    names = json.loads(model.notes[id(node)]["nmonnx.site"])
                    site = by_name[names[0]]
                    reason = self.policy.refusal(rows, path, site.activation.name, site.role)
                    left |= dict.fromkeys(names, reason) if reason else {}
                    found += [] if reason else [node]
        if not found:
            if left:
                reason = next(iter(left.values()))
                raise UsageError(f"{model.path}: no layer can be told which tokens stay dense: {reason}")
            return PassResult(self.name)
        dense = _add_nodes(model, self.policy, self.name)
        for node in found:
            place = INPUTS[node.op].index("dense")
            node.inputs += [*(gs.Variable.empty() for _ in range(place - len(node.inputs))), dense]
        return PassResult(self.name, len(found), left)


def _is_told(node: gs.Node) -> bool:
    return len(node.inputs) > INPUTS[node.op].index("dense")


def _add_nodes(model: Model, policy: TokenPolicy, made_by: str) -> gs.Tensor:
    """The nodes of the policy in the main graph; what the last one makes."""
    tensors: dict[str, gs.Tensor] = {t.name: t for t in model.graph.inputs}
    try:
        protos = policy.nodes(model.proto)
    except UsageError as e:
        raise UsageError(f"{model.path}: {e}") from e
    for proto in protos:
        attributes = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
        output = tensors[proto.output[0]] = gs.Variable(proto.output[0])
        node = gs.Node(proto.op_type, proto.name, attributes, [tensors[name] for name in proto.input], [output])
        model.graph.nodes.append(node)
        model.notes[id(node)] = {"nmonnx.pass": made_by, "nmonnx.site": "[]"}
        model.alive.append(node)
    return tensors[protos[-1].output[0]]
