"""Arithmetic, comparisons, reductions and products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from nmonnx.learn.ops.op import Op, Run, dtype_of


def _matmul(op: Op, a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def _fused_matmul(op: Op, a: Tensor, b: Tensor) -> Tensor:
    a = a.transpose(-1, -2) if op.get("transA") else a
    b = b.transpose(-1, -2) if op.get("transB") else b
    return op.get("alpha", 1.0) * (a @ b)


def _gemm(op: Op, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    y = _fused_matmul(op, a, b)
    return y if c is None else y + op.get("beta", 1.0) * c


def _divide(op: Op, a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _power(op: Op, a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b).to(a.dtype)


def _gelu(op: Op, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=op.get("approximate", "none"))


def _bias_gelu(op: Op, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.gelu(x if bias is None else x + bias)


def _fast_gelu(op: Op, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.gelu(x if bias is None else x + bias, approximate="tanh")


def _quick_gelu(op: Op, x: Tensor) -> Tensor:
    return x * torch.sigmoid(op.get("alpha", 1.702) * x)


def _softmax(op: Op, x: Tensor) -> Tensor:
    if op.opset < 13:
        axis = op.get("axis", 1) % x.ndim
        return torch.softmax(x.flatten(axis), -1).reshape(x.shape)
    return torch.softmax(x, op.get("axis", -1))


def _clip(op: Op, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    low, high = (op.get("min"), op.get("max")) if op.opset < 11 else (low, high)
    x = x if low is None else torch.maximum(x, torch.as_tensor(low, dtype=x.dtype))
    return x if high is None else torch.minimum(x, torch.as_tensor(high, dtype=x.dtype))


def _many(combine: Callable[[Tensor, Tensor], Tensor]) -> Run:
    def run(op: Op, first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = combine(first, other)
        return first

    return run


def _unary(function: Run) -> Run:
    return lambda op, x: function(x)


def _binary(function: Run) -> Run:
    return lambda op, a, b: function(a, b)


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Run:
    def run(op: Op, x: Tensor, axes: Tensor | None = None) -> Tensor:
        given = op.get("axes") if axes is None else axes.tolist()
        if not given and op.get("noop_with_empty_axes", 0):
            return x
        over = sorted(axis % x.ndim for axis in given) if given else list(range(x.ndim))
        return function(x, over, bool(op.get("keepdims", 1)))

    return run


def _mod(op: Op, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if op.get("fmod") else torch.remainder(a, b)


def _cast(op: Op, x: Tensor) -> Tensor:
    return x.to(dtype_of(op.get("to")))


def _einsum(op: Op, *inputs: Tensor) -> Tensor:
    return torch.einsum(op.get("equation"), *inputs)


def _dropout(op: Op, x: Tensor, *_: Tensor | None) -> tuple[Tensor, ...]:
    return (x, torch.ones_like(x, dtype=torch.bool))


def _leaky(op: Op, x: Tensor) -> Tensor:
    return functional.leaky_relu(x, op.get("alpha", 0.01))


def _log_softmax(op: Op, x: Tensor) -> Tensor:
    return torch.log_softmax(x, op.get("axis", -1))


def _swish(op: Op, x: Tensor) -> Tensor:
    return x * torch.sigmoid(op.get("alpha", 1.0) * x)


OPS: dict[str, Run] = {
    "MatMul": _matmul,
    "com.microsoft::FusedMatMul": _fused_matmul,
    "Gemm": _gemm,
    "Einsum": _einsum,
    "Add": _binary(torch.add),
    "Sub": _binary(torch.sub),
    "Mul": _binary(torch.mul),
    "Div": _divide,
    "Mod": _mod,
    "Pow": _power,
    "Sqrt": _unary(torch.sqrt),
    "Reciprocal": _unary(torch.reciprocal),
    "Neg": _unary(torch.neg),
    "Abs": _unary(torch.abs),
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Floor": _unary(torch.floor),
    "Ceil": _unary(torch.ceil),
    "Round": _unary(torch.round),
    "Sign": _unary(torch.sign),
    "Cos": _unary(torch.cos),
    "Sin": _unary(torch.sin),
    "Erf": _unary(torch.erf),
    "Tanh": _unary(torch.tanh),
    "Sigmoid": _unary(torch.sigmoid),
    "Relu": _unary(torch.relu),
    "Softplus": _unary(functional.softplus),
    "LeakyRelu": _leaky,
    "Swish": _swish,
    "com.microsoft::QuickGelu": _quick_gelu,
    "Gelu": _gelu,
    "com.microsoft::Gelu": _gelu,
    "com.microsoft::BiasGelu": _bias_gelu,
    "com.microsoft::FastGelu": _fast_gelu,
    "Softmax": _softmax,
    "LogSoftmax": _log_softmax,
    "Clip": _clip,
    "Max": _many(torch.maximum),
    "Min": _many(torch.minimum),
    "Sum": _many(torch.add),
    "ReduceMean": _reduce(lambda x, over, keep: x.mean(over, keepdim=keep)),
    "ReduceSum": _reduce(lambda x, over, keep: x.sum(over, keepdim=keep).to(x.dtype)),
    "ReduceMax": _reduce(lambda x, over, keep: x.amax(over, keepdim=keep)),
    "ReduceMin": _reduce(lambda x, over, keep: x.amin(over, keepdim=keep)),
    "ReduceL2": _reduce(lambda x, over, keep: x.square().sum(over, keepdim=keep).sqrt()),
    "ReduceSumSquare": _reduce(lambda x, over, keep: x.square().sum(over, keepdim=keep)),
    "Equal": _binary(torch.eq),
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "And": _binary(torch.logical_and),
    "Or": _binary(torch.logical_or),
    "Xor": _binary(torch.logical_xor),
    "Not": _unary(torch.logical_not),
    "IsNaN": _unary(torch.isnan),
    "IsInf": _unary(torch.isinf),
    "Where": lambda op, condition, a, b: torch.where(condition, a, b),
    "Cast": _cast,
    "CastLike": lambda op, x, like: x.to(like.dtype),
    "Identity": lambda op, x: x,
    "Dropout": _dropout,
}
