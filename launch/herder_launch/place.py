"""A machine on which `node.py` can be asked for something: over SSH, or this one."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

from herder_launch import node
from herder_launch.errors import HostFailed, NotDone
from herder_launch.ssh import Connection

#: A verb that starts an interpreter and does little, on a busy machine.
ANSWER_TIMEOUT_S = 60.0

#: Reads node.py's source from stdin and runs it. Also says so, as one line, when the interpreter is too old for it.
_BOOT = (
    "import sys;exec(compile(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())),'herder-node','exec')) "
    "if sys.version_info>=(3,11) else "
    'print(\'{"ok":false,"error":"too old: Python %d.%d.%d"}\'%sys.version_info[:3])'
)

Answer = dict[str, Any]


class Place(Protocol):
    """Where requests of `node.py` are done."""

    @property
    def name(self) -> str:
        """For messages."""

    def run(self, argv: list[str], stdin: bytes, timeout_s: float) -> tuple[int, bytes, bytes]:
        """Run a program to its end: status, stdout, stderr.

        Raises:
            HostFailed: the machine did not answer.
        """

    def shell(self, script: str) -> str:
        """What a `/bin/sh` script prints.

        Raises:
            HostFailed: it failed, or the machine did not answer.
        """

    def close(self) -> None:
        """Let go of it. Idempotent."""


class SshPlace:
    """A host at the other end of an SSH connection, which it owns."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def name(self) -> str:
        return str(self._connection.spec)

    @property
    def connection(self) -> Connection:
        """The connection, for its target's address."""
        return self._connection

    def run(self, argv: list[str], stdin: bytes, timeout_s: float) -> tuple[int, bytes, bytes]:
        output = self._connection.run(shlex.join(argv), stdin, timeout_s)
        return output.status, output.stdout, output.stderr

    def shell(self, script: str) -> str:
        return _shell(self, script)

    def close(self) -> None:
        self._connection.close()


class LocalPlace:
    """This machine."""

    name = "local"

    def run(self, argv: list[str], stdin: bytes, timeout_s: float) -> tuple[int, bytes, bytes]:
        try:
            done = subprocess.run(argv, input=stdin, capture_output=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired as error:
            raise HostFailed(self.name, f"no answer in {timeout_s:.0f} s") from error
        except OSError as error:
            raise HostFailed(self.name, f"cannot run {argv[0]}: {error.strerror}") from error
        return done.returncode, done.stdout, done.stderr

    def shell(self, script: str) -> str:
        return _shell(self, script)

    def close(self) -> None:
        return None


def ask(
    place: Place, python: str, request: dict[str, object], payload: bytes = b"", timeout_s: float = ANSWER_TIMEOUT_S
) -> Answer:
    """Have one of `node.py`'s requests done under an interpreter of that machine.

    Raises:
        NotDone: it cannot be done there, as the node says.
        HostFailed: there was no proper answer; whether it was done is unknown.
    """
    source = _node_source()
    stdin = b"%d\n%s%s\n%s" % (len(source), source, json.dumps(request).encode(), payload)
    status, stdout, stderr = place.run([python, "-c", _BOOT], stdin, timeout_s)
    lines = stdout.decode(errors="replace").strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else None
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        said = (stderr or stdout).decode(errors="replace").strip().splitlines()
        raise HostFailed(place.name, f"{python}: {said[-1] if said else f'ended with status {status}'}")
    if not answer.pop("ok"):
        raise NotDone(place.name, answer["error"])
    return answer


def local_python() -> str:
    """The interpreter that runs the launcher."""
    return sys.executable


def _shell(place: Place, script: str) -> str:
    status, stdout, stderr = place.run(["/bin/sh", "-c", script], b"", ANSWER_TIMEOUT_S)
    if status:
        said = (stderr or stdout).decode(errors="replace").strip().splitlines()
        raise HostFailed(place.name, said[-1] if said else f"/bin/sh ended with status {status}")
    return stdout.decode(errors="replace")


def _node_source() -> bytes:
    return Path(node.__file__).read_bytes()
