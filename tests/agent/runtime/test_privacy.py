"""What a task can get hold of that is the agent's: nothing, as an ordinary user.

The agent runs without any capability of root's. With them a task could look into every process of the machine, and into
the agent's too: whoever lets tasks run as root has no secrets from them.
"""

from __future__ import annotations

import base64
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cloudpickle
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from support.agent_peer import AgentProcess, Coordinator, running

pytestmark = [pytest.mark.module_state, pytest.mark.slow]
# The children cannot import the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

#: PR_CAPBSET_DROP of all there could be: what is exec'd then has none of them.
AS_ORDINARY_USER = (
    "import ctypes, os, sys; libc = ctypes.CDLL(None)\n"
    "for number in range(64): libc.prctl(24, number, 0, 0, 0)\n"
    "os.execv(sys.argv[1], sys.argv[1:])"
)
VARIABLE = "A_SECRET_OF_THE_AGENTS"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Coordinator, AgentProcess]]:
    folder = tmp_path_factory.mktemp("agent")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "a-value-which-" + "no-task-may-see")
        with running(folder, under=(sys.executable, "-c", AS_ORDINARY_USER)) as (coordinator, agent):
            # A connection of which we know the secrets.
            coordinator._acceptor.context.keylog_filename = str(folder / "secrets")
            assert coordinator.link is not None
            coordinator.link.close("once more")
            coordinator.wait(lambda: coordinator.sessions == 2)
            coordinator.wait_linked()
            yield coordinator, agent


def secrets_of(agent: AgentProcess) -> dict[str, bytes]:
    """Every form in which the agent's key could lie in memory, and what its connection is encrypted with."""
    pem = (agent.state_dir.parent / "agent" / "key.pem").read_bytes()
    key = serialization.load_pem_private_key(pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    scalar = key.private_numbers().private_value
    lines = pem.splitlines()[1:-1]
    found = {
        "the key as PEM": lines[1],  # the first line is much the same for all keys
        "the key as DER": base64.b64decode(b"".join(lines))[-100:-68],
        "the key as a number": scalar.to_bytes(32, "big"),
        "the key as OpenSSL keeps it": scalar.to_bytes(32, "little"),
        "the agent's environment": b"a-value-which-" + b"no-task-may-see",
    }
    for line in (agent.state_dir.parent / "secrets").read_text().splitlines():
        if not line.startswith("#"):
            label, _, secret = line.split()
            found[label] = bytes.fromhex(secret)
    assert len(found) >= 8
    return found


def look_around(folder: str, agent: int) -> tuple[list[str], int, bool]:
    """In a task: what of the agent's can be opened; then everything that is readable in the task's own memory and its
    template's goes into a folder. Who the template is, and whether the agent's variable is there."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]

    def refused(call: Callable[[], object]) -> bool:
        try:
            result = call()
        except OSError as error:
            return error.errno in {errno.EPERM, errno.EACCES, errno.ENOENT}
        return result == -1 and ctypes.get_errno() == errno.EPERM

    def peek() -> int:
        buffer = ctypes.create_string_buffer(8)
        with open("/proc/self/maps") as maps:  # an address that is mapped here, and there too: it is the same program
            where = int(maps.readline().partition("-")[0], 16)
        vector = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 8)
        remote = (ctypes.c_size_t * 2)(where, 8)
        return int(libc.process_vm_readv(agent, vector, 1, remote, 1, 0))

    def steal() -> int:
        pidfd = os.pidfd_open(agent)
        try:
            return int(libc.syscall(438, pidfd, 0, 0))  # pidfd_getfd
        finally:
            os.close(pidfd)

    def read(name: str) -> Callable[[], object]:
        def go() -> None:
            with open(f"/proc/{agent}/{name}", "rb", 0) as file:
                file.read(1)

        return go

    attempts: dict[str, Callable[[], object]] = {
        name: read(name)
        for name in ("mem", "environ", "maps", "auxv", "stack", "syscall", *map("fd/{}".format, range(24)))
    }
    attempts |= {f"link fd/{n}": (lambda n=n: os.readlink(f"/proc/{agent}/fd/{n}")) for n in range(24)}  # type: ignore[misc]
    attempts |= {
        "writing to mem": lambda: os.close(os.open(f"/proc/{agent}/mem", os.O_RDWR)),
        "map_files": lambda: os.listdir(f"/proc/{agent}/map_files"),
        "cwd": lambda: os.readlink(f"/proc/{agent}/cwd"),
        "ptrace attach": lambda: libc.ptrace(16, agent, None, None),
        "ptrace seize": lambda: libc.ptrace(0x4206, agent, None, None),
        "process_vm_readv": peek,
        "pidfd_getfd": steal,
    }
    got = [name for name, call in attempts.items() if not refused(call)]
    template = os.getppid()
    for name, pid in (("child", os.getpid()), ("template", template)):
        with (
            open(f"/proc/{pid}/maps") as maps,
            open(f"/proc/{pid}/mem", "rb", 0) as memory,
            open(f"{folder}/{name}", "wb") as out,
        ):
            for line in maps:
                where, mode = line.split()[:2]
                if mode.startswith("r") and "[v" not in line:
                    start, end = (int(each, 16) for each in where.split("-"))
                    memory.seek(start)
                    out.write(memory.read(end - start))
            out.write(open(f"/proc/{pid}/environ", "rb").read())  # noqa: SIM115
    return got, template, "A_SECRET_OF_THE_AGENTS" in os.environ


def memory_of(pid: int) -> bytes:
    """All that is readable there; for who may look."""
    parts: list[bytes] = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            where, mode = line.split()[:2]
            if mode.startswith("rw"):
                start, end = (int(each, 16) for each in where.split("-"))
                memory.seek(start)
                parts.append(memory.read(end - start))
    return b"".join(parts) + Path(f"/proc/{pid}/environ").read_bytes()


@pytest.mark.parametrize("start", ["fork", "fresh"])
def test_a_task_can_neither_read_nor_trace_its_agent_and_has_no_secret_of_its(
    pair: tuple[Coordinator, AgentProcess], start: str, tmp_path: Path
) -> None:
    coordinator, agent = pair
    status = Path(f"/proc/{agent.pid}/status").read_text()
    assert "CapEff:\t0000000000000000" in status
    got, template, has_variable = coordinator.value_of(
        coordinator.start(look_around, str(tmp_path), agent.pid, start=start)
    )
    assert got == []
    assert template != agent.pid
    assert not has_variable
    secrets = secrets_of(agent)
    for name in ("child", "template"):
        memory = (tmp_path / name).read_bytes()
        assert len(memory) > 4 << 20
        assert b"look_around" in memory or name == "template"  # this is how one finds something
        assert [what for what, secret in secrets.items() if secret in memory] == [], f"in the {name}'s memory"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can look into the agent")
def test_what_was_looked_for_is_what_the_agent_has(pair: tuple[Coordinator, AgentProcess]) -> None:
    """Else the other test finds nothing for another reason."""
    _, agent = pair
    memory = memory_of(agent.pid)
    found = {what for what, secret in secrets_of(agent).items() if secret in memory}
    assert {"the agent's environment", "CLIENT_TRAFFIC_SECRET_0"} <= found
    assert any(what.startswith("the key") for what in found)
