"""A ready template at work: one thread, one blocking wait over the control socket and its children's pidfds.

    agent ── fork, exec, kill ──▶ control socket ──▶ Server ── fork ──▶ child
      ◀────── forked, exited ────                      ◀── pidfd: it ended ──

Who holds which end. A child's task socket and output pipes are made here; the child's ends are closed here right after
the fork, the agent's ends right after they were sent. So an end of file means to each side that the other is gone. The
pidfd stays here until the child is reaped.

A child that was forked with its task (`run`) is told of when it is over, unless it lives for long: see `young`.

No process id is trusted alone. A child is a zombie until it is reaped here, so its id, which is also its process
group's, cannot have been used again when the group is killed. Orphans of a child that is gone become this process's
children (it is a subreaper, as each child is for its own while it lives); whatever child is here that nobody knows is
such an orphan, and is killed. `exited` is sent when the last of them is gone: then, and not before, the slot is free.
"""

from __future__ import annotations

import _socket
import gc
import os
import select
import signal
import time

from . import spawn, system, wire, young

TYPE_CHECKING = False
if TYPE_CHECKING:
    import resource
    from collections.abc import Callable
    from typing import Any, NoReturn

    from . import birth

#: An orphan that does not die of SIGKILL (it hangs in the kernel) holds up `exited` no longer than this.
ORPHAN_LIMIT_S = 5.0
#: Between two looks at those.
STUCK_LOOK_S = 0.5
#: Children are forked so many in a row, and told of together: more would let the first one's task wait.
FORKS_IN_A_ROW = 4
_RUN = b'{"t":"run"'
#: Rounds of killing a tree of processes that forks while it is being killed.
KILL_ROUNDS_MAX = 16


class Ends:
    """Both ends of a child's pipes and, where it has one, of its task socket."""

    __slots__ = ("far", "ours", "theirs")

    def __init__(self, has_channel: bool, pipes: int) -> None:
        self.far: _socket.socket | None = None
        self.ours: list[int] = []
        self.theirs: list[int] = []
        try:
            if has_channel:
                near, self.far = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
                self.ours.append(near.detach())
            for _ in range(pipes):
                read, write = os.pipe2(os.O_CLOEXEC)
                self.ours.append(read)
                self.theirs.append(write)
        except OSError:
            self.close()
            raise

    def close_theirs(self) -> None:
        for fd in self.theirs:
            os.close(fd)
        if self.far is not None:
            self.far.close()

    def close(self) -> None:
        self.close_theirs()
        for fd in self.ours:
            os.close(fd)


class Server:
    """Serves `fork`, `run`, `branch`, `exec`, `kill`, `stats`, `exit`.

    `births` says what a forked child does; `become_branch` is what a branch does, given its parent, its control socket
    and its output (-1: as here). None in a spawner.
    """

    def __init__(
        self,
        channel: wire.Channel,
        births: birth.Births | None,
        become_branch: Callable[[int, _socket.socket, int], NoReturn] | None = None,
    ) -> None:
        self._channel = channel
        self._births = births
        self._become_branch = become_branch
        #: Pids of branches by their pidfds.
        self._branches: dict[int, int] = {}
        self._pid = os.getpid()
        self._poll = select.epoll()
        self._poll.register(channel.socket.fileno(), select.EPOLLIN)
        self._children: dict[int, young.Child] = {}
        self._by_fd: dict[int, young.Child] = {}
        self._unsent: list[bytes] = []
        #: Children that were reaped and are not told of yet, and until when their orphans are waited for.
        self._ended: list[tuple[float, young.Child, int, resource.struct_rusage]] = []
        self._nursery = None if births is None else young.Nursery(births, self._poll, self._children, self._by_fd)
        self._oom = system.open_or_none("/proc/self/oom_score_adj", os.O_RDWR)
        self._below = system.open_or_none(f"/proc/self/task/{self._pid}/children", os.O_RDONLY)
        #: Processes that preload or setup left behind on purpose.
        self._known = set(system.children_of(self._pid))
        #: Orphans that did not die of SIGKILL. The agent was told; they are reaped whenever they die after all.
        self._stuck: set[int] = set()
        system.become_subreaper()

    def run(self) -> None:
        """Until the agent says so or is gone; then every child is killed."""
        control = self._channel.socket.fileno()
        try:
            # Frames may have come together with `open`: no poll will tell of them.
            if self._channel.has_frame() and not self._answer():
                return
            self._send_unsent()
            while True:
                for fd, _ in self._poll.poll(self._wait_s()):
                    if fd == control:
                        if not self._answer():
                            return
                    elif fd in self._by_fd:
                        self._attend(fd, self._by_fd[fd])
                    elif fd in self._branches:
                        self._reap_branch(fd)
                self._settle_ended()
                if self._stuck:
                    self._reap_stuck()
                if self._nursery is not None and self._nursery.young:
                    self._tell_of_the_old(self._nursery)
                self._send_unsent()
        except (BrokenPipeError, ConnectionResetError, wire.BrokenFrame):
            return
        finally:
            self._kill_all()

    def _wait_s(self) -> float:
        if self._ended:
            return 0.05
        wait_s = self._nursery.wait_s() if self._nursery is not None else -1
        if self._stuck and not 0 <= wait_s <= STUCK_LOOK_S:
            return STUCK_LOOK_S
        return wait_s

    def _answer(self) -> bool:
        """Deal with all frames that have arrived. False when this is the end."""
        while True:
            frame = self._channel.receive()
            if frame is None:
                return False
            head = frame[0]
            match head.get("t"):
                case "run":
                    self._run(head, frame[1])
                case "fork":
                    self._fork_all(head)
                case "exec":
                    self._exec(head)
                case "branch":
                    self._branch(head)
                case "kill":
                    self._kill(head)
                case "stats":
                    self._stats()
                case "exit":
                    return False
                case _:
                    self._log("warning", f"unknown message {head.get('t')!r}")
            if not self._channel.has_frame():
                return True

    def _run(self, head: dict[str, Any], body: memoryview) -> None:
        """Fork a child with this task, and those of the frames behind it, in rows."""
        if self._nursery is None:
            self._refuse(head["child"], "a spawner has no workload to fork")
            return
        orders: list[young.Order] = []
        while self._channel.next_is(_RUN) and len(orders) < FORKS_IN_A_ROW - 1:
            orders.append((head, memoryview(bytes(body))))  # the next frame takes its place
            frame = self._channel.receive()
            assert frame is not None
            head, body = frame
        orders.append((head, body))
        self._score(system.CHILD_OOM_SCORE_ADJ)
        try:
            refused = self._nursery.fork(orders)
        finally:
            self._score(0)
        for id, reason in refused:  # noqa: A001
            self._refuse(id, reason)

    def _tell_of_the_old(self, nursery: young.Nursery) -> None:
        """The agent gets to know children that are young no more."""
        old = nursery.release()
        for start in range(0, len(old), FORKS_IN_A_ROW):
            self._announce(old[start : start + FORKS_IN_A_ROW])

    def _fork_all(self, head: dict[str, Any]) -> None:
        ids = [each["child"] for each in head.get("children", ())]
        self._score(system.CHILD_OOM_SCORE_ADJ)
        try:
            for start in range(0, len(ids), FORKS_IN_A_ROW):
                self._fork_some(ids[start : start + FORKS_IN_A_ROW])
        finally:
            self._score(0)

    def _fork_some(self, ids: list[int]) -> None:
        """Fork these children, and tell of all of them at once.

        After a fork each page that is written to must be copied, here as in the child: so nothing is done between two.
        """
        births, parent, fork = self._births, self._pid, os.fork
        if births is None:
            for id in ids:  # noqa: A001
                self._refuse(id, "a spawner has no workload to fork")
            return
        prepared: list[tuple[int, Ends]] = []
        forked: list[tuple[int, Ends, int]] = []
        for id in ids:  # noqa: A001
            try:
                prepared.append((id, Ends(has_channel=True, pipes=2)))
            except OSError as error:
                self._refuse(id, error.strerror)
        # What this process has allocated since then would make a child's first allocation a collection.
        gc.freeze()
        for id, ends in prepared:  # noqa: A001
            try:
                pid = fork()
            except OSError as error:
                ends.close()
                self._refuse(id, error.strerror)
                continue
            if pid == 0:
                assert ends.far is not None
                births.idle(parent, (ends.far, ends.theirs[0], ends.theirs[1]))
            forked.append((id, ends, pid))
        self._announce([self._adopt(child, ends, pid, -1) for child, ends, pid in forked])

    def _branch(self, head: dict[str, Any]) -> None:
        """Fork a template."""
        number = head["template"]
        log = self._channel.take_descriptors(1)[0] if head.get("log") else -1
        near = far = None
        try:
            near, far = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
            if self._become_branch is None:
                raise OSError(0, "a spawner has no workload")
            gc.freeze()
            pid = os.fork()
            if pid == 0:
                self._become_branch(self._pid, far, log)
            pidfd = os.pidfd_open(pid)
            self._known.add(pid)
            self._branches[pidfd] = pid
            self._poll.register(pidfd, select.EPOLLIN)
            self._send_unsent()
            self._channel.send({"t": "branched", "template": number, "pid": pid}, b"", [near.fileno(), pidfd])
        except OSError as error:
            if isinstance(error, (BrokenPipeError, ConnectionResetError)):
                raise
            self._send({"t": "branch_failed", "template": number, "message": f"cannot fork: {error.strerror}"})
        finally:
            for end in (near, far):
                if end is not None:
                    end.close()
            if log >= 0:
                os.close(log)

    def _reap_branch(self, pidfd: int) -> None:
        pid = self._branches.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        os.waitpid(pid, 0)
        self._known.discard(pid)

    def _exec(self, head: dict[str, Any]) -> None:
        stdin = self._channel.take_descriptors(1)[0] if head.get("stdin") else -1
        self._score(system.CHILD_OOM_SCORE_ADJ)
        try:
            self._make(head["child"], head, stdin)
        finally:
            self._score(0)
            if stdin >= 0:
                os.close(stdin)

    def _make(self, id: int, program: dict[str, Any], stdin: int) -> None:  # noqa: A002
        """Fork a child which execs. Its `forked` is sent when the exec has succeeded."""
        try:
            ends = Ends(has_channel=program.get("kind") == "fresh", pipes=3)
        except OSError as error:
            self._refuse(id, error.strerror)
            return
        try:
            pid = os.fork()
        except OSError as error:
            ends.close()
            self._refuse(id, error.strerror)
            return
        if pid == 0:
            channel = -1 if ends.far is None else ends.far.detach()
            spawn.run(program, self._pid, (channel, ends.theirs[0], ends.theirs[1]), stdin, ends.theirs[2])
        failure = ends.ours.pop()  # the pipe that tells of it stays here
        self._watch(failure, self._adopt(id, ends, pid, failure))

    def _refuse(self, id: int, reason: str | None) -> None:  # noqa: A002
        self._send({"t": "fork_failed", "child": id, "message": f"cannot fork: {reason}"})

    def _adopt(self, id: int, ends: Ends, pid: int, failure: int) -> young.Child:  # noqa: A002
        pidfd = os.pidfd_open(pid)
        ends.close_theirs()
        made = young.Child(id, pid, pidfd, ends.ours, failure)
        self._children[id] = made
        self._watch(pidfd, made)
        return made

    def _watch(self, fd: int, made: young.Child) -> None:
        self._by_fd[fd] = made
        self._poll.register(fd, select.EPOLLIN)

    def _forget(self, fd: int) -> None:
        # Explicitly: a forked child may hold a copy for a moment yet, and with it the registration.
        self._poll.unregister(fd)
        del self._by_fd[fd]
        os.close(fd)

    def _announce(self, children: list[young.Child]) -> None:
        """Tell of these children in one message of the socket's; each frame takes its descriptors in turn."""
        self._send_unsent()
        frames: list[bytes] = []
        fds: list[int] = []
        for made in children:
            own = [*made.fds, made.pidfd]
            fds += own
            head = b'{"t":"forked","child":%d,"pid":%d,"fds":%d}' % (made.id, made.pid, len(own))
            frames.append(wire.HEADER.pack(len(head), 0) + head)
        if frames:
            self._channel.send_packed(b"".join(frames), fds)
        for made in children:
            self._drop_ends(made)

    def _drop_ends(self, made: young.Child) -> None:
        for fd in made.fds:
            os.close(fd)
        made.fds = []

    def _attend(self, fd: int, made: young.Child) -> None:
        if made.failure >= 0:
            self._hear_exec(made)
        if fd == made.pidfd:
            self._reap(made)

    def _hear_exec(self, made: young.Child) -> None:
        made.message = os.read(made.failure, 4096).decode("utf-8", "replace")
        self._forget(made.failure)
        made.failure = -1
        if made.message:
            self._drop_ends(made)
        else:
            self._announce([made])

    def _reap(self, made: young.Child) -> None:
        _signal_group(made.pid, signal.SIGKILL)
        _, status, usage = os.wait4(made.pid, 0)
        self._forget(made.pidfd)
        del self._children[made.id]
        if made.near is not None and self._nursery is not None:
            self._nursery.has_ended(made)
        if made.message:
            self._send({"t": "fork_failed", "child": made.id, "message": made.message, "exec": True})
        else:
            self._ended.append((time.monotonic() + ORPHAN_LIMIT_S, made, status, usage))

    def _settle_ended(self) -> None:
        """Report the children whose orphans are gone by now."""
        if not self._ended:
            return
        orphans = self._kill_orphans()
        has_orphans = bool(orphans)
        if has_orphans and time.monotonic() < self._ended[0][0]:
            return
        if has_orphans:
            self._stuck.update(orphans)
            self._send({"t": "stuck", "pids": orphans})
        ended, self._ended = self._ended, []
        for _, made, status, usage in ended:
            if made.near is None:
                self._unsent.append(_exited(made, status, usage))
                continue
            assert self._nursery is not None
            frame, passed = self._nursery.sum_up(made, status, usage, has_orphans)
            self._unsent.append(frame)
            if passed:
                # Descriptors come with the first byte of their frame.
                self._unsent.pop()
                self._send_unsent()
                self._channel.send_packed(frame, passed)
                for fd in passed:
                    os.close(fd)

    def _kill_orphans(self) -> list[int]:
        """Kill and reap the children that nobody knows. Those that are there yet."""
        if self._below is None:
            return []
        found = os.pread(self._below, 1 << 16, 0).split()
        if len(found) == len(self._known) + len(self._stuck) + len(self._children):
            return []  # whom we know is there until we have reaped him
        known = self._known | self._stuck | {made.pid for made in self._children.values()}
        left: list[int] = []
        for pid in map(int, found):
            if pid in known:
                continue
            os.kill(pid, signal.SIGKILL)  # our own child, not reaped: the id is its own
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                left.append(pid)
        return left

    def _reap_stuck(self) -> None:
        for pid in list(self._stuck):
            if os.waitpid(pid, os.WNOHANG)[0]:
                self._stuck.discard(pid)

    def _kill(self, head: dict[str, Any]) -> None:
        made = self._children.get(head.get("child", -1))
        if made is not None:
            kill_tree(made.pid, int(head.get("signal", signal.SIGTERM)))

    def _stats(self) -> None:
        resident, anonymous = system.memory_bytes()
        counts = {"threads": len(system.thread_ids()), "children": len(self._children)}
        self._send({"t": "stats", "rss": resident, "anon": anonymous, **counts})

    def _kill_all(self) -> None:
        for made in self._children.values():
            kill_tree(made.pid, signal.SIGKILL)

    def _score(self, adjustment: int) -> None:
        """Children inherit the readiness to be killed for memory; setting it around a fork costs less than in each
        child."""
        if self._oom is not None:
            try:
                os.pwrite(self._oom, b"%d" % adjustment, 0)
            except OSError:
                self._oom = None

    def _send(self, head: dict[str, Any]) -> None:
        self._unsent.append(wire.pack(head))

    def _send_unsent(self) -> None:
        if self._unsent:
            self._channel.send_packed(b"".join(self._unsent))
            self._unsent.clear()

    def _log(self, level: str, text: str) -> None:
        self._send({"t": "log", "level": level, "text": text})


def _exited(made: young.Child, status: int, usage: resource.struct_rusage) -> bytes:
    head = (
        f'{{"t":"exited","child":{made.id},"pid":{made.pid},"status":{status},"utime":{usage.ru_utime!r},'
        f'"stime":{usage.ru_stime!r},"minflt":{usage.ru_minflt},"majflt":{usage.ru_majflt},'
        f'"nvcsw":{usage.ru_nvcsw},"nivcsw":{usage.ru_nivcsw},"inblock":{usage.ru_inblock},'
        f'"oublock":{usage.ru_oublock}}}'
    ).encode()
    return wire.HEADER.pack(len(head), 0) + head


def kill_tree(pid: int, number: int) -> None:
    """Signal a child, its process group and all of its descendants. SIGKILL is repeated while new ones turn up."""
    done: set[int] = set()
    for _ in range(KILL_ROUNDS_MAX if number == signal.SIGKILL else 1):
        new = set(system.descendants_of(pid)) - done
        if not new:
            break
        _signal_outside_group(pid, new, number)
        done |= new
    _signal_group(pid, number)


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        # Not yet its own group (it has just been forked), or nobody is left in it.
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return


def _signal_outside_group(top: int, pids: set[int], number: int) -> None:
    """By pidfd, and only those that are still below `top` when their descriptor is open: ids are used again."""
    opened: dict[int, int] = {}
    try:
        for pid in pids:
            try:
                if os.getpgid(pid) != top:
                    opened[pid] = os.pidfd_open(pid)
            except OSError:
                continue  # gone already
        below = set(system.descendants_of(top)) if opened else set()
        for pid in opened.keys() & below:
            try:
                signal.pidfd_send_signal(opened[pid], number)
            except (ProcessLookupError, PermissionError):
                continue
    finally:
        for fd in opened.values():
            os.close(fd)
