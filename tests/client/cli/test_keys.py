"""`herder keys` on profiles: what was issued is listed and found; a folder for another user is whole and private."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from herder.cli.keys import Row, find, rows_of
from herder.cli.main import cli
from herder_shared import tls
from herder_shared.config import load_profile
from herder_shared.errors import ConfigError
from herder_shared.issued import Issued
from herder_shared.wire.messages import Key, KeyInfo

ROWS = [
    Row("aa11bb22cc", "client", "eve", sha256="0d15ea5e00"),
    Row("aa11bb22dd", "client", "eve", revoked=True),
    Row("bb11bb22dd", "agent", "n1"),
    Row("cc11bb22dd", "client", "n1"),
]


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HERDER_PROFILES", str(tmp_path / "profiles"))
    monkeypatch.delenv("HERDER_PROFILE", raising=False)
    assert run("init").exit_code == 0
    return tmp_path / "profiles"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def test_a_name_stands_for_all_of_its_certificates_and_digits_for_one() -> None:
    assert find("eve", ROWS) == ROWS[:2]
    assert find("bb11bb22dd", ROWS) == find("BB:11:BB:22", ROWS) == find("0xbb11bb22", ROWS) == [ROWS[2]]
    assert find("0d15ea5e", ROWS) == [ROWS[0]]
    assert find("n1", ROWS, "agent") == [ROWS[2]]


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("n1", "agent and client"),
        ("aa11bb22", "more of the digits"),
        ("bb11", "no certificate"),
        ("mallory", "herder keys list"),
        ("", "no certificate"),
    ],
)
def test_what_names_none_or_several_is_refused(what: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        find(what, ROWS)


def test_what_was_issued_and_what_the_coordinator_knows_are_one_list() -> None:
    known = {
        "1": KeyInfo(Key("1", "client", "me"), connections=2),
        "2": KeyInfo(Key("2", "agent", "n1"), revoked=True),
    }
    issued = [Issued("1", "client", "me", "2027-01-01T00:00:00Z", "ff"), Issued("3", "client", "you")]
    assert rows_of(issued, known) == [
        Row("1", "client", "me", "2027-01-01T00:00:00Z", "ff", revoked=False, connections=2),
        Row("3", "client", "you", revoked=False),
        Row("2", "agent", "n1", revoked=True),
    ]
    assert [row.revoked for row in rows_of(issued, None)] == [None, None]


def test_a_profile_for_another_user_is_private_whole_and_listed(profiles: Path, tmp_path: Path) -> None:
    folder = profiles / "eve"
    result = run("keys", "issue", "eve", "--to", str(folder), "--days", "7", "--json")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert "PRIVATE" not in result.output
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert files == {"profile.toml", "client/cert.pem", "client/key.pem", "client/ca.pem"}
    modes = {file.stat().st_mode & 0o777 for file in (folder, *folder.rglob("*"))}
    assert modes == {0o700, 0o600}
    profile = load_profile("eve")
    assert profile.cluster == load_profile("default").cluster
    peer = tls.own_peer(profile.identity)
    assert (peer.role, peer.name, peer.serial) == ("client", "eve", made["serial"])
    tls.client_context(profile.identity)
    listed = {row["name"]: row for row in json.loads(run("keys", "list", "--json").stdout)}
    assert listed["eve"] == {
        **{name: value for name, value in made.items() if name != "folder"},
        "revoked": False,
        "connections": 0,
    }
    assert set(listed) >= {"coordinator", "eve"}
    assert not list(profiles.rglob("*.partial"))


def test_an_identity_for_an_agent_is_only_that(profiles: Path, tmp_path: Path) -> None:
    assert run("keys", "issue", "n7", "--role", "agent", "--to", str(tmp_path / "n7")).exit_code == 0
    assert sorted(file.name for file in (tmp_path / "n7").iterdir()) == ["ca.pem", "cert.pem", "key.pem"]
    assert tls.own_peer(tmp_path / "n7").role == "agent"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("keys", "issue", "eve", "--to", "{there}"), "is there already"),
        (("keys", "issue", "e\nve", "--to", "{new}"), "cannot be a certificate's name"),
        (("keys", "issue", "eve", "--to", "{new}", "--days", "4000"), "1<=x<=365"),
        (("keys", "issue", "eve", "--to", "{new}", "--role", "coordinator"), "coordinator"),
        (("keys", "issue", "eve", "--to", "/proc/no/new"), "cannot be made"),
    ],
)
def test_what_cannot_be_issued_is_said_and_leaves_nothing(
    profiles: Path, tmp_path: Path, arguments: tuple[str, ...], text: str
) -> None:
    result = run(*(each.format(there=profiles, new=tmp_path / "new") for each in arguments))
    assert (result.exit_code, text in result.stderr) == (2, True), result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profiles"]


def test_a_profile_without_the_authority_issues_nothing(profiles: Path, tmp_path: Path) -> None:
    assert run("keys", "issue", "eve", "--to", str(profiles / "eve")).exit_code == 0
    result = run("keys", "issue", "mallory", "--profile", "eve", "--to", str(tmp_path / "new"))
    assert (result.exit_code, "no authority" in result.stderr) == (2, True)
    assert not (tmp_path / "new").exists()


def test_without_a_coordinator_nothing_is_revoked_and_that_is_said(profiles: Path) -> None:
    result = run("keys", "revoke", "owner")
    assert result.exit_code == 2
    assert "no address of a coordinator" in result.stderr
