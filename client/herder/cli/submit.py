"""`herder submit`: one command, or one command over many values, as a job."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from herder.cli.main import EXIT_FAILED, error_line
from herder.cli.output import print_json, say, write_output
from herder.cli.placeholders import Command, expand, parse_command, parse_ranges, range_values
from herder.cli.session import cluster_options, connected
from herder.options import Options
from herder_shared.errors import CommandFailed, ConfigError, HerderError
from herder_shared.limits import NAME_CHARS_MAX

if TYPE_CHECKING:
    from herder import Future, Job

#: Failures that `--wait` explains one by one; the rest are counted.
FAILURES_SHOWN_MAX = 20


@click.command(context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@click.option("--array", "ranges", metavar="1-1000", help="A task for each number: 1-1000, 0-99:10, 1,5,8-10.")
@click.option("--each", metavar="FILE", help="A task for each line of FILE (- is stdin).")
@click.option("--stdin-lines", is_flag=True, help="A task for each line of stdin.")
@click.option("--cores", type=float, default=1.0, show_default=True, help="Cores of a task; below 1 it shares one.")
@click.option("--memory", metavar="4GiB", help="Memory of a task: its limit, and what is reserved.")
@click.option("--gpus", type=int, help="GPUs of a task.")
@click.option("--resource", "resources", metavar="NAME=AMOUNT", multiple=True, help="A named resource of a task.")
@click.option("--memory-max", metavar="16GiB", help="How far its memory may grow when a task runs out of it.")
@click.option("--placement", type=click.Choice(["spread", "pack"]), help="Fill nodes evenly, or one after the other.")
@click.option("--nodes", metavar="NAME,...", help="Names or labels of the nodes to use.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Limit of an attempt.")
@click.option("--retries", type=int, help="Further attempts after a task's own failure.")
@click.option("--priority", type=int, help="Higher goes first.")
@click.option("--name", help="The job's name.  [default: the command's]")
@click.option("--tag", "tags", metavar="TAG", multiple=True, help="May be given several times.")
@click.option("--env", "environment", metavar="NAME=VALUE", multiple=True, help="May be given several times.")
@click.option("--cwd", metavar="DIR", help="Folder to run in, on the nodes.")
@click.option(
    "--wait/--detach", "wait_end", default=False, help="Wait and show the output, or return at once (default)."
)
@click.option("--quiet", is_flag=True, help="With --wait: do not show the tasks' output.")
@cluster_options
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND [ARGUMENT...]")
def command(  # noqa: PLR0917 - click passes them by name
    ranges: str | None,
    each: str | None,
    stdin_lines: bool,
    environment: tuple[str, ...],
    cwd: str | None,
    wait_end: bool,
    quiet: bool,
    profile: str | None,
    as_json: bool,
    arguments: tuple[str, ...],
    **options: Any,
) -> None:
    """Run a command as a job of one or many tasks.

    Placeholders as GNU parallel: {} the value, {.} without extension, {/} last part, {//} folder, {/.} last part
    without extension, {#} number of the task from 1. Without any, the value is the last argument. Several arguments are
    exec'd as they are; one argument with blanks or special characters goes to /bin/sh, with values quoted.

    \b
        herder submit --array 1-1000 -- ./simulate --seed {}
        ls *.png | herder submit --stdin-lines --wait -- convert {} {.}.jpg
        herder submit --each names.txt --cores 2 -- 'sort {} | uniq -c > {/.}.counts'
    """
    variables = parse_environment(environment)
    with input_values(ranges, each, stdin_lines) as values:
        parsed = parse_command(arguments, takes_value=values is not None)
        chosen = job_options(options, parsed, detached=not wait_end)
        fed = Fed([parsed.plain()] if values is None else expand(parsed, values))
        with connected(profile, patient=wait_end) as client:
            job = client.options(**chosen).command_array(fed, cwd=cwd, env=variables, name=chosen["name"])
            status = follow(job, as_json=as_json, quiet=quiet or as_json) if wait_end else None
    if fed.error is not None:
        with connected(profile) as client:
            client.job(job.id).cancel()
        raise fed.error
    if status is not None:
        sys.exit(status)
    if as_json:
        print_json({"job": job.id, "name": job.name, "tasks": len(job)})
    else:
        click.echo(job.id)


class Fed:
    """The commands, on their way into the job; `error` is what ended them early.

    They are consumed in the client's own thread. A detached job's end is not waited for, so the error is looked at when
    everything was sent, and what was sent is cancelled.
    """

    def __init__(self, commands: Iterable[list[str] | str]) -> None:
        self._commands = commands
        self.error: HerderError | None = None

    def __iter__(self) -> Iterator[list[str] | str]:
        try:
            yield from self._commands
        except HerderError as error:
            self.error = error
            raise


@contextmanager
def input_values(ranges: str | None, each: str | None, stdin_lines: bool) -> Iterator[Iterator[str] | None]:
    """The values to run the command over, lazily, until the end of the block; None for a plain command.

    Raises:
        click.UsageError: more than one source was given.
    """
    if sum((ranges is not None, each is not None, stdin_lines)) > 1:
        raise click.UsageError("give one of --array, --each and --stdin-lines")
    if ranges is not None:
        yield range_values(parse_ranges(ranges))
    elif each is not None or stdin_lines:
        name = each if each is not None else "-"
        with click.open_file(name, "rb") as stream:
            yield read_lines(stream, "stdin" if name == "-" else name)
    else:
        yield None


def read_lines(stream: Iterable[bytes], name: str) -> Iterator[str]:
    """The lines without their ends, empty ones too.

    Raises:
        ConfigError: a line is not UTF-8; names it.
    """
    for number, line in enumerate(stream, 1):
        try:
            yield line.rstrip(b"\n").removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{name}, line {number}: not UTF-8 ({error.reason}); the job is cancelled") from error


def parse_environment(pairs: Iterable[str]) -> dict[str, str] | None:
    """Read `NAME=VALUE` pairs; None when there are none.

    Raises:
        click.BadParameter: one has no name or no `=`.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"{pair!r}: write NAME=VALUE", param_hint="--env")
        found[name] = value
    return found or None


def parse_resources(pairs: Iterable[str]) -> dict[str, float]:
    """Read `NAME=AMOUNT` pairs.

    Raises:
        click.BadParameter: one has no name, or no number.
    """
    found: dict[str, float] = {}
    for pair in pairs:
        name, _, amount = pair.partition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            name = ""
        if not name:
            raise click.BadParameter(f"{pair!r}: write NAME=AMOUNT, as in licence=1", param_hint="--resource")
    return found


def job_options(options: dict[str, Any], command: Command, *, detached: bool) -> dict[str, Any]:
    """The options given on the command line, as `Client.options` takes them.

    Raises:
        click.UsageError: one has a value that cannot be.
    """
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if "nodes" in given:
        given["nodes"] = tuple(part for part in given["nodes"].split(",") if part)
    if "resources" in given:
        given["resources"] = parse_resources(given["resources"])
    given.setdefault("name", command.arguments[0].split()[0].rpartition("/")[2][:NAME_CHARS_MAX] or "command")
    try:
        Options().with_given(given)
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    return {**given, "detached": detached}


def follow(job: Job, *, as_json: bool, quiet: bool) -> int:
    """Show each task's output when it ends, then the failures; the exit status. Ctrl-C cancels the job."""
    failures: dict[int, str] = {}
    try:
        for future in job.as_completed():
            error = failure_of(future)
            if not quiet:
                show_output(future)
            if error is not None:
                failures[future.index] = error
    except BaseException:
        job.cancel()
        raise
    if as_json:
        print_json({"job": job.id, "name": job.name, "tasks": len(job), "failures": failures})
    for index, text in sorted(failures.items())[:FAILURES_SHOWN_MAX]:
        say(f"task {index}: {text}")
    if failures:
        say(f"{len(failures)} of {len(job)} tasks failed; all of it: herder job {job.id}")
    return EXIT_FAILED if failures else 0


def failure_of(future: Future[Any]) -> str | None:
    """How the task failed, in a line; None when it succeeded."""
    try:
        error = future.exception()
    except CancelledError:
        return "cancelled"
    if error is None:
        return None
    return error_line(error).removeprefix("herder: ") if isinstance(error, HerderError) else repr(error)


def show_output(future: Future[Any]) -> None:
    """A command's output, whole, as the task gave it; of a task that was killed, what was captured."""
    if future.cancelled():
        return
    error = future.exception()
    completed = future.result() if error is None else error.completed if isinstance(error, CommandFailed) else None
    if completed is None:
        completed = future.logs()
    write_output(completed.stdout)
    write_output(completed.stderr, stderr=True)
