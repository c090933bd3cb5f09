"""A throw-away PostgreSQL: a cluster of its own below the temporary folder, reached by nothing but a Unix socket.

As root it runs as `nobody`, since PostgreSQL refuses root. Syncs are off (`fsync = off`): what is tested are our
statements and the server's sessions, not its disk; a killed *process* loses nothing of what it wrote."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg

from support.requirements import unmet

USER = "herder"
_START_S = 20.0
_SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "8MB",
    "max_connections": "30",
    "max_wal_senders": "0",
    "wal_level": "minimal",
    "autovacuum": "off",
    # nothing in /dev/shm
    "dynamic_shared_memory_type": "mmap",
}


def find_programs() -> Path:
    """The folder with `initdb` and `postgres`; skip (on CI: fail) where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    if on_path is None:
        unmet("this test needs PostgreSQL's server (Debian package postgresql)")
    return Path(on_path).resolve().parent


class Postgres:
    """One server, from `start` to `stop`."""

    def __init__(self) -> None:
        self._programs = find_programs()
        parent = os.environ.get("PYTEST_DEBUG_TEMPROOT") if os.getuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix="herder-pg-", dir=parent))
        self._user = "nobody" if os.getuid() == 0 else None
        if self._user is not None:
            account = pwd.getpwnam(self._user)
            os.chown(self.folder, account.pw_uid, account.pw_gid)
        self._cluster = self.folder / "cluster"
        self._names = itertools.count()
        self.process: subprocess.Popen[bytes] | None = None
        initdb = [
            "initdb",
            "-D",
            str(self._cluster),
            "-U",
            USER,
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-sync",
            "--locale=C",
        ]
        self._run(initdb).wait(60)

    def _run(self, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [str(self._programs / command[0]), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                user=self._user,
                group=pwd.getpwnam(self._user).pw_gid if self._user else None,
                extra_groups=[] if self._user else None,
                start_new_session=True,
            )

    def start(self) -> None:
        """Have it running, and answering."""
        settings = {**_SETTINGS, "unix_socket_directories": str(self.folder)}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self.process = self._run(["postgres", "-D", str(self._cluster), *options])
        deadline_s = time.monotonic() + _START_S
        while True:
            try:
                psycopg.connect(self.url("postgres")).close()
            except psycopg.OperationalError:
                log = (self.folder / "log").read_text(errors="replace")
                assert self.process.poll() is None, f"PostgreSQL did not start:\n{log}"
                assert time.monotonic() < deadline_s, f"PostgreSQL does not answer:\n{log}"
                time.sleep(0.02)
            else:
                return

    def stop(self) -> None:
        """End it and remove it."""
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)  # at once: nobody reads it again
            self.process.wait(20)
        shutil.rmtree(self.folder)

    def url(self, database: str) -> str:
        """For `psycopg.connect` and `--store`."""
        return f"postgresql://{USER}@/{database}?host={self.folder}"

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"db{next(self._names)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def execute(self, url: str, statement: str) -> None:
        """One statement, from outside."""
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(statement)
