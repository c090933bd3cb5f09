"""Rules for every test: what a marker needs, that nothing is left behind, and how tests run beside each other.

With pytest-xdist (`-n auto`, as `make test` does) this module is loaded by each process that runs tests, and by the one
that hands them out; each has a temporary folder and a mark of its own, and answers for its own processes. What is left
in `/dev/shm`, which they share, is then seen at the end only.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from support import leaks, netlab
from support.requirements import is_ci, require_program, unmet

_PRIVATE_TMP = pytest.StashKey[Path]()
_MARK = pytest.StashKey[str]()
#: What the last net caught, here and in the processes that run tests for this one.
_STRAYS = pytest.StashKey[list[str]]()
_STRAYS_OUTPUT = "left_behind"
_SHM_BEFORE = pytest.StashKey[frozenset[str]]()


def _restore_signals() -> None:
    """As in a terminal: a shell that runs us in the background ignores SIGINT and SIGQUIT for us, nohup SIGHUP."""
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    _restore_signals()
    # How long an example takes says more of the machine than of the code.
    quiet = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile("busy machine", deadline=None, suppress_health_check=quiet)
    hypothesis.settings.load_profile("busy machine")
    config.addinivalue_line(
        "markers", "module_state: a module-wide fixture may start threads and processes late; they are the module's"
    )
    config.stash[_PRIVATE_TMP] = leaks.private_temporary_folder()
    config.stash[_MARK] = leaks.mark_session()
    config.stash[_STRAYS] = []
    config.stash[_SHM_BEFORE] = leaks.shared_memory() if _sees_shm(config) else frozenset()
    leaks.adopt_orphans()


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[_PRIVATE_TMP], ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("netlab") and (reason := netlab.why_not()):
        unmet(reason)
    if item.get_closest_marker("prometheus"):
        require_program("prometheus", "prometheus")
        require_program("promtool", "prometheus")


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test: no new child process, thread, descriptor or temporary file."""
    private_tmp = request.config.stash[_PRIVATE_TMP]
    with_shm = _sees_shm(request.config)
    before = leaks.footprint(private_tmp, with_shm=with_shm)
    yield
    found = leaks.leaks_since(before, private_tmp, with_shm=with_shm)
    if request.node.get_closest_marker("module_state"):
        found = [line for line in found if line.startswith("file ")]
    else:
        leaks.end_leaked_children(before)
    if found:
        pytest.fail("left behind:\n  " + "\n  ".join(found), pytrace=False)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two for each core: most tests wait for processes half of their time."""
    return 2 * len(os.sched_getaffinity(0))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """The last net: nothing which carries this run's mark may still run."""
    config = session.config
    strays = config.stash[_STRAYS]
    strays += leaks.end_stray_processes(config.stash[_MARK])
    if _sees_shm(config):
        strays += leaks.shared_memory_since(config.stash[_SHM_BEFORE])
    if _is_one_of_several(config):  # it has no terminal, and no exit status that counts
        vars(config)["workeroutput"][_STRAYS_OUTPUT] = strays
    elif strays:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """One of several processes has run its last test, and tells what was left behind."""
    node.config.stash[_STRAYS].extend(getattr(node, "workeroutput", {}).get(_STRAYS_OUTPUT, ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Above the closing line: what the last net caught."""
    for line in config.stash[_STRAYS]:
        terminalreporter.line(f"left behind by the session: {line}", red=True)


def _is_one_of_several(config: pytest.Config) -> bool:
    return hasattr(config, "workeroutput")


def _sees_shm(config: pytest.Config) -> bool:
    """`/dev/shm` belongs to everybody: only looked at where this run has the machine for itself, by one process."""
    return is_ci() and not _is_one_of_several(config)
