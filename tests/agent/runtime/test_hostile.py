"""A task that speaks the agent's own language badly: its attempt ends, the agent goes on and has never unpickled."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest

from herder_shared.ids import WorkloadKey
from herder_shared.states import Outcome
from herder_shared.wire.messages import WorkloadSpec
from support.agent_peer import AgentProcess, Coordinator, running

pytestmark = [pytest.mark.module_state, pytest.mark.slow]
# The children cannot import the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

#: An agent as it is shipped, that tells of each unpickling.
WATCHED = (
    "import sys\n"
    "def watch(event, arguments):\n"
    "    if event == 'pickle.find_class': print('UNPICKLED', arguments, file=sys.stderr, flush=True)\n"
    "sys.addaudithook(watch)\n"
    "from herder_agent.main import command; command(sys.argv[4:])"
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Coordinator, AgentProcess]]:
    with running(tmp_path_factory.mktemp("agent"), under=(sys.executable, "-c", WATCHED)) as both:
        yield both


class Gadget:
    """Unpickled, it runs something."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.getcwd, ()


def shout(junk: bytes) -> None:
    """Write junk into every socket that this process has, as a frame would come, then go on as if nothing were."""
    import socket
    import stat

    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as end:
                    end.sendall(junk)
        except OSError:
            continue


def fail(text: str) -> None:
    raise type(text, (Exception,), {"__reduce__": Gadget().__reduce__})(text, Gadget())


def junk_of(kind: str) -> bytes:
    import pickle

    gadget = pickle.dumps(Gadget())
    heads = {
        "a pickle": gadget,
        "a pickle as a head": len(gadget).to_bytes(4, "big") + bytes(8) + gadget,
        "a pickle as a result": b"\0\0\0\x31" + len(gadget).to_bytes(8, "big") + b"\x01" + bytes(48) + gadget,
        "a gibibyte": b"\x40\0\0\0" + b"\x40" + bytes(11),
        "another's end": b'\0\0\0\x2d\0\0\0\0\0\0\0\0{"t":"exited","child":1,"pid":1,"status":0    }',
        "nothing like it": b"GET / HTTP/1.1\r\n\r\n" * 100,
    }
    return heads[kind]


@pytest.mark.parametrize("start", ["fork", "fresh"])
@pytest.mark.parametrize(
    "kind",
    ["a pickle", "a pickle as a head", "a pickle as a result", "a gibibyte", "another's end", "nothing like it"],
)
def test_a_task_that_writes_junk_to_its_agent_ends_itself_only(
    pair: tuple[Coordinator, AgentProcess], start: str, kind: str
) -> None:
    coordinator, agent = pair
    end = coordinator.end_of(coordinator.start(shout, junk_of(kind), start=start))
    assert end.outcome in {Outcome.CRASHED, Outcome.FAILED, Outcome.SUCCEEDED, Outcome.LOST}
    assert coordinator.value_of(coordinator.start(pow, 2, 5, start=start)) == 32
    assert agent.process.poll() is None
    text = agent.log.read_text()
    assert "Traceback" not in text
    assert "UNPICKLED" not in text


def test_a_pickle_in_what_a_task_says_and_is_named_stays_text(pair: tuple[Coordinator, AgentProcess]) -> None:
    coordinator, agent = pair
    gadget = cloudpickle.dumps(Gadget(), 0).decode("latin-1").replace("\0", "")
    spec = WorkloadSpec(WorkloadKey("f" * 16), name=gadget, env={"GADGET": gadget})
    failed = coordinator.end_of(coordinator.start(fail, gadget, workload=spec))
    assert failed.outcome is Outcome.FAILED
    assert failed.failure is not None
    assert gadget.splitlines()[0] in failed.failure.message
    assert "UNPICKLED" not in agent.log.read_text()
    assert Path(f"/proc/{agent.pid}").exists()
