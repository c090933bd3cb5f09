"""`full_size.py CASE...`: the faults of docs/FAULTS.md whose full size is too heavy for the tests, with real processes.

Each case builds a cluster on this machine, does to it what its row says, and is judged by what must hold whatever the
machine: nothing lost, doubled or run twice, memory bounded, nobody shut out. Figures are printed beside it.

killed     row 3: kill -9 of the coordinator with `--running` tasks running, back in 5 s; half of them end meanwhile
away       row 4: the same, back after `--away-s`
stopped    row 5: SIGSTOP of the coordinator for `--stopped-s` with tasks running, some of which end meanwhile
million    row 18: `--tasks` submitted by one owner; another one's 100 must not wait for them; then all are cancelled
reconnect  row 27: `--agents` agents (real links with TLS, no tasks) lose the coordinator at once: all in within 30 s
slow       row 30: a client that is stopped most of the time, and `--events` ends
output     row 37: a task that writes as fast as it can for `--output-s`, no newline, escapes and binary
result     row 38: a result of `--gib` GiB (the machine needs four times as much memory, and twice on its disk)
arguments  row 38: arguments of `--gib` GiB
cancelled  row 40: `--cancelled` tasks, some running and most queued, cancelled at once: as an array, and one by one

Exit status 1 when something did not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cloudpickle
from full_size_crowd import node

import herder
from herder_shared.limits import GIB, KEPT_ENDS_BYTES_MAX, LOG_HEAD_BYTES, LOG_TAIL_BYTES, MIB
from herder_shared.states import AgentState

cloudpickle.register_pickle_by_value(sys.modules[__name__])

#: For what must happen, and may take long on a machine that does much else.
WAIT_S = 900.0
RECONNECT_S = 30.0
#: What a process may grow by, beyond what a case says that it must hold.
SLACK_BYTES = 200 * MIB
REUSED = herder.Workload(max_tasks_per_child=None)


@dataclass(slots=True)
class Report:
    """What a case says: figures in the order in which they came, and what did not hold."""

    figures: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """A figure."""
        self.figures.append(text)
        print(f"    {text}", flush=True)

    def must(self, holds: bool, text: str) -> None:
        """What must hold; `text` says what did not."""
        if not holds:
            self.broken.append(text)
            print(f"    BROKEN: {text}", flush=True)


class Watch:
    """Memory and processor time of processes, looked at ten times a second in a thread of its own."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self._began = {name: self._look(pid) for name, pid in pids.items()}
        self._most = dict(self._began)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._run_once()

    def grown_bytes(self, name: str) -> int:
        """Most memory of its own so far (pages of files do not count), beyond that at the start."""
        return self._most[name][0] - self._began[name][0]

    def cpu_s(self, name: str) -> float:
        """Processor time since the start."""
        return self._most[name][1] - self._began[name][1]

    def _run(self) -> None:
        while not self._over.wait(0.1):
            self._run_once()

    def _run_once(self) -> None:
        for name, pid in self._pids.items():
            with contextlib.suppress(OSError):
                memory_bytes, cpu_s = self._look(pid)
                most_bytes, _ = self._most[name]
                self._most[name] = (max(most_bytes, memory_bytes), cpu_s)

    @staticmethod
    def _look(pid: int) -> tuple[int, float]:
        status = Path(f"/proc/{pid}/status").read_text()
        anonymous = next(line for line in status.splitlines() if line.startswith("RssAnon"))
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        return int(anonymous.split()[1]) * 1024, ticks / os.sysconf("SC_CLK_TCK")


def until(condition: Callable[[], object], what: str, wait_s: float = WAIT_S) -> float:
    """When it came true."""
    deadline_s = time.monotonic() + wait_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"waited {wait_s:g} s for: {what}")
        time.sleep(0.02)
    return time.monotonic()


# --- rows 3, 4, 5: the coordinator is away ---------------------------------------------------------------------------


def wait_for(folder: str, gate: str, n: int) -> int:
    """Say that an attempt of task `n` runs; end when the gate opens: it is a pipe that nobody writes to yet."""
    with (Path(folder) / "ran").open("a") as file:
        file.write(f"{n}\n")
    with (Path(folder) / gate).open("rb") as pipe:
        pipe.read()
    return n


class Held:
    """Tasks that run until their gate is opened. Odd ones may run once only; half end at the first gate."""

    def __init__(self, client: herder.Client, folder: Path, count: int) -> None:
        self._folder = folder
        self._count = count
        for gate in ("first", "second"):
            os.mkfifo(folder / gate)
        self._views = [client.options(idempotent=True), client.options(idempotent=False)]
        self._futures = [
            self._views[n % 2].submit(wait_for, str(folder), "first" if n // 2 % 2 else "second", n)
            for n in range(count)
        ]

    def wait_running(self) -> None:
        until(lambda: len(self.runs()) == self._count, f"all {self._count} tasks to run")

    def runs(self) -> Counter[str]:
        with contextlib.suppress(FileNotFoundError):
            return Counter((self._folder / "ran").read_text().split())
        return Counter()

    def open_gate(self, gate: str) -> None:
        """For those that wait at the pipe, and for those that come later: these find a file."""
        pipe = os.open(self._folder / gate, os.O_RDWR)
        (self._folder / "open").touch()
        (self._folder / "open").rename(self._folder / gate)
        time.sleep(1.0)  # whoever has just found the pipe has opened it by then
        os.close(pipe)

    def judge(self, report: Report) -> None:
        results = [future.result(WAIT_S) for future in self._futures]
        report.must(results == list(range(self._count)), "results are missing or wrong")
        runs = self.runs()
        again = sorted(int(n) for n, times in runs.items() if times > 1)
        once = [n for n in again if n % 2]
        report.say(f"{len(results)} results; {len(again)} tasks ran again, {len(once)} of them at-most-once ones")
        report.must(not once, f"tasks that may run once ran again: {once[:10]}")
        report.must(not again, f"tasks ran again, though no agent was lost: {again[:10]}")


@contextlib.contextmanager
def held_tasks(count: int) -> Iterator[tuple[herder.LocalCluster, herder.Client, Held]]:
    """A cluster of two agents on which so many tasks run."""
    with (
        tempfile.TemporaryDirectory(prefix="herder-full-size-") as folder,
        herder.LocalCluster(cores=count + count % 2, agents=2) as cluster,
        cluster.client() as client,
    ):
        held = Held(client, Path(folder), count)
        held.wait_running()
        yield cluster, client, held


def killed(asked: argparse.Namespace, report: Report) -> None:
    away(asked, report, 5.0)


def away(asked: argparse.Namespace, report: Report, away_s: float | None = None) -> None:
    away_s = asked.away_s if away_s is None else away_s
    start_s = time.monotonic()
    with held_tasks(asked.running) as (cluster, _, held):
        report.say(f"{asked.running} tasks run after {time.monotonic() - start_s:.1f} s")
        os.kill(cluster.processes["coordinator"].pid, signal.SIGKILL)
        time.sleep(away_s / 2)
        held.open_gate("first")
        time.sleep(away_s / 2)
        back_s = time.monotonic()
        cluster.restart("coordinator")
        report.say(f"the coordinator is back after {away_s:g} s, ready in {time.monotonic() - back_s:.1f} s")
        held.open_gate("second")
        held.judge(report)
        report.say(f"all ends are there {time.monotonic() - back_s:.1f} s after its start")


def stopped(asked: argparse.Namespace, report: Report) -> None:
    with held_tasks(asked.held) as (cluster, client, held):
        pid = cluster.processes["coordinator"].pid
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(asked.stopped_s / 2)
            held.open_gate("first")
            time.sleep(asked.stopped_s / 2)
        finally:
            os.kill(pid, signal.SIGCONT)
        went_on_s = time.monotonic()
        states: Counter[AgentState] = Counter()
        deadline_s = went_on_s + 10.0
        while time.monotonic() < deadline_s:
            states += Counter(client.status().agents)
            time.sleep(0.05)
        report.say(f"stopped for {asked.stopped_s:g} s; agents as seen for 10 s afterwards: {dict(states)}")
        report.must(not states[AgentState.LOST], "an agent was given up")
        held.open_gate("second")
        held.judge(report)


# --- row 18: very many tasks -----------------------------------------------------------------------------------------


def brief(n: int) -> int:
    time.sleep(0.01)
    return n


_OTHER_OWNER = """
import getpass, sys, time
import herder
from full_size import REUSED, brief
getpass.getuser = lambda: "bob"
with herder.Client(workload=REUSED) as client:
    start_s = time.monotonic()
    futures = [client.submit(brief, n) for n in range(100)]
    assert [future.result(900) for future in futures] == list(range(100))
    print(time.monotonic() - start_s)
"""


def other_owner(cluster: herder.LocalCluster) -> float:
    """Seconds that another owner's 100 tasks take."""
    environ = {**os.environ, **cluster.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", _OTHER_OWNER]
    return float(subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout)


def million(asked: argparse.Namespace, report: Report) -> None:
    with herder.LocalCluster(cores=4) as cluster, cluster.client(workload=REUSED) as client:
        pids = {name: process.pid for name, process in cluster.processes.items()}
        client.submit(brief, 0).result(WAIT_S)
        alone_s = other_owner(cluster)
        with Watch(pids) as watch:
            start_s = time.monotonic()
            job = client.array(brief, range(asked.tasks))
            during: list[float] = []
            while len(job) < asked.tasks or not during:  # they must not wait while the rest is being submitted, either
                time.sleep(1.0)
                during.append(other_owner(cluster))
            until(lambda: client.status().tasks, "an answer")
            took_s = time.monotonic() - start_s
            beside_s = other_owner(cluster)
            grown = watch.grown_bytes("coordinator")
            report.say(f"{asked.tasks} tasks accepted in {took_s:.1f} s ({asked.tasks / took_s:.0f}/s)")
            report.say(
                f"another owner's 100 tasks: {alone_s:.2f} s alone, {max(during):.2f} s at most while they were "
                f"submitted, {beside_s:.2f} s beside them"
            )
            report.say(
                f"the coordinator grew by at most {grown / MIB:.0f} MiB ({grown / asked.tasks:.0f} bytes a task), "
                f"and took {watch.cpu_s('coordinator'):.0f} s of processor time"
            )
            report.must(grown < asked.tasks_mib * MIB, f"the coordinator grew by more than {asked.tasks_mib} MiB")
            # Half of the cores are theirs. Who comes last waits for hours.
            report.must(max(*during, beside_s) < 4 * alone_s + 2.0, "the second owner waited for the first")
            start_s = time.monotonic()
            job.cancel()
            job.wait(WAIT_S)
            report.say(f"cancelled and told in {time.monotonic() - start_s:.1f} s")
            progress = job.progress()
            report.must(progress.ended == asked.tasks, f"{asked.tasks - progress.ended} tasks have no end")


# --- row 27: all agents come back at once ----------------------------------------------------------------------------


class Crowd:
    """Agents in processes of their own; since when which of them is in, by epoch."""

    def __init__(self, folder: Path, address: str, count: int, process_count: int) -> None:
        self._in: dict[int, dict[int, float]] = {}
        self._processes: list[subprocess.Popen[str]] = []
        self._threads: list[threading.Thread] = []
        self._ready = threading.Semaphore(0)
        script = str(Path(__file__).with_name("full_size_crowd.py"))
        share = -(-count // process_count)
        for first in range(0, count, share):
            command = [sys.executable, script, str(folder), address, str(first), str(min(share, count - first))]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._processes.append(process)
            self._threads.append(threading.Thread(target=self._read, args=(process,), name="crowd"))
            self._threads[-1].start()
        for _ in self._processes:
            self._ready.acquire()

    def entered(self, epoch: int) -> dict[int, float]:
        return self._in.get(epoch, {})

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            words = line.split()
            if words == ["ready"]:
                self._ready.release()
            else:
                self._in.setdefault(int(words[1]), {})[int(words[0])] = float(words[2])


def reconnect(asked: argparse.Namespace, report: Report) -> None:
    with herder.LocalCluster(cores=1) as cluster, cluster.client() as client:
        hello = cluster.processes["coordinator"].hello
        assert hello is not None
        crowd = Crowd(cluster.profile.authority.parent, cluster.address, asked.agents, asked.processes)
        try:
            until(lambda: len(crowd.entered(hello.epoch)) == asked.agents, "the crowd to be in")
            for times in range(1, 4):
                os.kill(cluster.processes["coordinator"].pid, signal.SIGKILL)
                time.sleep(5.0 * (times - 1))  # at once, or when all wait for their next try
                back_s = time.monotonic()
                process = cluster.restart("coordinator")
                assert process.hello is not None
                ready_s = time.monotonic()
                epoch = process.hello.epoch
                with Watch({"coordinator": process.pid}) as watch:
                    until(lambda epoch=epoch: len(crowd.entered(epoch)) == asked.agents, "all to be back")  # type: ignore[misc]
                    last_s = max(crowd.entered(epoch).values())
                    states = Counter(str(each.state) for each in client.nodes())
                report.say(
                    f"{asked.agents} agents are in {last_s - ready_s:.1f} s after the coordinator was ready, which "
                    f"took {ready_s - back_s:.1f} s; CPU {watch.cpu_s('coordinator'):.1f} s; {dict(states)}"
                )
                report.must(last_s - ready_s <= RECONNECT_S, f"not all in within {RECONNECT_S:g} s")
                until(
                    lambda: (
                        sum(n for state, n in client.status().agents.items() if state is AgentState.READY)
                        == asked.agents + 1
                    ),
                    "all to be ready",
                    60.0,
                )
        finally:
            crowd.close()
        assert node(0) in {each.facts.node for each in client.nodes()}


# --- row 30: a slow client -------------------------------------------------------------------------------------------


def nothing(n: int) -> int:
    return n


_SLOW_CLIENT = """
import sys, time
import herder
from full_size import REUSED, nothing
count = int(sys.argv[1])
with herder.Client(workload=REUSED) as client:
    job = client.array(nothing, range(count))
    job.pause()
    while len(job) < count or sum(client.job(job.id).status().counts.values()) < count:
        time.sleep(0.1)
    print("ready", flush=True)
    sys.stdin.readline()
    job.resume()
    seen = 0
    for n, result in enumerate(job.results()):
        assert result == n, (n, result)
        seen += 1
    print(seen, flush=True)
"""


def slow(asked: argparse.Namespace, report: Report) -> None:
    with herder.LocalCluster(cores=4) as cluster, cluster.client() as client:
        pids = {name: process.pid for name, process in cluster.processes.items()}
        environ = {**os.environ, **cluster.environ, "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-c", _SLOW_CLIENT, str(asked.events)]
        with (
            Watch(pids) as watch,
            subprocess.Popen(
                command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as slow_one,
        ):
            assert slow_one.stdin is not None
            assert slow_one.stdout is not None
            report.must(slow_one.stdout.readline() == "ready\n", "it did not submit")
            submitted_bytes = watch.grown_bytes("coordinator")
            report.say(f"{asked.events} tasks submitted; the coordinator grew by {submitted_bytes / MIB:.0f} MiB")
            start_s = time.monotonic()
            slow_one.stdin.write("go\n")
            slow_one.stdin.flush()

            def ended() -> int:
                return sum(sum(job.outcomes.values()) for job in client.jobs() if job.kind == "array")

            deadline_s = start_s + asked.slow_s
            while ended() < asked.events and time.monotonic() < deadline_s:
                os.kill(slow_one.pid, signal.SIGSTOP)
                time.sleep(asked.slow_stop_s)
                os.kill(slow_one.pid, signal.SIGCONT)
                time.sleep(0.1)
            share = 0.1 / (0.1 + asked.slow_stop_s)
            report.say(
                f"{ended()} had ended after {time.monotonic() - start_s:.0f} s, when it had {share:.1%} of its time"
            )
            answer = slow_one.stdout.readline().strip()
            took_s = time.monotonic() - start_s
        grown = watch.grown_bytes("coordinator")
        report.say(
            f"{answer} results in order after {took_s:.0f} s; the coordinator grew by {grown / MIB:.0f} MiB at most"
        )
        report.must(answer == str(asked.events), f"{answer or 'no'} results of {asked.events}")
        bound_bytes = KEPT_ENDS_BYTES_MAX + SLACK_BYTES
        report.must(grown - submitted_bytes < bound_bytes, f"it grew by more than {bound_bytes / MIB:.0f} MiB by ends")


# --- row 37: output without end --------------------------------------------------------------------------------------


def pour(seconds: float) -> tuple[int, float]:
    """Write as fast as it goes; how much, in which time."""
    block = (b"\x1b[31;1m\x00\xff\xfe\x07" + os.urandom(1013)).replace(b"\n", b"_") * 1024
    written = 0
    start_s = time.monotonic()
    while time.monotonic() - start_s < seconds:
        written += os.write(1, block)
    return written, time.monotonic() - start_s


def output(asked: argparse.Namespace, report: Report) -> None:
    with herder.LocalCluster(cores=3) as cluster, cluster.client() as client:
        pids = {name: process.pid for name, process in cluster.processes.items()}
        client.submit(nothing, 1).result(WAIT_S)
        agent = next(name for name in pids if name != "coordinator")
        for name in ("capture", "stream", "discard"):
            view = client.options(stdout=name)
            with Watch(pids) as watch:
                pouring = view.submit(pour, asked.output_s)
                beside = []
                while not pouring.done():
                    start_s = time.monotonic()
                    client.submit(nothing, 1).result(WAIT_S)
                    beside.append(time.monotonic() - start_s)
                    time.sleep(0.1)
                written, took_s = pouring.result(WAIT_S)
            report.say(
                f"{name}: {written / GIB:.2f} GiB in {took_s:.1f} s ({written / took_s / GIB:.2f} GiB/s); "
                f"CPU: coordinator {watch.cpu_s('coordinator'):.2f} s, agent {watch.cpu_s(agent):.2f} s; memory: "
                f"{watch.grown_bytes('coordinator') / MIB:.0f} and {watch.grown_bytes(agent) / MIB:.0f} MiB more; "
                f"a task beside it {sorted(beside)[len(beside) // 2] * 1000:.0f} ms, {max(beside) * 1000:.0f} at most"
            )
            report.must(
                watch.cpu_s("coordinator") < 0.2 * took_s + 0.5, f"{name}: the coordinator is not idle beside it"
            )
            for who in pids:
                report.must(watch.grown_bytes(who) < SLACK_BYTES, f"{name}: {who} grew by more than 200 MiB")
            if name == "capture":
                kept = len(pouring.logs().stdout)
                report.must(0 < kept <= 2 * (LOG_HEAD_BYTES + LOG_TAIL_BYTES), f"{kept} characters of it are kept")


# --- row 38: gigabytes -----------------------------------------------------------------------------------------------


def make_bytes(size_bytes: int) -> bytearray:
    """Every page of it is another one, so that nobody can be clever."""
    content = bytearray(size_bytes)
    content[::4096] = bytes(n % 251 for n in range((size_bytes + 4095) // 4096))
    return content


def check_bytes(content: bytearray) -> int:
    pages = content[::4096]
    assert pages == bytes(n % 251 for n in range(len(pages)))
    return len(content)


def need(report: Report, memory_bytes: int) -> None:
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    if free < memory_bytes:
        raise SystemExit(f"this needs {memory_bytes / GIB:.0f} GiB of memory, of which {free / GIB:.1f} are free")
    report.say(f"{free / GIB:.1f} GiB of memory are free")


@contextlib.contextmanager
def gigabytes(report: Report, size_bytes: int) -> Iterator[tuple[herder.LocalCluster, herder.Client, Watch]]:
    """A cluster that must not hold this in its memory."""
    with herder.LocalCluster(cores=2) as cluster, cluster.client() as client:
        client.submit(nothing, 1).result(WAIT_S)
        pids = {name: process.pid for name, process in cluster.processes.items()}
        with Watch(pids) as watch:
            beside: list[float] = []
            over = threading.Event()

            def ask() -> None:
                while not over.wait(0.2):
                    start_s = time.monotonic()
                    client.status()
                    beside.append(time.monotonic() - start_s)

            asking = threading.Thread(target=ask, name="asking")
            asking.start()
            try:
                yield cluster, client, watch
            finally:
                over.set()
                asking.join()
        for name in pids:
            grown = watch.grown_bytes(name)
            report.say(
                f"{name} grew by {grown / MIB:.0f} MiB at most, took {watch.cpu_s(name):.1f} s of processor time"
            )
            report.must(grown < min(SLACK_BYTES, size_bytes / 2), f"{name} holds it in memory")
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        report.say(f"the client's memory was {most / size_bytes:.2f} of it at most")
        report.say(f"questions meanwhile were answered in {max(beside, default=0.0) * 1000:.0f} ms at most")


def result(asked: argparse.Namespace, report: Report) -> None:
    size_bytes = int(asked.gib * GIB)
    need(report, 4 * size_bytes)
    with gigabytes(report, size_bytes) as (_, client, _watch):
        start_s = time.monotonic()
        content = client.submit(make_bytes, size_bytes).result(WAIT_S)
        took_s = time.monotonic() - start_s
        report.say(f"{asked.gib:g} GiB came as a result in {took_s:.0f} s ({size_bytes / took_s / MIB:.0f} MiB/s)")
        report.must(check_bytes(content) == size_bytes, "it is not what was made")
        del content


def arguments(asked: argparse.Namespace, report: Report) -> None:
    size_bytes = int(asked.gib * GIB)
    need(report, 4 * size_bytes)
    content = make_bytes(size_bytes)
    with gigabytes(report, size_bytes) as (_, client, _watch):
        start_s = time.monotonic()
        future = client.submit(check_bytes, content)
        report.say(f"submit returned after {time.monotonic() - start_s:.1f} s")
        del content
        report.must(future.result(WAIT_S) == size_bytes, "the task did not see it")
        took_s = time.monotonic() - start_s
        report.say(f"{asked.gib:g} GiB came as arguments in {took_s:.0f} s ({size_bytes / took_s / MIB:.0f} MiB/s)")


# --- row 40: very many are cancelled ---------------------------------------------------------------------------------


def sleep_long(_: int) -> None:
    time.sleep(3600.0)


def cancelled(asked: argparse.Namespace, report: Report) -> None:
    with herder.LocalCluster(cores=asked.cancelled_running, agents=2) as cluster, cluster.client() as client:
        pids = {name: process.pid for name, process in cluster.processes.items()}

        def running() -> int:
            return sum(node.running for node in client.nodes())

        for way in ("array", "one by one"):
            start_s = time.monotonic()
            if way == "array":
                job = client.array(sleep_long, range(asked.cancelled))
                until(lambda: len(job) == asked.cancelled, "all to be submitted")  # noqa: B023
            else:
                futures = [client.submit(sleep_long, n) for n in range(asked.cancelled)]
            until(lambda: running() == asked.cancelled_running, "the cores to be taken")
            report.say(f"{way}: {asked.cancelled} submitted, {running()} run after {time.monotonic() - start_s:.1f} s")
            with Watch(pids) as watch:
                start_s = time.monotonic()
                if way == "array":
                    job.cancel()
                    job.wait(WAIT_S)
                    ends = job.progress().ended
                else:
                    for future in futures:
                        future.cancel()
                    asked_s = time.monotonic() - start_s
                    until(lambda: all(future.done() for future in futures), "all to have ended")  # noqa: B023
                    ends = sum(future.cancelled() for future in futures)
                told_s = time.monotonic() - start_s
                until(lambda: running() == 0, "the last process to be gone")
                gone_s = time.monotonic() - start_s
            cost = f" (calling cancel took {asked_s:.1f} s)" if way != "array" else ""
            report.say(
                f"{way}: all told in {told_s:.1f} s{cost}, the last process gone in {gone_s:.1f} s; the coordinator "
                f"grew by {watch.grown_bytes('coordinator') / MIB:.0f} MiB"
            )
            report.must(ends == asked.cancelled, f"{way}: {asked.cancelled - ends} have no end")
            report.must(client.submit(nothing, 7).result(WAIT_S) == 7, f"{way}: nothing runs afterwards")


CASES: dict[str, Callable[[argparse.Namespace, Report], None]] = {
    "killed": killed,
    "away": away,
    "stopped": stopped,
    "million": million,
    "reconnect": reconnect,
    "slow": slow,
    "output": output,
    "result": result,
    "arguments": arguments,
    "cancelled": cancelled,
}


def main() -> int:
    """Run the cases that are asked for, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], default=[], metavar="CASE", help="none: all")
    parser.add_argument("--running", type=int, default=1_000)
    parser.add_argument("--held", type=int, default=100, help="tasks of `stopped`")
    parser.add_argument("--away-s", type=float, default=600.0)
    parser.add_argument("--stopped-s", type=float, default=60.0)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--tasks-mib", type=int, default=400, help="what the coordinator may grow by for them")
    parser.add_argument("--agents", type=int, default=1_000)
    parser.add_argument("--processes", type=int, default=4, help="in which the agents of `reconnect` are")
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--slow-s", type=float, default=120.0, help="for which the client of `slow` is slow")
    parser.add_argument("--slow-stop-s", type=float, default=0.9, help="it is stopped for, before each 0.1 s")
    parser.add_argument("--output-s", type=float, default=5.0)
    parser.add_argument("--gib", type=float, default=5.0)
    parser.add_argument("--cancelled", type=int, default=100_000)
    parser.add_argument("--cancelled-running", type=int, default=200)
    asked = parser.parse_args()
    reports: dict[str, Report] = {}
    for name in asked.cases or CASES:
        print(f"{name}:", flush=True)
        reports[name] = Report()
        try:
            CASES[name](asked, reports[name])
        except Exception as error:  # noqa: BLE001 - the other cases are of interest too
            reports[name].must(holds=False, text=f"{type(error).__name__}: {error}")
    print()
    for name, report in reports.items():
        print(f"{name:10} {'; '.join(report.broken) or 'holds'}")
    return int(any(report.broken for report in reports.values()))


if __name__ == "__main__":
    sys.exit(main())
