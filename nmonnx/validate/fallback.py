"""Run the embedded fallback functions without the library, on values that break careless ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper

from nmonnx.feeds.sample import explain
from nmonnx.nbits import CHUNK, Quantised, blocks_of, pack
from nmonnx.onnx_file.graph import DOMAIN
from nmonnx.passes.bodies import CENTER_VALUES, FUSED
from nmonnx.pattern import MAX_GROUP
from nmonnx.pruning.emulated import OPS, select
from nmonnx.reference import Center, center_of, prune, prune_matmul
from nmonnx.sites import Site
from nmonnx.validate.pair import SLOTS, Pair
from nmonnx.validate.result import Check, counted
from nmonnx.validate.structure import sites_of

_DTYPES: dict[int, type] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.DOUBLE: np.float64,
}

_GROUPS, _ROWS, _COLUMNS = 3, 32, 4
"""Whole groups and rows of the activation, and columns of the weight, that a function is tried on."""

_CHANNELS = 100
"""Channels of an activation of which a share is kept."""


@dataclass(frozen=True)
class _Use:
    """How the ops of a model use a function; what one trial stands for. `brought` are the inputs that an op gives,
    `variance` and `center` its attributes, None where it has none; `ends` how many outputs it names. The rest is of a
    weight of whole numbers: types of its scales and zero points, 0 where there is none."""

    op: str
    keep: int
    group: int
    tail: int
    elem: int
    brought: tuple[str, ...]
    variance: int | None
    center: int | None
    ends: int
    bits: int = 0
    block_size: int = 0
    scales: int = 0
    zeros: int = 0

    @property
    def about(self) -> Center | None:
        return next((name for name, value in CENTER_VALUES.items() if value == self.center), None)


def check_fallback(pair: Pair, sites: Sequence[Site]) -> Check:
    """Whether the functions `ai.nmonnx::*` of the converted model compute what the reference does, for every pattern,
    type and tail that the ops of the model use. `sites` are those of the original. The weights stay out of it."""
    functions = {f.name: f for f in pair.after.functions if f.domain == DOMAIN}
    uses = dict.fromkeys(u for u in _uses(pair, sites) if u.op in functions)
    faults = [fault for use in uses for fault in _faults(pair.after, functions[use.op], use)]
    return counted("fallback functions compute what the reference does", len(uses), faults, "uses of the functions")


def _uses(pair: Pair, sites: Sequence[Site]) -> Iterator[_Use]:
    by_name = {site.name: site for site in sites}
    for scope in pair.new:
        for node in scope.nodes:
            site = next((by_name[name] for name in sites_of(node) if name in by_name), None)
            options = {a.name: a.i for a in node.attribute}
            keep, group = options.get("keep", 0), options.get("group", 0)
            if node.domain == DOMAIN and site is not None and site.elem in _DTYPES and 0 < keep <= group:
                given = zip(SLOTS.get(node.op_type, ()), node.input, strict=False)
                brought = tuple(slot for slot, name in given if name)
                asked = (options.get("variance"), options.get("center"), len(node.output))
                weight = (options.get("bits", 0), options.get("block_size", 0), *_types(pair, scope.path, node))
                yield _Use(node.op_type, keep, group, site.k % group, site.elem, brought, *asked, *weight)


def _types(pair: Pair, scope: str, node: NodeProto) -> tuple[int, int]:
    """Element types of scales and zeros."""
    inputs = pair.inputs_of(scope, node)
    stored = [pair.new.initializer(inputs[slot]) if slot in inputs else None for slot in ("scales", "zeros")]
    scales, zeros = (tensor.data_type if tensor is not None else 0 for tensor in stored)
    return scales, zeros


def _faults(model: ModelProto, function: FunctionProto, use: _Use) -> Iterator[str]:
    arrays = _arrays(use)
    said = f"{use.op} {use.keep}:{use.group} of {TensorProto.DataType.Name(use.elem)}"
    for rows in (_ROWS, 0):
        feed = arrays | {slot: arrays[slot][:rows] for slot in ("x", "dense") if slot in arrays}
        try:
            got = _run(_trial(model, function, use, arrays), feed)
        except Exception as e:  # ONNX Runtime has no common class for its errors
            yield f"{said} does not run: {explain(e)}"
            return
        if not _agrees(got, feed, use):
            yield f"{said} differs from the reference"
            return


def _arrays(use: _Use) -> dict[str, np.ndarray]:
    """Values for every input that is given: ties, zeros of both signs and, where no product spreads them, NaN and
    Inf; a scale and a shift that float16 can express, so that nothing is rounded."""
    rng = np.random.default_rng(0)
    dtype, k = _DTYPES[use.elem], _CHANNELS if use.group > MAX_GROUP else _GROUPS * use.group + use.tail
    x: np.ndarray = rng.integers(-8, 9, (_ROWS, k)).astype(dtype)
    x[1], x[2, ::2], x[3] = 0, -0.0, -1
    if use.op == "NMPrune":
        x[_ROWS // 2 :] = rng.choice(np.array([np.nan, np.inf, -np.inf, 7, -1], dtype), (_ROWS - _ROWS // 2, k))
    values = {
        "x": x,
        "W": rng.integers(-8, 9, (k, _COLUMNS)).astype(dtype),
        "bias": rng.integers(-8, 9, _COLUMNS).astype(dtype),
        "scale": rng.choice(np.array([0, 0.5, 1, 2], np.float32), k),
        "shift": rng.integers(-2, 3, k).astype(np.float32),
        "order": rng.permutation(k),
        "row_sum": rng.integers(-8, 9, _COLUMNS).astype(np.float32),
        "threshold": np.array([2.0], np.float32),
        "dense": rng.integers(0, 2, _ROWS).astype(bool),
    }
    if use.bits:
        values |= _packed(rng, k, use)
    return {slot: values[slot] for slot in use.brought}


def _packed(rng: np.random.Generator, k: int, use: _Use) -> dict[str, np.ndarray]:
    """A weight of whole numbers; its values are whole or halves."""
    low, high = (-8, 8) if use.bits == 8 else (0, 16)
    columns = CHUNK + _COLUMNS
    codes, shape = rng.integers(low, high, (k, columns)), (blocks_of(k, use.block_size), columns)
    values = {
        "W": codes.astype(np.int8) if use.bits == 8 else pack(codes.astype(np.uint8)),
        "scales": rng.choice([0.5, 1, 2], shape).astype(helper.tensor_dtype_to_np_dtype(use.scales)),
        **{slot: rng.integers(-8, 9, columns).astype(np.float32) for slot in ("bias", "row_sum")},
    }
    values["bias"] = values["bias"].astype(_DTYPES[use.elem])
    if use.zeros:
        values["zeros"] = rng.integers(low, high, shape).astype(helper.tensor_dtype_to_np_dtype(use.zeros))
    return values


def _trial(model: ModelProto, function: FunctionProto, use: _Use, arrays: dict[str, np.ndarray]) -> ModelProto:
    """A model of one node that calls the function."""
    names = ["y", "center"][: use.ends]
    node = NodeProto(op_type=use.op, domain=DOMAIN, name=use.op, output=names)
    node.input.extend(slot if slot in arrays else "" for slot in SLOTS.get(use.op, ())[: len(function.input)])
    node.attribute.extend([helper.make_attribute("keep", use.keep), helper.make_attribute("group", use.group)])
    asked = {"variance": use.variance, "center": use.center}
    asked |= {"bits": use.bits, "block_size": use.block_size} if use.bits else {}
    node.attribute.extend(helper.make_attribute(name, value) for name, value in asked.items() if value is not None)
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), [None] * a.ndim)
        for name, a in arrays.items()
    ]
    outputs = [helper.make_tensor_value_info(name, use.elem, [None, None]) for name in names]
    graph = helper.make_graph([node], "trial", inputs, outputs)
    return helper.make_model(
        graph, functions=[function], opset_imports=list(model.opset_import), ir_version=model.ir_version
    )


def _run(trial: ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # a failure is raised with its reason, not logged as well
    session = onnxruntime.InferenceSession(trial.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def _agrees(got: Sequence[np.ndarray], feed: dict[str, np.ndarray], use: _Use) -> bool:
    wanted = _wanted(feed, use)
    exact = not use.variance and use.about != "mean"  # small integers, so that every sum is exact
    pairs = list(zip(got, wanted, strict=False))
    if exact:
        return all(a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True) for a, b in pairs)
    return all(a.dtype == b.dtype and _is_close(a, b) for a, b in pairs)


def _wanted(feed: dict[str, np.ndarray], use: _Use) -> list[np.ndarray]:
    """What the reference makes of the values: the output of the op and, of a prune, the center."""
    criterion: dict[str, Any] = {slot: feed.get(slot) for slot in ("scale", "shift", "order", "dense")}
    criterion |= {"variance": bool(use.variance), "center": use.about}
    x, dtype = feed["x"], feed["x"].dtype
    if use.op in OPS:
        criterion = {slot: criterion[slot] for slot in ("scale", "shift", "variance", "center")}
        made = select(use.op, x, use.keep, use.group, threshold=feed.get("threshold"), **criterion)
    elif use.op == "NMPrune":
        made = prune(x, use.keep, use.group, **criterion)
    if use.op not in FUSED:
        center = center_of(x, use.about, feed.get("shift")) if use.about else np.zeros((len(x), 1))
        return [made, center.astype(dtype)]
    row_sum = feed.get("row_sum")
    weight = feed["W"]
    if use.bits:
        weight = Quantised(use.bits, use.block_size, weight, feed["scales"], feed.get("zeros")).values()
    exact = prune_matmul(x, weight, use.keep, use.group, feed.get("bias"), **criterion, row_sum=row_sum)
    return [exact.astype(dtype)]


def _is_close(got: np.ndarray, want: np.ndarray) -> bool:
    unit = 8 * float(np.finfo(want.dtype).eps) + 64 * float(np.finfo(np.float32).eps)
    largest = float(np.abs(want[np.isfinite(want)]).max(initial=0))
    return np.allclose(got, want, rtol=unit, atol=unit * largest, equal_nan=True)
