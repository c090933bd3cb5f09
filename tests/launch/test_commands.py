"""`herder up` and `herder down` on the command line: what is refused, and with which status."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from herder_launch.commands import EXIT_USAGE, down, up


@pytest.fixture(autouse=True)
def no_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERDER_PROFILES", str(tmp_path / "profiles"))
    monkeypatch.delenv("HERDER_PROFILE", raising=False)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "name the hosts"),
        (["hosts.toml", "--hosts", "a"], "name the hosts"),
        (["no.toml"], "cannot read no.toml"),
        (["--hosts", "a;b"], "not a host name"),
        (["--hosts", "a,b", "--coordinator", "c"], "'c' is none of the hosts"),
    ],
)
def test_wrong_use_of_up_is_one_line_and_status_2(argv: list[str], said: str) -> None:
    done = CliRunner().invoke(up, argv)
    assert done.exit_code == EXIT_USAGE
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_down_without_a_profile_says_how_to_make_one() -> None:
    done = CliRunner().invoke(down, [])
    assert done.exit_code == EXIT_USAGE
    assert "herder init" in done.stderr
