"""What the spawner is told to exec, and what a prologue's output is read as."""

from __future__ import annotations

import os

import msgspec

from herder_agent.core.effects import Grant, SpawnCommand
from herder_agent.launch import command, forkserver, fresh
from herder_agent.launch.child import Child
from herder_agent.launch.prologue import parse_environment
from herder_shared.ids import AttemptId, JobId, WorkloadKey
from herder_shared.wire.messages import AttemptStart, CommandResult, CommandSpec, Payload, TaskOptions, WorkloadSpec

SPEC = WorkloadSpec(WorkloadKey("w" * 16), python="/opt/python", working_dir="/data", preload=("json",))


def spawn(spec: CommandSpec) -> dict[str, object]:
    start = AttemptStart(AttemptId(1, 1), JobId("j"), 0, 1, None, Payload())
    effect = SpawnCommand(1, 5, start, SPEC, TaskOptions(), Grant((2, 3), 2, ()))
    return command.order(effect, spec, {"A": "1", "B": "2"})


def test_argv_is_execed_as_it_is_and_a_text_goes_to_the_shell() -> None:
    assert spawn(CommandSpec(argv=("ls", "-l; rm")))["argv"] == ["ls", "-l; rm"]
    assert spawn(CommandSpec(shell="ls | wc"))["argv"] == ["/bin/sh", "-c", "ls | wc"]


def test_command_has_its_own_environment_folder_and_cpus() -> None:
    order = spawn(CommandSpec(argv=("x",), env={"B": "3"}, cwd="/tmp"))
    assert (order["env"], order["cwd"], order["cpus"]) == ({"A": "1", "B": "3"}, "/tmp", [2, 3])
    assert spawn(CommandSpec(argv=("x",)))["cwd"] == "/data"


def test_path_of_stdin_is_never_part_of_a_script() -> None:
    argv = spawn(CommandSpec(argv=("cat",), stdin_path="/tmp/$(touch x)"))["argv"]
    assert isinstance(argv, list)
    assert argv[:2] == ["/bin/sh", "-c"]
    assert "touch" not in argv[2]
    assert argv[4:] == ["/tmp/$(touch x)", "cat"]


def test_stdin_bytes_are_a_file_at_its_start() -> None:
    assert command.stdin_file(CommandSpec(argv=("x",))) == ()
    (fd,) = command.stdin_file(CommandSpec(argv=("x",), stdin=b"fed"))
    assert os.read(fd, 10) == b"fed"
    os.close(fd)


def test_status_of_a_command_becomes_its_returncode() -> None:
    child = Child(1, 1, "command", 1)
    assert msgspec.msgpack.decode(command.result(child, 3 << 8)[0], type=CommandResult).returncode == 3
    assert msgspec.msgpack.decode(command.result(child, 9)[0], type=CommandResult).returncode == -9


def test_fresh_interpreter_is_the_workloads_and_runs_our_entry() -> None:
    order = fresh.order(7, SPEC, {"A": "1"})
    argv = order["argv"]
    assert isinstance(argv, list)
    assert argv[:4] == ["/opt/python", "-P", "-X", "utf8"]
    assert os.path.isfile(argv[4])
    assert argv[5] == "{fd}"
    assert (order["cwd"], order["env"], order["kind"]) == ("/data", {"A": "1"}, "fresh")


def test_opening_of_a_template_names_its_workload_and_a_spawners_none() -> None:
    opening = forkserver.open_head(SPEC, cluster="c", node="n", cloudpickle_path="/p")
    assert opening["spawner"] is False
    workload = opening["workload"]
    assert isinstance(workload, dict)
    assert workload["preload"] == ("json",)
    assert forkserver.open_head(None, cluster="c", node="n", cloudpickle_path="/p")["spawner"] is True


def test_environment_is_read_with_newlines_and_without_the_shells_own() -> None:
    assert parse_environment(b"A=1\0B=two\nlines=x\0_=/usr/bin/env\0SHLVL=1\0\0") == {"A": "1", "B": "two\nlines=x"}
