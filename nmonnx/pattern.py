"""`Pattern`: keep n of every m consecutive channels; `Share`: keep a share of them, wherever they stand."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nmonnx.errors import UnknownWord, UsageError

MAX_GROUP = 64


@dataclass(frozen=True)
class Pattern:
    """N:M: of every `m` consecutive channels the `n` with the best score are kept.

    N is the number **kept** (Wanda, SparseGPT and llm-compressor count the zeroed ones: their 12:16
    is 4:16 here).
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.m <= MAX_GROUP:
            raise UsageError(f"pattern {self}: the group size M must be 1 to {MAX_GROUP}")
        if not 1 <= self.n <= self.m:
            raise UsageError(f"pattern {self}: N is the number kept and must be 1 to M = {self.m}")

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "8:16", or "50%" as a `Share`. Raises UsageError for anything else."""
        if text.strip().endswith("%"):
            return Share.of(text.strip())
        match = re.fullmatch(r"\s*([0-9]{1,6})\s*:\s*([0-9]{1,6})\s*", text)
        if not match:
            raise UnknownWord(
                f"pattern {text!r} is not N:M, for example 8:16 (8 of every 16 channels are kept), nor a share, 50%"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Share(Pattern):
    """Unstructured: of all channels the share n / m is kept; m is 100 or a higher power of ten."""

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise UsageError(f"share {self}: it is the share kept and must be above 0% and at most 100%")

    @classmethod
    def of(cls, text: str) -> Share:
        """Read "50%" or "12.5%". Raises UsageError for anything else."""
        match = re.fullmatch(r"([0-9]{1,3})(?:\.([0-9]{1,4}))?\s*%", text)
        if not match:
            raise UnknownWord(f"share {text!r} is no percentage with at most four decimals, for example 50% or 12.5%")
        decimals = (match[2] or "").rstrip("0")
        return cls(int(match[1] + decimals), 100 * 10 ** len(decimals))

    def __str__(self) -> str:
        return f"{100 * self.n / self.m:.10g}%"


def pattern_text(keep: int, group: int) -> str:
    """What an op with these attributes keeps, as `Pattern.parse` reads it."""
    return f"{keep}:{group}" if group <= MAX_GROUP else f"{100 * keep / group:.10g}%"
