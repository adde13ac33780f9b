"""Graph passes: the only code that edits graphs.

A pass is a frozen dataclass whose fields are its options, in a file of its own. `pipeline` is the order in which
`nmonnx convert` runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from nmonnx.onnx_file.graph import Model
from nmonnx.passes.dense_tokens import DenseTokens
from nmonnx.passes.emit_functions import EmitFunctions
from nmonnx.passes.emulate_prune import EmulatePrune
from nmonnx.passes.fold_center import FoldCenter
from nmonnx.passes.fold_corrections import FoldCorrections
from nmonnx.passes.fold_shift import FoldShift
from nmonnx.passes.fuse_matmul import FuseMatMul
from nmonnx.passes.insert_prune import InsertPrune
from nmonnx.passes.prune_weights import PruneWeights
from nmonnx.passes.quantise_weights import QuantiseWeights
from nmonnx.passes.result import PassResult
from nmonnx.passes.stamp import Stamp
from nmonnx.passes.token_policy import TokenPolicy
from nmonnx.pruning.recipe import Recipe
from nmonnx.pruning.treatment import Plan
from nmonnx.records.corrections import Corrections
from nmonnx.sites import Site, Skipped

__all__ = [
    "DenseTokens",
    "EmitFunctions",
    "EmulatePrune",
    "FoldCenter",
    "FoldCorrections",
    "FoldShift",
    "FuseMatMul",
    "InsertPrune",
    "Pass",
    "PassResult",
    "PruneWeights",
    "QuantiseWeights",
    "Stamp",
    "pipeline",
    "run",
]


class Pass(Protocol):
    """`apply` edits `model.graph` for the chosen sites and says what it did.

    1. It keeps no state between calls, and finds before it edits.
    2. `PassResult.modified` is true only if something changed; a second run changes nothing.
    3. What it leaves alone it returns with the reason, by site name.
    """

    name: str

    def apply(self, model: Model, sites: Sequence[Site]) -> PassResult: ...


def pipeline(
    recipe: Recipe, plan: Plan, left: Sequence[Skipped] = (), corrections: Corrections | None = None
) -> tuple[Pass, ...]:
    """What `convert` runs, in order. `plan` says how each layer is pruned; `left` are the linear layers that stay
    dense, for the record; `corrections` are folded."""
    op = recipe.emulated
    if recipe.prune == "weights":
        return (PruneWeights(plan.treatments), Stamp(recipe, tuple(left)))
    return (
        EmulatePrune(op, plan.treatments) if op else InsertPrune(plan.treatments),
        FuseMatMul("prune" if op else recipe.kernel, smaller=recipe.weights != "keep"),
        FoldCorrections(corrections, recipe.weights),
        QuantiseWeights(recipe.weights),
        FoldShift(),
        FoldCenter(),
        DenseTokens(TokenPolicy(recipe.phase, recipe.dense_prefix)),
        EmitFunctions(recipe.fallback),
        Stamp(recipe, tuple(left)),
    )


def run(passes: Sequence[Pass], model: Model, sites: Sequence[Site]) -> list[PassResult]:
    return [p.apply(model, sites) for p in passes]
