"""Certificates are revoked: once, durably, and whoever has them is out."""

from __future__ import annotations

import pytest

from herder_coordinator.core import events, keys, records, views
from herder_coordinator.core.effects import Persist, SendToClient, TurnOut
from herder_shared.ids import ClusterId, Incarnation, NodeName
from herder_shared.limits import REVOKED_KEYS_MAX
from herder_shared.states import AgentState, Outcome, TaskState
from herder_shared.wire.messages import Answer, Key, KeyInfo, NodeFacts
from herder_shared.wire.session import Peer
from support.core_lab import CLIENT, JOB, Lab, starts, told_ends

N1 = NodeName("n1")
AGENT = Key("a9e17", "agent", "n1")
EVE = Key("e7e", "client", "eve")


@pytest.fixture
def lab() -> Lab:
    lab = Lab()
    lab.client()
    return lab


def connect(lab: Lab, serial: str = AGENT.serial, session: int = 1) -> None:
    facts = NodeFacts(N1, 2, 1 << 30)
    lab.do(events.AgentConnected(facts, Incarnation(f"n1-{session}"), session, serial))
    lab.sync("n1", session)


def revoke(lab: Lab, *some: Key, own: str = "0b") -> list[object]:
    return list(lab.do(events.KeysRevokeRequested(CLIENT, 7, some, own)))


def test_a_revocation_is_recorded_acted_on_and_acknowledged_when_it_is_durable(lab: Lab) -> None:
    assert revoke(lab, EVE) == [
        Persist(records.KeysRevoked((EVE,))),
        SendToClient(CLIENT, Answer(7, keys=(KeyInfo(EVE, revoked=True),)), "durable"),
        TurnOut(("e7e",)),
    ]
    assert "revoked" in views.why_not(lab.state, "e7e")
    assert views.why_not(lab.state, "e7") == ""


def test_said_again_it_is_acknowledged_again_and_recorded_once(lab: Lab) -> None:
    revoke(lab, EVE)
    assert revoke(lab, Key("e7e"), EVE) == [
        SendToClient(CLIENT, Answer(7, keys=(KeyInfo(EVE, revoked=True),) * 2), "durable")
    ]


@pytest.mark.parametrize("by_snapshot", [True, False], ids=["snapshot", "journal"])
def test_later_lives_know_it(lab: Lab, by_snapshot: bool) -> None:
    revoke(lab, EVE, AGENT)
    for _ in range(2):
        lab.restart(by_snapshot=by_snapshot)
        assert lab.state.revoked == {"e7e": EVE, "a9e17": AGENT}


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (Key("0b", "admin", "me"), "not the serial number"),  # as peers give them, they begin with no nought
        (Key("xyz"), "not the serial number"),
        (Key("1" * 41), "not the serial number"),
        (Key("", "client", "eve"), "not the serial number"),
        (Key("1", "client", "e" * 201), "not the serial number"),
        (Key("c0", "coordinator", "coordinator"), "make a new profile"),
        (Key("b", "admin", "me"), "the certificate that asks for it"),
    ],
)
def test_what_cannot_be_revoked_is_said_and_nothing_else_is_revoked(lab: Lab, wrong: Key, text: str) -> None:
    (answered,) = revoke(lab, EVE, wrong, own="b")
    assert isinstance(answered, SendToClient)
    assert isinstance(answered.message, Answer)
    assert answered.message.error == "ConfigError"
    assert text in answered.message.message
    assert answered.message.message.startswith("nothing was revoked")
    assert lab.state.revoked == {}


def test_their_number_is_bounded(lab: Lab) -> None:
    lab.state.revoked.update((f"{n:x}", Key(f"{n:x}")) for n in range(1, REVOKED_KEYS_MAX + 1))
    (answered,) = revoke(lab, Key("fffffff"))
    assert isinstance(answered, SendToClient)
    assert "make a new profile" in getattr(answered.message, "message", "")


def test_what_a_revoked_agent_had_runs_elsewhere_at_once_and_nobody_is_blamed(lab: Lab) -> None:
    lab.open(max_crashes=0)
    connect(lab)
    lab.submit(2)
    lab.started(lab.attempt(0))
    lab.node("n2")
    some = revoke(lab, AGENT)
    assert [(place, order.index) for place, order, _ in starts(some)] == [("n2", 0), ("n2", 1)]  # type: ignore[arg-type]
    assert lab.state.nodes[N1].state is AgentState.LOST
    assert lab.state.nodes[N1].session == 0
    assert all(not task.crashes and not task.quarantine_s for task in lab.state.jobs[JOB].tasks.values())
    # What its connection still brings is nobody's.
    assert lab.do(events.AgentDisconnected(N1, 1)) == []


def test_what_may_run_once_is_lost_with_a_revoked_agent(lab: Lab) -> None:
    lab.open(idempotent=False)
    connect(lab)
    lab.submit(1)
    lab.started(lab.attempt(0))
    lab.node("n2")
    (end,) = told_ends(revoke(lab, AGENT))  # type: ignore[arg-type]
    assert (end.outcome, end.failure is not None) == (Outcome.LOST, True)
    assert "revoked" in lab.failure().message


def test_an_agent_that_is_away_is_given_up_too_and_is_back_with_another_certificate(lab: Lab) -> None:
    lab.open()
    connect(lab)
    lab.submit(1)
    lab.do(events.AgentDisconnected(N1, 1))
    revoke(lab, AGENT)
    assert lab.state.nodes[N1].state is AgentState.LOST
    assert lab.place() is None
    connect(lab, "a9e18", session=2)
    assert lab.state.nodes[N1].state is AgentState.READY
    assert lab.state.jobs[JOB].tasks[0].state is TaskState.ASSIGNED


def test_one_that_came_in_the_very_turn_of_its_revocation_is_not_there(lab: Lab) -> None:
    revoke(lab, AGENT)
    facts = NodeFacts(N1, 2, 1 << 30)
    assert lab.do(events.AgentConnected(facts, Incarnation("n1-1"), 1, AGENT.serial)) == []
    assert lab.sync("n1", 1) == []
    assert lab.state.nodes == {}


def test_keys_are_listed_with_who_is_connected(lab: Lab) -> None:
    revoke(lab, EVE)
    peer = Peer("agent", "n1", ClusterId("c"), AGENT.serial)
    assert views.keys(lab.state, {peer: 2}) == [KeyInfo(EVE, revoked=True), KeyInfo(AGENT, connections=2)]
    assert keys.__doc__
