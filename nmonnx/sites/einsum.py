"""`Einsum` as a linear layer: one constant operand, one contracted axis, the last one of the activation."""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from nmonnx.sites.constant import Constant
from nmonnx.sites.linear import Left, Linear, Reading, float32
from nmonnx.sites.scope import Scope, input_of
from nmonnx.sites.trace import Tracer


def read_einsum(tracer: Tracer, scope: Scope, node: gs.Node) -> Reading:
    """Linear when W's letters are batch letters, the contracted one, and output letters, each once."""
    terms, output = _terms(node.attrs["equation"])
    operands = [tracer.trace(scope, input_of(node, i)) for i in range(len(node.inputs))]
    constants = [i for i, o in enumerate(operands) if isinstance(o, Constant)]
    if len(terms) != 2 or len(operands) != 2 or len(constants) != 1:
        return Left("an Einsum without exactly one constant and one activation", linear=False)
    weight = operands[constants[0]]
    assert isinstance(weight, Constant)
    letters, other = terms[constants[0]], terms[1 - constants[0]]
    contracted = [c for c in letters if c in other and c not in output]
    if not contracted:
        return Left("an Einsum that sums over no channels", linear=False)
    if len(contracted) > 1 or "." in letters or len({*letters}) < len(letters) or len(letters) != len(weight.shape):
        return Left(f"an Einsum of a kind that is not handled: {node.attrs['equation']}")
    batch = [c for c in letters if c in other and c in output]
    free = [c for c in letters if c not in other]
    size = dict(zip(letters, weight.shape, strict=True))
    k, n = size[contracted[0]], math.prod(size[c] for c in free)
    if other[-1:] != contracted[0] or other.count(contracted[0]) != 1:
        return Left("an Einsum whose channels are not the last axis of the activation", k=k, n=n)
    if not set(free) <= set(output):
        return Left("an Einsum that sums over the weight's own axes", k=k, n=n)
    order = [letters.index(c) for c in (*batch, *contracted, *free)]
    shape = (-1, k, n) if batch else (k, n)

    def read() -> np.ndarray:
        return float32(weight).transpose(order).reshape(shape)

    reason = "an Einsum is pruned in front, not fused"
    return Linear(k, n, weight.elem, weight, read, port=1 - constants[0], not_fusable=reason)


def _terms(equation: str) -> tuple[list[str], str]:
    """Operand letters and output letters; "..." becomes one "."."""
    inputs, arrow, output = equation.replace(" ", "").replace("...", ".").partition("->")
    if not arrow:
        once = sorted(c for c in set(inputs) - {",", "."} if inputs.count(c) == 1)
        output = "." * ("." in inputs) + "".join(once)
    return inputs.split(","), output
