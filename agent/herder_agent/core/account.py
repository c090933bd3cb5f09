"""The account of core-seconds: every second of every core falls in exactly one `CoreState`.

What is held by attempts is counted per state; what is not held is idle, or idle while work waits elsewhere. Since the
held cores and the free ones always sum to the node's cores, the states' seconds sum to cores × elapsed time, by
construction.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from herder_shared.states import CoreState

_HELD = (CoreState.TASK, CoreState.START, CoreState.TRANSFER, CoreState.SYSTEM)


@dataclass(slots=True)
class Account:
    """Invariant: Σ `held` <= `cores`. `now_s` is the time up to which `seconds` counts."""

    cores: float
    now_s: float
    #: The time now. What is held changes more rarely than time passes: `seconds` is brought up to it when it does.
    clock_s: float = 0.0
    work_waiting: bool = False
    held: dict[CoreState, float] = field(default_factory=lambda: dict.fromkeys(_HELD, 0.0))
    seconds: dict[CoreState, float] = field(default_factory=lambda: dict.fromkeys(CoreState, 0.0))

    def advance(self, now_s: float) -> None:
        """Count the time up to now in the states that held until now."""
        self.clock_s = now_s
        elapsed = now_s - self.now_s
        if elapsed <= 0.0:
            return
        self.now_s = now_s
        idle = self.cores
        for state, cores in self.held.items():
            if cores:
                self.seconds[state] += cores * elapsed
                idle -= cores
        self.seconds[CoreState.IDLE_WORK_WAITING if self.work_waiting else CoreState.IDLE] += max(0.0, idle) * elapsed

    def move(self, cores: float, source: CoreState | None, target: CoreState | None) -> None:
        """Cores go from one state to another at `clock_s`; None is idle."""
        if self.clock_s > self.now_s:
            self.advance(self.clock_s)
        if source is not None:
            left = self.held[source] - cores
            self.held[source] = left if left > 1e-9 else 0.0
        if target is not None:
            self.held[target] += cores
