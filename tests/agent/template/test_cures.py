"""Cures are applied before the libraries are loaded, told where they take effect, and never put over the user's."""

from __future__ import annotations

import sys

import cloudpickle
import pytest

from agent.template import driver
from herder_agent.template import cures

# Nobody but this process can import a test module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

ALLOCATORS = [("pyarrow", "JE_ARROW_MALLOC_CONF"), ("polars", "_RJEM_MALLOC_CONF")]


def _environment(name: str) -> str | None:
    import os

    return os.environ.get(name)


def _applied(running: driver.Template, step: str) -> list[str]:
    lines: list[str] = next(each for each in running.steps if each["step"] == step)["applied"]
    return lines


@pytest.mark.slow
@pytest.mark.parametrize(("library", "variable"), ALLOCATORS)
def test_allocators_start_no_thread_unless_the_user_wants_one(library: str, variable: str) -> None:
    pytest.importorskip(library)
    step = f"import {library}"
    with driver.ready(preload=[library]) as running:
        assert any(line.startswith(f"{variable}=") for line in _applied(running, step))
        found = [each["seen"] for each in running.steps[1]["findings"]]
        assert not any("jemalloc" in seen for seen in found)
    with driver.ready(preload=[library], env={**driver.ONE_THREAD, variable: "background_thread:true"}) as running:
        assert not any(line.startswith(f"{variable}=") for line in _applied(running, step))
        found = [each["seen"] for each in running.steps[1]["findings"]]
        assert any("jemalloc" in seen for seen in found)
        assert running.ready["fork_point"] == step


def test_what_the_user_set_stays() -> None:
    with driver.ready(env={**driver.ONE_THREAD, "GRPC_ENABLE_FORK_SUPPORT": "0"}) as running:
        child = running.fork()
        assert child.run(_environment, "GRPC_ENABLE_FORK_SUPPORT") == "0"
        assert running.fork().run(_environment, "KMP_INIT_AT_FORK") == "TRUE"


def test_nothing_is_told_of_libraries_that_are_not_loaded() -> None:
    with driver.ready(preload=["decimal"]) as running:
        assert not _applied(running, "start")
        assert not _applied(running, "import decimal")


def test_each_cure_is_of_another_variable() -> None:
    assert len({cure.variable for cure in cures.CURES}) == len(cures.CURES)
