"""TLS over memory: what an error says to whom, and that a refused peer hears why."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from herder_shared import tls
from herder_shared.errors import HerderError, ProtocolMismatch, RemoteProtocolError, Unauthorized, Unreachable
from herder_shared.wire.secure import SecurePipe, explain_accepting, explain_dialling
from support.links import CLUSTER, Authority


def pipes(server: Path, client: Path) -> tuple[SecurePipe, SecurePipe]:
    there = SecurePipe(tls.server_context(server), server_side=True)
    here = SecurePipe(tls.client_context(client), server_side=False, server_hostname=tls.server_name(CLUSTER))
    here.handshake()
    return there, here


def test_a_refused_client_finds_the_alert_in_what_the_server_sends_last(authority: Authority) -> None:
    there, here = pipes(
        authority.identity("coordinator", "coordinator"), authority.identity("client", "expired", days=-1)
    )
    there.handshake(here.outgoing())
    assert here.handshake(there.outgoing())
    with pytest.raises(ssl.SSLCertVerificationError) as refused:
        there.handshake(here.outgoing())
    assert "expired" in str(explain_accepting(refused.value))
    with pytest.raises(ssl.SSLError) as heard:
        here.receive(there.outgoing())
    error = explain_dialling(heard.value, "head:7711")
    assert isinstance(error, Unauthorized)
    assert "head:7711" in str(error)
    assert "our certificate has expired" in str(error)


def test_bytes_cut_anywhere_come_out_whole(authority: Authority) -> None:
    there, here = pipes(authority.identity("coordinator", "coordinator"), authority.identity("client", "me"))
    there.handshake(here.outgoing())
    here.handshake(there.outgoing())
    there.handshake(here.outgoing())
    sent = here.send(b"a" * 20_000) + here.send(b"b" * 10) + here.end()
    received = [there.receive(sent[at : at + 997]) for at in range(0, len(sent), 997)]
    assert b"".join(plain for plain, _ in received) == b"a" * 20_000 + b"b" * 10
    assert [ended for _, ended in received].index(True) == len(received) - 1


def test_nonsense_after_the_handshake_is_an_error_and_not_data(authority: Authority) -> None:
    there, here = pipes(authority.identity("coordinator", "coordinator"), authority.identity("client", "me"))
    there.handshake(here.outgoing())
    here.handshake(there.outgoing())
    there.handshake(here.outgoing())
    with pytest.raises(ssl.SSLError) as caught:
        there.receive(b"\x17\x03\x03\x00\x20" + bytes(32))
    assert isinstance(explain_accepting(caught.value), RemoteProtocolError)


def test_ending_a_pipe_that_never_was_secured_says_nothing(authority: Authority) -> None:
    there, _ = pipes(authority.identity("coordinator", "coordinator"), authority.identity("client", "me"))
    assert there.end() == b""


def ssl_error(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, reason)
    error.reason = reason
    return error


@pytest.mark.parametrize(
    ("reason", "kind", "text"),
    [
        ("SSLV3_ALERT_CERTIFICATE_EXPIRED", Unauthorized, "issue it again"),
        ("SSLV3_ALERT_CERTIFICATE_REVOKED", Unauthorized, "revoked"),
        ("TLSV1_ALERT_UNKNOWN_CA", Unauthorized, "another cluster"),
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", Unauthorized, "profile"),
        ("SSLV3_ALERT_BAD_CERTIFICATE", Unauthorized, "profile"),
        ("TLSV1_ALERT_PROTOCOL_VERSION", ProtocolMismatch, "TLS 1.3"),
        ("TLSV1_ALERT_INTERNAL_ERROR", Unreachable, "disturbed"),
        ("WRONG_VERSION_NUMBER", Unreachable, "no Herder coordinator"),
    ],
)
def test_each_alert_becomes_the_error_that_says_what_to_do(reason: str, kind: type[HerderError], text: str) -> None:
    error = explain_dialling(ssl_error(reason), "head:7711")
    assert type(error) is kind
    assert text in str(error)


@pytest.mark.parametrize(
    ("code", "text"),
    [(10, "expired"), (9, "clock"), (62, "another cluster or role"), (26, "may not do this"), (19, "authority")],
)
def test_each_fault_of_a_certificate_is_told_apart(code: int, text: str) -> None:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.reason = "CERTIFICATE_VERIFY_FAILED"
    error.verify_code = code
    error.verify_message = "told by OpenSSL"
    for explained in (explain_accepting(error), explain_dialling(error, "head:7711")):
        assert isinstance(explained, Unauthorized)
        assert text in str(explained)
