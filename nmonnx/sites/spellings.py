"""How a linear layer with a floating-point weight may be written, one reader an operator.

A new spelling is a reader (tracer, scope, node) -> Linear, Left or None, and a line in `SPELLINGS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from nmonnx.sites.codes import dequantised
from nmonnx.sites.constant import Constant, NotConstant
from nmonnx.sites.einsum import read_einsum
from nmonnx.sites.linear import Left, Linear, Reader, Reading, float32, fuse, no_weight
from nmonnx.sites.scope import Scope, input_of
from nmonnx.sites.trace import Tracer

MICROSOFT = "com.microsoft"
IN_ATTENTION = "its weight is inside an attention node, whose input alone can be pruned"


def _matmul(tracer: Tracer, scope: Scope, node: gs.Node) -> Reading:
    left, weight = (tracer.trace(scope, input_of(node, i)) for i in (0, 1))
    if isinstance(left, Constant):
        return _on_the_left(left, weight)
    if isinstance(weight, NotConstant):
        return no_weight(weight)
    if not weight.shape:
        return Left("its weight is a scalar", linear=False)
    return _product(weight, transposed=bool(node.attrs.get("transB", 0)), obstacle=_matmul_obstacle(node))


def _fused_matmul(tracer: Tracer, scope: Scope, node: gs.Node) -> Reading:
    reading = _matmul(tracer, scope, node)
    if not isinstance(reading, Linear):
        return reading
    if node.attrs.get("transA", 0) or node.attrs.get("transBatchA", 0):
        which = "transA" if node.attrs.get("transA", 0) else "transBatchA"
        return Left(f"{which}=1: the channels are not the last axis of the activation", k=reading.k, n=reading.n)
    if node.attrs.get("transBatchB", 0):
        return Left("transBatchB=1: the weight's batch axes are moved", k=reading.k, n=reading.n)
    return reading


def _gemm(tracer: Tracer, scope: Scope, node: gs.Node) -> Reading:
    left, weight = (tracer.trace(scope, input_of(node, i)) for i in (0, 1))
    if isinstance(left, Constant):
        return _on_the_left(left, weight, transposed=bool(node.attrs.get("transA", 0)))
    if isinstance(weight, NotConstant):
        return no_weight(weight)
    if len(weight.shape) != 2:
        return Left(f"the weight of a Gemm has {len(weight.shape)} axes", linear=False)
    reading = _product(weight, bool(node.attrs.get("transB", 0)), _gemm_obstacle(tracer, scope, node, weight))
    if node.attrs.get("transA", 0):
        return Left("transA=1: the channels are the first axis of the activation", k=reading.k, n=reading.n)
    return _with_bias(node, reading)


def _gemm_fast_gelu(tracer: Tracer, scope: Scope, node: gs.Node) -> Reading:
    weight = tracer.trace(scope, input_of(node, 1))
    if isinstance(weight, NotConstant):
        return no_weight(weight)
    if len(weight.shape) != 2:
        return Left(f"its weight has {len(weight.shape)} axes, not 2", linear=False)
    return _product(weight, False, "the node applies an activation function too")


def _attention(tracer: Tracer, scope: Scope, node: gs.Node) -> Reading:
    weight = tracer.trace(scope, input_of(node, 1))
    if isinstance(weight, NotConstant):
        return no_weight(weight)
    if len(weight.shape) != 2:
        return Left(f"its weight has {len(weight.shape)} axes, not 2", linear=False)
    reading = _product(weight, False, IN_ATTENTION)
    return replace(reading, role="qkv")


def _moe(tracer: Tracer, scope: Scope, node: gs.Node) -> Reading:
    up, down = (tracer.trace(scope, input_of(node, i)) for i in (2, 4))
    if isinstance(up, NotConstant):
        return no_weight(up)
    if isinstance(down, NotConstant):
        return no_weight(down)
    if len(up.shape) != 3 or len(down.shape) != 3:
        return Left("its expert weights do not have three axes")
    by_column = up.shape[2] == down.shape[1]  # [E, N, K]; ORT before 1.23 stored [E, K, N]
    n, k = (up.shape[1], up.shape[2]) if by_column else (up.shape[2], up.shape[1])
    inner = (down.shape[2], down.shape[1]) if by_column else (down.shape[1], down.shape[2])
    return Linear(
        k,
        n,
        up.elem,
        up,
        lambda: float32(up).transpose(0, 2, 1) if by_column else float32(up),
        not_fusable="its experts are inside one node, whose input alone can be pruned",
        role="experts",
        inner=(unreachable_down(node, *inner, down.name),),
    )


def unreachable_down(node: gs.Node, k: int, n: int, initializer: str) -> Left:
    """The second linear layer of fused experts: its input never leaves the node."""
    reason = f"it is inside {node.op}: the input of the experts' down projection cannot be reached"
    return Left(reason, k=k, n=n, role="down", initializer=initializer)


def _conv(tracer: Tracer, scope: Scope, node: gs.Node) -> Reading:
    weight = tracer.trace(scope, input_of(node, 1))
    if (
        isinstance(weight, NotConstant)
        or len(weight.shape) < 3
        or set(weight.shape[2:]) - {1}
        or node.attrs.get("group", 1) != 1
    ):
        return None
    n, k = weight.shape[:2]
    return Left("a 1x1 convolution: its channels are axis 1 of the activation", k=k, n=n, initializer=weight.name)


def _product(weight: Constant, transposed: bool, obstacle: str) -> Linear:
    """x @ W, where W may be stored with its last two axes swapped; `obstacle` is why NMMatMul cannot stand in."""
    rank = len(weight.shape)
    shape = weight.shape if rank > 1 else (*weight.shape, 1)
    swap = transposed and rank > 1
    k, n = reversed(shape[-2:]) if swap else shape[-2:]

    def read() -> np.ndarray:
        values = float32(weight).reshape(shape)
        values = values.swapaxes(-1, -2) if swap else values
        return values.reshape(k, n) if math.prod(shape[:-2]) == 1 else values.reshape(-1, k, n)

    linear = Linear(k, n, weight.elem, weight, read, not_fusable=obstacle or f"its weight has {rank} axes, not 2")
    if obstacle or rank != 2:
        return linear
    if weight.dequantised:
        quantised, reason = dequantised(weight.dequantised, transposed)
        return replace(linear, quantised=quantised, not_fusable=reason)
    fusable, reason = fuse(weight, transposed, weight.elem)
    return replace(linear, fusable=fusable, not_fusable=reason)


def _matmul_obstacle(node: gs.Node) -> str:
    if node.attrs.get("alpha", 1.0) != 1.0:
        return f"alpha is {node.attrs['alpha']:g}, not 1"
    return "the node applies an activation function too" if node.attrs.get("activation") else ""


def _gemm_obstacle(tracer: Tracer, scope: Scope, node: gs.Node, weight: Constant) -> str:
    bias, beta = input_of(node, 2), node.attrs.get("beta", 1.0)
    if bias is None or beta == 0:
        return _matmul_obstacle(node)
    if beta != 1.0:
        return _matmul_obstacle(node) or f"beta is {beta:g}, not 1"
    constant = tracer.trace(scope, bias)
    if isinstance(constant, NotConstant):
        return "its C is not constant, so it may not be a vector"
    n = weight.shape[0] if node.attrs.get("transB", 0) else weight.shape[1]
    if constant.shape not in ((n,), (1, n)):
        return f"its C has shape {list(constant.shape)}, not [{n}]"
    return _matmul_obstacle(node)


def _with_bias(node: gs.Node, reading: Linear) -> Linear:
    bias = input_of(node, 2) if node.attrs.get("beta", 1.0) else None
    if bias is None:
        return reading
    fusable, quantised = reading.fusable, reading.quantised
    return replace(
        reading,
        fusable=replace(fusable, bias=bias) if fusable else None,
        quantised=replace(quantised, bias=bias) if quantised else None,
    )


def _on_the_left(left: Constant, right: Constant | NotConstant, transposed: bool = False) -> Left:
    if isinstance(right, Constant):
        return Left("both operands are constant", linear=False)
    *rows, k = left.shape or (1,)
    n = rows[-1] if rows else 1
    k, n = (n, k) if transposed else (k, n)
    if k == 1:
        return Left("an outer product: one channel", linear=False, k=k, n=n)
    reason = "the weight is on the left: the channels are the last axis but one of the activation"
    return Left(reason, k=k, n=n, initializer=left.name)


SPELLINGS: Mapping[tuple[str, str], Reader] = {
    ("", "MatMul"): _matmul,
    ("", "Gemm"): _gemm,
    ("", "Einsum"): read_einsum,
    ("", "Conv"): _conv,
    (MICROSOFT, "FusedMatMul"): _fused_matmul,
    (MICROSOFT, "FusedMatMulActivation"): _fused_matmul,
    (MICROSOFT, "TransposeMatMul"): _fused_matmul,
    (MICROSOFT, "FusedGemm"): _gemm,
    (MICROSOFT, "GemmFastGelu"): _gemm_fast_gelu,
    (MICROSOFT, "Attention"): _attention,
    (MICROSOFT, "PackedAttention"): _attention,
    (MICROSOFT, "MoE"): _moe,
}
