"""Plays the agent: starts a real template and speaks PROTOCOL.md with it over its socket, synchronously."""

from __future__ import annotations

import array
import json
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cloudpickle

import herder_agent.template

FOLDER = Path(herder_agent.template.__file__).parent
CLOUDPICKLE_PATH = str(Path(cloudpickle.__file__).parent.parent)
LIMIT_S = 60.0
HEADER = struct.Struct(">IQ")
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)

Head = dict[str, Any]


RESULT = struct.Struct(">BdddQQQQQ")
DONE = struct.Struct(">BQIIddQQQQIIIB")


def decode(content: bytes) -> Head:
    """A head: JSON, or one of the two that are packed."""
    match content[0]:
        case 1:
            names = ("wall", "utime", "stime", "minflt", "majflt", "inblock", "oublock", "peak")
            return {"t": "result", "blob": False, **dict(zip(names, RESULT.unpack(content)[1:], strict=True))}
        case 2:
            told = ("child", "pid", "status", "utime", "stime", "minflt", "majflt", "inblock", "oublock")
            sizes = ("answer", "out", "err", "fds")
            return {"t": "done", **dict(zip(told + sizes, DONE.unpack(content)[1:], strict=True))}
        case _:
            head: Head = json.loads(content)
            return head


class Frames:
    """One end of a control or task socket, with a deadline on each receive."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._buffer = b""
        self._fds: list[int] = []

    def send(self, head: Head, body: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        text = json.dumps(head).encode()
        frame = HEADER.pack(len(text), len(body)) + text + body
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self.socket.sendmsg([frame], rights)
        if sent < len(frame):
            self.socket.sendall(frame[sent:])

    def receive(self, limit_s: float = LIMIT_S) -> tuple[Head, bytes]:
        """The next frame. Raises EOFError at the end, TimeoutError at the limit."""
        deadline = time.monotonic() + limit_s
        while True:
            if len(self._buffer) >= HEADER.size:
                head_bytes, body_bytes = HEADER.unpack_from(self._buffer)
                middle = HEADER.size + head_bytes
                if len(self._buffer) >= middle + body_bytes:
                    head = decode(self._buffer[HEADER.size : middle])
                    body = self._buffer[middle : middle + body_bytes]
                    self._buffer = self._buffer[middle + body_bytes :]
                    return head, body
            self.socket.settimeout(max(0.001, deadline - time.monotonic()))
            content, fds, _, _ = socket.recv_fds(self.socket, 1 << 20, 64)
            self._fds.extend(fds)
            if not content:
                raise EOFError
            self._buffer += content

    def take(self, count: int) -> list[int]:
        taken, self._fds = self._fds[:count], self._fds[count:]
        assert len(taken) == count
        return taken

    def close(self) -> None:
        self.socket.close()
        for fd in self._fds:
            os.close(fd)


class Child:
    """A child as its agent has it."""

    def __init__(self, template: Template, head: Head, fds: list[int]) -> None:
        self.template = template
        self.id: int = head["child"]
        self.pid: int = head["pid"]
        self.frames = Frames(socket.socket(fileno=fds.pop(0))) if len(fds) == 4 else None
        self.out, self.err, self.pidfd = fds
        self._exited: Head | None = None

    @property
    def task_socket(self) -> Frames:
        assert self.frames is not None
        return self.frames

    def send(self, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        """Send a task; `options` go into its head, but for `retry_on`, `raw_args` and `raw_function` (pickles)."""
        head, inline, files = task_of(function, *args, **options)
        self.task_socket.send(head, b"".join(inline.values()), tuple(files))
        for fd in files:
            os.close(fd)

    def answer(self) -> tuple[Head, Any]:
        """The `result` with its value, or the `error` with its exception (None: did not pickle). `started` is
        skipped."""
        while True:
            head, body = self.task_socket.receive()
            if head["t"] == "started":
                continue
            if head["t"] == "error":
                return head, pickle.loads(body) if head["pickled"] >= 0 else None
            if head["t"] == "result" and head["blob"]:
                (fd,) = self.task_socket.take(1)
                with open(fd, "rb") as file:
                    return head, pickle.loads(file.read())
            return head, pickle.loads(body) if head["t"] == "result" else None

    def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """A task's value; AssertionError with the error otherwise."""
        self.send(function, *args, **options)
        head, value = self.answer()
        assert head["t"] == "result", head
        return value

    def over(self, exited: Head) -> Done:
        """All of it, when it has ended."""
        done = Done({**exited, "answer": 0, "out": 0, "err": 0}, b"", [])
        done.was_introduced = True
        with suppress(EOFError):
            done.answer, done.value = self.answer()
        done.out, done.err = self.output()
        return done

    def exited(self) -> Head:
        return self.template.wait_exited(self.id)

    def output(self) -> tuple[str, str]:
        """All of stdout and stderr, to their ends."""
        texts = []
        for fd in (self.out, self.err):
            content = b""
            while chunk := os.read(fd, 65536):
                content += chunk
            texts.append(content.decode())
        return texts[0], texts[1]

    def close(self) -> None:
        if self.frames is not None:
            self.frames.close()
        for fd in (self.out, self.err, self.pidfd):
            os.close(fd)


class Done:
    """What was told of a child that is over: how it ended, what it answered, what it wrote."""

    def __init__(self, head: Head, body: bytes, files: list[int]) -> None:
        self.head = head
        self.pid: int = head["pid"]
        self.status: int = head["status"]
        middle = head["answer"] + head["out"]
        self.out, self.err = body[head["answer"] : middle].decode(), body[middle:].decode()
        self.was_introduced = False
        self.answer: Head | None
        self.value: Any
        self.answer, self.value = value_in(body[: head["answer"]], files) if head["answer"] else (None, None)
        for fd in files:
            os.close(fd)


class Template:
    """A template process and the agent's end of its control socket."""

    def __init__(
        self, python: str = sys.executable, env: dict[str, str] | None = None, *, log: Path | None = None
    ) -> None:
        ours, theirs = socket.socketpair()
        environment = {"PATH": os.environ["PATH"], "HOME": "/", **(ONE_THREAD if env is None else env)}
        output = open(log, "wb") if log else None  # noqa: SIM115 - closed below
        self.process = subprocess.Popen(
            [python, "-P", "-X", "utf8", str(FOLDER / "main.py"), str(theirs.fileno())],
            env=environment,
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        if output:
            output.close()
        theirs.close()
        self.frames = Frames(ours)
        self.children: dict[int, Child] = {}
        self.steps: list[Head] = []
        self.ready: Head = {}
        #: The memory file of setup's value, where it was published.
        self.values: list[int] = []
        self._made = 0
        self._exited: dict[int, Head] = {}
        self._done: dict[int, Done] = {}

    def open(self, setup: Callable[[], Any] | None = None, **workload: Any) -> Head:
        """Sends `open` and returns `ready` or `failed`; the steps are in `steps`."""
        body = cloudpickle.dumps(setup) if setup else b""
        head = {
            "t": "open",
            "spawner": workload.pop("spawner", False),
            "publish": workload.pop("publish", False),
            "cluster": "c1",
            "node": "here",
            "cloudpickle_path": CLOUDPICKLE_PATH,
            "setup_len": len(body),
            "workload": {"name": "w", "start": "auto", "max_tasks_per_child": 1, "setup_name": "setup", **workload},
        }
        self.frames.send(head, body)
        while True:
            answer, _ = self.frames.receive()
            if answer["t"] != "step":
                self.ready = answer
                self.values = self.frames.take(1) if answer.get("value") else []
                return answer
            self.steps.append(answer)

    def fork(self) -> Child:
        self._made += 1
        self.frames.send({"t": "fork", "n": 1, "children": [{"child": self._made}]})
        return self._expect_child(self._made)

    def hand(self, function: Callable[..., Any], *args: Any, plain: bool = True, **options: Any) -> int:
        """Have a child forked with its task; options as those of `Child.send`. Returns its number."""
        self._made += 1
        mark = f"c1/{self._made}"
        head, inline, _ = task_of(function, *args, **{"env": {"HERDER_ATTEMPT": mark}, "quiet": True, **options})
        text = json.dumps(head).encode()
        middle = len(text) + len(inline["function"])
        order = {
            "t": "run",
            "child": self._made,
            "cpus": head.get("cpus"),
            "attempt": mark,
            "plain": plain,
            "threads": head["threads"],
            "python": head.get("python", ""),
            "len": len(text),
            "cuts": [len(text), middle, middle + len(inline["args"])],
        }
        self.frames.send(order, text + b"".join(inline.values()))
        return self._made

    def done(self, id: int) -> Done:  # noqa: A002
        """Wait for the child with this number. On a slow machine it may grow old meanwhile, and is introduced."""
        while id not in self._done:
            head, body = self.frames.receive()
            match head["t"]:
                case "done":
                    self._done[head["child"]] = Done(head, body, self.frames.take(head["fds"]))
                case "forked":
                    self._adopt(head)
                case "exited":
                    child = self.children.pop(head["child"])
                    self._done[child.id] = child.over(head)
                    child.close()
                case _:
                    raise AssertionError(head)
        return self._done.pop(id)

    def introduced(self) -> Child:
        """A child that is young no more."""
        head = self._expect("forked")
        return self._adopt(head)

    def exec(self, argv: list[str], *, stdin: bytes | None = None, **options: Any) -> Child | Head:
        """The child, or `fork_failed`."""
        self._made += 1
        head = {"t": "exec", "child": self._made, "kind": "command", "argv": argv, "env": dict(os.environ), **options}
        fds = (memfd(stdin),) if stdin is not None else ()
        self.frames.send({**head, "stdin": stdin is not None}, b"", fds)
        for fd in fds:
            os.close(fd)
        answer = self._expect("forked", "fork_failed")
        return self._adopt(answer) if answer["t"] == "forked" else answer

    def fresh(self, python: str = sys.executable) -> Child:
        argv = [python, "-P", "-X", "utf8", str(FOLDER / "fresh.py"), "{fd}"]
        child = self.exec(argv, kind="fresh")
        assert isinstance(child, Child), child
        return child

    def kill(self, child: Child, number: int = signal.SIGKILL) -> None:
        self.frames.send({"t": "kill", "child": child.id, "signal": number})

    def stats(self) -> Head:
        self.frames.send({"t": "stats"})
        return self._expect("stats")

    def wait_exited(self, id: int) -> Head:  # noqa: A002
        while id not in self._exited:
            head, _ = self.frames.receive()
            assert head["t"] == "exited", head
            self._exited[head["child"]] = head
        return self._exited[id]

    def close(self) -> None:
        """Ends the template; asserts that it and its children are gone."""
        for fd in self.values:
            os.close(fd)
        self.frames.close()
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
        for child in self.children.values():
            assert wait_gone(child.pidfd)
            child.close()

    def drop_children(self) -> None:
        """Kill the children that are left, and forget them all."""
        for child in self.children.values():
            self.kill(child)
        for child in self.children.values():
            assert wait_gone(child.pidfd)
            self.wait_exited(child.id)
            child.close()
        self.children.clear()

    def _expect(self, *kinds: str) -> Head:
        while True:
            head, _ = self.frames.receive()
            if head["t"] in kinds:
                return head
            assert head["t"] == "exited", head
            self._exited[head["child"]] = head

    def _expect_child(self, id: int) -> Child:  # noqa: A002
        head = self._expect("forked")
        assert head["child"] == id
        return self._adopt(head)

    def _adopt(self, head: Head) -> Child:
        child = Child(self, head, self.frames.take(head["fds"]))
        self.children[child.id] = child
        return child


def task_of(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Head, dict[str, bytes], list[int]]:
    """A task's head, its inline parts, and memfds of the others."""
    parts = {
        "function": options.pop("raw_function", None) or cloudpickle.dumps(function),
        "args": options.pop("raw_args", None) or cloudpickle.dumps((args, {})),
    }
    retry_on = options.pop("retry_on", None)
    if retry_on is not None:
        parts["retry_on"] = cloudpickle.dumps(retry_on)
    for name, content in options.pop("extra", {}).items():
        parts[name] = content
    if options.pop("cached", False):
        del parts["function"]
    as_fds = options.pop("as_fds", ())
    inline = {name: content for name, content in parts.items() if name not in as_fds}
    head = {
        "t": "task",
        "attempt": "1.1",
        "ordinal": 1,
        "job": "j0b",
        "index": 7,
        "node": "here",
        "function": options.pop("function_id", "f1"),
        "parts": [[name, len(content)] for name, content in inline.items()],
        "fds": list(as_fds),
        "threads": 1,
        **options,
    }
    return head, inline, [memfd(parts[name]) for name in as_fds]


def value_in(content: bytes, files: list[int]) -> tuple[Head, Any]:
    """The answer of a child that is over: as `Child.answer`."""
    head_bytes, body_bytes = HEADER.unpack_from(content)
    middle = HEADER.size + head_bytes
    head = decode(content[HEADER.size : middle])
    body = content[middle : middle + body_bytes]
    if head["t"] == "result" and head["blob"]:
        with open(files[0], "rb", closefd=False) as file:
            return head, pickle.loads(file.read())
    if head["t"] == "error":
        return head, pickle.loads(body) if head["pickled"] >= 0 else None
    return head, pickle.loads(body)


@contextmanager
def template(**options: Any) -> Iterator[Template]:
    running = Template(**options)
    try:
        yield running
    finally:
        running.close()


@contextmanager
def ready(setup: Callable[[], Any] | None = None, **workload: Any) -> Iterator[Template]:
    """A template that is ready to fork."""
    options = {name: workload.pop(name) for name in ("python", "env", "log") if name in workload}
    with template(**options) as running:
        head = running.open(setup, **workload)
        assert head["t"] == "ready", head
        assert head["start"] == "fork", head
        yield running


def memfd(content: bytes) -> int:
    fd = os.memfd_create("test")
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    return fd


def wait_gone(pidfd: int, limit_s: float = 10.0) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(limit_s * 1000))
