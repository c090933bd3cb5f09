"""What was started is written down before it is started, and found again."""

from __future__ import annotations

from pathlib import Path

import pytest

from herder_launch import record
from herder_launch.hosts import HostSpec
from herder_launch.record import Record, Started
from herder_shared.errors import ConfigError
from herder_shared.ids import NodeName

STARTED = Started(HostSpec("n1", "bob", 2222, labels=("big",)), "/var/lib/herder/x/agent-n1", "/usr/bin/python3")


def test_a_record_is_found_again_as_it_was(tmp_path: Path) -> None:
    assert record.load(tmp_path).is_empty
    written = Record(coordinator=STARTED, agents={NodeName("n1"): STARTED})
    record.save(tmp_path, written)
    assert record.load(tmp_path) == written


def test_an_empty_record_leaves_no_file(tmp_path: Path) -> None:
    record.save(tmp_path, Record(coordinator=STARTED))
    record.save(tmp_path, Record())
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_record_is_named_with_the_cure(tmp_path: Path) -> None:
    (tmp_path / "launch.json").write_text('{"agents": 7}')
    with pytest.raises(ConfigError, match=r"launch\.json.*remove it if nothing"):
        record.load(tmp_path)


def test_a_second_launcher_is_refused_while_the_first_is_at_work(tmp_path: Path) -> None:
    busy = "another `herder up` or `herder down` is at work"
    with record.exclusive(tmp_path), pytest.raises(ConfigError, match=busy), record.exclusive(tmp_path):
        pass
    with record.exclusive(tmp_path):
        pass
