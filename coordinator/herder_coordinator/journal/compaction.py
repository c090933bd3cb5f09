"""Making the journal short again while the coordinator runs: a process of its own replays what is closed and gives
back its sum.

Theory of operation. The sum of a state is work in proportion to the state, seconds for millions of tasks; neither the
event loop nor a thread that shares its interpreter lock may do it. So a process (`python -m …journal.compaction`,
nice 10) is given the rows up to a number, replays them by the very code of a start, and answers with the rows of a
snapshot; this one also has what a new life would forget, because more of the same life follows it. It reads no file:
whoever holds the store reads for it, a slice at a time between two group commits, and writes its parts in the same
manner. The number is that of a whole group of turns: no decision is ever cut in two.

The parts become the base in one small transaction: a crash before it leaves the old base with all batches, and parts
that the next start deletes; a crash after it leaves the new base, and batches that the next start deletes. The rows
that it made superfluous are deleted in slices too.

Its price is a second copy of the state, within the same budgets of memory, for as long as it takes, and the processor
time of a replay of what was written since the last one. If it fails, nothing has happened but that the journal has not
become shorter.

On its pipes: rows as `u64 number · u32 length · content`, a row of length 0 being the end; before them, one line of
JSON with the cluster and the epoch, the number of the parts' generation, and the folder for what finds no memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

from herder_coordinator.core.replay import settle_loose
from herder_coordinator.core.room import Room
from herder_coordinator.core.snapshot import snapshot
from herder_coordinator.core.state import new_state
from herder_coordinator.core.step import replay_record
from herder_coordinator.journal.codec import decode_batch, encode_snapshot
from herder_coordinator.journal.interface import JournalError
from herder_coordinator.journal.shelf import FileShelf
from herder_coordinator.journal.store import SLICE_BYTES, Base, Row, Store, part_number
from herder_shared.ids import ClusterId

_HEAD = struct.Struct(">QI")
_NICE = 10


class Ask(Protocol):
    """Have the store's thread do something, and wait for the answer."""

    def __call__(self, work: Callable[[], Any], /) -> Any: ...


class Compaction:
    """One compaction, in a thread of its own. When `is_over`, `error` says whether and why it came to nothing."""

    def __init__(self, store: Store, upto: int, ask: Ask, *, size_bytes: int, folder: Path) -> None:
        self._store = store
        self._upto = upto
        self._ask = ask
        self._folder = folder
        #: Of the batches that it takes in; of the snapshot that it has made.
        self.size_bytes = size_bytes
        self.base_bytes = 0
        self.is_over = False
        self.error: Exception | None = None
        self._is_cancelled = False
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="herder-compaction")

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def cancel(self) -> None:
        """Give up, and wait until nothing of it is left; the store's thread must still be there."""
        self._is_cancelled = True
        process = self._process
        if process is not None:
            process.kill()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._compact()
        except (JournalError, OSError, EOFError, struct.error) as error:
            self.error = error
        finally:
            self.is_over = True

    def _compact(self) -> None:
        self._drop_remainder()  # of one that failed
        generation = self._store.base.generation + 1
        command = [sys.executable, "-P", "-m", "herder_coordinator.journal.compaction"]
        process = self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/")
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            self._feed(process.stdin, generation)
            base = self._take(process.stdout, generation)
        finally:
            process.kill()  # if it lives, it is of no use any more
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
            process.wait()
        self._do(lambda: self._store.adopt(base))
        self._drop_remainder()

    def _drop_remainder(self) -> None:
        while not self._is_cancelled and self._ask(self._store.drop_remainder):
            pass

    def _feed(self, pipe: IO[bytes], generation: int) -> None:
        order = {
            "cluster": self._store.cluster,
            "epoch": self._store.epoch,
            "generation": generation,
            "folder": str(self._folder),
        }
        pipe.write(json.dumps(order).encode() + b"\n")
        base = self._store.base
        if base.generation:
            self._pass_on(pipe, part_number(base.generation, 0) - 1, self._store.parts)
        self._pass_on(pipe, base.upto, lambda after: self._store.batches(after, self._upto))
        write_end(pipe)
        pipe.close()

    def _pass_on(self, pipe: IO[bytes], after: int, read: Callable[[int], list[Row]]) -> None:
        """Rows from number `after` on, a slice at a time."""
        while rows := self._slice(partial(read, after)):
            write_rows(pipe, rows)
            after = rows[-1][0]

    def _do(self, work: Callable[[], None]) -> None:
        if self._is_cancelled:
            raise JournalError("the coordinator ends")
        self._ask(work)

    def _slice(self, read: Callable[[], list[Row]]) -> list[Row]:
        if self._is_cancelled:
            raise JournalError("the coordinator ends")
        rows: list[Row] = self._ask(read)
        return rows

    def _take(self, pipe: IO[bytes], generation: int) -> Base:
        """Write the parts as they come."""
        count = 0
        rows: list[Row] = []
        for row in read_rows(pipe):
            rows.append(row)
            count += 1
            self.base_bytes += len(row[1])
            if sum(len(content) for _, content in rows) >= SLICE_BYTES:
                self._add(rows)
                rows = []
        self._add(rows)
        return Base(generation, count, self._upto)

    def _add(self, rows: list[Row]) -> None:
        if rows:
            self._do(lambda: self._store.add_parts(rows))


# --- on the pipes ----------------------------------------------------------------------------------------------------


def write_rows(pipe: IO[bytes], rows: Iterable[Row]) -> None:
    """Rows as the other side reads them."""
    for number, content in rows:
        pipe.write(_HEAD.pack(number, len(content)))
        pipe.write(content)


def write_end(pipe: IO[bytes]) -> None:
    """No more rows."""
    pipe.write(_HEAD.pack(0, 0))
    pipe.flush()


def read_rows(pipe: IO[bytes]) -> Iterator[Row]:
    """Rows up to the end.

    Raises:
        EOFError: the other side is gone before it said that this is all.
    """
    while True:
        number, length = _HEAD.unpack(_exactly(pipe, _HEAD.size))
        if not length:
            return
        yield number, _exactly(pipe, length)


def _exactly(pipe: IO[bytes], size_bytes: int) -> bytes:
    content = pipe.read(size_bytes)
    if len(content) < size_bytes:
        raise EOFError("the process at the other end of the pipe is gone")
    return content


# --- the process -----------------------------------------------------------------------------------------------------


def compact(stdin: IO[bytes], stdout: IO[bytes]) -> None:
    """Rows in, the rows of their snapshot out. The state ends with this process."""
    order = json.loads(stdin.readline())
    shelf = FileShelf(Path(order["folder"]))
    state = new_state(ClusterId(order["cluster"]), order["epoch"], room=Room(shelf))
    for number, content in read_rows(stdin):
        for record in decode_batch(number, content):
            replay_record(state, record)
    settle_loose(state)
    write_rows(stdout, encode_snapshot(part_number(order["generation"], 0), snapshot(state, goes_on=True)))
    write_end(stdout)
    shelf.close()


def main() -> None:
    """For `python -m herder_coordinator.journal.compaction`."""
    os.nice(_NICE)
    compact(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
