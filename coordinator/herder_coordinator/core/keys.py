"""Certificates that are not to be let in any more.

A revocation is the coordinator's: it is journalled before it is acknowledged, so every later life, and every
coordinator that stands by, knows it. Whoever connects is looked up in `State.revoked` by his certificate's serial
number (by the shell); whoever is connected is turned out in the same turn, before the disk has answered: closing a
connection needs no permission. What ran on a revoked agent's node is given up as when a node is lost, and blamed on
nobody.

An entry is kept for ever, as nothing here knows what day it is, and costs about a hundred bytes.
"""

from __future__ import annotations

import re

from herder_coordinator.core import agents, apply, events, records
from herder_coordinator.core.quarantine import INNOCENT
from herder_coordinator.core.state import State
from herder_coordinator.core.turn import Turn
from herder_shared.limits import NAME_CHARS_MAX, REVOKED_KEYS_MAX
from herder_shared.states import AgentState
from herder_shared.wire.messages import Answer, KeyInfo

_SERIAL = re.compile(r"[1-9a-f][0-9a-f]{0,39}", re.ASCII)


def revoke_requested(turn: Turn, event: events.KeysRevokeRequested) -> None:
    """An admin wants these certificates turned away. All of them, or none."""
    wrong = _wrong_with(turn.state, event)
    if wrong:
        answer = Answer(event.number, error="ConfigError", message=f"nothing was revoked: {wrong}")
        turn.to_client(event.client, answer)
        return
    new = tuple({key.serial: key for key in event.keys if key.serial not in turn.state.revoked}.values())
    if new:
        apply.revoke(turn.state, new)
        turn.record(records.KeysRevoked(new))
        turn.turn_out(tuple(key.serial for key in new))
        _give_up_nodes(turn, {key.serial for key in new})
    told = tuple(KeyInfo(turn.state.revoked[key.serial], revoked=True) for key in event.keys)
    turn.to_client(event.client, Answer(event.number, keys=told))


def _wrong_with(state: State, event: events.KeysRevokeRequested) -> str:
    for key in event.keys:
        if not _SERIAL.fullmatch(key.serial) or max(len(key.role), len(key.name)) > NAME_CHARS_MAX:
            return f"{key.serial[:50]!r} is not the serial number of a certificate: `herder keys list` shows them"
        if key.role == "coordinator":
            return (
                "agents and clients do not ask whether the coordinator's own certificate was revoked: if its key may"
                " be in other hands, make a new profile (`herder init`), and bring the cluster up with that"
            )
        if key.serial == event.own:
            return (
                f"{key.serial} is the certificate that asks for it, and would be the last to be heard: issue another"
                " one for an admin (`herder keys issue NAME --role admin`), and revoke this one with that"
            )
    if len(state.revoked) + len(event.keys) > REVOKED_KEYS_MAX:
        return f"more than {REVOKED_KEYS_MAX} certificates are revoked already: make a new profile (`herder init`)"
    return ""


def _give_up_nodes(turn: Turn, serials: set[str]) -> None:
    for node in turn.state.nodes.values():
        if node.serial in serials and node.state is not AgentState.LOST:
            agents.give_up(turn, node, "its agent's certificate was revoked", INNOCENT)
