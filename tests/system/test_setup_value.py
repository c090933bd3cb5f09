"""Setup's value is the same under every start method: a real cluster, from one end to the other."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import herder
from herder_shared.wire.messages import WorkloadInfo, WorkloadReport
from support import interpreters
from support.leaks import wait_until

cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = [pytest.mark.slow, pytest.mark.module_state]

WAIT_S = 60


@pytest.fixture(scope="module")
def client() -> Iterator[herder.Client]:
    with herder.LocalCluster(cores=2) as cluster, cluster.client() as client:
        yield client


class _Setup:
    """Notes in a file each time it runs; `thread` leaves one behind, `lock` is a value that does not pickle."""

    def __init__(self, notes: Path, what: str = "") -> None:
        self.notes = notes
        self.what = what

    def __call__(self) -> Any:
        import threading

        import numpy as np

        with self.notes.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if self.what == "thread":
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        whole = np.arange(1 << 18, dtype="i8")
        return {
            "whole": whole,
            "same": whole,
            "half": whole[::2],
            "lock": threading.Lock() if "lock" in self.what else 0,
        }

    @property
    def runs(self) -> int:
        return len(self.notes.read_text().split())


def _use() -> tuple[bool, int, int, int]:
    import herder

    value = herder.shared()
    total = int(value["whole"].sum())
    value["whole"][2] = -7
    return value["same"] is value["whole"], total, int(value["half"][1]), os.getpid()


RIGHT = (True, (1 << 18) * ((1 << 18) - 1) // 2, -7)


def _report(client: herder.Client, name: str) -> WorkloadReport:
    found: WorkloadInfo = next(info for info in client.workloads() if info.name == name)
    return next(iter(found.reports.values()))


@pytest.mark.parametrize(
    ("start", "what", "mode"),
    [("auto", "", "forked"), ("auto", "thread", "mapped"), ("fresh", "", "mapped"), ("fresh", "thread", "mapped")],
)
def test_setup_runs_once_and_each_task_has_its_own_writeable_value(
    client: herder.Client, tmp_path: Path, start: Any, what: str, mode: str
) -> None:
    setup = _Setup(tmp_path / "notes", what)
    name = f"{start}-{what}"
    view = client.options(workload=herder.Workload(name, start=start, setup=setup))
    answers = [future.result(WAIT_S) for future in [view.submit(_use) for _ in range(4)]]
    assert [answer[:3] for answer in answers] == [RIGHT] * 4
    assert len({pid for *_, pid in answers}) == 4, "a process per task"
    assert setup.runs == 1
    assert wait_until(lambda: _report(client, name).setup_mode == mode, WAIT_S)
    assert _report(client, name).setup_s is not None


def test_task_that_only_a_fresh_interpreter_survives_has_the_value_there(client: herder.Client, tmp_path: Path) -> None:
    setup = _Setup(tmp_path / "notes")

    def use() -> Any:
        with open(f"/proc/{os.getppid()}/cmdline", "rb") as file, open("/proc/self/cmdline", "rb") as own:
            is_fork = file.read() == own.read()
        if is_fork:
            os.kill(os.getpid(), signal.SIGSEGV)
        return _use()[:3]

    view = client.options(workload=herder.Workload("crashes", setup=setup))
    assert view.submit(use).result(WAIT_S) == RIGHT
    assert setup.runs == 2, "in the template, and in the publisher for fresh interpreters"
    assert view.submit(use).result(WAIT_S) == RIGHT
    assert setup.runs == 2


def test_warm_interpreter_takes_a_task_in_a_fraction_of_its_start(client: herder.Client, tmp_path: Path) -> None:
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(1)\n")
    workload = herder.Workload("warm", start="fresh", preload=["slow_to_import"], working_dir=tmp_path)
    view = client.options(workload=workload)
    first = view.submit(int)
    first.result(WAIT_S)
    cold_s = first.usage(WAIT_S).start_s
    assert cold_s > 1
    starts_s = []
    for _ in range(3):
        time.sleep(1.5 * cold_s)  # the demand: one that the pool can follow
        future = view.submit(int)
        future.result(WAIT_S)
        starts_s.append(future.usage(WAIT_S).start_s)
    assert sorted(starts_s)[1] < 0.2 * cold_s, (cold_s, starts_s)


@pytest.mark.parametrize("start", ["auto", "fresh"])
def test_value_that_does_not_pickle_makes_children_be_used_again_and_that_is_said(
    client: herder.Client, tmp_path: Path, start: Any
) -> None:
    setup = _Setup(tmp_path / "notes", "lock")
    name = f"lock-{start}"

    def use() -> int:
        import herder

        return int(herder.shared()["whole"][5]) and os.getpid()

    def setup_with_thread() -> Any:
        import threading

        threading.Thread(target=threading.Event().wait, daemon=True).start()
        return setup()

    view = client.options(workload=herder.Workload(name, start=start, setup=setup_with_thread))
    pids = [view.submit(use).result(WAIT_S) for _ in range(6)]
    assert len(set(pids)) <= 2, "children are used again"
    assert wait_until(lambda: _report(client, name).setup_mode == "per child", WAIT_S)
    (note,) = _report(client, name).notes
    assert "lock" in note
    assert "saved" in note
    given = client.options(
        workload=herder.Workload(name + "1", start=start, setup=setup_with_thread, max_tasks_per_child=1)
    )
    assert len({given.submit(use).result(WAIT_S) for _ in range(3)}) == 3


def test_setup_that_takes_too_long_fails_the_tasks(client: herder.Client) -> None:
    def hang() -> None:
        time.sleep(1000)

    for start in ("auto", "fresh"):
        workload = herder.Workload(start=start, setup=hang, setup_timeout=0.3)
        with pytest.raises(herder.SetupFailed, match="setup_timeout"):
            client.options(workload=workload).submit(int).result(WAIT_S)


def test_interpreter_that_is_not_there_is_a_failed_setup(client: herder.Client) -> None:
    for start in ("auto", "fresh"):
        workload = herder.Workload(start=start, python="/nowhere/bin/python")
        with pytest.raises(herder.SetupFailed, match="/nowhere/bin/python"):
            client.options(workload=workload).submit(int, 1).result(WAIT_S)


def test_setup_is_tried_on_a_second_node(tmp_path: Path) -> None:
    notes = tmp_path / "notes"

    def fail() -> None:
        with notes.open("a") as file:
            file.write(f"{os.environ['HERDER_AGENT']}\n")
        raise LookupError("no data here")

    with herder.LocalCluster(cores=2, agents=2) as cluster, cluster.client() as client:
        for start in ("auto", "fresh"):
            notes.write_text("")
            workload = herder.Workload(start=start, setup=fail)
            with pytest.raises(herder.SetupFailed, match="no data here"):
                client.options(workload=workload).submit(int).result(WAIT_S)
            tries = notes.read_text().split()
            assert sorted(tries.count(agent) for agent in set(tries)) == [3, 3]


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("start", ["auto", "fresh"])
def test_users_interpreter_without_herder(
    client: herder.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, start: Any
) -> None:
    (tmp_path / "users_code.py").write_text(
        "import array, os, pickle, sys, threading\n"
        "class Block:\n"
        "    def __init__(self, memory):\n"
        "        self.memory = memory\n"
        "    def __reduce_ex__(self, protocol):\n"
        "        return Block, (pickle.PickleBuffer(self.memory),)\n"
        "def setup():\n"
        f"    {'threading.Thread(target=threading.Event().wait, daemon=True).start()' if start == 'auto' else ''}\n"
        "    return Block(bytearray(b'x' * (1 << 21)))\n"
        "def use(n):\n"
        "    import herder\n"
        "    memory = herder.shared().memory\n"
        "    seen = memory[1 << 20]\n"
        "    memory[1 << 20] = n\n"
        "    return seen, '%d.%d' % sys.version_info[:2], 'herder_shared' in sys.modules\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "users_code", raising=False)
    import users_code  # type: ignore[import-not-found]

    try:
        python = str(interpreters.require(version))
        name = f"{version}-{start}"
        workload = herder.Workload(name, start=start, python=python, setup="users_code:setup", working_dir=tmp_path)
        view = client.options(workload=workload)
        assert list(view.map(users_code.use, range(3))) == [(ord("x"), version, False)] * 3
        assert wait_until(lambda: _report(client, name).setup_mode == "mapped", WAIT_S)
    finally:
        del sys.modules["users_code"]
