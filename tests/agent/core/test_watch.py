"""Children that hang, templates that change, workloads that are not forked any more: what the core decides."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herder_agent.core import effects as fx
from herder_agent.core import events as ev
from herder_agent.core.launchers import IDLE_CHILD_S, report_of
from herder_agent.core.state import Child, State, check_invariants, new_state
from herder_agent.core.step import step
from herder_agent.core.watch import (
    FIRST_LOOK_S,
    GROWTH_BYTES_MIN,
    HUNG_MAX,
    LOOK_S_MAX,
    POLLS,
    PROOF_S,
    REPLACED_MAX,
    STALL_S,
    Sight,
    Watch,
    drift,
)
from herder_shared.ids import AttemptId, BlobId, JobId, NodeName, WorkloadKey
from herder_shared.limits import GIB, MIB
from herder_shared.states import Cause, Outcome
from herder_shared.wire.messages import (
    AttemptStart,
    AuditFinding,
    AuditStep,
    JobBrief,
    Payload,
    TaskOptions,
    WorkloadSpec,
)

KEY = WorkloadKey("w" * 16)
JOB = JobId("a" * 16)
WAITS = ((10, 3), (11, 7))


# --- looks -----------------------------------------------------------------------------------------------------------


def looks(watch: Watch, sights: list[Sight]) -> tuple[str, float]:
    """Take sights until something is found. Returns it, and after how long."""
    now_s = 0.0
    for sight in sights:
        following = watch.take(sight, now_s)
        if following.hung:
            return following.hung, now_s
        now_s += following.wait_s
    return "", now_s


def test_a_process_whose_threads_all_wait_is_proved_deadlocked_within_a_quarter_of_a_second() -> None:
    hung, took_s = looks(Watch(0.0), [Sight(5, True), *[Sight(5, True, WAITS)] * POLLS])
    assert hung == "deadlock"
    assert took_s == pytest.approx(PROOF_S)
    assert PROOF_S <= 0.25


def test_one_poll_less_proves_nothing() -> None:
    assert looks(Watch(0.0), [Sight(5, True), *[Sight(5, True, WAITS)] * (POLLS - 1), Sight(5, True)])[0] == ""


@pytest.mark.parametrize(
    "disturbing",
    [
        pytest.param(Sight(5, True), id="a thread waits for something else"),
        pytest.param(Sight(6, True, WAITS), id="it used the CPU"),
        pytest.param(Sight(5, True, ((10, 3), (11, 8))), id="a thread has run in between"),
        pytest.param(Sight(5, True, (*WAITS, (12, 1))), id="a thread was started"),
    ],
)
def test_whatever_speaks_against_it_begins_the_proof_anew(disturbing: Sight) -> None:
    waiting = [Sight(5, True, WAITS)] * (POLLS - 1)
    assert looks(Watch(0.0), [Sight(5, True), *waiting, disturbing, *waiting])[0] == ""


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_what_goes_on_is_never_given_up_and_looked_at_ever_more_rarely(sleeps: list[bool]) -> None:
    watch, now_s, waits = Watch(0.0), 0.0, []
    for ticks, is_asleep in enumerate(sleeps):
        following = watch.take(Sight(ticks, is_asleep, WAITS), now_s)
        assert not following.hung
        if following.wait_s:
            waits.append(following.wait_s)
        now_s += following.wait_s
    assert waits == sorted(waits)
    assert all(FIRST_LOOK_S <= wait_s <= LOOK_S_MAX for wait_s in waits)


def test_a_sleeper_costs_two_reads_every_two_seconds() -> None:
    watch, now_s, count = Watch(0.0), 0.0, 0
    while now_s < 100.0:
        now_s += watch.take(Sight(1, True), now_s).wait_s
        count += 1
    assert count < 2 * (100.0 / LOOK_S_MAX + 6)


def stalled(*, is_alone: bool) -> tuple[str, float]:
    watch, now_s = Watch(0.0), 0.0
    while now_s < 2 * STALL_S:
        following = watch.take(Sight(1, True, None, is_alone), now_s)
        if following.hung:
            return following.hung, now_s
        now_s += following.wait_s
    return "", now_s


def test_a_child_without_cpu_time_for_long_stalls() -> None:
    hung, after_s = stalled(is_alone=True)
    assert hung == "stall"
    assert STALL_S <= after_s <= STALL_S + 2 * LOOK_S_MAX


def test_a_child_that_has_processes_of_its_own_does_not_stall() -> None:
    assert stalled(is_alone=False)[0] == ""


# --- the machine -----------------------------------------------------------------------------------------------------


class Machine:
    """The core with one workload, its template ready and its children forked as asked for."""

    def __init__(self, spec: WorkloadSpec | None = None, cores: int = 1) -> None:
        self.now_s = 100.0
        self.state: State = new_state(NodeName("n1"), cores, 1 << 30, self.now_s)
        self.spec = spec or WorkloadSpec(KEY)
        self.effects: list[fx.Effect] = []
        self.take(ev.Connected(1))

    def take(self, event: ev.Event) -> list[fx.Effect]:
        effects = step(self.state, event, self.now_s)
        check_invariants(self.state)
        self.effects += effects
        for effect in effects:
            if isinstance(effect, fx.ForkChildren):
                for child in effect.children:
                    self.take(ev.ChildForked(child, 1000 + child))
        return effects

    def order(self, *ns: int, spec: WorkloadSpec | None = None, start: str = "") -> list[fx.Effect]:
        brief = JobBrief(JOB, "job", KEY, TaskOptions())
        orders = tuple(AttemptStart(AttemptId(1, n), JOB, n, 1, BlobId("f"), Payload(b"x"), (), start) for n in ns)
        return self.take(ev.AttemptsOrdered(1, orders, (spec or self.spec,), (brief,)))

    def ready(self, start: str = "fork", reason: str = "") -> int:
        """The newest template becomes ready."""
        number = self.state.last_template
        self.take(ev.TemplateReady(number, start, "setup", reason, "3.11/3.1", 50 + number, 0.5, MIB))
        self.take(ev.TemplateSeen(number, 1, MIB, 10 * MIB))
        return number

    def child_of(self, n: int) -> Child:
        return self.state.children[self.state.attempts[AttemptId(1, n)].child]

    def exited(self, child: Child, status: int = signal.SIGKILL) -> None:
        self.take(ev.ChildExited(child.id, ev.Exit(status)))
        self.take(ev.LeftoversGone())

    def succeed(self, n: int) -> None:
        child = self.child_of(n)
        self.take(ev.ChildAnswered(child.id, ev.Answer(Payload(b"1"))))
        self.exited(child, 0)

    def told(self, kind: str) -> list[fx.Observe]:
        return [effect for effect in self.effects if isinstance(effect, fx.Observe) and effect.kind == kind]


@pytest.fixture
def forked() -> Machine:
    """Attempt 1 is with a forked child and has not begun."""
    machine = Machine()
    machine.order(1)
    machine.ready()
    return machine


@pytest.mark.parametrize("is_started", [False, True])
def test_a_deadlocked_child_is_killed_and_its_attempt_has_crashed_of_it(forked: Machine, is_started: bool) -> None:
    child = forked.child_of(1)
    if is_started:
        forked.take(ev.ChildStarted(child.id))
    assert fx.SignalChild(child.id, signal.SIGKILL) in forked.take(ev.ChildHung(child.id, "deadlock"))
    forked.exited(child)
    end = forked.state.ends[AttemptId(1, 1)]
    assert end.outcome is Outcome.CRASHED
    assert end.failure is not None
    assert end.failure.cause is Cause.DEADLOCK
    assert end.failure.message == (
        "deadlocked after fork: every thread waits for a lock that no thread holds; use start='fresh'"
    )
    assert [one.label for one in forked.told("hung")] == ["fork"]
    assert forked.told("crash") == []


def test_a_stall_counts_before_the_tasks_code_runs_and_not_after() -> None:
    for is_started in (False, True):
        machine = Machine()
        machine.order(1)
        machine.ready()
        child = machine.child_of(1)
        if is_started:
            machine.take(ev.ChildStarted(child.id))
        killed = fx.SignalChild(child.id, signal.SIGKILL) in machine.take(ev.ChildHung(child.id, "stall"))
        assert killed is not is_started


def test_what_is_being_ended_or_has_answered_is_left_alone(forked: Machine) -> None:
    child = forked.child_of(1)
    forked.take(ev.CancelOrdered((AttemptId(1, 1),), 1.0))
    assert forked.take(ev.ChildHung(child.id, "deadlock")) == []
    forked.exited(child)
    assert forked.take(ev.ChildHung(child.id, "deadlock")) == []
    assert forked.state.ends[AttemptId(1, 1)].outcome is Outcome.CANCELLED


def test_a_rerun_that_deadlocks_as_well_says_so_without_blaming_the_fork() -> None:
    machine = Machine()
    machine.order(1, start="fresh")
    machine.take(ev.TemplateReady(machine.state.last_template, "fork", "start", "", "", 60, 0.1, MIB))
    (child,) = machine.state.children.values()
    machine.take(ev.ChildForked(child.id, 70))
    machine.take(ev.ChildIdle(child.id))
    machine.take(ev.ChildHung(child.id, "deadlock"))
    machine.exited(child)
    failure = machine.state.ends[AttemptId(1, 1)].failure
    assert failure is not None
    assert failure.message == "deadlocked: every thread waits for a lock that no thread holds"


# --- templates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "kind"),
    [
        (ev.TemplateSeen(1, 1, 0, 100 * MIB), ""),
        (ev.TemplateSeen(1, 2, 0, 100 * MIB), "threads"),
        (ev.TemplateSeen(1, 1, GIB, 100 * MIB), ""),
        (ev.TemplateSeen(1, 1, 0, 100 * MIB + GROWTH_BYTES_MIN), ""),
        (ev.TemplateSeen(1, 1, 0, 101 * MIB + GROWTH_BYTES_MIN), "memory"),
    ],
)
def test_a_template_drifts_by_threads_and_by_memory_of_its_own(seen: ev.TemplateSeen, kind: str) -> None:
    assert drift(ev.TemplateSeen(1, 1, 0, 100 * MIB), seen)[0] == kind


def test_a_large_template_may_grow_by_a_fifth() -> None:
    sealed = ev.TemplateSeen(1, 1, 0, 10 * GIB)
    assert drift(sealed, ev.TemplateSeen(1, 1, 0, 11 * GIB)) == ("", "")
    assert drift(sealed, ev.TemplateSeen(1, 1, 0, 13 * GIB))[0] == "memory"


def test_a_template_that_drifted_is_replaced_and_its_running_child_finishes(forked: Machine) -> None:
    first = forked.state.last_template
    running = forked.child_of(1)
    idle = [c for c in forked.state.children.values() if c is not running]
    assert idle
    effects = forked.take(ev.TemplateSeen(first, 2, MIB, 10 * MIB))
    assert {e.child for e in effects if isinstance(e, fx.StopChild)} == {c.id for c in idle}
    assert fx.StopTemplate(first) not in effects
    assert [one.label for one in forked.told("template_replaced")] == ["threads"]
    for child in idle:
        forked.take(ev.ChildExited(child.id, ev.Exit(0)))
    forked.order(2)
    second = forked.state.last_template
    assert second == first + 1
    assert fx.StopTemplate(first) not in forked.effects
    forked.succeed(1)
    assert fx.StopTemplate(first) in forked.effects
    forked.ready()
    assert forked.child_of(2).template == second
    forked.take(ev.TemplateExited(first))
    forked.succeed(2)
    assert forked.state.ends[AttemptId(1, 1)].outcome is forked.state.ends[AttemptId(1, 2)].outcome is Outcome.SUCCEEDED


def test_a_template_is_replaced_a_few_times_only_and_then_it_is_said(forked: Machine) -> None:
    for _ in range(REPLACED_MAX + 1):
        number = forked.state.last_template
        forked.take(ev.TemplateSeen(number, 2, MIB, 10 * MIB))
        if forked.state.last_template != number:
            forked.ready()
    assert len(forked.told("template_replaced")) == REPLACED_MAX
    (note,) = report_of(forked.state.workloads[KEY]).notes
    assert "is kept although it has 2 threads" in note


def test_a_template_whose_children_hang_is_replaced() -> None:
    machine = Machine(WorkloadSpec(KEY, start="fork"), cores=HUNG_MAX)
    machine.order(*range(HUNG_MAX))
    machine.ready()
    for n in range(HUNG_MAX):
        assert machine.told("template_replaced") == []
        machine.take(ev.ChildHung(machine.child_of(n).id, "deadlock"))
    assert [one.label for one in machine.told("template_replaced")] == ["hung"]


def test_a_template_in_use_is_looked_at_now_and_then_and_its_memory_reported(forked: Machine) -> None:
    forked.now_s += IDLE_CHILD_S
    assert fx.LookAtTemplate(forked.state.last_template) in forked.take(ev.Ticked())
    forked.take(ev.TemplateSeen(forked.state.last_template, 1, 5 * MIB, 11 * MIB))
    (template,) = report_of(forked.state.workloads[KEY]).templates
    assert (template.shared_bytes, template.private_bytes) == (5 * MIB, 11 * MIB)


# --- workloads -------------------------------------------------------------------------------------------------------

DEMOTED = WorkloadSpec(KEY, demoted="two of its forked children died")


def test_the_verdict_moves_waiting_attempts_to_fresh_interpreters_and_lets_running_ones_finish() -> None:
    machine = Machine(cores=2)
    machine.order(1)
    template = machine.ready()
    machine.order(spec=DEMOTED)
    report = report_of(machine.state.workloads[KEY])
    assert (report.start_method, report.demoted, report.reason) == ("fresh", DEMOTED.demoted, DEMOTED.demoted)
    assert [one.text for one in machine.told("demoted")] == ["workload 'auto': two of its forked children died"]
    effects = machine.order(2)
    assert [e for e in effects if isinstance(e, fx.SpawnFresh)]
    assert not [e for e in machine.effects if isinstance(e, fx.StopTemplate)]
    for child in [c for c in machine.state.children.values() if c.template == template and c.attempt is None]:
        machine.take(ev.ChildExited(child.id, ev.Exit(0)))
    machine.succeed(1)
    assert fx.StopTemplate(template) in machine.effects
    assert machine.state.retiring == {}


def test_the_verdict_reaches_attempts_whose_template_is_still_building() -> None:
    machine = Machine()
    machine.order(1)
    template = machine.state.last_template
    effects = machine.order(spec=DEMOTED)
    assert fx.StopTemplate(template) in effects
    assert [e for e in effects if isinstance(e, fx.SpawnFresh)]
    machine.take(ev.TemplateReady(template, "fork", "setup", "", "3.11/3.1", 50, 0.5, MIB))
    assert report_of(machine.state.workloads[KEY]).start_method == "fresh"


def test_a_node_that_meets_a_demoted_workload_builds_no_template_for_it() -> None:
    machine = Machine(DEMOTED)
    effects = machine.order(1)
    assert [e.workload for e in effects if isinstance(e, fx.StartTemplate)] == [None]
    assert [e for e in effects if isinstance(e, fx.SpawnFresh)]


def test_the_verdict_is_told_once_and_binds_auto_alone() -> None:
    machine = Machine()
    machine.order(1)
    machine.order(spec=DEMOTED)
    assert machine.order(spec=DEMOTED) == []
    insists = Machine(WorkloadSpec(KEY, start="fork"))
    insists.order(1)
    insists.ready()
    insists.order(spec=WorkloadSpec(KEY, start="fork", demoted="no"))
    assert report_of(insists.state.workloads[KEY]).start_method == "fork"


def test_where_the_kernel_denies_the_proof_each_workload_that_forks_says_so(forked: Machine) -> None:
    for _ in range(2):
        forked.take(ev.OracleDenied("/proc/PID/syscall is not readable here"))
    (note,) = report_of(forked.state.workloads[KEY]).notes
    assert note.startswith("deadlocks of forked children cannot be proved on n1: /proc/PID/syscall")
    assert len(forked.told("oracle_off")) == 1


def test_what_forbids_a_fork_is_counted_by_rule_and_told_in_words() -> None:
    machine = Machine()
    machine.order(1)
    number = machine.state.last_template
    findings = (AuditFinding("R2", "a thread"), AuditFinding("R7", "a pipe", verdict="note"), AuditFinding("R2", "two"))
    machine.take(ev.TemplateStepped(number, AuditStep("setup", verdict="unsafe", findings=findings)))
    machine.ready("fresh", "after 'setup': a thread of a pool")
    assert [(one.label, one.text) for one in machine.told("fork_unsafe")] == [
        ("R2", "after 'setup': a thread of a pool")
    ]


def test_an_order_that_the_verdict_overtook_does_not_undo_it() -> None:
    machine = Machine(DEMOTED)
    machine.order(1)
    machine.order(2, spec=WorkloadSpec(KEY))
    assert report_of(machine.state.workloads[KEY]).demoted == DEMOTED.demoted
    assert [e.workload for e in machine.effects if isinstance(e, fx.StartTemplate)] == [None]
