"""The commands against a real cluster: coordinator and agents as processes, this process as the terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import herder
from herder.cli.main import cli
from support.leaks import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.module_state]


@pytest.fixture(scope="module")
def cluster() -> Iterator[herder.LocalCluster]:
    with herder.LocalCluster(cores=2, agents=2) as cluster:
        yield cluster


class Shell:
    """Runs `herder` in this process or, where signals matter, in one of its own."""

    def __init__(self, environ: dict[str, str]) -> None:
        self._environ = environ

    def run(self, *arguments: str, stdin: str | None = None) -> Result:
        return CliRunner(env=self._environ).invoke(cli, arguments, input=stdin)

    def json(self, *arguments: str, status: int = 0) -> Any:
        result = self.run(arguments[0], "--json", *arguments[1:])
        assert result.exit_code == status, result.output
        return json.loads(result.stdout)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        program = [sys.executable, "-m", "herder.cli", *arguments]
        return subprocess.Popen(
            program,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **self._environ},
        )


@pytest.fixture
def shell(cluster: herder.LocalCluster) -> Shell:
    return Shell(cluster.environ)


def ended_in_time(shell: Shell, job: str) -> dict[str, Any]:
    found: dict[str, Any] = shell.json("wait", job, "--timeout", "60")
    return found


def test_command_is_run_and_its_output_shown(shell: Shell) -> None:
    result = shell.run("submit", "--wait", "--", "echo", "hello")
    assert (result.exit_code, result.stdout) == (0, "hello\n")


def test_submitted_commands_are_found_from_python(cluster: herder.LocalCluster, shell: Shell) -> None:
    job = shell.json("submit", "--array", "1-2", "--", "echo {}; exit $(({} - 1))")["job"]
    shell.json("wait", job, "--timeout", "60", status=1)
    with cluster.client() as client:
        found = client.job(job)
        results = found.results(30)
        assert next(results).text() == "1\n"
        with pytest.raises(herder.CommandFailed, match="exit status 1") as failed:
            next(results)
        assert failed.value.completed.stdout == b"2\n"


def test_array_runs_a_task_for_each_number_with_the_placeholders_filled(shell: Shell) -> None:
    result = shell.run("submit", "--wait", "--array", "1-20", "--", "echo {} {#} | tr ' ' :")
    assert result.exit_code == 0
    assert sorted(result.stdout.split()) == sorted(f"{n}:{n}" for n in range(1, 21))


def test_lines_of_stdin_and_of_a_file_are_values(shell: Shell, tmp_path: Path) -> None:
    result = shell.run("submit", "--wait", "--stdin-lines", "--", "echo", "{/.}", stdin="a/b.c\n$(x) y\n")
    assert sorted(result.stdout.splitlines()) == ["$(x) y", "b"]
    (tmp_path / "names").write_text("one\ntwo\n")
    result = shell.run("submit", "--wait", "--each", str(tmp_path / "names"), "--", "echo")
    assert sorted(result.stdout.split()) == ["one", "two"]


def test_failed_tasks_are_explained_and_the_status_is_1(shell: Shell) -> None:
    result = shell.run("submit", "--wait", "--array", "0-2", "--", "exit {}")
    assert result.exit_code == 1
    assert "task 1:" in result.stderr
    assert "2 of 3 tasks failed" in result.stderr


def test_detached_job_lives_on_and_can_be_waited_for_and_looked_at(shell: Shell) -> None:
    job = shell.json("submit", "--name", "squares", "--array", "1-5", "--", "expr {} \\* {}")
    assert job["tasks"] == 5
    assert ended_in_time(shell, job["job"])["outcomes"] == {"succeeded": 5}
    assert "squares" in shell.run("jobs", "--all").stdout
    shown = shell.json("job", job["job"])
    assert (shown["job"]["state"], len(shown["tasks"])) == ("done", 5)
    assert shell.run("logs", job["job"], "4").stdout == "25\n"
    assert shell.run("logs", f"{job['job']}.2").stdout == "9\n"
    assert sorted(shell.run("logs", job["job"]).stdout.split()) == ["1", "16", "25", "4", "9"]
    assert sorted(shell.run("logs", "-f", job["job"]).stdout.split()) == ["1", "16", "25", "4", "9"]


def test_wait_has_status_1_when_tasks_failed(shell: Shell) -> None:
    job = shell.run("submit", "--", "false").stdout.strip()
    result = shell.run("wait", job, "--timeout", "60")
    assert result.exit_code == 1
    assert "1 not well" in result.stdout


def test_wait_gives_up_in_time_and_cancel_ends_what_runs(shell: Shell) -> None:
    job = shell.run("submit", "--", "sleep", "600").stdout.strip()
    assert shell.run("wait", job, "--timeout", "0.5").exit_code == 3
    assert shell.run("cancel", job).exit_code == 0
    result = shell.run("wait", job, "--timeout", "30")
    assert result.exit_code == 1
    assert "cancelled" in result.stdout


def test_one_task_of_a_job_is_cancelled(shell: Shell) -> None:
    job = shell.run("submit", "--array", "600,0", "--", "sleep").stdout.strip()
    assert shell.run("cancel", f"{job}.0").exit_code == 0
    assert shell.json("wait", job, "--timeout", "30", status=1)["outcomes"] == {"cancelled": 1, "succeeded": 1}


def test_failed_tasks_are_run_again(shell: Shell, tmp_path: Path) -> None:
    job = shell.json("submit", "--detach", "--", "test", "-e", str(tmp_path / "there"))["job"]
    assert shell.json("wait", job, "--timeout", "30", status=1)["outcomes"] == {"failed": 1}
    (tmp_path / "there").touch()
    assert shell.json("retry", job) == {"job": job, "retried": 1}
    assert shell.json("wait", job, "--timeout", "30")["outcomes"] == {"succeeded": 1}
    assert "has failed" in shell.run("retry", job).stdout


def test_ctrl_c_cancels_what_is_waited_for(shell: Shell, tmp_path: Path) -> None:
    started = tmp_path / "started"
    process = shell.start("submit", "--wait", "--name", "endless", "--", f"touch {started}; sleep 600")
    try:
        assert wait_until(started.exists, 30.0)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert stderr.strip() == "herder: interrupted"
    (job,) = [each for each in shell.json("jobs") if each["name"] == "endless"]
    assert shell.json("wait", job["job"], "--timeout", "30", status=1)["outcomes"] == {"cancelled": 1}


def test_looking_at_a_job_of_another_client_and_ctrl_c_in_wait_leave_it_alone(
    shell: Shell, cluster: herder.LocalCluster, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    with cluster.client() as client:
        future = client.command(f"while ! test -e {go}; do sleep 0.05; done")
        assert shell.run("job", future.job_id).exit_code == 0
        assert shell.run("logs", future.job_id).exit_code == 0
        assert shell.run("wait", future.job_id, "--timeout", "0.2").exit_code == 3
        process = shell.start("wait", future.job_id)
        try:
            assert wait_until(lambda: shell.json("status")["clients"] >= 3, 30.0)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=30)
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == 130
        go.touch()
        assert future.result(30).returncode == 0


def test_line_that_is_no_text_cancels_the_detached_job(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b"600\n\xff\n")
    result = shell.run("submit", "--name", "broken", "--each", str(tmp_path / "lines"), "--", "sleep")
    assert result.exit_code == 2
    assert "line 2" in result.stderr
    (job,) = [each for each in shell.json("jobs") if each["name"] == "broken"]
    assert shell.run("wait", job["job"], "--timeout", "30").exit_code == 1


def test_nodes_status_and_workloads_are_shown_and_are_json(shell: Shell, cluster: herder.LocalCluster) -> None:
    names = sorted(name for name in cluster.processes if name != "coordinator")
    assert sorted(node["facts"]["node"] for node in shell.json("nodes")) == names
    assert all(name in shell.run("nodes").stdout for name in names)
    assert shell.json("status")["agents"]["ready"] == 2
    assert "cluster" in shell.run("status").stdout
    with cluster.client(workload=herder.Workload("looked-at")) as client:
        client.submit(os.getpid).result(60)
    assert "looked-at" in [workload["name"] for workload in shell.json("workloads")]
    assert "looked-at" in shell.run("workloads", "--steps").stdout


def test_drained_node_takes_nothing_until_it_is_undone(shell: Shell, cluster: herder.LocalCluster) -> None:
    name = sorted(name for name in cluster.processes if name != "coordinator")[0]
    assert shell.run("drain", name, "--wait").exit_code == 0
    try:
        with cluster.client() as client:
            used = {client.command(["true"]).usage(60).node for _ in range(6)}
        assert name not in used
    finally:
        assert shell.run("drain", name, "--undo").exit_code == 0


def test_unknown_job_and_node_have_status_2(shell: Shell) -> None:
    assert shell.run("job", "0123456789abcdef").exit_code == 2
    assert shell.run("logs", "0123456789abcdef").exit_code == 2
    assert shell.run("drain", "no-such-node").exit_code == 2


def test_script_runs_with_a_client_ready(shell: Shell, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import herder\n\ndef double(x):\n    return 2 * x\n\n"
        "with herder.Client() as client:\n    print(client.submit(double, 21).result(60))\n"
    )
    process = shell.start("run", str(script))
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (0, "42\n"), stderr


def test_coordinator_that_is_gone_has_status_3_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from herder_shared.config import create_profile

    environ = {"HERDER_PROFILES": str(tmp_path / "profiles"), "HERDER_PROFILE": "gone"}
    create_profile("gone", addresses=("127.0.0.1:1",), environ=environ)
    monkeypatch.setattr("herder.cli.session.CONNECT_TIMEOUT_S", 0.5)
    began = time.monotonic()
    result = Shell(environ).run("jobs")
    assert result.exit_code == 3
    assert "127.0.0.1:1" in result.stderr
    assert time.monotonic() - began < 5


def test_cluster_of_another_authority_has_status_3(tmp_path: Path, cluster: herder.LocalCluster) -> None:
    from herder_shared.config import create_profile

    environ = {"HERDER_PROFILES": str(tmp_path / "profiles"), "HERDER_PROFILE": "foreign"}
    create_profile("foreign", addresses=(cluster.address,), environ=environ)
    assert Shell(environ).run("jobs").exit_code == 3
