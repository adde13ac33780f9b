"""Models beside the first one, on the same windows of a text and the same tasks: what sparsity costs, and how sure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nmonnx.digest import file_sha256
from nmonnx.errors import UsageError
from nmonnx.evaluation.harness import Drop, TaskScore, average_drop, check_harness, read_task, run_tasks
from nmonnx.evaluation.intervals import mean_error, student_t
from nmonnx.evaluation.perplexity import Perplexity, perplexity
from nmonnx.inference.decoder import Decoder
from nmonnx.inference.text import load_tokenizer, tokenizer_file
from nmonnx.onnx_file.graph import read_skeleton

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Step = Callable[[str, int, int], None]
LEVEL = 0.95


@dataclass(frozen=True)
class TextScore:
    """How a model predicts the text, and how that differs from the first model (which differs from itself by 0).

    perplexity        and its log-loss, windows and protocol
    interval          95 % confidence interval of the perplexity from the spread over windows, None below two windows
    difference        log-loss minus that of the first model, nats for each token
    difference_error  its standard error from the differences of each window, None below two windows
    change            perplexity / that of the first model - 1; above 0 is worse
    agreement         share of the predicted positions with the same most probable token as the first model
    """

    perplexity: Perplexity
    interval: tuple[float, float] | None
    difference: float
    difference_error: float | None
    change: float
    agreement: float


@dataclass(frozen=True)
class ModelScore:
    """path     the model
    pattern  N:M as a converted model states it, '' for one that states none
    recipe   the whole recipe in its metadata, JSON, or ''
    text     None when no text was given
    tasks    one score for each task
    drop     relative drop of the tasks' metrics against the first model, None for the first model or without tasks
    """

    path: Path
    pattern: str
    recipe: str
    text: TextScore | None
    tasks: tuple[TaskScore, ...]
    drop: Drop | None


@dataclass(frozen=True)
class Evaluation:
    """models    in the order given; the first is the reference of the others
    protocol  how all of them were measured, in words
    notes     what could not be said, and why
    """

    models: tuple[ModelScore, ...]
    protocol: tuple[str, ...]
    notes: tuple[str, ...]

    def data(self) -> dict[str, Any]:
        """All of it for JSON."""
        return {"protocol": self.protocol, "notes": self.notes, "models": [asdict(m) for m in self.models]}


def evaluate(
    models: Sequence[str | Path],
    tokens: np.ndarray | None,
    window: int = 1024,
    stride: int | None = None,
    max_windows: int | None = 8,
    skip_windows: int = 0,
    threads: int = 0,
    tasks: Sequence[str | Path] | None = None,
    progress: Step | None = None,
    tokenizer: str | Path | None = None,
) -> Evaluation:
    """Measure every model, one in memory at a time, on the text `tokens` [T] (None: tasks alone), cut as `perplexity`
    cuts it, and on the `tasks` of lm-evaluation-harness. The first model is the reference.

    tokenizer  what the tokens came from, and what tasks are read with; default: beside the first model
    progress   called with (what is measured, done, all)

    Raises UsageError when there is nothing to measure or a window cannot be, and what the decoder and the tasks raise.
    """
    paths = [Path(m) for m in models]
    tasks = list(tasks or ())
    if not paths:
        raise UsageError("no model was given; give one or more .onnx files")
    if tokens is None and not tasks:
        raise UsageError("nothing to measure on; give a text, tasks or both")
    if tasks:
        check_harness()
        for task in tasks:
            read_task(task)
    recipes = [stated_recipe(path) for path in paths]
    words = load_tokenizer(tokenizer, beside=paths[0]) if tasks else None
    reference = _Best()
    scores: list[ModelScore] = []
    for path, recipe in zip(paths, recipes, strict=True):
        decoder = Decoder(path, threads=threads)
        text = None
        if tokens is not None:
            first = scores[0].text if scores else None
            text = _text(decoder, tokens, (window, stride, max_windows, skip_windows), reference, first, progress)
        done = _tasks(decoder, words, tasks, progress) if words else ()
        del decoder
        drop = average_drop(scores[0].tasks, done) if scores and done else None
        scores.append(ModelScore(path, _pattern(recipe), recipe, text, done, drop))
    where = _tokenizer_words(tokenizer, paths[0])
    return Evaluation(tuple(scores), _protocol(scores[0], skip_windows, where), _notes(scores))


def stated_recipe(path: Path) -> str:
    """The recipe in a converted model's metadata, JSON; '' for another model. Raises InputError when the file is no
    ONNX model."""
    return next((p.value for p in read_skeleton(path).metadata_props if p.key == "nmonnx.recipe"), "")


class _Best:
    """The first model's most probable tokens, window by window; the only thing of it that stays in memory."""

    def __init__(self) -> None:
        self.windows: list[np.ndarray] = []

    def compare(self, index: int, best: np.ndarray) -> int:
        """Positions of window `index` where `best` is the same."""
        return int((self.windows[index] == best).sum())


def _text(
    decoder: Decoder,
    tokens: np.ndarray,
    cut: tuple[int, int | None, int | None, int],
    reference: _Best,
    first: TextScore | None,
    progress: Step | None,
) -> TextScore:
    same: list[int] = []

    def on_best(best: np.ndarray) -> None:
        if first is None:
            reference.windows.append(best.copy())
        same.append(reference.compare(len(same), best))

    window, stride, count, skip = cut
    step = _step(progress, decoder, "perplexity")
    found = perplexity(decoder, tokens, window, stride, count, progress=step, skip_windows=skip, on_best=on_best)
    base = first.perplexity if first else found
    _, error = mean_error(found.window_nll, found.window_tokens)
    differences = [after - before for after, before in zip(found.window_nll, base.window_nll, strict=True)]
    difference, difference_error = mean_error(differences, found.window_tokens)
    return TextScore(
        perplexity=found,
        interval=_interval(found.nll, error, found.windows),
        difference=difference,
        difference_error=difference_error,
        change=math.expm1(min(difference, 700.0)),
        agreement=sum(same) / found.tokens,
    )


def _interval(nll: float, error: float | None, windows: int) -> tuple[float, float] | None:
    if error is None:
        return None
    reach = student_t(windows - 1, LEVEL) * error
    return math.exp(min(nll - reach, 700.0)), math.exp(min(nll + reach, 700.0))


def _tasks(
    decoder: Decoder, words: Tokenizer, tasks: Sequence[str | Path], progress: Step | None
) -> tuple[TaskScore, ...]:
    return run_tasks(decoder, words, tasks, progress=_step(progress, decoder, "tasks"))


def _step(progress: Step | None, decoder: Decoder, what: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    name = decoder.path.name if decoder.path else "the model"
    return lambda done, total: progress(f"{name}: {what}", done, total)


def _pattern(recipe: str) -> str:
    try:
        return str(json.loads(recipe)["pattern"]) if recipe else ""
    except (ValueError, KeyError, TypeError):
        return "unreadable"


def _tokenizer_words(tokenizer: str | Path | None, model: Path) -> str:
    if tokenizer is None and not (model.parent / "tokenizer.json").is_file():
        return "tokenizer not stated"
    file = tokenizer_file(tokenizer, model)
    return f"tokenizer {file.name} with SHA-256 {file_sha256(file)[:12]}"


def _protocol(first: ModelScore, skip: int, tokenizer: str) -> tuple[str, ...]:
    lines = []
    if first.text:
        found = first.text.perplexity
        skipped = f" after {skip} skipped windows" if skip else ""
        lines.append(f"Text: {found.protocol}{skipped}; {found.tokens} tokens predicted; {tokenizer}.")
    if first.tasks:
        names = ", ".join(f"{s.task} ({s.metric}, version {s.version})" for s in first.tasks)
        lines.append(
            f"Tasks: {names}, by lm-evaluation-harness {_harness_version()}, no chat template, the tokenizer's own"
            f" marks (a BOS, where it has one) in front; {tokenizer}."
        )
    return tuple(lines)


def _notes(scores: Sequence[ModelScore]) -> tuple[str, ...]:
    lines = []
    first, others = scores[0], scores[1:]
    if first.text and first.text.interval is None:
        lines.append("One window has no spread, so there are no confidence intervals; read two windows or more.")
    elif first.text:
        lines.append(
            f"Intervals are 95 %, Student's t over {first.text.perplexity.windows} windows; the difference of the"
            " log-loss has the standard error of the differences of each window."
        )
    drops = [s.drop for s in others if s.drop]
    if drops:
        how = (
            "items paired between the models" if all(d.paired for d in drops) else "each accuracy's own error, unpaired"
        )
        lines.append(f"The average drop is the mean over tasks of (first - model) / first, its error from {how}.")
    left = sorted({task for d in drops for task in d.left})
    if left:
        lines.append(f"Left out of the average drop, because the first model scores 0: {', '.join(left)}.")
    return tuple(lines)


def _harness_version() -> str:
    from importlib.metadata import version

    return version("lm_eval")
