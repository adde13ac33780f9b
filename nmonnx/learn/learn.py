"""`learn`: train what makes up for the pruning, and keep what helps on text that it was not trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from nmonnx.learn.by_layers import learn_by_layers
from nmonnx.learn.end_to_end import learn_end_to_end
from nmonnx.learn.model import Task, coarse_products
from nmonnx.learn.pruned import Pruned
from nmonnx.learn.settings import LEARNED, Settings, learned_parts, pruned
from nmonnx.learn.torch_graph import TorchGraph
from nmonnx.learn.training import Text, read_windows
from nmonnx.onnx_file.graph import load
from nmonnx.onnx_file.identity import model_sha256
from nmonnx.progress import Step
from nmonnx.pruning.recipe import Recipe
from nmonnx.pruning.treatment import Plan
from nmonnx.records.corrections import Correction, Corrections
from nmonnx.sites import find_sites


def learn(
    model_path: str | Path,
    recipe: Recipe,
    plan: Plan,
    tokens: np.ndarray,
    settings: Settings | None = None,
    learned: Sequence[str] | None = None,
    start: Mapping[str, Correction] | None = None,
    checkpoint: str | Path | None = None,
    progress: Step | None = None,
) -> Corrections:
    """Corrections of every layer in `plan` for the original model at `model_path`, from the text `tokens` [T].

    1. `learned` names what is trained (keys of `LEARNED`); by default those among the recipe's mitigations.
    2. The end of the text is held out: a correction that does not lower the loss there is refused, with the figures.
    3. `checkpoint`, a file that the caller removes, lets a run that was cut short go on where it was.
    4. The same text, settings and seed give the same corrections, up to the order in which threads add numbers.
    5. `start` gives corrections to go on from.

    `progress` is told (done, all) in blocks or windows. Raises UsageError for layers or operators that torch cannot
    run and when nothing is to be learned, InputError for a model or a text that cannot be used.
    """
    settings = settings or Settings()
    names = tuple(learned if learned is not None else (m for m in recipe.mitigations if m in LEARNED))
    parts = learned_parts(names)
    torch.manual_seed(settings.seed)
    model = load(model_path)
    found = find_sites(model)
    graph = TorchGraph(model)
    chosen = [s for s in found.sites if s.name in plan.treatments]
    for site in chosen:
        graph.op_of(site)
    text = read_windows(model_path, tokens, settings)
    products: dict[str, Pruned] = {}
    for salt, site in enumerate(chosen):
        given = (start or {}).get(site.name)
        products[site.name] = pruned(plan.treatments[site.name], site.weight(), parts, settings, salt, given)
    source = model_sha256(Path(model_path))
    key = _key([source, model.data_stamps(), recipe.to_json(), asdict(settings), sorted(names)], text)
    coarse = coarse_products(graph, found.sites) if settings.half else {}
    task = Task(graph, found, chosen, products, text, settings, Path(checkpoint) if checkpoint else None, key, coarse)
    run = learn_by_layers if settings.regime == "by-layers" else learn_end_to_end
    kept, refused = run(task, progress or (lambda done, total: None))
    protocol = (
        f"{', '.join(names)} learned {settings.regime}, {len(text.train)} windows of {text.train.shape[1]} tokens,"
        f" {settings.epochs} epochs, AdamW {settings.rate:g}, judged on {len(text.held)} windows held out"
    )
    return Corrections(kept, source, recipe.to_json(), protocol, refused)


def _key(parts: list[object], text: Text) -> str:
    digest = hashlib.sha256(json.dumps(parts).encode())
    digest.update(text.train.tobytes())
    digest.update(text.held.tobytes())
    return digest.hexdigest()
