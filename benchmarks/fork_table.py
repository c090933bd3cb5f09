"""`make fork-table`: does fork work with the libraries people use, in their current versions? Asked of the libraries.

Each row of the table is a library, imported or also used in the template (`fork_cases.py`). For each of them:

- *naively*: a throw-away process imports it, uses it and forks children at once, with nothing done about it; each does
  the work of a task. How they end (ok, hang at the time limit, signal, exception) is what a plain `os.fork` gives.
- under Herder's `start="auto"`: a cluster of its own, N tasks which do the same work and check its result. Counted are
  tasks, seconds, start methods, failures. Tasks that do not end within the stall limit are a hang, and the end of the
  row. A row which takes longer than its budget is stopped and says how many tasks it ran.

The table replaces what is between the markers in docs/FORK_SAFETY.md, when all rows were measured. Exit status 1 when a
row has hung or failed tasks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import fork_cases
from fork_cases import Case

import herder
from herder_shared.wire.messages import AuditFinding, WorkloadReport

PAGE = Path(__file__).resolve().parent.parent / "docs" / "FORK_SAFETY.md"
BEGIN, END = "<!-- fork-table: begin -->", "<!-- fork-table: end -->"
#: Tasks that are waited for together.
CHUNK_TASKS = 50
#: A naive child that used no processor time for so long hangs.
NAIVE_LIMIT_S = 5.0
#: A template that is being built may take so long on a busy machine: it is no hang of the task that waits for it.
BUILD_S = 300.0
#: Not distributions, but parts of the interpreter.
STANDARD = ("sqlite3", "asyncio", "ThreadPoolExecutor")


class Options(NamedTuple):
    """How to measure."""

    python: str
    tasks: int
    #: Of a row's tasks, in s.
    budget_s: float
    #: While no task ends for so long, those that are left hang.
    stall_s: float
    forks: int
    cores: int


class Row(NamedTuple):
    """One line of the table."""

    name: str
    library: str
    version: str
    state: str
    verdict: str
    start: str
    fork_point: str
    setup_mode: str
    why: list[dict[str, str]]
    applied: list[str]
    demoted: str
    naive: list[str]
    tasks: int
    seconds: float
    failures: list[str]
    hangs: int
    methods: dict[str, int]
    reason: str = ""

    @property
    def is_good(self) -> bool:
        """All tasks did their work."""
        return not self.failures and not self.hangs


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="rows to measure (default: all; only then is the page written)")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has the libraries")
    parser.add_argument("--tasks", type=int, default=1_000, help="tasks of each row")
    parser.add_argument("--budget", type=float, default=600.0, help="s of each row's tasks; then it is stopped")
    parser.add_argument("--stall", type=float, default=60.0, help="s without any task's end: a hang")
    parser.add_argument("--forks", type=int, default=3, help="naive children of each row")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--json", type=Path, help="also write all that was seen to this file; rows not measured now are kept"
    )
    parser.add_argument("--write", action="store_true", help="write the page, also with some rows only")
    given = parser.parse_args()
    unknown = set(given.names) - {case.name for case in fork_cases.CASES}
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    options = Options(given.python, given.tasks, given.budget, given.stall, given.forks, given.cores)
    rows: list[Row] = []
    for row in measure_all([each for each in fork_cases.CASES if each.name in given.names or not given.names], options):
        rows.append(row)
        if given.json:  # after each, so that nothing is lost
            given.json.write_text(json.dumps([each._asdict() for each in with_earlier(rows, given.json)], indent=1))
    if given.json:
        rows = with_earlier(rows, given.json)
    text = page_text(rows, options)
    if given.write or not given.names:
        write(text)
    print(text)
    bad = [row.name for row in rows if not row.is_good]
    if bad:
        print(f"hung or failed under auto: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


def with_earlier(rows: Sequence[Row], file: Path) -> list[Row]:
    """These rows, and those of an earlier run in that file, in the order of the cases."""
    found = {row["name"]: Row(**row) for row in json.loads(file.read_text())} if file.exists() else {}
    found |= {row.name: row for row in rows}
    return [found[case.name] for case in fork_cases.CASES if case.name in found]


def measure_all(cases: Sequence[Case], options: Options) -> Iterator[Row]:
    """One row after the other; those whose library is not installed are left out, and said so."""
    versions = versions_of({case.library for case in cases}, options.python)
    with tempfile.TemporaryDirectory(prefix="fork-table-") as folder, servers(options.python, folder) as addresses:
        for case in cases:
            if not versions.get(case.library):
                print(f"{case.name}: left out, {case.library} is not installed", file=sys.stderr)
                continue
            own = Path(folder, case.name)
            own.mkdir()
            env = addresses | {fork_cases.FOLDER_VARIABLE: str(own), **dict(case.env)}
            began = time.perf_counter()
            row = measure(case, versions[case.library], env, options)
            print(summary(row, time.perf_counter() - began), file=sys.stderr, flush=True)
            yield row


def versions_of(libraries: set[str], python: str) -> dict[str, str]:
    """Versions under that interpreter; "" where one is not installed."""
    code = (
        "import json, sys, platform, sqlite3\n"
        "from importlib.metadata import version, PackageNotFoundError\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = version(name)\n"
        "    except PackageNotFoundError: found[name] = ''\n"
        "found.update(sqlite3=sqlite3.sqlite_version)\n"
        "found.update(dict.fromkeys(('asyncio', 'ThreadPoolExecutor'), platform.python_version()))\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([python, "-c", code, *sorted(libraries)], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


@contextmanager
def servers(python: str, folder: str) -> Iterator[dict[str, str]]:
    """The servers that sessions and channels are connected to, as environment variables."""
    with subprocess.Popen(
        [python, fork_cases.__file__, "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {fork_cases.FOLDER_VARIABLE: folder},
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            yield json.loads(server.stdout.readline())
        finally:
            server.stdin.close()


def measure(case: Case, version: str, env: dict[str, str], options: Options) -> Row:
    """Both halves of one row."""
    naive = fork_naively(case, env, options)
    workload = herder.Workload(
        case.name,
        python=options.python,
        preload=("fork_cases", *case.preload),
        setup=f"fork_cases:{case.setup.__name__}" if case.setup is not None else None,
        env=env,
    )
    with herder.LocalCluster(cores=options.cores) as cluster, cluster.client(workload=workload) as client:
        began = time.perf_counter()
        done, failures, hangs, methods = run_tasks(client, case, options)
        seconds = time.perf_counter() - began
        report = report_of(client, case)
    steps = [step for step in report.steps if step.step not in ("canary", "seal", "ready")]
    bad = [step for step in report.steps if step.verdict == "unsafe"]
    verdict = bad[-1].verdict if bad else steps[-1].verdict if steps else "?"
    findings = [finding for step in bad[-1:] for finding in step.findings if finding.verdict == "unsafe"]
    return Row(
        name=case.name,
        library=case.library,
        version=version,
        state=case.state,
        verdict=verdict,
        start=report.start_method,
        fork_point=report.fork_point,
        setup_mode=report.setup_mode,
        why=[encoded(finding) for finding in findings],
        applied=sorted({cure for step in report.steps for cure in step.applied}),
        reason=report.reason,
        demoted=report.demoted,
        naive=naive,
        tasks=done,
        seconds=seconds,
        failures=failures,
        hangs=hangs,
        methods=dict(methods),
    )


def fork_naively(case: Case, env: dict[str, str], options: Options) -> list[str]:
    """How the children of a plain fork end, each; the libraries' own defaults, no environment of ours."""
    command = [options.python, fork_cases.__file__, case.name, str(options.forks), str(NAIVE_LIMIT_S)]
    limit_s = 60 + 12 * NAIVE_LIMIT_S
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, env=os.environ | env, check=False
        )
    except subprocess.TimeoutExpired:
        return ["the parent hangs"]
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return [f"the parent ended with status {done.returncode}"]
    ends: list[str] = json.loads(lines[-1])
    return ends


def run_tasks(client: herder.Client, case: Case, options: Options) -> tuple[int, list[str], int, Counter[str]]:
    """Tasks that ended well, failures, tasks that hang, start methods."""
    done, failures, methods = 0, list[str](), Counter[str]()
    began = time.perf_counter()
    # A first one alone, so that the time of a template that has to be built is not taken for a hang.
    for first in (0, *range(1, options.tasks, CHUNK_TASKS)):
        count = min(CHUNK_TASKS, options.tasks - first) if first else 1
        job = client.array(fork_cases.task, [case.name] * count, range(first, first + count))
        if not await_end(job, options.stall_s if first else max(BUILD_S, options.stall_s)):
            progress = job.progress()
            job.cancel()
            return done + progress.succeeded, failures, count - progress.ended, methods
        for future in job.as_completed():
            error = future.exception()
            if error is None:
                done += 1
            else:
                failures.append(f"{type(error).__name__}: {error}")
            methods[future.usage().start_method] += 1
        if len(failures) > CHUNK_TASKS or time.perf_counter() - began > options.budget_s:
            break
    return done, failures, 0, methods


def await_end(job: herder.Job, stall_s: float) -> bool:
    """Whether it ends; not when for so long no task of it did."""
    ended = -1
    while ended < (ended := job.progress().ended):
        if job.wait(stall_s):
            return True
    return False


def report_of(client: herder.Client, case: Case) -> WorkloadReport:
    """What the one node says of the workload."""
    found = [report for each in client.workloads() if each.name == case.name for report in each.reports.values()]
    return found[0]


def encoded(finding: AuditFinding) -> dict[str, str]:
    """As JSON."""
    return {"rule": finding.rule, "seen": finding.seen, "reason": finding.reason, "cure": finding.cure}


# --- the page ---------------------------------------------------------------------------------------------------------


def page_text(rows: Sequence[Row], options: Options) -> str:
    """The table, what was measured where, and the cures."""
    python = subprocess.run(
        [options.python, "-c", "import platform; print(platform.python_version())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    where = f"Python {python}, Linux {platform.release().partition('-')[0]} {platform.machine()}, {options.cores} cores"
    lines = [
        f"{where}, {time.strftime('%Y-%m-%d')}; {options.forks} naive children and {options.tasks:,} tasks a row.",
        "",
        "| library | in the template | audit | forks after | naive `os.fork` | tasks under `auto` |",
        "|---|---|---|---|---|---|",
    ]
    lines += [line_of(row) for row in rows]
    cures: dict[str, list[str]] = {}
    for row in rows:
        for finding in row.why:
            text = f"{finding['rule']}, {finding['reason']}. *Cure:* {finding['cure']}"
            cures.setdefault(text, []).append(f"{row.library} ({row.state})")
    applied: dict[str, list[str]] = {}
    for row in rows:
        for cure in row.applied:
            if not cure[:1].isdigit():  # sizes are of this run
                applied.setdefault(cure, []).append(row.name)
    lines += ["", "Why not, and what to do:", ""]
    lines += [f"- {', '.join(dict.fromkeys(who))}: {text}" for text, who in cures.items()]
    lines += ["", "Cures that the template applied by itself:", ""]
    lines += [f"- {cure}: {', '.join(dict.fromkeys(who))}" for cure, who in applied.items()]
    return "\n".join(lines) + "\n"


def line_of(row: Row) -> str:
    """One line of the table."""
    seen = "; ".join(dict.fromkeys(f"{each['rule']} {each['seen']}" for each in row.why))
    audit = f"{row.verdict}: {seen}" if seen else row.verdict
    point = row.fork_point if row.start == "fork" else f"- ({row.start})"
    if row.setup_mode and row.setup_mode != "forked":
        point += f"; value {row.setup_mode}"
    if row.demoted:
        point += f"; demoted: {row.demoted}"
    methods = ", ".join(f"{count:,} {method}" for method, count in row.methods.items())
    tasks = f"{row.tasks:,} ok in {row.seconds:.0f} s ({methods})"
    if row.hangs:
        tasks = f"**{row.hangs} HANG**, {tasks}"
    if row.failures:
        tasks = f"**{len(row.failures)} failed** ({row.failures[0].splitlines()[0][:80]}), {tasks}"
    cells = (f"{row.library} {row.version}", row.state, audit, point, naive_text(row.naive), tasks)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def naive_text(ends: Sequence[str]) -> str:
    """ "ok", or how many ended how."""
    counts = Counter(ends)
    if set(counts) == {"ok"}:
        return "ok"
    return ", ".join(
        f"**{end}** {count} of {len(ends)}" if end != "ok" else f"{count} ok" for end, count in counts.items()
    )


def summary(row: Row, took_s: float) -> str:
    """What a terminal shows of a row."""
    bad = f" FAILED {row.failures[0][:300]}" if row.failures else f" {row.hangs} HANG" if row.hangs else ""
    if row.start == "fresh":
        bad += f" FRESH: {row.reason}"
    return (
        f"{row.name}: {row.verdict}, {row.start} after {row.fork_point!r} {row.setup_mode}, naive "
        f"{naive_text(row.naive)}, {row.tasks} tasks in {row.seconds:.1f} s{bad} [{took_s:.0f} s]"
    )


def write(text: str) -> None:
    """Put the table between the page's markers."""
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise SystemExit(f"{PAGE} lacks the markers {BEGIN} and {END}")
    PAGE.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
