"""A future is small and keeps nothing that it need not."""

from __future__ import annotations

import gc
import threading
import tracemalloc
import weakref

import pytest

import herder
from herder.futures import Future
from support.fake_coordinator import FakeCoordinator


def test_a_pending_future_takes_less_than_two_kilobytes(client: herder.Client, coordinator: FakeCoordinator) -> None:
    coordinator.hold = True
    count = 500
    client.submit(abs, -1)
    keep = [client.submit(abs, -1) for _ in range(count)]
    client._connection.submit  # noqa: B018 - warm
    coordinator.until(lambda: sum(len(job.tasks) for job in coordinator.jobs.values()) > count)
    track, connection = keep[0]._track, client._connection
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    futures = [Future[int](connection, track, "python") for _ in range(count)]
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (after - before) / len(futures) < 1_500


def test_an_exception_does_not_keep_its_future(client: herder.Client) -> None:
    future = client.submit(int, "x")
    seen = weakref.ref(future)
    with pytest.raises(ValueError, match="invalid literal"):
        future.result(10)
    gc.disable()
    try:
        del future
        assert seen() is None
    finally:
        gc.enable()


def test_a_result_is_unpickled_once_in_the_thread_that_asks(client: herder.Client) -> None:
    future: Future[list[int]] = client.submit(list, [1, 2])
    assert future.result(10) is future.result()
    seen: list[object] = []
    threads = [threading.Thread(target=lambda: seen.append(future.result())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(each is future.result() for each in seen)


def test_a_future_says_what_it_is(client: herder.Client) -> None:
    future = client.submit(abs, -1)
    future.result(10)
    assert repr(future) == f"<herder.Future {future.task_id} finished>"


def test_a_future_travels_only_as_an_argument() -> None:
    import pickle

    with pytest.raises(herder.NotSerializable, match="argument"):
        pickle.dumps(Future.__new__(Future))
