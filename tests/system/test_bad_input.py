"""What users get wrong, each with a clear error, nothing lost, nothing hanging. Real processes all."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import cloudpickle
import pytest

import herder
from herder.local import LocalCluster
from support import interpreters

WAIT_S = 60.0
# The children cannot import the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(cores=2) as running:
        yield running


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[herder.Client]:
    with cluster.client() as running:
        yield running
        assert running.submit(pow, 2, 10).result(WAIT_S) == 1024, "the cluster no longer works"


class _NoUnpickle(Exception):
    def __reduce__(self) -> tuple[object, ...]:
        return int, ("not a number",)


def _raise_not_unpicklable() -> None:
    raise _NoUnpickle("one")


def _return_lock() -> object:
    return threading.Lock()


class _BadReduce:
    def __reduce__(self) -> tuple[object, ...]:
        raise ValueError("no pickling today")


class _BadLoad:
    def __reduce__(self) -> tuple[object, ...]:
        return (int, ("not a number",))


def test_unpicklable_argument_names_the_object_and_its_place(client: herder.Client) -> None:
    with pytest.raises(herder.NotSerializable, match="lock") as caught:
        client.submit(len, {"a": [1, threading.Lock()]})
    assert "a" in caught.value.path


def test_unpicklable_function_names_what_it_captured(client: herder.Client) -> None:
    lock = threading.Lock()
    with pytest.raises(herder.NotSerializable, match="lock"):
        client.submit(lambda: lock)


def test_result_that_cannot_be_pickled_names_its_type(client: herder.Client) -> None:
    with pytest.raises(herder.NotSerializable, match="lock"):
        client.submit(_return_lock).result(WAIT_S)
    with pytest.raises(herder.HerderError, match="no pickling today"):
        client.submit(_BadReduce).result(WAIT_S)


def test_result_that_cannot_be_unpickled_is_an_error_of_its_own(client: herder.Client) -> None:
    with pytest.raises(herder.HerderError, match="not a number"):
        client.submit(_BadLoad).result(WAIT_S)


def test_exception_that_cannot_be_unpickled_comes_as_text(client: herder.Client) -> None:
    with pytest.raises(herder.RemoteError, match="_NoUnpickle") as caught:
        client.submit(_raise_not_unpicklable).result(WAIT_S)
    assert "_raise_not_unpicklable" in caught.value.remote_traceback


def test_missing_module_names_it_and_the_cures(
    client: herder.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here_module.py").write_text("def work(): return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here_module  # type: ignore[import-not-found]

    with pytest.raises(Exception, match="only_here_module") as caught:
        client.submit(only_here_module.work).result(WAIT_S)
    assert "working_dir" in str(caught.value) or "preload" in str(caught.value)


@pytest.mark.parametrize("start", ["auto", "fork", "fresh"])
def test_setup_that_raises_fails_the_tasks_with_its_traceback(
    client: herder.Client, start: Literal["auto", "fork", "fresh"]
) -> None:
    def setup() -> None:
        raise RuntimeError("the data is not there")

    view = client.options(workload=herder.Workload(setup=setup, start=start))
    with pytest.raises(herder.SetupFailed, match="the data is not there"):
        view.submit(pow, 1, 1).result(WAIT_S)


def test_preload_of_a_missing_module_names_it(client: herder.Client) -> None:
    view = client.options(workload=herder.Workload(preload=["json", "no_such_module_at_all"]))
    with pytest.raises(herder.SetupFailed, match="no_such_module_at_all"):
        view.submit(pow, 1, 1).result(WAIT_S)


def test_fork_of_a_template_with_a_thread_is_refused_and_auto_works(client: herder.Client) -> None:
    def setup() -> str:
        threading.Thread(target=time.sleep, args=(3600,), daemon=True, name="ticker").start()
        return "value"

    forced = client.options(workload=herder.Workload(setup=setup, start="fork"))
    with pytest.raises(herder.ForkUnsafe, match="ticker"):
        forced.submit(pow, 1, 1).result(WAIT_S)
    chosen = client.options(workload=herder.Workload(setup=setup))
    assert chosen.submit(herder.shared).result(WAIT_S) == "value"


def test_request_which_no_node_can_meet_is_refused_at_once(client: herder.Client) -> None:
    with pytest.raises(herder.Unschedulable, match="1000"):
        client.options(cores=1000).submit(pow, 1, 1).result(WAIT_S)
    with pytest.raises(herder.Unschedulable, match="gpu"):
        client.options(gpus=1).submit(pow, 1, 1).result(WAIT_S)


def test_other_python_minor_version_is_a_mismatch_for_code_and_fine_for_references(client: herder.Client) -> None:
    other = interpreters.require("3.12" if sys.version_info[:2] != (3, 12) else "3.13")
    view = client.options(workload=herder.Workload(python=str(other)))
    assert view.submit(pow, 2, 5).result(WAIT_S) == 32
    with pytest.raises(herder.VersionMismatch) as caught:
        view.submit(lambda: 1).result(WAIT_S)
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" in str(caught.value)


def test_missing_interpreter_is_named(client: herder.Client) -> None:
    view = client.options(workload=herder.Workload(python="/nowhere/bin/python"))
    with pytest.raises(herder.HerderError, match="/nowhere/bin/python"):
        view.submit(pow, 2, 5).result(WAIT_S)


def test_unknown_option_names_the_nearest(client: herder.Client) -> None:
    with pytest.raises(TypeError, match="timeout"):
        client.options(timeuot=3)


def test_command_that_is_not_there_is_named(client: herder.Client) -> None:
    with pytest.raises(herder.CommandFailed, match="no-such-program") as caught:
        client.command(["no-such-program", "-x"]).result(WAIT_S)
    assert caught.value.completed.returncode == 127
    with pytest.raises(herder.CommandFailed, match="/no/such/folder"):
        client.command(["pwd"], cwd="/no/such/folder").result(WAIT_S)


def test_command_that_fails_carries_its_output(client: herder.Client) -> None:
    with pytest.raises(herder.CommandFailed) as caught:
        client.command("echo out; echo err >&2; exit 3").result(WAIT_S)
    assert caught.value.completed.returncode == 3
    assert caught.value.completed.stderr == b"err\n"
    done = client.command("exit 3", check=False).result(WAIT_S)
    assert done.returncode == 3


@pytest.mark.parametrize(
    ("end", "says"),
    [
        (lambda: os._exit(7), "7"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "SIGSEGV"),
        (os.abort, "SIGABRT"),
        (lambda: sys.exit(3), "3"),
    ],
)
def test_crash_names_the_signal_or_status(client: herder.Client, end: object, says: str) -> None:
    with pytest.raises(herder.TaskCrashed, match=says):
        client.options(idempotent=False).submit(end).result(WAIT_S)  # type: ignore[arg-type]


def test_endless_recursion_is_the_tasks_own_error(client: herder.Client) -> None:
    def again(n: int) -> int:
        return again(n + 1)

    with pytest.raises(RecursionError):
        client.submit(again, 0).result(WAIT_S)


def test_timeout_ends_the_task_and_its_descendants(client: herder.Client, tmp_path: Path) -> None:
    mark = tmp_path / "pids"

    def forever(path: str) -> None:
        child = subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 3600 & wait"], start_new_session=True)
        with open(path, "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
        time.sleep(3600)

    with pytest.raises(herder.TaskTimeout):
        client.options(timeout=1.0).submit(forever, str(mark)).result(WAIT_S)
    for pid in map(int, mark.read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_memory_limit_kills_the_hog_alone(client: herder.Client) -> None:
    def hog() -> int:
        kept = []
        for _ in range(200):
            kept.append(b"x" * (8 << 20))
            time.sleep(0.01)
        return len(kept)

    with pytest.raises(herder.TaskOutOfMemory) as caught:
        client.options(memory="100MiB").submit(hog).result(WAIT_S)
    assert caught.value.limit_bytes == 100 << 20
    assert (caught.value.peak_memory_bytes or 0) >= 100 << 20


def test_coordinator_on_a_busy_port_says_which(cluster: LocalCluster, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "herder_coordinator"),
            *("--identity", str(cluster.profile.coordinator), "--state-dir", str(tmp_path / "state")),
            *("--listen", cluster.address, "--http-listen", "127.0.0.1:0"),
        ],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 2
    assert cluster.address.rpartition(":")[2] in done.stderr
    assert "Traceback" not in done.stderr


def test_second_coordinator_on_the_same_folder_names_the_first(cluster: LocalCluster) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "herder_coordinator"),
            *("--identity", str(cluster.profile.coordinator), "--state-dir", str(cluster.state_dir / "coordinator")),
            *("--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0"),
        ],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 3
    assert str(cluster.processes["coordinator"].pid) in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_address_names_it() -> None:
    with LocalCluster(cores=1) as other:
        profile = other.profile
        other.processes["coordinator"].popen.kill()
        with pytest.raises(herder.Unreachable, match=profile.addresses[0]):
            herder.Client(profile=profile, connect_timeout=1.0)


def test_certificate_of_another_cluster_is_unauthorized(cluster: LocalCluster) -> None:
    with (
        LocalCluster(cores=1) as other,
        pytest.raises(herder.Unauthorized),
    ):
        herder.Client(cluster.address, profile=other.profile)


def test_no_profile_is_a_configuration_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERDER_PROFILES", str(tmp_path))
    monkeypatch.delenv("HERDER_PROFILE", raising=False)
    with pytest.raises(herder.ConfigError, match="herder init"):
        herder.Client()


def test_errors_survive_pickling() -> None:
    error = herder.TaskCrashed("crashed", task_id="a.1", signal=9)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.task_id, again.signal) == ("crashed", "a.1", 9)


@pytest.mark.parametrize("program", ["coordinator", "local-1"])
def test_interrupted_program_leaves_with_one_line(program: str) -> None:
    with LocalCluster(cores=1) as other:
        process = other.processes[program]
        process.popen.send_signal(signal.SIGINT)
        assert process.popen.wait(WAIT_S) in {0, 130}
        assert "Traceback" not in process.log_tail()
