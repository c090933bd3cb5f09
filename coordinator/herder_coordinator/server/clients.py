"""Links with clients: messages → events, questions → answers. Decides nothing about tasks.

Two things are kept here because they need the disk or the order of a link. A submission that names a blob becomes an
event only when the blob is durable here: one that is on its way over the same link holds back what follows on it, one
that is nowhere (it was here, and dropped when nobody else needed it any more) ends the link: the client connects again
and says everything that was not acknowledged again, with its blobs and in its order, which what follows on the
submission (a close, a cancellation) relies on. And a question is answered after all that the link sent before it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from herder_coordinator.core import events, views
from herder_coordinator.core.explain import explain
from herder_coordinator.core.state import State
from herder_coordinator.server.blobs import BlobStore
from herder_coordinator.server.coalesce import halve
from herder_coordinator.server.loop import CoreLoop
from herder_coordinator.server.transfers import Transfers
from herder_shared.errors import (
    ConfigError,
    HerderError,
    JobNotFound,
    PayloadTooLarge,
    RemoteProtocolError,
    Unreachable,
)
from herder_shared.ids import AttemptId, BlobId, Incarnation, JobId, NodeName
from herder_shared.wire import messages as m
from herder_shared.wire.session import Peer
from herder_shared.wire.stream import Link

log = logging.getLogger(__name__)

#: Messages of one link that wait behind a submission whose blob is on its way.
HELD_MAX = 4_096
#: A client forgets something, or shows something: it goes with the next end, if that comes soon.
_NOT_URGENT = (m.SubmitOk, m.TasksStarted)


@dataclass(slots=True, eq=False)
class _ClientLink:
    link: Link
    client: Incarnation
    held: deque[m.Message] = field(default_factory=deque)
    #: Jobs with the first task of a submission that is to come again, and the end of the last one behind it: what
    #: follows on it of that job comes again with it, in its order, and is passed over until then.
    refused: dict[JobId, tuple[int, int]] = field(default_factory=dict)


class Clients:
    """All live links with clients and admins.

    `shut_down` is called when an admin wants the whole cluster to end, after the answer was sent; `who_is_connected`
    gives everybody, agents too, and with how many connections.
    """

    def __init__(
        self, core: CoreLoop, store: BlobStore, transfers: Transfers, status: Callable[[State], m.StatusInfo]
    ) -> None:
        self._core = core
        self._store = store
        self._transfers = transfers
        self._status = status
        self._links: dict[Link, _ClientLink] = {}
        self._by_client: dict[Incarnation, _ClientLink] = {}
        self._unflushed: dict[Link, None] = {}
        self.shut_down: Callable[[], None] | None = None
        self.who_is_connected: Callable[[], Mapping[Peer, int]] = dict
        #: Why nothing new can be taken in just now; "" when it can.
        self.why_no_submissions: Callable[[], str] = str

    # --- what links report -------------------------------------------------------------------------------------------

    def opened(self, link: Link, node: NodeName | None = None, attempt: AttemptId | None = None) -> None:
        """A client said hello and was welcomed. `attempt`: it is the task's own that runs as this, says its node."""
        client = _ClientLink(link, link.hello.incarnation)
        older = self._by_client.get(client.client)
        if older is not None:
            # Mostly it is dead and nobody has noticed. If it is the newer one, and this one's hello came late, its
            # client connects again: it must not wait at a link on which nothing is said any more.
            older.link.close("another connection of this client replaced it")
        self._links[link] = client
        self._by_client[client.client] = client
        owner = _owner(link)
        log.info("client %s of %r connected (session %d)", client.client, owner, link.session)
        grace_s = link.hello.disconnect_grace_s
        self._core.raise_event(events.ClientConnected(client.client, link.session, owner, node, attempt, grace_s))

    def closed(self, link: Link, error: HerderError | None) -> None:
        """The link is gone."""
        client = self._links.pop(link, None)
        if client is None:
            return
        if self._by_client.get(client.client) is client:
            del self._by_client[client.client]
        log.info("client %s disconnected (session %d): %s", client.client, link.session, error or "closed")
        self._core.raise_event(events.ClientDisconnected(client.client, link.session))

    def received(self, link: Link, messages: list[m.Message]) -> None:
        """What the client sent, in order."""
        client = self._links.get(link)
        if client is None:
            return
        for message in messages:
            match message:
                case m.Heartbeat():
                    link.send(m.HeartbeatAck(message.n))
                case m.PutBlob():
                    self._transfers.put(link, message)
                case m.BlobStored():
                    self._transfers.confirmed(link, message)
                case m.WantBlob():
                    self._transfers.want(link, message)
                case _:
                    self._take(client, message)

    def blob_arrived(self) -> None:
        """A blob has become durable: go on with what waited."""
        for client in list(self._links.values()):
            while client.held and not self._must_wait(client, client.held[0]):
                self._act(client, client.held.popleft())

    def _take(self, client: _ClientLink, message: m.Message) -> None:
        if not client.held and not self._must_wait(client, message):
            self._act(client, message)
        elif len(client.held) < HELD_MAX:
            client.held.append(message)
        else:
            text = f"more than {HELD_MAX} messages wait for a blob"
            client.link.refuse(m.Refused(RemoteProtocolError.__name__, text))

    def _must_wait(self, client: _ClientLink, message: m.Message) -> bool:
        return isinstance(message, m.SubmitTasks) and any(
            self._transfers.is_arriving(client.link, blob) for blob in self._missing(message)
        )

    def _act(self, client: _ClientLink, message: m.Message) -> None:
        if client.link.is_closed:
            return  # it will be said again, in its order
        raise_event, name = self._core.raise_event, client.client
        if client.refused and self._follows_on(client, message):
            return
        match message:
            case m.SubmitTasks():
                self._submit(client, message)
            case m.AckEvents():
                raise_event(events.EventsAcked(name, message.job, message.cursor))
            case m.OpenJob():
                raise_event(events.JobOpened(name, message.spec))
            case m.CloseJob():
                raise_event(events.JobClosed(name, message.job, message.count))
            case m.CancelTasks():
                is_admin = client.link.peer.role == "admin"
                raise_event(events.CancelRequested(name, message.job, message.indices, message.running, is_admin))
            case m.RetryFailed():
                raise_event(events.RetryRequested(name, message.id, message.job))
            case m.Attach():
                raise_event(events.Attached(name, message.job, message.cursor))
            case m.Goodbye():
                raise_event(events.ClientLeft(name))
            case m.Query():
                self._core.ask(lambda state, now_s: self._answer(client.link, self._reply(message, state, now_s)))
            case m.ChangeJob():
                is_admin = client.link.peer.role == "admin"
                raise_event(
                    events.JobChangeRequested(name, message.id, message.job, message.paused, message.priority, is_admin)
                )
            case m.DrainNode():
                self._drain(client.link, message)
            case m.RevokeKeys():
                own = client.link.peer.serial
                raise_event(events.KeysRevokeRequested(name, message.id, message.keys, own))
            case m.ListKeys():
                self._core.ask(lambda state, _now_s: self._answer(client.link, self._keys(message, state)))
            case m.ShutDown():
                self._shut_down(client.link, message)
            case _:
                raise AssertionError(f"the session let a {type(message).__name__} of a client through")

    # --- submissions -------------------------------------------------------------------------------------------------

    def _submit(self, client: _ClientLink, message: m.SubmitTasks) -> None:
        reason = self.why_no_submissions()
        if reason:
            text = f"{reason}: nothing new is taken in until that is over"
            client.refused[message.job] = (message.first, _upto(message))
            client.link.send(m.SubmitRefused(message.job, message.first, Unreachable.__name__, text, again=True))
            return
        client.refused.pop(message.job, None)
        missing = self._missing(message)
        if missing:
            text = f"{len(missing)} blobs which the submission names are not here; the first is {missing[0]}"
            log.warning("client %s: job %s from task %d on: %s", client.client, message.job, message.first, text)
            client.link.close(text)
            return
        self._core.raise_event(
            events.TasksSubmitted(
                client.client, message.job, message.first, message.function, message.tasks, message.python
            )
        )
        named = _named(message)
        if named:
            self._core.ask(lambda _state, _now_s: self._store.name(named))

    def _missing(self, message: m.SubmitTasks) -> list[BlobId]:
        """The blobs which it names and which are not durable here."""
        functions = self._core.state.functions
        return [blob for blob in _named(message) if blob not in self._store and blob not in functions]

    def _follows_on(self, client: _ClientLink, message: m.Message) -> bool:
        """Whether it stands behind a submission that was not taken in: it would close, cancel or depend on what is not
        there."""
        if isinstance(message, m.CloseJob | m.CancelTasks):
            return self._lacks(client, message.job, None)
        if not isinstance(message, m.SubmitTasks):
            return False
        refused = client.refused.get(message.job)
        if refused is not None and message.first > refused[0] and self._lacks(client, message.job, None):
            client.refused[message.job] = (refused[0], max(refused[1], _upto(message)))
            return True
        needs = [key for task in message.tasks for key in task.deps if key[0] != message.job] if client.refused else []
        if any(self._lacks(client, job, index) for job, index in needs):
            client.refused.setdefault(message.job, (message.first, _upto(message)))
            return True
        return False

    def _lacks(self, client: _ClientLink, job_id: JobId, index: int | None) -> bool:
        """Whether this task of the job (None: any that was not taken in) is still to come again."""
        refused = client.refused.get(job_id)
        if refused is None:
            return False
        job = self._core.state.jobs.get(job_id)
        count = job.count if job is not None else 0
        if count >= refused[1]:  # they are there after all: what was refused was a repetition
            del client.refused[job_id]
            return False
        return index is None or index >= max(refused[0], count)

    # --- questions ---------------------------------------------------------------------------------------------------

    def _reply(self, query: m.Query, state: State, now_s: float) -> m.Answer:
        match query.what:
            case "nodes":
                return m.Answer(query.id, nodes=tuple(views.nodes(state, now_s)))
            case "jobs":
                return m.Answer(query.id, jobs=tuple(views.jobs(state, now_s)))
            case "workloads":
                return m.Answer(query.id, workloads=tuple(views.workloads(state)))
            case "status":
                return m.Answer(query.id, status=self._status(state))
            case "job" | "tasks" | "logs" | "explain":
                return self._reply_about_job(query, state, now_s)

    def _reply_about_job(self, query: m.Query, state: State, now_s: float) -> m.Answer:
        job_id = query.job or JobId("")
        job = views.job(state, job_id, now_s)
        if job is None:
            text = f"there is no job {job_id}, or it has been forgotten: `herder jobs` lists those that are known"
            return m.Answer(query.id, error=JobNotFound.__name__, message=text)
        if query.what == "job":
            return m.Answer(query.id, jobs=(job,))
        if query.what == "explain":
            explanation = explain(state, job_id, query.index or 0)
            if explanation is None:
                text = f"job {job_id} has no task {query.index or 0}, or it has been forgotten"
                return m.Answer(query.id, error=JobNotFound.__name__, message=text)
            return m.Answer(query.id, explanation=explanation)
        if query.what == "tasks":
            return m.Answer(query.id, tasks=tuple(views.tasks(state, job_id) or ()))
        return m.Answer(query.id, logs=views.logs(state, job_id, query.index or 0) or m.Logs())

    def _answer(self, link: Link, answer: m.Answer) -> None:
        try:
            link.send(answer)
        except PayloadTooLarge as error:
            link.send(m.Answer(answer.id, error=PayloadTooLarge.__name__, message=f"the answer is too large: {error}"))

    def _keys(self, message: m.ListKeys, state: State) -> m.Answer:
        return m.Answer(message.id, keys=tuple(views.keys(state, self.who_is_connected())))

    def _drain(self, link: Link, message: m.DrainNode) -> None:
        def answer(state: State, now_s: float) -> None:
            nodes = tuple(info for info in views.nodes(state, now_s) if info.facts.node == message.node)
            self._answer(link, m.Answer(message.id, nodes=nodes))

        def drain(state: State, _now_s: float) -> None:
            if message.node not in state.nodes:
                known = ", ".join(sorted(state.nodes)[:20]) or "none"
                text = f"no node is called {message.node!r}; known are: {known}"
                self._answer(link, m.Answer(message.id, error=ConfigError.__name__, message=text))
                return
            self._core.raise_event(events.DrainRequested(message.node, message.on))
            self._core.ask(answer)

        self._core.ask(drain)

    def _shut_down(self, link: Link, message: m.ShutDown) -> None:
        def answer(state: State, _now_s: float) -> None:
            log.warning("%s %r ends the cluster", link.peer.role, link.peer.name)
            self._answer(link, m.Answer(message.id, status=self._status(state)))
            if self.shut_down is not None:
                self.shut_down()

        self._core.ask(answer)

    # --- what the coordinator sends ----------------------------------------------------------------------------------

    def send(self, client: Incarnation, message: m.Message) -> None:
        """Send to that client with the next `flush`; nothing happens when it is not connected."""
        found = self._by_client.get(client)
        if found is None:
            return
        if type(message) in _NOT_URGENT:
            found.link.flush_later()
        else:
            self._unflushed[found.link] = None
        try:
            found.link.put(message)
        except PayloadTooLarge:
            halves = halve(message)
            if halves is None:
                raise
            for half in halves:
                self.send(client, half)

    def flush(self) -> None:
        """What was sent leaves now, in one write for each link."""
        while self._unflushed:
            self._unflushed.popitem()[0].flush()

    def __len__(self) -> int:
        return len(self._links)


def _upto(message: m.SubmitTasks) -> int:
    return message.first + len(message.tasks)


def _owner(link: Link) -> str:
    """Whose the client's jobs are. Who has a user's certificate is that user; an admin is who he says he is, as his
    profile may serve several people."""
    return link.peer.name if link.peer.role == "client" else link.hello.owner or link.peer.name


def _named(message: m.SubmitTasks) -> list[BlobId]:
    function = message.function
    named = [task.args.blob for task in message.tasks if task.args.blob is not None]
    if function is not None and not function.content:
        named.append(function.id)
    return named
