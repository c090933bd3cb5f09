"""Which way a child goes: the plain one where the agent says so and the template can, else the general one."""

from __future__ import annotations

import os

import pytest

from agent.template import driver


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, "plain.py"), ({"plain": False}, "task.py"), ({"threads": 3}, "task.py"), ({"python": "3.99/9.9"}, None)],
)
def test_way_is_the_plain_one_where_nothing_is_to_be_put_right(
    bare: driver.Template, options: dict[str, object], expected: str | None
) -> None:
    def way() -> str:
        """Whose code called the task."""
        import sys

        return sys._getframe(1).f_code.co_filename.rpartition("/")[2]

    done = bare.done(bare.hand(way, **options))  # type: ignore[arg-type]
    if expected is None:
        assert done.answer is not None
        assert done.answer["cause"] == "version_mismatch"
    else:
        assert done.value == expected


def test_threads_of_numerical_libraries_are_set_for_the_task(bare: driver.Template) -> None:
    assert bare.done(bare.hand(os.getenv, "OMP_NUM_THREADS", threads=3)).value == "3"
    assert bare.done(bare.hand(os.getenv, "OMP_NUM_THREADS")).value == "1"
