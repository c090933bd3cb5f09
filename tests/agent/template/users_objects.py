"""What a user's `setup` may hand to tasks, and tasks that look at it: imported by name in interpreters of any version.

Written as users write: without annotations.
"""

# mypy: ignore-errors

import _thread
import collections
import copy
import datetime
import decimal
import enum
import functools
import gc
import json
import os
import pickle
import resource
import sys
import threading
import weakref

COUNT = 30_000
#: Seen to be run in the task's process.
EVENTS = []
KEPT = {}


class Point:
    def __init__(self, x):
        self.x = x
        self.name = f"point {x}"


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


class Ended:
    def __init__(self):
        self.data = [object()]

    def __del__(self):
        EVENTS.append("ended")


class Text(str):
    pass


class Colour(enum.Enum):
    RED = "red as such"


def setup():
    return [(i, f"{i} of many", i + 0.5, {"a": [i]}) for i in range(COUNT)]


def read():
    """Page faults and memory made private by reading all."""  # not Private_Dirty: a sole reader of a memfd has that
    import herder

    shared = herder.shared()
    before, faults = _private_kib(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    total = 0
    for number, text, real, inner in shared:
        total += number + len(text) + real + inner["a"][0]
        hash(text)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return total, faults, _private_kib() - before


def _private_kib():
    with open("/proc/self/smaps_rollup") as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous"))


def setup_kinds():
    watched, plain_set = Point(1), {"in a set", 3.25}
    KEPT["watcher"] = weakref.ref(watched, lambda _: EVENTS.append("watched ended"))
    KEPT["generator"] = (number for number in range(3))
    local = threading.local()
    local.x = ["of a thread"]
    return {
        "data": {
            "tuple": (1.5, "text of a tuple"),
            "list": ["text of a list"],
            "dict": {"a key": "a value"},
            "key of a dict": None,
            "key of an ordered dict": None,
            "set": plain_set,
            "frozenset": frozenset({"frozen"}),
            "int": 1 << 70,
            "float": 0.123,
            "bytes": b"bytes of data",
            "date": datetime.date(2020, 1, 2),
            "decimal": decimal.Decimal("1.25"),
            "deque": collections.deque(["of a deque"]),
            "counter": collections.Counter("counted"),
            "ordered": collections.OrderedDict({"a key of ordered": "of ordered"}),
            "point": Point(2),
            "slotted": Slotted([5]),
            "text": Text("a text"),
            "member": Colour.RED,
            "in a method": None,
        },
        "other": {
            "type": Point,
            "module": json,
            "function": read,
            "code": read.__code__,
            "weak reference": KEPT["watcher"],
            "watched": watched,
            "ended": Ended(),
            "lock": _thread.allocate_lock(),
            "rlock": threading.RLock(),
            "local": local,
            "file": open(os.devnull),
            "generator": KEPT["generator"],
            "cached": functools.lru_cache(setup),
            "namespace": vars(json),
            "partial": functools.partial(read, ["argument"]),
        },
    }


def kinds():
    import herder

    never = sys.getrefcount(None)
    data = herder.shared()["data"]
    data["key of a dict"] = next(iter(data["dict"]))
    data["key of an ordered dict"] = next(iter(data["ordered"]))
    found = {}
    for group, held in herder.shared().items():
        found[group] = {name: sys.getrefcount(each) == never for name, each in held.items()}
    other = herder.shared()["other"]
    found["below"] = {
        "watched": sys.getrefcount(other["watched"].name) == never,
        "partial": sys.getrefcount(other["partial"].args[0]) == never,
        "ended": sys.getrefcount(other["ended"].data) == never,
        "local": sys.getrefcount(other["local"].x) == never,
    }
    return found


def live():
    """Use it as any object, in ways that touch reference counts: what went wrong is raised."""
    import herder

    shared = herder.shared()
    data, other = shared["data"], shared["other"]
    assert copy.deepcopy(data["point"]).name == "point 2"
    assert pickle.loads(pickle.dumps(data["dict"])) == {"a key": "a value"}
    assert weakref.ref(data["point"])().x == 2
    made = data["point"].__dict__
    made["y"] = 3
    assert data["point"].y == 3
    data["list"].extend(range(10_000))
    data["list"][0] = "another"
    data["dict"]["new"] = [1]
    del data["dict"]["a key"]
    data["set"].clear()
    text = data["tuple"][1]
    assert sys.intern(text) == text
    assert getattr(data["point"], sys.intern(data["text"] + ""), 7) == 7
    assert [f"{text}{i}" for i in range(1000)][-1] == text + "999"
    text += "!"
    assert text == "text of a tuple!"
    assert next(other["generator"]) == 0
    gone = weakref.ref(other["watched"])
    del other["watched"], other["ended"]
    assert gone() is None
    assert sorted(EVENTS) == ["ended", "watched ended"], EVENTS
    ring = []
    ring.append((ring, data["list"]))
    del ring
    gc.collect()
    gc.unfreeze()
    gc.collect()
    assert data["slotted"].x == [5]
    data.clear()
    shared.clear()
    gc.collect()
    return True


def setup_arrays():
    import numpy

    class Named(numpy.ndarray):
        pass

    named = numpy.array([["own text of named"]], dtype=object).view(Named)
    named.note = ["a note"]
    record = numpy.zeros(2, dtype=[("n", "i4"), ("o", object)])
    record["o"] = [["of a record"], None]
    flat = numpy.array([f"{i} in an array" for i in range(COUNT)], dtype=object)
    return {
        "flat": flat,
        "turned": numpy.array([[f"{i} {j}" for i in range(3)] for j in range(3)], dtype=object).T[::2],
        "none": numpy.array(["of no dimension", None], dtype=object)[:1].reshape(()),
        "named": named,
        "record": record,
        "numbers": numpy.arange(10.0),
        "scalar": numpy.float64(2.5),
    }


def arrays():
    import herder

    never = sys.getrefcount(None)
    shared = herder.shared()
    elements = {
        "flat": shared["flat"][-1],
        "turned": shared["turned"][1, 1],
        "none": shared["none"][()],
        "named": shared["named"][0, 0],
        "note": shared["named"].note[0],
        "record": shared["record"]["o"][0],
        "scalar": shared["scalar"],
        "numbers": shared["numbers"],
    }
    found = {name: sys.getrefcount(each) == never for name, each in elements.items()}
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    total = sum(map(len, shared["flat"]))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    shared["flat"][:] = None
    shared["record"]["o"] = [1, 2]
    return found, faults, total, shared["record"]["o"][1]


def setup_frame():
    import pandas

    return pandas.DataFrame(
        {"name": pandas.Series([f"{i} in a frame" for i in range(COUNT)], dtype=object), "n": range(COUNT)}
    )


def frame():
    import herder

    found = herder.shared()
    total = len(found["name"].iloc[-1])
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for each in found["name"].array:
        total += len(each)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    part = found[["name"]]
    part.loc[0, "name"] = "changed"
    return faults, total, found["name"].iloc[0], part["name"].iloc[0]
