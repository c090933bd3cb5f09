"""A fake coordinator and a client of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import herder
from support.fake_coordinator import FakeCoordinator, make_folder


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile's folder with an authority and the identities that it issued."""
    return make_folder(tmp_path_factory.mktemp("profile"))


@pytest.fixture
def coordinator(keys: Path) -> Iterator[FakeCoordinator]:
    """A running fake coordinator."""
    fake = FakeCoordinator(keys)
    fake.start()
    yield fake
    fake.close()


@pytest.fixture
def client(coordinator: FakeCoordinator) -> Iterator[herder.Client]:
    """A client of it, aborted at the end, whatever the test left open."""
    client = herder.Client(profile=coordinator.profile())
    yield client
    client.abort()
