"""Fresh interpreters: what the spawner is asked to exec, and what the interpreter is told first."""

from __future__ import annotations

import sys
from pathlib import Path

from herder_agent.launch import forkserver
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
