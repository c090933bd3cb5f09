"""`setup` functions which make data, and the tasks that read it. Sizes come from the environment, in bytes."""

from __future__ import annotations

import os
import time
from typing import Any

#: A `(int, str, float, dict)` tuple with what it holds, as CPython 3.12 lays it out.
_RECORD_BYTES = 470
_GATE_LIMIT_S = 300.0


def arrays() -> list[Any]:
    """Eight arrays of float64, every page of them written."""
    import numpy

    each = int(os.environ["HERDER_BENCH_BYTES"]) // 8
    return [numpy.full(each // 8, float(n)) for n in range(8)]


def arrays_and_objects() -> dict[str, Any]:
    """The arrays, a list of tuples of mixed objects, and how many bytes the list takes."""
    found = arrays()
    before = _anonymous_bytes()
    count = int(os.environ["HERDER_BENCH_OBJECT_BYTES"]) // _RECORD_BYTES
    objects = [(n + 10**6, f"record {n}", n * 0.5, {"n": n + 10**6}) for n in range(count)]
    return {"arrays": found, "objects": objects, "object_bytes": _anonymous_bytes() - before}


def read_all(folder: str, index: int) -> tuple[float, int]:
    """Read every array and every object, say so by a file, and stay until the gate is opened."""
    import herder

    shared = herder.shared()
    total = float(sum(array.sum() for array in shared["arrays"]))
    characters = 0
    for number, text, half, fields in shared["objects"]:
        characters += len(text) + (fields["n"] == number) + (half >= 0)
    _touch(folder, f"read-{index}")
    ends = time.monotonic() + _GATE_LIMIT_S
    while not os.path.exists(os.path.join(folder, "gate")) and time.monotonic() < ends:
        time.sleep(0.02)
    return total, characters


def sizes() -> tuple[int, int]:
    """Bytes of the arrays and of the objects."""
    import herder

    shared = herder.shared()
    return sum(array.nbytes for array in shared["arrays"]), shared["object_bytes"]


def _touch(folder: str, name: str) -> None:
    with open(os.path.join(folder, name), "w"):
        pass


def _anonymous_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:"))
