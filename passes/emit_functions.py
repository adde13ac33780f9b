"""Embed the custom ops as model-local functions of stock ops, so that the file runs without the library too."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
from onnx import TensorProto

from nmonnx.nbits import DEFAULT_ZERO, blocks_of
from nmonnx.onnx_file.graph import DOMAIN, Model
from nmonnx.passes.bodies import CRITERION, INPUTS, Body, matmul_function, prune_function
from nmonnx.passes.packed_weight import code_type
from nmonnx.passes.result import PassResult
from nmonnx.passes.surgery import Constants, Names, brought_by, function_of
from nmonnx.sites import Site

INSIDE = "the fallback functions are in the file all the same: ONNX Runtime needs them where an op lies in a function"


@dataclass(frozen=True)
class EmitFunctions:
    """Add a model-local function `ai.nmonnx::OP` for every custom op in the graph.

    1. ONNX Runtime takes the registered kernel where there is one, and inlines the function where there is none.
    2. The bodies use the model's own opset and only stock ops; kept values pass bit for bit, ties go to the lowest
       index, NaN ranks above infinity.
    3. A body cannot ask whether an optional input, attribute or output is there: once one node brings it, every other
       gets a neutral one.
    4. The bodies compute with the shape of the activation; where value_info fixes it to numbers, which ONNX Runtime
       would believe even if they are stale, that claim is dropped.
    5. fallback "none" leaves them out, unless an op lies inside a model-local function of the original, where ONNX
       Runtime cannot tell its types without.
    6. Left out, with the reason, where the opset cannot express it (see `Body.refusal`).
    """

    fallback: str = "function"
    name: str = "emit-functions"

    def apply(self, model: Model, sites: Sequence[Site]) -> PassResult:
        found = list(_custom_nodes(model))
        inside = self.fallback == "none" and any(scope.startswith("function:") for scope, _ in found)
        nodes = [node for _, node in found] if self.fallback == "function" or inside else []
        ops = sorted({node.op for node in nodes} - {f.name for f in model.functions})
        if not ops:
            return PassResult(self.name)
        patterns = sorted({(node.attrs["keep"], node.attrs["group"]) for node in nodes})
        brought = {name for node in nodes for name in brought_by(node)}
        body = Body(
            model.opset,
            patterns[0],
            tail=any(site.k % group for site in sites for _, group in patterns),
            criterion=frozenset(brought & set(CRITERION)),
            bias="bias" in brought,
            variance=any(node.attrs.get("variance") for node in nodes),
            center=any(node.attrs.get("center") for node in nodes),
            dense="dense" in brought,
            ends=max(len(node.outputs) for node in nodes),
            packed="NMMatMulNBits" in {node.op for node in nodes},
            elem=_one_type(site for site in sites if site.quantised or site.fusable),
            zeros="zeros" in brought,
        )
        reason = body.refusal(len(patterns))
        if reason:
            return PassResult(self.name, left={"model": reason})
        _complete_inputs(model, sites, brought | ({"row_sum"} if body.center else set()))
        names = Names(model)
        for _, node in _custom_nodes(model):
            if node.op == "NMPrune" and len(node.outputs) < body.ends:
                node.outputs.append(gs.Variable(names.fresh_tensor(f"{node.name}/center")))
            node.attrs.update({choice: node.attrs.get(choice, 0) for choice in body.choices})
        texts = [prune_function(body) if op == "NMPrune" else matmul_function(body, op) for op in ops]
        model.functions.extend(map(onnx.parser.parse_function, texts))
        model.shapeless.update(site.activation.name for site in sites if claims_sizes(site))
        return PassResult(self.name, len(ops), {"model": INSIDE} if inside else {})


def _custom_nodes(model: Model) -> Iterator[tuple[str, gs.Node]]:
    for scope, graph in model.scopes():
        yield from ((scope, node) for node in graph.nodes if _has_kernel(node))


def _has_kernel(node: gs.Node) -> bool:
    return node.domain == DOMAIN and node.op in INPUTS


def _complete_inputs(model: Model, sites: Sequence[Site], wanted: set[str]) -> None:
    constants, by_name = Constants(model, Names(model)), {site.name: site for site in sites}
    made: dict[tuple, gs.Tensor] = {}
    for scope, node in list(_custom_nodes(model)):
        site = by_name[json.loads(model.notes[id(node)]["nmonnx.site"])[0]]
        expected = INPUTS[node.op]
        missing = (wanted & set(expected)) - set(brought_by(node))
        for name in sorted(missing, key=expected.index):
            while len(node.inputs) <= expected.index(name):
                node.inputs.append(gs.Variable.empty())
            node.inputs[expected.index(name)] = _neutral(constants, made, scope, site, name, node)


def _one_type(sites: Iterable[Site]) -> int:
    """The element type of the activations; 0 if they differ."""
    types = {site.elem for site in sites}
    return types.pop() if len(types) == 1 else 0


def _neutral(constants: Constants, made: dict, scope: str, site: Site, name: str, node: gs.Node) -> gs.Tensor:
    """A constant that changes nothing, one for each kind and, since functions have no initializers, each function."""
    half = site.elem == TensorProto.FLOAT16
    bits, block = node.attrs.get("bits", 8), node.attrs.get("block_size", site.k)
    neutral: dict[str, np.ndarray] = {
        "bias": np.zeros(site.n, np.float16 if half else np.float32),
        "scale": np.ones(1, np.float32),
        "shift": np.zeros(1, np.float32),
        "order": np.arange(site.k),
        "row_sum": np.zeros(site.n, np.float32),
        "dense": np.zeros(1, bool),
        "zeros": np.full((blocks_of(site.k, block), site.n), DEFAULT_ZERO[bits], code_type(bits)),
    }
    values = neutral[name]
    key = (function_of(scope), name, values.dtype, values.shape)
    if key not in made:
        made[key] = constants.add(scope, f"nmonnx/no_{name}_{values.dtype}_{values.size}", values)
    return made[key]


def claims_sizes(site: Site) -> bool:
    """Whether value_info fixes the shape of its activation to numbers, which may be stale."""
    shape = site.activation.shape
    return shape is not None and (not shape or shape[-1] != site.k or any(isinstance(d, int) for d in shape[:-1]))
