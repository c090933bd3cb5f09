"""The floor: the rate at which this machine's kernel makes and reaps processes for a Python that does nothing else.

Run by path as a process of its own, one for each core, pinned to it: `floor.py CPU MODULE...` imports cloudpickle (as
Herder's templates do) and the modules, says `ready`, and then, for each line `SECONDS` on stdin, forks, exits and waits
in a bare loop for that long and prints how many it did, with the exact time it took. Standard library only.
"""

import importlib
import os
import sys
import time


def loop(seconds: float) -> tuple[int, float]:
    """`fork`, `_exit(0)` in the child, `waitpid`, until the time is over: how often, and in how many seconds."""
    count = 0
    began = time.perf_counter()
    ends = began + seconds
    while True:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        count += 1
        now = time.perf_counter()
        if now >= ends:
            return count, now - began


def main(cpu: int, modules: list[str]) -> None:
    """Serve lines until stdin ends."""
    os.sched_setaffinity(0, {cpu})
    importlib.import_module("cloudpickle")
    for module in modules:
        importlib.import_module(module)
    print("ready", flush=True)
    for line in sys.stdin:
        count, took_s = loop(float(line))
        print(count, took_s, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
