"""Commands, exec'd and reaped by the bare template."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from agent.template import driver


def _started(answer: driver.Child | driver.Head) -> driver.Child:
    assert isinstance(answer, driver.Child), answer
    return answer


def test_command_runs_with_its_output_environment_folder_and_status(spawner: driver.Template, tmp_path: Path) -> None:
    script = "echo $COLOUR; pwd; echo oops >&2; exit 3"
    environment = {"PATH": os.environ["PATH"], "COLOUR": "red"}
    child = _started(spawner.exec(["sh", "-c", script], cwd=str(tmp_path), env=environment))
    assert child.output() == (f"red\n{tmp_path}\n", "oops\n")
    assert os.waitstatus_to_exitcode(child.exited()["status"]) == 3


def test_command_reads_its_stdin(spawner: driver.Template) -> None:
    child = _started(spawner.exec(["cat"], stdin=b"given\n"))
    assert child.output()[0] == "given\n"


def test_command_without_stdin_reads_nothing(spawner: driver.Template) -> None:
    assert _started(spawner.exec(["cat"])).output()[0] == ""


def test_command_has_limits_cpus_session_and_default_signals(spawner: driver.Template) -> None:
    cpu = min(os.sched_getaffinity(0))
    code = (
        "import os, resource; print(resource.getrlimit(resource.RLIMIT_CORE), sorted(os.sched_getaffinity(0)), "
        "os.getsid(0) == os.getpid(), sorted(os.listdir('/proc/self/fd')), "
        "[line.split()[1] for line in open('/proc/self/status') if line.startswith(('SigIgn', 'SigBlk'))])"
    )
    limits = {"RLIMIT_CORE": [0, 0]}
    child = _started(spawner.exec([sys.executable, "-c", code], cpus=[cpu], limits=limits))
    text = child.output()[0]
    assert text.startswith(f"(0, 0) [{cpu}] True ['0', '1', '2', '3'] ")
    # Python sets SIGPIPE and SIGXFSZ to be ignored itself: so another program is asked.
    grep = _started(spawner.exec(["grep", "Sig[BI]", "/proc/self/status"]))
    # Two signals belong to libc, which lets nobody change what whoever started the tests made of them.
    changeable = sum(1 << (number - 1) for number in signal.valid_signals())
    masks = [int(line.split()[1], 16) & changeable for line in grep.output()[0].splitlines()]
    assert masks == [0, 0]


def test_command_that_is_not_there_is_told(spawner: driver.Template) -> None:
    answer = spawner.exec(["no-such-command-anywhere"], env={"PATH": "/bin"})
    assert isinstance(answer, dict)
    assert answer["t"] == "fork_failed"
    assert answer["message"] == "command not found: 'no-such-command-anywhere' on PATH (/bin)"


def test_command_that_may_not_be_executed_is_told(spawner: driver.Template, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    answer = spawner.exec([str(script)])
    assert isinstance(answer, dict)
    assert "permission denied" in answer["message"]


def test_missing_working_folder_is_told(spawner: driver.Template) -> None:
    answer = spawner.exec(["true"], cwd="/no/such/folder")
    assert isinstance(answer, dict)
    assert answer["message"] == "cannot enter the working folder '/no/such/folder': No such file or directory"


def test_command_enters_its_groups_before_it_runs_or_does_not_run(spawner: driver.Template, tmp_path: Path) -> None:
    entrance = tmp_path / "cgroup.procs"
    entrance.write_text("")
    child = _started(spawner.exec(["cat", str(entrance)], groups=[str(entrance)]))
    assert child.output()[0] == "0"
    answer = spawner.exec(["true"], groups=[str(tmp_path / "gone")])
    assert isinstance(answer, dict)
    assert answer["message"] == "cannot enter its control group: No such file or directory"


def test_command_is_killed_with_all_its_processes(spawner: driver.Template) -> None:
    child = _started(spawner.exec(["sh", "-c", "setsid sleep 600 & echo $!; wait"]))
    pid = int(os.read(child.out, 100))
    spawner.kill(child, signal.SIGTERM)
    assert child.exited()["status"] == signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
