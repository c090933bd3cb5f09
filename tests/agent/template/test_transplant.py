"""A template's private memory in a memory file: the same content, and forks that need not copy it."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from agent.template import driver
from support import interpreters

VERSIONS = ("3.11", "3.12", "3.13")
#: Runs in a process of its own, of any version: its memory is moved.
PROLOGUE = f"""
import ctypes, gc, os, resource, sys, threading, time, types
package = sys.modules["package"] = types.ModuleType("package")
package.__path__ = [{str(driver.FOLDER)!r}]
from package import system, transplant, weigh
kept = [(i, f"{{i}} as text", {{"n": i}}) for i in range(100_000)]
def checksum():
    return hash(tuple((i, text, each["n"]) for i, text, each in kept))
before = checksum()
"""


def run(code: str, version: str = "3.11", **environment: str) -> str:
    done = subprocess.run(
        [interpreters.require(version), "-c", PROLOGUE + code],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PATH": "", **environment},
    )
    assert done.returncode == 0, done
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_all_is_as_it_was_and_nearly_nothing_is_private(version: str) -> None:
    code = """
was = system.memory_bytes()[1]
moved = transplant.transplant()
now = system.memory_bytes()[1]
assert moved > 25 << 20, moved
assert now < was / 2, (was, now)
assert checksum() == before
import decimal, json, sqlite3  # loads libraries, allocates and runs what was moved
made = [[i, str(i), decimal.Decimal(i)] for i in range(50_000)]
assert json.loads(json.dumps(made[:100], default=str))[99] == [99, "99", "99"]
assert sqlite3.connect(":memory:").execute("select 1").fetchone() == (1,)
del made, kept[::2]
gc.collect()
again = [object() for _ in range(100_000)]
assert kept[10] == (21, "21 as text", {"n": 21})
thread = threading.Thread(target=kept.clear)
thread.start()
thread.join()
try:
    raise ValueError(1 / 0)
except ZeroDivisionError:
    print("well")
"""
    assert run(code, version) == "well\n"


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_what_one_child_writes_no_other_process_sees(version: str) -> None:
    code = """
assert transplant.transplant()
def forked(function):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
def write():
    for index, (_, _, each) in enumerate(kept):
        each["n"] = -index
    assert kept[5][2]["n"] == -5
forked(write)
assert checksum() == before
def look():
    assert checksum() == before
forked(look)
print("well")
"""
    assert run(code, version) == "well\n"


@pytest.mark.slow
def test_fork_of_moved_memory_is_cheap() -> None:
    code = """
kept += [(i, f"{i} as text", {"n": i}) for i in range(400_000)]
gc.collect(); gc.freeze(); gc.disable()
def price():
    def used():
        own, below = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        return own.ru_utime + own.ru_stime + below.ru_utime + below.ru_stime
    began = used()
    for _ in range(10):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    return used() - began
naive = price()
assert transplant.transplant()
print(price() / naive)
"""
    assert float(run(code)) < 0.5


def test_another_thread_forbids_it() -> None:
    code = """
gate = threading.Event()
thread = threading.Thread(target=gate.wait)
thread.start()
print(transplant.transplant(), transplant.unavailable())
gate.set()
thread.join()
"""
    assert run(code) == "0 another thread runs\n"


def test_other_allocators_memory_stays() -> None:
    """A page that was given up reads as zeroes, not as what it held when the memory was moved."""
    code = """
length = 4 << 20
page = system.map_pages(-1, length, 3)
ctypes.memset(page, 7, length)
assert transplant.transplant()
assert ctypes.string_at(page, length) == bytes([7]) * length
system._madvise(page, length, 4)
assert ctypes.string_at(page, length) == bytes(length)
print(system.mappings()[0].path != "", any("herder-template" in each.path for each in system.mappings()))
"""
    assert run(code) == "True True\n"


def test_without_pymalloc_there_are_no_arenas() -> None:
    code = """
print(sum(region.kind == "arena" for region in transplant.regions()), transplant.transplant() > 0)
assert checksum() == before
"""
    assert run(code, PYTHONMALLOC="malloc") == "0 True\n"


@pytest.mark.slow
def test_template_of_many_objects_forks_from_a_memory_file() -> None:
    def setup() -> Any:
        return {i: [str(i)] for i in range(300_000)}

    def change() -> tuple[list[str], int]:
        import herder

        shared = herder.shared()
        seen = shared[7]
        shared[7] = None
        for each in range(1000):
            shared[each] = each
        return seen, len(shared)

    def private() -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    with driver.ready(setup) as running:
        applied = [text for step in running.steps if step["step"] == "seal" for text in step["applied"]]
        assert any("moved into a memory file" in text for text in applied), applied
        assert running.ready["notes"] == []
        assert [running.fork().run(change) for _ in range(2)] == [(["7"], 300_000)] * 2
        # The dict's table is in the C heap; the objects are not.
        assert running.fork().run(private) < 40_000


def test_slow_forks_name_the_largest_objects() -> None:
    code = """
weigh.SECONDS_WORTH_A_NOTE = 1e-6
value = {"small": [1, 2], "index": {i: bytearray(1000) for i in range(30_000)}, "rows": kept}
(note,) = weigh.notes(value)
print(note)
weigh.SECONDS_WORTH_A_NOTE = 1e6
assert weigh.notes(value) == []
"""
    note = run(code)
    assert note.startswith("R10: each fork costs about ")
    assert "dict of 30,000 entries, about " in note
    assert "setup's value['index']" in note
    assert "list of 100,000 entries, about " in note
    assert "setup's value['rows']" in note
    assert "'small'" not in note
    assert "Cure: " in note


def test_slow_forks_by_other_peoples_memory_do_not_blame_the_value() -> None:
    code = "weigh.SECONDS_WORTH_A_NOTE = 1e-6\nprint(weigh.notes(None)[0])"
    assert "not in setup's value" in run(code)


def test_sizes_are_guessed_within_a_third() -> None:
    code = """
def real(each, seen):
    if id(each) in seen:
        return 0
    seen.add(id(each))
    found = [*gc.get_referents(each), *(each if type(each) is dict else ())]
    return sys.getsizeof(each) + sum(real(below, seen) for below in found if type(below) is not type)
class Point:
    def __init__(self, x):
        self.x = [x]
by_number, by_text = {i: str(i) for i in range(10_000)}, {f"{i}.": (i,) for i in range(10_000)}
for value in (kept, by_number, by_text, set(map(str, range(5000)))):
    assert 0.66 < weigh.estimate(value) / real(value, set()) < 1.5, (type(value), weigh.estimate(value))
assert weigh.estimate([Point(i) for i in range(1000)]) > 1000 * sys.getsizeof([1])
print("well")
"""
    assert run(code) == "well\n"
