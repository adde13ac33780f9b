"""Quantised weights, dequantised once."""

from __future__ import annotations

import torch
from torch import Tensor

from nmonnx.learn.ops.op import Op, Run
from nmonnx.sites.packing import bnb4_values, nbits_values


def _matmul_nbits(op: Op, x: Tensor, codes: Tensor, scales: Tensor, *more: Tensor | None) -> Tensor:
    zeros, g_idx, bias = (*more, None, None, None)[:3]
    if "weight" not in op.store:
        k, n, block = (op.get(name) for name in ("K", "N", "block_size"))
        given = {"zeros": zeros, "g_idx": g_idx}
        arrays = {name: t.numpy() for name, t in given.items() if t is not None}
        values = nbits_values(k, n, op.get("bits", 4), block, codes.numpy(), scales.numpy(), **arrays)
        op.store["weight"] = torch.from_numpy(values)
    y = x @ op.store["weight"]
    return y if bias is None else y + bias


def _matmul_bnb4(op: Op, x: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    if "weight" not in op.store:
        k, n, block, kind = (op.get(name) for name in ("K", "N", "block_size", "quant_type"))
        op.store["weight"] = torch.from_numpy(bnb4_values(k, n, block, kind, codes.numpy(), absmax.numpy()))
    return x @ op.store["weight"]


def _dequantize(op: Op, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    axis, block = op.get("axis", 1), op.get("block_size", 0)
    values = codes.to(scale.dtype)
    if zero is not None:
        values = values - _spread(zero, values, axis, block).to(values.dtype)
    return values * _spread(scale, values, axis, block)


def _spread(per: Tensor, values: Tensor, axis: int, block: int) -> Tensor:
    """A number for all, one for each place along `axis`, or one for each block along it, against `values`."""
    if per.numel() == 1:
        return per.reshape(())
    if block:
        return per.repeat_interleave(block, axis).narrow(axis, 0, values.shape[axis])
    shape = [1] * values.ndim
    shape[axis] = -1
    return per.reshape(shape)


OPS: dict[str, Run] = {
    "com.microsoft::MatMulNBits": _matmul_nbits,
    "com.microsoft::MatMulBnb4": _matmul_bnb4,
    "DequantizeLinear": _dequantize,
    "com.microsoft::DequantizeLinear": _dequantize,
}
