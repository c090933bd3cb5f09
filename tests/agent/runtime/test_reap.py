"""Processes seen from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from herder_agent.runtime import reap

#: Becomes a subreaper, leaves a grandchild that lives on, sweeps with one known child, and says what is left.
SCRIPT = """
import os, subprocess, sys, time
from herder_agent.runtime.reap import Reaper, become_subreaper, descendants
become_subreaper()
reaper = Reaper()
known = subprocess.Popen(["sleep", "60"])
reaper.known.add(known.pid)
assert reaper.sweep() == set()
subprocess.run(["sh", "-c", "sleep 60 & sleep 60 &"], check=True)
assert len(descendants(os.getpid())) == 3
deadline_s = time.monotonic() + 5
while reaper.sweep():
    assert time.monotonic() < deadline_s
    time.sleep(0.001)
assert descendants(os.getpid()) == [known.pid]
known.kill()
known.wait()
reaper.close()
print("clean")
"""


def test_sweep_kills_what_is_not_known_and_spares_what_is() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == "clean\n", done.stderr


def test_memory_of_a_tree_is_the_sum_of_its_processes() -> None:
    hog = "import time; x = bytearray(30 << 20); print('there', flush=True); time.sleep(60)"
    both = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hog!r}])"
    process = subprocess.Popen([sys.executable, "-c", both], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        tree, tasks = reap.tree_of(process.pid)
        assert tasks == 2
        assert reap.own_bytes(process.pid) >= reap.anon_bytes(process.pid) > 0
        assert tree > (30 << 20) + reap.anon_bytes(process.pid) - 1
        assert reap.anon_bytes(process.pid) < 30 << 20
        assert reap.shared_bytes(process.pid) > 0
    finally:
        for pid in (*reap.descendants(process.pid), process.pid):
            os.kill(pid, 9)
        process.communicate()
    assert reap.anon_bytes(process.pid) == 0


def test_stale_processes_are_known_by_the_whole_mark_alone() -> None:
    marks = ["HERDER_TEST_MARK=one", "HERDER_TEST_MARK=one-more"]
    processes = []
    for mark in marks:
        name, _, value = mark.partition("=")
        processes.append(subprocess.Popen(["sleep", "60"], env={**os.environ, name: value}))
    try:
        deadline_s = time.monotonic() + 5
        while reap.kill_stale(marks[0]) == 0:
            assert time.monotonic() < deadline_s
        assert processes[0].wait(5) == -9
        assert processes[1].poll() is None
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_count_of_kernel_kills_is_readable() -> None:
    assert reap.oom_kills() >= 0
