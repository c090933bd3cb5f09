"""Options are checked when they are given."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herder.options import OPTION_NAMES, Options, size_bytes
from herder.workload import Workload


def test_options_reach_the_wire() -> None:
    options = Options().with_given(
        {
            "cores": 2,
            "memory": "4GiB",
            "resources": {"disk": 2, "a": 1},
            "nodes": ["big", "n3"],
            "timeout": 3,
            "retry_on": (ValueError, OSError),
            "seed": 7,
        }
    )
    wire = options.for_wire()
    assert (wire.cores, wire.memory_bytes, wire.nodes, wire.timeout_s) == (2.0, 4 * 2**30, ("big", "n3"), 3.0)
    assert (wire.resources, wire.seed) == ({"a": 1.0, "disk": 2.0}, 7)
    assert wire.retry_on
    assert not Options().for_wire().retry_on


def test_equal_options_are_equal_and_hashable() -> None:
    one = Options().with_given({"resources": {"a": 1, "b": 2}, "workload": (workload := Workload())})
    two = Options().with_given({"workload": workload, "resources": {"b": 2, "a": 1}})
    assert one == two
    assert hash(one) == hash(two)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("cores", -1, ValueError),
        ("nodes", 3, TypeError),
        ("retry_on", "OSError", TypeError),
        ("retry_on", 3, TypeError),
        ("priority", 10**30, ValueError),
        ("cores", 1.5, ValueError),
        ("cores", "2", TypeError),
        ("cores", float("nan"), TypeError),
        ("memory", "lots", ValueError),
        ("memory", -1, ValueError),
        ("memory", [], TypeError),
        ("gpus", 0.5, TypeError),
        ("priority", "high", TypeError),
        ("timeout", 0, ValueError),
        ("retries", -1, ValueError),
        ("retries", True, TypeError),
        ("retry_on", "ValueError", TypeError),
        ("retry_on", (int,), TypeError),
        ("idempotent", 1, TypeError),
        ("name", 3, TypeError),
        ("name", "x" * 300, ValueError),
        ("nodes", [1], TypeError),
        ("resources", ["a"], TypeError),
        ("stdout", "print", ValueError),
        ("memory_max", "4GiB", ValueError),
        ("memory_growth", 1, ValueError),
        ("placement", "anywhere", ValueError),
        ("workload", "w", TypeError),
        ("seed", 2**70, ValueError),
    ],
)
def test_wrong_values_are_refused_by_name(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        Options().with_given({name: value})


@pytest.mark.parametrize(("wrong", "right"), [("core", "cores"), ("retrys", "retries"), ("idempotant", "idempotent")])
def test_unknown_names_lead_to_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(TypeError, match=right):
        Options().with_given({wrong: 1})


def test_names_without_a_near_one_list_all() -> None:
    with pytest.raises(TypeError) as caught:
        Options().with_given({"zzz": 1})
    assert all(name in str(caught.value) for name in OPTION_NAMES)


@given(st.integers(0, 2**40))
def test_sizes_as_numbers_and_texts_agree(size: int) -> None:
    assert size_bytes("memory", size) == size_bytes("memory", str(size)) == size
    assert size_bytes("memory", f"{size}KiB") == size * 1024
