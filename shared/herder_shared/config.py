"""Configuration of the three programs, and profiles: where a user's keys and addresses are.

One frozen struct a program, read once in its `main.py`: TOML file, then environment, then flags; later ones win. A key
that nobody knows is an error and not silence. This module reads files and the environment that it is given, and decides
nothing else.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import stat
import tomllib
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from herder_shared import tls
from herder_shared.errors import ConfigError
from herder_shared.ids import ClusterId
from herder_shared.limits import (
    DISCONNECT_GRACE_S,
    GIB,
    HEARTBEAT_S,
    KIB,
    LEASE_S,
    MIB,
    RECONNECT_GRACE_S,
    SHARE_HALF_LIFE_S,
)
from herder_shared.wire.messages import Role

#: Ports of the coordinator: its own protocol, and HTTP.
PORT = 7711
HTTP_PORT = 7712

_T = TypeVar("_T", bound=msgspec.Struct)


class CoordinatorConfig(msgspec.Struct, frozen=True):
    """What a coordinator is told. Times in seconds."""

    identity: Path
    state_dir: Path
    #: "postgresql://…" for the journal; empty = SQLite in the state folder.
    store: str = ""
    #: Where blobs are; None = in the state folder. Coordinators that stand by for each other share it.
    blob_dir: Path | None = None
    listen: str = f"127.0.0.1:{PORT}"
    http_listen: str = f"127.0.0.1:{HTTP_PORT}"
    lease_s: float = LEASE_S
    reconnect_grace_s: float = RECONNECT_GRACE_S
    disconnect_grace_s: float = DISCONNECT_GRACE_S
    heartbeat_s: float = HEARTBEAT_S
    #: Parts of the cores, by owner; 1 for who is not named: {"ann": 3.0} gives Ann three times as much as anyone else.
    shares: dict[str, float] = {}
    #: Of what owners had of the cores, half counts after this.
    share_half_life_s: float = SHARE_HALF_LIFE_S
    #: Descriptor for one JSON line when the program is ready: {"pid","address","http","epoch","cluster","node"}.
    hello_fd: int | None = None
    #: Descriptor whose end of file ends the program at once.
    lifeline_fd: int | None = None
    log_level: str = "info"


class AgentConfig(msgspec.Struct, frozen=True):
    """What an agent is told. None means: as found on the machine."""

    identity: Path
    state_dir: Path
    #: "host:port" of the coordinator, in the order in which they are tried.
    coordinator: tuple[str, ...]
    #: None = the name in the certificate.
    node: str | None = None
    cores: int | None = None
    cpus: tuple[int, ...] | None = None
    #: As "64GiB".
    memory: str | None = None
    labels: tuple[str, ...] = ()
    resources: dict[str, float] = {}
    gpus: int = 0
    #: "host:port" of an own port for metrics; None = the coordinator pulls them over the session.
    metrics_listen: str | None = None
    pin: bool = True
    hello_fd: int | None = None
    lifeline_fd: int | None = None
    log_level: str = "info"
    #: Control groups for limits: "auto" (as found), "off", or a folder of version 2 that is the agent's own.
    cgroup: str = "auto"
    #: Processes and threads of one attempt, where its workload does not say how many.
    pids: int = 4096
    #: For how long the machine is ours from the agent's start on, as in a batch allocation: seconds, or as Slurm writes
    #: it ("2-12:00:00", "90:00"). Tasks with a longer `timeout` go elsewhere; before the end the node is drained.
    walltime: str | None = None
    #: The same as a point in time: seconds since 1970, by this machine's clock ($SLURM_JOB_END_TIME).
    ends_at: float | None = None


class Profile(msgspec.Struct, frozen=True):
    """A cluster as one user knows it. `folder` holds `profile.toml`, `authority/`, `coordinator/` and `client/`."""

    name: str
    folder: Path
    #: "host:port"; empty until a coordinator was started.
    addresses: tuple[str, ...]
    cluster: ClusterId
    #: "host:port" of the coordinator's HTTP.
    http: str = ""

    @property
    def identity(self) -> Path:
        """The identity with which the profile's owner connects."""
        return self.folder / "client"

    @property
    def authority(self) -> Path:
        """The cluster's authority, which signs certificates."""
        return self.folder / "authority"

    @property
    def coordinator(self) -> Path:
        """The coordinator's identity."""
        return self.folder / "coordinator"


class _ProfileFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    cluster: str
    addresses: tuple[str, ...] = ()
    http: str = ""


# --- programs --------------------------------------------------------------------------------------------------------


def load_config(
    kind: type[_T], *, file: Path | None, environ: Mapping[str, str], prefix: str, flags: Mapping[str, object]
) -> _T:
    """Read a program's configuration: TOML `file` < `HERDER_<PREFIX>_<KEY>` < `flags` (None = not given).

    In the environment lists are separated by commas and tables are `key=value,key=value`.

    Raises:
        ConfigError: a key is unknown (the nearest known one is named), missing or of the wrong type, or `file` cannot
            be read.
    """
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    if file is not None:
        for key, value in _read_toml(file).items():
            values[_known(key.replace("-", "_"), hints, f"{file}: the key {key!r}")] = value
    start = f"HERDER_{prefix.upper()}_" if prefix else "HERDER_"
    for variable, text in environ.items():
        if variable.startswith(start):
            key = _known(variable.removeprefix(start).lower(), hints, f"the environment variable {variable}", start)
            values[key] = _from_text(text, hints[key], variable)
    for key, value in flags.items():
        if value is not None:
            values[_known(key, hints, f"the option {key!r}")] = value
    return _convert(values, kind)


def _known(key: str, hints: Mapping[str, object], what: str, prefix: str = "") -> str:
    if key in hints:
        return key
    nearest = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
    known = f"did you mean {_spelled(nearest[0], prefix)!r}?" if nearest else f"known are {', '.join(hints)}"
    raise ConfigError(f"{what} is unknown: {known}")


def _spelled(key: str, prefix: str) -> str:
    return prefix + key.upper() if prefix else key


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"the configuration file {file} cannot be read: {error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {file} is not TOML: {error}") from error


def _from_text(text: str, hint: Any, variable: str) -> object:
    """The value of an environment variable, as near to the type as text allows; msgspec does the rest."""
    origins = {get_origin(part) or part for part in (hint, *get_args(hint))}
    if tuple in origins:
        return [item.strip() for item in text.split(",") if item.strip()]
    if dict in origins:
        return dict(_parse_pair(item, variable) for item in text.split(",") if item.strip())
    return text


def _parse_pair(item: str, variable: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not equals:
        raise ConfigError(f"{variable}: {item!r} is not of the form key=value")
    return key.strip(), value.strip()


def _convert(values: dict[str, Any], kind: type[_T]) -> _T:
    prepared = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    try:
        return msgspec.convert(prepared, kind, strict=False, dec_hook=_decode_path)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the configuration is not complete or has a wrong value: {error}") from error


def _decode_path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str | Path):
        return Path(value).expanduser()
    raise TypeError(f"expected a path, got {value!r}")


# --- profiles --------------------------------------------------------------------------------------------------------

_PROFILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


def profiles_dir(environ: Mapping[str, str]) -> Path:
    """Where profiles are: `$HERDER_PROFILES`, else `herder/profiles` in `$XDG_CONFIG_HOME`, else in `~/.config`."""
    if own := environ.get("HERDER_PROFILES"):
        return Path(own)
    return Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "herder" / "profiles"


def create_profile(
    name: str,
    addresses: Sequence[str] = (),
    *,
    http: str = "",
    owner: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Profile:
    """Make a profile with a new cluster: its authority, the coordinator's identity, and the owner's (role admin).

    The first profile becomes the active one. It exists as a whole or not at all.

    Raises:
        ConfigError: the name is taken or not usable as a folder's, or the folder cannot be written.
    """
    environ = os.environ if environ is None else environ
    root = profiles_dir(environ)
    folder = _profile_folder(root, name)
    if folder.exists():
        raise ConfigError(f"the profile {name!r} exists already in {folder}: choose another name")
    cluster = ClusterId(uuid.uuid4().hex)
    partial = root / f".{name}.{os.getpid()}.partial"
    profile = Profile(name=name, folder=partial, addresses=tuple(addresses), cluster=cluster, http=http)
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial.mkdir(mode=0o700)
        tls.create_authority(profile.authority, cluster)
        tls.issue(profile.authority, profile.coordinator, "coordinator", "coordinator")
        tls.issue(profile.authority, profile.identity, "admin", owner or environ.get("USER") or "owner")
        save_profile(profile)
        partial.rename(folder)
    except OSError as error:
        raise ConfigError(f"the profile {name!r} cannot be made in {root}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if not (root / "active").exists():
        activate_profile(name, environ=environ)
    return msgspec.structs.replace(profile, folder=folder)


def issue_profile(profile: Profile, folder: Path, role: Role, name: str, days: int) -> None:
    """Make a folder for another user: a profile of the same cluster with an identity of its own and no authority, so
    that copying it to `~/.config/herder/profiles/` is all that he has to do. For an agent: its identity alone.

    It exists as a whole or not at all; every file is 0600.

    Raises:
        ConfigError: the folder is there already, or cannot be written; this profile has no authority.
    """
    if not (profile.authority / tls.AUTHORITY_KEY).exists():
        raise ConfigError(
            f"the profile {profile.name!r} cannot issue certificates: {profile.authority} holds no authority's key;"
            " that is only where the profile was made (`herder init`)"
        )
    if folder.exists():
        raise ConfigError(f"{folder} is there already: choose a new folder, or remove it")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    made = msgspec.structs.replace(profile, folder=partial)
    identity = partial if role == "agent" else made.identity
    try:
        partial.mkdir(mode=0o700, parents=True)
        tls.issue(profile.authority, identity, role, name, days)
        if role != "agent":
            save_profile(made)
        for file in partial.rglob("*"):
            file.chmod(0o700 if file.is_dir() else 0o600)
        partial.rename(folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_profile(name: str | None = None, *, environ: Mapping[str, str] | None = None) -> Profile:
    """Read a profile: the one named, else `$HERDER_PROFILE`, else the active one.

    Raises:
        ConfigError: there is none, or its file is damaged; says how to make one.
    """
    environ = os.environ if environ is None else environ
    root = profiles_dir(environ)
    name = name or environ.get("HERDER_PROFILE") or _active(root)
    if name is None:
        raise ConfigError(
            f"there is no Herder profile in {root}: make one with `herder init`, get a cluster with `herder up`,"
            " or use herder.LocalCluster() for this machine alone"
        )
    folder = _profile_folder(root, name)
    file = folder / "profile.toml"
    if not file.exists():
        others = sorted(path.parent.name for path in root.glob("*/profile.toml"))
        known = f"there are: {', '.join(others)}" if others else "there are none: make one with `herder init`"
        raise ConfigError(f"there is no profile {name!r} in {root}; {known}")
    _check_profile_file(file)
    try:
        content = msgspec.convert(_read_toml(file), _ProfileFile)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{file} is damaged: {error}") from error
    return Profile(name, folder, content.addresses, ClusterId(content.cluster), content.http)


def _check_profile_file(file: Path) -> None:
    """Refuse a file that somebody else could have written: it says whom this user's programs connect to. It holds no
    secret, so others may read it."""
    status = file.lstat()
    user = os.geteuid()
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{file} is a link, or no regular file: replace it by a copy of its target")
    if status.st_uid not in {user, 0}:
        raise ConfigError(f"{file} belongs to user {status.st_uid}, not to {user}: run `chown {user} {file}`")
    if status.st_mode & 0o022 and file.parent.stat().st_mode & 0o011:
        raise ConfigError(
            f"{file} can be written by others (mode {status.st_mode & 0o777:04o}): run `chmod 600 {file}`"
        )


def save_profile(profile: Profile) -> None:
    """Write a profile's `profile.toml`, whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    lines = [
        "# Written by Herder.",
        f"cluster = {_toml_string(profile.cluster)}",
        f"addresses = [{', '.join(map(_toml_string, profile.addresses))}]",
        f"http = {_toml_string(profile.http)}",
    ]
    _write_text(profile.folder / "profile.toml", "\n".join(lines) + "\n")


def activate_profile(name: str, *, environ: Mapping[str, str] | None = None) -> None:
    """Make this profile the one that is used when none is named.

    Raises:
        ConfigError: there is no such profile.
    """
    environ = os.environ if environ is None else environ
    profile = load_profile(name, environ=environ)
    _write_text(profile.folder.parent / "active", profile.name + "\n")


def _active(root: Path) -> str | None:
    try:
        return (root / "active").read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{root / 'active'} cannot be read: {error}") from error


def _profile_folder(root: Path, name: str) -> Path:
    if not _PROFILE_NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot be a profile's name: use letters, digits, '.', '_' and '-', at most 64")
    return root / name


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.chmod(0o600)
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error


def _toml_string(text: str) -> str:
    """A TOML basic string is a JSON string, but for DEL, which TOML wants escaped."""
    return msgspec.json.encode(text).decode().replace("\x7f", "\\u007f")


# --- values ----------------------------------------------------------------------------------------------------------


_ADDRESS = re.compile(
    r"(?:tls://)?(?:(?:\[(?P<bracketed>[^\s/@?#\[\]]+)\]|(?P<host>[^\s:/@?#\[\]]+))(?::(?P<port>\d+))?"
    r"|(?P<six>[0-9A-Fa-f]*:[0-9A-Fa-f:]*:[0-9A-Fa-f.]*))/?",
    re.ASCII,
)


def parse_address(text: str, default_port: int) -> tuple[str, int]:
    """Read "host", "host:port", "tls://host:port" or "[ipv6]:port".

    Raises:
        ConfigError: it is none of them.
    """
    match = _ADDRESS.fullmatch(text.strip())
    port = int(match["port"] or default_port) if match else 0
    if match is None or port > 65535:
        raise ConfigError(f"{text!r} is not an address: expected host:port, as in head:{default_port}")
    return match["bracketed"] or match["six"] or match["host"], port


_WALLTIME = re.compile(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)", re.ASCII)


def parse_walltime(text: str) -> float:
    """Read "3600" (seconds), "90:00" (minutes, seconds), "12:00:00" or "2-12:00:00" as seconds.

    Raises:
        ConfigError: it is none of them.
    """
    match = _WALLTIME.fullmatch(text.strip())
    if match is None or (match[1] and not match[2]):
        raise ConfigError(f"{text!r} is not a duration: expected seconds, or [[days-]hours:]minutes:seconds")
    days, hours, minutes = (int(part or 0) for part in match.groups()[:3])
    return days * 86_400 + hours * 3_600 + minutes * 60 + float(match[4])


_UNITS = {
    "": 1,
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "tb": 1000**4,
    "k": KIB,
    "m": MIB,
    "g": GIB,
    "t": 1024 * GIB,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1024 * GIB,
}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", re.ASCII)


def parse_bytes(text: str) -> int:
    """Read "4GiB", "512M" (binary, as Slurm and systemd read it), "1.5GB" (decimal) or "1048576".

    Raises:
        ConfigError: it is none of them.
    """
    match = _BYTES.fullmatch(text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ConfigError(f"{text!r} is not a size: expected a number and a unit, as in 4GiB")
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


#: File systems on which neither SQLite's locks nor a node's own state may be.
_SHARED_FILE_SYSTEMS = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|lustre|gpfs|beegfs|ceph|glusterfs|afs|9p|panfs|wekafs|fuse\..*"
)


def default_state_dir(environ: Mapping[str, str], uid: int) -> Path:
    """Where a node keeps its state: `$HERDER_STATE`, else `/var/lib/herder` as root, else `$XDG_STATE_HOME/herder`
    if that is on a local disk, else `/var/tmp/herder-<uid>`. It is not made here.

    Raises:
        ConfigError: the folder in `/var/tmp` belongs to somebody else, or is a link.
    """
    if own := environ.get("HERDER_STATE"):
        return Path(own)
    if uid == 0:
        return Path("/var/lib/herder")
    state_home = environ.get("XDG_STATE_HOME")
    if state_home and is_local_disk(Path(state_home)):
        return Path(state_home) / "herder"
    folder = Path(f"/var/tmp/herder-{uid}")
    check_private_folder(folder, uid)
    return folder


def check_private_folder(folder: Path, uid: int) -> None:
    """Refuse a folder in a place that all may write to, unless it is ours and closed to others, or not there yet.

    Raises:
        ConfigError: naming what is wrong, and the fix.
    """
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != uid:
        raise ConfigError(
            f"{folder} is a link, no folder, or somebody else's: set HERDER_STATE to a folder of your own"
        )
    if status.st_mode & 0o077:
        raise ConfigError(f"{folder} is open to others (mode {status.st_mode & 0o777:04o}): run `chmod 700 {folder}`")


def is_local_disk(path: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """Whether `path` lies on a file system of this machine alone."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    best, kind = -1, ""
    absolute = os.path.abspath(path)
    for line in lines:
        _, _, rest = line.partition(" ")
        point, _, rest = rest.partition(" ")
        point = point.replace("\\040", " ").rstrip("/")
        if len(point) >= best and (absolute == point or absolute.startswith(point + "/")):
            best, kind = len(point), rest.partition(" ")[0]
    return best >= 0 and not _SHARED_FILE_SYSTEMS.fullmatch(kind)
