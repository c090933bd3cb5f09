"""A shelf in memory: for the core's tests and the simulator."""

from __future__ import annotations


class MemoryShelf:
    """See `room.Shelf`. `room_for`: how many contents it takes; then it has no room."""

    def __init__(self, room_for: int = 1 << 30) -> None:
        self.contents: dict[int, bytes] = {}
        self.room_for = room_for
        self._next = 0

    def put(self, content: bytes) -> int | None:
        if len(self.contents) >= self.room_for:
            return None
        self._next += 1
        self.contents[self._next] = content
        return self._next

    def get(self, ticket: int) -> bytes:
        return self.contents[ticket]

    def drop(self, ticket: int) -> None:
        del self.contents[ticket]
