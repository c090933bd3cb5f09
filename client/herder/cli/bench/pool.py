"""A `multiprocessing.Pool(maxtasksperchild=1)` with a preload, as `against_pool` measures it.

`python -c "from herder.cli.bench import pool; pool.main()" METHOD CORES MODULE...`: by `-c`, so that its children have
no `__main__` to import again, which would be held against them. Says `ready`; then, for each line `TASKS` on stdin,
maps that many calls of a built-in function, one each, and prints the seconds it took.

It leads a process group, which its children, the forkserver and the resource tracker are in. When stdin ends, for
whatever reason, the group has `GRACE_S` to end: a pool may hang, and would outlive a benchmark that was killed.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time

#: How long a pool that answers may take to end when it is told to; one that hangs has to be killed.
GRACE_S = 1.0


def main() -> None:
    """Serve lines until stdin ends."""
    method, cores, *modules = sys.argv[1:]
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_follow_stdin, args=(lines,), daemon=True).start()
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(list(modules))
    else:
        for module in modules:
            importlib.import_module(module)
    with context.Pool(int(cores), maxtasksperchild=1) as pool:
        pool.map(abs, range(2 * int(cores)), chunksize=1)  # the server and its imports are there
        print("ready", flush=True)
        while line := lines.get():
            began = time.perf_counter()
            pool.map(abs, range(int(line)), chunksize=1)
            print(time.perf_counter() - began, flush=True)


def _follow_stdin(lines: queue.SimpleQueue[str]) -> None:
    """Hand lines over, an empty one at the end. Then the process ends by itself, or its group is ended."""
    # By descriptor: this thread ends with the process, which must not find it in a locked `sys.stdin`.
    with open(0, closefd=False) as stdin:
        for line in stdin:
            lines.put(line)
    lines.put("")
    time.sleep(GRACE_S)
    # Of the group, the resource tracker ignores this signal: it removes the semaphores when the others are gone.
    os.killpg(0, signal.SIGTERM)
