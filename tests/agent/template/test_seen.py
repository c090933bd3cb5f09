"""`_herder_task`, as a task sees it."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from herder_agent.template import seen


def test_outside_a_task_both_say_so() -> None:
    for call in (seen.task, seen.shared):
        with pytest.raises(RuntimeError, match="outside a task"):
            call()


def test_inside_a_task_it_is_described(tmp_path: Path) -> None:
    scratch = str(tmp_path / "scratch")
    head = {"job": "j", "index": 3, "ordinal": 2, "node": "n", "cpus": [1, 2], "gpus": [0], "scratch": scratch}
    seen.share({"data": 1})
    seen.enter(head, {("j", 1): "value"})
    try:
        found = seen.task()
        assert (found.id, found.job_id, found.index) == ("j.3", "j", 3)
        assert (found.attempt, found.retries) == (2, 1)
        assert (found.node, found.cpus, found.gpus, found.scratch) == ("n", (1, 2), (0,), scratch)
        assert repr(found) == "<herder task j.3, attempt 2 on n>"
        assert seen.shared() == {"data": 1}
        assert seen.dependency("j", 1) == "value"
    finally:
        seen.leave()
        seen.share(None)
    with pytest.raises(RuntimeError):
        seen.task()


def test_scratch_folder_that_was_there_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    found = seen.Task({"scratch": str(tmp_path)})
    assert found.scratch == str(tmp_path)
    found.clean()
    assert (tmp_path / "kept").exists()


class Channel:
    """A task socket that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.ends: list[int] = []

    def send(self, head: dict[str, Any], _body: bytes, descriptors: list[int]) -> None:
        self.sent.append(head)
        self.ends += [os.dup(fd) for fd in descriptors]


class Client:
    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.left: list[bool] = []

    def leave(self, well: bool) -> None:
        self.left.append(well)
        os.close(self.fd)


def test_a_task_is_one_client_and_its_agent_gets_the_other_end() -> None:
    channel = Channel()
    with pytest.raises(RuntimeError, match="outside a task"):
        seen.client(lambda fd, _task: Client(fd))
    seen.reach_agent(channel)
    seen.enter({"job": "j", "index": 3}, {})
    try:
        client = seen.client(lambda fd, _task: Client(fd))
        assert seen.client(lambda _fd, _task: None) is client
        assert channel.sent == [{"t": "client"}]
        os.write(client.fd, b"hello")
        assert os.read(channel.ends[0], 5) == b"hello"
    finally:
        seen.leave(True)
        seen.reach_agent(None)
        os.close(channel.ends[0])
    assert client.left == [True]


def test_where_herder_is_not_installed_it_says_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match=f"{re.escape(sys.executable)} has none: install it there"):
        seen.no_client()
