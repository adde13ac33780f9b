"""The nouns: a `Site` is a linear layer whose input can be pruned, a `Skipped` is a product that cannot, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

ROLES = (
    *("q", "k", "v", "o", "gate", "up", "down"),
    *("qkv", "gate_up", "lm_head", "router", "experts", "other"),
)


@dataclass(frozen=True, eq=False)
class FusableWeight:
    """A weight as `NMMatMul` may use it: a stored 2-D constant.

    tensor      the stored tensor: initializer, output of a Constant node, or input of a function body
    elem        FLOAT or FLOAT16, as stored
    transposed  stored as [N, K]: to be repacked to [K, N]
    proto       the stored tensor's values; None for the input of a function body
    bias        tensor of shape [N] or [1, N] to add, when the node adds one
    """

    tensor: gs.Tensor
    elem: int
    transposed: bool
    proto: TensorProto | None
    bias: gs.Tensor | None = None


@dataclass(frozen=True, eq=False)
class FusableCodes:
    """A weight of whole numbers as `NMMatMulNBits` may use it, read from disk when it is asked for. See `nmonnx.nbits`.

    bits, block_size, accuracy_level  attributes of the op
    stored   the tensor that holds the codes, as the model stores them
    sources  names of the stored tensors that W, scales and zeros are made of
    codes    int8 (8 bits) or uint8 of 0..15 (4 bits) [K, N]
    scales   float32 or float16 [blocks, N]
    zeros    [blocks, N], int8, uint8 or of the type of the scales; None where all are the default
    bias     tensor of shape [N] to add, when the node adds one
    output   the tensor that holds the product; None: the first output of the node
    """

    bits: int
    block_size: int
    stored: gs.Tensor
    sources: Mapping[str, str]
    codes: Callable[[], np.ndarray]
    scales: Callable[[], np.ndarray]
    zeros: Callable[[], np.ndarray | None]
    accuracy_level: int = 0
    bias: gs.Tensor | None = None
    output: gs.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Site:
    """One linear layer with a constant weight.

    name          unique in the model and stable between calls
    scope, graph  where `node` lies: path ("" for the main graph) and graph or function
    node          the linear layer itself, or the call of the function that it is; `op` is its operator or function
    splice        inputs (consumer node, input index) that shall read the pruned tensor instead of `activation`:
                  the node's own, or the quantiser's in front of it; `splice_graph` holds those consumers
    activation    the dense floating-point tensor to prune; its last axis has the `k` channels
    elem          TensorProto element type of `activation`
    initializer   name of the stored weight, "" when it has none
    texts         what selectors are matched against: node, site, module and initializer names
    fusable       how `NMMatMul` may use the weight; else
    quantised     how `NMMatMulNBits` may; None as well with the reason in `not_fusable`
    """

    name: str
    scope: str
    graph: gs.Graph
    node: gs.Node
    splice: tuple[tuple[gs.Node, int], ...]
    splice_graph: gs.Graph
    activation: gs.Tensor
    op: str
    k: int
    n: int
    elem: int
    role: str
    block: int | None
    initializer: str
    texts: tuple[str, ...]
    fusable: FusableWeight | None
    quantised: FusableCodes | None
    not_fusable: str
    read: Callable[[], np.ndarray] = field(repr=False)

    @property
    def output(self) -> str:
        """Name of the tensor that the linear layer makes."""
        return self.node.outputs[0].name

    @property
    def kernel(self) -> str:
        """The op that may prune and multiply in one, or that only prunes."""
        return "NMMatMul" if self.fusable else "NMMatMulNBits" if self.quantised else "NMPrune"

    @property
    def alpha(self) -> float:
        """What the layer multiplies its product with (attribute `alpha` of a Gemm)."""
        return float(self.node.attrs.get("alpha", 1.0))

    def weight(self) -> np.ndarray:
        """The weight as float32 [K, N] (dequantised; experts [E, K, N]), read from disk now.

        Raises InputError when it has no single value (a function body called with several weights) or a
        storage type that cannot be read.
        """
        return self.read()


@dataclass(frozen=True)
class Skipped:
    """A product that is not pruned. `linear`: it is a linear layer with a constant weight, so it counts.

    k, n, role and block are 0, 0, "other" and None where unknown.
    """

    name: str
    scope: str
    op: str
    reason: str
    linear: bool
    output: str
    k: int = 0
    n: int = 0
    role: str = "other"
    block: int | None = None
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """What `find_sites` saw, in the order of the graph."""

    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]

    @property
    def total(self) -> int:
        """Linear layers with a constant weight, whether they can be pruned or not."""
        return len(self.sites) + sum(s.linear for s in self.skipped)
