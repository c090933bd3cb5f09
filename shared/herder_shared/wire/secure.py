"""TLS as a machine without I/O: bytes of the network in, plain bytes out, and the other way round.

asyncio's own TLS is not used, because what it does when a handshake fails is what we cannot have: it closes the
connection without sending the alert that says why (CPython 3.11 `asyncio/sslproto.py`: `_do_handshake` does not flush
after `SSLError`), and under TLS 1.3 that alert is all that a client with a wrong certificate would ever hear. Here the
alert is in `outgoing()`.
"""

from __future__ import annotations

import ssl

from herder_shared.errors import HerderError, ProtocolMismatch, RemoteProtocolError, Unauthorized, Unreachable

#: A read gives one record of TLS at most, and a record this much.
_READ_BYTES = 16 * 1024
_RENEW = "issue it again from the profile's authority (for a node, `herder up` does)"


class SecurePipe:
    """One TLS connection over memory."""

    def __init__(self, context: ssl.SSLContext, *, server_side: bool, server_hostname: str | None = None) -> None:
        self._in = ssl.MemoryBIO()
        self._out = ssl.MemoryBIO()
        self.ssl_object = context.wrap_bio(
            self._in, self._out, server_side=server_side, server_hostname=server_hostname
        )
        self.is_secured = False

    def handshake(self, data: bytes = b"") -> bool:
        """Take the peer's bytes; True when the handshake is through. Afterwards send `outgoing()`, also on an error.

        Raises:
            ssl.SSLError: the peer's certificate, or the peer, is not acceptable; see `explain`.
        """
        if data:
            self._in.write(data)
        try:
            self.ssl_object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        self.is_secured = True
        return True

    def receive(self, data: bytes = b"") -> tuple[bytes, bool]:
        """Take the peer's bytes; give what they say in plain, and whether the peer has ended its side.

        Raises:
            ssl.SSLError: the peer sent an alert, or nonsense; see `explain`.
        """
        if data:
            self._in.write(data)
        pieces: list[bytes] = []
        ended = False
        try:
            while piece := self.ssl_object.read(_READ_BYTES):
                pieces.append(piece)
                if not self._in.pending:  # the next read would only say that it wants more
                    return (pieces[0] if len(pieces) == 1 else b"".join(pieces)), False
            ended = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            ended = True
        return (pieces[0] if len(pieces) == 1 else b"".join(pieces)), ended

    def send(self, data: bytes) -> bytes:
        """The bytes that carry `data` to the peer."""
        self.ssl_object.write(data)
        return self._out.read()

    @property
    def has_outgoing(self) -> bool:
        """Whether `outgoing` gives anything."""
        return self._out.pending > 0

    def outgoing(self) -> bytes:
        """What TLS itself wants to say."""
        return self._out.read()

    def end(self) -> bytes:
        """The bytes that tell the peer that nothing follows. Nothing may be sent after it."""
        try:
            self.ssl_object.unwrap()
        except ssl.SSLError:
            pass  # It wants the peer's answer, which nobody waits for; or the connection broke before.
        return self._out.read()


def explain_dialling(error: ssl.SSLError, address: str) -> HerderError:
    """What an error of TLS means to who dialled `address`, and what to do."""
    reason = error.reason or str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return Unauthorized(_explain_certificate(error, f"the certificate of the coordinator at {address}"))
    if reason.endswith("ALERT_CERTIFICATE_EXPIRED"):
        return Unauthorized(f"the coordinator at {address} says that our certificate has expired: {_RENEW}")
    if reason.endswith("ALERT_CERTIFICATE_REVOKED"):
        return Unauthorized(f"the coordinator at {address} says that our certificate was revoked: {_RENEW}")
    if reason.endswith("ALERT_PROTOCOL_VERSION"):
        return ProtocolMismatch(f"what listens at {address} does not speak TLS 1.3: it is no Herder coordinator")
    if "ALERT" in reason and any(word in reason for word in ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "DECRYPT")):
        return Unauthorized(
            f"the coordinator at {address} does not accept our certificate ({reason.lower()}): it is of another"
            " cluster; use the profile of that cluster, or that profile's address"
        )
    return Unreachable(f"what listens at {address} is no Herder coordinator, or the connection is disturbed: {reason}")


def explain_accepting(error: ssl.SSLError) -> HerderError:
    """What an error of TLS means to the side that was dialled."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return Unauthorized(_explain_certificate(error, "the peer's certificate"))
    return RemoteProtocolError(f"no TLS 1.3 handshake of ours: {error.reason or error}")


def _explain_certificate(error: ssl.SSLCertVerificationError, whose: str) -> str:
    match error.verify_code:  # X509_V_ERR_* of OpenSSL's x509_vfy.h
        case 10:
            return f"{whose} has expired: {_RENEW} (or this machine's clock is wrong)"
        case 9:
            return f"{whose} is not valid yet: set this machine's clock"
        case 62:
            return f"{whose} is of another cluster or role: {error.verify_message}"
        case 26:
            return f"{whose} is of a role that may not do this"
        case _:
            return (
                f"{whose} is not signed by this cluster's authority ({error.verify_message}): it is of another cluster;"
                " use the profile of that cluster, or that profile's address"
            )
