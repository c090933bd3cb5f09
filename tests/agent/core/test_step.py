"""The agent's core: events in, whole lists of effects out."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from msgspec.structs import replace

from herder_agent.core import effects as fx
from herder_agent.core import events as ev
from herder_agent.core.attempts import VICTIM_BYTES_MIN
from herder_agent.core.launchers import (
    FORK_BATCH,
    FORK_RESERVE,
    FORK_TRIES_MAX,
    IDLE_CHILD_S,
    IDLE_TEMPLATE_S,
    REFUSAL_S,
    report_of,
)
from herder_agent.core.state import PIDS, State, check_invariants, new_state
from herder_agent.core.step import next_deadline_s, step
from herder_shared.ids import AttemptId, BlobId, JobId, NodeName, WorkloadKey
from herder_shared.limits import KILL_GRACE_S, TEMPLATE_TRIES_MAX
from herder_shared.states import Cause, CoreState, Outcome
from herder_shared.wire.messages import (
    AttemptEnd,
    AttemptStart,
    Failure,
    JobBrief,
    Payload,
    RunningAttempt,
    TaskOptions,
    WorkloadSpec,
)

KEY = WorkloadKey("w" * 16)
JOB = JobId("a" * 16)
SPEC = WorkloadSpec(KEY)
REUSED = WorkloadSpec(KEY, max_tasks_per_child=0)
FRESH = WorkloadSpec(KEY, start="fresh")
COMMANDS = WorkloadSpec(KEY, kind="command")
ONE = ev.Answer(Payload(b"1", None, 1), wall_s=0.5, user_s=0.25)
CLEAN = ev.Exit(0, 0.5, 0.125)


def ident(n: int) -> AttemptId:
    return AttemptId(1, n)


def order(n: int, **fields: Any) -> AttemptStart:
    fields.setdefault("args", Payload(b"args", None, 4))
    return AttemptStart(attempt=ident(n), job=JOB, index=n, ordinal=1, function=BlobId("f"), **fields)


class Machine:
    """The core, with a clock; checks the invariants after each event."""

    def __init__(self, cores: int = 2, spec: WorkloadSpec = SPEC, **options: Any) -> None:
        self.now_s = 100.0
        self.state: State = new_state(NodeName("n1"), cores, 1 << 30, self.now_s, cpus=tuple(range(cores)))
        self.spec = spec
        self.options = TaskOptions(**options)
        self.take(ev.Connected(1))

    def take(self, event: ev.Event, after_s: float = 0.0) -> list[fx.Effect]:
        self.now_s += after_s
        effects = step(self.state, event, self.now_s)
        check_invariants(self.state)
        return [effect for effect in effects if not isinstance(effect, fx.ReportWorkload | fx.Observe)]

    def tick(self, after_s: float) -> list[fx.Effect]:
        return self.take(ev.Ticked(), after_s)

    def order(self, *ns: int, **fields: Any) -> list[fx.Effect]:
        brief = JobBrief(JOB, "job", KEY, self.options)
        starts = tuple(order(n, **fields) for n in ns)
        return self.take(ev.AttemptsOrdered(1, starts, (self.spec,), (brief,)))

    def ready(self, template: int = 1, start: str = "fork") -> list[fx.Effect]:
        return self.take(ev.TemplateReady(template, start, "start", "", "3.11/3.1", 900, 0.1, 1000))

    def forked(self, *children: int) -> list[fx.Effect]:
        return [effect for child in children for effect in self.take(ev.ChildForked(child, 1000 + child))]

    def serving(self) -> Machine:
        """Until the template serves and its reserve is idle: children 1 to 1 + reserve, the first ran attempt 1."""
        self.order(1)
        forks = self.ready()
        assert isinstance(forks[0], fx.ForkChildren)
        self.forked(*forks[0].children)
        return self


def send(child: int, n: int, core: int = 0, reuses: bool = False, **options: Any) -> fx.SendTask:
    grant = fx.Grant((core,), 1, ())
    return fx.SendTask(child, order(n), "job", TaskOptions(**options), grant, reuses)


def ended(effects: list[fx.Effect]) -> list[AttemptEnd]:
    return [effect.end for effect in effects if isinstance(effect, fx.ReportEnd)]


# --- a forked task's way ---------------------------------------------------------------------------------------------


def test_first_attempt_starts_the_template_and_holds_its_slot_meanwhile() -> None:
    machine = Machine()
    assert machine.order(1) == [fx.StartTemplate(1, SPEC)]
    assert machine.state.slots.used == 1
    machine.tick(2.0)
    assert machine.state.account.seconds[CoreState.START] == 2.0


def test_cost_of_a_fork_which_the_template_measured_is_reported() -> None:
    machine = Machine()
    machine.order(1)
    ready = ev.TemplateReady(1, "fork", "import numpy", "", "3.11/3.1", 900, 0.1, 1000, fork_cost_s=0.002)
    reports = [e.report for e in step(machine.state, ready, 1.0) if isinstance(e, fx.ReportWorkload)]
    assert [(report.fork_point, report.fork_cost_s) for report in reports[-1:]] == [("import numpy", 0.002)]


def test_ready_template_is_asked_for_what_is_demanded_and_a_reserve_at_once() -> None:
    machine = Machine()
    machine.order(1)
    assert machine.ready() == [fx.ForkChildren(1, tuple(range(1, 1 + 1 + FORK_RESERVE)))]


def test_idle_child_gets_the_attempt() -> None:
    machine = Machine()
    machine.order(1)
    machine.ready()
    assert machine.forked(1) == [send(1, 1)]


def test_reserve_is_filled_again_after_an_exit_by_several_at_once() -> None:
    machine = Machine().serving()
    asked: list[fx.ForkChildren] = []
    for child in range(1, 2 + FORK_BATCH):
        if child > 1:
            assert machine.order(child) == [send(child, child)]
        machine.take(ev.ChildStarted(child))
        machine.take(ev.ChildAnswered(child, ONE))
        effects = machine.take(ev.ChildExited(child, CLEAN))
        asked += [effect for effect in effects if isinstance(effect, fx.ForkChildren)]
        machine.take(ev.LeftoversGone())
    assert [len(each.children) for each in asked] == [FORK_BATCH]


def test_workloads_report_says_what_its_template_said_of_its_memory() -> None:
    machine = Machine()
    machine.order(1)
    account = {"immortal_objects": 12, "immortal_off": "why", "notes": ("R10: slow",)}
    machine.take(ev.TemplateReady(1, "fork", "setup", "", "3.12/3.1", 900, 0.1, 1000, **account))  # type: ignore[arg-type]
    (workload,) = machine.state.workloads.values()
    report = report_of(workload)
    assert (report.immortal_objects, report.immortal_off, report.notes) == (12, "why", ("R10: slow",))


def test_end_is_reported_with_the_answer_and_the_slot_is_held_until_nothing_is_left_of_the_process() -> None:
    machine = Machine()
    machine.order(1)
    machine.ready()
    machine.forked(1)
    assert machine.take(ev.ChildStarted(1), 0.5) == [fx.ReportStarted(ident(1))]
    (end,) = ended(machine.take(ev.ChildAnswered(1, ONE), 1.0))
    assert machine.take(ev.ChildExited(1, CLEAN), 0.25) == [fx.SweepLeftovers()]
    assert machine.state.slots.used == 1
    assert machine.take(ev.LeftoversGone(), 0.25) == []
    assert (end.outcome, end.result) == (Outcome.SUCCEEDED, Payload(b"1", None, 1))
    assert end.usage.start_s == 0.5
    assert end.usage.wall_s == 0.5
    assert (end.usage.cpu_user_s, end.usage.cpu_system_s) == (0.25, 0.0)
    assert end.usage.core_s == 1.5
    assert machine.state.slots.used == 0
    seconds = machine.state.account.seconds
    assert (seconds[CoreState.START], seconds[CoreState.TASK], seconds[CoreState.SYSTEM]) == (0.5, 1.0, 0.5)
    assert sum(seconds.values()) == pytest.approx(2 * 2.0)


def test_queued_attempts_take_slots_in_their_order() -> None:
    machine = Machine(cores=1)
    machine.order(1, 2)
    machine.ready()
    assert [type(e).__name__ for e in machine.forked(1)] == ["SendTask", "ForkChildren"]
    machine.take(ev.ChildStarted(1))
    machine.take(ev.ChildAnswered(1, ONE))
    machine.forked(2)
    machine.take(ev.ChildExited(1, CLEAN))
    assert machine.take(ev.LeftoversGone())[0] == send(2, 2)


def test_in_a_crowd_a_forked_child_is_heard_of_at_its_end_and_taken_to_have_started() -> None:
    machine = Machine(cores=1)
    machine.order(1, 2, 3)
    machine.ready()
    first = machine.forked(1)
    (sent,) = [effect for effect in first if isinstance(effect, fx.SendTask)]
    assert (sent.in_crowd, sent.is_quiet) == (True, True)
    assert fx.ReportStarted(ident(1)) in first
    machine.take(ev.ChildAnswered(1, ONE))
    machine.forked(2)
    machine.take(ev.ChildExited(1, CLEAN))
    (sent,) = [effect for effect in machine.take(ev.LeftoversGone()) if isinstance(effect, fx.SendTask)]
    assert (sent.in_crowd, sent.is_quiet) == (False, False)


def test_answered_attempt_is_neither_reported_twice_nor_listed_as_running() -> None:
    machine = Machine().serving()
    machine.take(ev.ChildStarted(1))
    (end,) = ended(machine.take(ev.ChildAnswered(1, ONE)))
    assert machine.take(ev.Connected(2))[0] == fx.SendSync((), (end,))
    machine.take(ev.AttemptsAcked((ident(1),)))
    assert machine.take(ev.Connected(3))[0] == fx.SendSync((), ())
    assert machine.state.slots.used == 1
    machine.take(ev.ChildExited(1, CLEAN))
    assert ended(machine.take(ev.LeftoversGone())) == []
    assert machine.state.slots.used == 0


def test_reused_child_gets_the_next_attempt_in_the_step_of_its_answer() -> None:
    machine = Machine(cores=1, spec=REUSED)
    machine.order(1, 2)
    machine.ready()
    assert machine.forked(1) == [send(1, 1, reuses=True)]
    machine.take(ev.ChildStarted(1))
    effects = machine.take(ev.ChildAnswered(1, ONE))
    assert [type(e).__name__ for e in effects] == ["ReportEnd", "SendTask", "ReportStarted"]
    assert effects[1] == replace(send(1, 2, reuses=True), is_quiet=True)


def test_used_child_need_not_say_that_it_has_started() -> None:
    machine = Machine(cores=1, spec=REUSED)
    machine.order(1)
    machine.ready()
    machine.forked(1)
    machine.take(ev.ChildStarted(1))
    machine.take(ev.ChildAnswered(1, ONE))
    assert machine.order(2) == [replace(send(1, 2, reuses=True), is_quiet=True), fx.ReportStarted(ident(2))]
    (end,) = ended(machine.take(ev.ChildExited(1, ev.Exit(9)), 1.0) + machine.take(ev.LeftoversGone()))
    assert (end.outcome, end.usage.start_s, end.usage.wall_s) == (Outcome.CRASHED, 0.0, 1.0)


def test_child_is_replaced_after_the_tasks_that_it_may_run() -> None:
    machine = Machine(cores=1, spec=WorkloadSpec(KEY, max_tasks_per_child=2))
    machine.order(1, 2, 3)
    machine.ready()
    machine.forked(1)
    machine.take(ev.ChildStarted(1))
    machine.take(ev.ChildAnswered(1, ONE))
    machine.take(ev.ChildStarted(1))
    assert [type(e).__name__ for e in machine.take(ev.ChildAnswered(1, ONE))] == ["ReportEnd"]
    machine.take(ev.ChildExited(1, CLEAN))
    assert ended(machine.take(ev.LeftoversGone())) == []


def test_child_that_says_it_ends_gets_no_other_attempt() -> None:
    machine = Machine(cores=1, spec=REUSED)
    machine.order(1, 2)
    machine.ready()
    machine.forked(1)
    machine.take(ev.ChildStarted(1))
    effects = machine.take(ev.ChildAnswered(1, ONE, ends=True))
    assert [type(e).__name__ for e in effects] == ["ReportEnd"]
    exits = machine.take(ev.ChildExited(1, CLEAN)) + machine.take(ev.LeftoversGone())
    assert "ForkChildren" in [type(e).__name__ for e in [*effects, *exits]]


# --- ends ------------------------------------------------------------------------------------------------------------


def test_exit_without_an_answer_is_a_crash() -> None:
    machine = Machine().serving()
    machine.take(ev.ChildExited(1, ev.Exit(signal.SIGSEGV)))
    (end,) = ended(machine.take(ev.LeftoversGone()))
    assert end.outcome is Outcome.CRASHED
    assert end.failure is not None
    assert (end.failure.cause, end.failure.signal) == (Cause.SIGNAL, signal.SIGSEGV)


@pytest.mark.parametrize(
    ("exit_", "outcome"),
    [
        (ev.Exit(signal.SIGKILL, oom_seen=True, memory_is_low=True), Outcome.OUT_OF_MEMORY),
        (ev.Exit(signal.SIGKILL, oom_seen=True, peak_bytes=VICTIM_BYTES_MIN), Outcome.OUT_OF_MEMORY),
        (ev.Exit(signal.SIGKILL, oom_seen=True), Outcome.CRASHED),
        (ev.Exit(signal.SIGKILL, memory_is_low=True), Outcome.CRASHED),
    ],
)
def test_sigkill_while_the_kernel_killed_for_memory_is_that_where_it_can_be(exit_: ev.Exit, outcome: Outcome) -> None:
    machine = Machine().serving()
    machine.take(ev.ChildExited(1, exit_))
    (end,) = ended(machine.take(ev.LeftoversGone()))
    assert end.outcome is outcome


def test_killed_for_its_own_limit_is_out_of_memory_with_peak_and_limit() -> None:
    machine = Machine(memory_bytes=1000).serving()
    machine.take(ev.ChildExited(1, ev.Exit(signal.SIGKILL, peak_bytes=1000, memory_source="cgroup", limit_hit=True)))
    (end,) = ended(machine.take(ev.LeftoversGone()))
    assert end.outcome is Outcome.OUT_OF_MEMORY
    assert end.failure is not None
    assert end.failure.limit_bytes == 1000
    assert (end.usage.peak_memory_bytes, end.usage.memory_source) == (1000, "cgroup")


@pytest.mark.parametrize(("is_limit", "outcome"), [(True, Outcome.OUT_OF_MEMORY), (False, Outcome.FAILED)])
def test_failure_is_out_of_memory_where_the_kernel_killed_a_process_of_its_for_it(
    is_limit: bool, outcome: Outcome
) -> None:
    machine = Machine(memory_bytes=1000).serving()
    failure = Failure(Cause.EXCEPTION, "a process below died")
    machine.take(ev.ChildStarted(1))
    (end,) = ended(machine.take(ev.ChildAnswered(1, ev.Answer(failure=failure, limit_hit=is_limit))))
    assert end.outcome is outcome


def test_success_stands_although_a_process_of_its_was_killed_for_memory() -> None:
    machine = Machine(memory_bytes=1000).serving()
    machine.take(ev.ChildStarted(1))
    (end,) = ended(machine.take(ev.ChildAnswered(1, replace(ONE, limit_hit=True, read_bytes=7, write_bytes=9))))
    assert end.outcome is Outcome.SUCCEEDED
    assert (end.usage.read_bytes, end.usage.write_bytes) == (7, 9)


@pytest.mark.parametrize(("spec", "limit"), [(SPEC, PIDS), (WorkloadSpec(KEY, pids=20), 20)])
def test_more_processes_than_it_may_have_end_it_with_their_number(spec: WorkloadSpec, limit: int) -> None:
    machine = Machine(spec=spec).serving()
    machine.take(ev.ChildStarted(1))
    assert machine.take(ev.MemorySeen(1, 5, limit)) == []
    assert machine.take(ev.MemorySeen(1, 5, limit + 1)) == [fx.SignalChild(1, signal.SIGKILL)]
    machine.take(ev.ChildExited(1, ev.Exit(signal.SIGKILL)))
    (end,) = ended(machine.take(ev.LeftoversGone()))
    assert end.outcome is Outcome.CRASHED
    assert end.failure is not None
    assert f"had {limit + 1} processes and threads at once, its limit (pids) is {limit}" in end.failure.message


@pytest.mark.parametrize(("blas", "threads"), [("cores", 2), (5, 5)])
def test_threads_are_those_of_the_slot_or_what_the_workload_says(blas: Any, threads: int) -> None:
    machine = Machine(spec=WorkloadSpec(KEY, blas_threads=blas, pids=9), cores=2)
    machine.options = TaskOptions(cores=2)
    machine.order(1)
    forks = machine.ready()
    assert isinstance(forks[0], fx.ForkChildren)
    (sent,) = [effect for effect in machine.forked(*forks[0].children) if isinstance(effect, fx.SendTask)]
    assert (sent.grant.threads, sent.grant.pids, sent.grant.cpus) == (threads, 9, (0, 1))


def test_timeout_is_sigterm_then_sigkill() -> None:
    machine = Machine(timeout_s=5.0)
    machine.serving()
    machine.take(ev.ChildStarted(1))
    assert machine.tick(4.9) == []
    assert machine.tick(0.1) == [fx.SignalChild(1, signal.SIGTERM)]
    assert machine.tick(KILL_GRACE_S) == [fx.SignalChild(1, signal.SIGKILL)]
    machine.take(ev.ChildExited(1, ev.Exit(signal.SIGKILL)))
    (end,) = ended(machine.take(ev.LeftoversGone()))
    assert end.outcome is Outcome.TIMED_OUT


def test_result_that_came_before_the_timeout_stands() -> None:
    machine = Machine(timeout_s=5.0)
    machine.serving()
    machine.take(ev.ChildStarted(1))
    (end,) = ended(machine.take(ev.ChildAnswered(1, ONE), 4.0))
    assert end.outcome is Outcome.SUCCEEDED
    assert machine.tick(2.0) == []


def test_cancelled_attempt_ends_at_once_while_it_has_no_child() -> None:
    machine = Machine(cores=1)
    machine.order(1, 2)
    ends = ended(machine.take(ev.CancelOrdered((ident(2), ident(1)), 2.0)))
    assert [(end.attempt, end.outcome) for end in ends] == [
        (ident(2), Outcome.CANCELLED),
        (ident(1), Outcome.CANCELLED),
    ]
    assert machine.state.slots.used == 0


def test_cancelling_what_waits_leaves_alone_what_a_child_was_given() -> None:
    machine = Machine(cores=1).serving()
    machine.order(2)
    (end,) = ended(machine.take(ev.CancelOrdered((ident(1), ident(2)), 2.0, waiting_only=True)))
    assert (end.attempt, end.outcome) == (ident(2), Outcome.CANCELLED)
    machine.take(ev.ChildStarted(1))
    assert machine.take(ev.CancelOrdered((ident(1),), 2.0, waiting_only=True)) == []


def test_cancelled_running_attempt_is_cancelled_whatever_it_answers_afterwards() -> None:
    machine = Machine().serving()
    machine.take(ev.ChildStarted(1))
    assert machine.take(ev.CancelOrdered((ident(1),), 1.0)) == [fx.SignalChild(1, signal.SIGTERM)]
    assert machine.take(ev.ChildAnswered(1, ONE)) == []
    machine.take(ev.ChildExited(1, CLEAN))
    (end,) = ended(machine.take(ev.LeftoversGone()))
    assert end.outcome is Outcome.CANCELLED
    assert end.result is None


def test_memory_beyond_the_limit_is_killed_with_peak_and_limit() -> None:
    machine = Machine(memory_bytes=1000)
    machine.serving()
    machine.take(ev.ChildStarted(1))
    assert machine.take(ev.MemorySeen(1, 900)) == []
    assert machine.take(ev.MemorySeen(1, 1100)) == [fx.SignalChild(1, signal.SIGKILL)]
    machine.take(ev.ChildExited(1, ev.Exit(signal.SIGKILL)))
    (end,) = ended(machine.take(ev.LeftoversGone()))
    assert end.outcome is Outcome.OUT_OF_MEMORY
    assert end.failure is not None
    assert end.failure.limit_bytes == 1000
    assert end.usage.peak_memory_bytes == 1100


def test_request_that_the_node_could_never_hold_is_given_back() -> None:
    machine = Machine(cores=1)
    machine.options = TaskOptions(cores=2)
    (end,) = ended(machine.order(1))
    assert end.outcome is Outcome.LOST


# --- templates -------------------------------------------------------------------------------------------------------


def test_template_that_fails_is_tried_again_and_then_its_attempts_fail() -> None:
    machine = Machine()
    machine.order(1, 2)
    for template in range(1, TEMPLATE_TRIES_MAX):
        assert machine.take(ev.TemplateFailed(template, Cause.SETUP_FAILED, "no", "tb")) == []
        assert machine.take(ev.TemplateExited(template)) == [fx.StartTemplate(template + 1, SPEC)]
    ends = ended(machine.take(ev.TemplateFailed(TEMPLATE_TRIES_MAX, Cause.SETUP_FAILED, "no", "tb")))
    assert [end.outcome for end in ends] == [Outcome.FAILED] * 2
    assert {end.failure and end.failure.cause for end in ends} == {Cause.SETUP_FAILED}
    assert machine.take(ev.TemplateExited(TEMPLATE_TRIES_MAX)) == []
    assert len(ended(machine.order(3))) == 1
    machine.now_s += REFUSAL_S
    assert machine.order(4) == [fx.StartTemplate(TEMPLATE_TRIES_MAX + 1, SPEC)]


def test_unsafe_fork_is_not_tried_again() -> None:
    machine = Machine(spec=WorkloadSpec(KEY, start="fork"))
    machine.order(1)
    (end,) = ended(machine.take(ev.TemplateFailed(1, Cause.FORK_UNSAFE, "a thread")))
    assert end.outcome is Outcome.FAILED
    assert end.failure is not None
    assert end.failure.cause is Cause.FORK_UNSAFE


def test_template_that_ends_while_it_starts_makes_its_attempts_infrastructure() -> None:
    machine = Machine()
    machine.order(1)
    for template in range(1, TEMPLATE_TRIES_MAX):
        assert machine.take(ev.TemplateExited(template, "died")) == [fx.StartTemplate(template + 1, SPEC)]
    (end,) = ended(machine.take(ev.TemplateExited(TEMPLATE_TRIES_MAX, "died")))
    assert end.outcome is Outcome.LOST
    assert end.failure is not None
    assert (end.failure.cause, end.failure.message) == (Cause.START_FAILED, "died")


def test_template_that_dies_takes_its_children_and_is_rebuilt() -> None:
    machine = Machine().serving()
    machine.take(ev.ChildStarted(1))
    assert machine.take(ev.TemplateExited(1)) == [
        fx.DropChild(1),
        fx.SweepLeftovers(),
        *(fx.DropChild(child) for child in range(2, 2 + FORK_RESERVE)),
        fx.SweepLeftovers(),
        fx.StartTemplate(2, SPEC),
    ]
    (end,) = ended(machine.take(ev.LeftoversGone()))
    assert end.outcome is Outcome.LOST
    assert end.failure is not None
    assert end.failure.cause is Cause.TEMPLATE_LOST


def test_answer_that_came_before_the_template_died_stands() -> None:
    machine = Machine().serving()
    machine.take(ev.ChildStarted(1))
    (end,) = ended(machine.take(ev.ChildAnswered(1, ONE)))
    assert end.outcome is Outcome.SUCCEEDED
    machine.take(ev.TemplateExited(1))
    assert ended(machine.take(ev.LeftoversGone())) == []


def test_audit_that_says_no_makes_the_workload_fresh() -> None:
    machine = Machine(cores=1)
    machine.order(1)
    assert machine.ready(start="fresh") == [
        fx.StopTemplate(1),
        fx.StartTemplate(2, None),
        fx.SpawnFresh(2, 1, SPEC),
    ]
    assert machine.take(ev.TemplateExited(1)) == []
    machine.forked(1)
    assert machine.take(ev.ChildIdle(1)) == [send(1, 1), fx.SpawnFresh(2, 2, SPEC)]


def test_fresh_workload_starts_no_template() -> None:
    machine = Machine(cores=1, spec=FRESH)
    assert machine.order(1) == [fx.StartTemplate(1, None), fx.SpawnFresh(1, 1, FRESH)]


def test_fresh_rerun_of_a_forking_workload_uses_an_interpreter() -> None:
    machine = Machine(cores=2).serving()
    assert machine.order(2, start="fresh") == [fx.StartTemplate(2, None), fx.SpawnFresh(2, 2 + FORK_RESERVE, SPEC)]


def test_fresh_interpreter_whose_setup_fails_counts_as_a_failed_start() -> None:
    machine = Machine(cores=1, spec=FRESH)
    machine.order(1)
    child = 0
    for child in range(1, TEMPLATE_TRIES_MAX):
        machine.forked(child)
        effects = machine.take(ev.ChildSetupFailed(child, Cause.SETUP_FAILED, "no"))
        assert effects == [fx.SpawnFresh(1, child + 1, FRESH)]
    machine.forked(child + 1)
    (end,) = ended(machine.take(ev.ChildSetupFailed(child + 1, Cause.SETUP_FAILED, "no")))
    assert end.failure is not None
    assert end.failure.cause is Cause.SETUP_FAILED


def test_command_is_spawned_for_its_attempt_and_starts_when_it_is_there() -> None:
    machine = Machine(cores=1, spec=COMMANDS)
    grant = fx.Grant((0,), 1, ())
    assert machine.order(1) == [
        fx.StartTemplate(1, None),
        fx.SpawnCommand(1, 1, order(1), COMMANDS, TaskOptions(), grant),
    ]
    assert machine.forked(1) == [fx.ReportStarted(ident(1))]
    output = Payload(b"encoded", None, 7)
    machine.take(ev.ChildExited(1, ev.Exit(3 << 8), None, output))
    (end,) = ended(machine.take(ev.LeftoversGone()))
    assert (end.outcome, end.result) == (Outcome.FAILED, output)
    assert end.failure is not None
    assert (end.failure.cause, end.failure.exit_status) == (Cause.COMMAND_EXIT, 3)


def test_command_whose_status_is_not_checked_succeeds() -> None:
    machine = Machine(cores=1, spec=COMMANDS)
    machine.order(1)
    machine.forked(1)
    machine.take(ev.ChildExited(1, ev.Exit(3 << 8), None, Payload(b"x", None, 1), check=False))
    (end,) = ended(machine.take(ev.LeftoversGone()))
    assert end.outcome is Outcome.SUCCEEDED


def test_fork_that_fails_is_tried_again_later_and_then_given_up() -> None:
    machine = Machine(cores=1)
    machine.spec = WorkloadSpec(KEY, warm=0)
    machine.order(1)
    assert machine.ready() == [fx.ForkChildren(1, (1,))]
    for child in range(1, FORK_TRIES_MAX):
        assert machine.take(ev.ChildForkFailed(child, "EAGAIN")) == []
        deadline_s = next_deadline_s(machine.state)
        assert deadline_s is not None
        assert machine.tick(deadline_s - machine.now_s) == [fx.ForkChildren(1, (child + 1,))]
    (end,) = ended(machine.take(ev.ChildForkFailed(FORK_TRIES_MAX, "EAGAIN")))
    assert end.failure is not None
    assert end.failure.cause is Cause.START_FAILED


def test_unused_children_end_and_later_their_template() -> None:
    machine = Machine(cores=8).serving()
    machine.take(ev.ChildStarted(1))
    machine.take(ev.ChildAnswered(1, ONE))
    machine.take(ev.ChildExited(1, CLEAN))
    machine.take(ev.LeftoversGone())
    machine.forked(*[child.id for child in machine.state.children.values() if not child.pid])
    idle = [child.id for child in machine.state.children.values()]
    assert len(idle) == FORK_RESERVE
    stopped = [e for e in machine.tick(IDLE_CHILD_S + 1.0) if isinstance(e, fx.StopChild)]
    assert [effect.child for effect in stopped] == idle
    for child in idle:
        assert machine.take(ev.ChildExited(child, CLEAN)) == []
    assert machine.tick(IDLE_TEMPLATE_S) == [fx.StopTemplate(1)]
    assert next_deadline_s(machine.state) is None


# --- the coordinator -------------------------------------------------------------------------------------------------


def test_sync_lists_running_attempts_and_unacknowledged_ends() -> None:
    machine = Machine().serving()
    machine.take(ev.ChildStarted(1))
    machine.order(2, 3)
    (third,) = ended(machine.take(ev.CancelOrdered((ident(3),), 0.0)))
    machine.take(ev.Disconnected(1))
    running = (RunningAttempt(ident(1), JOB, 1, True), RunningAttempt(ident(2), JOB, 2, False))
    assert machine.take(ev.Connected(2)) == [fx.SendSync(running, (third,))]


def test_order_of_an_earlier_session_is_dropped() -> None:
    machine = Machine()
    machine.take(ev.Disconnected(1))
    machine.take(ev.Connected(2))
    assert machine.order(1) == []
    assert machine.state.attempts == {}


def test_attempt_is_not_accepted_twice() -> None:
    machine = Machine().serving()
    assert machine.order(1) == []
    assert len(machine.state.attempts) == 1


def test_acknowledged_end_is_forgotten_and_an_acknowledged_run_is_stopped_silently() -> None:
    machine = Machine(cores=1)
    machine.order(1, 2)
    machine.take(ev.CancelOrdered((ident(2),), 0.0))
    machine.take(ev.AttemptsAcked((ident(2),)))
    assert machine.state.ends == {}
    machine.ready()
    machine.forked(1)
    assert machine.take(ev.AttemptsAcked((ident(1),))) == [fx.SignalChild(1, signal.SIGTERM)]
    machine.take(ev.ChildExited(1, ev.Exit(signal.SIGTERM)))
    assert ended(machine.take(ev.LeftoversGone())) == []
    assert machine.state.ends == {}


def test_attempt_whose_job_was_not_told_is_given_back() -> None:
    machine = Machine()
    (end,) = ended(machine.take(ev.AttemptsOrdered(1, (order(1),))))
    assert end.outcome is Outcome.LOST


# --- blobs -----------------------------------------------------------------------------------------------------------


def test_blobs_are_fetched_while_the_attempt_queues_and_waiting_for_them_counts_as_transfer() -> None:
    blob = BlobId("b" * 40)
    machine = Machine(cores=1)
    effects = machine.order(1, args=Payload(b"", blob, 100_000))
    assert effects == [fx.FetchBlobs(ident(1), (blob,))]
    machine.tick(3.0)
    assert machine.state.account.seconds[CoreState.TRANSFER] == 3.0
    assert machine.take(ev.BlobsArrived(ident(1))) == [fx.StartTemplate(1, SPEC)]
    assert machine.take(ev.BlobsArrived(ident(1))) == []


def test_lost_blob_ends_the_attempt() -> None:
    machine = Machine(cores=1)
    machine.order(1, args=Payload(b"", BlobId("b" * 40), 100_000))
    effects = machine.take(ev.BlobsLost(ident(1), "gone"))
    (end,) = ended(effects)
    assert end.failure is not None
    assert end.failure.cause is Cause.DATA_LOST
    assert effects[0] == fx.ReleaseBlobs(ident(1))


def test_end_with_a_large_result_is_reported_when_the_result_is_uploaded() -> None:
    blob = BlobId("b" * 40)
    machine = Machine().serving()
    machine.take(ev.ChildStarted(1))
    assert fx.UploadBlob(blob) in machine.take(ev.ChildAnswered(1, ev.Answer(Payload(b"", blob, 100_000))))
    machine.take(ev.ChildExited(1, CLEAN))
    machine.take(ev.LeftoversGone())
    effects = machine.take(ev.Connected(2))
    assert effects[0] == fx.SendSync((RunningAttempt(ident(1), JOB, 1, True),), ())
    assert effects[1] == fx.UploadBlob(blob)
    (end,) = ended(machine.take(ev.BlobUploaded(blob)))
    assert end.attempt == ident(1)


def test_result_of_a_superseded_attempt_is_not_uploaded_again() -> None:
    machine = Machine().serving()
    machine.take(ev.ChildStarted(1))
    machine.take(ev.ChildAnswered(1, ev.Answer(Payload(b"", BlobId("b" * 40), 100_000))))
    machine.take(ev.AttemptsAcked((ident(1),)))
    assert not [effect for effect in machine.take(ev.Connected(2)) if isinstance(effect, fx.UploadBlob)]


# --- what comes late -------------------------------------------------------------------------------------------------


def test_news_of_children_and_templates_that_are_gone_is_dropped() -> None:
    machine = Machine().serving()
    for event in (
        ev.ChildStarted(99),
        ev.ChildAnswered(99, ONE),
        ev.ChildExited(99, CLEAN),
        ev.ChildForked(99, 1),
        ev.ChildForkFailed(99, "no"),
        ev.ChildIdle(99),
        ev.ChildSetupFailed(99, Cause.SETUP_FAILED, "no"),
        ev.MemorySeen(99, 1),
        ev.TemplateExited(99),
        ev.TemplateFailed(99, Cause.START_FAILED, "no"),
        ev.BlobsArrived(ident(99)),
        ev.BlobsLost(ident(99), "no"),
        ev.BlobUploaded(BlobId("x")),
        ev.AttemptsAcked((ident(99),)),
        ev.CancelOrdered((ident(99),), 1.0),
        ev.LeftoversGone(),
        ev.Disconnected(99),
        ev.JobsForgotten((JOB,)),
    ):
        assert machine.take(event) == [], event


def test_out_of_its_lease_an_agent_begins_nothing_that_may_run_once() -> None:
    machine = Machine(cores=1, idempotent=False)
    machine.take(ev.LeaseRenewed(machine.now_s + 30.0))
    assert machine.order(1) == [fx.StartTemplate(1, SPEC)]
    machine.order(2)
    machine.take(ev.Disconnected(1))
    assert machine.take(ev.TemplateFailed(1, Cause.FORK_UNSAFE, "no", ""), after_s=30.0)  # frees the slot
    assert [attempt.start.index for attempt in machine.state.queue.values()] == [2]
    machine.take(ev.Connected(2))
    assert [attempt.start.index for attempt in machine.state.queue.values()] == [2]
    machine.take(ev.LeaseRenewed(machine.now_s + 30.0))
    assert not machine.state.queue


def test_what_may_run_again_is_begun_out_of_the_lease_and_passes_what_may_not() -> None:
    machine = Machine(cores=1, idempotent=False)
    assert machine.order(1) == []
    other = JobBrief(JobId("b" * 16), "other", KEY, TaskOptions())
    order_again = replace_job(order(2), other.job)
    assert machine.take(ev.AttemptsOrdered(1, (order_again,), (SPEC,), (other,))) == [fx.StartTemplate(1, SPEC)]
    assert [attempt.start.index for attempt in machine.state.queue.values()] == [1]


def replace_job(start: AttemptStart, job: JobId) -> AttemptStart:
    return AttemptStart(start.attempt, job, start.index, start.ordinal, start.function, start.args)


def test_what_cannot_be_killed_is_reported_and_keeps_its_slot_until_it_is_gone() -> None:
    machine = Machine(cores=1, spec=COMMANDS)
    machine.order(1)
    machine.forked(1)
    machine.order(2)
    machine.take(ev.ChildExited(1, ev.Exit(9)))
    (end,) = ended(machine.take(ev.LeftoversStuck()))
    assert (end.attempt, end.outcome) == (ident(1), Outcome.CRASHED)
    assert machine.take(ev.LeftoversGone()) == []
    assert [attempt.start.index for attempt in machine.state.queue.values()] == [2]
    assert any(isinstance(effect, fx.SpawnCommand) for effect in machine.take(ev.StuckGone()))
    assert not machine.state.stuck


def test_a_child_that_does_not_die_is_reported_once_and_keeps_its_slot_until_it_does() -> None:
    machine = Machine(cores=1, timeout_s=5.0).serving()
    machine.order(1)
    machine.order(2)
    (child,) = (child for child in machine.state.children.values() if child.attempt is not None)
    machine.take(ev.ChildStarted(child.id))
    assert fx.SignalChild(child.id, signal.SIGTERM) in machine.tick(5.0)
    assert fx.SignalChild(child.id, signal.SIGKILL) in machine.tick(2.0)
    assert ended(machine.tick(9.0)) == []
    assert not machine.state.unkillable
    (end,) = ended(machine.tick(1.0))
    assert (end.attempt, end.outcome) == (ident(1), Outcome.TIMED_OUT)
    assert list(machine.state.unkillable) == [ident(1)]
    machine.take(ev.AttemptsAcked((ident(1),)))
    assert ended(machine.tick(60.0)) == []
    assert [attempt.start.index for attempt in machine.state.queue.values()] == [2]
    machine.take(ev.ChildExited(child.id, ev.Exit(9)))
    assert ended(machine.take(ev.LeftoversGone())) == []
    assert not machine.state.unkillable
    assert not machine.state.queue


@pytest.mark.parametrize(
    ("news", "outcome"),
    [(ev.MemorySeen(1, 2 << 30), Outcome.OUT_OF_MEMORY), (ev.ChildHung(1, "deadlock"), Outcome.CRASHED)],
    ids=["memory", "deadlock"],
)
def test_one_that_was_killed_for_another_reason_and_does_not_die_is_reported_too(
    news: ev.Event, outcome: Outcome
) -> None:
    machine = Machine(cores=1, memory_bytes=1 << 30).serving()
    machine.take(ev.ChildStarted(1))
    assert fx.SignalChild(1, signal.SIGKILL) in machine.take(news)
    (end,) = ended(machine.tick(10.0))
    assert end.outcome is outcome
    machine.take(ev.ChildExited(1, ev.Exit(9)))
    assert ended(machine.take(ev.LeftoversGone())) == []


def test_an_agent_that_is_told_to_end_gives_back_what_it_has() -> None:
    machine = Machine(cores=1, spec=COMMANDS)
    machine.order(1)
    machine.forked(1)
    machine.order(2)
    ends = ended(machine.take(ev.StopOrdered("SIGTERM")))
    assert [(end.attempt, end.outcome, end.usage.start_method) for end in ends] == [
        (ident(1), Outcome.LOST, "command"),
        (ident(2), Outcome.LOST, ""),
    ]
    assert {end.failure.cause for end in ends if end.failure is not None} == {Cause.NODE_LOST}
