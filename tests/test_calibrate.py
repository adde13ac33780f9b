"""Calibration: against numpy and ONNX Runtime alone, in pieces, cut short and resumed, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny_llama
import toy_decoders
from small_models import mlp, model, weights, write
from test_cli import nmonnx, refused

from nmonnx.calibration.calibrate import calibrate
from nmonnx.commands.calibrate import command
from nmonnx.convert import convert
from nmonnx.digest import file_sha256
from nmonnx.errors import InputError, RunError, UsageError
from nmonnx.models import build
from nmonnx.onnx_file.graph import load
from nmonnx.onnx_file.identity import model_sha256
from nmonnx.pruning.recipe import Recipe
from nmonnx.records.stats import Seen, Stats
from nmonnx.sites import find_sites

WINDOW = 24
TOKENS = np.random.default_rng(3).integers(0, 512, 5 * WINDOW + 7)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer decoder with a KV cache."""
    folder = tmp_path_factory.mktemp("llama")
    source = tiny_llama.write_folder(folder / "source", tiny_llama.CONFIG, tiny_llama.weights(tiny_llama.CONFIG))
    return build(source, folder / "built")


@pytest.fixture
def always_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmonnx.calibration.calibrate.SAVE_EVERY", 0.0)


def activations(path: Path, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """What each site reads in one call on each window, by site name, [windows * T, K], with an own session."""
    sites = find_sites(load(path)).sites
    proto = onnx.load(path)
    known = {o.name for o in proto.graph.output}
    names = list(dict.fromkeys(site.activation.name for site in sites))
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    runner = tiny_llama.Runner.__new__(tiny_llama.Runner)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    runner.session, runner.past = ort.InferenceSession(proto.SerializeToString(), options), {}
    values: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for window in tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, 1, WINDOW):
        feeds = {"input_ids": window, "attention_mask": np.ones_like(window)}
        for port in runner.session.get_inputs():
            if "past" in port.name:
                feeds[port.name] = runner._empty(port, 1)
            if port.name == "position_ids":
                feeds[port.name] = np.arange(WINDOW)[None]
        for name, value in zip(names, runner.session.run(names, feeds), strict=True):
            values[name].append(value.reshape(WINDOW, -1))
    return {site.name: np.concatenate(values[site.activation.name]) for site in sites}


def assert_same(a: Stats, b: Stats, rtol: float = 0.0) -> None:
    assert list(a.seen) == list(b.seen)
    for site, want in b.seen.items():
        seen = a.of(site)
        assert seen.tokens == want.tokens
        for name in ("mean", "rms", "abs_max", "token_median", "sample"):
            x, y = np.asarray(getattr(seen, name), np.float64), np.asarray(getattr(want, name), np.float64)
            np.testing.assert_allclose(x, y, rtol, rtol * np.abs(y).max(), err_msg=f"{site} {name}")


def assert_describes(seen: Seen, x: np.ndarray, sinks: np.ndarray) -> None:
    """That `seen` is of the rows `x` [T, K], up to the rounding of float32 sums inside the model."""
    kept = x[~sinks].astype(np.float64)
    assert seen.tokens == len(kept)
    scale = float(np.abs(x).max())
    np.testing.assert_allclose(seen.mean, kept.mean(axis=0), atol=1e-5 * scale)
    np.testing.assert_allclose(seen.rms, np.sqrt((kept**2).mean(axis=0)), rtol=1e-4, atol=1e-5 * scale)
    np.testing.assert_allclose(seen.abs_max, np.abs(x).max(axis=0), rtol=1e-4, atol=1e-5 * scale)
    medians = np.sort(kept, axis=1)[:, (x.shape[1] - 1) // 2]
    assert seen.token_median == pytest.approx(medians.mean(), abs=1e-5 * scale)


def test_windows_in_pieces_equal_whole_windows_without_nmonnx(llama, monkeypatch):
    monkeypatch.setattr("nmonnx.calibration.calls._MOST", 10)
    told: list[tuple[int, int]] = []
    stats = calibrate(llama, TOKENS, window=WINDOW, sample=1000, threads=1, progress=lambda a, b: told.append((a, b)))
    want = activations(llama, TOKENS)
    assert list(stats.seen) == list(want)
    sinks = np.arange(5 * WINDOW) % WINDOW == 0
    for site, x in want.items():
        assert_describes(stats.of(site), x, sinks)
        np.testing.assert_allclose(stats.of(site).sample, x[~sinks], rtol=2e-3, atol=2e-3 * np.abs(x).max())
    assert told == [(WINDOW * i, WINDOW * 5) for i in range(1, 6)]
    assert stats.source == model_sha256(llama) != file_sha256(llama)
    assert stats.protocol == f"5 windows of {WINDOW} tokens, empty cache, no BOS, first token of each left out"
    assert not stats.unseen


def test_layers_that_read_one_activation_share_what_was_seen(llama):
    stats = calibrate(llama, TOKENS, window=WINDOW, max_tokens=WINDOW, threads=1)
    by_activation: dict[str, set[int]] = {}
    for site in find_sites(load(llama)).sites:
        by_activation.setdefault(site.activation.name, set()).add(id(stats.of(site.name)))
    assert all(len(ids) == 1 for ids in by_activation.values())
    assert len({id(seen) for seen in stats.seen.values()}) == len(by_activation) < len(stats.seen)


def test_shards_of_a_text_merge_to_the_whole(llama):
    cut = 2 * WINDOW
    parts = [
        calibrate(llama, TOKENS[:cut], window=WINDOW, sample=40, threads=1),
        calibrate(llama, TOKENS[cut:], window=WINDOW, sample=40, threads=1, first=cut),
    ]
    merged, whole = Stats.merge(parts), calibrate(llama, TOKENS, window=WINDOW, sample=40, threads=1)
    for site, seen in whole.seen.items():
        own = merged.of(site)
        assert own.sums is not None and seen.sums is not None
        np.testing.assert_allclose(own.sums.square, seen.sums.square, rtol=1e-12)
        np.testing.assert_allclose(own.sums.total, seen.sums.total, rtol=1e-12, atol=1e-10)
        np.testing.assert_array_equal(own.sample, seen.sample)
        np.testing.assert_array_equal(own.abs_max, seen.abs_max)


def test_a_run_that_was_cut_short_goes_on_and_gives_the_same_file(llama, tmp_path, always_saves):
    settings: dict = {"window": WINDOW, "sample": 20, "threads": 1}
    whole = calibrate(llama, TOKENS, **settings).save(tmp_path / "whole.npz")
    partial = tmp_path / "s.partial.npz"

    def crash(done: int, total: int) -> None:
        if done >= 3 * WINDOW:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(llama, TOKENS, **settings, checkpoint=partial, progress=crash)
    assert partial.exists()
    told: list[int] = []
    resumed = calibrate(
        llama, TOKENS, **settings, checkpoint=partial, progress=lambda done, total: told.append(done)
    ).save(tmp_path / "resumed.npz")
    assert told == [4 * WINDOW, 5 * WINDOW]
    assert resumed.read_bytes() == whole.read_bytes()
    assert not partial.exists()


@pytest.mark.parametrize("change", ["text", "window", "sample", "damage"])
def test_a_checkpoint_of_another_run_is_not_used(llama, tmp_path, always_saves, change):
    partial = tmp_path / "s.partial.npz"

    def crash(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(llama, TOKENS, window=WINDOW, threads=1, checkpoint=partial, progress=crash)
    if change == "damage":
        partial.write_bytes(partial.read_bytes()[:1000])
    tokens = TOKENS[::-1] if change == "text" else TOKENS
    window, sample = 12 if change == "window" else WINDOW, 9 if change == "sample" else 512
    got = calibrate(llama, tokens, window=window, sample=sample, threads=1, checkpoint=partial)
    assert_same(got, calibrate(llama, tokens, window=window, sample=sample, threads=1))


def test_feeds_of_a_graph_without_tokens(tmp_path):
    path = write(mlp(), tmp_path / "m.onnx")
    xs = [weights(2, n, 32, seed=n) for n in (5, 9)]
    stats = calibrate(path, feeds=[{"x": x} for x in xs], threads=1)
    x = np.concatenate([x.reshape(-1, 32) for x in xs])
    first, second = find_sites(load(path)).sites
    assert_describes(stats.of(first.name), x, np.zeros(len(x), bool))
    np.testing.assert_array_equal(stats.of(first.name).sample, x.astype(np.float16))
    hidden = np.maximum(x @ weights(32, 48, seed=1), 0)
    assert_describes(stats.of(second.name), hidden, np.zeros(len(x), bool))
    assert stats.protocol.startswith("2 feeds")


def test_feeds_count_no_padding_and_no_first_token(tmp_path):
    path = write(
        model(
            """g (int64[b, t] input_ids, int64[b, t] attention_mask) => (float[b, t, 6] logits) {
                x = Gather(table, input_ids)
                m = Cast<to = 1>(attention_mask)
                keep = ReduceMean<keepdims = 1>(m)
                y = MatMul(x, w)
                logits = Mul(y, keep)
            }""",
            table=weights(50, 8),
            w=weights(8, 6, seed=1),
        ),
        tmp_path / "m.onnx",
    )
    ids = np.arange(10).reshape(2, 5)
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    (seen,) = calibrate(path, feeds=[{"input_ids": ids, "attention_mask": mask}], threads=1).seen.values()
    table = weights(50, 8)
    np.testing.assert_array_equal(seen.sample, table[[3, 4, 6, 7, 8]].astype(np.float16))
    np.testing.assert_array_equal(seen.abs_max, np.abs(table[[2, 3, 4, 5, 6, 7, 8]]).max(axis=0))
    assert seen.tokens == 5


def test_a_cache_under_any_name_is_carried(tmp_path):
    names = ("input_ids", "past_key_values.0.key", "past_key_values.0.value", "present.0.key", "present.0.value")
    renamed = dict(zip(("ids", "pk", "pv", "nk", "nv"), names, strict=True))
    path = toy_decoders.split_cache(tmp_path / "toy.onnx", renamed)
    tokens = np.random.default_rng(0).integers(0, toy_decoders.VOCAB, 60)
    (seen,) = calibrate(path, tokens, window=20, threads=1).seen.values()
    x = np.cumsum(toy_decoders.EMBED[tokens].reshape(3, 20, -1), axis=1).reshape(60, -1)
    assert_describes(seen, x, np.arange(60) % 20 == 0)


def test_layers_inside_functions_are_listed_with_the_reason(zoo):
    path = zoo("llama-synth-functions")
    stats = calibrate(path, np.arange(40) % 200, window=20, threads=1)
    assert stats.unseen and stats.seen
    assert all("inside a subgraph or function" in reason for reason in stats.unseen.values())
    assert {*stats.seen, *stats.unseen} == {site.name for site in find_sites(load(path)).sites}


def test_an_activation_that_is_not_finite_names_the_tensor(tmp_path):
    path = write(mlp(), tmp_path / "m.onnx")
    x = weights(1, 3, 32)
    x[0, 1, 4] = np.nan
    with pytest.raises(RunError, match=r"tensor 'x'.*not finite in feed 'feed 0'"):
        calibrate(path, feeds=[{"x": x}], threads=1)


def test_what_cannot_be_calibrated_is_refused(llama, tmp_path):
    small = write(mlp(), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="one of them"):
        calibrate(llama)
    with pytest.raises(UsageError, match="one of them"):
        calibrate(llama, TOKENS, feeds=[{}])
    with pytest.raises(UsageError, match="no feeds"):
        calibrate(small, feeds=[])
    with pytest.raises(UsageError, match="lacks inputs"):
        calibrate(small, feeds=[{}])
    with pytest.raises(UsageError, match="must be at least 2"):
        calibrate(llama, TOKENS, window=1)
    with pytest.raises(InputError, match="takes no token ids"):
        calibrate(small, TOKENS)
    with pytest.raises(InputError, match="two token ids or more"):
        calibrate(llama, TOKENS[:1])
    with pytest.raises(InputError, match="the tokenizer that belongs to the model"):
        calibrate(llama, TOKENS + 512)
    with pytest.raises(RunError, match="failed while it ran"):
        calibrate(small, feeds=[{"x": weights(1, 3, 5)}])
    sparse = tmp_path / "sparse.onnx"
    convert(small, sparse, Recipe.from_dict({"pattern": "8:16"}, "test"))
    with pytest.raises(UsageError, match="calibrate the original"):
        calibrate(sparse, feeds=[{"x": weights(1, 3, 32)}])


def test_a_short_text_is_one_window_and_the_context_bounds_it(llama):
    assert calibrate(llama, TOKENS[:5], threads=1).protocol.startswith("1 windows of 5 tokens")
    long = np.resize(TOKENS, 300)
    assert calibrate(llama, long, threads=1).protocol.startswith("2 windows of 128 tokens")


def test_the_command_writes_beside_the_model_and_refuses_to_overwrite(tmp_path):
    path = write(mlp(), tmp_path / "model.onnx")
    np.savez(tmp_path / "feed.npz", x=weights(1, 7, 32))
    done = nmonnx("calibrate", path, "--feeds", tmp_path / "feed.npz")
    assert done.returncode == 0, done.stderr
    assert "2 of 2 layers seen; 1 feeds" in done.stdout
    assert done.stderr == ""
    assert len(Stats.load(tmp_path / "model-stats.npz").seen) == 2
    assert not list(tmp_path.glob("*partial*"))
    arguments = ("calibrate", path, "--feeds", tmp_path / "feed.npz")
    assert "--overwrite" in refused(tmp_path, 2, *arguments)
    assert nmonnx(*arguments, "--overwrite", "--quiet").stdout == ""
    assert "one of them" in refused(tmp_path, 2, "calibrate", path)


def test_an_output_that_cannot_be_is_refused_before_anything_runs(tmp_path):
    path, feed = write(mlp(), tmp_path / "model.onnx"), tmp_path / "feed.npz"
    np.savez(feed, x=weights(1, 7, 32))
    for output, reason in (
        (feed, "one of the feeds"),
        (path, "must end in .npz"),
        (tmp_path / "none" / "s.npz", "does not exist"),
    ):
        with pytest.raises(UsageError, match=reason):
            command(path, feeds=[feed], output=output, overwrite=True)


def test_the_command_reads_a_text(shared, tmp_path):
    if not (shared / "models" / "stories260K").is_dir():
        pytest.skip("the model stories260K is not there")
    path = build(shared / "models" / "stories260K", tmp_path / "built")
    (tmp_path / "train.txt").write_text("Once upon a time there was a little cat. " * 30)
    done = nmonnx("calibrate", path, "--text", tmp_path / "train.txt", "--window", 32, "-o", tmp_path / "s.npz")
    assert done.returncode == 0, done.stderr
    stats = Stats.load(tmp_path / "s.npz")
    assert stats.protocol.startswith("train.txt: ")
    assert {site.name for site in find_sites(load(path)).sites} == set(stats.seen)


def test_statistics_of_another_training_of_the_same_graph_are_refused(tmp_path):
    proto = mlp()
    for name, factor in (("one", 1), ("two", 1.5)):
        (tmp_path / name).mkdir()
        for tensor in proto.graph.initializer:
            values = onnx.numpy_helper.to_array(tensor) * np.float32(factor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        path = tmp_path / name / "model.onnx"
        onnx.save_model(proto, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
        proto = onnx.load(path)
    one, two = (tmp_path / name / "model.onnx" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    stats = calibrate(one, feeds=[{"x": np.ones((1, 4, 32), np.float32)}], threads=1)
    recipe = Recipe(mitigations=("s-pts",))
    assert convert(one, None, recipe, stats=stats).records
    with pytest.raises(UsageError, match="another model"):
        convert(two, None, recipe, stats=stats)


def test_statistics_that_no_activation_has_are_refused(llama, tmp_path):
    calibrate(llama, TOKENS[:WINDOW], window=WINDOW, threads=1).save(tmp_path / "right.npz")
    with np.load(tmp_path / "right.npz") as file:
        arrays = dict(file)
    for name, wrong in (("0.total", np.nan), ("0.square", -1.0), ("0.abs_max", np.inf)):
        np.savez(tmp_path / "wrong.npz", **{**arrays, name: np.full_like(arrays[name], wrong)})
        with pytest.raises(InputError, match="damaged"):
            Stats.load(tmp_path / "wrong.npz")
