"""Look up tensors of a model as its nodes see them, and walk from a linear layer back to its activation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

from nmonnx.diff.compare import label
from nmonnx.diff.functions import function_key, function_paths
from nmonnx.onnx_file.graph import DOMAIN
from nmonnx.passes.bodies import FUSED, INPUTS

Key = tuple[str, str]
"""A tensor: (path of the scope that defines it, name)."""

_ASIDE = {
    ("", "Gemm"): (2,),
    ("com.microsoft", "FusedGemm"): (2,),
    **{(DOMAIN, op): (INPUTS[op].index("bias"), INPUTS[op].index("dense")) for op in FUSED},
    (DOMAIN, "NMPrune"): (INPUTS["NMPrune"].index("dense"),),
}
"""Inputs that are no path on which an activation is to be pruned: what a product adds as it is, which tokens stay
dense."""


@dataclass
class Scope:
    """A graph, subgraph or function body: what each of its nodes makes, its initializers, and its parent."""

    path: str
    parent: Scope | None
    nodes: list[NodeProto]
    makers: dict[str, NodeProto]
    initializers: dict[str, TensorProto]
    inputs: set[str]
    outputs: set[str]

    def defines(self, name: str) -> bool:
        return name in self.makers or name in self.initializers or name in self.inputs


@dataclass
class Trail:
    """What lies between an activation and the tensor that a layer makes of it.

    ops     for each path from the activation: how many nmonnx ops it passes
    nodes   (scope path, label) of the nodes on those paths, with the node
    leaves  tensors that the layer reads beside the activation: weights, scales, and what it adds
    """

    ops: frozenset[int]
    nodes: dict[Key, NodeProto] = field(default_factory=dict)
    leaves: set[Key] = field(default_factory=set)

    @property
    def own(self) -> dict[Key, NodeProto]:
        """The nmonnx ops among the nodes."""
        return {key: node for key, node in self.nodes.items() if node.domain == DOMAIN}


class Scopes:
    """Every scope of a model by its path, as `Model.scopes` names them; nmonnx's own function bodies are left out."""

    def __init__(self, proto: ModelProto) -> None:
        self.by_path: dict[str, Scope] = {}
        self._add("", proto.graph, None)
        paths = function_paths(proto.functions)
        for function in proto.functions:
            if function.domain != DOMAIN:
                self._add(paths[function_key(function)], function, None)

    def __iter__(self) -> Iterator[Scope]:
        return iter(self.by_path.values())

    def find(self, path: str, name: str) -> Key | None:
        """The tensor that `name` means in the scope at `path`; None when nothing defines it."""
        scope = self.by_path.get(path)
        while scope is not None and not scope.defines(name):
            scope = scope.parent
        return (scope.path, name) if scope is not None else None

    def maker(self, key: Key) -> NodeProto | None:
        return self.by_path[key[0]].makers.get(key[1])

    def initializer(self, key: Key) -> TensorProto | None:
        return self.by_path[key[0]].initializers.get(key[1])

    def trail(self, output: Key, activation: Key, others: frozenset[Key] = frozenset()) -> Trail:
        """Walk back from `output` until `activation`, initializers, graph inputs, and the outputs of `others`, layers
        that are told on their own. What a product adds is a leaf."""
        counts: dict[Key, frozenset[int]] = {}
        trail = Trail(frozenset())
        stack, entered = [output], set()
        while stack:
            key = stack[-1]
            node = None if key == activation or (key in others and key != output) else self.maker(key)
            multiplied, added = self._sources(key[0], node) if node else ([], [])
            sources = [*multiplied, *added]
            if key not in entered:  # whoever is entered but not counted lies on a cycle
                entered.add(key)
                stack += [k for k in multiplied if k not in entered]
                continue
            stack.pop()
            if key in counts:
                continue
            step = 1 if node is not None and node.domain == DOMAIN else 0
            counts[key] = frozenset(count + step for k in multiplied for count in counts.get(k, ()))
            trail.leaves.update(added)
            if key == activation:
                counts[key] = frozenset({0})
            elif node is None or not sources:
                trail.leaves.add(key)
            elif counts[key]:
                trail.nodes[key[0], label(node)] = node
        trail.ops = counts[output]
        return trail

    def _sources(self, path: str, node: NodeProto) -> tuple[list[Key], list[Key]]:
        """The tensors that a node computes with, and those that it only adds."""
        multiplied = factors(node)
        found = [(slot, self.find(path, name)) for slot, name in enumerate(node.input) if name]
        return (
            [key for slot, key in found if key and slot in multiplied],
            [key for slot, key in found if key and slot not in multiplied],
        )

    def readers(self) -> dict[Key, list[tuple[Scope, NodeProto]]]:
        """Every tensor with the nodes that read it, those in inner scopes too."""
        readers: dict[Key, list[tuple[Scope, NodeProto]]] = {}
        for scope in self:
            for node in scope.nodes:
                for name in filter(None, node.input):
                    key = self.find(scope.path, name)
                    if key:
                        readers.setdefault(key, []).append((scope, node))
        return readers

    def _add(self, path: str, graph: GraphProto | FunctionProto, parent: Scope | None) -> None:
        is_function = isinstance(graph, FunctionProto)
        names = list(graph.input) if is_function else [i.name for i in graph.input]
        outputs = list(graph.output) if is_function else [o.name for o in graph.output]
        stored = () if is_function else (*graph.initializer, *(s.values for s in graph.sparse_initializer))
        scope = Scope(
            path=path,
            parent=parent,
            nodes=list(graph.node),
            makers={output: node for node in graph.node for output in node.output if output},
            initializers={t.name: t for t in stored},
            inputs=set(names),
            outputs=set(outputs),
        )
        self.by_path[path] = scope
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    self._add(f"{path}/{label(node)}.{attribute.name}".lstrip("/"), attribute.g, scope)


def factors(node: NodeProto) -> dict[int, str]:
    """Inputs of a node by position, but for those that it only adds or that say which tokens stay dense."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    aside = _ASIDE.get((domain, node.op_type), ())
    return {slot: name for slot, name in enumerate(node.input) if name and slot not in aside}
