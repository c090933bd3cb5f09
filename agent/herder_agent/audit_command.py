"""`herder audit MODULE... [--setup pkg.mod:fn]`: a real template, step by step, and what a fork from it would cost.

Not a simulation: the template that the agent would start is started under the chosen interpreter, its own account of
each step is shown, and forks and fresh starts are timed on the spot. Exit status: 0 when forking is possible; 1 when it
is not, or when a module is not installed (the others are audited all the same).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from herder_agent.runtime.host import template_environment
from herder_shared.limits import MIB
from herder_shared.wire.messages import AuditFinding, AuditStep

_FOLDER = Path(__file__).parent / "template"
_HEADER = struct.Struct(">IQ")
#: Forks and fresh starts that are timed; the median is shown.
FORKS_TIMED = 20
STARTS_TIMED = 3
#: A template that says nothing for this long (a preload or setup that hangs) is given up.
STEP_LIMIT_S = 600.0
#: Prints those of its arguments whose package this interpreter does not find.
_FIND_MISSING = """
import importlib.util, sys
sys.path.insert(0, sys.argv[1])
print(*(name for name in sys.argv[2:] if importlib.util.find_spec(name.partition(".")[0]) is None))
"""


class Verdict(msgspec.Struct, frozen=True):
    """What `--json` prints."""

    python: str
    start: str
    fork_point: str
    reason: str
    steps: tuple[AuditStep, ...]
    #: Medians in seconds; None where that start was impossible. A child's life from being asked for to its end, with
    #: the steps that it must take itself; a fresh interpreter until it is ready, preload and setup included.
    fork_s: float | None = None
    fresh_s: float | None = None
    #: One bare fork of the sealed template, as it measured it itself.
    fork_cost_s: float | None = None
    #: Modules that the interpreter does not have; they were left out.
    missing: tuple[str, ...] = ()


class Broken(Exception):
    """The template failed: a preload or `setup` raised, or it ended. The text is complete."""


@click.command("audit")
@click.argument("modules", nargs=-1, metavar="MODULE...")
@click.option("--setup", metavar="PKG.FN", help="Function to call after the imports: 'pkg.mod:fn' or 'pkg.mod.fn'.")
@click.option("--python", "python", metavar="EXE", default=sys.executable, help="Interpreter of the tasks.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(ctx: click.Context, modules: tuple[str, ...], setup: str | None, python: str, as_json: bool) -> None:
    """Is it safe to fork after importing MODULE... (and running a setup function)?

    Starts a real template, audits it after each step, chooses the fork point, and measures what a fork from there costs
    against a fresh interpreter. Exits with 0 when forking is possible, 1 when it is not or when a module is missing.
    """
    try:
        verdict = audit(modules, setup=_function_name(setup), python=python)
    except Broken as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(verdict)).decode())
    else:
        _show(verdict, Console())
    ctx.exit(0 if verdict.start == "fork" and not verdict.missing else 1)


def audit(modules: tuple[str, ...], *, setup: str | None, python: str) -> Verdict:
    """Run the template and time it. Raises Broken."""
    missing = _missing(python, modules)
    preload = [name for name in modules if name not in missing]
    workload = {"name": "audit", "start": "auto", "preload": preload, "max_tasks_per_child": 1}
    if setup is not None:
        workload |= {"setup_import": setup, "setup_name": setup}
    workload["paths"] = [str(Path.cwd())]
    opening = {"t": "open", "workload": workload, "cloudpickle_path": _cloudpickle_path()}
    steps: list[AuditStep] = []
    with _program(python, "main.py") as control:
        control.send(opening)
        while (answer := control.receive())["t"] == "step":
            steps.append(_step(answer))
        if answer["t"] == "failed":
            # What is not importable is told in a line; only the user's own code deserves a traceback.
            trace = "" if answer.get("type") == "ModuleNotFoundError" else answer.get("traceback", "")
            raise Broken("\n".join(part for part in (trace, answer["message"]) if part))
        if answer.get("value"):
            os.close(control.fds.pop(0))  # setup's published value
        fork_s = _time_forks(control) if answer["start"] == "fork" else None
    fresh_s = statistics.median(_time_fresh(python, opening) for _ in range(STARTS_TIMED))
    return Verdict(
        python=answer["python"],
        start=answer["start"],
        fork_point=answer["fork_point"],
        reason=answer["reason"],
        steps=tuple(steps),
        fork_s=fork_s,
        fresh_s=fresh_s,
        fork_cost_s=answer.get("fork_cost_s"),
        missing=missing,
    )


def _missing(python: str, modules: tuple[str, ...]) -> tuple[str, ...]:
    command_line = [python, "-P", "-c", _FIND_MISSING, str(Path.cwd()), *modules]
    try:
        done = subprocess.run(command_line, env=_environment(), capture_output=True, text=True, check=False)
    except OSError as error:
        raise Broken(f"cannot run {python!r}: {error.strerror}") from error
    if done.returncode:
        raise Broken(f"{python!r} cannot look for modules: {done.stderr.strip()[-500:]}")
    return tuple(done.stdout.split())


def _environment() -> dict[str, str]:
    """As the agent gives it to templates."""
    return template_environment(os.environ, None, {})


class _Control:
    """Our end of the template's (or child's) socket, blocking."""

    def __init__(self, end: socket.socket, process: subprocess.Popen[bytes]) -> None:
        self._socket = end
        self._process = process
        self._buffer = b""
        self.fds: list[int] = []
        end.settimeout(STEP_LIMIT_S)

    def send(self, head: dict[str, Any]) -> None:
        text = json.dumps(head).encode()
        self._socket.sendall(_HEADER.pack(len(text), 0) + text)

    def receive(self) -> dict[str, Any]:
        while True:
            if len(self._buffer) >= _HEADER.size:
                head_bytes, body_bytes = _HEADER.unpack_from(self._buffer)
                end = _HEADER.size + head_bytes + body_bytes
                if len(self._buffer) >= end:
                    head: dict[str, Any] = json.loads(self._buffer[_HEADER.size : _HEADER.size + head_bytes])
                    self._buffer = self._buffer[end:]
                    return head
            try:
                content, fds, _, _ = socket.recv_fds(self._socket, 1 << 16, 16)
            except TimeoutError as error:
                raise Broken(f"the template said nothing for {STEP_LIMIT_S:.0f} s") from error
            except ConnectionResetError:
                content, fds = b"", []
            if not content:
                status = self._process.wait(10)
                how = f"died of signal {-status}" if status < 0 else f"ended with status {status}"
                raise Broken(f"the interpreter {how} in the middle of a step")
            self.fds.extend(fds)
            self._buffer += content


@contextlib.contextmanager
def _program(python: str, script: str) -> Iterator[_Control]:
    """A template or fresh child, ended and reaped at exit."""
    ours, theirs = socket.socketpair()
    try:
        process = subprocess.Popen(
            [python, "-P", "-X", "utf8", str(_FOLDER / script), str(theirs.fileno())],
            env=_environment(),
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=2,  # what modules print must not mix with our own output
        )
    except OSError as error:
        ours.close()
        raise Broken(f"cannot run {python!r}: {error.strerror}") from error
    finally:
        theirs.close()
    control = _Control(ours, process)
    try:
        yield control
    finally:
        ours.close()
        for fd in control.fds:
            os.close(fd)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _time_forks(control: _Control) -> float:
    """Median of the time from asking for a child to its end, in seconds."""
    return statistics.median(_time_fork(control, number) for number in range(FORKS_TIMED))


def _time_fork(control: _Control, number: int) -> float:
    began = time.perf_counter()
    control.send({"t": "fork", "n": 1, "children": [{"child": number}]})
    head = control.receive()
    if head["t"] != "forked":
        raise Broken(head.get("message", "the template did not fork"))
    fds, control.fds = control.fds[: head["fds"]], control.fds[head["fds"] :]
    os.close(fds[0])  # end of file: an idle child ends
    poll = select.poll()
    poll.register(fds[3], select.POLLIN)
    poll.poll(STEP_LIMIT_S * 1000)
    seconds = time.perf_counter() - began
    for fd in fds[1:]:
        os.close(fd)
    control.receive()
    return seconds


def _time_fresh(python: str, opening: dict[str, Any]) -> float:
    began = time.perf_counter()
    with _program(python, "fresh.py") as control:
        control.send(opening)
        answer = control.receive()
        if answer["t"] != "idle":
            raise Broken(answer["message"])
        return time.perf_counter() - began


def _step(head: dict[str, Any]) -> AuditStep:
    return AuditStep(
        step=head["step"],
        seconds=head["seconds"],
        rss_bytes=head["rss"],
        threads=head["threads"],
        verdict=head["verdict"],
        findings=tuple(AuditFinding(**finding) for finding in head["findings"]),
        applied=tuple(head["applied"]),
    )


def _function_name(text: str | None) -> str | None:
    """ "pkg.mod:fn" of that or of "pkg.mod.fn"."""
    if text is None or ":" in text:
        return text
    module, dot, function = text.rpartition(".")
    if not dot:
        raise click.BadParameter(f"{text!r} names no module: expected pkg.mod:fn", param_hint="--setup")
    return f"{module}:{function}"


def _cloudpickle_path() -> str:
    spec = importlib.util.find_spec("cloudpickle")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent.parent)


def _show(verdict: Verdict, console: Console) -> None:
    table = Table(title=f"Fork safety, step by step (Python {verdict.python.partition('/')[0]})", title_justify="left")
    for name in ("step", "seconds", "memory", "threads", "verdict"):
        table.add_column(name, justify="right" if name in ("seconds", "memory", "threads") else "left")
    colours = {"safe": "green", "unsafe": "red", "unknown": "yellow"}
    for step in verdict.steps:
        memory = f"{step.rss_bytes / MIB:.0f} MiB"
        shown = f"[{colours.get(step.verdict, 'default')}]{step.verdict}[/]"
        table.add_row(escape(step.step), f"{step.seconds:.3f}", memory, str(step.threads), shown)
    for name in verdict.missing:
        table.add_row(escape(f"import {name}"), "-", "-", "-", "[red]not installed[/]")
    console.print(table)
    told: set[str] = set()
    for step in verdict.steps:
        for line in _lines(step):
            # What was there after an earlier step is not told again, unless it is what forbids a fork here.
            if line not in told or step.verdict == "unsafe":
                console.print(f"[bold]{escape(step.step)}[/] {escape(line)}", soft_wrap=True, highlight=False)
            told.add(line)
    if verdict.start == "fork":
        start = f"[bold green]Forks after {escape(repr(verdict.fork_point))}.[/]"
    else:
        start = "[bold red]Fresh interpreters only.[/]"
    console.print(f"{start} {escape(verdict.reason)}".rstrip(), soft_wrap=True, highlight=False)
    for line in _costs(verdict):
        console.print(line, soft_wrap=True)
    for name in verdict.missing:
        note = f"{name!r} is not installed for this interpreter, and was left out."
        console.print(f"[bold red]Missing:[/] {escape(note)}", soft_wrap=True, highlight=False)


def _costs(verdict: Verdict) -> Iterator[str]:
    if verdict.fork_cost_s is not None:
        yield f"A bare fork there costs {verdict.fork_cost_s * 1000:.2f} ms (median, measured by the template)."
    if verdict.fork_s is not None:
        yield f"A child forked there lives {verdict.fork_s * 1000:.2f} ms (median of {FORKS_TIMED}; no task)."
    if verdict.fresh_s is not None:
        ratio = f", {verdict.fresh_s / verdict.fork_s:.0f} times as long" if verdict.fork_s else ""
        yield f"A fresh interpreter is ready in {verdict.fresh_s * 1000:.0f} ms (median of {STARTS_TIMED}){ratio}."


def _lines(step: AuditStep) -> Iterator[str]:
    for finding in step.findings:
        reason = f": {finding.reason}" if finding.reason else ""
        cure = f". Cure: {finding.cure}" if finding.cure else ""
        yield f"{finding.rule}, {finding.verdict}: {finding.seen}{reason}{cure}"
    for cure in step.applied:
        yield f"applied: {cure}"
