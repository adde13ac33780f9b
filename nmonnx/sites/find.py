"""`find_sites`: the one walk over a model that says what its linear layers are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import onnx_graphsurgeon as gs
from onnx import TensorProto

from nmonnx.onnx_file.graph import DOMAIN, Model
from nmonnx.onnx_file.tensors import type_name
from nmonnx.sites.lift import Chain, Lifter
from nmonnx.sites.linear import Left, Linear, Product, Reading
from nmonnx.sites.quantised import QUANTISED
from nmonnx.sites.roles import block_of, module_paths, role_of
from nmonnx.sites.scope import Scope, domain_of, input_of, read_scopes
from nmonnx.sites.site import Found, Site, Skipped
from nmonnx.sites.spellings import SPELLINGS
from nmonnx.sites.splice import Splice, find_splice
from nmonnx.sites.structure import infer
from nmonnx.sites.trace import Tracer, has_caller_attributes

_READERS = {**SPELLINGS, **QUANTISED}
_PRUNABLE = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


def find_sites(model: Model) -> Found:
    """Every linear layer of the model with a constant weight, and every product left alone with the reason.

    Nothing is edited and no weight is read. Time is linear in the number of nodes.
    """
    scopes = read_scopes(model)
    tracer = Tracer(model, scopes)
    products = infer(list(_products(model, tracer, scopes)))
    ports = {(id(p.node), p.reading.port): p.reading for p in products if isinstance(p.reading, Linear)}
    sites: list[Site] = []
    skipped: list[Skipped] = []
    for product in products:
        reading = product.reading
        splice = reading if isinstance(reading, Left) else find_splice(tracer, product, reading, ports)
        if isinstance(reading, Linear) and isinstance(splice, Splice):
            sites.append(_site(product, reading, splice))
            skipped.extend(_skipped(product, left, "/down") for left in reading.inner)
        else:
            assert isinstance(splice, Left)
            skipped.append(_skipped(product, splice))
    return Found(tuple(sites), tuple(skipped))


def converted_with(model: Model) -> str | None:
    """What an already converted model was pruned with ("8:16"), None for a model without nmonnx nodes."""
    patterns = {
        f"{node.attrs.get('keep', '?')}:{node.attrs.get('group', '?')}"
        for _, graph in model.scopes()
        if getattr(graph, "domain", None) != DOMAIN
        for node in graph.nodes
        if node.domain == DOMAIN
    }
    return ", ".join(sorted(patterns)) or None


def _products(model: Model, tracer: Tracer, scopes: list[Scope]) -> Iterator[Product]:
    taken: set[str] = set()
    read = partial(_read, tracer)
    lifter = Lifter(tracer, read)
    for scope in scopes:
        for node in scope.graph.nodes:
            reading = read(scope, node) if not lifter.is_lifted(scope, (node,)) else None
            layers = [] if reading is None else [((node,), _checked(node, reading))]
            layers = layers or _of_call(lifter, scope, node)
            for chain, layer in layers:
                yield _product(model, scope, chain, layer, len(layers) == 1, taken)


def _of_call(lifter: Lifter, scope: Scope, node: gs.Node) -> list[tuple[Chain, Linear | Left]]:
    """The layers of a call. Those that share an input are pruned together, or not at all."""
    layers = [(lifted, _checked(node, r)) for lifted, r in lifter.layers(scope, node) if r is not None]
    left = {lifted.port: reading for lifted, reading in layers if isinstance(reading, Left)}
    together = []
    for lifted, reading in layers:
        if isinstance(reading, Linear) and lifted.port in left:
            reason = f"its call has another layer on this input, which is left: {left[lifted.port].reason}"
            reading = Left(reason, k=reading.k, n=reading.n, initializer=reading.weight.name)
        together.append(((node, *lifted.chain), reading))
    return together


def _read(tracer: Tracer, scope: Scope, node: gs.Node) -> Reading:
    reader = _READERS.get((domain_of(node), node.op))
    if reader is None or not node.outputs:
        return None
    filled = tracer.calls.with_attributes(scope, node)
    if filled is None or has_caller_attributes(filled):
        return Left("its attributes are set by the caller of the function")
    try:
        return reader(tracer, scope, filled)
    except KeyError as e:
        return Left(f"its attribute {e} is missing", linear=False)


def _product(model: Model, scope: Scope, chain: Chain, reading: Linear | Left, alone: bool, taken: set[str]) -> Product:
    """`chain`: the node, or a call and what leads to the layer inside; `alone`: it is the node's only layer."""
    node, *inside = chain
    own = _name(node) if alone else "/".join(_name(n) for n in chain)
    name = _unique(f"{scope.path}/{own}" if scope.path else own, taken)
    initializer = reading.weight.name if isinstance(reading, Linear) else reading.initializer
    modules = module_paths(model.props_of(node))
    within = [text for n in inside for text in (_name(n), *module_paths(model.props_of(n)))]
    texts = tuple(dict.fromkeys(filter(None, (name, node.name, *modules, initializer))))
    names = (node.name, initializer, *modules, node.outputs[0].name)
    role = reading.role or role_of((*names, *reversed(within)))
    return Product(name, scope, node, reading, texts, role, block_of((*names, scope.path)))


def _name(node: gs.Node) -> str:
    return node.name or node.outputs[0].name


def _unique(name: str, taken: set[str]) -> str:
    free, count = name, 2
    while free in taken:
        free, count = f"{name}#{count}", count + 1
    taken.add(free)
    return free


def _checked(node: gs.Node, reading: Linear | Left) -> Linear | Left:
    """The reading, or the reason that holds for every spelling."""
    if isinstance(reading, Left):
        return reading
    left = Left("", k=reading.k, n=reading.n, role=reading.role, initializer=reading.weight.name)
    if not reading.k or not reading.n:
        return replace(left, reason="its weight has no elements", linear=False)
    if reading.k == 1:
        return replace(left, reason="an outer product: one channel", linear=False)
    if input_of(node, reading.port) is None:
        return replace(left, reason="it has no input", linear=False)
    if reading.weight.blocked:
        return replace(left, reason=reading.weight.blocked)
    if reading.elem == TensorProto.BFLOAT16:
        return replace(left, reason="its type is BFLOAT16, in which ONNX Runtime's CPU provider does not compute")
    if reading.elem not in _PRUNABLE:
        return replace(left, reason=f"its type is {type_name(reading.elem)}", linear=False)
    return reading


def _site(product: Product, linear: Linear, splice: Splice) -> Site:
    reachable = splice.direct or linear.codes  # codes are fused only where they stand for what is in front of them
    return Site(
        name=product.name,
        scope=product.scope.path,
        graph=product.scope.graph,
        node=product.node,
        splice=splice.inputs,
        splice_graph=splice.graph,
        activation=splice.activation,
        op=product.node.op,
        k=linear.k,
        n=linear.n,
        elem=splice.elem,
        role=product.role or "other",
        block=product.block,
        initializer=linear.weight.name,
        texts=product.texts,
        fusable=linear.fusable if reachable else None,
        quantised=linear.quantised if reachable else None,
        not_fusable=linear.not_fusable if reachable else linear.not_fusable or "its activation is quantised",
        read=linear.read,
    )


def _skipped(product: Product, left: Left, suffix: str = "") -> Skipped:
    return Skipped(
        name=product.name + suffix,
        scope=product.scope.path,
        op=product.node.op,
        reason=left.reason,
        linear=left.linear,
        output=product.node.outputs[0].name,
        k=left.k,
        n=left.n,
        role=left.role if suffix else product.role or "other",
        block=product.block,
        texts=product.texts,
    )
