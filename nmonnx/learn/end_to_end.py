"""Learn all layers at once: the predictions are to be those of the dense model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nmonnx.learn.model import Feeds, Task, verdict
from nmonnx.learn.training import train
from nmonnx.progress import Step
from nmonnx.records.corrections import Correction

_SAVE_EVERY = 32
"""Windows between two checkpoints."""


def learn_end_to_end(task: Task, progress: Step) -> tuple[dict[str, Correction], dict[str, str]]:
    """(corrections, refused): all of them or none. The checkpoint holds the parameters and the optimiser."""
    windows = [task.text.feeds(row) for row in task.text.train]
    held = [task.text.feeds(row) for row in task.text.held]
    total = len(windows) * task.settings.epochs
    start = task.start_of(task.chosen)
    state = task.load()
    before = state["before"] if state else _mean(task, held)

    def after(done: int, optimiser: torch.optim.Optimizer) -> None:
        if done % _SAVE_EVERY == 0 and done % task.settings.accumulate == 0:
            values = task.start_of(task.chosen)
            task.save({"done": done, "before": before, "values": values, "optimiser": optimiser.state_dict()})
        progress(done, total)

    def begin(optimiser: torch.optim.Optimizer) -> int:
        if not state:
            return 0
        task.restore(state["values"])
        optimiser.load_state_dict(state["optimiser"])
        return state["done"]

    parameters = [p for s in task.chosen for p in task.products[s.name].parameters()]
    train(parameters, lambda window: _loss(task, windows[window]), len(windows), task.settings, after, begin)
    reason = verdict(before, _mean(task, held), "KL to the dense model")
    if reason is not None:
        task.restore(start)
        return {}, {s.name: reason for s in task.chosen}
    return {s.name: task.products[s.name].correction() for s in task.chosen}, {}


def _loss(task: Task, given: Feeds) -> Tensor:
    """KL of the sparse model's predictions to the dense model's, nats per token."""
    name = task.text.logits
    with torch.no_grad():
        dense = functional.log_softmax(task.run(given, [name])[name], -1)
    sparse = functional.log_softmax(task.run(given, [name], task.chosen)[name], -1)
    return functional.kl_div(sparse, dense, log_target=True, reduction="sum") / dense[..., 0].numel()


@torch.no_grad()
def _mean(task: Task, held: list[dict[str, Tensor]]) -> float:
    return sum(float(_loss(task, given)) for given in held) / len(held)
