"""Where the time of a call goes, from ONNX Runtime's profile: by operator and by linear layer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime as ort

from nmonnx.bench.layers import INLINED
from nmonnx.bench.subject import Case, Subject

_KERNEL = "_kernel_time"


@dataclass(frozen=True)
class Profile:
    """Seconds of one call.

    by_op    by operator
    by_site  by linear layer, with what a conversion added for it; a prune that serves several counts in equal parts
    """

    by_op: Mapping[str, float]
    by_site: Mapping[str, float]


def profiles(
    path: Path, cases: Sequence[Case], vocabulary: int, served: Mapping[str, tuple[str, ...]], calls: int
) -> dict[Case, Profile]:
    """The mean of `calls` calls of each case, all of one number of threads, after one that does not count.

    served  the nodes by the name that ONNX Runtime gives them, each with the sites that it is there for
    """
    with TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "calls")
        subject = Subject(path, cases[0].threads, options)
        for case in cases:
            run = subject.call(case.tokens, case.past, vocabulary)  # which runs it once
            for _ in range(calls):
                run()
        events = json.loads(Path(subject.session.end_profiling()).read_text())
    every = list(_calls(events))
    made = [every[start + 1 : start + 1 + calls] for start in range(0, len(every), calls + 1)]
    return {case: _profile(nodes, served) for case, nodes in zip(cases, made, strict=True)}


def _calls(events: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The kernels' events of each call, by start."""
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "model_run")
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith(_KERNEL)]
    nodes.sort(key=lambda e: (e["ts"], -e["dur"]))
    for start, end in runs:
        yield [e for e in nodes if start <= e["ts"] < end]


def _profile(calls: Sequence[list[dict[str, Any]]], served: Mapping[str, tuple[str, ...]]) -> Profile:
    by_op: dict[str, float] = {}
    by_site: dict[str, float] = {}
    sites_of = _Finder(served)
    for events in calls:
        for event, micros in _own(events):
            share = micros * 1e-6 / len(calls)
            op = event["args"]["op_name"]
            by_op[op] = by_op.get(op, 0.0) + share
            sites = sites_of(event["name"].removesuffix(_KERNEL))
            for site in sites:
                by_site[site] = by_site.get(site, 0.0) + share / len(sites)
    return Profile(dict(sorted(by_op.items(), key=lambda item: -item[1])), by_site)


def _own(events: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float]]:
    """Each event with the microseconds that are its own: those of an If or a Loop without their bodies'."""
    inner = [0.0] * len(events)
    around: list[int] = []
    for index, event in enumerate(events):
        while around and event["ts"] >= events[around[-1]]["ts"] + events[around[-1]]["dur"]:
            around.pop()
        if around and _has_body(events[around[-1]]):
            inner[around[-1]] += event["dur"]
        around.append(index)
    for event, within in zip(events, inner, strict=True):
        yield event, max(0.0, event["dur"] - within)


def _has_body(event: dict[str, Any]) -> bool:
    return event["args"]["op_name"] in ("If", "Loop", "Scan")


class _Finder:
    """The sites that a node serves. ONNX Runtime's fused nodes are called after one of the nodes that they were made
    of, with something behind; nodes of a function that is called again have a number after its name."""

    def __init__(self, served: Mapping[str, tuple[str, ...]]) -> None:
        self._served = dict(served)

    def __call__(self, name: str) -> tuple[str, ...]:
        if name.startswith(INLINED):
            name = re.sub(r"_token_\d+(?=_)", "", name, count=1)
        if name not in self._served:
            ends = [m.start() for m in re.finditer(r"(?<=\w)(?=\W|_)", name)]
            known = next((name[:end] for end in reversed(ends) if name[:end] in self._served), None)
            self._served[name] = self._served[known] if known else ()
        return self._served[name]
