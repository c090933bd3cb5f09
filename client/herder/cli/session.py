"""What every command that speaks to a cluster shares: the options `--profile` and `--json`, and the connection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from herder import Client

F = TypeVar("F", bound=Callable[..., Any])

#: A person waits: after this long without a connection the command ends with status 3. Before the client would say that
#: it has none (`SILENT_LOSS_S`): once is enough.
CONNECT_TIMEOUT_S = 4.5

profile_option = click.option(
    "--profile", metavar="NAME", envvar="HERDER_PROFILE", help="The cluster's profile. Default: the active one."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def cluster_options(function: F) -> F:
    """`--profile` and `--json`."""
    return profile_option(json_option(function))


@contextmanager
def connected(profile: str | None, *, patient: bool = False) -> Iterator[Client]:
    """A client of the profile's cluster. Leaving it by an exception cancels what was submitted and not detached.

    `patient` outlives a coordinator that is away for long, once it was reached.

    Raises:
        ConfigError: there is no such profile.
        Unreachable: nothing answered in time.
        Unauthorized: the cluster does not accept the profile's keys.
    """
    import herder

    timeout_s = None if patient else CONNECT_TIMEOUT_S
    client = herder.Client(profile=profile, reconnect_timeout=timeout_s, connect_timeout=CONNECT_TIMEOUT_S)
    try:
        yield client
    except BaseException:
        client.abort()
        raise
    client.shutdown(wait=True)
