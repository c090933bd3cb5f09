"""From a user's call to what travels: the function, the arguments, the dependencies, ready for a `Batch`."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from herder.futures import Future
from herder.outbox import TASK_OVERHEAD_BYTES, Batch
from herder.outcomes import dependency_error
from herder.payload import PYTHON_TAG, DependencyEnded, FunctionCache, PickledFunction, Ready, payload_of, pickle_call
from herder_shared.errors import NotSerializable
from herder_shared.ids import blob_id
from herder_shared.wire.messages import Function, Payload, TaskItem

if TYPE_CHECKING:
    from herder.connection import Connection
    from herder_shared.ids import BlobId, JobId

#: Arguments of a task that is submitted only to be cancelled, as a task which it depends on has ended without a value:
#: no interpreter can unpickle them, so the function cannot run by accident.
_NOTHING = b"\x80\x05."
_UNUSABLE = Payload(inline=_NOTHING, size_bytes=len(_NOTHING))
_UNUSABLE_FUNCTION = PickledFunction(Function(blob_id(_NOTHING), _NOTHING), None, (), False, "")


class Dependencies:
    """Decides what stands for a future found in arguments, and remembers what it claimed."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.claims: list[tuple[JobId, int]] = []

    def __call__(self, future: concurrent.futures.Future[Any]) -> tuple[JobId, int] | Ready:
        if not isinstance(future, Future):
            raise NotSerializable(
                f"a {type(future).__module__}.{type(future).__qualname__} is not one of Herder's: pass its result, or "
                "submit what it computes to this client"
            )
        if not future.belongs_to(self._connection):
            raise NotSerializable("this future is of another client: pass its result, or submit both to one client")
        if not future.done():
            # Claimed before looking again: the connection ends a future before it looks for claims.
            self._connection.claim(future.job, future.index)
            self.claims.append((future.job, future.index))
            if not future.done():
                return future.job, future.index
        if future.cancelled():
            raise DependencyEnded(None)
        error = future.exception()
        if error is not None:
            raise DependencyEnded(dependency_error(error, future.task_id))
        return Ready(future.result())

    def release(self) -> None:
        """What was claimed is not submitted after all."""
        if self.claims:
            self._connection.unclaim(self.claims)


@dataclass(slots=True)
class Call:
    """One task before it has an index."""

    item: TaskItem
    function: PickledFunction | None
    python: str
    size_bytes: int
    claims: list[tuple[JobId, int]] = field(default_factory=list)
    blobs: list[tuple[BlobId, bytes]] = field(default_factory=list)
    #: It cannot run: what it ends with.
    ended: DependencyEnded | None = None

    def batch(self, job: JobId) -> Batch:
        """A batch of this task alone."""
        return Batch(job, 0, self.function, self.python, [self.item], self.size_bytes, self.claims, self.blobs)

    @classmethod
    def of_ended(cls, ended: DependencyEnded) -> Call:
        """A task whose function cannot be had: what it depends on has ended without a value."""
        return cls(TaskItem(_UNUSABLE), _UNUSABLE_FUNCTION, "", TASK_OVERHEAD_BYTES, ended=ended)


def prepare_call(
    connection: Connection,
    functions: FunctionCache,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    code_by_value: bool,
) -> Call:
    """Pickle a call. `code_by_value`: its workload's `setup` holds code, so interpreters must match in any case.

    Raises:
        NotSerializable, PayloadTooLarge: nothing was submitted; the message names the object.
        TypeError: `function` is not callable.
    """
    depend = Dependencies(connection)
    try:
        pickled = functions.pickled(function, depend)
    except DependencyEnded as ended:
        depend.release()
        return Call.of_ended(ended)
    except BaseException:
        depend.release()
        raise
    return prepare_arguments(connection, pickled, args, kwargs, depend, code_by_value=code_by_value)


def prepare_arguments(
    connection: Connection,
    function: PickledFunction,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    depend: Dependencies | None = None,
    *,
    code_by_value: bool,
) -> Call:
    """As `prepare_call`, for a function that is pickled already."""
    depend = depend or Dependencies(connection)
    blobs = [(function.function.id, function.blob)] if function.blob is not None else []
    try:
        pickled = pickle_call(args, kwargs, depend, function.name)
        payload = payload_of(pickled.content)
    except DependencyEnded as ended:
        return Call(TaskItem(_UNUSABLE), function, "", TASK_OVERHEAD_BYTES, depend.claims, blobs, ended)
    except BaseException:
        depend.release()
        raise
    if payload.blob is not None:
        blobs.append((payload.blob, pickled.content))
    deps = tuple(dict.fromkeys(function.deps + pickled.deps)) if function.deps else pickled.deps
    is_code = code_by_value or function.code_by_value or pickled.code_by_value
    size = TASK_OVERHEAD_BYTES + payload.size_bytes + (len(function.blob) if function.blob is not None else 0)
    return Call(TaskItem(payload, deps), function, PYTHON_TAG if is_code else "", size, depend.claims, blobs)


def prepare_data(content: bytes) -> Call:
    """A task that is data and not code: a command."""
    payload = payload_of(content)
    blobs = [(payload.blob, content)] if payload.blob is not None else []
    return Call(TaskItem(payload), None, "", TASK_OVERHEAD_BYTES + payload.size_bytes, blobs=blobs)
