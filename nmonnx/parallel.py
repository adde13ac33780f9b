"""Independent jobs in several processes or on several machines, through joblib: loky, Dask or Ray."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

from nmonnx.errors import RunError, UsageError

BACKENDS = ("loky", "dask", "ray")
INSTALL = "pip install 'nmonnx[sweep]'"
_NEEDS = {"loky": ("joblib",), "dask": ("joblib", "dask", "distributed"), "ray": ("joblib", "ray")}

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class Workers:
    """Where jobs run.

    backend    "loky": processes on this machine; "dask": workers of a Dask scheduler; "ray": a Ray cluster. With one
               job and loky everything runs in this process, and joblib is not needed
    jobs       jobs at a time; a running Dask scheduler or Ray cluster decides itself
    scheduler  address of a Dask scheduler or Ray cluster; "": a local one is started with `jobs` processes and stopped
               at the end

    Raises UsageError for a backend that is not known or not installed.
    """

    backend: str = "loky"
    jobs: int = 1
    scheduler: str = ""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UsageError(f"backend {self.backend!r} is not one of {', '.join(BACKENDS)}")
        if self.jobs < 1:
            raise UsageError(f"{self.jobs} jobs are too few; give 1 or more")
        if self.scheduler and self.backend == "loky":
            raise UsageError("--scheduler is for the backends dask and ray; loky has none")
        missing = [] if self.alone else [name for name in _NEEDS[self.backend] if find_spec(name) is None]
        if missing:
            how = INSTALL if self.backend != "ray" else f"{INSTALL} and pip install ray"
            raise UsageError(f"the backend {self.backend} needs {' and '.join(missing)}; install with {how}")

    @property
    def alone(self) -> bool:
        """Whether jobs run one after another in this process."""
        return self.backend == "loky" and self.jobs == 1

    def threads(self) -> int:
        """Threads of a job that share this machine's cores evenly, at least 1. A job's results are those of this
        number of threads, whatever the backend."""
        return max((os.cpu_count() or 1) // self.jobs, 1)

    @contextmanager
    def open(self) -> Iterator[Pool]:
        """The pool that runs jobs, until the block ends. Raises RunError when the scheduler cannot be reached."""
        if self.alone:
            yield Pool(None)
            return
        import joblib

        with ExitStack() as stack:
            if self.backend == "dask":
                _start_dask(stack, self)
            elif self.backend == "ray":
                _start_ray(stack, self)
            count = -1 if self.scheduler else self.jobs
            stack.enter_context(joblib.parallel_config(self.backend, n_jobs=count))
            returns = "list" if self.backend == "ray" else "generator_unordered"  # ray knows lists alone
            yield Pool(count, returns, os.getpid() if self.backend == "loky" else None)


@dataclass(frozen=True)
class Pool:
    """Runs jobs with `jobs` of joblib's backend that is active; None: here, one by one. `returns` is how results come,
    in joblib's words; `parent` the process without which workers end, where they are its children."""

    jobs: int | None
    returns: str = "generator_unordered"
    parent: int | None = None

    def run(self, function: Callable[[_In], _Out], arguments: Sequence[_In]) -> Iterator[_Out]:
        """`function` of each argument, as they are done, in any order. Function, arguments and results are pickled:
        pass the paths of large things. Raises RunError when a worker dies, and what `function` raises."""
        if self.jobs is None or not arguments:
            yield from map(function, arguments)
            return
        import joblib

        parallel = joblib.Parallel(n_jobs=self.jobs, batch_size=1, return_as=self.returns)
        job = joblib.delayed(_guarded)
        try:
            yield from parallel(job(self.parent, function, argument) for argument in arguments)
        except Exception as e:
            if type(e).__name__ not in ("TerminatedWorkerError", "KilledWorker", "WorkerCrashedError"):
                raise
            raise RunError("a worker process died (out of memory?); start again with fewer --jobs") from e


def _guarded(parent: int | None, function: Callable[[_In], _Out], argument: _In) -> _Out:
    """Runs in the worker, which ends soon after its parent does: loky's would wait for minutes, with the model."""
    watch = "nmonnx parent"
    if parent is not None and all(thread.name != watch for thread in threading.enumerate()):
        threading.Thread(target=_end_with, args=(parent,), name=watch, daemon=True).start()
    return function(argument)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _start_dask(stack: ExitStack, workers: Workers) -> None:
    from distributed import Client, LocalCluster

    try:
        if workers.scheduler:
            client: Any = Client(workers.scheduler, timeout="10s", set_as_default=True)
        else:
            cluster = stack.enter_context(
                LocalCluster(n_workers=workers.jobs, threads_per_worker=1, dashboard_address=None, silence_logs=50)
            )
            client = Client(cluster)
    except (OSError, ValueError) as e:
        raise RunError(f"the Dask scheduler {workers.scheduler!r} cannot be reached: {_first_line(e)}") from e
    stack.enter_context(client)


def _start_ray(stack: ExitStack, workers: Workers) -> None:
    import ray
    from ray.util.joblib import register_ray

    try:
        if workers.scheduler:
            ray.init(address=workers.scheduler, log_to_driver=False)
        else:
            ray.init(num_cpus=workers.jobs, include_dashboard=False, log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as e:
        raise RunError(f"the Ray cluster {workers.scheduler!r} cannot be reached: {_first_line(e)}") from e
    stack.callback(ray.shutdown)
    register_ray()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
