"""Whatever the core does, it does with memory for all that waits, and with none."""

from __future__ import annotations

import pytest

from herder_coordinator.core.room import Room
from support.core_lab import Lab
from support.shelf import MemoryShelf


def no_room() -> Room:
    """Of the least: everything that may lies on the shelf."""
    return Room(MemoryShelf(), queued_bytes_max=0, ends_bytes_max=0, block_ends=1, job_ends_bytes=0)


@pytest.fixture(autouse=True, params=["memory", "shelf"])
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "shelf":
        monkeypatch.setattr(Lab, "new_room", no_room)
