"""`Pattern`: keep n of every m consecutive channels."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nmonnx.errors import UsageError

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
        """Read "8:16". Raises UsageError for anything else."""
        match = re.fullmatch(r"\s*([0-9]{1,6})\s*:\s*([0-9]{1,6})\s*", text)
        if not match:
            raise UsageError(f"pattern {text!r} is not N:M, for example 8:16 (keep 8 of every 16 channels)")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"
