"""Rules for every test: what a marker needs, and that nothing is left behind."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import leaks, netlab
from support.requirements import is_ci, require_program, unmet

_PRIVATE_TMP = pytest.StashKey[Path]()
_MARK = pytest.StashKey[str]()


def _restore_signals() -> None:
    """As in a terminal: a shell that runs us in the background ignores SIGINT and SIGQUIT for us, nohup SIGHUP."""
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    _restore_signals()
    config.addinivalue_line(
        "markers", "module_state: a module-wide fixture may start threads and processes late; they are the module's"
    )
    config.stash[_PRIVATE_TMP] = leaks.private_temporary_folder()
    config.stash[_MARK] = leaks.mark_session()
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
    before = leaks.footprint(private_tmp, with_shm=is_ci())
    yield
    found = leaks.leaks_since(before, private_tmp, with_shm=is_ci())
    if request.node.get_closest_marker("module_state"):
        found = [line for line in found if line.startswith("file ")]
    else:
        leaks.end_leaked_children(before)
    if found:
        pytest.fail("left behind:\n  " + "\n  ".join(found), pytrace=False)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """The last net: nothing which carries this run's mark may still run."""
    mark = session.config.stash[_MARK]
    if not leaks.wait_until(lambda: not leaks.stray_processes(mark), leaks.SETTLE_S):
        for pid, command in leaks.stray_processes(mark).items():
            print(f"\nleft behind by the session and killed: process {pid}: {command}")
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
