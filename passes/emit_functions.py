"""Embed the custom ops as model-local functions of stock ops, so that the file runs without the library too."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
from onnx import TensorProto, numpy_helper

from nmonnx.graph import DOMAIN, Model
from nmonnx.passes.result import PassResult
from nmonnx.passes.surgery import Names
from nmonnx.sites import Site

OLDEST_OPSET = 9
ATTRIBUTE_OPSET = 13
SLICE_OPSET = 10
ALLOW_ZERO_OPSET = 14
ELEMENTS_OPSET = 11


@dataclass(frozen=True)
class EmitFunctions:
    """Add a model-local function `ai.nmonnx::OP` for every custom op in the graph.

    1. ONNX Runtime takes the registered kernel where there is one, and inlines the function where there is none.
    2. The bodies use the model's own opset and only stock ops; kept values pass bit for bit, ties go to the lowest
       index, NaN ranks above infinity.
    3. A body cannot ask whether an optional input is there: once one `NMMatMul` has a bias, every one gets one.
    4. The bodies compute with the shape of the activation; where value_info fixes it to numbers, which ONNX Runtime
       would believe even if they are stale, that claim is dropped.
    5. Left out, with the reason, below opset 9, and below opset 13 if the patterns differ or (below 10) a row has a
       tail: those opsets cannot express it.
    """

    fallback: str = "function"
    name: str = "emit-functions"

    def apply(self, model: Model, sites: Sequence[Site]) -> PassResult:
        nodes = list(_custom_nodes(model)) if self.fallback == "function" else []
        ops = sorted({node.op for node in nodes} - {f.name for f in model.functions})
        if not ops:
            return PassResult(self.name)
        patterns = sorted({(node.attrs["keep"], node.attrs["group"]) for node in nodes})
        tail = any(site.k % group for site in sites for _, group in patterns)
        reason = _refusal(model.opset, len(patterns), tail)
        if reason:
            return PassResult(self.name, left={"model": reason})
        has_bias = any(node.op == "NMMatMul" and len(node.inputs) > 2 for node in nodes)
        if has_bias:
            _complete_biases(model, sites)
        bodies = {
            "NMPrune": prune_function(model.opset, patterns[0], tail),
            "NMMatMul": matmul_function(model.opset, patterns[0], tail, has_bias),
        }
        model.functions.extend(onnx.parser.parse_function(bodies[op]) for op in ops)
        model.shapeless.update(site.activation.name for site in sites if _claims_sizes(site))
        return PassResult(self.name, len(ops))


def prune_function(opset: int, pattern: tuple[int, int], tail: bool) -> str:
    """`NMPrune` in ONNX text. `pattern` (keep, group) is written into the body below opset 13, whose Constant cannot
    read an attribute; `tail` adds the steps for rows that do not divide into groups."""
    return _function("NMPrune", "x", _prune_body(opset, pattern, tail, "y"), opset)


def matmul_function(opset: int, pattern: tuple[int, int], tail: bool, bias: bool) -> str:
    """`NMMatMul` in ONNX text: the prune, a MatMul and, if `bias`, an Add."""
    weight = "W"
    lines = _prune_body(opset, pattern, tail, "pruned")
    if opset >= 15:
        lines.append("weight = CastLike(W, x)")
        weight = "weight"
    lines.append(f"{'product' if bias else 'y'} = MatMul(pruned, {weight})")
    if bias:
        lines.append("y = Add(product, bias)")
    return _function("NMMatMul", "x, W, bias" if bias else "x, W", lines, opset)


def _prune_body(opset: int, pattern: tuple[int, int], tail: bool, y: str) -> list[str]:
    keep, group = pattern
    named = opset >= ATTRIBUTE_OPSET
    top_k = "TopK <axis = 1> (ranked, keep_n)" if opset >= 10 else f"TopK <axis = 1, k = {keep}> (ranked)"
    zero_ok = "<allowzero = 1> " if opset >= ALLOW_ZERO_OPSET else ""
    return [
        "one = Constant <value = int64[1] {1}> ()",
        "rest = Constant <value = int64[1] {-1}> ()",
        *_option("keep", keep, named),
        *_option("group", group, named),
        "shape = Shape(x)",
        "rank = Shape(shape)",
        "last = Sub(rank, one)",
        "channels = Gather <axis = 0> (shape, last)",
        "row_shape = Concat <axis = 0> (rest, channels)",
        "rows_x = Reshape(x, row_shape)",
        "wide = Cast <to = 1> (rows_x)",
        "size = Abs(wide)",
        # doubles, so that infinity can give way to NaN and still beat every finite number
        "exact = Cast <to = 11> (size)",
        "huge = Constant <value = double[1] {1e300}> ()",
        "nan_score = Constant <value = double[1] {1.5e308}> ()",
        "finite = Min(exact, huge)",
        "is_nan = IsNaN(wide)",
        "rows_score = Where(is_nan, nan_score, finite)",
        # a zero of x's own type, whatever x holds
        "sign = Sign(rows_x)",
        "rows_zero = Shrink <lambd = 2.0> (sign)",
        *(_pad_rows() if tail else []),
        "group_shape = Concat <axis = 0> (rest, group_n)",
        f"ranked = Reshape({'padded_score' if tail else 'rows_score'}, group_shape)",
        f"values = Reshape({'padded_x' if tail else 'rows_x'}, group_shape)",
        f"zeros = Reshape({'padded_zero' if tail else 'rows_zero'}, group_shape)",
        f"best, index = {top_k}",
        *(_select() if opset >= ELEMENTS_OPSET else _select_by_mask()),
        *(_cut_rows() if tail else ["rows_y = Identity(selected)"]),
        f"{y} = Reshape {zero_ok}(rows_y, shape)",
    ]


def _option(name: str, value: int, named: bool) -> list[str]:
    if named:
        return [f"{name}_0 = Constant <value_int: int = @{name}> ()", f"{name}_n = Reshape({name}_0, one)"]
    return [f"{name}_n = Constant <value = int64[1] {{{value}}}> ()"]


def _pad_rows() -> list[str]:
    return [
        "less = Sub(group_n, one)",
        "more = Add(channels, less)",
        "groups = Div(more, group_n)",
        "padded = Mul(groups, group_n)",
        "missing = Sub(padded, channels)",
        "score_shape = Shape(rows_score)",
        "nought = Constant <value = int64[1] {0}> ()",
        "count = Gather <axis = 0> (score_shape, nought)",
        "pad_shape = Concat <axis = 0> (count, missing)",
        "pad_score = ConstantOfShape <value = double[1] {-1}> (pad_shape)",
        "padded_score = Concat <axis = 1> (rows_score, pad_score)",
        "column = Gather <axis = 1> (rows_zero, nought)",
        "pad_zero = Expand(column, pad_shape)",
        "padded_x = Concat <axis = 1> (rows_x, pad_zero)",
        "padded_zero = Concat <axis = 1> (rows_zero, pad_zero)",
    ]


def _select() -> list[str]:
    return [
        "kept = GatherElements <axis = 1> (values, index)",
        "selected = ScatterElements <axis = 1> (zeros, index, kept)",
    ]


def _select_by_mask() -> list[str]:
    # ONNX Runtime's Where turns a kept -0 into +0: only for opsets that have nothing better
    return [
        "ranked_shape = Shape(ranked)",
        "index_shape = Shape(index)",
        "none = ConstantOfShape <value = float[1] {0}> (ranked_shape)",
        "hits = ConstantOfShape <value = float[1] {1}> (index_shape)",
        "hit = Scatter <axis = 1> (none, index, hits)",
        "mask = Cast <to = 9> (hit)",
        "selected = Where(mask, values, zeros)",
    ]


def _cut_rows() -> list[str]:
    return [
        "padded_shape = Concat <axis = 0> (rest, padded)",
        "padded_y = Reshape(selected, padded_shape)",
        "rows_y = Slice(padded_y, nought, channels, one)",
    ]


def _function(op: str, inputs: str, lines: list[str], opset: int) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n{op} <keep, group> ({inputs}) => (y)\n{{\n{body}\n}}'


def _refusal(opset: int, patterns: int, tail: bool) -> str:
    if opset < OLDEST_OPSET:
        return f"opset {opset} is too old for the fallback functions, which need {OLDEST_OPSET}"
    if opset < ATTRIBUTE_OPSET and patterns > 1:
        return f"opset {opset} cannot express several patterns in one fallback function; {ATTRIBUTE_OPSET} can"
    if opset < SLICE_OPSET and tail:
        return f"opset {opset} cannot express a tail group in a fallback function; {SLICE_OPSET} can"
    return ""


def _claims_sizes(site: Site) -> bool:
    shape = site.activation.shape
    return shape is not None and (not shape or shape[-1] != site.k or any(isinstance(d, int) for d in shape[:-1]))


def _custom_nodes(model: Model) -> Iterator[gs.Node]:
    for _, graph in model.scopes():
        yield from (node for node in graph.nodes if node.domain == DOMAIN)


def _complete_biases(model: Model, sites: Sequence[Site]) -> None:
    names, by_name = Names(model), {site.name: site for site in sites}
    for scope, graph in list(model.scopes()):
        for node in [n for n in graph.nodes if n.op == "NMMatMul" and n.domain == DOMAIN and len(n.inputs) == 2]:
            site = by_name[json.loads(model.notes[id(node)]["nmonnx.site"])[0]]
            zeros = np.zeros(site.n, np.float16 if site.elem == TensorProto.FLOAT16 else np.float32)
            node.inputs.append(_constant(model, graph, names, zeros, inside_function=scope.startswith("function:")))


def _constant(model: Model, graph: gs.Graph, names: Names, values: np.ndarray, inside_function: bool) -> gs.Tensor:
    tensor = gs.Variable(names.fresh_tensor(f"nmonnx/zeros_{values.dtype}_{values.size}"))
    if inside_function:  # functions have no initializers
        graph.nodes.append(gs.Node("Constant", attrs={"value": numpy_helper.from_array(values)}, outputs=[tensor]))
    else:
        model.constants[tensor.name] = values
    return tensor
