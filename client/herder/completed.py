"""The result of a command task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from herder.outcomes import TaskUsage


@dataclass(frozen=True, slots=True)
class Completed:
    """How a command ended. Of each stream the first and the last 32 KiB are kept; `truncated` when more was written."""

    returncode: int
    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False
    usage: TaskUsage | None = field(default=None, compare=False, repr=False)

    def text(self, encoding: str = "utf-8", errors: str = "replace") -> str:
        """Standard output as text."""
        return self.stdout.decode(encoding, errors)
