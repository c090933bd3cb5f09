"""SSH against real servers: resolved, verified, refused, each error in one line that says what to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest

from support.netlab import HostSpec, Lab, public_key

pytestmark = [pytest.mark.netlab, pytest.mark.slow]

#: Runs on the desk: opens a connection to each host and says what `hostname` printed, or the error.
_CONNECT = """
import json, sys
from herder_launch.errors import HostFailed
from herder_launch.hosts import parse_hosts
from herder_launch.ssh import Connection
out = []
for spec in parse_hosts(sys.argv[1]):
    try:
        with Connection.open(spec) as connection:
            out.append(connection.run("hostname").stdout.decode().strip())
    except HostFailed as error:
        out.append(str(error))
print(json.dumps(out))
"""

#: Runs on the desk: how much comes back, and in which state the command ended.
_CONVERSE = """
import json
from herder_launch.hosts import parse_host
from herder_launch.ssh import Connection
with Connection.open(parse_host("n1")) as connection:
    big = connection.run("head -c 1000000 /dev/zero; head -c 2000000 /dev/zero >&2; exit 7")
    echo = connection.run("wc -c", b"x" * 3_000_000)
print(json.dumps(list(map(str, [big.status, len(big.stdout), len(big.stderr), int(echo.stdout)]))))
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    hosts = [HostSpec("desk", sshd=False), HostSpec("n1"), HostSpec("n2", ssh_port=2222), HostSpec("mute", sshd=False)]
    with Lab(hosts) as running:
        yield running


def _on_desk(lab: Lab, code: str, *argv: str) -> list[str]:
    found = json.loads(lab["desk"].run([sys.executable, "-c", code, *argv]).stdout)
    assert isinstance(found, list)
    return found


def test_hosts_are_reached_by_their_names_in_ssh_config_with_their_ports(lab: Lab) -> None:
    assert _on_desk(lab, _CONNECT, "n1,root@n2") == ["n1", "n2"]


def test_a_host_without_sshd_is_named_with_the_reason(lab: Lab) -> None:
    (said,) = _on_desk(lab, _CONNECT, "mute")
    assert said == f"mute: cannot connect to {lab['mute'].address} port 22: Connection refused"


def test_a_wrong_host_key_is_refused_and_never_added(lab: Lab) -> None:
    known = lab["desk"].run("cat /root/.ssh/known_hosts").stdout
    other = public_key(lab.etc / "n2.host_key")
    try:
        lab["desk"].run(f"echo '{lab['n1'].address} {other}' > /root/.ssh/known_hosts")
        wrong, unknown = _on_desk(lab, _CONNECT, "n1,n2")
        assert wrong.startswith("n1: wrong host key: 198.18.10.11 shows ssh-ed25519 SHA256:")
        assert "ssh-keygen -R '198.18.10.11'" in wrong
        assert unknown.startswith("n2: the host key of [198.18.10.12]:2222 is not in /root/.ssh/known_hosts")
        assert lab["desk"].run("wc -l < /root/.ssh/known_hosts").stdout.strip() == "1"
    finally:
        lab["desk"].run(["bash", "-c", 'printf "%s" "$1" > /root/.ssh/known_hosts', "-", known])


def test_lines_with_wildcards_and_authorities_are_taken_as_openssh_takes_them(lab: Lab) -> None:
    known = lab["desk"].run("cat /root/.ssh/known_hosts").stdout
    key = public_key(lab.etc / "n1.host_key")
    try:
        lab["desk"].run(
            f"printf '@cert-authority *.example %s\\n198.18.10.* %s\\n' '{key}' '{key}' > ~/.ssh/known_hosts"
        )
        assert _on_desk(lab, _CONNECT, "n1") == ["n1"]
    finally:
        lab["desk"].run(["bash", "-c", 'printf "%s" "$1" > /root/.ssh/known_hosts', "-", known])


def test_a_login_that_is_refused_names_user_and_keys(lab: Lab) -> None:
    (said,) = _on_desk(lab, _CONNECT, "nobody@n1")
    assert said.startswith("nobody@n1: SSH refused the login of 'nobody' at 198.18.10.11 port 22 (keys: /root/.ssh/")


def test_a_host_behind_a_jump_host_is_reached_and_both_keys_are_checked(lab: Lab) -> None:
    lab["n2"].block(lab["desk"])
    config = lab["desk"].run("cat /root/.ssh/config").stdout
    try:
        lab["desk"].run("sed -i '1i Host n2\\n  ProxyJump n1' /root/.ssh/config")
        assert _on_desk(lab, _CONNECT, "n2") == ["n2"]
    finally:
        lab["n2"].heal()
        lab["desk"].run(["bash", "-c", 'printf "%s" "$1" > /root/.ssh/config', "-", config])


def test_much_output_on_both_streams_much_input_and_the_status_come_through(lab: Lab) -> None:
    assert _on_desk(lab, _CONVERSE) == ["7", "1000000", "2000000", "3000000"]
