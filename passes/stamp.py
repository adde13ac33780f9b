"""Write into the model where it came from and what was done to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

import nmonnx
from nmonnx.digest import file_sha256
from nmonnx.onnx_file.graph import Model
from nmonnx.onnx_file.weight_pruning import PrunedWeight
from nmonnx.passes.bodies import FUSED
from nmonnx.passes.result import PassResult
from nmonnx.passes.surgery import nodes_of_sites
from nmonnx.pattern import pattern_text
from nmonnx.pruning.recipe import Recipe
from nmonnx.sites import Site, Skipped

PACKED = "packed for NMMatMulNBits"
"""How a tensor was changed that holds the codes, scales or zero points of a weight."""


@dataclass(frozen=True)
class Stamp:
    """Add to the model's metadata_props:

    1. `nmonnx.version`, `nmonnx.recipe` (JSON) and `nmonnx.source`, the SHA-256 of the original .onnx file;
    2. `nmonnx.sites`, one JSON object per linear layer found: pruned by which op with which pattern, or left and why;
    3. `nmonnx.constants`, the new constants that do something: name -> {input of the op, sha256 of the values};
    4. `nmonnx.changed`, the weights that are stored in another layout: new name -> {from, how}.
    """

    recipe: Recipe
    left: tuple[Skipped, ...] = ()
    name: str = "stamp"

    def apply(self, model: Model, sites: Sequence[Site]) -> PassResult:
        records = _by_weight(model, sites) if self.recipe.prune == "weights" else _by_op(model, sites)
        records += [_left(skipped) for skipped in self.left if skipped.linear]
        changed = {t.name: {"from": t.source.name, "how": t.how} for t in model.repacked.values()}
        packed = [t for t in model.computed.values() if t.source]
        changed |= {t.name: {"from": t.source, "how": PACKED} for t in packed}
        entries = {
            "nmonnx.version": nmonnx.__version__,
            "nmonnx.recipe": self.recipe.to_json(),
            "nmonnx.source": file_sha256(model.path),
            "nmonnx.sites": json.dumps(records, ensure_ascii=False),
            "nmonnx.constants": json.dumps(model.declared, ensure_ascii=False),
            "nmonnx.changed": json.dumps(changed, ensure_ascii=False),
        }
        new = {k: v for k, v in entries.items() if model.metadata.get(k) != v}
        model.metadata.update(new)
        return PassResult(self.name, len(new))


def _pruned(model: Model, site: Site, pattern: str, kernel: str, output: str) -> dict[str, object]:
    new = model.weights.get(site.name)
    told = {"weights": new.form, "weight_error": new.error} if new else {}
    return {
        "name": site.name,
        "op": site.op,
        "role": site.role,
        "block": site.block,
        "k": site.k,
        "n": site.n,
        "status": "pruned",
        "pattern": pattern,
        "kernel": kernel,
        "activation": site.activation.name,
        "output": output,
        "scope": site.scope,
        **told,
    }


def _by_op(model: Model, sites: Sequence[Site]) -> list[dict[str, object]]:
    """The layers whose activation an op prunes."""
    nodes = dict(nodes_of_sites(model))
    return [
        _pruned(model, site, pattern_text(node.attrs["keep"], node.attrs["group"]), node.op, _output(model, site, node))
        for site in sites
        if (node := nodes.get(site.name)) is not None
    ]


def _by_weight(model: Model, sites: Sequence[Site]) -> list[dict[str, object]]:
    """The layers whose weight is pruned."""
    made = {t.source.name: str(t.pattern) for t in model.repacked.values() if isinstance(t, PrunedWeight)}
    return [_pruned(model, s, made[s.initializer], "weights", s.output) for s in sites if s.initializer in made]


def _output(model: Model, site: Site, node: gs.Node) -> str:
    """The tensor that has the layer's result, in the original and here."""
    if node.op in FUSED:
        return model.ends.get(site.name, node.outputs[0].name)
    return model.origin[id(site.node)].output[0]


def _left(skipped: Skipped) -> dict[str, object]:
    return {
        "name": skipped.name,
        "op": skipped.op,
        "role": skipped.role,
        "block": skipped.block,
        "k": skipped.k,
        "n": skipped.n,
        "status": "left",
        "reason": skipped.reason,
        "output": skipped.output,
        "scope": skipped.scope,
    }
