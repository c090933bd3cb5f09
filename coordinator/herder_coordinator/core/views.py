"""What others may see of the state: pure reads, for queries, the page, metrics and the shell's own questions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from herder_coordinator.core import quarantine, shares
from herder_coordinator.core.placement import could_ever_fit
from herder_coordinator.core.state import OUTCOMES, UNITS, Job, Node, State, task_state_counts
from herder_shared.ids import BlobId, ClusterId, JobId, NodeName, task_id
from herder_shared.states import AgentState, Outcome, TaskState
from herder_shared.wire.messages import (
    JobInfo,
    Key,
    KeyInfo,
    Logs,
    NodeFacts,
    NodeInfo,
    OwnerInfo,
    StatusInfo,
    TaskInfo,
    WorkloadInfo,
)
from herder_shared.wire.session import Peer

#: Owners that one answer lists.
OWNERS_LISTED_MAX = 100
#: Tasks that one answer about a job lists.
TASKS_LISTED_MAX = 10_000


def nodes(state: State, now_s: float) -> list[NodeInfo]:
    """Every node that is known, in the order in which they came."""
    return [_node_info(state, name, now_s) for name in state.nodes]


def _node_info(state: State, name: NodeName, now_s: float) -> NodeInfo:
    node = state.nodes[name]
    running = sum(1 for task in node.attempts.values() if task.state is TaskState.RUNNING)
    return NodeInfo(
        facts=node.facts or NodeFacts(node=name, cores=0, memory_bytes=0),
        state=node.state,
        running=running,
        assigned_cores=(node.cores - node.free_cores) / 10_000,
        report=node.report,
        silent_s=max(0.0, now_s - node.heard_s),
        kept_for=next(iter(node.reserved.queues), "") if node.reserved is not None else "",
        ends_in_s=max(0.0, node.ends_s - now_s) if node.ends_s < math.inf else None,
        why=why_draining(state, node) if node.draining else "",
        suspect=task_id(node.suspect.job.id, node.suspect.index)
        if node.suspect is not None and quarantine.holds_suspect(node)
        else "",
    )


def why_draining(state: State, node: Node) -> str:
    """Why it takes nothing new; "" where somebody asked for that, or it takes something."""
    return node.fault or ("it will end soon" if node.is_ending else "") or state.drained.get(node.name, "")


def drain_reason(state: State, node: Node) -> Literal["asked", "fault", "ending", "nothing_starts"]:
    """The same as one word."""
    if node.fault:
        return "fault"
    if node.is_ending:
        return "ending"
    return "nothing_starts" if state.drained.get(node.name) else "asked"


def is_draining(state: State, node: NodeName) -> bool:
    """Whether the node has been told, or is to be told, to take nothing new."""
    return node in state.drained


def why_not(state: State, serial: str) -> str:
    """Why a peer with this certificate is not let in; "" when it is."""
    if serial not in state.revoked:
        return ""
    return (
        f"the certificate {serial} was revoked (`herder keys revoke`): nothing is done for it any more. Have a new one"
        " issued: `herder keys issue` for a user; for a node, remove its identity and run `herder up` again"
    )


def keys(state: State, connected: Mapping[Peer, int]) -> list[KeyInfo]:
    """The certificates that were revoked, and those with which somebody is connected."""
    found = {serial: KeyInfo(key, revoked=True) for serial, key in state.revoked.items()}
    for peer, connections in connected.items():
        key = Key(peer.serial, peer.role, peer.name)
        found[peer.serial] = KeyInfo(key, peer.serial in state.revoked, connections)
    return list(found.values())


def jobs(state: State, now_s: float) -> list[JobInfo]:
    """The jobs that are known, oldest first; forgotten ones by their summaries."""
    return [*state.summaries.values(), *(job_info(one, now_s) for one in state.jobs.values())]


def job(state: State, job_id: JobId, now_s: float) -> JobInfo | None:
    found = state.jobs.get(job_id)
    return job_info(found, now_s) if found is not None else state.summaries.get(job_id)


def job_info(job: Job, now_s: float) -> JobInfo:
    """A job, as lists show it."""
    return JobInfo(
        job=job.id,
        name=job.spec.name,
        owner=job.owner,
        workload=job.spec.workload.name,
        state=_job_state(job),
        counts=task_state_counts(job),
        outcomes=dict(job.ended_by),
        tasks=job.count,
        closed=job.closed,
        detached=job.spec.detached,
        kind=job.spec.kind,
        age_s=max(0.0, now_s - job.opened_s),
        workload_kind=job.spec.workload.kind,
        priority=job.priority,
        paused=job.paused,
    )


def _job_state(job: Job) -> Literal["open", "running", "done", "failed", "cancelled"]:
    if job.ended < job.count:
        return "running"
    if not job.closed:
        return "open"
    succeeded = job.ended_by.get(Outcome.SUCCEEDED, 0)
    if succeeded == job.count and not (job.cancelled and not job.count):
        return "done"
    failed = job.count - succeeded - job.ended_by.get(Outcome.CANCELLED, 0)
    return "failed" if failed else "cancelled"


def tasks(state: State, job_id: JobId) -> list[TaskInfo] | None:
    """The job's first `TASKS_LISTED_MAX` tasks in order. None: no such job."""
    found = state.jobs.get(job_id)
    if found is None:
        return None
    listed: list[TaskInfo] = []
    for index, code in enumerate(found.outcomes[:TASKS_LISTED_MAX]):
        task = found.tasks.get(index)
        if code:
            end = state.end_of((job_id, index))
            usage = end.usage if end is not None else None
            listed.append(
                TaskInfo(
                    index,
                    TaskState.ENDED,
                    OUTCOMES[code],
                    usage.node or None if usage is not None else None,
                    usage.attempt if usage is not None else 0,
                )
            )
        elif task is None:
            listed.append(TaskInfo(index, TaskState.PENDING))
        else:
            node = task.node.name if task.node is not None else None
            listed.append(TaskInfo(index, task.state, None, node, task.ordinal))
    return listed


def workloads(state: State) -> list[WorkloadInfo]:
    """Each workload with what every node says of it."""
    return [
        WorkloadInfo(
            key=key,
            name=kept.spec.name,
            start=kept.spec.start,
            reports={node.name: node.reports[key] for node in state.nodes.values() if key in node.reports},
            demoted=kept.demoted,
        )
        for key, kept in state.workloads.items()
    ]


def owners(state: State) -> tuple[OwnerInfo, ...]:
    """Who has tasks that have not ended, or holds or held cores: those who use most for their weight first."""
    with_work = {job.owner for job in state.jobs.values() if job.ended < job.count}
    weights = sum(state.owners[owner].weight for owner in with_work)
    found = []
    for name, share in state.owners.items():
        mean = shares.mean_now(share, state)
        if name in with_work or share.held or mean >= shares.GRAIN:
            found.append(
                OwnerInfo(
                    owner=name,
                    cores=share.held / UNITS,
                    mean_cores=mean / UNITS,
                    weight=share.weight,
                    share=share.weight / weights if name in with_work else 0.0,
                )
            )
    return tuple(sorted(found, key=lambda one: (-(one.cores + one.mean_cores) / one.weight, one.owner)))


def status(state: State, version: str = "", http: str = "") -> StatusInfo:
    return StatusInfo(
        cluster=ClusterId(state.cluster),
        epoch=state.epoch,
        version=version,
        tasks=task_counts(state),
        agents=agent_counts(state),
        jobs=len(state.jobs),
        clients=sum(1 for client in state.clients.values() if client.session),
        http=http,
        owners=owners(state)[:OWNERS_LISTED_MAX],
        paused_jobs=sum(1 for one in state.jobs.values() if one.paused),
        kept_nodes=len(state.reservations),
        suspects=suspects(state),
    )


def suspects(state: State) -> int:
    """Tasks that may have cost their node: those that are proving themselves, and those that wait for their turn."""
    placed = sum(1 for node in state.nodes.values() if quarantine.holds_suspect(node))
    queued = 0
    for group in state.busy.values():
        for queue in group.queues.values():
            queued += sum(1 for task in queue.suspects if task.queued is queue.suspects)
    return placed + queued


def task_counts(state: State) -> dict[TaskState, int]:
    """Tasks of the jobs that are known, by state."""
    counts = dict.fromkeys(TaskState, 0)
    for one in state.jobs.values():
        for task_state, count in task_state_counts(one).items():
            counts[task_state] += count
    return counts


def agent_counts(state: State) -> dict[AgentState, int]:
    counts = dict.fromkeys(AgentState, 0)
    for node in state.nodes.values():
        counts[node.state] += 1
    return counts


def logs(state: State, job_id: JobId, index: int) -> Logs | None:
    """What the task's last attempt wrote. None: not ended, nothing captured, or no longer kept."""
    end = state.end_of((job_id, index))
    return end.logs if end is not None else None


def work_waiting(state: State, node: NodeName) -> bool:
    """Whether some pending task could run on this node if it had room."""
    found = state.nodes.get(node)
    return found is not None and any(could_ever_fit(found, group.request) for group in state.busy.values())


def is_blob_needed(state: State, blob: BlobId) -> bool:
    """Whether anything still refers to the blob. To be asked when a `DropBlobs` is carried out: since it was decided,
    another task may have come with the same bytes."""
    return blob in state.blobs
