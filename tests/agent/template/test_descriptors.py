"""Descriptors that must not be shared make a step unsafe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agent.template import driver


def test_open_database_connection_and_file_for_writing_make_setup_unsafe(tmp_path: Path) -> None:
    target = tmp_path / "some.db"

    def connect() -> Any:
        import sqlite3

        connection = sqlite3.connect(target)
        connection.execute("create table t (x)")
        return connection

    def write() -> Any:
        return open(tmp_path / "log", "w")

    for setup, seen in ((connect, "SQLite"), (write, "open for writing")):
        with driver.ready(setup) as running:
            found = running.steps[1]["findings"]
            assert [finding["rule"] for finding in found] == ["R6"]
            assert seen in found[0]["seen"]
            assert running.ready["fork_point"] == "start"


def test_open_connection_makes_setup_unsafe() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()

        def setup() -> Any:
            import socket

            return socket.create_connection(address)

        with driver.template() as running:
            answer = running.open(setup, start="fork")
    assert answer["cause"] == "fork_unsafe"
    assert f"a connection to 127.0.0.1:{address[1]}" in answer["message"]
