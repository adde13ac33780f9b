"""Where something can be added behind a linear layer that stays a node of its own, in stock ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from nmonnx.onnx_file.graph import Model
from nmonnx.passes.surgery import Constants, Names, nodes_of_sites, note
from nmonnx.sites import Site

_PLAIN = {
    *(("", op) for op in ("MatMul", "Gemm")),
    *(("com.microsoft", op) for op in ("FusedMatMul", "FusedGemm", "TransposeMatMul", "MatMulNBits", "MatMulBnb4")),
    *(("com.microsoft", op) for op in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QGemm")),
}
"""Operators whose only output is alpha x W, with or without a bias, in floats."""

Edit = Callable[[], None]


def settle(
    model: Model,
    sites: Sequence[Site],
    asks: Callable[[gs.Node], bool],
    plan: Callable[[Site, gs.Node], Edit | str],
    drop: Callable[[gs.Node], None],
) -> tuple[int, dict[str, str]]:
    """For every op that `asks` for something to be made up for, do the edit that `plan` says for each of its sites.

    Where `plan` gives a reason instead for one of them, `drop` what the op asks for. Returns the number of edits, and
    the sites without, with the reason.
    """
    nodes = dict(nodes_of_sites(model))
    members: dict[int, tuple[gs.Node, list[Site]]] = {}
    left: dict[str, str] = {}
    done = 0
    for site in sites:
        node = nodes.get(site.name)
        if node is not None and asks(node):
            members.setdefault(id(node), (node, []))[1].append(site)
    for node, served in members.values():
        plans = {site.name: plan(site, node) for site in served}
        reasons = {name: reason for name, reason in plans.items() if isinstance(reason, str)}
        if not reasons:
            for edit in plans.values():
                assert callable(edit)
                edit()
            done += len(plans)
            continue
        name, reason = next(iter(reasons.items()))
        left |= {site.name: reasons.get(site.name, f"its prune serves {name!r} too: {reason}") for site in served}
        drop(node)
    return done, left


def end_of(site: Site) -> gs.Node | str:
    """The node whose first output is alpha x W (plus a bias) of the layer in the activation's type, or why something
    that is added there would not be exact."""
    node = site.node
    key = ("" if node.domain in (None, "", "ai.onnx") else node.domain, node.op)
    if any(consumer.op == "QuantizeLinear" for consumer, _ in site.splice):
        return "its activation is quantised with a fixed range, which does not fit once it is moved"
    if node.attrs.get("activation"):
        return f"{node.op} applies an activation function too"
    if key == ("", "MatMulInteger"):
        return _after_codes(site)
    if site.kernel == "NMPrune" and key not in _PLAIN:
        return f"nothing can be added to its product inside {node.op}"
    if node.op == "QGemm" and any(t.name for t in node.inputs[7:]):
        return "its output is quantised"
    return node


def product_with(model: Model, site: Site, rows: np.ndarray) -> np.ndarray | str:
    """alpha rows [K] W as float64 [N], with the W that the layer has now, or the reason why there is no such thing.
    Raises InputError as `Site.weight`."""
    new = model.weights.get(site.name)
    weight = new.values() if new else site.weight()
    if weight.ndim != 2:
        return f"its weight has {weight.ndim} axes, not 2"
    return site.alpha * (np.broadcast_to(rows, site.k).astype(np.float64) @ weight.astype(np.float64))


def add_behind(
    model: Model,
    names: Names,
    site: Site,
    made_by: str,
    addend: gs.Tensor,
    center: gs.Tensor | None = None,
    end: gs.Node | None = None,
) -> gs.Node:
    """Add `addend`, or center [..., 1] * addend [N], to what `end` makes, by default the layer; its readers see the sum
    under the old name. The product with a center is in float32 where the layer is in float16. Returns the last node."""
    end = end or end_of(site)  # type: ignore[assignment]
    assert isinstance(end, gs.Node)
    old = end.outputs[0]
    end.outputs[0] = gs.Variable(names.fresh_tensor(f"{old.name}/before"))

    def add(op: str, inputs: list[gs.Tensor], output: gs.Tensor | None = None, **attrs: int) -> gs.Tensor:
        made = output or gs.Variable(names.fresh_tensor(f"{site.name}/{op}"))
        node = gs.Node(op, names.fresh_node(f"{site.name}/{op}"), attrs, inputs, [made])
        site.graph.nodes.append(node)
        note(model, node, made_by, [site])
        return made

    if center is not None and _claims_sizes(old.shape, site.n):  # ONNX Runtime would believe it, even if it is stale
        model.shapeless.add(old.name)
    product = end.outputs[0]
    if center is None:
        add("Add", [product, addend], old)
    elif site.elem == TensorProto.FLOAT16:
        wide, eta = (add("Cast", [t], to=TensorProto.FLOAT) for t in (product, center))
        total = add("Add", [wide, add("Mul", [eta, addend])])
        add("Cast", [total], old, to=TensorProto.FLOAT16)
    else:
        add("Add", [product, add("Mul", [center, addend])], old)
    return old.inputs[0]


def low_rank(
    model: Model, names: Names, constants: Constants, site: Site, made_by: str, factors: tuple[np.ndarray, np.ndarray]
) -> gs.Tensor:
    """x A B of the dense activation x, by two MatMuls; `factors` are A [K, r] and B [r, N] in the type of x."""
    x = site.activation
    for side, factor in zip("ab", factors, strict=True):
        product = gs.Variable(names.fresh_tensor(f"{site.name}/low_{side}/product"))
        stored = constants.declare(site.scope, f"{site.name}/low_{side}", f"low_{side}", factor)
        node = gs.Node("MatMul", names.fresh_node(f"{site.name}/low_{side}"), {}, [x, stored], [product])
        site.graph.nodes.append(node)
        note(model, node, made_by, [site])
        x = product
    return x


def _claims_sizes(shape: Sequence[int | str] | None, n: int) -> bool:
    return shape is not None and (not shape or shape[-1] != n or any(isinstance(size, int) for size in shape[:-1]))


def _after_codes(site: Site) -> gs.Node | str:
    """The Mul that makes floats of a MatMulInteger: -> Cast -> Mul."""
    node = site.node
    for op in ("Cast", "Mul"):
        readers = node.outputs[0].outputs
        if len(readers) != 1 or readers[0].op != op or any(t is node.outputs[0] for t in site.graph.outputs):
            return "its integer product has other readers than the Cast and the Mul that make floats of it"
        node = readers[0]
    return node
