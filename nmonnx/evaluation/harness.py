"""Tasks of lm-evaluation-harness on an ONNX decoder, and how much accuracy a sparse model loses on them."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmonnx.errors import InputError, NmonnxError, RunError, UsageError
from nmonnx.evaluation.intervals import relative_drop, relative_drop_unpaired
from nmonnx.inference.text import read_text
from nmonnx.yaml_file import read_yaml

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from nmonnx.inference.decoder import Decoder

INSTALL = "pip install 'nmonnx[eval]' (or pip install 'lm-eval>=0.4.5')"


@dataclass(frozen=True)
class TaskScore:
    """task     its name
    metric   the first metric that the task lists; higher is better
    value    its mean over the items
    error    standard error that the harness gives, None where it gives none
    items    the metric of each item, in the order of the data set; empty where the harness gives none
    version  what the task states of itself
    """

    task: str
    metric: str
    value: float
    error: float | None
    items: tuple[float, ...]
    version: str


@dataclass(frozen=True)
class Drop:
    """Average over tasks of the relative drop (base - value) / base, as a share.

    mean    below 0 the model is better than the base
    error   its standard error, the tasks being independent; None where one of theirs is unknown
    paired  whether every task's error is from items paired between the models; else some are propagated from the
            standard errors of two accuracies as if they were independent, which is wider
    tasks   tasks averaged
    left    tasks left out, because the base has none right
    """

    mean: float
    error: float | None
    paired: bool
    tasks: int
    left: tuple[str, ...] = ()


def check_harness() -> None:
    """Raises UsageError with the command that mends it when lm-evaluation-harness is not installed."""
    if find_spec("lm_eval") is None:
        raise UsageError(f"tasks need lm-evaluation-harness; install it with {INSTALL}")


def read_task(task: str | Path) -> str | dict[str, Any]:
    """What the harness takes for a task: the content of a YAML file, with the data files found beside it, or the name
    of a task of its own (which may need the network). A file that includes others or calls Python goes to the harness
    as it is. Raises InputError when the file is missing or no task."""
    path = Path(task)
    if path.suffix not in (".yaml", ".yml"):
        return str(task)
    if "!function" in read_text(path):
        return str(path)
    content = read_yaml(path, "task")
    if not isinstance(content, dict) or not ({"task", "include", "group"} & set(content)):
        raise InputError(f"{path} is not a task of lm-evaluation-harness: it names no task")
    if {"include", "group"} & set(content):
        return str(path)
    options = content.get("dataset_kwargs")
    if isinstance(options, dict) and "data_files" in options:
        options["data_files"] = _beside(options["data_files"], path.parent)
    return content


def run_tasks(
    decoder: Decoder,
    tokenizer: Tokenizer,
    tasks: Sequence[str | Path],
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[TaskScore, ...]:
    """Run tasks on a decoder: YAML files of the harness, or names of its own. No chat template, and the few-shot
    examples that the task asks for. `progress` gets (requests done, all) of each task. Raises UsageError when
    lm_eval is not installed, InputError for a task that cannot be read, RunError when the harness fails."""
    check_harness()
    prepared = [read_task(task) for task in tasks]
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import datasets
    import lm_eval

    from nmonnx.evaluation.harness_model import OnnxModel

    datasets.disable_progress_bars()
    model = OnnxModel(decoder, tokenizer, batch, progress)
    scores: dict[str, TaskScore] = {}
    for name, task in zip(tasks, prepared, strict=True):
        try:
            found = lm_eval.simple_evaluate(model=model, tasks=[task], torch_random_seed=None)
        except NmonnxError:
            raise
        except Exception as e:  # the harness and the data sets raise anything
            words = " ".join(f"{type(e).__name__}: {e}".split())
            raise RunError(f"lm-evaluation-harness cannot run task {name}: {words[:400]}") from e
        for score in _scores(found or {}):
            if score.task in scores:
                raise UsageError(f"task {score.task} was given twice; name each task once")
            scores[score.task] = score
    return tuple(scores.values())


def average_drop(base: Sequence[TaskScore], scores: Sequence[TaskScore]) -> Drop:
    """Mean over tasks of (base - value) / base. Raises InputError when the two were not given the same tasks, or when
    the base scores 0 on all of them."""
    if [(s.task, s.metric) for s in base] != [(s.task, s.metric) for s in scores] or not base:
        raise InputError("the two models were not given the same tasks; evaluate them together")
    drops, left, paired = [], [], True
    for before, after in zip(base, scores, strict=True):
        if before.value <= 0:
            left.append(before.task)
        elif before.items and len(before.items) == len(after.items):
            drops.append(relative_drop(before.items, after.items))
        else:
            paired = False
            drops.append(relative_drop_unpaired(before.value, after.value, before.error, after.error))
    if not drops:
        raise InputError(f"the first model scores 0 on {', '.join(left)}, so a relative drop means nothing")
    errors = [error for _, error in drops if error is not None]
    error = math.sqrt(sum(e * e for e in errors)) / len(drops) if len(errors) == len(drops) else None
    return Drop(sum(mean for mean, _ in drops) / len(drops), error, paired, len(drops), tuple(left))


def _beside(files: Any, folder: Path) -> Any:
    """Data files as absolute paths where they lie beside the task."""
    if isinstance(files, dict):
        return {key: _beside(value, folder) for key, value in files.items()}
    if isinstance(files, list):
        return [_beside(value, folder) for value in files]
    here = (folder / str(files)).resolve()
    return str(here) if here.is_file() else files


def _scores(found: dict[str, Any]) -> list[TaskScore]:
    """One for each task (not group) of what the harness returns."""
    scores = []
    for task, samples in sorted(found.get("samples", {}).items()):
        values, config = found["results"][task], found["configs"][task]
        listed = [m["metric"] for m in config.get("metric_list") or [] if isinstance(m.get("metric"), str)]
        keys = [k for k in values if "," in k and "_stderr," not in k]
        key = next((k for m in listed for k in keys if k.startswith(f"{m},")), keys[0] if keys else None)
        if key is None:
            raise RunError(f"task {task} gives no metric")
        metric, _, rule = key.partition(",")
        if found.get("higher_is_better", {}).get(task, {}).get(metric) is False:
            raise UsageError(f"task {task} lists {metric} first, of which less is better; list an accuracy first")
        rows = sorted((s for s in samples if s.get("filter", rule) == rule), key=lambda s: s["doc_id"])
        items = tuple(float(s[metric]) for s in rows) if all(_number(s.get(metric)) for s in rows) else ()
        error = values.get(f"{metric}_stderr,{rule}")
        version = str(found.get("versions", {}).get(task, ""))
        known = _number(error) and not math.isnan(error)
        if items and not math.isclose(sum(items) / len(items), values[key], abs_tol=1e-9):
            items = ()  # the task aggregates in another way than by a mean, so its items cannot be paired
        scores.append(TaskScore(task, metric, float(values[key]), float(error) if known else None, items, version))
    return scores


def _number(value: object) -> bool:
    return isinstance(value, (int, float))
