"""Networks of their own for a coordinator and its agents, each agent at the end of a cable that can fail.

The kernel's own faults, where `proxy` can only hold bytes back: packets that are dropped one way or both, at random, or
because the link is down. Then TCP sends again ever more rarely, connections hang in mid-handshake, and nobody is told.
As in `netlab` nothing is attached to the machine's network, and each namespace is held by a process that dies with
ours; but these are network namespaces only: files and processes are seen from everywhere.

A thread is moved into a network and what it starts (processes, threads, sockets) stays there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

from herder.local import LocalCluster, Process
from support import netlab
from support.leaks import wait_until

#: Of RFC 2544's range, as `netlab`: nobody's.
NEAR = "198.18.20.1"
FAR_NETWORK = "198.18.21"
_CLONE_NEWNET = 0x40000000

Direction = Literal["both", "to the coordinator", "to the agent"]


class Cables:
    """The coordinator's network, and one for each of `count` agents, numbered from 0. A context manager."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._near: subprocess.Popen[bytes] | None = None
        self._far: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self._near = _network()
            self._far = [_network() for _ in range(self._count)]
            lines = ["link set lo up", f"address add {NEAR}/32 dev lo"]
            for n, holder in enumerate(self._far):
                lines.append(f"link add far{n} type veth peer name eth0 netns {holder.pid}")
                lines.append(f"link set far{n} up")
                lines.append(f"route add {FAR_NETWORK}.{n} dev far{n} src {NEAR}")
            self._run(self._near, ["ip", "-batch", "-"], lines)
            for n in range(self._count):
                self._plug_in(n)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the networks; what runs in one keeps it. Idempotent."""
        for holder in (*self._far, *([self._near] if self._near else [])):
            holder.kill()
            holder.wait()
        self._far, self._near = [], None

    @contextlib.contextmanager
    def at(self, n: int | None) -> Iterator[None]:
        """This thread in an agent's network, or in the coordinator's (None)."""
        holder = self._near if n is None else self._far[n]
        assert holder is not None
        with open("/proc/thread-self/ns/net", "rb") as own, open(f"/proc/{holder.pid}/ns/net", "rb") as other:
            _enter(other.fileno())
            try:
                yield
            finally:
                _enter(own.fileno())

    def plug(self, n: int, *, connected: bool) -> None:
        """The link goes down or up; the agent's end sees it, as when a switch's port fails."""
        assert self._near is not None
        self._run(self._near, ["ip", "link", "set", f"far{n}", "up" if connected else "down"])
        if connected:  # the route went with the link
            self._run(self._near, ["ip", "route", "replace", f"{FAR_NETWORK}.{n}", "dev", f"far{n}", "src", NEAR])

    def drop(self, n: int, direction: Direction = "both", percent: int = 100) -> None:
        """Packets are dropped where they arrive, in silence."""
        chance = "" if percent == 100 else f"numgen random mod 100 < {percent} "
        rules = [
            "add table inet cables",
            f"add chain inet cables far{n} {{ type filter hook prerouting priority -300; }}",
            f"add rule inet cables far{n} iifname far{n} {chance}drop",
        ]
        if direction != "to the agent":
            assert self._near is not None
            self._run(self._near, ["nft", "-f", "-"], rules)
        if direction != "to the coordinator":
            self._run(
                self._far[n], ["nft", "-f", "-"], [rule.replace(f"iifname far{n}", "iifname eth0") for rule in rules]
            )

    def throttle(self, n: int, rate: str) -> None:
        """Both ways, with a short queue: what does not fit is dropped."""
        assert self._near is not None
        for holder, device in ((self._near, f"far{n}"), (self._far[n], "eth0")):
            queue = ["rate", rate, "burst", "16kb", "latency", "50ms"]
            self._run(holder, ["tc", "qdisc", "replace", "dev", device, "root", "tbf", *queue])

    def mend(self, n: int) -> None:
        """Undo `plug`, `drop` and `throttle`. Idempotent."""
        assert self._near is not None
        self.plug(n, connected=True)
        chain = [f"add table inet cables\nadd chain inet cables far{n}", f"delete chain inet cables far{n}"]
        for holder, device in ((self._near, f"far{n}"), (self._far[n], "eth0")):
            self._run(holder, ["nft", "-f", "-"], chain)
            self._run(holder, ["tc", "qdisc", "replace", "dev", device, "root", "pfifo"])

    def _plug_in(self, n: int) -> None:
        lines = ["link set lo up", f"address add {FAR_NETWORK}.{n}/32 dev eth0", "link set eth0 up"]
        self._run(self._far[n], ["ip", "-batch", "-"], [*lines, f"route add {NEAR} dev eth0"])

    def _run(self, holder: subprocess.Popen[bytes], argv: list[str], lines: list[str] | None = None) -> None:
        netlab.checked(["nsenter", f"--net=/proc/{holder.pid}/ns/net", *argv], "\n".join(lines or []))


class StretchedCluster(LocalCluster):
    """Agent n is at the far end of cable n; the coordinator, and this thread, must be at their near end."""

    def __init__(self, cables: Cables, *, cores: int, agents: int) -> None:
        self._cables = cables
        super().__init__(cores, agents=agents)

    def _start_coordinator(self, listen: str, http_listen: str) -> None:
        super()._start_coordinator(listen.replace("127.0.0.1", NEAR), http_listen)

    def _spawn(self, name: str, arguments: tuple[str, ...]) -> Process:
        if name == "coordinator":
            return super()._spawn(name, arguments)
        with self._cables.at(int(name.rpartition("-")[2]) - 1):
            return super()._spawn(name, arguments)


def _network() -> subprocess.Popen[bytes]:
    holder = netlab.start(["unshare", "--net", "sleep", "infinity"])
    own = os.stat("/proc/self/ns/net").st_ino
    if not wait_until(functools.partial(_is_other, holder.pid, own), netlab.BOOT_TIMEOUT_S, 0.001):
        raise RuntimeError("unshare --net did not make a namespace in time")
    return holder


def _is_other(pid: int, own: int) -> bool:
    return Path(f"/proc/{pid}/ns/net").stat().st_ino != own


def _enter(network_fd: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(network_fd, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
