"""Bugs that are planted in the shipped code, to see that the simulator would find them.

Each is a change of the source of one or a few shipped functions, made while a history runs. Where the source has
changed so that the change does not fit any more, planting it fails: then this table is to be mended. `tools/simulate
--planted` prints how many of N seeds catch each.
"""

from __future__ import annotations
import __future__

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

from herder import connection as client
from herder import conversation, outbox, tracks
from herder_agent.core import attempts as agent_attempts
from herder_agent.core import step as agent_step
from herder_coordinator.core import agents, apply, clients, ends, lease, ready, turn
from herder_coordinator.server import clients as clients_shell
from herder_coordinator.server import loop
from herder_shared.wire import session


@dataclass(frozen=True)
class Change:
    """In this function's source, `old` becomes `new`."""

    function: Callable[..., Any]
    old: str
    new: str


@dataclass(frozen=True)
class Bug:
    name: str
    #: What a reader must know to see why it is one.
    text: str
    changes: tuple[Change, ...]
    #: A seed that caught it once: tried first. Seeds mean other histories as the code changes.
    seed: int = 0
    #: The theme (`run.THEMES`) in whose histories it is looked for: it takes a meeting of events, rare elsewhere.
    theme: str = ""


_ackable = cast("property", tracks.Track.ackable).fget
assert _ackable is not None

BUGS: tuple[Bug, ...] = (
    Bug(
        "ack-before-durable",
        "answers leave while what they acknowledge is being written",
        (Change(loop.CoreLoop._conclude, 'elif getattr(effect, "after", "now") == "durable":', "elif False:"),),
    ),
    Bug(
        "no-submission-dedupe",
        "a submission that is repeated makes its tasks twice",
        (
            Change(clients.tasks_submitted, "if upto <= job.count:", "if False:"),
            Change(clients.tasks_submitted, "event.tasks[job.count - event.first :]", "event.tasks"),
        ),
    ),
    Bug(
        "lazy-assign",
        "an order for a task that may run once leaves before its record is on disk",
        (Change(turn.Turn._orders, '"now" if idempotent else "durable"', '"now"'),),
        seed=44,
    ),
    Bug(
        "no-epoch-in-attempts",
        "each life of the coordinator numbers its attempts from the same beginning",
        (Change(ready._start, "AttemptId(state.epoch,", "AttemptId(1,"),),
        seed=12,
    ),
    Bug(
        "no-agent-dedupe",
        "an agent accepts an attempt again that it has",
        (
            Change(
                agent_step._attempts_ordered, "start.attempt in state.attempts or start.attempt in state.ends", "False"
            ),
        ),
    ),
    Bug(
        "no-session-fence",
        "what comes late from an agent's older connection counts",
        (Change(agents.session_of, "node is None or not session or node.session != session", "node is None"),),
        seed=21,
        theme="stale-inventory",
    ),
    Bug(
        "finishing-race",
        "an inventory that lists an attempt whose task has ended revives it",
        (Change(agents._keep, " or job.outcomes[one.index]", ""),),
        seed=27,
        theme="lapses",
    ),
    Bug(
        "two-terminals",
        "a second end of a task is taken as well",
        (
            Change(ends.attempt_ended, " or job.outcomes[end.index]", ""),
            Change(apply.end_task, "assert not job.outcomes[index]", "assert True"),
        ),
        seed=9,
    ),
    Bug(
        "retry-of-at-most-once",
        "a task that may run once is run again when its node was lost",
        (Change(ends._after_loss, "not options.idempotent and", "False and"),),
        seed=47,
    ),
    Bug(
        "early-result-ack",
        "an agent is told to forget an end which is not on disk",
        (Change(turn.Turn._orders, 'AckAttempts(tuple(attempts)), "durable"', 'AckAttempts(tuple(attempts)), "now"'),),
        seed=67,
    ),
    Bug(
        "cursor-not-resumed",
        "a client that reconnects reads on from where it last acknowledged",
        (
            Change(
                client.Connection.closed,
                "self._outbox.rewind()\n",
                "self._outbox.rewind()\n    for track in self._tracks.values():\n        track.cursor = track.acked\n",
            ),
        ),
        seed=4,
    ),
    Bug(
        "outbox-not-rewound",
        "what was sent on a connection that broke is not said again",
        (Change(client.Connection.closed, "self._outbox.rewind()\n", "pass\n"),),
    ),
    Bug(
        "cancel-lost-on-restart",
        "a cancellation is acknowledged and not recorded",
        (Change(clients.cancel, "turn.record(records.CancelRequested(job.id, indices, running))", "pass"),),
        seed=1,
    ),
    Bug(
        "no-stall-forgiveness",
        "a coordinator that was stopped takes everybody else's silence for death",
        (Change(lease.forgive_stall, "if late_s <= limits.SELF_STALL_S", "if late_s <= 1e9"),),
        seed=17,
        theme="old-lives",
    ),
    Bug(
        "dependant-released-early",
        "a task starts without the values of those that it depends on",
        (
            Change(
                apply.resolve,
                "            task.waiting += 1\n            state.dependants.setdefault(key, []).append(task)\n",
                "",
            ),
        ),
        seed=9,
    ),
    Bug(
        "ends-forgotten",
        "an agent that reconnects has forgotten the ends which nobody acknowledged",
        (Change(agent_step._connected, "state.jobs.clear()\n", "state.jobs.clear()\n    state.ends.clear()\n"),),
        seed=77,
    ),
    Bug(
        "claims-ignored",
        "a client acknowledges an end that a submission under way depends on",
        (Change(_ackable, "max(self.acked, min(self.held.values(), default=self.cursor))", "self.cursor"),),
        seed=25,
        theme="early-acks",
    ),
    Bug(
        "slot-freed-early",
        "an agent frees a slot when the answer is there, and processes of the attempt still run",
        (
            Change(
                agent_attempts.report_answer,
                "attempt.dropped = True\n",
                "attempt.dropped = True\n    state.slots.give_back(attempt.slot)\n"
                "    state.account.move(attempt.request.cores, CORE_STATE[attempt.phase], None)\n"
                "    attempt.slot = None\n",
            ),
        ),
        seed=2,
    ),
    Bug(
        "silence-is-no-news",
        "an agent that is silent for a lease is waited for on and on",
        (Change(agents.check_leases, "if state.now_s >= node.lease_s:", "if False:"),),
        seed=54,
        theme="old-lives",
    ),
    Bug(
        "cancel-acked-once-for-all",
        "one acknowledgement settles all that a client had cancelled of a job",
        (
            Change(
                outbox.Outbox.cancel_ok,
                "del self._cancels[position]\n",
                "del self._cancels[position:]\n",
            ),
        ),
        seed=65,
        theme="endless",
    ),
    Bug(
        "no-epoch-fence",
        "an older life of the coordinator is obeyed after a newer one was seen",
        (Change(session.check_welcome, "if welcome.epoch < hello.epoch_seen:", "if False:"),),
        seed=6,
        theme="old-lives",
    ),
    Bug(
        "older-link-kept",
        "a client whose connections were greeted in the wrong order is spoken to on the one that is gone",
        (Change(clients_shell.Clients.opened, "if older is not None:", "if False:"),),
        seed=28,
        theme="late-words",
    ),
    Bug(
        "reset-not-recorded",
        "what failed is run again, and the journal does not say so",
        (Change(clients.retry_requested, "turn.record(records.TasksReset(job.id, indices))", "pass"),),
        seed=16,
        theme="again",
    ),
    Bug(
        "reset-told-once",
        "a client that was away does not hear that tasks of it are run again",
        (
            Change(clients.retry_requested, "_tell_reset(turn, job, incarnation, indices)", "pass"),
            Change(clients.attached, "_tell_reset(turn, job, event.client, tuple(sorted(job.tasks)))", "pass"),
        ),
        seed=72,
        theme="again",
    ),
    Bug(
        "reset-counted-twice",
        "a client that hears twice that a task is run again waits for two ends",
        (Change(tracks.Track.resolve, "if has_ended[index] != ended:", "if True:"),),
        seed=16,
        theme="again",
    ),
    Bug(
        "settled-not-attached",
        "a client whose job had been settled does not ask for it after a reconnection, though some of it is run again",
        (Change(conversation.Conversation.opened, "track.is_settled or ", ""),),
        seed=30,
        theme="again",
    ),
    Bug(
        "pause-not-recorded",
        "a job that was paused goes on after a restart",
        (Change(clients.job_change_requested, "turn.record(records.JobChanged(job.id, paused, priority))", "pass"),),
        seed=27,
        theme="changes",
    ),
    Bug(
        "drained-is-used",
        "a drained node that connects again is given tasks",
        (
            Change(
                agents.connected,
                "node.draining = name in state.drained or node.is_ending",
                "node.draining = node.is_ending",
            ),
        ),
        seed=38,
        theme="changes",
    ),
    Bug(
        "settled-not-followed",
        "a client that has what of its job failed run again does not ask for the job on a newer connection",
        (Change(conversation.Conversation._follow, "if track.is_settled:", "if False:"),),
        seed=10,
        theme="again",
    ),
)


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """While this is entered, the shipped code has the bug.

    Raises:
        LookupError: the source has changed, and the bug does not fit into it any more.
    """
    with ExitStack() as stack:
        originals: dict[FunctionType, Any] = {}
        sources: dict[FunctionType, str] = {}
        for change in bug.changes:
            function = cast("FunctionType", change.function)
            originals.setdefault(function, function.__code__)
            source = sources.get(function) or textwrap.dedent(inspect.getsource(function))
            if change.old not in source:
                raise LookupError(f"{bug.name}: {function.__qualname__} has no {change.old!r} any more")
            sources[function] = source.replace(change.old, change.new)
        for function, code in originals.items():
            stack.callback(setattr, function, "__code__", code)
        for function, source in sources.items():
            function.__code__ = _compile(function, source)
        yield


def _compile(function: FunctionType, source: str) -> Any:
    flags = __future__.annotations.compiler_flag
    names: dict[str, Any] = {}
    exec(compile(source.removeprefix("@property\n"), f"<planted {function.__qualname__}>", "exec", flags), names)
    return names[function.__name__].__code__
