"""Control groups: one per attempt that has a limit, of the kernel's version 2 or 1, or none at all.

Which it is is found out once, at start, with the reason (`probe`). An attempt's process enters its group by itself,
by writing "0" to the group's `entrances`: a move may wait milliseconds for the kernel's other CPUs, which must not
hold up the agent. What a process touched before it entered stays with the group where it was, so that a template's
pages are never an attempt's.

Version 2 wants a group whose children have controllers to have no process of its own: the agent moves itself to a leaf
first. So it needs a group of its own (systemd: `Delegate=yes`), or one that it is given. Version 1 has no such rule.

Who owns what: `Groups` owns all folders that it makes, `herder-<pid>-<n>` in its base; those of agents that are gone
are removed by the next one. A group serves one attempt after another as long as nothing is left charged to it.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

from herder_agent.runtime.kernel_files import read_again, read_small

_log = logging.getLogger("herder.agent")

#: A group with more than this still charged (file pages, a lasting process's memory) is not used again: its next peak
#: would count it.
_SLACK_BYTES = 1 << 20
_KILL_ROUNDS_MAX = 16
_OWN_FOLDER = re.compile(r"herder-(\d+)-\w+")
_IO_FIELD = re.compile(rb"([rw])bytes=(\d+)")


class Account(NamedTuple):
    """What was charged to a group since it was taken. `cpu_s` is (user, system), where the kernel tells; I/O counts
    what went to or came from storage."""

    peak_bytes: int
    #: Processes that the kernel killed because of the group's limit.
    oom_kills: int
    #: The kernel counts I/O and processor time here.
    has_use: bool = False
    user_s: float = 0.0
    system_s: float = 0.0
    read_bytes: int = 0
    write_bytes: int = 0


class Group(ABC):
    """One attempt's control group."""

    def __init__(self, folders: dict[str, Path]) -> None:
        #: Controller to folder; version 2 has one folder for all.
        self._folders = folders
        self._distinct = tuple(dict.fromkeys(folders.values()))
        self.holds_memory = "memory" in folders
        self.holds_pids = "pids" in folders
        #: The kernel keeps the peak; else `usage_bytes` is to be sampled.
        self.has_peak = True
        #: It can begin a new account without being made anew.
        self.is_reusable = True
        #: Where a process writes "0" to enter.
        self.entrances = tuple(str(folder / "cgroup.procs") for folder in self._distinct)
        self._before = Account(0, 0)
        self._limits: tuple[int, int] | None = None
        #: Opening a file here costs three times what reading it does.
        self._fds: dict[str, int] = {}
        made: list[Path] = []
        try:
            for folder in self._distinct:
                folder.mkdir()
                made.append(folder)
        except OSError:
            for folder in made:
                folder.rmdir()
            raise

    def begin(self, memory_bytes: int, pids: int) -> None:
        """Set limits (0: none) and count from nothing.

        Raises:
            OSError: the kernel refuses.
        """
        if self._limits != (memory_bytes, pids):
            self._limits = None
            if self.holds_memory:
                self._limit_memory(memory_bytes)
            if self.holds_pids:
                _write(self._folders["pids"] / "pids.max", str(pids) if pids else "max")
            self._limits = memory_bytes, pids
        self._forget_peak()
        self._before = self._counts()

    def account(self) -> Account:
        """What was used since `begin`. The peak counts file pages, which the kernel takes back before it kills."""
        now, before = self._counts(), self._before
        return Account(
            self._peak_bytes(),
            now.oom_kills - before.oom_kills,
            now.has_use,
            now.user_s - before.user_s,
            now.system_s - before.system_s,
            now.read_bytes - before.read_bytes,
            now.write_bytes - before.write_bytes,
        )

    def processes(self) -> set[int]:
        """Who is in it now. Of several folders the first is entered first, and none is left before the others."""
        # Not by a descriptor that is kept: version 1 shows the same list on it for a while.
        return {int(word) for word in read_small(self._distinct[0] / "cgroup.procs").split()}

    def kill(self) -> set[int]:
        """SIGKILL to all that is in it; returns who has not gone yet. They cannot escape by forking: the kernel kills
        the whole group, or no process can be made in it while it is gone through."""
        pids = self.processes()
        if pids and not self._kill_at_once():
            self._kill_one_by_one(pids)
        return self.processes() if pids else pids

    def remove(self) -> None:
        """Remove it.

        Raises:
            OSError: there is a process in it.
        """
        for folder in self._distinct:
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _get(self, path: str) -> bytes:
        """What is in one of its files; nothing where there is none."""
        fd = self._fds.get(path)
        try:
            if fd is None:
                fd = self._fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return b""
        return read_again(fd)

    @abstractmethod
    def usage_bytes(self) -> int:
        """What is charged now."""

    @abstractmethod
    def _limit_memory(self, memory_bytes: int) -> None: ...

    @abstractmethod
    def _forget_peak(self) -> None: ...

    @abstractmethod
    def _peak_bytes(self) -> int: ...

    @abstractmethod
    def _counts(self) -> Account:
        """What only grows."""

    @abstractmethod
    def _kill_at_once(self) -> bool: ...

    def _kill_one_by_one(self, pids: set[int]) -> None:
        if self.holds_pids:
            self._limits = None
            _write(self._folders["pids"] / "pids.max", "0")
        done: set[int] = set()
        for _ in range(_KILL_ROUNDS_MAX):
            for pid in pids - done:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            done |= pids
            pids = self.processes()
            if pids <= done:
                return


class UnifiedGroup(Group):
    """Version 2."""

    def __init__(self, folders: dict[str, Path]) -> None:
        super().__init__(folders)
        folder = self._folder = self._distinct[0]
        self._files = [f"{folder}/{name}" for name in ("memory.current", "memory.events", "cpu.stat", "io.stat")]
        self._peak_file = f"{folder}/memory.peak"
        self._peak_fd = -1
        if not self.holds_memory:
            return
        self.has_peak = (self._folder / "memory.peak").exists()
        self._peak_fd = _resettable(self._folder / "memory.peak")
        self.is_reusable = self._peak_fd >= 0 or not self.has_peak
        # One that runs over the limit takes the attempt's other processes with it: half an attempt is none.
        _write_if_there(self._folder / "memory.oom.group", "1")
        _write_if_there(self._folder / "memory.swap.max", "0")

    def usage_bytes(self) -> int:
        return _number(self._get(self._files[0])) if self.holds_memory else 0

    def remove(self) -> None:
        super().remove()
        if self._peak_fd >= 0:
            os.close(self._peak_fd)
            self._peak_fd = -1

    def _limit_memory(self, memory_bytes: int) -> None:
        _write(self._folder / "memory.max", str(memory_bytes) if memory_bytes else "max")

    def _forget_peak(self) -> None:
        if self._peak_fd >= 0:
            os.write(self._peak_fd, b"0")

    def _peak_bytes(self) -> int:
        if self._peak_fd >= 0:
            return _number(os.pread(self._peak_fd, 100, 0))
        return _number(self._get(self._peak_file)) if self.has_peak else self.usage_bytes()

    def _counts(self) -> Account:
        _, events, cpu_stat, io_stat = self._files
        kills = _fields(self._get(events)).get(b"oom_kill", 0) if self.holds_memory else 0
        cpu = _fields(self._get(cpu_stat))
        user_s, system_s = cpu.get(b"user_usec", 0) / 1e6, cpu.get(b"system_usec", 0) / 1e6
        read_bytes, write_bytes = io_bytes(self._get(io_stat))
        return Account(0, kills, bool(cpu), user_s, system_s, read_bytes, write_bytes)

    def _kill_at_once(self) -> bool:
        try:
            _write(self._folder / "cgroup.kill", "1")
        except OSError:
            return False  # Before Linux 5.14.
        return True


class LegacyGroup(Group):
    """Version 1: a folder in each controller's own hierarchy."""

    def __init__(self, folders: dict[str, Path]) -> None:
        super().__init__(folders)
        memory = folders.get("memory", "")
        self._usage_file, self._peak_file = f"{memory}/memory.usage_in_bytes", f"{memory}/memory.max_usage_in_bytes"
        self._kills_file = f"{memory}/memory.oom_control"

    def usage_bytes(self) -> int:
        return _number(self._get(self._usage_file)) if self.holds_memory else 0

    def _limit_memory(self, memory_bytes: int) -> None:
        folder, text = self._folders["memory"], str(memory_bytes or -1)
        # Memory and swap together may never be less than memory alone.
        _write_if_there(folder / "memory.memsw.limit_in_bytes", "-1")
        _write(folder / "memory.limit_in_bytes", text)
        _write_if_there(folder / "memory.memsw.limit_in_bytes", text)

    def _forget_peak(self) -> None:
        if self.holds_memory:
            _write(self._folders["memory"] / "memory.max_usage_in_bytes", "0")

    def _peak_bytes(self) -> int:
        return _number(self._get(self._peak_file)) if self.holds_memory else 0

    def _counts(self) -> Account:
        return Account(0, _fields(self._get(self._kills_file)).get(b"oom_kill", 0) if self.holds_memory else 0)

    def _kill_at_once(self) -> bool:
        return False


class Groups(ABC):
    """Makes groups, lends them, takes them back."""

    #: "v2", "v1" or "none".
    kind: str
    #: In words: where the groups are, or why there are none.
    reason: str
    #: Of "memory" and "pids", what they can limit.
    controllers: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self._free: list[Group] = []
        #: Given back while a process was in them.
        self._leaving: list[Group] = []
        self._last = 0
        self._has_failed = False

    def take(self, memory_bytes: int, pids: int) -> Group | None:
        """A group with these limits (0: none), or None where there is none to be had."""
        group = None
        try:
            group = self._free.pop() if self._free else self._make()
            if group is not None:
                group.begin(memory_bytes, pids)
        except OSError as error:
            if group is not None:
                self._leaving.append(group)
            if not self._has_failed:
                self._has_failed = True
                _log.warning("no control group can be had, limits are watched instead: %s", error)
            return None
        return group

    def give_back(self, group: Group) -> None:
        """Its attempt is over: what still runs in it is killed."""
        self._leaving.append(group)
        self.settle()

    def settle(self) -> set[int]:
        """Kill what is left in groups that were given back; returns who has not gone yet."""
        left: set[int] = set()
        waiting, self._leaving = self._leaving, []
        for group in waiting:
            inside = group.kill()
            if inside:
                left |= inside
                self._leaving.append(group)
            else:
                self._keep_or_remove(group)
        return left

    def close(self) -> None:
        """Remove what is empty."""
        for group in (*self._free, *self._leaving):
            try:
                group.remove()
            except OSError as error:
                _log.warning("a control group is left behind: %s", error)
        self._free.clear()
        self._leaving.clear()

    def _keep_or_remove(self, group: Group) -> None:
        if group.is_reusable and group.usage_bytes() <= _SLACK_BYTES:
            self._free.append(group)
            return
        try:
            group.remove()
        except OSError:
            self._leaving.append(group)

    def _name(self) -> str:
        self._last += 1
        return f"herder-{os.getpid()}-{self._last}"

    @abstractmethod
    def _make(self) -> Group | None: ...


class NoGroups(Groups):
    """Where there are none: a watcher sees to the limits."""

    kind = "none"

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason

    def take(self, memory_bytes: int, pids: int) -> Group | None:  # noqa: ARG002 - there is nothing to limit with
        return None

    def _make(self) -> Group | None:
        return None


class UnifiedGroups(Groups):
    """Version 2, below `base`.

    Raises:
        OSError: the agent cannot have groups there.
    """

    kind = "v2"

    def __init__(self, base: Path) -> None:
        super().__init__()
        self._base = base
        present = set((base / "cgroup.controllers").read_text().split())
        if not present & {"memory", "pids"}:
            raise OSError(errno.ENOTSUP, "neither the memory nor the pids controller is delegated", str(base))
        _remove_stale(base)
        self._leaf = base / f"herder-{os.getpid()}-agent"
        self._home = own_folders().get("")
        #: Controllers that its children have because of us.
        self._enabled: list[str] = []
        self._leaf.mkdir()
        try:
            _write(self._leaf / "cgroup.procs", "0")
            wanted = present & {"memory", "pids", "io"}
            enabled = set((base / "cgroup.subtree_control").read_text().split())
            for name in sorted(wanted - enabled):
                _write(base / "cgroup.subtree_control", f"+{name}")
                self._enabled.append(name)
        except OSError:
            self._leave()
            raise
        self.controllers = frozenset(wanted & {"memory", "pids"})
        self.reason = f"control groups v2 below {base}: {' and '.join(sorted(self.controllers))}"

    def close(self) -> None:
        super().close()
        self._leave()

    def _leave(self) -> None:
        """Back to where we came from. Where that is our base, it takes processes only while its children have no
        controllers; with another agent's there it stays so, and the next agent, or systemd, removes our leaf."""
        try:
            _remove_stale(self._base)
            if self._home == self._base and list(self._base.glob("herder-*")) == [self._leaf]:
                for name in self._enabled:
                    _write(self._base / "cgroup.subtree_control", f"-{name}")
            if self._home is not None:
                _write(self._home / "cgroup.procs", "0")
            self._leaf.rmdir()
        except OSError as error:
            _log.debug("the agent stays in its control group: %s", error)

    def _make(self) -> Group:
        return UnifiedGroup(dict.fromkeys(sorted(self.controllers), self._base / self._name()))


class LegacyGroups(Groups):
    """Version 1, below the agent's own groups.

    Raises:
        OSError: the agent cannot have groups there.
    """

    kind = "v1"

    def __init__(self, bases: dict[str, Path]) -> None:
        super().__init__()
        self._bases: dict[str, Path] = {}
        refusal: OSError | None = None
        for name, base in bases.items():
            _remove_stale(base)
            trial = base / self._name()
            try:
                trial.mkdir()
                trial.rmdir()
            except OSError as error:
                refusal = error
            else:
                self._bases[name] = base
        if refusal is not None and not self._bases:
            raise refusal
        self.controllers = frozenset(self._bases)
        places = " and ".join(f"{name} below {base}" for name, base in sorted(self._bases.items()))
        self.reason = f"control groups v1: {places}"

    def _make(self) -> Group:
        name = self._name()
        return LegacyGroup({controller: base / name for controller, base in self._bases.items()})


def probe(wanted: str) -> Groups:
    """What this machine offers. `wanted` is "auto", "off", or a folder of version 2 that the agent may have."""
    if wanted == "off":
        return NoGroups("control groups are off in the agent's configuration")
    try:
        if wanted != "auto":
            return UnifiedGroups(Path(wanted))
        own = own_folders()
        legacy: dict[str, Path] = {name: own[name] for name in ("memory", "pids") if name in own}
        if legacy:
            return LegacyGroups(legacy)
        base = own.get("")
        if base is None:
            return NoGroups("no control group file system is mounted")
        if not (base / "cgroup.type").exists():
            return NoGroups("the agent runs in the root control group: it needs one of its own (systemd: Delegate=yes)")
        return UnifiedGroups(base)
    except OSError as error:
        hint = ": other processes are in it" if error.errno == errno.EBUSY else ""
        return NoGroups(
            f"no control group that the agent may use: {error}{hint} (give it one: systemd's Delegate=yes, or `cgroup` "
            "in its configuration)"
        )


def own_folders(cgroup: str = "/proc/self/cgroup", mountinfo: str = "/proc/self/mountinfo") -> dict[str, Path]:
    """Our groups' folders: by controller those of version 1, under "" that of version 2. Only what is mounted."""
    paths: dict[str, str] = {}
    for line in read_small(cgroup).decode("utf-8", "replace").splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    found: dict[str, Path] = {}
    for line in read_small(mountinfo).decode("utf-8", "replace").splitlines():
        left, _, right = line.partition(" - ")
        root, point = left.split()[3:5]
        kind, _, options = right.split(" ", 2)
        names = [""] if kind == "cgroup2" else options.split(",") if kind == "cgroup" else []
        for name in names:
            if name in paths:
                # In a container the mount may show but a part of the hierarchy.
                inside = paths[name].removeprefix(root.rstrip("/")) if paths[name].startswith(root) else paths[name]
                found[name] = Path(point) / inside.lstrip("/")
    return {name: folder for name, folder in found.items() if (folder / "cgroup.procs").exists()}


def io_bytes(text: bytes) -> tuple[int, int]:
    """Bytes read and written, over all devices, of an `io.stat`."""
    sums = {b"r": 0, b"w": 0}
    for way, amount in _IO_FIELD.findall(text):
        sums[way] += int(amount)
    return sums[b"r"], sums[b"w"]


def _resettable(peak: Path) -> int:
    """A descriptor of `memory.peak` that can forget what it has seen, as of Linux 6.12; -1 where it cannot."""
    try:
        fd = os.open(peak, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        os.write(fd, b"0")
    except OSError:
        os.close(fd)
        return -1
    return fd


def _remove_stale(base: Path) -> None:
    """Groups of agents that are gone; their processes are killed by the mark in their environment."""
    for folder in base.glob("herder-*"):
        match = _OWN_FOLDER.fullmatch(folder.name)
        if match and not os.path.exists(f"/proc/{match[1]}"):
            try:
                folder.rmdir()
            except OSError:
                continue  # Not empty: of somebody whom we do not see.


def _fields(text: bytes) -> dict[bytes, int]:
    """Lines of a name and a number."""
    fields: dict[bytes, int] = {}
    for line in text.splitlines():
        name, _, value = line.partition(b" ")
        if value.isdigit():
            fields[name] = int(value)
    return fields


def _number(text: bytes) -> int:
    text = text.strip()
    return int(text) if text.isdigit() else 0


def _write(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _write_if_there(path: Path, text: str) -> None:
    try:
        _write(path, text)
    except FileNotFoundError:
        pass
