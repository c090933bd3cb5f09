"""One task: what is set for it, how its arguments and results travel."""

from __future__ import annotations

import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from agent.template import driver

pytest.importorskip("numpy")

# Nobody but this process can import a test module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def test_usage_is_this_tasks_own(bare: driver.Template) -> None:
    def burn() -> None:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass

    child = bare.fork()
    child.send(burn)
    head, _ = child.answer()
    assert 0.03 <= head["utime"] + head["stime"] <= 0.5
    assert head["wall"] >= 0.04


def test_limits_affinity_environment_and_scratch_are_set(bare: driver.Template, tmp_path: Path) -> None:
    def look() -> Any:
        import resource

        import herder

        seen = herder.task()
        limit = resource.getrlimit(resource.RLIMIT_CORE)
        environment = os.environ["COLOUR"], os.environ["OMP_NUM_THREADS"]
        return limit, sorted(os.sched_getaffinity(0)), environment, seen.id, seen.attempt, seen.node, seen.scratch

    cpu = min(os.sched_getaffinity(0))
    options = {"limits": {"RLIMIT_CORE": [0, 0]}, "cpus": [cpu], "env": {"COLOUR": "red"}, "threads": 2}
    child = bare.fork()
    scratch = str(tmp_path / "scratch")
    found = child.run(look, **options, scratch=scratch, ordinal=2)
    assert found == ((0, 0), [cpu], ("red", "2"), "j0b.7", 2, "here", scratch)


def test_child_enters_its_groups_before_the_task_or_refuses_it(bare: driver.Template, tmp_path: Path) -> None:
    entrance = tmp_path / "cgroup.procs"
    entrance.write_text("")
    child = bare.fork()
    assert child.run(entrance.read_text, groups=[str(entrance)]) == "0"
    child = bare.fork()
    child.send(len, "abc", groups=[str(tmp_path / "gone" / "cgroup.procs")])
    head, _ = child.answer()
    assert (head["t"], head["cause"], head["retryable"]) == ("error", "start_failed", True)
    assert "its control group cannot be entered" in head["message"]


def test_what_a_task_writes_to_storage_is_in_its_answer(bare: driver.Template, tmp_path: Path) -> None:
    def write() -> None:
        with open(tmp_path / "file", "wb") as file:
            file.write(b"x" * (1 << 20))
            file.flush()
            os.fsync(file.fileno())

    child = bare.fork()
    child.send(write)
    head, _ = child.answer()
    assert head["oublock"] >= 2048
    assert child.exited()["oublock"] >= 2048


def test_memory_limit_is_a_memory_error_of_the_task_alone(bare: driver.Template) -> None:
    child = bare.fork()
    child.send(lambda: len(bytearray(1 << 30)), limits={"RLIMIT_AS": [1 << 29, 1 << 29]})
    head, error = child.answer()
    assert head["cause"] == "exception"
    assert isinstance(error, MemoryError)


def test_large_arguments_and_results_travel_as_memory_files(bare: driver.Template) -> None:
    child = bare.fork()
    child.send(lambda content: content * 2, b"x" * 200_000, as_fds=("args",))
    head, value = child.answer()
    assert head["blob"]
    assert value == b"x" * 400_000


def test_dependencies_are_found_by_pickled_arguments(bare: driver.Template) -> None:

    class Reference:
        def __reduce__(self) -> Any:
            return _dependency, ("j0b", 3)

    # What the client's pickler writes: a call of _herder_task.dependency, a module that it does not have itself.
    raw = pickle.dumps(((Reference(),), {}), 0).replace(
        f"c{__name__}\n_dependency".encode(), b"c_herder_task\ndependency"
    )
    child = bare.fork()
    assert child.run(lambda value: value + 1, raw_args=raw, extra={"dep:j0b:3": pickle.dumps(41)}) == 42


def _dependency(job: str, index: int) -> None:
    """Stands in a pickle for `_herder_task.dependency`."""
