"""The list of what an authority issued."""

from __future__ import annotations

from pathlib import Path

import pytest

from herder_shared import issued, tls
from herder_shared.errors import ConfigError
from herder_shared.ids import ClusterId
from herder_shared.issued import Issued


def test_what_is_signed_is_listed_privately_before_it_is_handed_out(tmp_path: Path) -> None:
    authority = tmp_path / "authority"
    tls.create_authority(authority, ClusterId("c" * 32))
    assert issued.read(authority) == []
    for name in ("me", "you"):
        tls.issue(authority, tmp_path / name, "client", name, days=3)
    assert issued.read(authority) == [tls.describe(tmp_path / name / "cert.pem") for name in ("me", "you")]
    assert (authority / issued.LIST).stat().st_mode & 0o777 == 0o600
    assert b"KEY" not in (authority / issued.LIST).read_bytes()
    (authority / issued.LIST).unlink()
    (authority / issued.LIST).mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        tls.issue(authority, tmp_path / "eve", "client", "eve")
    assert not (tmp_path / "eve" / "cert.pem").exists()


def test_a_line_that_was_cut_short_costs_only_itself(tmp_path: Path) -> None:
    one, two = Issued("1", "client", "me"), Issued("2", "agent", "n1")
    issued.add(tmp_path, one)
    with (tmp_path / issued.LIST).open("ab") as file:
        file.write(b'{"serial":"5')
    issued.add(tmp_path, two)
    assert issued.read(tmp_path) == [one, two]
