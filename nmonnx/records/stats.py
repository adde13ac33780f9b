"""`Stats`: what the inputs of the linear layers look like on a text, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nmonnx.errors import InputError, Unseen, UsageError
from nmonnx.records.accumulator import Accumulator
from nmonnx.records.archive import read_archive, write_archive


@dataclass(frozen=True, eq=False)
class Seen:
    """The activation that one or more linear layers read, of K channels.

    The first token of each window is an attention sink: its activations can be a thousand times those of any other
    token. It counts in `abs_max` alone; `tokens`, `mean`, `rms`, `token_median` and `sample` are without it.

    tokens        tokens that were seen, without each window's first
    mean          [K] float32, mean over tokens
    rms           [K] float32, root of the mean square over tokens
    abs_max       [K] float32, largest magnitude, over all tokens
    token_median  mean over tokens of the lower median over channels (that of torch.median)
    sample        [R, K] float16, tokens spread over the whole text, in their order; what is out of range is clipped
    sums          what all of it was computed from, which merges exactly; None when made by hand
    """

    tokens: int
    mean: np.ndarray
    rms: np.ndarray
    abs_max: np.ndarray
    token_median: float
    sample: np.ndarray
    sums: Accumulator | None = field(default=None, repr=False)

    @classmethod
    def of(cls, sums: Accumulator) -> Seen:
        count = max(sums.tokens, 1)
        return cls(
            tokens=sums.tokens,
            mean=(sums.total / count).astype(np.float32),
            rms=np.sqrt(sums.square / count).astype(np.float32),
            abs_max=sums.abs_max,
            token_median=sums.median / count,
            sample=sums.sample,
            sums=sums,
        )

    def accumulator(self) -> Accumulator:
        """The sums again; of statistics made by hand as exact as float32 is."""
        if self.sums is not None:
            return self.sums
        count, mean, rms = self.tokens, self.mean.astype(np.float64), self.rms.astype(np.float64)
        return Accumulator.from_arrays(
            {
                "counts": np.array([len(self.sample), count, count]),
                "median": np.array(self.token_median * count),
                "total": mean * count,
                "square": rms * rms * count,
                "abs_max": np.asarray(self.abs_max, np.float32),
                "index": np.arange(len(self.sample)),
                "sample": np.asarray(self.sample, np.float16),
            }
        )


@dataclass(frozen=True, eq=False)
class Stats:
    """seen      by site name (`Site.name`); sites that read one activation share one `Seen`
    source    `model_sha256` of the model
    protocol  what was run, in words: text, tokens, window
    unseen    sites that were not seen, with the reason
    """

    seen: Mapping[str, Seen]
    source: str
    protocol: str
    unseen: Mapping[str, str] = field(default_factory=dict)

    def of(self, site: str) -> Seen:
        """What the site reads. Raises Unseen when it was not seen."""
        if site in self.seen:
            return self.seen[site]
        reason = self.unseen.get(site, "the statistics do not speak of it; are they of another model?")
        raise Unseen(site, reason)

    def save(self, path: str | Path) -> Path:
        """Write one .npz file, each activation once. Raises ModelError when it cannot be written."""
        path, parts = Path(path), self._parts()
        numbers = {key: number for number, key in enumerate(parts)}
        about = {
            "source": self.source,
            "protocol": self.protocol,
            "seen": {site: numbers[id(seen)] for site, seen in self.seen.items()},
            "unseen": dict(self.unseen),
        }
        write_archive(path, about, [seen.accumulator() for seen in parts.values()])
        return path

    @classmethod
    def load(cls, path: str | Path) -> Stats:
        """Read what `save` wrote. Raises InputError when the file is missing, damaged or something else."""
        path = Path(path)
        about, parts = read_archive(path)
        try:
            seen = [Seen.of(part) for part in parts]
            sites = {site: seen[number] for site, number in about["seen"].items()}
            return cls(sites, about["source"], about["protocol"], about["unseen"])
        except (KeyError, IndexError, TypeError, AttributeError) as e:
            raise InputError(
                f"{path} holds no finished activation statistics; run `nmonnx calibrate` to its end"
            ) from e

    @classmethod
    def merge(cls, parts: Sequence[Stats]) -> Stats:
        """The statistics of several shards of a text (`calibrate` with `first`), or of several texts, of one model:
        the same as those of all of it at once. Raises UsageError when they are of different models or layers."""
        if not parts:
            raise UsageError("there are no statistics to merge")
        sums: dict[int, Accumulator] = {}
        for part in parts:
            if part.source != parts[0].source or _layers(part) != _layers(parts[0]):
                raise UsageError("statistics of different models, or of different layers, cannot be merged")
            for number, seen in enumerate(part._parts().values()):
                own = seen.accumulator()
                sums.setdefault(number, Accumulator(own.k, own.size)).merge(own)
        merged = [Seen.of(total) for total in sums.values()]
        protocol = "; ".join(dict.fromkeys(part.protocol for part in parts))
        seen_by = {site: merged[number] for site, number in _layers(parts[0])}
        return cls(seen_by, parts[0].source, protocol, dict(parts[0].unseen))

    def _parts(self) -> dict[int, Seen]:
        """Each activation once, in the order of the sites."""
        return {id(seen): seen for seen in self.seen.values()}


def _layers(stats: Stats) -> list[tuple[str, int]]:
    """Every site with the number of its activation."""
    numbers = {key: number for number, key in enumerate(stats._parts())}
    return [(site, numbers[id(seen)]) for site, seen in stats.seen.items()]
