"""A workload's prologue: shell text run by `bash -lc` once; the environment it leaves is the workload's."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

#: `module load` over a slow network file system takes seconds; a prompt would wait for ever.
PROLOGUE_TIMEOUT_S = 120.0
_MARK = b"\0herder-environment\0"
_SCRIPT = "\nprintf '\\0herder-environment\\0'; exec env -0"
_OWN = frozenset({"_", "SHLVL", "PWD", "OLDPWD"})
_OUTPUT_BYTES_MAX = 4 << 20


class Prologue:
    """One run. `done(environment)` or `failed(message)` is called once. Its process is `pid` until then."""

    def __init__(  # noqa: PLR0917
        self,
        loop: asyncio.AbstractEventLoop,
        text: str,
        environment: dict[str, str],
        folder: Path,
        done: Callable[[dict[str, str]], None],
        failed: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._done = done
        self._failed = failed
        self._timed_out = False
        # A file without a name: nothing has to be read while it runs, and nothing is left behind.
        self._output = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            self.pid = os.posix_spawnp(
                "bash",
                ["bash", "-lc", text + _SCRIPT],
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, self._output, 1),
                    (os.POSIX_SPAWN_DUP2, self._output, 2),
                ],
                setsid=True,
                setsigmask=[],
                setsigdef=[signal.SIGPIPE, signal.SIGTERM, signal.SIGINT],
            )
        except OSError:
            os.close(self._output)
            raise
        self._pidfd = os.pidfd_open(self.pid)
        loop.add_reader(self._pidfd, self._ended)
        self._timer = loop.call_later(PROLOGUE_TIMEOUT_S, self._too_long)

    def kill(self) -> None:
        """End it: `failed` follows."""
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except (ProcessLookupError, OSError):
            pass

    def _too_long(self) -> None:
        self._timed_out = True
        self.kill()

    def _ended(self) -> None:
        self._timer.cancel()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        _, status = os.waitpid(self.pid, 0)
        output = os.pread(self._output, _OUTPUT_BYTES_MAX, 0)
        os.close(self._output)
        said, mark, rest = output.partition(_MARK)
        if status == 0 and mark:
            self._done(parse_environment(rest))
            return
        why = f"took longer than {PROLOGUE_TIMEOUT_S:g} s" if self._timed_out else f"ended with wait status {status}"
        tail = said[-2000:].decode("utf-8", "replace").strip()
        self._failed(f"the workload's prologue {why}: {tail or 'it said nothing'}")


def parse_environment(text: bytes) -> dict[str, str]:
    """Read what `env -0` prints."""
    environment: dict[str, str] = {}
    for entry in text.split(b"\0"):
        name, equals, value = os.fsdecode(entry).partition("=")
        if equals and name not in _OWN:
            environment[name] = value
    return environment
