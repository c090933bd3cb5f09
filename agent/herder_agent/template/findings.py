"""What an audit says: findings, each by one rule, and the verdict that follows from them."""

from __future__ import annotations

SAFE = "safe"
UNSAFE = "unsafe"
#: Nothing known speaks against it; the canary decides.
UNKNOWN = "unknown"
ALLOWED = "allowed"
NOTE = "note"

FRESH = 'or use start="fresh"'
IN_TASK = f"use it in the tasks instead of before them (import in preload, call in the task), {FRESH}"


class Finding:
    """`rule` is its id, `seen` what was found, `reason` why it matters, `cure` what to do; `verdict`: "unsafe",
    "unknown", "allowed" or "note"."""

    __slots__ = ("cure", "reason", "rule", "seen", "verdict")

    def __init__(self, rule: str, seen: str, reason: str = "", cure: str = "", verdict: str = UNSAFE) -> None:
        self.rule = rule
        self.seen = seen
        self.reason = reason
        self.cure = cure
        self.verdict = verdict

    def encode(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in self.__slots__}

    def __str__(self) -> str:
        return f"{self.rule}: {self.seen}" + (f": {self.reason}" if self.reason else "")


class Report:
    """What one audit found. `kept` are the descriptors which children must have, too."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.applied: list[str] = []
        self.kept: list[int] = []
        self.thread_count = 1

    @property
    def verdict(self) -> str:
        verdicts = {finding.verdict for finding in self.findings}
        return UNSAFE if UNSAFE in verdicts else UNKNOWN if UNKNOWN in verdicts else SAFE

    def first_unsafe(self) -> Finding | None:
        return next((finding for finding in self.findings if finding.verdict == UNSAFE), None)
