"""Certificates and event loops for the tests of the coordinator's shell."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import uvloop

from support.links import CLUSTER, Authority

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("cluster"), CLUSTER)


@pytest.fixture(scope="session")
def warm_uvloop() -> None:
    """libuv opens a pipe for signals with its first loop and keeps it for the life of the process."""
    uvloop.new_event_loop().close()


@pytest.fixture
def run(warm_uvloop: None) -> Iterator[Run]:
    """Run a coroutine in the loop that the program uses, and fail on whatever the loop would only have logged."""
    complaints: list[dict[str, Any]] = []

    def run_it(coroutine: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.get_loop().set_exception_handler(lambda _, context: complaints.append(context))
            runner.run(asyncio.wait_for(coroutine, 30))

    yield run_it
    assert complaints == []
