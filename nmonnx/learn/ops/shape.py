"""Shapes, indexing and constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nmonnx.learn.ops.op import Op, Run


def _constant(op: Op) -> Tensor:
    if "value" in op.attrs:
        return op.attrs["value"]
    name, value = next(iter(op.attrs.items()))
    return torch.tensor(value, dtype=torch.float32 if name.startswith("value_float") else torch.int64)


def _constant_of_shape(op: Op, shape: Tensor) -> Tensor:
    value = op.get("value")
    value = torch.zeros(1) if value is None else value
    return value.reshape(()).expand(shape.tolist())


def _shape(op: Op, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[op.get("start", 0) : op.get("end")], dtype=torch.int64)


def _reshape(op: Op, x: Tensor, shape: Tensor) -> Tensor:
    wanted = shape.tolist()
    if not op.get("allowzero", 0):
        wanted = [x.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    return x.reshape(wanted)


def _flatten(op: Op, x: Tensor) -> Tensor:
    axis = op.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    rows = 1
    for size in x.shape[:axis]:
        rows *= size
    return x.reshape(rows, -1)


def _transpose(op: Op, x: Tensor) -> Tensor:
    return x.permute(op.get("perm") or list(reversed(range(x.ndim))))


def _axes(op: Op, axes: Tensor | None) -> list[int] | None:
    return op.get("axes") if axes is None else axes.reshape(-1).tolist()


def _unsqueeze(op: Op, x: Tensor, axes: Tensor | None = None) -> Tensor:
    wanted = _axes(op, axes) or []
    for axis in sorted(axis % (x.ndim + len(wanted)) for axis in wanted):
        x = x.unsqueeze(axis)
    return x


def _squeeze(op: Op, x: Tensor, axes: Tensor | None = None) -> Tensor:
    wanted = _axes(op, axes)
    return x.squeeze() if wanted is None else x.squeeze(tuple(wanted))


def _expand(op: Op, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(shape.tolist())))


def _concat(op: Op, *parts: Tensor) -> Tensor:
    return torch.cat(parts, op.get("axis"))


def _split(op: Op, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = op.get("axis", 0)
    given = op.get("split") if sizes is None else sizes.tolist()
    if not given:
        given = -(-x.shape[axis] // len(op.outputs))
    return torch.split(x, given, axis)


def _slice(op: Op, x: Tensor, *given: Tensor | None) -> Tensor:
    listed: list[Any] = [None if t is None else t.reshape(-1).tolist() for t in given]
    if not given:
        listed = [op.get("starts"), op.get("ends"), op.get("axes")]
    starts, ends, axes, steps = [*listed, None, None][:4]
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        if step > 0:
            low, high, _ = slice(start, end).indices(size)
            x = x[(slice(None),) * (axis % x.ndim) + (slice(low, max(low, high), step),)]
        else:
            kept = range(size)[_clamped(start, size) : None if end < -size else end : step]
            x = x.index_select(axis, torch.tensor(list(kept), dtype=torch.int64))
    return x


def _clamped(start: int, size: int) -> int:
    return min(start, size - 1)


def _gather(op: Op, x: Tensor, indices: Tensor) -> Tensor:
    axis = op.get("axis", 0) % x.ndim
    index = torch.where(indices < 0, indices + x.shape[axis], indices).long()
    if axis == 0 and x.ndim == 2 and x.stride(0) == 1:  # a transposed table: rows are picked as columns
        return x.t()[:, index.reshape(-1)].t().reshape(*indices.shape, x.shape[1])
    picked = x.index_select(axis, index.reshape(-1))
    return picked.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def _gather_elements(op: Op, x: Tensor, indices: Tensor) -> Tensor:
    axis = op.get("axis", 0)
    return torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices).long())


def _gather_nd(op: Op, x: Tensor, indices: Tensor) -> Tensor:
    lead = op.get("batch_dims", 0)
    if lead == 0:
        return x[tuple(indices.long().unbind(-1))]
    shape = x.shape[:lead]
    flat, wanted = x.reshape(-1, *x.shape[lead:]), indices.long().reshape(-1, *indices.shape[lead:])
    rows = [part[tuple(index.unbind(-1))] for part, index in zip(flat, wanted, strict=True)]
    return torch.stack(rows).reshape(*shape, *rows[0].shape)


def _scatter_nd(op: Op, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    return x.clone().index_put(tuple(indices.long().unbind(-1)), updates)


def _scatter_elements(op: Op, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis = op.get("axis", 0)
    index = torch.where(indices < 0, indices + x.shape[axis], indices).long()
    if op.get("reduction", "none") == "add":
        return x.scatter_add(axis, index, updates)
    return x.scatter(axis, index, updates)


def _range(op: Op, start: Tensor, limit: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), step.item(), dtype=start.dtype)


def _trilu(op: Op, x: Tensor, k: Tensor | None = None) -> Tensor:
    cut = torch.triu if op.get("upper", 1) else torch.tril
    return cut(x, int(k) if k is not None else 0)


def _tile(op: Op, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(repeats.tolist())


def _cumsum(op: Op, x: Tensor, axis: Tensor) -> Tensor:
    along = int(axis)
    flipped = x.flip(along) if op.get("reverse", 0) else x
    total = flipped.cumsum(along).to(x.dtype)
    total = total - flipped if op.get("exclusive", 0) else total
    return total.flip(along) if op.get("reverse", 0) else total


def _top_k(op: Op, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    best = torch.topk(x, int(k), op.get("axis", -1), bool(op.get("largest", 1)))
    return best.values, best.indices


def _one_hot(op: Op, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    axis, size = op.get("axis", -1), int(depth)
    hot = torch.nn.functional.one_hot(indices.long() % size, size).movedim(-1, axis)
    return torch.where(hot.bool(), values[1], values[0])


OPS: dict[str, Run] = {
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Shape": _shape,
    "Size": lambda op, x: torch.tensor(x.numel()),
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Expand": _expand,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "ScatterElements": _scatter_elements,
    "Range": _range,
    "Trilu": _trilu,
    "Tile": _tile,
    "CumSum": _cumsum,
    "TopK": _top_k,
    "OneHot": _one_hot,
    "NonZero": lambda op, x: torch.nonzero(x).t(),
}
