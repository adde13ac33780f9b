"""`find_sites`: the one walk over a model that says what its linear layers are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import onnx_graphsurgeon as gs
from onnx import TensorProto

from nmonnx.graph import DOMAIN, Model
from nmonnx.sites.linear import Left, Linear, Product, Reader
from nmonnx.sites.quantised import QUANTISED
from nmonnx.sites.roles import block_of, module_paths, role_of
from nmonnx.sites.scope import Scope, domain_of, input_of, read_scopes
from nmonnx.sites.site import Found, Site, Skipped
from nmonnx.sites.spellings import SPELLINGS
from nmonnx.sites.splice import Splice, find_splice
from nmonnx.sites.structure import infer
from nmonnx.sites.trace import Tracer, has_caller_attributes
from nmonnx.tensors import type_name

_READERS = {**SPELLINGS, **QUANTISED}
_PRUNABLE = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


def find_sites(model: Model) -> Found:
    """Every linear layer of the model with a constant weight, and every product left alone with the reason.

    Nothing is edited and no weight is read. Time is linear in the number of nodes.
    """
    scopes = read_scopes(model)
    tracer = Tracer(model, scopes)
    products = infer(list(_products(model, tracer, scopes)))
    ports = {id(p.node): p.reading for p in products if isinstance(p.reading, Linear)}
    sites: list[Site] = []
    skipped: list[Skipped] = []
    for product in products:
        splice = find_splice(tracer, product.scope, product.node, ports) if id(product.node) in ports else None
        if isinstance(product.reading, Linear) and isinstance(splice, Splice):
            sites.append(_site(product, product.reading, splice))
            skipped.extend(_skipped(product, left, "/down") for left in product.reading.inner)
        else:
            left = splice if isinstance(splice, Left) else product.reading
            assert isinstance(left, Left)
            skipped.append(_skipped(product, left))
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
    for scope in scopes:
        for node in scope.graph.nodes:
            reader = _READERS.get((domain_of(node), node.op))
            if reader is None or not node.outputs:
                continue
            reading = _read(reader, tracer, scope, node)
            if reading is not None:
                yield _product(model, scope, node, _checked(node, reading), taken)


def _read(reader: Reader, tracer: Tracer, scope: Scope, node: gs.Node) -> Linear | Left | None:
    if has_caller_attributes(node):
        return Left("its attributes are set by the caller of the function")
    try:
        return reader(tracer, scope, node)
    except KeyError as e:
        return Left(f"its attribute {e} is missing", linear=False)


def _product(model: Model, scope: Scope, node: gs.Node, reading: Linear | Left, taken: set[str]) -> Product:
    own = node.name or node.outputs[0].name
    name = _unique(f"{scope.path}/{own}" if scope.path else own, taken)
    initializer = reading.weight.name if isinstance(reading, Linear) else reading.initializer
    modules = module_paths(model.props_of(node))
    texts = tuple(dict.fromkeys(filter(None, (name, node.name, *modules, initializer))))
    names = (node.name, initializer, *modules, node.outputs[0].name)
    role = reading.role or role_of(names)
    return Product(name, scope, node, reading, texts, role, block_of((*names, scope.path)))


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
        fusable=linear.fusable if splice.direct else None,
        not_fusable=linear.not_fusable if splice.direct else linear.not_fusable or "its activation is quantised",
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
