"""A progress bar with the time left, for work that goes on for minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

Step = Callable[[int, int], None]


@contextmanager
def progress_bar(words: Console, title: str, disable: bool = False) -> Iterator[Step]:
    """A progress bar with the time left; `step(done, total)` moves it."""
    share = TextColumn("{task.percentage:3.0f}%")
    with Progress(
        TextColumn("{task.description}"), BarColumn(), share, TimeRemainingColumn(), console=words, disable=disable
    ) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
