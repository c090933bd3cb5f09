"""A user's module for `soak_forks`: a `setup` with objects of many kinds, and a task that verifies and spoils them.

Imported by name in interpreters of any version, where Herder is not installed.
"""

import array
import collections
import datetime
import decimal
import fractions
import gc
import json
import random
import re
import sys
from typing import Any

ROWS = 60_000
#: Rows that each task verifies; every `ALL_EACH`th task verifies, and writes to, all that there is.
LOOKED_AT = 400
ALL_EACH = 100
NUMBERS = 300_000


class Point:
    """With a `__dict__`."""

    def __init__(self, x: int) -> None:
        self.x = x
        self.name = f"point {x}"


class Slotted:
    """Without."""

    __slots__ = ("inner", "x")

    def __init__(self, x: int) -> None:
        self.x = x
        self.inner = [x, -x]


def row(i: int) -> tuple[Any, ...]:
    """A row of many small objects, all of which say `i`."""
    return (i, f"{i} as text", i + 0.5, {"n": i, "list": [i]}, b"%d" % i, frozenset((i, -i)), Point(i), Slotted(i))


def other_kinds() -> dict[str, Any]:
    """One or a few of each."""
    return {
        "integer": 7**500,
        "decimal": decimal.Decimal("1.25") ** 40,
        "fraction": fractions.Fraction(22, 7),
        "date": datetime.datetime(2026, 2, 28, 12, tzinfo=datetime.UTC),
        "pattern": re.compile(r"(\d+) as text"),
        "deque": collections.deque(range(5_000)),
        "ordered": collections.OrderedDict((str(i), i) for i in range(5_000)),
        "set": {f"{i} in a set" for i in range(5_000)},
        "bytes": bytes(range(256)) * 8_192,
        "bytearray": bytearray(range(256)) * 8_192,
        "array": array.array("q", range(NUMBERS)),
    }


def arrays() -> dict[str, Any]:
    """What libraries hold, where they are installed; numbers from 0 on in each."""
    found: dict[str, Any] = {}
    try:
        import numpy
    except ImportError:
        return found
    found["numpy"] = numpy.arange(4 * NUMBERS)
    found["view"] = found["numpy"][NUMBERS : 2 * NUMBERS] - NUMBERS
    found["texts"] = numpy.array([str(i) for i in range(20_000)], dtype=object)
    try:
        import pandas
    except ImportError:
        return found
    found["frame"] = pandas.DataFrame({"n": range(NUMBERS), "text": [str(i) for i in range(NUMBERS)]})
    return found


def setup() -> dict[str, Any]:
    """What tasks share."""
    rows = [row(i) for i in range(ROWS)]
    return {"rows": rows, "same": rows, "kinds": other_kinds(), "arrays": arrays(), "by_text": {r[1]: r for r in rows}}


def task(index: int) -> int:
    """Verify a part of the value, spoil it, and see that what was spoiled is as it was spoiled: gives `index`.

    Raises:
        AssertionError: something is not as `setup` made it.
    """
    import herder

    shared: dict[str, Any] = herder.shared()
    generator = random.Random(index)
    is_all = index % ALL_EACH == 0
    assert shared["same"] is shared["rows"]
    first = 0 if is_all else generator.randrange(ROWS - LOOKED_AT)
    upto = ROWS if is_all else first + LOOKED_AT
    for i in range(first, upto):
        verify_row(shared["rows"][i], i, shared["by_text"])
    if is_all:
        assert shared["kinds"] == other_kinds()
    assert shared["kinds"]["pattern"].match(f"{index} as text").group(1) == str(index)
    verify_arrays(shared["arrays"], generator, is_all=is_all)
    spoil(shared, index, range(first, upto), is_all=is_all)
    return index


def verify_row(found: tuple[Any, ...], i: int, by_text: dict[str, Any]) -> None:
    """Each of its objects, and that it is the same object wherever it is reached."""
    assert found[:6] == (i, f"{i} as text", i + 0.5, {"n": i, "list": [i]}, b"%d" % i, frozenset((i, -i))), found
    assert (found[6].x, found[6].name, found[7].x, found[7].inner) == (i, f"point {i}", i, [i, -i]), i
    assert by_text[f"{i} as text"] is found, i


def verify_arrays(found: dict[str, Any], generator: random.Random, *, is_all: bool) -> None:
    """Some numbers of each array, or all."""
    if "numpy" not in found:
        return
    import numpy

    places = [generator.randrange(NUMBERS) for _ in range(200)]
    for name in ("numpy", "view"):
        assert [int(found[name][place]) for place in places] == places, name
        if is_all:
            assert numpy.array_equal(found[name], numpy.arange(len(found[name]))), name
    assert all(found["texts"][place % 20_000] == str(place % 20_000) for place in places)
    if "frame" in found:
        assert all(found["frame"]["text"].iat[place] == str(place) for place in places[:20])
        assert not is_all or int(found["frame"]["n"].sum()) == NUMBERS * (NUMBERS - 1) // 2


def spoil(shared: dict[str, Any], index: int, rows: range, *, is_all: bool) -> None:
    """Write into what the template holds, free parts of it, allocate where they were, and look."""
    for i in rows:
        of_dict, point, slotted = shared["rows"][i][3], shared["rows"][i][6], shared["rows"][i][7]
        of_dict["n"], point.x, slotted.inner[0] = -index, -index, -index
    for name in ("numpy", "view"):
        if name in shared["arrays"]:
            array = shared["arrays"][name]
            array[: len(array) if is_all else 1 + index % 20_000] = -index
            assert (int(array[0]), int(array[-1])) == (-index, -index if is_all else len(array) - 1), name
    shared["kinds"]["array"][index % NUMBERS] = -index
    shared["kinds"]["bytearray"][index % 1000] = 255
    made = [(i, str(i), [i]) for i in range(500)]
    if index % 50 == 7:
        shared["by_text"].clear()
        del shared["same"], shared["rows"][: ROWS // 2]
        gc.collect()
        made += [(i, str(i), [i]) for i in range(500, 20_000)]
    elif index % 50 == 8:
        import sqlite3  # loads a library between what was moved

        assert sqlite3.connect(":memory:").execute("select 1").fetchone() == (1,)
    assert json.loads(json.dumps(made[-3:])) == [[i, str(i), [i]] for i in range(len(made) - 3, len(made))]
    spoiled = shared["rows"][-1][3]["n"]
    assert spoiled in (ROWS - 1, -index), (spoiled, sys.version)
