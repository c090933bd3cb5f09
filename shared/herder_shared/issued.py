"""The authority's own list of the certificates that it has issued: `issued.jsonl` beside its key, a line for each.

A line is on disk before its certificate leaves `tls.sign_request`, so that whatever may be in other hands can be
revoked by name. Nothing in it is secret; it is 0600 like everything in that folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from herder_shared.errors import ConfigError

if TYPE_CHECKING:
    from cryptography import x509

LIST = "issued.jsonl"


class Issued(msgspec.Struct, frozen=True):
    """One certificate. `serial` in hex, as peers see it; `sha256` is the certificate's fingerprint; `not_after` is
    ISO 8601 in UTC."""

    serial: str
    role: str
    name: str
    not_after: str = ""
    sha256: str = ""


def describe(certificate: x509.Certificate, role: str, name: str) -> Issued:
    """The line of a certificate."""
    from cryptography.hazmat.primitives import hashes

    return Issued(
        serial=f"{certificate.serial_number:x}",
        role=role,
        name=name,
        not_after=f"{certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}",
        sha256=certificate.fingerprint(hashes.SHA256()).hex(),
    )


def add(authority: Path, one: Issued) -> None:
    """Append to the list; it is on disk afterwards.

    Raises:
        ConfigError: it cannot be written: the certificate must not be handed out.
    """
    path = authority / LIST
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            # In front: what a power failure cut short must not swallow this one.
            os.write(descriptor, b"\n" + msgspec.json.encode(one) + b"\n")
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(f"{path}, the list of what was issued, cannot be written: {error}") from error


def read(authority: Path) -> list[Issued]:
    """All that this authority has issued since it has kept a list, oldest first. Lines that a power failure cut short
    are passed over: theirs never left the authority.

    Raises:
        ConfigError: the list cannot be read.
    """
    path = authority / LIST
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    found: list[Issued] = []
    for line in lines:
        try:
            found.append(msgspec.json.decode(line, type=Issued))
        except msgspec.MsgspecError:
            continue
    return found
