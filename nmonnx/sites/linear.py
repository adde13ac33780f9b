"""What a reader of one operator says of a node: it is a `Linear`, or it is `Left` alone with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from nmonnx.onnx_file.tensors import type_name
from nmonnx.sites.constant import Constant, NotConstant
from nmonnx.sites.scope import Scope
from nmonnx.sites.site import FusableCodes, FusableWeight
from nmonnx.sites.trace import Tracer


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer with a constant weight.

    weight      its stored weight, as traced
    read        its values as float32 [K, N] or [E, K, N]
    port        input of the node that holds the activation
    elem        type of the activation
    codes       the activation arrives as integer codes: prune before the quantiser
    role        when the operator itself tells it
    inner       linear layers inside the node whose input cannot be reached
    """

    k: int
    n: int
    elem: int
    weight: Constant
    read: Callable[[], np.ndarray]
    port: int = 0
    fusable: FusableWeight | None = None
    quantised: FusableCodes | None = None
    not_fusable: str = ""
    codes: bool = False
    role: str = ""
    inner: tuple[Left, ...] = ()


@dataclass(frozen=True)
class Left:
    """A product left alone. `linear`: it has a constant weight, so it counts among the linear layers."""

    reason: str
    linear: bool = True
    k: int = 0
    n: int = 0
    role: str = ""
    initializer: str = ""


@dataclass(frozen=True, eq=False)
class Product:
    """A node that a reader knows, with what it made of it and what the names around it tell."""

    name: str
    scope: Scope
    node: gs.Node
    reading: Linear | Left
    texts: tuple[str, ...]
    role: str | None
    block: int | None


Reading = Linear | Left | None
Reader = Callable[[Tracer, Scope, gs.Node], Reading]


def float32(constant: Constant) -> np.ndarray:
    """The values as float32, in the constant's shape."""
    return np.asarray(constant.read()).astype(np.float32, copy=False)


def no_weight(reason: NotConstant) -> Left:
    """A product whose weight is not constant; only one made of constants alone counts as a linear layer."""
    return Left(reason.reason, linear=reason.fixed)


def fuse(
    weight: Constant, transposed: bool, elem: int, bias: gs.Tensor | None = None
) -> tuple[FusableWeight | None, str]:
    """How NMMatMul may use a 2-D weight (stored [N, K] when `transposed`), or the reason why not."""
    stored = weight.stored
    if stored is None:
        return None, weight.indirect
    if (elem, stored.elem) not in _OVERLOADS:
        return None, f"NMMatMul has no kernel for {type_name(elem)} with a {type_name(stored.elem)} weight"
    swapped = stored.transposed != transposed
    if swapped and stored.proto is None:
        return None, "its weight is stored transposed and comes through a function's input"
    return FusableWeight(stored.tensor, stored.elem, swapped, stored.proto, bias), ""


_OVERLOADS = {
    (TensorProto.FLOAT, TensorProto.FLOAT),
    (TensorProto.FLOAT, TensorProto.FLOAT16),
    (TensorProto.FLOAT16, TensorProto.FLOAT16),
}
