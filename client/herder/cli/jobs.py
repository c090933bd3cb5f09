"""`herder jobs`, `job`, `wait`, `cancel`, `retry`, `logs`: what became of what was submitted."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from herder.cli.main import EXIT_FAILED
from herder.cli.output import counted, escape_controls, format_duration, print_json, print_table, say, write_output
from herder.cli.session import cluster_options, connected
from herder_shared.ids import JobId, parse_task_id
from herder_shared.states import Outcome, TaskState
from herder_shared.wire.messages import JobInfo, TaskInfo

if TYPE_CHECKING:
    from herder import Future, Job

#: Tasks that `herder job` lists without `--all`: those that did not succeed come first.
TASKS_SHOWN_MAX = 20
#: Tasks of each state that `herder job --explain` explains when none is named.
EXPLAINED_OF_EACH = 3


@click.command()
@click.option("--all", "show_all", is_flag=True, help="Ended jobs too.  [default: only if nothing else is there]")
@cluster_options
def jobs(show_all: bool, profile: str | None, as_json: bool) -> None:
    """List the jobs."""
    with connected(profile) as client:
        found = list(client.jobs())
    if as_json:
        print_json(found)
        return
    current = [info for info in found if info.state in ("open", "running")]
    shown = found if show_all or not current else current
    print_table(
        ("job", "name", "owner", "state", ">tasks", ">ended", ">failed", ">age"), map(job_row, shown), empty="no jobs"
    )
    if len(shown) < len(found):
        say(f"{len(found) - len(shown)} ended jobs not shown: herder jobs --all")


def job_row(info: JobInfo) -> tuple[str, ...]:
    """One line of `herder jobs`."""
    return (
        info.job,
        info.name,
        info.owner,
        state_of(info),
        str(info.tasks),
        str(info.counts.get(TaskState.ENDED, 0)),
        str(failed_count(info)),
        format_duration(info.age_s),
    )


def state_of(info: JobInfo) -> str:
    """Its state; and that it is paused, while that holds something back."""
    return f"{info.state}, paused" if info.paused and info.state in {"open", "running"} else info.state


def failed_count(info: JobInfo) -> int:
    """Tasks that ended otherwise than well."""
    return sum(count for outcome, count in info.outcomes.items() if outcome is not Outcome.SUCCEEDED)


@click.command()
@click.argument("what", metavar="ID[.TASK]")
@click.option("--all", "show_all", is_flag=True, help="List every task.")
@click.option("--explain", is_flag=True, help="Why tasks wait, run where they run, or ended as they did.")
@cluster_options
def job(what: str, show_all: bool, explain: bool, profile: str | None, as_json: bool) -> None:
    """Show one job, or with --explain one task of it."""
    job_id, index = parse_job_or_task(what)
    if index is not None and not explain:
        raise click.UsageError(f"herder job shows jobs: leave out .{index}, or ask for --explain")
    with connected(profile) as client:
        if explain:
            explain_tasks(client.job(job_id), index, as_json=as_json)
            return
        found = client.job(job_id)
        info, tasks = found.status(), list(found.tasks())
    if as_json:
        print_json({"job": info, "tasks": tasks})
        return
    rows = [
        ("job", info.job),
        ("name", info.name),
        ("owner", info.owner),
        ("workload", info.workload),
        ("state", state_of(info)),
        ("priority", str(info.priority)),
        ("age", format_duration(info.age_s)),
        ("tasks", counted(info.counts)),
        ("ended", counted(info.outcomes)),
    ]
    print_table(("what", "is"), rows)
    shown = tasks if show_all else interesting(tasks)
    print_table(("task", "state", "outcome", "node", ">attempts"), map(task_row, shown))
    if len(shown) < len(tasks):
        say(f"{len(tasks) - len(shown)} more tasks: herder job {info.job} --all")


def explain_tasks(found: Job, index: int | None, *, as_json: bool) -> None:
    """One task; or of each kind of answer the first task, with the number of those that show the same."""
    asked = [task.index for task in telling(found.tasks())] if index is None else [index]
    told = [found.explain(each) for each in asked]
    if as_json:
        print_json(told[0] if index is not None else told)
        return
    for each in told:
        click.echo(escape_controls(str(each)))
    left = found.status().tasks - len(told)
    if index is None and left > 0:
        say(f"{left} more tasks: herder job {found.id}.TASK --explain")
    if not told:
        say("the job has no tasks yet")


def telling(tasks: Iterable[TaskInfo]) -> list[TaskInfo]:
    """The first few of each state and outcome: those that wait first, then those that ended badly."""
    groups: dict[tuple[int, str], list[TaskInfo]] = {}
    for task in tasks:
        rank = 1 if task.outcome is not None else 0
        rank += task.outcome is Outcome.SUCCEEDED
        kept = groups.setdefault((rank, task.outcome or task.state), [])
        if len(kept) < EXPLAINED_OF_EACH:
            kept.append(task)
    return [task for key in sorted(groups) for task in groups[key]]


def interesting(tasks: Iterable[TaskInfo]) -> list[TaskInfo]:
    """The first few, those that did not end well before all others, then those that run."""

    def rank(task: TaskInfo) -> tuple[int, int]:
        if task.outcome is not None and task.outcome is not Outcome.SUCCEEDED:
            return 0, task.index
        return (1 if task.state is TaskState.RUNNING else 2), task.index

    return sorted(tasks, key=rank)[:TASKS_SHOWN_MAX]


def task_row(task: TaskInfo) -> tuple[str, ...]:
    """One line of `herder job`'s tasks."""
    return str(task.index), task.state, task.outcome or "-", task.node or "-", str(task.attempts)


@click.command()
@click.argument("job_id", metavar="ID")
@click.option("--timeout", type=float, metavar="SECONDS", help="Give up after this long, with status 3.")
@cluster_options
def wait(job_id: str, timeout: float | None, profile: str | None, as_json: bool) -> None:
    """Wait until a job has ended.

    The exit status is 0 when all tasks succeeded, 1 when some did not. Ctrl-C leaves the job alone.
    """
    with connected(profile, patient=True) as client:
        found = client.job(JobId(job_id))
        ended = found.wait(timeout, progress=not as_json and sys.stdout.isatty())
        info = found.status()
    if as_json:
        print_json(info)
    elif not ended:
        say(f"{info.job} has not ended after {format_duration(timeout)}: {progress_text(info)}")
    else:
        click.echo(f"{info.job} {info.state}: {progress_text(info)}")
    if not ended:
        sys.exit(3)
    if failed_count(info):
        sys.exit(EXIT_FAILED)


def progress_text(info: JobInfo) -> str:
    """How far it is, in words."""
    ended = info.counts.get(TaskState.ENDED, 0)
    failed = failed_count(info)
    return f"{ended} of {info.tasks} tasks ended" + (f", {failed} not well" if failed else "")


@click.command()
@click.argument("what", metavar="ID[.TASK]", nargs=-1, required=True)
@cluster_options
def cancel(what: tuple[str, ...], profile: str | None, as_json: bool) -> None:
    """Cancel jobs, or single tasks of them. What runs gets SIGTERM, then SIGKILL."""
    with connected(profile) as client:
        for text in what:
            job_id, index = parse_job_or_task(text)
            found = client.job(job_id)
            if index is None:
                found.cancel()
            else:
                found.future(index).cancel()
    if as_json:
        print_json({"cancelled": what})
    else:
        click.echo(f"cancelled: {' '.join(what)}")


@click.command()
@click.argument("job_id", metavar="ID")
@cluster_options
def retry(job_id: str, profile: str | None, as_json: bool) -> None:
    """Run a job's failed tasks again."""
    with connected(profile) as client:
        count = client.job(job_id).retry_failed()
    if as_json:
        print_json({"job": job_id, "retried": count})
    else:
        click.echo(
            f"{count} failed tasks of job {job_id} are run again" if count else f"no task of job {job_id} has failed"
        )


def parse_job_or_task(text: str) -> tuple[JobId, int | None]:
    """Read `JOB` or `JOB.TASK`.

    Raises:
        click.BadParameter: it is neither.
    """
    if "." not in text:
        return JobId(text), None
    try:
        return parse_task_id(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@click.argument("job_id", metavar="ID")
@click.argument("index", metavar="[TASK]", type=int, required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended: each task's output when it ends.")
@cluster_options
def logs(job_id: str, index: int | None, follow: bool, profile: str | None, as_json: bool) -> None:
    """Show what a job's tasks wrote, or one task of it.

    Standard output and standard error of a task go to those of this command.
    """
    if "." in job_id and index is None:
        job_id, index = parse_job_or_task(job_id)
    with connected(profile, patient=follow) as client:
        found = client.job(JobId(job_id))
        if follow and index is None:
            follow_logs(found, as_json=as_json)
            return
        if follow:
            found.wait()
        indices = [index] if index is not None else [t.index for t in found.tasks() if t.state is TaskState.ENDED]
        for each in indices:
            show_logs(found.logs(each), each, as_json=as_json, titled=index is None and len(found) > 1)


def follow_logs(found: Job, *, as_json: bool) -> None:
    """The tasks' output, each whole, in the order in which they end."""
    for future in found.as_completed():
        show_logs(logs_of(future, found), future.index, as_json=as_json, titled=len(found) > 1)


def logs_of(future: Future[Any], found: Job) -> Any:
    """A cancelled task's output comes from the coordinator; an ended one's came with its end."""
    return found.logs(future.index) if future.cancelled() else future.logs()


def show_logs(content: Any, index: int, *, as_json: bool, titled: bool) -> None:
    """One task's output; with a title on stderr when there are several."""
    if as_json:
        record = {
            "task": index,
            "stdout": content.stdout.decode("utf-8", "replace"),
            "stderr": content.stderr.decode("utf-8", "replace"),
            "truncated": content.truncated,
        }
        print_json(record)
        return
    if titled:
        say(f"--- task {index}")
    write_output(content.stdout)
    write_output(content.stderr, stderr=True)
    if content.truncated:
        say(f"--- task {index}: the middle was left out")
