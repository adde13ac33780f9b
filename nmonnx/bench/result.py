"""What was measured of two models, one beside the other. Pairs are of the first model and the second."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nmonnx.bench import machine
from nmonnx.bench.layers import Layers
from nmonnx.bench.memory import Loading
from nmonnx.bench.profile import Profile
from nmonnx.bench.rounds import Interval, median_interval
from nmonnx.bench.subject import Case

NAMES = ("dense", "sparse")
"""The first model and the second, whatever they are."""

Two = tuple[float, float]


@dataclass
class Result:
    """One case.

    times     seconds of a call, [rounds, 2]
    read      bytes of the linear layers' weights that a call reads
    profiles  where the time of a call goes; None where that was not asked
    """

    case: Case
    times: np.ndarray
    read: tuple[int, int]
    profiles: tuple[Profile, Profile] | None = None

    @property
    def seconds(self) -> Two:
        """Medians of the rounds."""
        dense, sparse = np.median(self.times, axis=0)
        return float(dense), float(sparse)

    @property
    def ratio(self) -> float:
        """Median over the rounds of the second model's time in units of the first's."""
        return float(np.median(self.times[:, 1] / self.times[:, 0]))

    @property
    def interval(self) -> Interval | None:
        """Where the median ratio lies; None for too few rounds."""
        return median_interval(self.times[:, 1] / self.times[:, 0])

    @property
    def rates(self) -> Two:
        """Tokens per second."""
        return self.case.tokens / self.seconds[0], self.case.tokens / self.seconds[1]

    @property
    def bandwidth(self) -> Two:
        """Bytes of weights per second."""
        return self.read[0] / self.seconds[0], self.read[1] / self.seconds[1]

    def data(self, stored: tuple[int, int]) -> dict[str, Any]:
        """All of it for JSON; `stored` are the bytes of the linear layers' weights."""
        interval, tokens = self.interval, self.case.tokens
        skipped = (stored[0] - self.read[0], stored[1] - self.read[1])
        return {
            **asdict(self.case),
            "rounds": len(self.times),
            "times": self.times.tolist(),
            "seconds": _named(self.seconds),
            "tokens_per_second": _named(self.rates),
            "ratio": self.ratio,
            "interval": asdict(interval) if interval else None,
            "weights_read": _named(self.read),
            "weights_skipped": _named(skipped),
            "weights_read_per_token": _named((self.read[0] / tokens, self.read[1] / tokens)),
            "weights_skipped_per_token": _named((skipped[0] / tokens, skipped[1] / tokens)),
            "bandwidth": _named(self.bandwidth),
            "profile": _named(tuple(asdict(p) for p in self.profiles)) if self.profiles else None,
        }


@dataclass
class Bench:
    """Everything.

    notes      what the models do not take, and what could not be measured
    memory     bytes per second that the machine reads, by number of threads
    loadings   empty when none were asked for
    """

    paths: tuple[Path, Path]
    layers: tuple[Layers, Layers]
    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    memory: dict[int, float] = field(default_factory=dict)
    loadings: list[Loading] = field(default_factory=list)

    @property
    def stored(self) -> tuple[int, int]:
        """Bytes of the linear layers' weights."""
        dense, sparse = (sum(layer.stored for layer in layers.linear) for layers in self.layers)
        return dense, sparse

    @property
    def roles(self) -> dict[str, str]:
        """Of the linear layers of both."""
        return {**self.layers[1].roles, **self.layers[0].roles}

    def note(self, sentence: str) -> None:
        """Once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def data(self) -> dict[str, Any]:
        """All of it for JSON."""
        models: dict[str, dict[str, Any]] = {
            name: {
                "path": str(path),
                "layers": len(layers.linear),
                "weights": stored,
                "weights_of_one_token": sum(layer.kept for layer in layers.linear),
            }
            for name, path, layers, stored in zip(NAMES, self.paths, self.layers, self.stored, strict=True)
        }
        for name, found in zip(NAMES, self.loadings, strict=False):
            models[name]["loading"] = asdict(found)
        bandwidth = {str(threads): rate for threads, rate in self.memory.items()}
        return {
            "machine": {"cpu": machine.cpu(), "cores": machine.cores(), "read_bandwidth": bandwidth},
            "models": models,
            "cases": [result.data(self.stored) for result in self.results],
            "roles": self.roles,
            "notes": self.notes,
        }


def _named(two: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(NAMES, two, strict=True))
