"""Measure a model beside another: the calls that both can run in paired rounds, then the profile and the loading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nmonnx.bench.layers import read_layers
from nmonnx.bench.machine import read_bandwidth
from nmonnx.bench.memory import loading
from nmonnx.bench.pair import Pair
from nmonnx.bench.profile import profiles
from nmonnx.bench.result import Bench, Result
from nmonnx.bench.rounds import paired
from nmonnx.errors import InputError, RunError, UsageError
from nmonnx.onnx_file.graph import load
from nmonnx.report import counted

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    threads, tokens, past   every combination of them is a case
    rounds                  paired rounds of each case
    profiled                calls of each case under ONNX Runtime's profiler; 0: none
    loads                   fresh processes that load each model; 0: none

    Raises UsageError for numbers that cannot be.
    """

    threads: tuple[int, ...]
    tokens: tuple[int, ...] = (1, 4, 16, 64, 256)
    past: tuple[int, ...] = (0, 256)
    rounds: int = 11
    profiled: int = 3
    loads: int = 3

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("tokens", 1), ("past", 0)):
            values = getattr(self, name)
            if not values or min(values) < least:
                raise UsageError(f"{name} must be whole numbers from {least} up, such as {least},{least + 1}")


def bench(dense: Path, sparse: Path, plan: Plan, say: Say = lambda what: None) -> Bench:
    """Measure `sparse` beside `dense`; `say` is told what is being done. Raises UsageError when they cannot be
    compared, RunError when no call is measured, InputError or ModelError for a file that cannot be opened."""
    done = Bench((dense, sparse), (read_layers(load(dense)), read_layers(load(sparse))))
    for threads in plan.threads:
        vocabulary = _time(done, threads, plan, say)
        results = [result for result in done.results if result.case.threads == threads]
        if plan.profiled and results:
            say(f"profile, {counted(threads, 'thread')}")
            _profile(done, results, vocabulary, plan.profiled)
        say(f"memory bandwidth, {counted(threads, 'thread')}")
        done.memory[threads] = read_bandwidth(threads)
    if not done.results:
        why = done.notes[-1].rstrip(".")
        raise RunError(f"{why}; no other call was measured either (a graph traced for one length needs it by --tokens)")
    if plan.loads:
        say("load time and memory")
        case = done.results[0].case
        done.loadings = loading(done.paths, case.threads, case.tokens, case.past, plan.loads)
    return done


def _time(done: Bench, threads: int, plan: Plan, say: Say) -> int:
    """Add the results of every case with so many threads; returns the token ids that both models know. The two are
    closed again at the end, so that what follows has the memory."""
    pair = Pair(done.paths, threads)
    cases, notes = pair.cases(plan.tokens, plan.past)
    for note in (*pair.notes(), *notes):
        done.note(note)
    for index, case in enumerate(cases):
        say(f"{case}, {index + 1} of {len(cases)}")
        try:
            times = paired(pair.runs(case), plan.rounds)
        except InputError as e:
            done.note(str(e))
            continue
        dense, sparse = (sum(layer.read(case.tokens, case.past) for layer in part.linear) for part in done.layers)
        done.results.append(Result(case, times, (dense, sparse)))
    return pair.vocabulary


def _profile(done: Bench, results: list[Result], vocabulary: int, calls: int) -> None:
    cases = [result.case for result in results]
    dense, sparse = (
        profiles(path, cases, vocabulary, layers.served, calls)
        for path, layers in zip(done.paths, done.layers, strict=True)
    )
    for result in results:
        result.profiles = (dense[result.case], sparse[result.case])
