"""Why one host could not be brought up or taken down. The rest of the cluster goes on without it."""

from __future__ import annotations

from herder_shared.errors import HerderError


class HostFailed(HerderError):
    """Something went wrong with one host; the message is one line which names it and says what to do."""

    def __init__(self, host: str, reason: str) -> None:
        super().__init__(f"{host}: {reason}")
        self.host = host
        self.reason = reason


class ConnectFailed(HostFailed):
    """No SSH connection: refused, silent, wrong host key, wrong login key."""


class NotDone(HostFailed):
    """The node answered that it could not do what was asked, and undid what it had begun."""
