"""The command `herder`: finds the subcommand, runs it, turns errors into one line and an exit status.

Nothing is imported before it is needed: `herder --help` reads the table below, a subcommand's module is imported when
it is run. Subcommands of the other components (coordinator, agent, launch) are found by the entry point group
`herder.commands`, so that the client never imports them by name and works without their extras.

Exit status: 0 done, 1 tasks failed, 2 usage or configuration, 3 cannot reach the cluster or not allowed, 130 Ctrl-C.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "herder.commands"

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130

#: Name → (where it is, what it does). The help text lives here so that `--help` imports none of them.
OWN_COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("herder.cli.demo:command", "Local cluster, a real analysis, and where the core-seconds went."),
    "init": ("herder.cli.init:command", "Make a profile: certificate authority, coordinator and client keys."),
    "keys": ("herder.cli.keys:keys", "List, issue and revoke certificates."),
    "nodes": ("herder.cli.nodes:nodes", "List the nodes."),
    "drain": ("herder.cli.nodes:drain", "Empty a node: what runs is finished, nothing new is started."),
    "workloads": ("herder.cli.nodes:workloads", "Workloads: start method, fork point, audit."),
    "status": ("herder.cli.nodes:status", "The coordinator, its tasks and agents, in one view."),
    "submit": ("herder.cli.submit:command", "Run a command as a job of one or many tasks."),
    "run": ("herder.cli.run:command", "Run a Python script with herder.Client() ready."),
    "jobs": ("herder.cli.jobs:jobs", "List the jobs."),
    "job": ("herder.cli.jobs:job", "Show one job."),
    "wait": ("herder.cli.jobs:wait", "Wait until a job has ended."),
    "cancel": ("herder.cli.jobs:cancel", "Cancel a job, or some of its tasks."),
    "retry": ("herder.cli.jobs:retry", "Run a job's failed tasks again."),
    "pause": ("herder.cli.policy:pause", "Start no more tasks of a job, or on a node."),
    "resume": ("herder.cli.policy:resume", "Let a paused job, or node, go on."),
    "priority": ("herder.cli.policy:priority", "Give a job another priority."),
    "logs": ("herder.cli.jobs:logs", "Show what a job's tasks wrote."),
    "bench": ("herder.cli.bench.command:command", "The built-in benchmarks."),
}

#: What `--help` says of the other components' commands; another one found by entry point is listed without a text.
OTHER_COMMANDS: dict[str, str] = {
    "up": "Start a coordinator and agents over SSH.",
    "down": "Stop all agents, then the coordinator.",
    "coordinator": "Run a coordinator in the foreground.",
    "agent": "Run an agent in the foreground.",
    "audit": "Is this preload safe to fork? Step by step, with the fork point it would choose.",
}

#: The extra that brings what another component's command needs.
EXTRAS = {"herder_launch": "launch", "herder_coordinator": "coordinator", "herder_agent": "agent"}


def other_commands() -> dict[str, EntryPoint]:
    """The subcommands that other installed distributions or components offer."""
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def load(target: str) -> click.Command:
    """Import `package.module:attribute`."""
    module, _, attribute = target.partition(":")
    command = getattr(importlib.import_module(module), attribute)
    assert isinstance(command, click.Command), target
    return command


def load_other(point: EntryPoint) -> click.Command:
    """Import another component's command.

    Raises:
        ConfigError: something that it needs is not installed; says what to install.
    """
    from herder_shared.errors import ConfigError

    try:
        return load(point.value)
    except ImportError as error:
        extra = EXTRAS.get(point.value.partition(".")[0], "all")
        raise ConfigError(
            f"`herder {point.name}` cannot be loaded ({error}); install what it needs: pip install 'herder[{extra}]'"
        ) from error


class Herder(click.Group):
    """The group `herder`: lazy subcommands, and the one place where errors become an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return [*OWN_COMMANDS, *(name for name in sorted(other_commands()) if name not in OWN_COMMANDS)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if own := OWN_COMMANDS.get(cmd_name):
            return load(own[0])
        point = other_commands().get(cmd_name)
        return load_other(point) if point else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            near = get_close_matches(args[0], self.list_commands(ctx), n=1)
            if near:
                raise click.UsageError(f"no such command {args[0]!r}; did you mean {near[0]!r}?", ctx) from error
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [
            (name, OWN_COMMANDS[name][1] if name in OWN_COMMANDS else OTHER_COMMANDS.get(name, ""))
            for name in self.list_commands(ctx)
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,  # noqa: ARG002 - click's signature; errors are always ours to show
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        sys.exit(run(super().main, args, prog_name, complete_var, False, windows_expand_args, **extra))


def run(call: Any, *args: Any, **extra: Any) -> int:
    """Call click's `main` outside its standalone mode; say what went wrong on stderr; return the exit status."""
    from herder_shared.errors import HerderError

    try:
        result = call(*args, **extra)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("herder: interrupted", err=True)
        return EXIT_INTERRUPTED
    except HerderError as error:
        click.echo(error_line(error), err=True)
        return exit_status(error)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        click.echo(f"herder: {error.strerror or error}{where}", err=True)
        return EXIT_USAGE
    return result if isinstance(result, int) else 0


def exit_status(error: BaseException) -> int:
    """The exit status that stands for this error (API.md, section 2)."""
    from herder_shared import errors

    match error:
        case errors.TaskError() | errors.Unschedulable():
            return EXIT_FAILED
        case errors.Unreachable() | errors.Unauthorized() | errors.ProtocolMismatch() | errors.RemoteProtocolError():
            return EXIT_UNREACHABLE
        case _:
            return EXIT_USAGE


def error_line(error: BaseException) -> str:
    """One line: what happened, where, and (it is in the message) what to do. Safe to show on a terminal."""
    from herder.cli.output import escape_controls

    text = " ".join(str(error).split()) or type(error).__name__
    parts = [f"{name} {value}" for name in ("task_id", "node", "attempt") if (value := getattr(error, name, None))]
    is_said = str(getattr(error, "task_id", None)) in text
    where = f" ({', '.join(parts).replace('task_id', 'task')})" if parts and not is_said else ""
    return f"herder: {escape_controls(text)}{where}"


def print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    """Answer `--version` without importing `importlib.metadata` otherwise."""
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import version

    click.echo(f"herder {version('herder')}, Python {sys.version.split()[0]}")
    ctx.exit()


@click.group(cls=Herder, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=print_version, help="Show the version."
)
def cli() -> None:
    """Runs Python functions and commands on many cores: a process per task, forked where that is safe.

    `herder demo` shows it on this machine; `herder init` and `herder up` make a cluster.
    Exit status: 0 done, 1 tasks failed, 2 usage or configuration, 3 cannot reach or not allowed.
    """


def main() -> NoReturn:
    """The console script."""
    cli.main(prog_name="herder")
