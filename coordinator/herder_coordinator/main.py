"""The coordinator's program: arguments → configuration → a hardened process → the server, until a signal or its end.

Exit status: 0 ended as asked; 2 configuration (a file, key, address or option is wrong); 3 another coordinator holds
the state folder; 4 the journal cannot be used or failed; 5 a bug of ours. Each with one line on stderr that says what
to do; nothing was acknowledged that is not on disk, so starting it again goes on from there.

With a store in PostgreSQL a second coordinator does not end with status 3: it stands by until it is needed."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import logging
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from herder_coordinator.core.room import Room
from herder_coordinator.core.snapshot import snapshot
from herder_coordinator.core.state import new_state
from herder_coordinator.core.step import finish_replay, replay_record
from herder_coordinator.journal import sqlite
from herder_coordinator.journal.interface import JournalDamaged, JournalError, JournalFull, JournalLocked, StandBy
from herder_coordinator.journal.shelf import FileShelf
from herder_coordinator.journal.stored import StoredJournal
from herder_coordinator.server.server import Server
from herder_shared import tls
from herder_shared.config import CoordinatorConfig, check_private_folder, default_state_dir, load_config
from herder_shared.errors import ConfigError, HerderError
from herder_shared.ids import ClusterId

log = logging.getLogger(__name__)

#: Opens a journal: of which cluster, how to stand by, whether to repair it.
Opener = Callable[[ClusterId, StandBy | None, bool], StoredJournal]

EXIT_CONFIG = 2
EXIT_LOCKED = 3
EXIT_JOURNAL = 4
EXIT_BUG = 5

_PR_SET_DUMPABLE = 4


@click.command(name="coordinator")
@click.option("--config", type=click.Path(path_type=Path), help="TOML file with the same keys as the options.")
@click.option("--identity", type=click.Path(path_type=Path), help="Folder with the coordinator's key and certificate.")
@click.option("--state-dir", type=click.Path(path_type=Path), help="Folder for journal and blobs.")
@click.option("--store", metavar="URL", help="postgresql://… for the journal; several coordinators may stand by.")
@click.option("--blob-dir", type=click.Path(path_type=Path), help="Folder for blobs.  [default: in the state folder]")
@click.option("--listen", metavar="HOST:PORT", help="Address for agents and clients.")
@click.option("--http-listen", metavar="HOST:PORT", help="Address for metrics, API and page.")
@click.option("--lease-s", type=float, help="Seconds for which a silent agent is trusted.")
@click.option("--reconnect-grace-s", type=float, help="Seconds for which a disconnected agent may be away.")
@click.option("--disconnect-grace-s", type=float, help="Seconds after which a vanished client's jobs are cancelled.")
@click.option("--heartbeat-s", type=float, help="Seconds between heartbeats.")
@click.option("--share", "shares", multiple=True, metavar="OWNER=WEIGHT", help="Part of the cores; may be repeated.")
@click.option("--share-half-life-s", type=float, help="Seconds after which what owners had counts half.")
@click.option("--hello-fd", type=int, help="Descriptor for one line of JSON when ready.")
@click.option("--lifeline-fd", type=int, help="Descriptor whose end of file ends the program.")
@click.option("--repair", is_flag=True, help="Drop what is damaged of the journal, say what that was, and end.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="How much goes to stderr.")
def command(config: Path | None, repair: bool, **flags: Any) -> None:
    """Run a coordinator in the foreground."""
    sys.exit(_run_program(config, flags, _repair if repair else _run))


def main() -> None:
    """For `python -m herder_coordinator`."""
    command(prog_name="herder coordinator")


def _run_program(file: Path | None, flags: dict[str, Any], run: Callable[[CoordinatorConfig], int]) -> int:
    try:
        config = _load(file, flags)
        start_logging(config.log_level)
        harden()
        return run(config)
    except ConfigError as error:
        return _complain(error, EXIT_CONFIG)
    except JournalLocked as error:
        return _complain(error, EXIT_LOCKED)
    except JournalFull as error:
        cure = "make room on that disk and start the coordinator again; what was acknowledged is kept"
        return _complain(f"{error}: {cure}", EXIT_JOURNAL)
    except JournalError as error:
        return _complain(error, EXIT_JOURNAL)
    except HerderError as error:
        return _complain(error, EXIT_CONFIG)


def _complain(error: object, status: int) -> int:
    click.echo(f"herder coordinator: {escape(str(error))}", err=True)
    return status


def _load(file: Path | None, flags: dict[str, Any]) -> CoordinatorConfig:
    if flags.get("state_dir") is None and "HERDER_COORDINATOR_STATE_DIR" not in os.environ and file is None:
        flags["state_dir"] = default_state_dir(os.environ, os.getuid()) / "coordinator"
    flags["shares"] = _weights(flags.get("shares") or ())
    config = load_config(CoordinatorConfig, file=file, environ=os.environ, prefix="COORDINATOR", flags=flags)
    for owner, weight in config.shares.items():
        if not 0 < weight < math.inf:
            raise ConfigError(f"the share of {owner!r} must be a number above 0, not {weight}")
    if not 0 < config.share_half_life_s < math.inf:
        raise ConfigError(f"share_half_life_s must be a number of seconds above 0, not {config.share_half_life_s}")
    try:
        config.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the state folder {config.state_dir} cannot be made: {error}") from error
    check_private_folder(config.state_dir, os.getuid())
    return config


def _weights(pairs: Sequence[str]) -> dict[str, float] | None:
    try:
        return {owner: float(weight) for owner, _, weight in (pair.rpartition("=") for pair in pairs)} or None
    except ValueError as error:
        raise ConfigError(f"--share wants OWNER=WEIGHT, as in --share ann=3: {error}") from error


def _opener(config: CoordinatorConfig) -> Opener:
    """What opens the configured store. (PostgreSQL's client is imported only where it is used.)"""
    if not config.store:
        return lambda cluster, _stand_by, repair: sqlite.open_journal(config.state_dir, cluster, repair=repair)
    from herder_coordinator.journal import postgres

    postgres.check_url(config.store)
    return lambda cluster, stand_by, repair: postgres.open_journal(
        config.store, config.state_dir, cluster, lease_s=config.lease_s, stand_by=stand_by, repair=repair
    )


def _repair(config: CoordinatorConfig) -> int:
    """Read what can be read, write it anew, say what was dropped; the damaged journal's copy is the user's business."""
    cluster = tls.cluster_of(config.identity)
    journal = _opener(config)(cluster, None, True)
    shelf = FileShelf(config.state_dir)
    try:
        state = new_state(cluster, journal.epoch, room=Room(shelf))
        try:
            for record in journal.replay():
                replay_record(state, record)
            finish_replay(state, 0.0)
        except (AssertionError, KeyError) as error:
            raise JournalDamaged(
                f"what can be read of the journal makes no whole ({error}), so that it cannot be repaired: restore the "
                "state folder from a copy; if there is none, an empty folder is a new beginning"
            ) from error
        assert journal.dropped is not None
        lines = journal.dropped.report()
        for line in lines:
            click.echo(escape(line))
        if journal.dropped:
            report = config.state_dir / f"journal.repaired-{journal.epoch}"
            report.write_text("\n".join(lines) + "\n", encoding="utf-8")
            journal.begin(snapshot(state))
            click.echo(f"the journal was written anew without it; this report is kept in {report}")
    finally:
        shelf.close()
        journal.close()
    return 0


def _run(config: CoordinatorConfig) -> int:
    opener = _opener(config)
    gc.freeze()  # modules and classes live as long as the program
    gc.set_threshold(50_000, 10, 5)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        try:
            runner.run(_serve(config, opener))
        except (HerderError, JournalError):
            raise
        except (
            Exception
        ):  # the top of the program: whatever it is, it is ours, and the journal has what was acknowledged
            log.exception("a bug; what was acknowledged is safe: start the coordinator again, and please report this")
            return EXIT_BUG
    return 0


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _serve(config: CoordinatorConfig, opener: Opener) -> None:
    server = Server(config, lambda _state_dir, cluster: opener(cluster, server.stand_by, False))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.end, signal.Signals(number).name)
    if config.lifeline_fd is not None:
        _watch_lifeline(loop, config.lifeline_fd, server)
    try:
        await server.run(lambda started: _say_hello(config, started))
    finally:
        if config.lifeline_fd is not None:
            loop.remove_reader(config.lifeline_fd)


def _watch_lifeline(loop: asyncio.AbstractEventLoop, fd: int, server: Server) -> None:
    """End when whoever started us, and holds the pipe's other end, is gone."""

    def readable() -> None:
        if not os.read(fd, 4096):
            loop.remove_reader(fd)
            server.end("whoever started it is gone")

    try:
        os.set_blocking(fd, False)
        os.set_inheritable(fd, False)
        loop.add_reader(fd, readable)
    except OSError as error:
        raise ConfigError(f"--lifeline-fd {fd} is not an open pipe: {error}") from error


def _say_hello(config: CoordinatorConfig, server: Server) -> None:
    if config.hello_fd is None:
        return
    hello = {
        "pid": os.getpid(),
        "address": server.address,
        "http": server.http.address,
        "epoch": server.epoch,
        "cluster": server.cluster,
        "node": "",
    }
    try:
        with os.fdopen(config.hello_fd, "w", encoding="utf-8") as pipe:
            pipe.write(json.dumps(hello) + "\n")
    except OSError as error:
        raise ConfigError(f"--hello-fd {config.hello_fd} cannot be written: {error}") from error


# --- the process -----------------------------------------------------------------------------------------------------


def harden() -> None:
    """Make unpickling impossible in this process, and its memory unreadable for others of the same user. A thousand
    agents and their clients need more descriptors than the usual limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sys.addaudithook(_forbid_unpickling)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _forbid_unpickling(event: str, _arguments: object) -> None:
    if event == "pickle.find_class":
        raise RuntimeError("the coordinator never unpickles: what users send stays bytes here")


def escape(text: str) -> str:
    """Text for a terminal or a log line: control characters become visible, so that no name can fake a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class _Lines(logging.Formatter):
    """`2026-01-31T12:00:00.123Z warning herder.wire text`, one line each, tracebacks indented behind."""

    def format(self, record: logging.LogRecord) -> str:
        wall = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = f"{wall}.{int(record.msecs):03d}Z {record.levelname.lower()} {record.name} {escape(record.getMessage())}"
        if record.exc_info:
            trace = self.formatException(record.exc_info).splitlines()
            line += "".join(f"\n    {escape(part)}" for part in trace)
        return line


def start_logging(level: str) -> None:
    """Log to stderr."""
    stream = logging.StreamHandler()
    stream.setFormatter(_Lines())
    logging.basicConfig(level=level.upper(), handlers=[stream], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
