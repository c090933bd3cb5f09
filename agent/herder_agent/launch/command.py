"""Commands: what the spawner is asked to exec, and what their exit becomes."""

from __future__ import annotations

import os

import msgspec

from herder_agent.core.effects import SpawnCommand
from herder_agent.launch.child import Child
from herder_shared.limits import MIB
from herder_shared.wire.messages import CommandResult, CommandSpec

#: Output of a command that becomes its result, per stream: the first and the last so many bytes. It is held in memory.
OUTPUT_HEAD_BYTES = 8 * MIB
OUTPUT_TAIL_BYTES = 8 * MIB
#: As a shell says it (POSIX, 2.8.2).
STATUS_NOT_EXECUTED = 127
#: Opens the file that is to be stdin, in the command's own process.
_STDIN_SCRIPT = 'f=$1; shift; exec "$@" <"$f"'

_decoder = msgspec.msgpack.Decoder(CommandSpec)
_encode = msgspec.msgpack.Encoder().encode


def decode(content: bytes) -> CommandSpec:
    """Read the arguments of a command task.

    Raises:
        msgspec.MsgspecError: they are none.
    """
    return _decoder.decode(content)


def order(effect: SpawnCommand, command: CommandSpec, environment: dict[str, str]) -> dict[str, object]:
    """The `exec` order for a command."""
    argv = list(command.argv) if command.shell is None else ["/bin/sh", "-c", command.shell]
    if command.stdin_path is not None:
        argv = ["/bin/sh", "-c", _STDIN_SCRIPT, "sh", command.stdin_path, *argv]
    return {
        "t": "exec",
        "child": effect.child,
        "kind": "command",
        "argv": argv,
        "env": {**environment, **command.env},
        "cwd": command.cwd or effect.workload.working_dir,
        "cpus": list(effect.grant.cpus) or None,
        "limits": {},
        "stdin": bool(command.stdin),
    }


def not_executed(message: str) -> bytes:
    """The result of a command whose program could not be executed, in a shell's terms."""
    return _encode(CommandResult(STATUS_NOT_EXECUTED, b"", message.encode()))


def stdin_file(command: CommandSpec) -> tuple[int, ...]:
    """A memory file with what the command reads, the caller's to close; none where it reads nothing."""
    if not command.stdin:
        return ()
    fd = os.memfd_create("herder-stdin")
    view = memoryview(command.stdin)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return (fd,)


def result(child: Child, status: int) -> tuple[bytes, bytes, bytes, bool]:
    """The encoded `CommandResult`, and its stdout, stderr, and whether something was left out."""
    out, out_dropped = child.stdout.take() if child.stdout is not None else (b"", False)
    err, err_dropped = child.stderr.take() if child.stderr is not None else (b"", False)
    number = status & 0x7F
    returncode = -number if number else status >> 8 & 0xFF
    dropped = out_dropped or err_dropped
    return _encode(CommandResult(returncode, out, err, dropped)), out, err, dropped
