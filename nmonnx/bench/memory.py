"""Load time and peak memory of a model, in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nmonnx.errors import RunError

_CODE = "import sys; from nmonnx.bench.memory import measure_here; measure_here(*sys.argv[1:])"


@dataclass(frozen=True)
class Loading:
    """Medians over `processes` processes.

    seconds   from the file to a session, the file being in memory already when it was read before
    peak      most bytes that the process held at a time (resident), until the end of its first call
    before    of them, bytes that it held before it opened the model: Python and the libraries
    """

    seconds: float
    peak: float
    before: float
    processes: int


def loading(paths: Sequence[Path], threads: int, tokens: int, past: int, times: int) -> list[Loading]:
    """Load each model and run one call of it, in `times` fresh processes each, in turn. Raises RunError."""
    found: list[list[dict[str, float]]] = [[] for _ in paths]
    for index in range(times):
        for at in range(len(paths))[:: -1 if index % 2 else 1]:
            found[at].append(_measure(paths[at], threads, tokens, past))
    middle = [{key: statistics.median(one[key] for one in ones) for key in ones[0]} for ones in found]
    return [Loading(**values, processes=times) for values in middle]


def _measure(path: Path, threads: int, tokens: int, past: int) -> dict[str, float]:
    command = [sys.executable, "-c", _CODE, str(path), str(threads), str(tokens), str(past)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if run.returncode:
        last = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        raise RunError(f"{path} could not be loaded in a process of its own: {last}")
    return json.loads(run.stdout)


def measure_here(path: str, threads: str, tokens: str, past: str) -> None:
    """Load the model and run it once in this process; print the figures as JSON."""
    from nmonnx.bench.subject import Subject

    before, start = _peak(), time.perf_counter()
    subject = Subject(Path(path), int(threads))
    seconds = time.perf_counter() - start
    subject.call(int(tokens), int(past), subject.vocabulary)
    print(json.dumps({"seconds": seconds, "peak": _peak(), "before": before}))


def _peak() -> int:
    """Bytes; getrusage would count what the parent held when it forked."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
