"""One seed, one history: the world is built, shaken, left in peace, and judged."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

from herder_coordinator.core.events import DrainRequested, KeysRevokeRequested
from herder_shared.ids import Incarnation, NodeName
from herder_shared.wire.messages import Key
from sim.agent import Agent
from sim.client import Client
from sim.coordinator import Coordinator
from sim.history import History, Violation
from sim.network import Cable, Network, plain_wire
from sim.world import World

#: Virtual seconds of faults, and then of peace, in which all must come to an end: longer than every lease and grace.
CHAOS_S = 20.0
PEACE_S = 600.0
#: What is still under way when the last client is content.
SETTLE_S = 120.0


#: Faults that end when peace comes.
_ENDS = (
    "cancels",
    "changes",
    "retries",
    "links",
    "client_links",
    "silent_share",
    "partitions",
    "client_partitions",
    "agent_kills",
    "agent_stops",
    "agent_losses",
    "client_stops",
    "drains",
    "revocations",
    "coordinator_crashes",
    "coordinator_stalls",
    "takeovers",
    "disk_errors",
    "full_disks",
    "blob_losses",
    "busy_s",
    "ambushes",
    "overruns",
    "start_failures",
    "template_failures",
    "template_deaths",
)


#: How many histories have one of these themes, and what of the mix it sets, to one of which values each. All tasks of a
#: history must fit into its peace: nine jobs on one node that has two cores.
THEMED = 0.3
THEMES: dict[str, dict[str, tuple[Any, ...]]] = {
    "late-words": {  # an agent's older connection speaks when the newer one has begun to
        "is_late": (True,),
        "tail_s": (0.5, 3.0),
        "flaps": (0.3, 0.6),
        "busy_s": (0.0, 0.3, 1.0, 3.0),
        "links": (0.0, 0.3),
        "agent_kills": (0.0, 0.3),
        "delay_s": (0.01, 0.05, 0.3),
        "task_s": (0.01, 0.5, 2.0),
    },
    "stale-inventory": {  # and one that it had begun to say what it has, when it was overtaken
        "is_late": (True,),
        "ambushes": (0.7,),
        "links": (0.05, 0.1),
        "delay_s": (0.01, 0.05),
        "sync_s": (0.001, 0.02),
        "near": (True,),
        "task_s": (1.0, 2.0),
        "pause_s": (1.0, 2.0),
        "tasks": (15,),
    },
    "early-acks": {  # ends are acknowledged while what depends on them is on its way
        "dependencies": (0.4, 0.7),
        "blobs": (0.1, 0.5),
        "near": (True,),
        "tasks": (20, 30),
        "task_s": (0.5, 1.5),
        "pause_s": (2.0,),
        "delay_s": (0.3, 1.0),
        "sync_s": (0.001, 0.02),
        "client_links": (0.0, 0.3),
        "flaps": (0.0, 0.3),
        "coordinator_crashes": (0.4, 0.8),
        "full_disks": (0.0, 0.1),
    },
    "old-lives": {  # a coordinator that was stopped goes on, after another has begun or not
        "takeovers": (0.0, 0.15),
        "coordinator_stalls": (0.0, 0.15),
        "links": (0.0, 0.3),
        "client_links": (0.0, 0.3),
        "agent_losses": (0.0, 0.05),
        "lease_s": (4.0, 10.0),
        "task_s": (0.5, 3.0),
        "tasks": (6, 15),
        "pause_s": (1.0, 5.0),
    },
    "again": {  # what failed is run again
        "retries": (0.3, 1.0),
        "exceptions": (0.3, 0.6),
        "signals": (0.0, 0.3),
        "tasks": (6, 15),
        "task_s": (0.01, 0.5),
        "pause_s": (1.0,),
        "delay_s": (0.01, 0.3),
        "dependencies": (0.0, 0.4),
        "client_links": (0.0, 0.3, 0.6),
        "coordinator_crashes": (0.0, 0.1, 0.3),
    },
    "changes": {  # jobs are paused, and go on
        "changes": (0.3, 1.0),
        "drains": (0.0, 0.1),
        "tasks": (6, 15),
        "task_s": (0.5, 3.0),
        "client_links": (0.0, 0.3),
        "links": (0.0, 0.3),
        "detached": (0.0, 0.5),
        "coordinator_crashes": (0.0, 0.1, 0.3),
    },
    "lapses": {  # an agent was given up, and comes back with what it runs
        "partitions": (0.1, 0.3),
        "agent_stops": (0.0, 0.2),
        "lease_s": (4.0,),
        "task_s": (6.0,),
        "tasks": (6,),
        "pause_s": (0.05, 1.0),
    },
    "endless": {  # what is cancelled would run on for ever
        "endless": (0.5, 1.0),
        "tasks": (6, 15),
        "delay_s": (0.05, 0.3),
        "pause_s": (0.05, 1.0),
        "client_links": (0.0, 0.3, 0.6),
        "flaps": (0.0, 0.5),
        "coordinator_crashes": (0.0, 0.1, 0.3),
    },
}


@dataclass
class Faults:
    """What goes wrong in this history, and how often: rates per second, probabilities, seconds."""

    tasks: int
    task_s: float
    pause_s: float
    delay_s: float
    sync_s: float
    lease_s: float
    heartbeat_s: float
    disconnect_grace_s: float
    dependencies: float
    blobs: float
    labels: bool
    detached: float
    doubles: bool
    is_late: bool
    cancels: float
    links: float
    client_links: float
    silent_share: float
    partitions: float
    client_partitions: float
    agent_kills: float
    agent_stops: float
    agent_losses: float
    client_stops: float
    drains: float
    revocations: float
    coordinator_crashes: float
    coordinator_stalls: float
    takeovers: float
    disk_errors: float
    full_disks: float
    blob_losses: float
    vanishing: bool
    start_failures: float
    template_failures: float
    template_deaths: float
    exceptions: float
    signals: float
    deadlocks: float
    memory_hogs: float
    overruns: float
    leftovers: float
    waits: float
    #: The last words of connections are late by up to so many seconds; connections that break at once; the coordinator
    #: is busy for up to so many seconds at a time; jobs whose tasks end only when they are cancelled.
    tail_s: float = field(default=0.0, kw_only=True)
    flaps: float = field(default=0.0, kw_only=True)
    busy_s: float = field(default=0.0, kw_only=True)
    #: How many inventories of agents are overtaken by a newer connection.
    ambushes: float = field(default=0.0, kw_only=True)
    endless: float = field(default=0.0, kw_only=True)
    #: Jobs are paused for a while, or get another priority; what failed is run again.
    changes: float = field(default=0.0, kw_only=True)
    retries: float = field(default=0.0, kw_only=True)
    #: Tasks are submitted in small pieces, and depend on what was submitted last, which still runs.
    near: bool = field(default=False, kw_only=True)
    #: Invariants and the journal are looked at throughout, which is dear.
    is_checked: bool

    @classmethod
    def draw(cls, world: World) -> Faults:
        """Which kinds of faults there are is drawn, and before that how many: some bugs need two kinds that meet, some
        show only where nothing else happens."""
        random = world.random
        share = random.choice([0.06, 0.15, 0.3, 0.5])

        def rate(often: float, weight: float = 1.0) -> float:
            return random.random() * often if random.random() < share * weight else 0.0

        lease_s = random.choice([4.0, 10.0, 30.0])
        return cls(
            tasks=random.choice([2, 6, 15]),
            task_s=random.choice([0.01, 0.5, 3.0]),
            pause_s=random.choice([0.05, 1.0, 5.0]),
            delay_s=random.choice([0.001, 0.05, 0.05, 1.0]),
            sync_s=random.choice([0.001, 0.02, 0.02, 2.0]),
            lease_s=lease_s,
            heartbeat_s=lease_s / 4,
            disconnect_grace_s=random.choice([10.0, 60.0]),
            dependencies=rate(0.7, 1.5),
            blobs=rate(0.5),
            labels=random.random() < 0.3,
            detached=rate(1.0),
            doubles=random.random() < 0.25,
            is_late=random.random() < 0.3,
            cancels=rate(0.3),
            links=rate(0.3),
            client_links=rate(0.3),
            silent_share=rate(0.7),
            partitions=rate(0.15),
            client_partitions=rate(0.1, 0.5),
            agent_kills=rate(0.3),
            agent_losses=rate(0.1, 0.7),
            agent_stops=rate(0.15),
            client_stops=rate(0.1, 0.4),
            drains=rate(0.1, 0.6),
            coordinator_crashes=rate(0.3, 1.5),
            takeovers=rate(0.15, 0.7),
            coordinator_stalls=rate(0.15),
            full_disks=rate(0.1),
            disk_errors=rate(0.1, 0.5),
            blob_losses=rate(1.0, 0.15),
            vanishing=random.random() < 0.15,
            start_failures=rate(0.1, 0.6),
            template_failures=rate(0.3, 0.6),
            template_deaths=rate(0.1),
            exceptions=rate(0.2),
            signals=rate(0.2),
            deadlocks=rate(0.3, 0.6),
            memory_hogs=rate(0.3, 0.6),
            overruns=rate(0.2, 0.6),
            leftovers=rate(0.5),
            waits=rate(0.5, 0.7),
            is_checked=random.random() < 0.25,
            # From a stream of its own: histories without one stay what they were.
            revocations=0.1 * own.random() if (own := Random(f"{world.seed} keys")).random() < 0.15 else 0.0,
        )

    def concentrate(self, seed: int, theme: str) -> None:
        """Some histories have a theme: of what it takes to show one kind of bug they have much, and of the rest little.
        It is drawn apart, so that the other histories stay what they were when a theme is added. `theme`: this one."""
        swarm = Random(f"whether {seed}")
        if swarm.random() >= THEMED and not theme:
            return
        theme = theme or swarm.choice(list(THEMES))
        swarm = Random(f"{theme} {seed}")
        if swarm.random() < 0.7:
            for name in (*_ENDS, "exceptions", "signals", "deadlocks", "memory_hogs", "leftovers", "waits"):
                setattr(self, name, 0.0)
        for name, values in THEMES[theme].items():
            setattr(self, name, swarm.choice(values))
        self.heartbeat_s = self.lease_s / 4

    def widen(self, seed: int) -> None:
        """What came later than the rest, each from a stream of its own: histories without it stay what they were."""
        for name, most in (("changes", 0.3), ("retries", 0.3)):
            own = Random(f"{seed} {name}")
            if own.random() < 0.15:
                setattr(self, name, most * own.random())

    def end(self) -> None:
        """Peace."""
        for name in _ENDS:
            setattr(self, name, 0.0)
        self.vanishing = False


class Simulation:
    def __init__(self, seed: int, theme: str) -> None:
        self.world = world = World(seed)
        self.history = History()
        self.faults = faults = Faults.draw(world)
        faults.widen(seed)
        faults.concentrate(seed, theme)
        random = world.random
        self.network = Network(
            world,
            faults.delay_s,
            doubles=faults.doubles,
            is_late=faults.is_late,
            tail_s=faults.tail_s,
            flaps=faults.flaps,
            disturbed=self.history.disturbed,
        )
        self.coordinator = Coordinator(world, self.network, self.history, faults)
        # One node has an even number of cores, so that every request can be met.
        cores = [2, *(random.randint(1, 4) for _ in range(random.choice([0, 1, 1, 2, 3])))]
        self.agents = [
            Agent(world, self.network, self.history, faults, f"node{number}", count)
            for number, count in enumerate(cores)
        ]
        self.clients = [
            Client(world, self.network, self.history, faults, f"{'abc'[number]}{number}", [])
            for number in range(random.choice([1, 1, 2, 3]))
        ]
        self._schedule()

    def _schedule(self) -> None:
        """Draw when each fault happens."""
        random, faults, world = self.world.random, self.faults, self.world
        start_s = world.now_s

        def at_times(rate: float, what: Callable[..., object], seconds: float | None = None) -> None:
            for _ in range(int(rate * CHAOS_S + random.random()) if rate else 0):
                due_s = start_s + random.random() * CHAOS_S
                world.at(due_s, partial(what, random.random() * seconds) if seconds is not None else what)

        for agent in self.agents:
            at_times(faults.links, agent.break_link)
            at_times(faults.agent_kills, agent.kill, 10)
            at_times(faults.agent_stops, agent.stop, 2 * faults.lease_s)
            if not agent.node.labels:  # what asks for that label can be met by the others
                at_times(faults.agent_losses, agent.lose)
            at_times(faults.partitions, agent.cut_off, 2 * faults.lease_s)
            at_times(faults.template_deaths, agent.kill_template)
            at_times(faults.drains, partial(self._drain, agent.node.name))
            if faults.revocations:
                at_times(faults.revocations, partial(self._revoke, agent))
        for client in self.clients:
            at_times(faults.client_links, client.break_link)
            at_times(faults.client_partitions, client.cut_off, 2 * faults.lease_s)
            at_times(faults.client_stops, client.stop, faults.disconnect_grace_s)
            at_times(faults.cancels, client.cancel_something)
            at_times(faults.changes, client.change_something)
            at_times(faults.retries, client.retry_something)
        at_times(faults.coordinator_crashes, self.coordinator.crash, random.choice([1, 1, 10]))
        at_times(faults.coordinator_stalls, self.coordinator.stall, 3 * faults.lease_s)
        at_times(faults.takeovers, self._take_over, 2 * faults.lease_s)
        at_times(faults.full_disks, self.coordinator.fill_disk, 10)
        if faults.ambushes:
            self.network.ambush = self._ambush
        if faults.vanishing:
            world.at(start_s + random.random() * CHAOS_S, self.clients[-1].kill)

    def _ambush(self, cable: Cable) -> None:
        """An inventory is late, its connection gone and a newer one there when the coordinator, which was busy, looks:
        of the same agent process, or of the next."""
        world = self.world
        agent = next(agent for agent in self.agents if agent.node.name == cable.host)
        if agent.life is None or not agent.life.state.attempts or self.coordinator.life is None:
            return  # it would say that it has nothing
        if not world.chance(self.faults.ambushes):
            return
        wait_s = 0.3 + world.random.random()
        cable.break_off(late_s=world.now_s + wait_s)
        self.coordinator.stall(wait_s + world.random.random())
        if world.chance(0.3):
            agent.kill(0.1)

    def _take_over(self, seconds: float) -> None:
        # Clients may take two leases to leave a zombie, and some round trips and waits to be back.
        if self.faults.disconnect_grace_s <= 2 * self.faults.lease_s + 5.0:
            for plan in self.history.plans.values():
                plan.is_abandoned = True
        self.history.is_taken_over = True
        self.coordinator.take_over(seconds)

    def _drain(self, node: str) -> None:
        self._set_drain(node, on=True)
        self.world.after(self.world.random.random() * 10, partial(self._set_drain, node, on=False))

    def _revoke(self, agent: Agent) -> None:
        """An admin turns an agent out, and gives its node another certificate."""
        life = self.coordinator.life
        if life is None or life.program.is_stopped:
            return
        core: Any = life._core
        key = Key(agent.serial, "agent", agent.node.name)
        agent.replace_key()
        life.program.enter(core.raise_event, KeysRevokeRequested(Incarnation("admin"), 1, (key,), ""))

    def _set_drain(self, node: str, *, on: bool) -> None:
        """An admin's order. With nobody there to take it, the end of a drain is ordered again."""
        life = self.coordinator.life
        if life is None or life.program.is_stopped:
            if on:
                return
            self.world.after(1.0, partial(self._set_drain, node, on=on))
            return
        core: Any = life._core
        life.program.enter(core.raise_event, DrainRequested(NodeName(node), on))

    def run(self) -> History:
        """To its end.

        Raises:
            Violation: a promise was broken.
        """
        try:
            return self._run()
        finally:
            for agent in self.agents:
                agent.close()

    def _run(self) -> History:
        world = self.world
        world.run(world.now_s + CHAOS_S)
        self.faults.end()
        self.coordinator.end_zombies()
        self.network.mend()
        for agent in self.agents:
            self._set_drain(agent.node.name, on=False)
        if not world.run(world.now_s + PEACE_S, self._is_over):
            raise Violation(f"not all came to an end: {self._unfinished()}")
        self._watch_what_was_left()
        if not world.run(world.now_s + PEACE_S, self._is_over):
            raise Violation(f"not all came to an end: {self._unfinished()}")
        if not world.run(world.now_s + SETTLE_S, self._is_settled):
            raise Violation(f"all is over, and there is left: {self._left()}")
        self.coordinator.check_journal()
        self._judge()
        return self.history

    def close(self) -> None:
        """Let go of what the shipped code holds of the real world: descriptors of results on their way up."""
        for agent in self.agents:
            if agent.life is not None:
                agent.life.connection.close()

    def _watch_what_was_left(self) -> None:
        """Another process attaches to detached jobs whose client is gone."""
        left = [
            job
            for client in self.clients
            for job in client.jobs
            if job.plan.spec.detached and job.plan.opened and not job.is_done
        ]
        if left:
            owner = left[0].client.name
            mine = [job for job in left if job.client.name == owner]
            watcher = Client(self.world, self.network, self.history, self.faults, f"{owner[0]}9", mine)
            self.clients.append(watcher)
            watcher._leave_when_done()

    def _is_over(self) -> bool:
        return all(client.is_over for client in self.clients)

    def _unfinished(self) -> list[str]:
        return [text for client in self.clients if not client.is_over for text in client.unfinished()]

    def _is_settled(self) -> bool:
        return not self._left()

    def _left(self) -> list[str]:
        """Attempts and ends that agents still have, though all clients are content."""
        gone = {id for id, plan in self.history.plans.items() if plan.is_abandoned}  # noqa: A001
        left = []
        for agent in self.agents:
            if agent.life is None:
                continue
            state = agent.life.state
            left += [f"{agent.node.name} runs {a.start}" for a in state.attempts.values() if a.start.job not in gone]
            left += [f"{agent.node.name} keeps {end}" for end in state.ends.values() if end.job not in gone]
        return left

    def _judge(self) -> None:
        history = self.history
        for client in self.clients:
            if client.is_dead:
                continue
            for job in client.jobs:
                count = job.plan.upto if job.track is not None and job.track.is_observer else len(job.plan.items)
                missing = [index for index in range(count) if (client.name, (job.id, index)) not in history.seen]
                if (
                    missing
                    and not job.is_lost
                    and not (job.plan.is_abandoned and client.is_leaving and not job.is_done)
                ):
                    raise Violation(f"{job.id}: client {client.name} was never told how {missing} ended")


def simulate(seed: int, theme: str = "") -> History:
    """Run one history; with `theme`, that of the seed which has this one.

    Raises:
        AssertionError: a promise or an invariant was broken. The seed reproduces it.
    """
    level = logging.root.manager.disable
    collects = gc.isenabled()
    logging.disable(logging.CRITICAL)
    gc.disable()  # a world is one large cycle: looking for garbage in it is a fifth of the time, and finds none
    try:
        with plain_wire():
            simulation = Simulation(seed, theme)
            try:
                return simulation.run()
            finally:
                simulation.close()
    finally:
        logging.disable(level)
        if collects:
            gc.enable()
