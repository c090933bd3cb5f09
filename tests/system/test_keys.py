"""`herder keys` against a real cluster: who is revoked is out, with what he had, and the rest goes on."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import cloudpickle
import pytest
from click.testing import CliRunner, Result

import herder
from herder.cli.main import cli
from herder_shared.config import load_profile
from support.leaks import wait_until

pytestmark = pytest.mark.slow
# The children cannot import the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def where_it_runs(folder: str) -> str:
    """Tell the node at once, and end when the gate opens."""
    node = str(herder.task().node)
    (Path(folder) / node).touch()
    deadline_s = time.monotonic() + 60
    while not (Path(folder) / "gate").exists() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return node


def test_who_is_revoked_is_out_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with herder.LocalCluster(cores=2, agents=2) as cluster:
        environ = {**cluster.environ}

        def run(*arguments: str) -> Result:
            return CliRunner(env=environ).invoke(cli, ["keys", *arguments])

        # Somebody else gets a profile, and uses it.
        eve = cluster.profile.folder.parent / "eve"
        assert run("issue", "eve", "--to", str(eve)).exit_code == 0
        theirs = herder.Client(profile=load_profile("eve", environ=environ))
        ours = cluster.client()
        future = ours.submit(where_it_runs, str(tmp_path))
        assert wait_until(lambda: any(tmp_path.iterdir()), 30)
        first = next(tmp_path.iterdir()).name
        listed = {row["name"]: row for row in json.loads(run("list", "--json").stdout)}
        assert listed["eve"]["connections"] == listed[first]["connections"] == 1
        assert not any(row["revoked"] for row in listed.values())

        # What nobody knows is refused, and so is what a user may not.
        refused = run("revoke", "0123456789abcdef")
        assert (refused.exit_code, "no certificate has the name" in refused.stderr) == (2, True)
        forbidden = run("revoke", "--profile", "eve", first)
        assert (forbidden.exit_code, "may not send" in forbidden.stderr) == (3, True)

        # The agent: its task runs on the other node, it ends, and says why.
        revoked = run("revoke", first, "--role", "agent")
        assert (revoked.exit_code, "was connected" in revoked.stdout) == (0, True), revoked.output
        assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 30)
        (tmp_path / "gate").touch()
        assert future.result(30) != first
        agent = cluster.processes[first]
        assert agent.popen.wait(30) == 3
        assert "was revoked" in agent.log_tail()

        # The user, while he is connected, by a serial number.
        (tmp_path / "theirs").mkdir()
        waiting = theirs.submit(where_it_runs, str(tmp_path / "theirs"))
        assert run("revoke", listed["eve"]["serial"]).exit_code == 0
        with pytest.raises(herder.Unauthorized, match="was revoked"):
            waiting.result(30)
        (tmp_path / "theirs" / "gate").touch()  # what runs is not stopped before the grace is over
        theirs.abort()
        with pytest.raises(herder.Unauthorized, match="was revoked"):
            herder.Client(profile=load_profile("eve", environ=environ))
        assert {row["name"] for row in json.loads(run("list", "--json").stdout) if row["revoked"]} == {first, "eve"}
        assert ours.submit(pow, 2, 5).result(30) == 32

        cluster.processes["coordinator"].popen.kill()
        monkeypatch.setattr("herder.cli.session.CONNECT_TIMEOUT_S", 0.2)
        away = run("revoke", listed["local-1"]["serial"])
        assert (away.exit_code, "nothing was revoked" in away.stderr) == (3, True), away.output
        away = run("list")
        assert (away.exit_code, "is not known" in away.stderr) == (3, True)
        assert "eve" in away.stdout
