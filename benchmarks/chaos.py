"""`chaos.py --seed S --minutes M`: is anything lost, doubled or forgotten while everything is killed and stopped?

A cluster of real processes on this machine: a coordinator, agents, clients in processes of their own, under a mixed
load: single tasks, arrays, diamonds of dependencies, tasks that may run once, commands, cancellations, failures,
results as blobs, detached jobs. Meanwhile, by the seed: kill -9 and SIGSTOP of the coordinator, agents, templates,
children and clients.

Then peace; clients wait for all that is theirs; another client attaches to the detached jobs; and the
witnesses are heard (`chaos_history.py`):

lost        accepted, and the client that lives was never told of an end
doubled     told twice, or two terminal records, or one for the client and another in the journal
run twice   a task that may run once, or one attempt, began twice
ghost       ran and was never submitted; succeeded and never ran
forgotten   all is over, and an agent or the coordinator still has something; or a process is left

With `--spare` some processes are never killed, and it is a soak: memory, descriptors, threads and zombies of each
process are sampled, and their common slopes over the lives of each are given.

Exit status 1 when a promise was broken, or a process ended with a traceback.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import chaos_history

import herder
from herder_coordinator.journal.sqlite import open_journal
from herder_shared.ids import ClusterId

#: Short, so that silence beyond it happens within minutes.
LEASE_S = 6.0
DISCONNECT_GRACE_S = 5.0
#: For agents and coordinator to have nothing left, when all clients are content.
FORGET_S = 40.0
CLIENT_EXIT_S = 240.0
SAMPLE_S = 2.0
#: How often each fault comes, relative to the others.
WEIGHTS = {
    "kill coordinator": 4,
    "kill agent": 4,
    "kill template": 4,
    "kill child": 4,
    "kill client": 4,
    "stop coordinator": 2,
    "stop agent": 2,
    "stop child": 1,
    "stop client": 1,
}


@dataclass(slots=True)
class Options:
    """How long, how hard."""

    seed: int
    seconds: float
    agents: int
    cores: int
    clients: int
    #: Mean time between faults.
    pace_s: float
    #: Stop after each component was killed so often, whatever the time; 0: by time alone.
    kills: int
    #: The first agent and the first client live on, and the coordinator dies only so often.
    spare: bool
    coordinator_life_s: float
    #: The first of each life, in which bounded caches fill, says nothing of leaks.
    warm_up_s: float
    #: Tasks that end before the first fault, so that the bounded record of what has ended is full.
    fill: int
    folder: Path | None


@dataclass(slots=True)
class Life:
    """A process, and what was seen of it."""

    name: str
    pid: int
    began_s: float
    rss: list[tuple[float, float]] = field(default_factory=list)
    fds: list[tuple[float, float]] = field(default_factory=list)
    threads: list[tuple[float, float]] = field(default_factory=list)
    zombies: list[tuple[float, float]] = field(default_factory=list)


class Samples:
    """Looks at processes every `SAMPLE_S`, in a thread."""

    def __init__(self, warm_up_s: float) -> None:
        self._warm_up_s = warm_up_s
        self.lives: list[Life] = []
        self._current: dict[str, Life] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="samples")
        self._thread.start()

    def follow(self, name: str, pid: int) -> None:
        """From now on `name` is this process."""
        life = Life(name, pid, time.monotonic())
        with self._lock:
            self._current[name] = life
            self.lives.append(life)

    def close(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(SAMPLE_S):
            with self._lock:
                lives = list(self._current.values())
            for life in lives:
                with suppress(OSError, LookupError, ValueError):
                    self._look(life)

    def _look(self, life: Life) -> None:
        now_s = time.monotonic()
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{life.pid}/status").read_text().splitlines() if ":" in line
        )
        anonymous_kib = int(status["RssAnon"].split()[0])
        fds = len(os.listdir(f"/proc/{life.pid}/fd"))
        zombies = sum(_state_of(pid) == "Z" for pid in children_of(life.pid))
        if now_s - life.began_s < self._warm_up_s:
            return
        life.rss.append((now_s, anonymous_kib / 1024))
        life.fds.append((now_s, float(fds)))
        life.threads.append((now_s, float(status["Threads"])))
        life.zombies.append((now_s, float(zombies)))


class Chaos:
    """One run."""

    def __init__(self, options: Options, folder: Path) -> None:
        self._options = options
        self._folder = folder
        self._random = random.Random(options.seed)
        self._counts: Counter[str] = Counter()
        self._history = chaos_history.History()
        self._clients: dict[str, subprocess.Popen[bytes]] = {}
        self._born = 0
        #: Stopped processes, and when they go on.
        self._stopped: list[tuple[float, int]] = []
        self._problems: list[tuple[str, str]] = []
        self._samples = Samples(options.warm_up_s)
        self._coordinator_due_s = 0.0

    def run(self) -> int:
        """Do it all. The exit status."""
        options = self._options
        began_s = time.monotonic()
        os.environ["HERDER_COORDINATOR_LEASE_S"] = str(LEASE_S)
        os.environ["HERDER_COORDINATOR_DISCONNECT_GRACE_S"] = str(DISCONNECT_GRACE_S)
        cluster = self._cluster = herder.LocalCluster(
            cores=options.cores, agents=options.agents, state_dir=self._folder / "cluster"
        )
        try:
            self._fill(cluster)
            for name, process in cluster.processes.items():
                self._samples.follow(name, process.pid)
            for _ in range(options.clients):
                self._start_client()
            self._start_client(detached=True)
            self._coordinator_due_s = began_s + options.coordinator_life_s
            self._shake(began_s + options.seconds)
            self._make_peace()
            self._judge_leftovers()
            with suppress(ProcessLookupError):
                self._read_journal()
        finally:
            self._end(cluster)
        self._judge_processes()
        return self._report(time.monotonic() - began_s)

    def _fill(self, cluster: herder.LocalCluster) -> None:
        if self._options.fill:
            with cluster.client(workload=herder.Workload(max_tasks_per_child=None)) as client:
                client.array(abs, range(self._options.fill)).wait()

    # --- faults ------------------------------------------------------------------------------------------------------

    def _shake(self, until_s: float) -> None:
        while time.monotonic() < until_s and not self._has_killed_enough():
            time.sleep(self._random.expovariate(1 / self._options.pace_s))
            self._resume()
            kinds = dict(WEIGHTS)
            if self._options.spare:
                kinds["kill coordinator"] = 0
                if time.monotonic() >= self._coordinator_due_s:
                    self._coordinator_due_s = time.monotonic() + self._options.coordinator_life_s
                    self._fault("kill coordinator")
                    continue
            elif self._options.kills:
                kinds = {kind: 0 if self._is_enough(kind) else weight for kind, weight in kinds.items()}
            self._fault(self._random.choices(list(kinds), list(kinds.values()))[0])

    def _is_enough(self, kind: str) -> bool:
        return kind.startswith("kill") and self._counts[kind] >= self._options.kills

    def _has_killed_enough(self) -> bool:
        kills = [kind for kind in WEIGHTS if kind.startswith("kill")]
        return bool(self._options.kills) and all(self._is_enough(kind) for kind in kills)

    def _fault(self, kind: str) -> None:
        match kind:
            case "kill coordinator":
                self._kill_coordinator()
            case "kill agent":
                self._kill_agent(self._agent())
            case "kill template":
                self._kill_one(kind, children_of(self._pid_of(self._agent(spared=True))))
            case "kill child":
                templates = children_of(self._pid_of(self._agent(spared=True)))
                self._kill_one(kind, [pid for template in templates for pid in children_of(template)])
            case "kill client":
                self._kill_client()
            case "stop coordinator":
                self._stop(kind, self._pid_of("coordinator"), 1.5 * LEASE_S)
            case "stop agent":
                self._stop(kind, self._pid_of(self._agent(spared=True)), 1.5 * LEASE_S)
            case "stop child":
                templates = children_of(self._pid_of(self._agent(spared=True)))
                children = [pid for template in templates for pid in children_of(template)]
                if children:
                    self._stop(kind, self._random.choice(children), 2.0)
            case "stop client":
                process = self._random.choice([*self._clients.values()])
                self._stop(kind, process.pid, 1.5 * LEASE_S)

    def _agent(self, *, spared: bool = False) -> str:
        names = [name for name in self._cluster.processes if name != "coordinator"]
        return self._random.choice(names if spared or not self._options.spare else names[1:])

    def _pid_of(self, name: str) -> int:
        return self._cluster.processes[name].pid

    def _kill_coordinator(self) -> None:
        self._counts["kill coordinator"] += 1
        self._kill_process("coordinator")
        self._read_journal()
        # Meanwhile things go on, and perhaps something else dies.
        time.sleep(self._random.choice([0.0, 0.2, 1.0, 1.5 * LEASE_S if self._random.random() < 0.1 else 0.5]))
        victim = self._agent() if self._random.random() < 0.2 else ""
        if victim:
            self._counts["kill agent"] += 1
            self._kill_process(victim)
        self._restart("coordinator")
        if victim:
            self._restart(victim)

    def _kill_agent(self, name: str) -> None:
        self._counts["kill agent"] += 1
        self._kill_process(name)
        time.sleep(self._random.choice([0.0, 0.1, 0.5, 2.0, LEASE_S + 1.0 if self._random.random() < 0.1 else 0.0]))
        self._resume()
        self._restart(name)

    def _kill_process(self, name: str) -> None:
        popen = self._cluster.processes[name].popen
        status = popen.poll()
        if status is not None:
            self._problems.append(("died", f"{name} had ended by itself with status {status}"))
        popen.kill()
        popen.wait()

    def _restart(self, name: str) -> None:
        self._resume_all_needed(name)
        process = self._cluster.restart(name)
        self._samples.follow(name, process.pid)

    def _kill_one(self, kind: str, pids: list[int]) -> None:
        if pids:
            with suppress(ProcessLookupError):
                os.kill(self._random.choice(pids), signal.SIGKILL)
                self._counts[kind] += 1

    def _kill_client(self) -> None:
        names = [name for name in self._clients if not (self._options.spare and name == "c1")]
        # One of the first kind always lives on to see its ends.
        steady = [name for name in names if "detached" not in name]
        if len(steady) <= 1:
            names = [name for name in names if name not in steady]
        if not names:
            return
        name = self._random.choice(names)
        process = self._clients.pop(name)
        process.kill()
        process.wait()
        self._counts["kill client"] += 1
        self._start_client(detached="detached" in name)

    def _stop(self, kind: str, pid: int, seconds_max: float) -> None:
        seconds = self._random.random() ** 3 * seconds_max + 0.1
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            self._counts[kind] += 1
            self._stopped.append((time.monotonic() + seconds, pid))

    def _resume(self, *, everybody: bool = False) -> None:
        for due in [due for due in self._stopped if everybody or due[0] <= time.monotonic()]:
            self._stopped.remove(due)
            with suppress(ProcessLookupError):
                os.kill(due[1], signal.SIGCONT)

    def _resume_all_needed(self, name: str) -> None:
        """An agent that starts waits for the coordinator: it must not stand still."""
        if name != "coordinator":
            coordinator = self._pid_of("coordinator")
            for due in [due for due in self._stopped if due[1] == coordinator]:
                self._stopped.remove(due)
                os.kill(due[1], signal.SIGCONT)

    # --- clients -----------------------------------------------------------------------------------------------------

    def _start_client(self, *, detached: bool = False) -> None:
        self._born += 1
        name = f"c{self._born}{'detached' if detached else ''}"
        arguments = ["--detached"] if detached else []
        self._clients[name] = self._client_process(name, *arguments)
        if not detached:
            self._samples.follow(f"client {name}", self._clients[name].pid)

    def _client_process(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        script = Path(__file__).with_name("chaos_client.py")
        seed = str(self._random.randrange(1 << 32))
        with (self._folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, str(script), str(self._folder), name, seed, *arguments],
                env={**os.environ, **self._cluster.environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    # --- the end -----------------------------------------------------------------------------------------------------

    def _make_peace(self) -> None:
        self._resume(everybody=True)
        (self._folder / "stop").touch()
        for name, process in self._clients.items():
            try:
                status = process.wait(CLIENT_EXIT_S)
            except subprocess.TimeoutExpired:
                status = -1
                process.kill()
                process.wait()
            if status:
                self._problems.append(("client", f"{name} ended with status {status}: {self._tail(f'{name}.log')}"))
        adopter = self._client_process("adopter", "--adopt")
        if adopter.wait(CLIENT_EXIT_S):
            self._problems.append(("client", f"nobody could attach to the detached jobs: {self._tail('adopter.log')}"))

    def _judge_leftovers(self) -> None:
        """Nobody may still have anything, once the jobs of vanished clients are cancelled."""
        deadline_s = time.monotonic() + FORGET_S
        with self._cluster.client() as client:
            while (left := list(self._left(client))) and time.monotonic() < deadline_s:
                time.sleep(0.2)
        self._problems += [("forgotten", text) for text in left]

    def _left(self, client: herder.Client) -> Iterator[str]:
        for job in client.jobs():
            ended = sum(job.outcomes.values())
            if ended < job.tasks:
                yield f"job {job.job} ({job.name}, {job.state}) has {job.tasks - ended} of {job.tasks} not ended"
        for node in client.nodes():
            report = node.report
            if node.running or report is None or report.running or report.queued:
                yield f"node {node.facts.node} ({node.state}) has {node.running} attempts, and says {report}"
            kept = unacknowledged(f"{self._cluster.http}/agents/{node.facts.node}/metrics")
            if kept:
                yield f"node {node.facts.node} keeps {kept:g} ends as unacknowledged"

    def _read_journal(self) -> None:
        """Read the journal of the life that ended, or goes on, from a copy: opening takes the lock and repairs."""
        source = self._folder / "cluster" / "coordinator"
        with tempfile.TemporaryDirectory(dir=self._folder) as copy:
            for file in source.glob("journal.sqlite*"):
                with suppress(FileNotFoundError):
                    shutil.copy(file, copy)
            journal = open_journal(Path(copy), ClusterId(self._cluster.profile.cluster))
            try:
                self._history.read_journal(journal.replay())
            finally:
                journal.close()

    def _end(self, cluster: herder.LocalCluster) -> None:
        self._resume(everybody=True)
        self._samples.close()
        for process in self._clients.values():
            if process.poll() is None:
                process.kill()
                process.wait()
        for name, one in cluster.processes.items():
            status = one.popen.poll()
            if status is not None:
                self._problems.append(("died", f"{name} had ended by itself with status {status}: {one.log_tail()}"))
        cluster.close()

    def _judge_processes(self) -> None:
        mark = f"HERDER_ATTEMPT={self._cluster.profile.cluster}/".encode()
        deadline_s = time.monotonic() + 5.0
        while (left := [pid for pid in _all_pids() if mark in _environ_of(pid)]) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        self._problems += [("forgotten", f"process {pid} of an attempt is left") for pid in left]
        for log in sorted((self._folder / "cluster" / "logs").glob("*.log")):
            text = log.read_text(errors="replace")
            if "Traceback" in text:
                self._problems.append(("traceback", f"{log.name}: ...{text[text.index('Traceback') :][:3000]}"))

    def _tail(self, name: str) -> str:
        return (self._folder / name).read_text(errors="replace")[-1500:].strip()

    # --- what came of it ---------------------------------------------------------------------------------------------

    def _report(self, took_s: float) -> int:
        told = chaos_history.read(self._folder)
        told.records, told.contradictions = self._history.records, self._history.contradictions
        broken = [*told.broken(), *self._problems]
        print(f"chaos: seed {self._options.seed}, {took_s:.0f} s")
        print("faults:    ", ", ".join(f"{kind} {count}" for kind, count in sorted(self._counts.items())))
        print("history:   ", ", ".join(f"{what} {count}" for what, count in told.summary().items()))
        kinds = Counter(kind for kind, _ in broken)
        promises = ["lost", "doubled", "run twice", "ghost", "forgotten", *sorted(set(kinds) - _PROMISES)]
        print("broken:    ", ", ".join(f"{kind} {kinds[kind]}" for kind in promises))
        for kind, text in broken[:40]:
            print(f"  {kind}: {text}")
        self._report_slopes()
        return 1 if broken else 0

    def _report_slopes(self) -> None:
        names = sorted({life.name for life in self._samples.lives})
        for name in names:
            lives = [life for life in self._samples.lives if life.name == name and len(life.rss) >= 10]
            if not lives:
                continue
            seen_s = sum(life.rss[-1][0] - life.rss[0][0] for life in lives)
            slopes = {
                word: chaos_history.slope_per_hour(getattr(life, word) for life in lives)
                for word in ("rss", "fds", "threads", "zombies")
            }
            last = lives[-1]
            print(
                f"slope:      {name}: {len(lives)} lives, {seen_s:.0f} s; "
                f"memory {slopes['rss']:+.2f} MiB/h ({last.rss[0][1]:.1f}, {last.rss[len(last.rss) // 2][1]:.1f}, "
                f"{last.rss[-1][1]:.1f} MiB at its begin, middle, end), "
                f"descriptors {slopes['fds']:+.2f}/h (now {last.fds[-1][1]:.0f}), "
                f"threads {slopes['threads']:+.2f}/h (now {last.threads[-1][1]:.0f}), "
                f"zombies {slopes['zombies']:+.2f}/h (most {max(count for _, count in last.zombies):.0f})"
            )


_PROMISES = {"lost", "doubled", "run twice", "ghost", "forgotten"}


def children_of(pid: int) -> list[int]:
    """Live and unreaped children of all its threads."""
    found: list[int] = []
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def unacknowledged(url: str) -> float:
    """Ends that an agent keeps, as its metrics say."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found = re.search(r"^herder_node_ends_unacknowledged\{[^}]*\} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found is not None else 0.0


def _state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _environ_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def main() -> int:
    """Parse, run, say where the witnesses' words are if they are to be kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--agents", type=int, default=3)
    parser.add_argument("--cores", type=int, default=6)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--pace", type=float, default=0.5, help="mean seconds between faults")
    parser.add_argument("--kills", type=int, default=0, help="end when each component was killed so often")
    parser.add_argument("--spare", action="store_true", help="a soak: some processes live on, and slopes are given")
    parser.add_argument(
        "--coordinator-life", type=float, default=300.0, help="with --spare: seconds between its deaths"
    )
    parser.add_argument("--warm-up", type=float, default=60.0, help="seconds of each life that slopes leave out")
    parser.add_argument(
        "--fill", type=int, default=0, help="tasks that end before the first fault; caches are full then"
    )
    parser.add_argument("--keep", type=Path, help="a new folder for everything, which is kept")
    given = parser.parse_args()
    options = Options(
        seed=given.seed,
        seconds=60 * given.minutes,
        agents=given.agents,
        cores=given.cores,
        clients=given.clients,
        pace_s=given.pace,
        kills=given.kills,
        spare=given.spare,
        coordinator_life_s=given.coordinator_life,
        warm_up_s=given.warm_up,
        fill=given.fill,
        folder=given.keep,
    )
    if options.folder is not None:
        options.folder.mkdir(parents=True)
        return Chaos(options, options.folder).run()
    with tempfile.TemporaryDirectory(prefix="herder-chaos-") as folder:
        return Chaos(options, Path(folder)).run()


if __name__ == "__main__":
    sys.exit(main())
