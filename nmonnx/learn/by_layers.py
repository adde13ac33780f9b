"""Learn block after block: each is to give what the dense block makes of the same, sparsely computed, input."""

from __future__ import annotations

import torch
from torch import Tensor

from nmonnx.learn.blocks import Block, find_blocks
from nmonnx.learn.model import Task, verdict
from nmonnx.learn.training import train
from nmonnx.progress import Step
from nmonnx.records.corrections import Correction

Stream = list[dict[str, Tensor]]
"""What the blocks so far give, for each window."""


def learn_by_layers(task: Task, progress: Step) -> tuple[dict[str, Correction], dict[str, str]]:
    """(corrections, refused). The checkpoint holds the blocks that are done."""
    blocks = find_blocks(task.graph, task.found, task.chosen, task.text.logits)
    state = task.load()
    done: dict[str, dict] = dict(state.get("done", {}))
    refused: dict[str, str] = dict(state.get("refused", {}))
    training: Stream = [task.text.feeds(row) for row in task.text.train]
    held: Stream = [task.text.feeds(row) for row in task.text.held]
    sources = [name for name in training[0]]
    for at, block in enumerate(blocks):
        progress(at, len(blocks))
        if block.sites and block.sites[0].name not in done:
            _learn(task, block, training, held, refused)
            done.update(task.start_of(block.sites))
            task.save({"done": done, "refused": refused})
        else:
            task.restore({s.name: done[s.name] for s in block.sites})
        if at + 1 < len(blocks):
            training, held = (_onward(task, block, stream, sources) for stream in (training, held))
    progress(len(blocks), len(blocks))
    return {s.name: task.products[s.name].correction() for s in task.chosen if s.name not in refused}, refused


def _learn(task: Task, block: Block, training: Stream, held: Stream, refused: dict[str, str]) -> None:
    before, start = _mean(task, block, held), task.start_of(block.sites)
    parameters = [p for s in block.sites for p in task.products[s.name].parameters()]
    train(parameters, lambda window: _loss(task, block, training[window]), len(training), task.settings)
    reason = verdict(before, _mean(task, block, held), "mean squared error of the block's output")
    if reason is not None:
        task.restore(start)
        refused.update({s.name: reason for s in block.sites})


def _loss(task: Task, block: Block, given: dict[str, Tensor]) -> Tensor:
    """Mean squared error over the tokens but the first, on which attention rests and whose numbers are huge."""
    with torch.no_grad():
        dense = task.run(given, block.targets)
    sparse = task.run(given, block.targets, block.sites)
    errors = []
    for name in block.targets:
        width = dense[name].shape[-1]
        errors.append((sparse[name] - dense[name]).reshape(-1, width)[1:].square().mean())
    return torch.stack(errors).mean()


@torch.no_grad()
def _mean(task: Task, block: Block, stream: Stream) -> float:
    return sum(float(_loss(task, block, given)) for given in stream) / len(stream)


@torch.no_grad()
def _onward(task: Task, block: Block, stream: Stream, sources: list[str]) -> Stream:
    onward = []
    for given in stream:
        made = task.run(given, block.outputs, block.sites)
        onward.append({name: given[name] for name in sources} | made)
    return onward
