"""Templates that are forks of other templates: which, when, and how long. Replicas and trees are the two kinds.

**Trees.** A workload whose steps begin with all of another's, in the same interpreter and environment, has its template
forked from that one's when it is ready: what was imported is not imported again, and its memory is shared. The other
must have no setup, as its value is not this workload's, and must leave no step to its children.

**Replicas.** A template forks on one core. A workload that ends tasks faster than its template forks gets another
template, a fork of the first; each child is asked of the one that has the fewest. The rule: `IN_WANT` attempts or more
have waited through as many forks as there are slots, and `FORKS` at least. Each of them holds a slot, so that many
cores were without work all the while; and a burst's beginning, which one fork for each slot satisfies, is over by then.
Short tasks that are forked with their children (`launchers`) count too, and for them there are more templates, one for
`BRIEF_CORES_EACH` cores and two at least: what such a task takes is its template's fork for the most part, and two of
them fork a third more on two cores than one does, as each stays with its children in the caches of its own.
One template for `CORES_EACH` cores at most: fewer cores cannot end tasks faster than one forks.

**Life.** A branch dies with its parent. So a template is not given up as idle, nor stopped when it retires, while it
has branches; those of one that retires, retire with it. A tree that does not come, or ends as it is built, is exec'd
instead, which is not counted as a failure; a replica that does not come is done without.
"""

from __future__ import annotations

from math import ceil

from herder_agent.core import launchers, values
from herder_agent.core.effects import BranchTemplate, Effect, ForkChildren, ReportWorkload, StopTemplate
from herder_agent.core.state import Pool, State, Template, TemplateState, Workload

CORES_EACH = 8
#: ... of short tasks that come with their fork, where each core can use up most of what a template forks.
BRIEF_CORES_EACH = 4
IN_WANT = 8
FORKS = 64


def stem_for(state: State, workload: Workload) -> Template | None:
    """The template to fork this workload's from: of those that fit the one with most preloads."""
    if workload.has_no_parent or workload.spec.kind != "python":
        return None
    best: Template | None = None
    best_length = 0
    for other in state.workloads.values():
        template, length = other.template, len(other.spec.preload)
        if other is workload or template is None or template.state is not TemplateState.READY or length <= best_length:
            continue
        if _extends(workload, other):
            best, best_length = template, length
    return best


def _extends(workload: Workload, other: Workload) -> bool:
    """Whether all steps of `other` are the first of `workload`'s, which has more, and nothing else could differ."""
    new, old = workload.spec, other.spec
    length = len(old.preload)
    return (
        length > 0
        and tuple(new.preload[:length]) == tuple(old.preload)
        and (len(new.preload) > length or workload.has_setup)
        and not other.has_setup
        and not other.demoted
        and other.method == "fork"
        and other.fork_point == f"import {old.preload[-1]}"
        and (new.kind, new.python, new.prologue, new.working_dir)
        == (old.kind, old.python, old.prologue, old.working_dir)
        and tuple(new.paths) == tuple(old.paths)
        and tuple(new.allow_threads) == tuple(old.allow_threads)
        and dict(new.env) == dict(old.env)
    )


def branch(state: State, workload: Workload, parent: Template, now_s: float, effects: list[Effect]) -> Template:
    """Have `parent` fork a template for `workload`."""
    state.last_template += 1
    template = Template(state.last_template, workload, now_s, parent=parent.id)
    state.templates[template.id] = template
    effects.append(BranchTemplate(template.id, parent.id, workload.spec))
    return template


def has_branches(state: State, template: Template) -> bool:
    """Whether processes would die with this one that are no children of its own."""
    return any(other.parent == template.id for other in state.templates.values())


def branches_of(state: State, template: Template) -> list[Template]:
    """Templates that are forks of this one."""
    return [other for other in state.templates.values() if other.parent == template.id]


# --- replicas --------------------------------------------------------------------------------------------------------


def note_fork(pool: Pool) -> None:
    """A forked child has come."""
    pool.in_want = pool.in_want + 1 if len(pool.waiting) >= IN_WANT else 0


def note_brief(pool: Pool) -> None:
    """A task has come with its child and ended with it: of such, most of the time is the fork's."""
    pool.in_want += 1


def look_for_want(state: State, pool: Pool, now_s: float, effects: list[Effect], is_brief: bool = False) -> None:
    """Add a replica where the templates there are do not suffice."""
    workload, cores = pool.workload, state.slots.total.cores
    most = min(cores, max(2, ceil(cores / BRIEF_CORES_EACH))) if is_brief else ceil(cores / CORES_EACH)
    if pool.in_want < max(FORKS, cores):
        return
    pool.in_want = 0
    if len(workload.templates) >= most or workload.has_no_replicas:
        return
    if workload.template is None or any(each.state is not TemplateState.READY for each in workload.templates):
        return
    replica = branch(state, workload, workload.template, now_s, effects)
    workload.replicas.append(replica)
    values.limit_setup(state, replica, now_s)
    effects.append(ReportWorkload(launchers.report_of(workload)))


def order_children(state: State, pool: Pool, count: int, effects: list[Effect]) -> None:
    """Ask for so many children, each of the template that has the fewest."""
    ready = [each for each in pool.workload.templates if each.state is TemplateState.READY]
    asked: dict[int, list[int]] = {}
    for _ in range(count):
        template = min(ready, key=lambda each: each.children)
        asked.setdefault(template.id, []).append(launchers.new_child(state, pool, template).id)
    effects.extend(ForkChildren(template, tuple(children)) for template, children in asked.items())


def retire_replicas(state: State, workload: Workload) -> None:
    """They are not needed now: none forks any more, and each is stopped when its children have ended."""
    for replica in workload.replicas:
        state.retiring[replica.id] = replica
    workload.replicas = []


def ready(state: State, replica: Template, effects: list[Effect]) -> None:
    """It forks children from now on."""
    workload = replica.workload
    assert workload is not None
    replica.state = TemplateState.READY
    effects.append(ReportWorkload(launchers.report_of(workload)))
    launchers.touch(state, workload.pool("fork"))


def replica_gone(state: State, replica: Template, effects: list[Effect]) -> bool:
    """It has ended, or will not come. False if it is none."""
    workload = replica.workload
    if workload is None or replica not in workload.replicas:
        return False
    workload.replicas.remove(replica)
    if replica.state is not TemplateState.READY:
        workload.has_no_replicas = True
    for pool in workload.pools.values():
        launchers.touch(state, pool)
    effects.append(ReportWorkload(launchers.report_of(workload)))
    return True


# --- ends ------------------------------------------------------------------------------------------------------------


def not_branched(state: State, template: Template, now_s: float, effects: list[Effect]) -> None:
    """It was never there: a tree's workload starts its template without."""
    del state.templates[template.id]
    state.retiring.pop(template.id, None)
    workload = template.workload
    if replica_gone(state, template, effects) or workload is None or workload.template is not template:
        return
    begin_without(state, workload, now_s, effects)


def is_unfinished_tree(template: Template) -> bool:
    """It has been forked from another workload's template, and has neither become ready nor said why not."""
    return template.parent != 0 and template.state is TemplateState.STARTING


def begin_without(state: State, workload: Workload, now_s: float, effects: list[Effect]) -> None:
    """This workload's tree is gone before it was of use: exec its template."""
    workload.template = None
    workload.has_no_parent = True
    if workload.undecided:
        launchers.need_template(state, workload, now_s, effects)
    for pool in workload.pools.values():
        launchers.touch(state, pool)


def replica_overdue(state: State, replica: Template, effects: list[Effect]) -> None:
    """It was forked, and is not ready for long: do without."""
    replica.state = TemplateState.FAILED
    effects.append(StopTemplate(replica.id))
    replica_gone(state, replica, effects)
