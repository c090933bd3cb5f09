"""What is durable of a state, as plain values that can be compared."""

from __future__ import annotations

from typing import Any

from herder_coordinator.core.state import State
from herder_shared.ids import BlobId
from herder_shared.states import TaskState


def digest(state: State) -> dict[str, Any]:
    """All that a replay must bring back. Running counts as assigned: starts are not recorded."""
    return {
        "jobs": {
            job.id: (
                job.count,
                job.closed,
                job.cancelled,
                bytes(job.outcomes),
                job.base,
                list(job.ends),
                {
                    index: (
                        TaskState.ASSIGNED if task.state is TaskState.RUNNING else task.state,
                        task.attempt,
                        task.ordinal,
                        task.node.name if task.node is not None else None,
                        (task.failures, task.crashes, task.killed_on, task.avoid, task.fresh, task.reran),
                        task.suspect,
                        (task.cancel, task.cancel_pending),
                        task.values,
                    )
                    for index, task in sorted(job.tasks.items())
                    if task.attempt[0] or task.item.deps or task.cancel_pending
                },
            )
            for job in state.jobs.values()
        },
        "nodes": {
            node.name: (node.incarnation, sorted(node.attempts)) for node in state.nodes.values() if node.attempts
        },
        "drained": list(state.drained),
        "revoked": sorted(state.revoked),
        "demoted": {key: kept.demoted for key, kept in state.workloads.items() if kept.demoted and kept.jobs},
        "blobs": _blobs(state),
        "functions": sorted(state.functions),
        "summaries": [(info.job, info.tasks, info.outcomes) for info in state.summaries.values()],
    }


def _blobs(state: State) -> dict[BlobId, int]:
    """References, without those of the acknowledged records that are kept for a while."""
    blobs = dict(state.blobs)
    for _, end in state.recent.items():
        if end.result is not None and end.result.blob is not None:
            blobs[end.result.blob] -= 1
    return {blob: uses for blob, uses in sorted(blobs.items()) if uses}
