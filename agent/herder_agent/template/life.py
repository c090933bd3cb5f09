"""A template's life from `exec` to its last child: `open` → built (`build`), or a bare spawner at once → serves
(`serve`)."""

from __future__ import annotations

import os
import sys
import time

from . import hooks, serve, system, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Descriptor of the control socket.
CONTROL = 3


def run(argv: list[str]) -> None:
    """Serve until the agent says so or is gone.

    `argv`: the program, the control socket's descriptor, and in a second life the descriptor of what the first left.
    """
    began = time.monotonic()
    system.die_with(os.getppid())
    fd = int(argv[1])
    if fd != CONTROL:
        os.dup2(fd, CONTROL, inheritable=False)
        os.close(fd)
    os.set_inheritable(CONTROL, False)
    resumed = _read_will(int(argv[2])) if len(argv) > 2 else None
    if resumed is None and os.getpgrp() != os.getpid():
        os.setsid()
    channel = wire.adopt(CONTROL)
    try:
        frame = resumed or channel.receive()
        if frame is not None:
            opening, setup = frame[0], bytes(frame[1])
            opening.setdefault("began", began)
            _become(channel, opening, setup)
    except (BrokenPipeError, ConnectionResetError, wire.BrokenFrame):
        pass  # the agent is gone, or no agent of ours
    os._exit(0)


def _become(channel: wire.Channel, opening: dict[str, Any], setup: bytes) -> None:
    if opening.get("spawner"):
        _settle()
        send_ready(channel, opening, {"start": "fork", "fork_point": "start", "reason": ""})
        serve.Server(channel, None).run()
        return
    hooks.watch()
    from . import build

    template = build.Template(channel, opening, setup)
    births = template.build()
    if births is not None:
        serve.Server(channel, births, template.become_branch).run()


def _settle() -> None:
    """Make the spawner ready to fork: as a template is sealed, but without a workload."""
    import gc

    gc.collect()
    gc.freeze()
    gc.disable()
    sys.stdout.flush()
    sys.stderr.flush()


def send_ready(channel: wire.Channel, opening: dict[str, Any], how: dict[str, Any]) -> None:
    """Tell the agent that this template serves, or that fresh interpreters must. `how`: start, fork_point, reason,
    python; and of setup's value what `handover` says, with its descriptor."""
    own = f"{sys.version_info.major}.{sys.version_info.minor}/"
    resident, private = system.memory_bytes()
    account = {
        "python": how.get("python") or own,
        "pid": os.getpid(),
        "start_s": time.monotonic() - opening["began"],
        "rss": resident,
        "private": private,
    }
    fd = how.pop("value_fd", -1)
    channel.send({"t": "ready", "value": fd >= 0, **how, **account}, b"", [fd] if fd >= 0 else [])


def leave_will(head: dict[str, Any], setup: bytes) -> int:
    """Write what the second life of this template needs into a memory file, which the exec'd program inherits."""
    fd = os.memfd_create("herder-template")
    with open(fd, "wb", closefd=False) as file:
        file.write(wire.pack(head, setup))
    os.lseek(fd, 0, os.SEEK_SET)
    os.set_inheritable(fd, True)
    return fd


def _read_will(fd: int) -> tuple[dict[str, Any], memoryview]:
    """What the first life of this template left in a memory file: its `open` frame, with the fork point."""
    with open(fd, "rb") as file:
        content = file.read()
    import json

    head_bytes, _ = wire.HEADER.unpack_from(content)
    middle = wire.HEADER.size + head_bytes
    return json.loads(content[wire.HEADER.size : middle]), memoryview(content)[middle:]
