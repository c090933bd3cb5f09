"""The floor's loop (`floor.py`) from a process which Herder's own template code has built and sealed.

`sealed.py CPU WORKLOAD` is run by path, with the command line and the environment that the agent gives to a template;
WORKLOAD is the JSON object of PROTOCOL.md's `open`. It takes the steps of `build`, with a control socket that nobody
reads, and in place of serving forks, exits and waits in the same bare loop as the floor does. So the two differ in
nothing but what sealing has changed: huge pages, allocator, rehomed arrays, fewer fork hooks.
"""

import json
import os
import socket
import sys
from collections.abc import Callable


def build(workload: dict[str, object]) -> None:
    """Become a sealed template, or end and say why it cannot be forked from."""
    from importlib.util import find_spec

    spec = find_spec("herder_agent.template")
    assert spec is not None
    package = type(sys)("_herder_template")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["_herder_template"] = package
    module = __import__("_herder_template.build").build
    wire = sys.modules["_herder_template.wire"]
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    opening = {"t": "open", "workload": workload, "cloudpickle_path": "", "began": 0.0}
    become_child = module.Template(wire.Channel(theirs), opening, b"").build()
    if become_child is None:
        ours.setblocking(False)
        raise SystemExit(f"it cannot be forked from: {ours.recv(1 << 20)!r}")


def main(cpu: int, workload: dict[str, object]) -> None:
    """Serve lines until stdin ends."""
    loop = fork_loop()
    os.sched_setaffinity(0, {cpu})
    build(workload)
    print("ready", flush=True)
    for line in sys.stdin:
        count, took_s = loop(float(line))
        print(count, took_s, flush=True)


def fork_loop() -> "Callable[[float], tuple[int, float]]":
    """`floor.loop`, loaded by path: the client's packages are not imported into what is measured."""
    from importlib.machinery import SourceFileLoader

    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "floor.py")
    module = type(sys)("floor")
    SourceFileLoader("floor", path).exec_module(module)
    loop: Callable[[float], tuple[int, float]] = module.loop
    return loop


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
