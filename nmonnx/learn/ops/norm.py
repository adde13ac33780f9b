"""Normalisations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nmonnx.learn.ops.op import Op, Run


def _layer_norm(op: Op, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    shape = x.shape[op.get("axis", -1) % x.ndim :]
    y = functional.layer_norm(x, shape, eps=op.get("epsilon", 1e-5)) * scale
    return y if bias is None else y + bias


def _rms_norm(op: Op, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    axes = list(range(op.get("axis", -1) % x.ndim, x.ndim))
    y = x * torch.rsqrt(x.square().mean(axes, keepdim=True) + op.get("epsilon", 1e-5)) * scale
    return y if bias is None else y + bias


def _skip(norm: Run, has_beta: bool) -> Run:
    """(normalised, -, -, the sum that is normalised)"""

    def run(op: Op, x: Tensor, skip: Tensor, gamma: Tensor, *more: Tensor | None) -> tuple[Tensor | None, ...]:
        beta, bias = (*more, None, None)[:2] if has_beta else (None, (*more, None)[0])
        total = x + skip if bias is None else x + skip + bias
        return norm(op, total, gamma, beta), None, None, total  # type: ignore[return-value]

    return run


OPS: dict[str, Run] = {
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "SimplifiedLayerNormalization": _rms_norm,
    "com.microsoft::SimplifiedLayerNormalization": _rms_norm,
    "com.microsoft::SkipSimplifiedLayerNormalization": _skip(_rms_norm, has_beta=False),
    "com.microsoft::SkipLayerNormalization": _skip(_layer_norm, has_beta=True),
}
