"""What `herder up` started, kept in the profile's folder: so that a second `up` can repair it and `down` can end it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from herder_launch.hosts import HostSpec
from herder_shared.errors import ConfigError
from herder_shared.ids import NodeName

_FILE = "launch.json"


class Started(msgspec.Struct, frozen=True):
    """One program on one host: `folder` holds its record there, `python` is the interpreter that runs it."""

    host: HostSpec
    folder: str
    python: str


class Record(msgspec.Struct):
    """Everything that was started for one profile. A coordinator on the launcher's own machine has the host `local`."""

    coordinator: Started | None = None
    agents: dict[NodeName, Started] = {}

    @property
    def is_empty(self) -> bool:
        """Nothing of it is left."""
        return self.coordinator is None and not self.agents


def load(profile_folder: Path) -> Record:
    """Read the record; an empty one when nothing was ever started.

    Raises:
        ConfigError: the file is damaged.
    """
    path = profile_folder / _FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except FileNotFoundError:
        return Record()
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}; remove it if nothing of the cluster runs any more") from error


def save(profile_folder: Path, record: Record) -> None:
    """Replace the record as a whole."""
    path = profile_folder / _FILE
    if record.is_empty:
        path.unlink(missing_ok=True)
        return
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
    part.rename(path)


@contextlib.contextmanager
def exclusive(profile_folder: Path) -> Iterator[None]:
    """One launcher at a time for one profile.

    Raises:
        ConfigError: another one is at work.
    """
    fd = os.open(profile_folder / "launch.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another `herder up` or `herder down` is at work in {profile_folder}") from error
        yield
    finally:
        os.close(fd)
