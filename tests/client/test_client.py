"""Client, its views and its futures, on the real wire with a fake coordinator."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import itertools
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import herder
from herder_shared.ids import JobId
from herder_shared.states import Cause, Outcome
from herder_shared.wire import messages as m
from support.fake_coordinator import FakeCoordinator, wait_until


def square(x: int) -> int:
    return x * x


def fail(message: str) -> None:
    raise ValueError(message)


class Payload:
    """Counts its living copies, so that a test sees who keeps one."""


def test_submit_returns_a_future_with_its_identity(client: herder.Client) -> None:
    first, second = client.submit(square, 3), client.submit(square, 4)
    assert (first.result(10), second.result(10)) == (9, 16)
    assert isinstance(first, concurrent.futures.Future)
    assert first.task_id == f"{first.job_id}.0"
    assert second.task_id == f"{first.job_id}.1"
    assert first.usage(10).node == "fake"
    assert first.done()
    assert not first.cancelled()
    assert not first.running()


def test_every_keyword_goes_to_the_function(client: herder.Client) -> None:
    future = client.submit(lambda **kwargs: sorted(kwargs), fn=1, self=2, timeout=3)
    assert future.result(10) == ["fn", "self", "timeout"]


def test_exception_comes_back_as_itself_with_the_remote_traceback(client: herder.Client) -> None:
    future = client.submit(fail, "boom")
    with pytest.raises(ValueError, match="boom") as caught:
        future.result(10)
    assert "in fail" in str(caught.value.__cause__)
    assert isinstance(future.exception(), ValueError)


def test_exception_that_cannot_be_rebuilt_is_a_remote_error(client: herder.Client) -> None:
    def raise_local() -> None:
        class Local(Exception):
            def __reduce__(self) -> Any:
                raise TypeError("no")

        raise Local("odd")

    with pytest.raises(herder.RemoteError, match="odd") as caught:
        client.submit(raise_local).result(10)
    assert caught.value.type_name.endswith("Local")
    assert caught.value.task_id


def test_result_times_out(client: herder.Client, coordinator: FakeCoordinator) -> None:
    coordinator.hold = True
    future = client.submit(square, 1)
    with pytest.raises(TimeoutError):
        future.result(0.01)
    with pytest.raises(TimeoutError):
        future.exception(0)
    with pytest.raises(TimeoutError):
        future.usage(0.01)


def test_started_task_is_running(client: herder.Client, coordinator: FakeCoordinator) -> None:
    gate = threading.Event()
    _gates["running"] = gate
    future = client.submit(wait_at_gate, "running")
    wait_until(future.running)
    assert not future.done()
    gate.set()
    assert future.result(10) == "running"


_gates: dict[str, threading.Event] = {}


def wait_at_gate(name: str) -> str:
    assert _gates[name].wait(10)
    return name


def test_cancel_is_immediate_and_asks_for_the_end_of_what_runs(
    client: herder.Client, coordinator: FakeCoordinator
) -> None:
    gate = _gates["cancelled"] = threading.Event()
    future = client.submit(wait_at_gate, "cancelled")
    called: list[Any] = []
    future.add_done_callback(called.append)
    wait_until(future.running)
    assert future.cancel()
    assert future.cancelled()
    assert future.done()
    assert called == [future]
    with pytest.raises(CancelledError):
        future.result()
    with pytest.raises(CancelledError):
        future.exception()
    coordinator.until(lambda: bool(coordinator.said(m.CancelTasks)))
    assert coordinator.said(m.CancelTasks)[0].running
    assert future.usage(10) is not None
    assert future.cancel()
    gate.set()


def test_cancel_of_a_finished_task_is_refused(client: herder.Client) -> None:
    future = client.submit(square, 1)
    future.result(10)
    assert not future.cancel()
    assert not future.cancelled()


def test_cancel_running_false_leaves_what_runs(client: herder.Client) -> None:
    gate = _gates["left"] = threading.Event()
    future = client.options(cancel_running=False).submit(wait_at_gate, "left")
    wait_until(future.running)
    assert not future.cancel()
    gate.set()
    assert future.result(10) == "left"


def test_late_result_of_a_cancelled_task_is_dropped(client: herder.Client, coordinator: FakeCoordinator) -> None:
    coordinator.hold = True
    future = client.submit(square, 1)
    coordinator.until(lambda: bool(coordinator.said(m.SubmitTasks)))
    assert future.cancel()
    coordinator.release()
    assert future.cancelled()


def test_wait_and_as_completed_mix_with_foreign_futures(client: herder.Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        futures: list[concurrent.futures.Future[Any]] = [
            client.submit(square, 2),
            pool.submit(square, 3),
            client.submit(fail, "x"),
        ]
        done, pending = concurrent.futures.wait(futures, 10)
        assert (len(done), len(pending)) == (3, 0)
        assert set(concurrent.futures.as_completed(futures, 10)) == set(futures)
        done, _ = concurrent.futures.wait(
            [client.submit(fail, "x")], 10, return_when=concurrent.futures.FIRST_EXCEPTION
        )
        assert len(done) == 1


def test_wait_sees_cancelled_futures(client: herder.Client, coordinator: FakeCoordinator) -> None:
    coordinator.hold = True
    future = client.submit(square, 1)
    timer = threading.Timer(0.02, future.cancel)
    timer.start()
    done, _ = concurrent.futures.wait([future], 10)
    timer.join()
    assert done == {future}


def test_callbacks_run_in_order_and_an_error_in_one_harms_nobody(
    client: herder.Client, caplog: pytest.LogCaptureFixture
) -> None:
    called: list[int] = []
    future = client.submit(square, 2)
    future.add_done_callback(lambda _: called.append(1))
    future.add_done_callback(lambda _: 1 / 0)
    future.add_done_callback(lambda _: called.append(2))
    assert future.result(10) == 4
    wait_until(lambda: called == [1, 2])
    future.add_done_callback(lambda _: called.append(3))
    assert called == [1, 2, 3]
    assert client.submit(square, 3).result(10) == 9


def test_callback_that_exits_does_not_end_the_connection(client: herder.Client) -> None:
    def leave(_: object) -> None:
        raise SystemExit(3)

    future = client.submit(square, 2)
    future.add_done_callback(leave) if not future.done() else None
    assert client.submit(square, 3).result(10) == 9


def test_waiting_in_a_callback_is_an_error_and_no_deadlock(client: herder.Client, coordinator: FakeCoordinator) -> None:
    coordinator.hold = True
    later = client.submit(square, 5)
    future = client.submit(square, 1)
    raised: list[BaseException] = []

    def wait_for_later(_: object) -> None:
        try:
            later.result()
        except herder.HerderError as error:
            raised.append(error)

    future.add_done_callback(wait_for_later)
    job = JobId(future.job_id)
    end = m.TaskEnd(1, Outcome.SUCCEEDED, result=m.Payload(inline=b"N."))
    coordinator.until(lambda: bool(coordinator.said(m.SubmitTasks)))
    coordinator.call(lambda: coordinator._end(job, end))
    wait_until(lambda: bool(raised))
    assert "connection's own thread" in str(raised[0])


def test_submit_in_a_callback_works(client: herder.Client) -> None:
    more: list[concurrent.futures.Future[int]] = []
    client.submit(square, 2).add_done_callback(lambda _: more.append(client.submit(square, 3)))
    wait_until(lambda: bool(more))
    assert more[0].result(10) == 9


def test_dependencies_are_found_anywhere(client: herder.Client) -> None:
    one, two = client.submit(square, 2), client.submit(square, 3)
    total = client.submit(
        lambda deep: sum(deep["x"][0]) + deep["y"]._asdict()["v"], {"x": [(one, two)], "y": _Named(one)}
    )
    assert total.result(10) == 4 + 9 + 4


class _Named:
    def __init__(self, v: Any) -> None:
        self.v = v

    def _asdict(self) -> dict[str, Any]:
        return {"v": self.v}


def test_pending_dependency_travels_as_its_task(client: herder.Client, coordinator: FakeCoordinator) -> None:
    coordinator.hold = True
    first = client.submit(square, 2)
    second = client.submit(square, first)
    third = client.submit(lambda: second)  # in a closure
    coordinator.until(lambda: sum(len(each.tasks) for each in coordinator.said(m.SubmitTasks)) == 3)
    job = coordinator.jobs[JobId(first.job_id)]
    assert job.tasks[1].deps == ((first.job_id, 0),)
    assert job.tasks[2].deps == ((first.job_id, 1),)
    coordinator.release()
    assert str(third.result(10)) == "16"


def test_failed_dependency_ends_the_dependant(client: herder.Client) -> None:
    failed = client.submit(fail, "root")
    concurrent.futures.wait([failed], 10)
    dependant = client.submit(square, failed)
    with pytest.raises(herder.DependencyFailed) as caught:
        dependant.result(10)
    assert caught.value.task_id == failed.task_id
    assert isinstance(caught.value.__cause__, ValueError)
    further = client.submit(square, dependant)
    with pytest.raises(herder.DependencyFailed) as caught:
        further.result(10)
    assert caught.value.task_id == failed.task_id
    assert client.submit(square, 2).result(10) == 4


def test_dependency_that_fails_later_ends_the_dependant(client: herder.Client, coordinator: FakeCoordinator) -> None:
    coordinator.hold = True
    failed = client.submit(fail, "root")
    dependant = client.submit(square, failed)
    coordinator.release()
    with pytest.raises(herder.DependencyFailed) as caught:
        dependant.result(10)
    assert caught.value.task_id == failed.task_id
    assert isinstance(caught.value.__cause__, ValueError)


def test_cancelled_dependency_cancels_the_dependant(client: herder.Client, coordinator: FakeCoordinator) -> None:
    coordinator.hold = True
    first = client.submit(square, 1)
    late = client.submit(square, first)
    first.cancel()
    early = client.submit(square, first)
    coordinator.until(lambda: bool(coordinator.said(m.CancelTasks)))  # or it might begin before it is cancelled
    coordinator.release()
    with pytest.raises(CancelledError):
        early.result(10)
    with pytest.raises(CancelledError):
        late.result(10)


def test_foreign_future_is_refused(client: herder.Client, coordinator: FakeCoordinator) -> None:
    foreign: concurrent.futures.Future[int] = concurrent.futures.Future()
    with pytest.raises(herder.NotSerializable, match=r"args\[0\]\['x'\]"):
        client.submit(square, {"x": foreign})
    with herder.Client(profile=coordinator.profile()) as other, pytest.raises(herder.NotSerializable, match="another"):
        client.submit(square, other.submit(square, 1))


def test_results_that_others_depend_on_are_not_acknowledged(
    client: herder.Client, coordinator: FakeCoordinator
) -> None:
    coordinator.hold = True
    first = client.submit(square, 2)
    coordinator.until(lambda: bool(coordinator.said(m.SubmitTasks)))
    wait_until(lambda: not client._connection._unacked_bytes)
    coordinator.silent = True
    second = client.submit(square, first)
    coordinator.release()
    assert second.result(10) == 16
    time.sleep(0.15)
    job = coordinator.jobs[JobId(first.job_id)]
    assert job.acked == 0
    coordinator.silent = False
    coordinator.send(m.SubmitOk(JobId(first.job_id), 2))
    wait_until(lambda: job.acked == 2)


def test_a_client_whose_tasks_have_all_ended_does_not_wait_for_an_acknowledgement_that_got_lost(
    coordinator: FakeCoordinator,
) -> None:
    coordinator.silent = True
    client = herder.Client(profile=coordinator.profile())
    assert client.submit(square, 3).result(10) == 9
    client.shutdown()


def test_large_arguments_and_results_travel_as_blobs(client: herder.Client, coordinator: FakeCoordinator) -> None:
    content = bytes(range(256)) * 4096 * 3
    future = client.submit(bytes, content)
    assert client.submit(square, 3).result(10) == 9
    assert future.result(10) == content
    dependant = client.submit(len, future)
    assert dependant.result(10) == len(content)
    assert coordinator.said(m.PutBlob)


def test_large_argument_survives_a_lost_link(client: herder.Client, coordinator: FakeCoordinator) -> None:
    content = bytes(4 * 1024 * 1024)
    future = client.submit(len, content)
    coordinator.until(lambda: bool(coordinator.said(m.PutBlob)))
    coordinator.drop()
    assert future.result(20) == len(content)


def test_everything_survives_lost_links(client: herder.Client, coordinator: FakeCoordinator) -> None:
    futures = []
    for i in range(300):
        futures.append(client.submit(square, i))
        if i % 100 == 50:
            wait_until(lambda: bool(coordinator.links))
            coordinator.drop()
    assert [each.result(20) for each in futures] == [i * i for i in range(300)]
    job = coordinator.jobs[JobId(futures[0].job_id)]
    assert len(job.tasks) == len(job.events) == 300


def test_unacknowledged_submissions_are_sent_again(client: herder.Client, coordinator: FakeCoordinator) -> None:
    coordinator.silent = coordinator.hold = True
    future = client.submit(square, 5)
    coordinator.until(lambda: len(coordinator.said(m.SubmitTasks)) == 1)
    coordinator.drop()
    coordinator.until(lambda: len(coordinator.said(m.SubmitTasks)) == 2)
    coordinator.silent = False
    coordinator.release()
    assert future.result(10) == 25
    assert len(coordinator.said(m.OpenJob)) == 2


def test_submit_waits_while_too_much_is_unacknowledged(
    client: herder.Client, coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("connection", "conversation"):
        monkeypatch.setattr(f"herder.{module}.UNACKED_SUBMIT_BYTES_MAX", 1000)
    coordinator.silent = True
    futures: list[concurrent.futures.Future[int]] = []

    def submit_many() -> None:
        futures.extend(client.submit(square, i) for i in range(100))

    thread = threading.Thread(target=submit_many)
    thread.start()
    coordinator.until(lambda: bool(coordinator.said(m.SubmitTasks)))
    thread.join(0.1)
    assert thread.is_alive()
    coordinator.silent = False
    coordinator.drop()
    thread.join(10)
    assert not thread.is_alive()
    assert [each.result(10) for each in futures] == [i * i for i in range(100)]


def test_submissions_from_several_threads_are_all_run(client: herder.Client) -> None:
    results: list[int] = []

    def submit_some(start: int) -> None:
        futures = [client.submit(square, i) for i in range(start, start + 50)]
        results.extend(each.result(20) for each in futures)

    threads = [threading.Thread(target=submit_some, args=(n * 50,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(results) == [i * i for i in range(200)]


def test_refused_submission_fails_its_futures_and_later_ones_use_a_new_job(
    client: herder.Client, coordinator: FakeCoordinator
) -> None:
    coordinator.hold = True
    future = client.submit(square, 1)
    coordinator.until(lambda: bool(coordinator.said(m.SubmitTasks)))
    coordinator.send(m.SubmitRefused(JobId(future.job_id), 0, "Unschedulable", "needs 900 cores"))
    with pytest.raises(herder.Unschedulable, match="900 cores"):
        future.result(10)
    coordinator.release()
    other = client.submit(square, 2)
    assert other.result(10) == 4
    assert other.job_id != future.job_id


def test_what_a_job_took_before_it_refused_more_is_told_on_the_next_connection(
    client: herder.Client, coordinator: FakeCoordinator
) -> None:
    coordinator.hold = True
    taken, refused = client.submit(square, 3), client.submit(square, 4)
    job = JobId(taken.job_id)
    coordinator.until(lambda: job in coordinator.jobs and len(coordinator.jobs[job].tasks) == 2)
    coordinator.send(m.SubmitRefused(job, 1, "RemoteProtocolError", "the job was closed with 1 task"))
    with pytest.raises(herder.HerderError, match="closed with 1 task"):
        refused.result(10)
    coordinator.drop()
    coordinator.release()
    assert taken.result(10) == 9


def test_submission_that_may_be_tried_again_is(
    client: herder.Client, coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("herder.conversation._SUBMIT_AGAIN_S", 0.05)
    coordinator.silent = coordinator.hold = True
    futures = [client.submit(square, i) for i in range(3)]
    job = JobId(futures[0].job_id)
    coordinator.until(lambda: job in coordinator.jobs and len(coordinator.jobs[job].tasks) == 3)
    before = len(coordinator.said(m.SubmitTasks))
    coordinator.silent = False
    coordinator.send(m.SubmitRefused(job, 0, "DataLost", "a blob is not here", again=True))
    coordinator.send(m.SubmitRefused(job, 1, "RemoteProtocolError", "only 0 before them"))
    coordinator.send(m.SubmitRefused(job, 0, "RemoteProtocolError", "it was to be closed with 3, and 0 came"))
    coordinator.until(lambda: len(coordinator.said(m.SubmitTasks)) > before)
    coordinator.release()
    assert [each.result(10) for each in futures] == [0, 1, 4]


@pytest.mark.parametrize(
    ("cause", "cls"),
    [
        (Cause.SIGNAL, herder.TaskCrashed),
        (Cause.EXIT, herder.TaskCrashed),
        (Cause.DEADLOCK, herder.TaskCrashed),
        (Cause.OUT_OF_MEMORY, herder.TaskOutOfMemory),
        (Cause.TIMEOUT, herder.TaskTimeout),
        (Cause.NODE_LOST, herder.NodeLost),
        (Cause.TEMPLATE_LOST, herder.NodeLost),
        (Cause.START_FAILED, herder.NodeLost),
        (Cause.SETUP_FAILED, herder.SetupFailed),
        (Cause.FORK_UNSAFE, herder.ForkUnsafe),
        (Cause.VERSION_MISMATCH, herder.VersionMismatch),
        (Cause.NOT_SERIALIZABLE, herder.NotSerializable),
        (Cause.CANNOT_UNPICKLE, herder.RemoteError),
        (Cause.DATA_LOST, herder.DataLost),
        (Cause.DEPENDENCY_FAILED, herder.DependencyFailed),
        (Cause.POISONED, herder.TaskPoisoned),
        (Cause.UNSCHEDULABLE, herder.Unschedulable),
        (Cause.PAYLOAD_TOO_LARGE, herder.PayloadTooLarge),
        (Cause.COMMAND_EXIT, herder.CommandFailed),
    ],
)
def test_each_cause_is_its_error(
    client: herder.Client, coordinator: FakeCoordinator, cause: Cause, cls: type[herder.HerderError]
) -> None:
    coordinator.hold = True
    future = client.submit(square, 1)
    coordinator.until(lambda: bool(coordinator.said(m.SubmitTasks)))
    failure = m.Failure(cause, "what happened", signal=9, stderr_tail="last words")
    end = m.TaskEnd(0, Outcome.FAILED, failure=failure, usage=m.Usage("n1", 2))  # type: ignore[arg-type]
    coordinator.call(lambda: coordinator._end(JobId(future.job_id), end))
    error = future.exception(10)
    assert type(error) is cls
    assert error.task_id == future.task_id
    assert "what happened" in str(error)
    if issubclass(cls, herder.TaskCrashed):
        assert isinstance(error, herder.TaskCrashed)
        assert (error.signal, error.node, error.attempt) == (9, "n1", 2)
        assert "last words" in str(error)


# --- map -------------------------------------------------------------------------------------------------------------


def test_map_yields_results_in_order(client: herder.Client) -> None:
    assert list(client.map(square, range(100))) == [i * i for i in range(100)]
    assert list(client.map(lambda a, b: a - b, [5, 6, 7], [1, 2])) == [4, 4]
    assert list(client.map(square, [])) == []
    assert list(client.map(square, [1, 2], chunksize=10)) == [1, 4]


def test_map_submits_before_it_returns(client: herder.Client, coordinator: FakeCoordinator) -> None:
    coordinator.hold = True
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for i in range(5):
            taken.append(i)
            yield i

    results = client.map(square, numbers())
    assert taken == [0, 1, 2, 3, 4]
    coordinator.release()
    assert list(results) == [0, 1, 4, 9, 16]


def test_map_with_a_buffersize_takes_at_most_that_many_ahead(client: herder.Client) -> None:
    taken = itertools.count()
    count = 0

    def numbers() -> Iterator[int]:
        nonlocal count
        for i in taken:
            count = i + 1
            yield i

    results = client.map(square, numbers(), buffersize=3)
    assert count <= 3
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert count <= 5 + 3
    results.close()  # type: ignore[attr-defined]
    assert list(client.map(square, range(10), buffersize=3)) == [i * i for i in range(10)]
    assert list(client.map(square, [], buffersize=3)) == []
    assert list(client.map(square, [1], buffersize=3)) == [1]


def test_map_checks_its_arguments(client: herder.Client) -> None:
    with pytest.raises(ValueError, match="chunksize"):
        client.map(square, [1], chunksize=0)
    with pytest.raises(ValueError, match="buffersize"):
        client.map(square, [1], buffersize=0)
    with pytest.raises(TypeError, match="buffersize"):
        client.map(square, [1], buffersize=1.5)  # type: ignore[arg-type]


def test_map_raises_the_first_failure_and_cancels_the_rest(client: herder.Client, coordinator: FakeCoordinator) -> None:
    results = client.map(lambda x: 10 // x, [5, 0, 1])
    assert next(results) == 2
    with pytest.raises(ZeroDivisionError):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_map_times_out_counted_from_the_call(client: herder.Client, coordinator: FakeCoordinator) -> None:
    coordinator.hold = True
    results = client.map(square, [1, 2], timeout=0.05)
    with pytest.raises(TimeoutError):
        next(results)
    coordinator.until(lambda: bool(coordinator.said(m.CancelTasks)))


def test_dropped_map_cancels_what_has_not_started(client: herder.Client, coordinator: FakeCoordinator) -> None:
    coordinator.hold = True
    results = client.map(square, range(10))
    del results
    gc.collect()
    coordinator.until(lambda: bool(coordinator.said(m.CancelTasks)))
    assert not coordinator.said(m.CancelTasks)[0].running


def test_map_goes_on_after_shutdown_without_wait(client: herder.Client) -> None:
    results = client.map(square, range(20))
    client.shutdown(wait=False)
    assert list(results) == [i * i for i in range(20)]


def test_map_keeps_no_reference_to_a_yielded_value(client: herder.Client) -> None:
    for value in client.map(lambda _: Payload(), range(3)):
        seen = weakref.ref(value)
        del value
        gc.collect()
        assert seen() is None


def test_error_in_an_iterable_of_map_is_raised_by_map(client: herder.Client) -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        client.map(square, numbers())


# --- array -----------------------------------------------------------------------------------------------------------


def test_array_gives_a_job(client: herder.Client) -> None:
    job = client.array(square, range(50), name="squares")
    assert job.wait(10)
    assert list(job.results()) == [i * i for i in range(50)]
    assert list(job.results()) == [i * i for i in range(50)]
    assert (len(job), job.name, len(job.id)) == (50, "squares", 16)
    assert {future.index: future.result() for future in job.as_completed()} == {i: i * i for i in range(50)}
    assert job.failures() == {}
    progress = job.progress()
    assert (progress.total, progress.ended, progress.succeeded, progress.pending) == (50, 50, 50, 0)


def test_array_of_an_iterator_is_fed_behind_the_callers_back(client: herder.Client) -> None:
    gate = threading.Event()

    def numbers() -> Iterator[int]:
        yield 1
        assert gate.wait(10)
        yield 2

    job = client.array(square, numbers())
    first = next(job.results(10))
    assert first == 1
    assert job.progress().total is None
    gate.set()
    assert job.wait(10)
    assert list(job.results()) == [1, 4]


def test_array_with_failures(client: herder.Client) -> None:
    job = client.array(lambda x: 10 // x, [5, 0, 2, 0])
    assert job.wait(10)
    assert sorted(job.failures()) == [1, 3]
    assert job.progress().failed == 2
    results = job.results()
    assert next(results) == 2
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert job.future(2).result() == 5
    with pytest.raises(IndexError):
        job.future(4)


def test_array_of_nothing_is_over_at_once(client: herder.Client) -> None:
    job = client.array(square, [])
    assert job.wait(10)
    assert list(job.results()) == []


def test_error_in_the_iterable_of_an_array_is_raised_where_results_are_asked_for(client: herder.Client) -> None:
    def numbers() -> Iterator[int]:
        yield 3
        raise KeyError("broken")

    job = client.array(square, numbers())
    results = job.results(10)
    assert next(results) == 9
    with pytest.raises(KeyError, match="broken"):
        next(results)
    with pytest.raises(KeyError, match="broken"):
        job.wait(10)


def test_cancelled_array_stops_its_feeder(client: herder.Client, coordinator: FakeCoordinator) -> None:
    coordinator.hold = True
    job = client.array(square, itertools.count())
    wait_until(lambda: len(job) > 0)
    job.cancel()
    assert job.wait(10)
    with pytest.raises(CancelledError):
        next(job.results())
    assert job.progress().cancelled == len(job)


def test_array_with_an_ended_dependency_fails_only_there(client: herder.Client) -> None:
    good, bad = client.submit(square, 2), client.submit(fail, "root")
    concurrent.futures.wait([good], 10)
    concurrent.futures.wait([bad], 10)
    job = client.array(square, [1, bad, good])
    assert job.wait(10)
    assert job.future(0).result() == 1
    assert job.future(2).result() == 16
    assert isinstance(job.failures()[1], herder.DependencyFailed)
    with pytest.raises(herder.DependencyFailed):
        job.future(1).result()


def test_job_is_found_again_by_its_id(client: herder.Client, coordinator: FakeCoordinator) -> None:
    job = client.array(square, range(5))
    assert job.wait(10)
    with herder.Client(profile=coordinator.profile()) as other:
        again = other.job(job.id)
        assert again.wait(10)
        assert list(again.results()) == [0, 1, 4, 9, 16]
        with pytest.raises(herder.JobNotFound):
            other.job("0" * 16)


def test_a_question_does_not_overtake_what_was_submitted_before_it(client: herder.Client) -> None:
    connection = client._connection
    is_free = threading.Event()

    def hold() -> None:  # so that all of it is taken in in one turn
        is_free.wait(10)

    connection._later(hold)
    job = client.array(square, range(3))
    answers: list[int] = []
    asking = threading.Thread(target=lambda: answers.append(job.status().tasks))
    asking.start()
    before = len(connection._intake)
    deadline_s = time.monotonic() + 10
    while len(connection._intake) < 3:
        assert time.monotonic() < deadline_s, before
        time.sleep(0.001)
    is_free.set()
    asking.join()
    assert answers == [3]


def test_who_asks_for_his_own_job_takes_nothing_from_those_that_wait_for_it(
    client: herder.Client, coordinator: FakeCoordinator
) -> None:
    coordinator.hold = True
    array, future = client.array(square, range(3)), client.submit(square, 4)
    shown, lane = client.job(array.id), client.job(future.job_id)
    late = client.submit(square, 5)
    coordinator.hold = False
    coordinator.release()
    assert list(array.results(10)) == list(shown.results(10)) == [0, 1, 4]
    assert (future.result(10), late.result(10)) == (16, 25)
    assert lane.future(0).result(10) == 16
    del array
    assert list(shown.results(10)) == [0, 1, 4]


def test_who_asks_for_his_own_job_late_is_told_where_its_results_are(
    client: herder.Client, coordinator: FakeCoordinator
) -> None:
    assert client.submit(square, 4).result(10) == 16
    coordinator.hold = True
    running = client.submit(square, 5)
    lane = client.job(running.job_id)
    with pytest.raises(herder.DataLost, match="own future"):
        lane.future(0).result(10)
    coordinator.release()
    assert running.result(10) == lane.future(1).result(10) == 25


def test_who_asks_for_his_own_detached_job_is_told_all_of_it(
    client: herder.Client, coordinator: FakeCoordinator
) -> None:
    detached = client.options(detached=True)
    array = detached.array(square, range(3)).id  # nobody has its results
    wait_until(lambda: JobId(array) in coordinator.jobs and coordinator.jobs[JobId(array)].acked == 3, 10)
    first = client.job(array)
    assert list(first.results(10)) == [0, 1, 4]
    assert first.progress() == client.job(array).progress() == herder.JobProgress(3, 3, 0, 3, 0, 0)

    done = detached.submit(square, 4)
    assert done.result(10) == 16
    coordinator.hold = True
    running = detached.submit(square, 5)
    lane = client.job(running.job_id)
    assert lane.future(0).result(10) == 16
    coordinator.hold = False
    coordinator.drop()
    coordinator.release()
    assert running.result(10) == lane.future(1).result(10) == client.job(running.job_id).future(1).result(10) == 25


def test_a_job_of_others_may_be_asked_for_twice(client: herder.Client, coordinator: FakeCoordinator) -> None:
    coordinator.hold = True
    job = client.array(square, range(3))
    with herder.Client(profile=coordinator.profile()) as other:
        first, second = other.job(job.id), other.job(job.id)
        coordinator.release()
        assert list(first.results(10)) == list(second.results(10)) == [0, 1, 4]


def test_commands(client: herder.Client, coordinator: FakeCoordinator) -> None:
    completed = client.command(["echo", Path("/x"), "b"], env={"A": "1"}).result(10)
    assert (completed.returncode, completed.text()) == (0, "echo /x b")
    assert completed.usage is not None
    job = client.command_array([["a"], ["b"]])
    assert job.wait(10)
    assert [each.stdout for each in job.results()] == [b"a", b"b"]
    with pytest.raises(ValueError, match="empty"):
        client.command([])
    with pytest.raises(TypeError, match="stdin"):
        client.command("cat", stdin="text")  # type: ignore[arg-type]


# --- shutdown --------------------------------------------------------------------------------------------------------


def test_submit_after_shutdown_raises(client: herder.Client) -> None:
    client.shutdown()
    client.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        client.submit(square, 1)
    with pytest.raises(RuntimeError, match="after shutdown"):
        client.map(square, [1])
    with pytest.raises(RuntimeError, match="after shutdown"):
        client.array(square, [1])


def test_shutdown_waits_for_pending_futures(client: herder.Client, coordinator: FakeCoordinator) -> None:
    coordinator.hold = True
    future = client.submit(square, 3)
    timer = threading.Timer(0.05, coordinator.release)
    timer.start()
    with client:
        pass
    timer.join()
    assert future.done()
    assert future.result() == 9


def test_shutdown_without_wait_lets_pending_futures_end(client: herder.Client) -> None:
    future = client.submit(square, 3)
    client.shutdown(wait=False)
    assert future.result(10) == 9
    thread = client._connection._thread
    assert thread is not None
    thread.join(10)
    assert not thread.is_alive()


def test_shutdown_cancels_what_has_not_started_and_leaves_what_runs(
    client: herder.Client, coordinator: FakeCoordinator
) -> None:
    gate = _gates["shutdown"] = threading.Event()
    running = client.submit(wait_at_gate, "shutdown")
    wait_until(running.running)
    coordinator.hold = True
    waiting = [client.submit(square, i) for i in range(5)]
    timer = threading.Timer(0.1, gate.set)
    timer.start()
    client.shutdown(wait=True, cancel_futures=True)
    timer.join()
    assert running.result(0) == "shutdown"
    assert all(each.cancelled() for each in waiting)


def test_goodbye_is_said(client: herder.Client, coordinator: FakeCoordinator) -> None:
    client.submit(square, 1).result(10)
    client.shutdown()
    coordinator.until(lambda: bool(coordinator.said(m.Goodbye)))


def test_shutdown_of_a_view_is_of_its_futures_only(client: herder.Client, coordinator: FakeCoordinator) -> None:
    view = client.options(cores=2, retries=1)
    with view:
        mine = view.submit(square, 3)
    assert mine.done()
    with pytest.raises(RuntimeError, match="after shutdown"):
        view.submit(square, 1)
    assert client.submit(square, 4).result(10) == 16
    options = coordinator.jobs[JobId(mine.job_id)].spec.options
    assert (options.cores, options.retries) == (2.0, 1)


def test_options_of_the_function_stand_between_client_and_view(coordinator: FakeCoordinator) -> None:
    @herder.task_options(cores=2, retries=5)
    def decorated() -> None:
        """Does nothing."""

    with herder.Client(profile=coordinator.profile(), cores=4, priority=7) as client:
        plain = client.submit(decorated)
        viewed = client.options(retries=1).submit(decorated)
        plain.result(10)
        viewed.result(10)
    options = coordinator.jobs[JobId(plain.job_id)].spec.options
    assert (options.cores, options.retries, options.priority) == (2.0, 5, 7)
    options = coordinator.jobs[JobId(viewed.job_id)].spec.options
    assert (options.cores, options.retries, options.priority) == (2.0, 1, 7)


def test_unknown_option_names_the_nearest(client: herder.Client) -> None:
    with pytest.raises(TypeError, match="retries"):
        client.options(retrys=3)
    with pytest.raises(TypeError, match="cores"):
        herder.Client(corse=3)
    with pytest.raises(TypeError, match="cores"):
        herder.task_options(core=3)


def test_collected_client_ends_its_connection(coordinator: FakeCoordinator) -> None:
    client = herder.Client(profile=coordinator.profile())
    future = client.submit(square, 3)
    thread = client._connection._thread
    del client
    gc.collect()
    assert future.result(10) == 9
    assert thread is not None
    thread.join(10)
    assert not thread.is_alive()


def test_view_keeps_its_client_alive(coordinator: FakeCoordinator) -> None:
    view = herder.Client(profile=coordinator.profile()).options(cores=1)
    gc.collect()
    assert view.submit(square, 3).result(10) == 9
    thread = view._connection._thread
    del view
    gc.collect()
    assert thread is not None
    thread.join(10)
    assert not thread.is_alive()


def test_results_and_arguments_are_released(client: herder.Client) -> None:
    argument = Payload()
    seen = weakref.ref(argument)
    future = client.submit(lambda _: Payload(), argument)
    del argument
    result = weakref.ref(future.result(10))
    gc.collect()
    assert seen() is None
    assert result() is not None
    del future
    gc.collect()
    assert result() is None


# --- loss ------------------------------------------------------------------------------------------------------------


def test_reconnect_timeout_ends_futures_as_unreachable(coordinator: FakeCoordinator) -> None:
    coordinator.hold = True
    client = herder.Client(profile=coordinator.profile(), reconnect_timeout=0.2)
    future, job = client.submit(square, 1), client.array(square, [1, 2])
    wait_until(lambda: not client._connection._unacked_bytes)
    coordinator.stop()
    with pytest.raises(herder.Unreachable, match="unknown") as caught:
        future.result(20)
    assert caught.value.task_id == future.task_id
    with pytest.raises(herder.Unreachable):
        next(job.results(10))
    with pytest.raises(herder.Unreachable):
        client.submit(square, 1)
    client.shutdown()


def test_coordinator_that_comes_back_is_found_again(client: herder.Client, coordinator: FakeCoordinator) -> None:
    coordinator.hold = True
    future = client.submit(square, 6)
    coordinator.until(lambda: bool(coordinator.said(m.SubmitTasks)))
    coordinator.stop()
    coordinator.epoch = 2
    coordinator.start()
    coordinator.release()
    assert future.result(20) == 36


def test_wrong_address_is_unreachable_in_time(keys: Path, coordinator: FakeCoordinator) -> None:
    coordinator.stop()
    with pytest.raises(herder.Unreachable, match=rf"127\.0\.0\.1:{coordinator.port}"):
        herder.Client(profile=coordinator.profile(), connect_timeout=0.3)


def test_refused_client_is_told_why(coordinator: FakeCoordinator) -> None:
    coordinator.refusal = m.Refused("Unauthorized", "this certificate was revoked")
    with pytest.raises(herder.Unauthorized, match="revoked"):
        herder.Client(profile=coordinator.profile())


def test_queries(client: herder.Client) -> None:
    assert client.nodes() == ()
    assert client.status().epoch == 1
    future = client.submit(square, 1)
    future.result(10)
    assert future.logs().stdout == b"out"


def test_gather(client: herder.Client) -> None:
    async def gather() -> list[Any]:
        futures: list[concurrent.futures.Future[Any]] = [client.submit(square, 2), client.submit(fail, "x")]
        mixed = await client.gather(*futures, return_exceptions=True)
        loop = asyncio.get_running_loop()
        return [*mixed, await loop.run_in_executor(client, square, 5)]

    four, error, twenty_five = asyncio.run(gather())
    assert (four, twenty_five) == (4, 25)
    assert isinstance(error, ValueError)


def test_wait_for_kills_the_task_on_timeout(client: herder.Client, coordinator: FakeCoordinator) -> None:
    coordinator.hold = True

    async def give_up() -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(loop.run_in_executor(client, square, 1), 0.05)

    asyncio.run(give_up())
    coordinator.until(lambda: bool(coordinator.said(m.CancelTasks)))


def test_code_by_value_is_tagged_with_the_interpreter(client: herder.Client, coordinator: FakeCoordinator) -> None:
    by_reference = client.options(name="ref").submit(len, "abc")
    by_value = client.options(name="value").submit(lambda: 1)
    by_reference.result(10)
    by_value.result(10)
    assert coordinator.jobs[JobId(by_reference.job_id)].python == {""}
    (tag,) = coordinator.jobs[JobId(by_value.job_id)].python
    assert tag.count(".") == 2
    assert "/" in tag
