"""What is done on a node, on this machine: probing, starting detached, finding again, stopping."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from herder_launch import node
from herder_launch.errors import HostFailed
from herder_launch.place import LocalPlace, ask
from support.leaks import wait_until

SAYS_HELLO = """
import json, os, signal, sys, threading
fd = int(sys.argv[sys.argv.index("--hello-fd") + 1])
if "--stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.write(fd, json.dumps({"pid": os.getpid(), "address": "127.0.0.1:1"}).encode() + b"\\n")
os.close(fd)
signal.pause()
"""


def _start(folder: Path, *more: str, code: str = SAYS_HELLO) -> dict[str, object]:
    return ask(
        LocalPlace(),
        sys.executable,
        {
            "verb": "start",
            "folder": str(folder),
            "argv": [sys.executable, "-c", code, *more],
            "hello_timeout_s": 10,
            "grace_s": 0.3,
        },
    )


def _stop(folder: Path) -> list[str]:
    request: dict[str, object] = {"verb": "stop", "folders": [str(folder)], "grace_s": 0.3}
    ended: list[str] = ask(LocalPlace(), sys.executable, request)["ended"]
    return ended


def _reap(pid: int) -> None:
    """What was started detached was adopted by the test process."""
    wait_until(lambda: os.waitpid(pid, os.WNOHANG) != (0, 0), 5)


def _program(answer: dict[str, object]) -> dict[str, object]:
    program = answer["program"]
    assert isinstance(program, dict)
    return program


@pytest.mark.slow
def test_a_started_program_outlives_its_starter_and_is_found_and_stopped_by_pid_and_start_time(tmp_path: Path) -> None:
    answer = _start(tmp_path / "p")
    pid = _program(answer)["pid"]
    assert isinstance(pid, int)
    assert answer["already"] is False
    assert os.getsid(pid) == pid
    assert (tmp_path / "p" / "program.json").stat().st_mode & 0o777 == 0o600
    again = _start(tmp_path / "p")
    assert (again["already"], _program(again)["pid"]) == (True, pid)
    assert _stop(tmp_path / "p") == [str(tmp_path / "p")]
    _reap(pid)
    assert _stop(tmp_path / "p") == []


@pytest.mark.slow
def test_a_program_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    pid = _program(_start(tmp_path / "p", "--stubborn"))["pid"]
    assert isinstance(pid, int)
    assert _stop(tmp_path / "p") == [str(tmp_path / "p")]
    _reap(pid)


@pytest.mark.slow
def test_a_program_that_ends_before_its_hello_fails_with_its_own_last_words(tmp_path: Path) -> None:
    with pytest.raises(HostFailed, match="port 7711 is busy"):
        _start(tmp_path / "p", code="raise SystemExit('port 7711 is busy')")
    assert not (tmp_path / "p" / "program.json").exists()


@pytest.mark.slow
def test_another_process_with_the_recorded_pid_is_not_touched(tmp_path: Path) -> None:
    other = subprocess.Popen(["sleep", "600"])
    try:
        (tmp_path / "program.json").write_text(
            json.dumps({"pid": other.pid, "start": 1, "boot": node._boot_id(), "argv": [], "log": ""})
        )
        assert _stop(tmp_path) == []
        assert other.poll() is None
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()


@pytest.mark.slow
def test_an_identity_is_0600_in_a_0700_folder_and_names_with_slashes_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "identity"
    request: dict[str, object] = {"verb": "write_identity", "folder": str(folder), "files": {"key.pem": "secret"}}
    ask(LocalPlace(), sys.executable, request)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "key.pem").stat().st_mode & 0o777 == 0o600
    request["files"] = {"../key.pem": "secret"}
    with pytest.raises(HostFailed, match="not a plain file name"):
        ask(LocalPlace(), sys.executable, request)


@pytest.mark.slow
def test_probing_says_what_this_interpreter_has(tmp_path: Path) -> None:
    request: dict[str, object] = {"verb": "probe", "fingerprint": "0", "modules": ["apsw", "no_such_module"]}
    answer = ask(LocalPlace(), sys.executable, request)
    assert answer["version"] == list(sys.version_info[:3])
    assert answer["missing"] == ["no_such_module"]
    assert answer["herder"]


@pytest.mark.slow
def test_an_interpreter_that_cannot_run_is_an_error_in_one_line() -> None:
    with pytest.raises(HostFailed, match="cannot run /nowhere/python"):
        ask(LocalPlace(), "/nowhere/python", {"verb": "probe"})
    with pytest.raises(HostFailed, match="/bin/false: ended with status 1"):
        ask(LocalPlace(), "/bin/false", {"verb": "probe"})


def test_a_folder_of_somebody_else_or_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(node.NodeError, match="not a folder"):
        node.private_folder(tmp_path / "link")
