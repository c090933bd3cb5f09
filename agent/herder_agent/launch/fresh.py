"""Fresh interpreters: what the spawner is asked to exec, what the interpreter is told and given first."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from herder_agent.launch import forkserver
from herder_shared.ids import WorkloadKey
from herder_shared.wire.messages import WorkloadSpec

_FRESH = Path(forkserver.__file__).parent.parent / "template" / "fresh.py"


def order(child: int, spec: WorkloadSpec, environment: dict[str, str]) -> dict[str, object]:
    """The `exec` order for a fresh interpreter of this workload."""
    return {
        "t": "exec",
        "child": child,
        "kind": "fresh",
        "argv": [*forkserver.interpreter(spec.python or sys.executable), str(_FRESH), "{fd}"],
        "env": environment,
        "cwd": spec.working_dir,
        "cpus": None,
        "limits": {},
        "stdin": False,
    }


class Values:
    """The memory files of the workloads' setup values, as their publishers handed them over. Owns the descriptors."""

    def __init__(self) -> None:
        self._fds: dict[WorkloadKey, int] = {}

    def keep(self, key: WorkloadKey, fd: int) -> None:
        """This is the workload's value from now on."""
        self.drop(key)
        self._fds[key] = fd

    def drop(self, key: WorkloadKey) -> None:
        """Let go of it; who has mapped it keeps it."""
        fd = self._fds.pop(key, -1)
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        """Let go of all."""
        for key in list(self._fds):
            self.drop(key)

    def opening(
        self, spec: WorkloadSpec, tasks_max: int, *, cluster: str, node: str, cloudpickle_path: str
    ) -> tuple[dict[str, object], list[bytes], list[int]]:
        """Head, body and descriptors of the first frame to a fresh interpreter. `tasks_max`: tasks that it will run."""
        head = forkserver.open_head(spec, cluster=cluster, node=node, cloudpickle_path=cloudpickle_path)
        workload = head["workload"]
        assert isinstance(workload, dict)
        workload["max_tasks_per_child"] = tasks_max
        fd = self._fds.get(spec.key, -1)
        head["value"] = fd >= 0
        return head, [spec.setup] if spec.setup else [], [fd] if fd >= 0 else []
