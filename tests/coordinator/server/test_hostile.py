"""Whoever is not known costs a real coordinator next to nothing, and what is known of the others is never unpickled."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import re
import socket
import ssl
import time
from pathlib import Path

import pytest

from coordinator.server.conftest import Run
from herder_shared import tls
from herder_shared.ids import Incarnation, NodeName
from herder_shared.limits import GIB, HANDSHAKE_TIMEOUT_S, MIB
from herder_shared.states import Cause, Outcome
from herder_shared.wire import messages as m
from herder_shared.wire.frame import encode_frame
from support.coordinators import (
    JOB,
    Process,
    agent_of,
    client_of,
    collect_ends,
    config_for,
    coordinator_process,
    job_spec,
    submission,
)
from support.links import CLUSTER, Authority, connect_raw, read_to_end

pytestmark = pytest.mark.slow

#: To find out that a connection was closed, on a machine that is busy with other tests.
SLACK_S = 15.0
#: As many of each kind.
MANY = 3


def resident_bytes(process: Process) -> int:
    text = Path(f"/proc/{process.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) * 1024


def tls_hello() -> bytes:
    """The first flight of a TLS client that has no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    outgoing = ssl.MemoryBIO()
    pipe = context.wrap_bio(ssl.MemoryBIO(), outgoing)
    with contextlib.suppress(ssl.SSLWantReadError):
        pipe.do_handshake()
    return outgoing.read()


def nested() -> bytes:
    body = b"\x91" * 10_000
    return len(body).to_bytes(4, "big") + body


PLAIN = {
    "nothing": b"",
    "random bytes": os.urandom(100_000),
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 1000,
    "a bare TLS hello": tls_hello(),
    "half a TLS hello": tls_hello()[:50],
}
#: Over TLS with a good certificate, before the hello.
SECURED = {
    "nothing said": b"",
    "a gibibyte announced": GIB.to_bytes(4, "big") + bytes(1000),
    "deep nesting": nested(),
    "a million tiny frames": encode_frame(m.Goodbye()) * 1_000_000,
    "a frame cut short": encode_frame(m.Goodbye())[:5],
}


def test_strangers_are_cut_off_in_time_and_cost_less_than_10_mib(
    authority: Authority, tmp_path: Path, run: Run
) -> None:
    identity = authority.identity("client", "mallory")

    async def closed_within(address: tuple[str, int], what: str, junk: bytes, secured: bool) -> tuple[str, float]:
        def speak() -> None:
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                if secured:
                    peer.do_handshake()  # type: ignore[attr-defined]
                peer.sendall(junk)

        opened = connect_raw(identity, address) if secured else socket.create_connection(address, timeout=30)
        with opened as peer:
            start_s = time.monotonic()
            await asyncio.to_thread(speak)
            with contextlib.suppress(ssl.SSLError):
                await read_to_end(peer)
            return what, time.monotonic() - start_s

    async def go(process: Process) -> None:
        async with client_of(authority, process.address) as client:
            kinds = [(what, junk, False) for what, junk in PLAIN.items()]
            kinds += [(what, junk, True) for what, junk in SECURED.items()]
            await closed_within(process.address, *kinds[1])  # what is used for the first time is paid for once
            before_bytes = resident_bytes(process)
            took = await asyncio.gather(*(closed_within(process.address, *kind) for kind in kinds * MANY))
            late = {what: seconds for what, seconds in took if seconds > HANDSHAKE_TIMEOUT_S + SLACK_S}
            assert late == {}
            assert resident_bytes(process) - before_bytes < 10 * MIB
            assert (await client.ask(1, "status")).status is not None  # and nobody else noticed

    with coordinator_process(config_for(authority, tmp_path)) as process:
        run(go(process))
        log = process.log.read_text()
        assert "Traceback" not in log
        assert log.count(" refused ") <= 5, "one line for each kind of refusal"


def test_a_pickle_in_every_field_that_is_shown_stays_text(authority: Authority, tmp_path: Path, run: Run) -> None:
    """`harden` makes that unpickling raises, and anything that raises in the coordinator ends it."""
    gadget = pickle.dumps(os.getcwd, 0)
    text = gadget.decode("latin-1")

    async def go(process: Process) -> None:
        spec = job_spec(tags=(text,), owner=text, workload_name=text)
        async with (
            agent_of(authority, process.address) as agent,
            client_of(authority, process.address, role="admin") as client,
        ):
            client.send(m.OpenJob(m.JobSpec(JOB, text, spec.workload, tags=(text,), owner=text)), submission(2))
            order = await agent.next(m.StartAttempts)
            while len(order.attempts) < 2:
                more = await agent.next(m.StartAttempts)
                order = m.StartAttempts(order.session, order.attempts + more.attempts)
            failure = m.Failure(Cause.EXCEPTION, text, type_name=text, traceback=text, pickled=gadget, stderr_tail=text)
            usage = m.Usage(node=NodeName("n1"), start_method=text)
            logs = m.Logs(gadget, gadget)
            one, two = order.attempts
            agent.send(
                m.AttemptsEnded(
                    (
                        m.AttemptEnd(one.attempt, JOB, one.index, Outcome.FAILED, None, failure, usage, logs),
                        m.AttemptEnd(
                            two.attempt, JOB, two.index, Outcome.SUCCEEDED, m.Payload(inline=gadget), None, usage, logs
                        ),
                    )
                )
            )
            ends = {end.index: end for end in await collect_ends(client, 2)}
            assert ends[one.index].failure == failure
            assert ends[two.index].result == m.Payload(inline=gadget)
            for number, what in enumerate(("job", "jobs", "tasks", "explain", "logs", "workloads", "nodes"), 1):
                await client.ask(number, what, JOB, 0)
            assert ((await client.ask(99, "job", JOB)).jobs or ())[0].name == text

    with coordinator_process(config_for(authority, tmp_path)) as process:
        run(go(process))
        assert process.end() == 0
        assert "never unpickles" not in process.log.read_text()


def test_a_peer_without_a_certificate_gets_no_byte_past_the_handshake(
    authority: Authority, tmp_path: Path, run: Run
) -> None:
    """TLS 1.3 lets a client believe that the handshake is through before the server has seen its certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(authority.identity("client", "mallory") / tls.AUTHORITY_CERTIFICATE)

    async def go(process: Process) -> None:
        with (
            socket.create_connection(process.address, timeout=30) as plain,
            context.wrap_socket(plain, server_hostname=tls.server_name(CLUSTER)) as peer,
        ):
            with contextlib.suppress(ssl.SSLError, ConnectionError):
                peer.sendall(encode_frame(m.Hello(1, CLUSTER, Incarnation("i"))))
            with pytest.raises((ssl.SSLError, ConnectionError)) as refused:
                peer.recv(1)
            assert "CERTIFICATE_REQUIRED" in str(refused.value)

    with coordinator_process(config_for(authority, tmp_path)) as process:
        run(go(process))
