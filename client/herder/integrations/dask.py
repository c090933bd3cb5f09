"""Dask collections on a Herder cluster::

    import dask, herder, herder.integrations.dask
    with dask.config.set(scheduler=herder.integrations.dask.get):  # the active profile's cluster
        array.sum().compute()
    array.sum().compute(scheduler=herder.integrations.dask.get, client=client)  # or a client of one's own

Each key of the optimized graph is one task, in a process of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from herder.client import Client, View
from herder_shared.errors import DependencyFailed

_lock = threading.Lock()
_default: Client | None = None


def get(dsk: Mapping[Any, Any], keys: Any, *, client: View | None = None, **others: Any) -> Any:
    """A scheduler as Dask wants one: the values of `keys`, in their structure.

    `client`: a client or a view of one, whose options the tasks get. Without it the task's own inside a task, else one
    of the active profile, kept for the next time. What Dask tells other schedulers (`num_workers`, `cache`, ...) has no
    meaning here.

    Raises:
        Exception: what the first failed task raised, as Dask's own schedulers do.
    """
    del others
    try:
        return (client or _client()).graph(dsk, keys)
    except DependencyFailed as failed:
        if failed.__cause__ is None:
            raise
        cause = failed.__cause__
        for note in getattr(failed, "__notes__", ()):
            cause.add_note(note)
        raise cause from cause.__cause__


def _client() -> Client:
    global _default
    from herder.in_task import current_client, is_in_task

    if is_in_task():
        return current_client()
    with _lock:
        if _default is None or not _default.is_usable:
            _default = Client()
        return _default
