"""`herder keys list`, `issue`, `revoke`: who may connect, and who may not any more.

Issuing is the authority's, which is in the profile that `herder init` made: it needs no coordinator. Revoking is the
coordinator's: it keeps the list and turns away who is on it. A certificate is found by its name, its serial number (or
the first digits of it), its fingerprint, or its file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import msgspec

from herder.cli.output import print_json, print_table, say
from herder.cli.session import cluster_options, connected
from herder_shared import issued, tls
from herder_shared.config import Profile, issue_profile, load_profile
from herder_shared.errors import ConfigError, Unauthorized, Unreachable
from herder_shared.issued import Issued
from herder_shared.wire.messages import Key, KeyInfo

if TYPE_CHECKING:
    from herder_shared.wire.messages import Role

#: The first digits of a serial number or fingerprint must be so many to name one certificate.
DIGITS_MIN = 8
#: What `list` ends with when the coordinator could not be asked.
EXIT_UNREACHABLE = 3

_role_option = click.option("--role", type=click.Choice(["client", "admin", "agent"]), help="Only of this role.")


class Row(msgspec.Struct, frozen=True):
    """One certificate, as `list` shows it. `revoked` is None when the coordinator could not be asked."""

    serial: str
    role: str
    name: str
    not_after: str = ""
    sha256: str = ""
    revoked: bool | None = None
    connections: int = 0


@click.group()
def keys() -> None:
    """List, issue and revoke certificates."""


@keys.command("list")
@_role_option
@cluster_options
def list_(role: str | None, profile: str | None, as_json: bool) -> int:
    """List the certificates that this profile has issued, and those that the coordinator knows."""
    found = load_profile(profile)
    known: dict[str, KeyInfo] | None = {}
    trouble = ""
    if found.addresses:
        try:
            with connected(profile) as client:
                known = {info.key.serial: info for info in client.list_keys()}
        except (Unreachable, Unauthorized) as error:
            known, trouble = None, str(error)
    rows = [row for row in rows_of(issued_by(found), known) if role in {None, row.role}]
    if as_json:
        print_json(rows)
    else:
        columns = ("serial", "role", "name", "not after", "revoked", ">connections")
        print_table(columns, map(_cells, rows), empty="nothing was issued by this profile")
    if trouble:
        say(f"which of them were revoked is not known: {trouble}")
        return EXIT_UNREACHABLE
    return 0


def _cells(row: Row) -> tuple[str, ...]:
    revoked = {True: "revoked", False: "", None: "?"}[row.revoked]
    return (row.serial, row.role, row.name, row.not_after, revoked, str(row.connections or ""))


def issued_by(profile: Profile) -> list[Issued]:
    """What the profile's authority has issued, and the profile's own identities, which may be older than its list."""
    known = {one.serial: one for one in issued.read(profile.authority)}
    for identity in (profile.coordinator, profile.identity):
        if (identity / tls.CERTIFICATE).exists():
            own = tls.describe(identity / tls.CERTIFICATE)
            known.setdefault(own.serial, own)
    return list(known.values())


def rows_of(issued_: Iterable[Issued], known: dict[str, KeyInfo] | None) -> list[Row]:
    """Both lists as one: first what was issued here, then what only the coordinator knows of."""
    rows: list[Row] = []
    left = dict(known or {})
    for one in issued_:
        info = left.pop(one.serial, None)
        revoked = None if known is None else info is not None and info.revoked
        rows.append(Row(**msgspec.structs.asdict(one), revoked=revoked, connections=info.connections if info else 0))
    for info in left.values():
        key = info.key
        rows.append(Row(key.serial, key.role, key.name, revoked=info.revoked, connections=info.connections))
    return rows


@keys.command("issue")
@click.argument("name")
@click.option("--to", "folder", type=click.Path(path_type=Path), required=True, help="A new folder for it.")
@click.option(
    "--role",
    type=click.Choice(["client", "admin", "agent"]),
    default="client",
    show_default=True,
    help="An admin may also drain nodes, end the cluster and revoke keys.",
)
@click.option(
    "--days",
    type=click.IntRange(1, tls.DAYS),
    help=f"Valid for so long.  [default: {tls.DAYS}; agents {tls.DAYS_AGENT}]",
)
@cluster_options
def issue(  # noqa: PLR0917 - as click gives them
    name: str,
    folder: Path,
    role: Literal["client", "admin", "agent"],
    days: int | None,
    profile: str | None,
    as_json: bool,
) -> None:
    """Issue a certificate with a key of its own, in a folder that is a profile for another user (for an agent: its
    identity). The folder is secret: hand it over on a safe way, with its modes, to ~/.config/herder/profiles/."""
    made_by = load_profile(profile)
    role_: Role = role
    days = days or (tls.DAYS_AGENT if role == "agent" else tls.DAYS)
    issue_profile(made_by, folder, role_, name, days)
    identity = folder if role == "agent" else msgspec.structs.replace(made_by, folder=folder).identity
    made = tls.describe(identity / tls.CERTIFICATE)
    if as_json:
        print_json({"folder": str(folder), **msgspec.structs.asdict(made)})
        return
    click.echo(f"{folder}: {made.role} {made.name}, serial {made.serial}, valid until {made.not_after}")
    if not made_by.addresses and role != "agent":
        say("the profile has no coordinator's address yet, so this one has none either: issue after `herder up`")


@keys.command("revoke")
@click.argument("what", metavar="NAME|SERIAL|FINGERPRINT|FILE", nargs=-1, required=True)
@_role_option
@cluster_options
def revoke(what: tuple[str, ...], role: str | None, profile: str | None, as_json: bool) -> None:
    """Revoke certificates, at once and for good: who shows one is not let in, and who is connected is turned out.

    A name stands for all certificates of that name. What runs on a revoked agent's node is run elsewhere.
    """
    found = load_profile(profile)
    try:
        with connected(profile) as client:
            rows = rows_of(issued_by(found), {info.key.serial: info for info in client.list_keys()})
            chosen = {row.serial: row for each in what for row in find(each, rows, role)}
            told = _revoke(client, [Key(row.serial, row.role, row.name) for row in chosen.values()])
    except _Unsure:
        raise
    except Unreachable as error:
        raise Unreachable(
            "nothing was revoked: only the coordinator can turn anybody away, and it cannot be reached."
            f" Start it (`herder up`) and say this again. {error}"
        ) from error
    if as_json:
        print_json([info.key for info in told])
        return
    for info in told:
        connections = chosen[info.key.serial].connections
        closed = f"; was connected ({connections})" if connections else ""
        click.echo(f"revoked: {info.key.role} {info.key.name}, serial {info.key.serial}{closed}")


class _Unsure(Unreachable):
    pass


def _revoke(client: Any, keys_: Sequence[Key]) -> tuple[KeyInfo, ...]:
    try:
        revoked: tuple[KeyInfo, ...] = client.revoke_keys(*keys_)
    except Unreachable as error:
        raise _Unsure(f"whether it was revoked is unknown; say it again, which does no harm. {error}") from error
    return revoked


def find(what: str, rows: Sequence[Row], role: str | None = None) -> list[Row]:
    """The certificates that `what` names.

    Raises:
        ConfigError: there is none, or it could be several that are not the same holder's.
    """
    rows = [row for row in rows if role in {None, row.role}]
    named = [row for row in rows if row.name == what]
    if len({row.role for row in named}) > 1:
        roles = " and ".join(sorted({row.role for row in named}))
        raise ConfigError(f"{what!r} is the name of a {roles}: say which with --role, or give a serial number")
    if named:
        return named
    digits = what.lower().removeprefix("0x").replace(":", "")
    if len(digits) >= DIGITS_MIN:
        serial = digits.lstrip("0") or digits
        close = [row for row in rows if row.serial.startswith(serial) or row.sha256.startswith(digits)]
        if len(close) > 1:
            raise ConfigError(f"{len(close)} certificates begin with {what!r}: give more of the digits")
        if close:
            return close
    file = Path(what)
    if file.is_dir() and (file / tls.CERTIFICATE).exists():
        file /= tls.CERTIFICATE
    if file.is_file():
        one = tls.describe(file)
        return [Row(**msgspec.structs.asdict(one))]
    raise ConfigError(
        f"no certificate has the name, serial number or fingerprint {what!r}: `herder keys list` shows those that are"
        " known; of another one give the file cert.pem"
    )
