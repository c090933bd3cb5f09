"""The format of known_hosts as sshd(8) gives it, with what paramiko's own reader cannot take."""

from __future__ import annotations

import base64
import hashlib
import hmac
from pathlib import Path

from herder_launch.known_hosts import known_name, lookup


def _file(tmp_path: Path, text: str) -> list[Path]:
    path = tmp_path / "known_hosts"
    path.write_text(text)
    return [tmp_path / "absent", path]


def test_lines_of_authorities_do_not_hide_the_rest_and_vouch_for_nobody(tmp_path: Path) -> None:
    files = _file(tmp_path, "@cert-authority * ssh-ed25519 CA\n# note\nbroken\nn1,198.18.10.11 ssh-ed25519 K1\n")
    assert lookup(files, "n1").keys == [("ssh-ed25519", "K1")]
    unknown = lookup(files, "n2")
    assert (unknown.keys, unknown.has_authority) == ([], True)


def test_wildcards_match_and_negations_win(tmp_path: Path) -> None:
    files = _file(tmp_path, "198.18.10.*,!198.18.10.13 ssh-ed25519 K\nn? ssh-rsa R\n")
    assert lookup(files, "198.18.10.11").keys == [("ssh-ed25519", "K")]
    assert lookup(files, "198.18.10.13").keys == []
    assert lookup(files, "n7").keys == [("ssh-rsa", "R")]
    assert lookup(files, "n77").keys == []


def test_a_revoked_key_is_not_known_wherever_it_stands(tmp_path: Path) -> None:
    files = _file(tmp_path, "n1 ssh-ed25519 K1\n@revoked * ssh-ed25519 K1\nn1 ssh-ed25519 K2\n")
    assert lookup(files, "n1").keys == [("ssh-ed25519", "K2")]


def test_hashed_names_and_ports_are_found(tmp_path: Path) -> None:
    name = known_name("n1", 2222)
    salt = b"0123456789abcdefghij"
    hashed = hmac.new(salt, name.encode(), hashlib.sha1).digest()
    pattern = f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(hashed).decode()}"
    text = f"{pattern} ssh-ed25519 K\n|1|bad ssh-ed25519 X\n"
    assert name == "[n1]:2222"
    assert lookup(_file(tmp_path, text), name).keys == [("ssh-ed25519", "K")]
    assert lookup(_file(tmp_path, text), "n1").keys == []
