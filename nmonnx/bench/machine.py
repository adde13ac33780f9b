"""The machine: its processor, and how fast it reads memory."""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nmonnx.bench.rounds import seconds

_LEAST_BYTES, _MOST_BYTES = 256 << 20, 1 << 30
_CACHES = 4
"""The buffer is this many times the last cache."""


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def flags() -> frozenset[str]:
    """What the processor can do, in the words of Linux, such as "avx512_vnni"; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    words = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(words.split())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def read_bandwidth(threads: int, size: int | None = None, rounds: int = 5) -> float:
    """Bytes per second that `threads` threads read together, each summing its part of a buffer of `size` bytes (by
    default several times the last cache, at most 1 GiB and a quarter of the free memory); the best of the rounds."""
    buffer = np.ones((size or _size()) // 8)
    parts = np.array_split(buffer, threads)
    with ThreadPoolExecutor(threads) as pool:
        return buffer.nbytes / min(seconds(lambda: list(pool.map(np.add.reduce, parts))) for _ in range(rounds))


def _size() -> int:
    names = [name for name in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE") if name in os.sysconf_names]
    cache = max((os.sysconf(name) for name in names), default=0)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(max(_LEAST_BYTES, _CACHES * cache), _MOST_BYTES, max(free // 4, 8 << 20))
