"""What is decided from what was found on the hosts."""

from __future__ import annotations

import pytest

from herder_launch.hosts import HostList, HostSpec
from herder_launch.plan import (
    Impossible,
    Interpreter,
    Reuse,
    Ship,
    Use,
    agent_action,
    choose_coordinator,
    choose_interpreter,
)
from herder_shared.errors import ConfigError

HOSTS = HostList((HostSpec("a"), HostSpec("b"), HostSpec("c")))


def _interpreter(
    executable: str = "/usr/bin/python3",
    version: tuple[int, int, int] = (3, 11, 2),
    *,
    herder: str | None = None,
    missing: tuple[str, ...] = (),
    shipped: str | None = None,
    implementation: str = "cpython",
) -> Interpreter:
    return Interpreter(
        executable, version, implementation, "x86_64", "glibc 2.36", herder, missing, "/var/lib/herder", shipped
    )


def test_an_interpreter_that_has_this_herder_is_used_before_anything_is_shipped() -> None:
    ready = _interpreter("/nfs/python", herder="1.0")
    assert choose_interpreter([_interpreter(shipped="/s"), ready], [], "1.0") == Use(ready)


@pytest.mark.parametrize("found", [_interpreter(herder="0.9"), _interpreter(herder="1.0", missing=("apsw",))])
def test_another_version_or_one_without_its_extras_is_not_used(found: Interpreter) -> None:
    assert choose_interpreter([found], [], "1.0") == Ship(found)


def test_what_was_shipped_before_is_used_again() -> None:
    assert choose_interpreter([_interpreter(shipped="/var/lib/herder/venvs/x/bin/python")], [], "1.0") == Reuse(
        "/var/lib/herder/venvs/x/bin/python"
    )


def test_without_a_fitting_python_what_was_found_is_said() -> None:
    pypy = _interpreter("/usr/bin/pypy", implementation="pypy")
    match choose_interpreter([pypy], ["/usr/bin/python3: too old: Python 3.9.2"], "1.0"):
        case Impossible(reason):
            assert "3.11" in reason
            assert "too old: Python 3.9.2" in reason
            assert "/usr/bin/pypy" in reason
        case other:
            pytest.fail(f"{other}")
    assert choose_interpreter([], [], "1.0") == Impossible(
        "no Python at all; install Python 3.11 or later, or name one with --python"
    )


def test_the_coordinator_is_on_the_first_host_unless_told_otherwise() -> None:
    assert choose_coordinator(HOSTS, None, None) == HostSpec("a")
    assert choose_coordinator(HOSTS, "c", None) == HostSpec("c")
    assert choose_coordinator(HOSTS, "local", None) is None
    assert choose_coordinator(HostList(HOSTS.hosts, "b"), None, None) == HostSpec("b")


def test_an_existing_cluster_keeps_its_coordinator_whatever_hosts_are_named_first() -> None:
    assert choose_coordinator(HOSTS, None, HostSpec("z")) == HostSpec("z")
    assert choose_coordinator(HOSTS, None, HostSpec("local")) is None
    with pytest.raises(ConfigError, match="on z, not on a"):
        choose_coordinator(HOSTS, "a", HostSpec("z"))


def test_a_coordinator_on_no_host_is_refused() -> None:
    with pytest.raises(ConfigError, match="'x' is none of the hosts"):
        choose_coordinator(HOSTS, "x", None)


def test_an_agent_is_left_alone_unless_it_calls_another_coordinator() -> None:
    assert agent_action(None, ["a:7711"]) == "start"
    assert agent_action(["python", "--coordinator", "a:7711"], ["a:7711"]) == "keep"
    assert agent_action(["python", "--coordinator", "a:7711"], ["a:9999"]) == "replace"
