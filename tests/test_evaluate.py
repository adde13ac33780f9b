"""Evaluation: every number against a computation of its own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from test_cli import nmonnx
from tiny_llama import Runner

from nmonnx.convert import convert
from nmonnx.errors import InputError, UsageError
from nmonnx.evaluation.evaluate import evaluate, stated_recipe
from nmonnx.evaluation.harness import TaskScore, average_drop, read_task, run_tasks
from nmonnx.evaluation.intervals import mean_error, relative_drop, relative_drop_unpaired, student_t
from nmonnx.evaluation.perplexity import perplexity
from nmonnx.inference.decoder import Decoder
from nmonnx.inference.text import encode, load_tokenizer
from nmonnx.models import build
from nmonnx.pattern import Pattern
from nmonnx.pruning.recipe import Recipe

TASK = Path(__file__).parents[1] / "docs" / "examples" / "everyday.yaml"
TOKENS = np.random.default_rng(5).integers(3, 512, 150)
WINDOW = 40


@pytest.fixture(scope="module")
def pair(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    source = shared / "models" / "stories260K"
    if not source.is_dir():
        pytest.skip("the model stories260K is not there")
    folder = tmp_path_factory.mktemp("evaluate")
    build(source, folder)
    convert(folder / "model.onnx", folder / "sparse.onnx", Recipe(Pattern(4, 8), kernel="prune"))
    return folder / "model.onnx", folder / "sparse.onnx"


@pytest.fixture(scope="module")
def stock(pair, tmp_path_factory) -> tuple[Path, Path]:
    """The same two without custom ops: the sparse one inlined, so that a plain session runs it."""
    inliner = pytest.importorskip("onnx.inliner")
    flat = tmp_path_factory.mktemp("stock") / "flat.onnx"
    onnx.save(inliner.inline_local_functions(onnx.load(pair[1])), flat)
    return pair[0], flat


def _direct(path: Path, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses [n] and most probable tokens [n] of the tokens start+1..stop-1, in float64."""
    rows = TOKENS[None, start:stop]
    logits = Runner(path)(rows)[0, :-1].astype(np.float64)
    top = logits.max(-1)
    losses = np.log(np.exp(logits - top[:, None]).sum(-1)) + top - logits[np.arange(len(logits)), rows[0, 1:]]
    return losses, logits.argmax(-1)


def test_the_numbers_of_a_text_equal_a_direct_computation(pair, stock):
    dense, sparse = evaluate(pair, TOKENS, WINDOW, threads=1).models
    starts = [0, 40, 80]
    before = [_direct(stock[0], s, s + WINDOW) for s in starts]
    after = [_direct(stock[1], s, s + WINDOW) for s in starts]
    a, b = (np.array([losses.mean() for losses, _ in found]) for found in (before, after))
    t = 4.302652729749464  # of 2 degrees of freedom
    for score, means in ((dense.text, a), (sparse.text, b)):
        error = means.std(ddof=1) / math.sqrt(3)
        assert score.perplexity.ppl == pytest.approx(math.exp(means.mean()), rel=1e-4)
        assert score.interval == pytest.approx([math.exp(means.mean() + s * t * error) for s in (-1, 1)], rel=1e-3)
    assert sparse.text.difference == pytest.approx((b - a).mean(), abs=1e-4)
    assert sparse.text.difference_error == pytest.approx((b - a).std(ddof=1) / math.sqrt(3), abs=1e-4)
    assert sparse.text.change == pytest.approx(math.exp((b - a).mean()) - 1, abs=2e-4)
    same = [(x == y).mean() for (_, x), (_, y) in zip(before, after, strict=True)]
    assert sparse.text.agreement == pytest.approx(np.mean(same), abs=1 / 117)
    assert 0 < sparse.text.agreement < 1


def test_overlap_and_skipped_windows_count_each_token_once(pair, stock):
    score = evaluate(pair[:1], TOKENS, WINDOW, stride=25, skip_windows=1, max_windows=2, threads=1).models[0].text
    direct = [_direct(stock[0], s, s + WINDOW)[0][WINDOW - 25 - 1 :] for s in (25, 50)]
    assert score.perplexity.window_tokens == (25, 25)
    assert score.perplexity.nll == pytest.approx(np.concatenate(direct).mean(), abs=1e-5)


def test_a_model_differs_from_itself_by_nothing(pair):
    first, second = evaluate((pair[0], pair[0]), TOKENS, WINDOW, threads=1).models
    for score in (first.text, second.text):
        assert (score.difference, score.difference_error, score.change, score.agreement) == (0, 0, 0, 1)


def test_a_converted_model_states_its_pattern_and_all_share_one_protocol(pair):
    done = evaluate(pair, TOKENS, WINDOW, max_windows=2, skip_windows=1, threads=1)
    assert [m.pattern for m in done.models] == ["", "4:8"]
    assert stated_recipe(pair[0]) == ""
    assert json.loads(done.models[1].recipe)["kernel"] == "prune"
    assert "2 windows of 40 tokens, stride 40, empty cache, no BOS after 1 skipped windows" in done.protocol[0]
    assert "78 tokens predicted" in done.protocol[0] and "tokenizer.json" in done.protocol[0]
    json.dumps(done.data(), default=str)


def test_one_window_has_no_interval_and_says_so(pair):
    done = evaluate(pair, TOKENS, WINDOW, max_windows=1, threads=1)
    assert done.models[1].text.interval is done.models[1].text.difference_error is None
    assert "no confidence intervals" in done.notes[0]


def test_what_cannot_be_measured_is_refused(pair, tmp_path):
    with pytest.raises(UsageError, match="nothing to measure"):
        evaluate(pair, None)
    with pytest.raises(UsageError, match="no model"):
        evaluate([], TOKENS)
    with pytest.raises(UsageError, match="has 3 windows of 40 tokens, so 3 cannot be skipped"):
        evaluate(pair, TOKENS, WINDOW, skip_windows=3)
    with pytest.raises(InputError, match="does not exist"):
        evaluate([pair[0], tmp_path / "missing.onnx"], TOKENS, WINDOW)


def test_students_t_is_that_of_the_tables():
    known = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 7: 2.3646, 30: 2.0423, 120: 1.9799}
    assert {n: round(student_t(n), 4) for n in known} == known
    assert student_t(5, 0.99) == pytest.approx(4.0321, abs=1e-4)


def test_errors_of_means_and_of_relative_drops():
    x = np.random.default_rng(0).normal(size=9)
    assert mean_error(x) == pytest.approx((x.mean(), x.std(ddof=1) / 3))
    assert mean_error([1.0]) == (1.0, None)
    assert mean_error([1.0, 4.0], [2, 1])[0] == pytest.approx(2.0)
    rng = np.random.default_rng(1)
    base = (rng.random(2000) < 0.7).astype(float)
    value = base * (rng.random(2000) < 0.9)
    drop, error = relative_drop(base, value)
    draws = [rng.integers(0, 2000, 2000) for _ in range(400)]
    bootstrap = np.std([1 - value[d].mean() / base[d].mean() for d in draws])
    assert drop == pytest.approx(1 - value.mean() / base.mean())
    assert error == pytest.approx(bootstrap, rel=0.15)
    assert relative_drop_unpaired(0.5, 0.4, 0.03, 0.04) == pytest.approx((0.2, 0.8 * math.hypot(0.1, 0.06)))


def _score(task: str, items: list[float], error: float | None = 0.1, kept: bool = True) -> TaskScore:
    return TaskScore(task, "acc", float(np.mean(items)), error, tuple(items) if kept else (), "1")


def test_the_average_drop_is_over_tasks_and_says_how_sure():
    base = [_score("a", [1, 1, 1, 0]), _score("b", [1, 1, 0, 0])]
    worse = [_score("a", [1, 1, 0, 0]), _score("b", [1, 1, 0, 0])]
    drop = average_drop(base, worse)
    assert (drop.mean, drop.paired, drop.tasks) == (pytest.approx(1 / 6), True, 2)
    assert drop.error == pytest.approx(relative_drop([1, 1, 1, 0], [1, 1, 0, 0])[1] / 2)
    loose = average_drop(base, [_score("a", [1, 1, 0, 0], kept=False), worse[1]])
    first = relative_drop_unpaired(0.75, 0.5, 0.1, 0.1)[1]
    assert not loose.paired and loose.error == pytest.approx(first / 2)
    assert average_drop([_score("z", [0, 0]), *base], [_score("z", [1, 0]), *worse]).left == ("z",)
    with pytest.raises(InputError, match="the same tasks"):
        average_drop(base, worse[:1])
    with pytest.raises(InputError, match="scores 0 on z"):
        average_drop([_score("z", [0, 0])], [_score("z", [1, 0])])


def test_a_task_finds_its_data_beside_it_and_is_refused_when_it_is_none(tmp_path):
    assert read_task(TASK)["dataset_kwargs"]["data_files"]["test"] == str(TASK.with_suffix(".jsonl"))
    assert read_task("arc_easy") == "arc_easy"
    with pytest.raises(InputError, match="is not a file"):
        read_task(tmp_path / "missing.yaml")
    for content, message in (("- 1", "names no task"), ("a: [", "cannot be read")):
        (tmp_path / "task.yaml").write_text(content)
        with pytest.raises(InputError, match=message):
            read_task(tmp_path / "task.yaml")


def test_without_the_harness_the_way_to_install_it_is_told(pair, monkeypatch):
    monkeypatch.setattr("nmonnx.evaluation.harness.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'nmonnx\[eval\]'"):
        evaluate(pair, None, tasks=[TASK])


def test_the_command_writes_one_row_for_each_model(pair, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl who liked to play in the park. " * 12)
    report = tmp_path / "table.json"
    options = ("--window", "60", "--windows", "3", "--threads", "1", "--report", report)
    run = nmonnx("evaluate", *pair, "--text", text, *options)
    assert (run.returncode, run.stderr) == (0, "")
    assert "sparse.onnx" in run.stdout and "4:8" in run.stdout
    data = json.loads(report.read_text())
    assert [m["pattern"] for m in data["models"]] == ["", "4:8"] and len(data["inputs"]) == 3
    assert nmonnx("evaluate", *pair, "--text", text, *options, "--quiet").stdout == ""
    refused = nmonnx("evaluate", *pair)
    assert refused.returncode == 2 and "--text FILE" in refused.stderr


@pytest.fixture
def harness(monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm-eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def _requests(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=a) for a in arguments]


def test_log_likelihoods_equal_a_direct_computation_whatever_the_batch(pair, harness):
    from nmonnx.evaluation.harness_model import OnnxModel

    words = load_tokenizer(beside=pair[0])
    cases = [("Once upon a time", " there was a girl"), ("Tom", " ran"), ("", "The dog was big"), ("She said", ' "Hi"')]
    found = OnnxModel(Decoder(pair[0], 1), words, batch=3).loglikelihood(_requests(*cases))
    assert found[0][1] in (True, False)
    one = OnnxModel(Decoder(pair[0], 1), words, batch=1).loglikelihood(_requests(*cases))
    assert [x for x, _ in found] == pytest.approx([x for x, _ in one], abs=1e-4)
    for (context, wanted), (total, greedy) in zip(cases, found, strict=True):
        whole = encode(words, context + wanted, special=True)
        count = len(whole) - len(encode(words, context, special=True))
        logits = Runner(pair[0])(whole[None])[0].astype(np.float64)[-count - 1 : -1]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert total == pytest.approx(logp[np.arange(count), whole[-count:]].sum(), abs=1e-3)
        assert greedy == bool((logits.argmax(-1) == whole[-count:]).all())


def test_a_rolling_text_is_its_perplexity_and_text_is_written_greedily(pair, harness):
    from nmonnx.evaluation.harness_model import OnnxModel

    words, decoder = load_tokenizer(beside=pair[0]), Decoder(pair[0], 1)
    model = OnnxModel(decoder, words)
    text = "Once upon a time there was a little girl."
    ids = encode(words, text, special=True)
    expected = perplexity(decoder, ids, window=len(ids))
    assert model.loglikelihood_rolling(_requests((text,))) == pytest.approx([-expected.nll * expected.tokens], abs=1e-3)
    story = model.generate_until(_requests(("Once upon a time", {"max_gen_toks": 24})))[0]
    stop = story[8:12]
    assert stop and model.generate_until(_requests(("Once upon a time", {"max_gen_toks": 24, "until": [stop]}))) == [
        story.partition(stop)[0]
    ]
    with pytest.raises(UsageError, match="do_sample"):
        model.generate_until(_requests(("Once", {"do_sample": True})))


def test_a_task_runs_offline_and_gives_every_item(pair, harness):
    done = evaluate(pair, None, threads=1, tasks=[TASK])
    dense, sparse = done.models
    assert len(dense.tasks[0].items) == len(sparse.tasks[0].items) == 40
    assert dense.tasks[0].value > 0.5  # chance is a third
    assert sparse.drop.paired and sparse.drop.mean == pytest.approx(1 - sparse.tasks[0].value / dense.tasks[0].value)
    assert "items paired" in done.notes[0]
    with pytest.raises(UsageError, match="given twice"):
        run_tasks(Decoder(pair[0], 1), load_tokenizer(beside=pair[0]), [TASK, TASK])
