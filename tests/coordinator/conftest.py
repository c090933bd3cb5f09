"""A real PostgreSQL for the tests of the coordinator, one for all of them; each test has a database of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.postgres import Postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def database(postgres: Postgres) -> str:
    """The URL of an empty database."""
    return postgres.new_database()
