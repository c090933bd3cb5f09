"""Configuration: which source wins, what is refused; profiles; addresses and sizes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herder_shared import tls
from herder_shared.config import (
    AgentConfig,
    CoordinatorConfig,
    Profile,
    activate_profile,
    check_private_folder,
    create_profile,
    default_state_dir,
    is_local_disk,
    load_config,
    load_profile,
    parse_address,
    parse_bytes,
    parse_walltime,
    profiles_dir,
    save_profile,
)
from herder_shared.errors import ConfigError
from herder_shared.ids import ClusterId

REQUIRED: dict[str, object] = {"identity": "/i", "state_dir": "/s"}


def coordinator(file: Path | None = None, environ: dict[str, str] | None = None, **flags: object) -> CoordinatorConfig:
    return load_config(
        CoordinatorConfig, file=file, environ=environ or {}, prefix="COORDINATOR", flags={**REQUIRED, **flags}
    )


def agent(environ: dict[str, str] | None = None, **flags: object) -> AgentConfig:
    given_flags = {**REQUIRED, "coordinator": ("head:7711",), **flags}
    return load_config(AgentConfig, file=None, environ=environ or {}, prefix="AGENT", flags=given_flags)


# --- programs --------------------------------------------------------------------------------------------------------


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('listen = "file:1"\nlog_level = "file"\nlease_s = 10\n')
    environ = {"HERDER_COORDINATOR_LISTEN": "env:1", "HERDER_COORDINATOR_LOG_LEVEL": "env"}
    config = coordinator(file, environ, listen="flag:1", http_listen=None)
    assert (config.listen, config.log_level, config.lease_s) == ("flag:1", "env", 10.0)
    assert config.http_listen == "127.0.0.1:7712"
    assert config.identity == Path("/i")


def test_text_of_the_environment_becomes_the_fields_type() -> None:
    config = agent(
        {
            "HERDER_AGENT_CORES": "8",
            "HERDER_AGENT_CPUS": "0, 2,4",
            "HERDER_AGENT_PIN": "false",
            "HERDER_AGENT_LABELS": "gpu,fast",
            "HERDER_AGENT_RESOURCES": "licence=2,scratch=0.5",
            "HERDER_AGENT_STATE_DIR": "~/state",
        },
        state_dir=None,
    )
    assert (config.cores, config.cpus, config.pin) == (8, (0, 2, 4), False)
    assert config.labels == ("gpu", "fast")
    assert config.resources == {"licence": 2.0, "scratch": 0.5}
    assert config.state_dir == Path.home() / "state"


def test_several_coordinators_can_be_named() -> None:
    assert agent({"HERDER_AGENT_COORDINATOR": "a:1,b:2"}, coordinator=None).coordinator == ("a:1", "b:2")
    assert agent(coordinator=["a:1", "b:2"]).coordinator == ("a:1", "b:2")


def test_other_herder_variables_are_not_the_programs() -> None:
    environ = {"HERDER_PROFILE": "lab", "HERDER_STATE": "/x", "HERDER_COORDINATOR_LISTEN": "a:1", "PATH": "/bin"}
    assert agent(environ).node is None


def test_an_unknown_key_is_an_error_that_names_it_and_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("lease = 3\n")
    with pytest.raises(ConfigError, match=r"c\.toml.*'lease'.*did you mean 'lease_s'"):
        coordinator(file)
    with pytest.raises(ConfigError, match=r"HERDER_COORDINATOR_LISTN.*'HERDER_COORDINATOR_LISTEN'"):
        coordinator(environ={"HERDER_COORDINATOR_LISTN": "x"})
    with pytest.raises(ConfigError, match="'zzz' is unknown: known are identity"):
        coordinator(zzz=1)


def test_keys_of_a_file_may_have_hyphens(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('http-listen = "x:1"\n')
    assert coordinator(file).http_listen == "x:1"


@pytest.mark.parametrize("text", ["lease_s = 'soon'", "lease_s = [1]", "lease_s =", "\x00", "listen = 5"])
def test_wrong_values_and_broken_files_are_config_errors(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        coordinator(file)


def test_a_file_that_is_not_there_or_not_text_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        coordinator(tmp_path / "nowhere.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not TOML"):
        coordinator(tmp_path / "binary.toml")


def test_a_missing_key_is_a_config_error_that_names_it() -> None:
    with pytest.raises(ConfigError, match="identity"):
        load_config(CoordinatorConfig, file=None, environ={}, prefix="COORDINATOR", flags={"state_dir": "/s"})


def test_a_pair_without_a_value_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"HERDER_AGENT_RESOURCES.*key=value"):
        agent({"HERDER_AGENT_RESOURCES": "gpu"})


# --- profiles --------------------------------------------------------------------------------------------------------


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"HERDER_PROFILES": str(tmp_path / "profiles"), "USER": "ada"}


def test_profiles_are_where_the_environment_says() -> None:
    assert profiles_dir({"HERDER_PROFILES": "/a", "XDG_CONFIG_HOME": "/b"}) == Path("/a")
    assert profiles_dir({"XDG_CONFIG_HOME": "/b"}) == Path("/b/herder/profiles")
    assert profiles_dir({}) == Path.home() / ".config/herder/profiles"


def test_a_new_profile_has_an_authority_and_two_identities_of_one_new_cluster(environ: dict[str, str]) -> None:
    profile = create_profile("lab", ["head:7711"], environ=environ)
    assert tls.own_peer(profile.coordinator).role == "coordinator"
    owner = tls.own_peer(profile.identity)
    assert (owner.role, owner.name, owner.cluster) == ("admin", "ada", profile.cluster)
    assert load_profile("lab", environ=environ) == profile
    assert profile.addresses == ("head:7711",)
    assert profile.cluster != create_profile("other", environ=environ).cluster
    assert sorted(path.name for path in profile.folder.parent.iterdir()) == ["active", "lab", "other"]


def test_the_first_profile_is_active_until_another_is_named(environ: dict[str, str]) -> None:
    create_profile("one", environ=environ)
    create_profile("two", environ=environ)
    assert load_profile(environ=environ).name == "one"
    assert load_profile(environ={**environ, "HERDER_PROFILE": "two"}).name == "two"
    assert load_profile("one", environ={**environ, "HERDER_PROFILE": "two"}).name == "one"
    activate_profile("two", environ=environ)
    assert load_profile(environ=environ).name == "two"


def test_a_profile_is_never_replaced(environ: dict[str, str]) -> None:
    profile = create_profile("lab", environ=environ)
    with pytest.raises(ConfigError, match="exists already"):
        create_profile("lab", environ=environ)
    assert load_profile("lab", environ=environ) == profile


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "-rf", "a\nb", "x" * 65, "ä"])
def test_names_that_are_no_folder_names_are_refused(environ: dict[str, str], name: str) -> None:
    with pytest.raises(ConfigError, match="letters, digits"):
        create_profile(name, environ=environ)
    if name:
        with pytest.raises(ConfigError, match="letters, digits"):
            load_profile(name, environ=environ)


def test_without_a_profile_the_error_says_how_to_get_one(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"herder init.*herder up.*LocalCluster"):
        load_profile(environ=environ)
    create_profile("lab", environ=environ)
    with pytest.raises(ConfigError, match="there are: lab"):
        load_profile("lba", environ=environ)


@pytest.mark.parametrize("harm", ["link", "fifo", "writable", "owner"])
def test_a_profile_that_somebody_else_could_have_written_is_refused_with_the_fix(
    environ: dict[str, str], harm: str
) -> None:
    file = create_profile("lab", environ=environ).folder / "profile.toml"
    match harm:
        case "link":
            file.rename(file.with_name("elsewhere"))
            file.symlink_to("elsewhere")
        case "fifo":
            file.unlink()
            os.mkfifo(file)
        case "writable":
            file.chmod(0o664)
            assert load_profile("lab", environ=environ).name == "lab"  # nobody can reach it in its folder
            file.parent.chmod(0o755)
        case "owner":
            if os.geteuid() != 0:
                pytest.skip("giving a file to another user needs root")
            os.chown(file, 12345, -1)
    text = {"link": "copy of its target", "fifo": "regular file", "writable": "chmod 600", "owner": "chown 0"}[harm]
    with pytest.raises(ConfigError, match=text):
        load_profile("lab", environ=environ)


def test_a_damaged_profile_is_a_config_error(environ: dict[str, str]) -> None:
    profile = create_profile("lab", environ=environ)
    for text in ("cluster = 5", "colour = 'red'\ncluster = 'x'", "cluster = ", ""):
        (profile.folder / "profile.toml").write_text(text)
        with pytest.raises(ConfigError, match=r"profile\.toml"):
            load_profile("lab", environ=environ)


@given(st.lists(st.text(max_size=20), max_size=3), st.text(max_size=20))
def test_a_saved_profile_reads_back_whatever_its_addresses(
    tmp_path_factory: pytest.TempPathFactory, addresses: list[str], http: str
) -> None:
    root = tmp_path_factory.mktemp("profiles")
    (root / "lab").mkdir()
    profile = Profile("lab", root / "lab", tuple(addresses), ClusterId("c"), http)
    save_profile(profile)
    assert load_profile("lab", environ={"HERDER_PROFILES": str(root)}) == profile


def test_a_profile_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError):
        create_profile("lab", environ={"HERDER_PROFILES": str(tmp_path / "file")})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("head", ("head", 7711)),
        ("head:80", ("head", 80)),
        ("tls://head:80/", ("head", 80)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("[::1]:80", ("::1", 80)),
        ("[::1]", ("::1", 7711)),
        ("::1", ("::1", 7711)),
    ],
)
def test_addresses_are_read(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text, 7711) == address


@pytest.mark.parametrize(
    "text",
    ["", ":80", "head:", "head:http", "head:70000", "a b:1", "[::1", "[::1]80", "http://x", "u@h:1", "h:-1", "h:²"],
)
def test_what_is_no_address_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        parse_address(text, 7711)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("4GiB", 4 << 30), ("512M", 512 << 20), ("1.5GB", 1_500_000_000), (" 10 k ", 10_240), ("7", 7), ("1TiB", 1 << 40)],
)
def test_sizes_are_read(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "much", "-1", "4 GiBs", "1e9", "GiB", "٤GiB"])
def test_what_is_no_size_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match="4GiB"):
        parse_bytes(text)


def test_the_state_folder_follows_the_environment_the_user_and_the_disk(tmp_path: Path) -> None:
    assert default_state_dir({"HERDER_STATE": "/x"}, 0) == Path("/x")
    assert default_state_dir({}, 0) == Path("/var/lib/herder")
    assert default_state_dir({"XDG_STATE_HOME": str(tmp_path)}, 54321) == tmp_path / "herder"
    assert default_state_dir({}, 54321) == Path("/var/tmp/herder-54321")


def test_a_shared_file_system_is_not_a_local_disk(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/vda1 / ext4 rw 0 0\nhead:/home /home nfs4 rw 0 0\ntmpfs /home/local tmpfs rw 0 0\n"
        "x /my\\040disk lustre rw 0 0\n"
    )
    assert is_local_disk(Path("/var/x"), mounts)
    assert not is_local_disk(Path("/home/ada/.state"), mounts)
    assert is_local_disk(Path("/home/local/x"), mounts)
    assert is_local_disk(Path("/homely"), mounts)
    assert not is_local_disk(Path("/my disk/x"), mounts)
    assert not is_local_disk(Path("/x"), tmp_path / "nothing")


def test_a_folder_in_a_public_place_must_be_our_own_and_closed(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    check_private_folder(folder, 54321)
    folder.mkdir(mode=0o700)
    uid = folder.stat().st_uid
    check_private_folder(folder, uid)
    with pytest.raises(ConfigError, match="HERDER_STATE"):
        check_private_folder(folder, uid + 1)
    folder.chmod(0o750)
    with pytest.raises(ConfigError, match="chmod 700"):
        check_private_folder(folder, uid)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ConfigError, match="link"):
        check_private_folder(tmp_path / "link", uid)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3600", 3600.0), ("90:00", 5400.0), ("12:00:01", 43201.0), ("2-12:00:00", 216000.0), ("1.5", 1.5)],
)
def test_a_walltime_is_read_as_slurm_writes_it(text: str, seconds: float) -> None:
    assert parse_walltime(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1-30", "1:2:3:4", "-5"])
def test_what_is_no_walltime_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a duration"):
        parse_walltime(text)


def test_weights_of_owners_come_from_the_environment_too() -> None:
    config = coordinator(environ={"HERDER_COORDINATOR_SHARES": "ann=3,ben=0.5"})
    assert config.shares == {"ann": 3.0, "ben": 0.5}
