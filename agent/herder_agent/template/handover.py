"""How setup's value gets from the process that ran setup to those that are no forks of it, and what is said of that.

A template whose audit fails after `setup` publishes the value (`publish`) before it begins anew; its second life maps
it, where that leaves the process safe to fork, or else each child does. A template that ends in "fresh", or that was
started only to publish, hands the descriptor to the agent, which passes it to each fresh interpreter. Who holds what:
the memory file's descriptor is kept by the template (its children close it: the mapping is theirs already) and by the
agent.
"""

from __future__ import annotations

import os

from . import preload, publish

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Handover:
    """`fd` is the published value's memory file, or -1. `refusal` says why there is none, where it was tried."""

    def __init__(self, opening: dict[str, Any]) -> None:
        self.fd: int = opening.get("value_fd", -1)
        self.refusal: str = opening.get("not_published", "")
        self._workload: dict[str, Any] = opening["workload"]
        if self.fd >= 0:
            os.set_inheritable(self.fd, False)

    def publish(self, steps: preload.Preload) -> None:
        """Publish the value, where setup ran here. Once.

        None is none: such a setup is for its side effects alone, which only those processes have in which it runs.
        """
        if steps.setup_from != "ran" or self.fd >= 0 or self.refusal:
            return
        if steps.value is None:
            self.refusal = "it is None, so setup is run for its side effects"
            return
        try:
            self.fd = publish.publish(steps.value)
        except publish.NotPublished as error:
            self.refusal = str(error)

    def hand_on(self, steps: preload.Preload) -> dict[str, Any]:
        """For the next life of this template: what of its `open` is new."""
        if self.fd >= 0:
            os.set_inheritable(self.fd, True)
        return {"value_fd": self.fd, "not_published": self.refusal, "setup_s": steps.setup_s}

    def tasks_max(self, steps: preload.Preload, rest: list[str]) -> int:
        """Tasks per child. One that has to run setup itself is used again, unless the user has said how often."""
        asked = int(self._workload.get("max_tasks_per_child", 1))
        if asked == 1 and not self._workload.get("max_tasks_given") and self._mode(steps, rest) == "per child":
            return 0
        return asked

    def tell(self, steps: preload.Preload, rest: list[str] | None = None) -> dict[str, Any]:
        """What `ready` says of setup's value. `rest`: the steps that forked children take; None when none are
        forked."""
        return {
            "setup_mode": self._mode(steps, rest),
            "setup_s": steps.setup_s,
            "not_published": self.refusal,
            "value_fd": self.fd,
        }

    def _mode(self, steps: preload.Preload, rest: list[str] | None) -> str:
        if preload.SETUP not in steps.names:
            return ""
        if rest is not None and preload.SETUP not in rest and steps.setup_from == "ran":
            return "forked"
        if self.fd >= 0:
            return "mapped"
        # A fresh interpreter's, of which nobody knows yet: a publisher will be asked.
        return "per child" if rest is not None or self.refusal else ""
