"""Every graph of the zoo: converted, it equals stock operators at the same layers, with the library and without it,
and keeping everything it is the original."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import SHARED
from onnx import ModelProto
from stock_reference import load_whole, prune_with_stock_ops

from nmonnx.convert import convert
from nmonnx.errors import ModelError, NmonnxError
from nmonnx.feeds import Feed, plan_feeds
from nmonnx.library import make_session, register
from nmonnx.pattern import Pattern
from nmonnx.pruning.recipe import Recipe
from nmonnx.validate import Report, validate

ZOO = SHARED / "zoo"
MODELS = sorted(ZOO.glob("**/*.onnx"))

REFUSED = {
    "llama-dynamo-bf16": "BFLOAT16",
    "llama-genai-bf16cuda": "BFLOAT16",
    "llama-synth-conv1x1": "1x1 convolution",
    "llama-synth-leftweight": "weight is on the left",
    "llama-synth-initinputs": "also a graph input",
    "public/onnxruntime-genai/hf-internal-testing/tiny-random-lfm2-fp32/decoder.onnx": "lm_head is left dense",
}
"""Models that are refused, with a word of the reason; the public graphs without a linear layer come on top."""

UNWRITTEN_CACHE = {"gemma2-genai-fp32", "gemma2-genai-int4", "gptoss-genai-fp16cuda"}
"""Models whose sliding-window cache buffers are returned partly unwritten, so that two runs of the original differ:
their logits alone are compared."""

DATA_DEPENDENT = {"mixtral-ts-kv-fp32"}
"""A trace that baked in which experts the traced tokens took: no pruned form of it runs, stock operators neither."""

ROUNDED_ACTIVATIONS = 6e-2
"""What quantised originals lose themselves over two layers: dynamic quantisation rounds a whole tensor to 8 bits (0.045
seen), MatMulNBits of accuracy level 4 blocks of 32 channels (0.026 seen)."""

HALF = {
    "gpt2-dynamo-fp16",
    "gpt2-ts-fp16",
    "gptoss-genai-fp16cuda",
    "llama-dynamo-fp16",
    "llama-genai-fp16cuda",
    "llama-genai-fp16dml",
    "llama-optimum-fp16",
    "llama-ts-fp16",
    "phi3-genai-fp16cuda",
    "public/onnxruntime-genai/hf-internal-testing/tiny-qwen35-cuda/decoder.onnx",
    "public/onnxruntime-genai/hf-internal-testing/tiny-random-gpt2-fp16-cuda/past.onnx",
    "qwen2-genai-fp16cuda",
}
"""fp16 graphs. ONNX Runtime's CPU provider computes them in fp32 and drops the rounding to fp16 between neighbouring
nodes; a custom op between two nodes brings it back, and one unit in the last place decides ties. So with the library
these are compared layer by layer, on equal inputs, and n = m is the original up to that rounding."""


def name(path: Path) -> str:
    folder = str(path.parent.relative_to(ZOO))
    return folder if path.name == "model.onnx" else f"{folder}/{path.name}" if folder != "." else path.name


@lru_cache(maxsize=4)
def runs(path: Path) -> tuple[Feed, ...]:
    """Feeds that the original runs on; none when ONNX Runtime's CPU provider cannot load or run it."""
    try:
        session = make_session(path, threads=1, library=False)
    except ModelError:
        return ()
    return tuple(plan_feeds(session, path, np.random.default_rng(0)).feeds)


def outputs(
    model: ModelProto | Path, feeds: tuple[Feed, ...], library: bool, logits_only: bool = False
) -> list[list[np.ndarray]]:
    proto = load_whole(model) if isinstance(model, Path) else model
    names = [o.name for o in proto.graph.output if not (logits_only and o.name.startswith("present"))]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    # without VNNI, 8-bit products saturate, and how much depends on what ONNX Runtime fuses around a quantiser
    options.add_session_config_entry("session.x64quantprecision", "1")
    if library:
        register(options)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [session.run(names, feed.arrays) for feed in feeds]


def worst(got: list[list[np.ndarray]], want: list[list[np.ndarray]]) -> float:
    """Largest error relative to the largest value of its output; infinite when shapes or NaNs differ."""
    error = 0.0
    for a, b in ((a, b) for g, w in zip(got, want, strict=True) for a, b in zip(g, w, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return np.inf
        if a.size and a.dtype.kind == "f":
            a64, b64 = a.astype(np.float64), b.astype(np.float64)
            if not np.array_equal(np.isnan(a64), np.isnan(b64)):
                return np.inf
            scale = np.nanmax(np.abs(b64), initial=1e-30)
            error = max(error, float(np.nanmax(np.abs(a64 - b64), initial=0.0)) / scale)
        elif not np.array_equal(a, b):
            return np.inf
    return error


def bit_equal(got: list[list[np.ndarray]], want: list[list[np.ndarray]]) -> bool:
    pairs = [(a, b) for g, w in zip(got, want, strict=True) for a, b in zip(g, w, strict=True)]
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)


def records(path: Path) -> list[dict]:
    props = {p.key: p.value for p in onnx.load(path, load_external_data=False).metadata_props}
    return json.loads(props["nmonnx.sites"])


@dataclass(frozen=True)
class Outcome:
    """What one graph gave. Errors are relative to the largest value of the output; None: not measured.

    refused       why it was not converted, "" when it was
    not_run       why it was not run, "" when it was
    pruned        kernel -> layers
    left          reason -> layers left dense
    prune_only    error of prune + untouched layer against stock operators, with the library
    fused         the same of the fused op
    plain         the larger of the two without the library
    faults        checks of `validate` that failed
    same          n = m gave the original bit for bit
    dense         error of n = m against the original
    whole         error of n = m by the fused ops, which select nothing, against the original
    """

    refused: str = ""
    not_run: str = ""
    pruned: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    prune_only: float | None = None
    fused: float | None = None
    plain: float | None = None
    faults: tuple[str, ...] = ()
    same: bool | None = None
    dense: float | None = None
    whole: float | None = None


def compare(path: Path, folder: Path) -> Outcome:
    """Convert a graph prune-only, fused and with n = m, and run each beside stock operators and the original."""
    out, prune_only, dense, whole = (folder / f"{n}.onnx" for n in ("fused", "prune", "dense", "whole"))
    try:
        convert(path, out, Recipe(kernel="fused"))
    except NmonnxError as error:
        assert not list(folder.iterdir())
        return Outcome(refused=str(error).partition(": ")[2])
    convert(path, prune_only, Recipe(kernel="prune"))
    convert(path, dense, Recipe(Pattern(16, 16)))
    convert(path, whole, Recipe(Pattern(16, 16), kernel="fused"))
    layers = records(prune_only)
    pruned = Counter(r["kernel"] for r in records(out) if r["status"] == "pruned")
    left = Counter(r["reason"] for r in layers if r["status"] == "left")
    feeds = runs(path)
    if not feeds or name(path) in DATA_DEPENDENT:
        why = "the trace baked in which experts run" if feeds else "the CPU provider does not run the original either"
        return Outcome(not_run=why, pruned=pruned, left=left)
    run = partial(outputs, feeds=feeds, logits_only=name(path) in UNWRITTEN_CACHE)
    stock = run(prune_with_stock_ops(load_whole(path), layers, 8, 16), library=False)
    original, kept_all = run(path, library=False), [run(dense, library=library) for library in (True, False)]
    return Outcome(
        pruned=pruned,
        left=left,
        prune_only=worst(run(prune_only, library=True), stock),
        fused=worst(run(out, library=True), stock),
        plain=max(worst(run(prune_only, library=False), stock), worst(run(out, library=False), stock)),
        faults=tuple(f for model in (prune_only, out) for f in failed(validate(path, model, feeds, threads=1))),
        same=all(bit_equal(got, original) for got in kept_all),
        dense=max(worst(got, original) for got in kept_all),
        whole=max(worst(run(whole, library=library), original) for library in (True, False)),
    )


@pytest.mark.parametrize("path", MODELS, ids=name)
def test_zoo(path: Path, tmp_path: Path) -> None:
    outcome = compare(path, tmp_path)
    if outcome.refused:
        assert REFUSED.get(name(path), "no linear layer with a constant weight") in outcome.refused
        return
    assert name(path) not in REFUSED
    if outcome.not_run:
        pytest.skip(outcome.not_run)
    assert outcome.faults == ()
    if name(path) in HALF:
        assert outcome.dense <= 2e-2
        return
    assert outcome.prune_only <= 1e-5
    assert outcome.same
    if outcome.pruned["NMMatMulNBits"]:
        # The original rounds its activations otherwise, and the next layer may keep other channels for it: `faults` are
        # of each layer on what it saw, and without a selection the whole must be as close as that rounding.
        assert outcome.whole <= ROUNDED_ACTIVATIONS
        return
    assert outcome.fused <= 1e-4
    assert outcome.plain <= 1e-4
    assert outcome.whole <= 1e-4


def failed(report: Report) -> list[str]:
    return [f"{c.name}: {c.detail}" for c in report.checks if not c.passed]
