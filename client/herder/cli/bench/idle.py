"""What do a coordinator and an agent cost when there is nothing to do?

CPU time of each process (`/proc/PID/stat`, all its threads) over some seconds with a client connected, a template warm
and no task there, as a share of one core.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from herder.cli.bench.figure import Conditions, Figure, cluster_of_one, no_op

#: A share of 1 % is 5 clock ticks in this time.
IDLE_S_MIN = 5.0
#: What the last task left to do (reaping, journal, reports) is over by then.
SETTLE_S = 1.0

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def measure(conditions: Conditions) -> list[Figure]:
    """The share of a core of coordinator and agent."""
    seconds = max(IDLE_S_MIN, conditions.seconds)
    with cluster_of_one(conditions) as (cluster, client):
        client.submit(no_op()).result()
        names = ("idle-coordinator" if name == "coordinator" else "idle-agent" for name in cluster.processes)
        pids = dict(zip(names, (process.pid for process in cluster.processes.values()), strict=True))
        time.sleep(SETTLE_S)
        before = {name: cpu_ticks(pid) for name, pid in pids.items()}
        began = time.perf_counter()
        time.sleep(seconds)
        took_s = time.perf_counter() - began
        used_s = {name: (cpu_ticks(pid) - before[name]) / TICKS_PER_S for name, pid in pids.items()}
    return [
        Figure(
            name, 100 * used / took_s, "% of a core", 1.0, best_is_low=True, detail=f"{used:.2f} s in {took_s:.1f} s"
        )
        for name, used in used_s.items()
    ]


def cpu_ticks(pid: int) -> int:
    """User and system time of a process so far, all threads, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
