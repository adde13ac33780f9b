"""Where the decoder blocks of a graph begin and end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nmonnx.learn.torch_graph import TorchGraph
from nmonnx.sites import Found, Site


@dataclass(frozen=True)
class Block:
    """number   of the block; None for what follows the last one (lm_head)
    sites    chosen layers in it
    inputs   tensors that earlier blocks give it; none for the first block
    outputs  tensors that it and earlier blocks give the next one
    targets  those of `outputs` that a loss compares: without the inputs of the next block's layers, which follow from
             the others, where others are left
    """

    number: int | None
    sites: tuple[Site, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    targets: tuple[str, ...]


def find_blocks(graph: TorchGraph, found: Found, chosen: Sequence[Site], logits: str) -> list[Block]:
    """The blocks of the graph in order. A tensor's depth is the last block that it depends on, counted from 1; a block
    reads the tensors that are not as deep as itself and that something as deep reads."""
    numbers = [*sorted({s.block for s in found.sites if s.block is not None}), None]
    depth = _depths(graph, found, numbers)
    blocks = []
    for at, number in enumerate(numbers):
        sites = tuple(s for s in chosen if s.block == number)
        if number is None and not sites:
            continue
        outputs = _cut(graph, depth, at + 1) or (logits,)
        read_by_layers = {s.activation.name for s in found.sites}
        targets = tuple(name for name in outputs if name not in read_by_layers) or outputs
        blocks.append(Block(number, sites, _cut(graph, depth, at) if at else (), outputs, targets))
    return blocks


def _depths(graph: TorchGraph, found: Found, numbers: Sequence[int | None]) -> dict[str, int]:
    made = {s.output: numbers.index(s.block) + 1 for s in found.sites if not s.scope}
    depth: dict[str, int] = {}
    for op in graph.ops:
        reached = max((depth.get(name, 0) for name in op.inputs if name), default=0)
        reached = max([reached, *(made.get(name, 0) for name in op.outputs)])
        depth.update(dict.fromkeys((name for name in op.outputs if name), reached))
    return depth


def _cut(graph: TorchGraph, depth: dict[str, int], below: int) -> tuple[str, ...]:
    """Tensors of depth 1 to `below` that something deeper reads, in the order of the graph."""
    read: dict[str, None] = {}
    for op in graph.ops:
        if max((depth[name] for name in op.outputs if name), default=0) > below:
            read.update({name: None for name in op.inputs if 1 <= depth.get(name, 0) <= below})
    return tuple(read)
