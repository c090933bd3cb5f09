"""What does a forked task cost the node beyond its own process: in the agent, and in the template?

Processor time (`/proc/PID/stat`, user and system, all threads, without that of reaped children) of the agent, of the
workload's templates and of the coordinator over arrays of empty tasks, one process each; divided by the tasks. The
figure is the agent's; the template's, most of which is the kernel's own work for `fork` and `wait`, stands beside it,
with what one naive bare fork costs its parent in the same run.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from herder.cli.bench.figure import (
    RUNS,
    Conditions,
    Figure,
    cluster_of_one,
    median,
    no_op,
    run_array,
    tasks_for,
)
from herder.cli.bench.idle import TICKS_PER_S, cpu_ticks

if TYPE_CHECKING:
    from herder import Client

#: What the last tasks left to do is over by then.
SETTLE_S = 0.3
FORKS = 300


def measure(conditions: Conditions) -> list[Figure]:
    """Microseconds of agent, template and coordinator per task."""
    import herder

    workload = herder.Workload("bench-agent-cpu")
    nothing = no_op()
    with cluster_of_one(conditions) as (cluster, client):
        view = client.options(workload=workload, name="agent-cpu")

        def run(tasks: int) -> None:
            run_array(view, nothing, tasks)

        # A clock tick is 10 ms: enough tasks for a hundred of them.
        tasks = max(500, tasks_for(run, 2 * conditions.seconds))
        agent = next(process.pid for name, process in cluster.processes.items() if name != "coordinator")
        coordinator = cluster.processes["coordinator"].pid
        used: dict[str, list[float]] = {"agent": [], "template": [], "coordinator": []}
        for _ in range(RUNS):
            pids = {"agent": [agent], "template": template_pids(client), "coordinator": [coordinator]}
            before = {name: _used_s(of) for name, of in pids.items()}
            run(tasks)
            time.sleep(SETTLE_S)
            for name, of in pids.items():
                used[name].append(1e6 * (_used_s(of) - before[name]) / tasks)
    bare = bare_fork_parent_us()
    details = {
        "agent": f"{tasks} tasks a run, one process each",
        "template": f"all templates; a bare fork costs its parent {bare:.0f} µs here",
        "coordinator": "for comparison",
    }
    return [
        Figure(
            f"agent-cpu {name}",
            median(values),
            "µs a task",
            250.0 if name == "agent" else None,
            best_is_low=True,
            detail=details[name],
            runs=tuple(values),
        )
        for name, values in used.items()
    ]


def template_pids(client: Client) -> list[int]:
    """The templates of all workloads, replicas too."""
    reports = [report for workload in client.workloads() for report in workload.reports.values()]
    return [template.pid for report in reports for template in report.templates if template.state == "ready"]


def bare_fork_parent_us() -> float:
    """Processor time of this process for one `fork` and `waitpid` of a child that ends at once."""
    before = os.times()
    for _ in range(FORKS):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    after = os.times()
    return 1e6 * (after.user + after.system - before.user - before.system) / FORKS


def _used_s(pids: list[int]) -> float:
    return sum(map(cpu_ticks, pids)) / TICKS_PER_S
