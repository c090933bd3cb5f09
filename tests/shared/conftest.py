"""Certificates and event loops for the tests of `herder_shared`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import uvloop

from support.links import CLUSTER, OTHER_CLUSTER, Authority

Run = Callable[[Coroutine[Any, Any, None]], None]


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
            runner.run(asyncio.wait_for(coroutine, 90))

    yield run_it
    assert complaints == []
