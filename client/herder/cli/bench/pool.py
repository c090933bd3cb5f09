"""A `multiprocessing.Pool(maxtasksperchild=1)` with a preload, as `against_pool` measures it.

`python -c "from herder.cli.bench import pool; pool.main()" METHOD CORES MODULE...`: by `-c`, so that its children have
no `__main__` to import again, which would be held against them. Says `ready`; then, for each line `TASKS` on stdin,
maps that many calls of a built-in function, one each, and prints the seconds it took.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import time


def main() -> None:
    """Serve lines until stdin ends."""
    method, cores, *modules = sys.argv[1:]
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(list(modules))
    else:
        for module in modules:
            importlib.import_module(module)
    with context.Pool(int(cores), maxtasksperchild=1) as pool:
        pool.map(abs, range(2 * int(cores)), chunksize=1)  # the server and its imports are there
        print("ready", flush=True)
        for line in sys.stdin:
            began = time.perf_counter()
            pool.map(abs, range(int(line)), chunksize=1)
            print(time.perf_counter() - began, flush=True)
