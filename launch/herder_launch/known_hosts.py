"""Which keys `known_hosts` files give for a host.

Paramiko's own reader gives up the whole file at one `@cert-authority` or `@revoked` line, and wildcards never match;
sites use both. This one reads the format of sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT": markers, comma-separated patterns
with `*`, `?` and `!`, hashed names. Keys of a certificate authority are left out: paramiko verifies no host
certificates, so a host that has nothing else is unknown here, and the error says so.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(slots=True)
class KnownKeys:
    """What is known of one host: `keys` and `revoked` hold `(type, base64)`."""

    keys: list[tuple[str, str]] = field(default_factory=list)
    revoked: set[str] = field(default_factory=set)
    #: Only an authority vouches for it.
    has_authority: bool = False


def lookup(files: Iterable[Path], name: str) -> KnownKeys:
    """Find `name` ("host", or "[host]:port" for other ports than 22) in these files. Unreadable lines are skipped."""
    known = KnownKeys()
    for path in files:
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError:
            continue  # as OpenSSH does: a file that is not there knows nobody
        for line in lines:
            _add(known, line.split(), name)
    known.keys = [(kind, key) for kind, key in known.keys if key not in known.revoked]
    return known


def known_name(host: str, port: int) -> str:
    """How a host is spelled in `known_hosts`."""
    return host if port == 22 else f"[{host}]:{port}"


def _add(known: KnownKeys, words: list[str], name: str) -> None:
    marker = words.pop(0) if words and words[0].startswith("@") else ""
    if len(words) < 3 or words[0].startswith("#") or not _matches(words[0], name):
        return
    match marker:
        case "":
            known.keys.append((words[1], words[2]))
        case "@revoked":
            known.revoked.add(words[2])
        case "@cert-authority":
            known.has_authority = True
        case _:
            return


def _matches(patterns: str, name: str) -> bool:
    if patterns.startswith("|1|"):
        return _matches_hash(patterns, name)
    found = False
    for pattern in patterns.split(","):
        negated = pattern.startswith("!")
        if re.fullmatch(_as_regex(pattern.removeprefix("!")), name, re.IGNORECASE):
            if negated:
                return False
            found = True
    return found


def _as_regex(pattern: str) -> str:
    return "".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in pattern)


def _matches_hash(text: str, name: str) -> bool:
    parts = text.split("|")
    if len(parts) != 4:
        return False
    try:
        salt, expected = base64.b64decode(parts[2]), base64.b64decode(parts[3])
    except ValueError:
        return False
    return hmac.compare_digest(hmac.new(salt, name.encode(), hashlib.sha1).digest(), expected)
