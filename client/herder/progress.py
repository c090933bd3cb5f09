"""The progress bar of `Job.wait(progress=True)`, drawn by rich in terminals and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from herder.jobs import JobProgress


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[JobProgress], None]]:
    """Draw a bar while entered; call what it yields with the newest counts."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        line = bar.add_task(name, total=None, state="")

        def show(progress: JobProgress) -> None:
            state = f"{progress.running} running" + (f", {progress.failed} failed" if progress.failed else "")
            bar.update(line, total=progress.total, completed=progress.ended, state=state)

        yield show
