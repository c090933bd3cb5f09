"""Certificates and event loops for the tests of `herder_shared`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from herder_shared import tls
from herder_shared.ids import ClusterId
from herder_shared.wire.messages import Role

CLUSTER = ClusterId("c1" * 16)
OTHER_CLUSTER = ClusterId("0d" * 16)

Run = Callable[[Coroutine[Any, Any, None]], None]


class Authority:
    """A cluster's authority, which makes each identity once."""

    def __init__(self, folder: Path, cluster: ClusterId) -> None:
        self.folder = folder
        self.cluster = cluster
        tls.create_authority(folder / "authority", cluster)

    def identity(self, role: Role, name: str, days: int | None = None) -> Path:
        folder = self.folder / f"{role}-{name}-{days}"
        if not folder.exists():
            tls.issue(self.folder / "authority", folder, role, name, days)
        return folder


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("cluster"), CLUSTER)


@pytest.fixture(scope="session")
def other_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other"), OTHER_CLUSTER)


@pytest.fixture(scope="session")
def warm_uvloop() -> None:
    """libuv opens a pipe for signals with its first loop and keeps it for the life of the process."""
    uvloop.new_event_loop().close()


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest, warm_uvloop: None) -> Iterator[Run]:
    """Run a coroutine in a loop of each kind, and fail on whatever the loop would only have logged."""
    complaints: list[dict[str, Any]] = []

    def run_it(coroutine: Coroutine[Any, Any, None]) -> None:
        factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.get_loop().set_exception_handler(lambda _, context: complaints.append(context))
            runner.run(asyncio.wait_for(coroutine, 30))

    yield run_it
    assert complaints == []
