"""What users may write for hosts, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from herder_launch.hosts import HOSTS_MAX, HostSpec, load_hosts, parse_host, parse_hosts
from herder_shared.errors import ConfigError


def test_ranges_keep_leading_zeros_and_may_stand_twice() -> None:
    names = [spec.host for spec in parse_hosts("a,n[08-10,3]x[1-2]")]
    assert names == ["a", "n08x1", "n08x2", "n09x1", "n09x2", "n10x1", "n10x2", "n3x1", "n3x2"]


def test_user_and_port_belong_to_every_host_of_a_range() -> None:
    assert parse_hosts("bob@n[1-2]:2222") == (HostSpec("n1", "bob", 2222), HostSpec("n2", "bob", 2222))


def test_an_ipv6_address_stands_in_brackets() -> None:
    assert parse_hosts("root@[fe80::1]:22") == (HostSpec("fe80::1", "root", 22),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no host was named"),
        ("a,a", "would both be node 'a'"),
        ("n[3-1]", "is not a range"),
        ("n[x]", "not a host name"),
        ("a:0", "not a port number"),
        ("a:65536", "not a port number"),
        ("-oProxyCommand=reboot", "not a host name"),
        ("a;reboot", "not a host name"),
        ("a$(reboot)", "not a host name"),
        ("a\nb", "not a host name"),
        ("ro ot@a", "not a user name"),
        ("n[1-99999]", f"more than {HOSTS_MAX}"),
    ],
)
def test_what_is_no_host_is_refused_and_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        parse_hosts(text)


def test_defaults_hold_for_all_hosts_and_a_host_may_say_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "HOSTS.toml"
    path.write_text(
        'coordinator = "n1"\n[defaults]\ncores = 4\nuser = "bob"\nlabels = ["rack1"]\n'
        '[[hosts]]\nname = "n[1-2]"\n'
        '[[hosts]]\nname = "huge"\nhost = "big.example.org"\ncores = 96\nmemory = "1TiB"\nport = 2222\n'
    )
    found = load_hosts(path)
    assert found.coordinator == "n1"
    assert [(spec.node, spec.user, spec.cores, spec.port) for spec in found.hosts] == [
        ("n1", "bob", 4, None),
        ("n2", "bob", 4, None),
        ("huge", "bob", 96, 2222),
    ]
    assert (found.hosts[2].host, found.hosts[2].memory) == ("big.example.org", "1TiB")
    assert found.hosts[2].labels == ("rack1",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[hosts]]\nname = "a"\ncoers = 2\n', "unknown key 'coers'; did you mean 'cores'"),
        ('[defaults]\npyhton = "x"\n[[hosts]]\nname = "a"\n', "unknown key 'pyhton'; did you mean 'python'"),
        ('default = 1\n[[hosts]]\nname = "a"\n', "unknown key 'default'; did you mean 'defaults'"),
        ('[[hosts]]\nname = "a"\ncores = "2"\n', "`cores` must be of type int"),
        ('[[hosts]]\nname = "a"\ncores = true\n', "`cores` must be of type int"),
        ('[[hosts]]\nname = "a"\ncores = 0\n', "at least 1"),
        ('[[hosts]]\nname = "n[1-2]"\nhost = "x"\n', "`host` goes with one name"),
        ("[[hosts]]\ncores = 2\n", "is missing"),
        ("", "at least one"),
        ("[[hosts", "HOSTS.toml"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key_and_the_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "HOSTS.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_hosts(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml.*No such file"):
        load_hosts(tmp_path / "no.toml")


def test_a_host_prints_as_it_was_written() -> None:
    assert str(parse_host("bob@n1:2222")) == "bob@n1:2222"
