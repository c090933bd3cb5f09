"""What the user sees while hosts come up: a live table on a terminal, else one plain line for each change."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

_STYLES = {"ready": "green", "failed": "bold red", "stopped": "green", "waiting": "dim"}


class Board:
    """One row a program. Rows may be set from any thread."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._rows: dict[str, tuple[str, str]] = {}
        self._lock = threading.Lock()
        self._live = Live(get_renderable=self._table, console=console, refresh_per_second=8, transient=False)
        self._is_live = console.is_terminal

    def __enter__(self) -> Self:
        if self._is_live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_live:
            self._live.stop()

    def set(self, row: str, state: str, detail: str = "") -> None:
        """Change a row; it is made at its first change."""
        with self._lock:
            if self._rows.get(row) == (state, detail):
                return
            self._rows[row] = (state, detail)
            if not self._is_live:
                line = f"{row}: {state}" + (f" ({detail})" if detail else "")
                self._console.print(Text(line), soft_wrap=True)

    def _table(self) -> Table:
        table = Table(title=self._title, title_justify="left", box=None, pad_edge=False)
        for column in ("program", "state", ""):
            table.add_column(column, overflow="fold")
        with self._lock:
            rows = list(self._rows.items())
        for row, (state, detail) in rows:
            table.add_row(Text(row), Text(state, style=_STYLES.get(state, "")), Text(detail))
        return table
