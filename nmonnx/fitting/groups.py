"""The activations that a fit looks at, in groups whose sums fit into memory together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nmonnx.errors import UsageError
from nmonnx.fitting.closed_form import MATRICES
from nmonnx.fitting.moments import KEPT, Moments
from nmonnx.onnx_file.graph import Model
from nmonnx.pruning.treatment import Plan
from nmonnx.sites import Site

INSIDE = "inside a subgraph or function, whose tensors cannot be seen from outside"


@dataclass(frozen=True)
class Activation:
    """A tensor of the main graph, `name`, of `k` channels, and the layers that read it, pruned in `prunes` ways."""

    name: str
    k: int
    sites: tuple[Site, ...]
    prunes: int

    def matrices(self, names: Sequence[str]) -> bool:
        return bool(set(MATRICES) & set(names))

    def bytes(self, names: Sequence[str]) -> int:
        """Memory that its sums and kept rows take."""
        matrices = self.matrices(names)
        return self.prunes * Moments.bytes(self.k, matrices) + 4 * self.k * KEPT


def activations(model: Model, sites: Sequence[Site], planned: Plan) -> tuple[list[Activation], dict[str, str]]:
    """In the order of the graph; and the layers that cannot be seen, with the reason. Raises UsageError when all are
    such."""
    graph = model.proto.graph
    visible = {i.name for i in graph.input} | {name for node in graph.node for name in node.output}
    by_name: dict[str, list[Site]] = {}
    unseen = {}
    for site in sites:
        if site.scope.startswith("function:") or site.activation.name not in visible:
            unseen[site.name] = INSIDE
        else:
            by_name.setdefault(site.activation.name, []).append(site)
    if not by_name:
        raise UsageError(f"{model.path}: no layer can be fitted: all are {INSIDE}; inline the functions first")
    made = [
        Activation(name, group[0].k, tuple(group), len({id(planned.treatments[s.name]) for s in group}))
        for name, group in by_name.items()
    ]
    return made, unseen


def in_groups(taps: Sequence[Activation], memory: int, names: Sequence[str]) -> list[list[Activation]]:
    """Groups of at most `memory` bytes, or of one activation that needs more."""
    groups: list[list[Activation]] = []
    left = 0
    for a in taps:
        need = a.bytes(names)
        if not groups or need > left:
            groups.append([])
            left = memory
        groups[-1].append(a)
        left -= need
    return groups
