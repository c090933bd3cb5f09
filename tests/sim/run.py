"""One seed, one history: the world is built, shaken, left in peace, and judged."""

from __future__ import annotations

from dataclasses import dataclass

from herder_shared.states import Outcome
from herder_shared.wire.messages import AttemptStart
from sim.agent import Agent
from sim.client import Client
from sim.coordinator import Coordinator
from sim.history import History, Violation
from sim.world import World

#: Virtual seconds of faults, and then of peace, in which all must come to an end: longer than every lease and grace.
CHAOS_S = 40.0
PEACE_S = 600.0
#: What is still under way when the last client is content.
SETTLE_S = 120.0


@dataclass
class Faults:
    """What goes wrong in this history, and how often: rates per second, probabilities, seconds."""

    tasks: int
    task_s: float
    pause_s: float
    delay_s: float
    sync_s: float
    dependencies: float
    labels: bool
    cancels: float
    agent_links: float
    client_links: float
    silent_share: float
    agent_kills: float
    agent_stops: float
    coordinator_crashes: float
    coordinator_stalls: float
    vanishing: bool
    start_failures: float
    exceptions: float
    signals: float
    templates: float
    fork_deaths: float
    cut_off: frozenset[str] = frozenset()

    def is_cut_off(self, node: str) -> bool:
        return node in self.cut_off

    @classmethod
    def draw(cls, world: World) -> Faults:
        """Each kind of fault is there in about half of all histories."""
        random = world.random

        def rate(often: float) -> float:
            return random.random() * often if random.random() < 0.5 else 0.0

        return cls(
            tasks=random.choice([3, 10, 25]),
            task_s=random.choice([0.01, 0.5, 3.0]),
            pause_s=random.choice([0.05, 1.0, 5.0]),
            delay_s=random.choice([0.001, 0.05, 1.0]),
            sync_s=random.choice([0.001, 0.02, 0.02, 3.0]),
            dependencies=rate(0.5),
            labels=random.random() < 0.3,
            cancels=rate(0.3),
            agent_links=rate(0.3),
            client_links=rate(0.3),
            silent_share=rate(0.7),
            agent_kills=rate(0.15),
            agent_stops=rate(0.1),
            coordinator_crashes=rate(0.15),
            coordinator_stalls=rate(0.05),
            vanishing=random.random() < 0.15,
            start_failures=rate(0.1),
            exceptions=rate(0.2),
            signals=rate(0.2),
            templates=rate(0.1),
            fork_deaths=rate(0.5),
        )

    def end(self) -> None:
        self.agent_links = self.client_links = self.silent_share = self.agent_kills = self.agent_stops = 0.0
        self.coordinator_crashes = self.coordinator_stalls = self.cancels = self.start_failures = self.templates = 0.0
        self.vanishing = False


class Simulation:
    def __init__(self, seed: int) -> None:
        self.world = World(seed)
        self.history = History()
        self.faults = Faults.draw(self.world)
        random = self.world.random
        mean_s = self.faults.sync_s
        self.coordinator = Coordinator(self.world, self.history, lambda: random.random() * 2 * mean_s)
        # One node has an even number of cores, so that every request can be met.
        cores = [2, *(random.randint(1, 4) for _ in range(random.randint(0, 3)))]
        self.agents = [
            Agent(self.world, self.coordinator, self.history, self.faults, name=f"node{number}", cores=count)
            for number, count in enumerate(cores)
        ]
        self.clients = [
            Client(self.world, self.coordinator, self.history, self.faults, f"{'abc'[number]}{number}")
            for number in range(random.randint(1, 3))
        ]
        self._schedule()

    def _schedule(self) -> None:
        """Draw when each fault happens."""
        random, faults, world = self.world.random, self.faults, self.world
        start_s = world.now_s

        def times(rate: float) -> list[float]:
            count = int(rate * CHAOS_S + random.random())
            return [start_s + random.random() * CHAOS_S for _ in range(count)]

        for agent in self.agents:
            for due_s in times(faults.agent_links):
                world.at(due_s, agent.break_link)
            for due_s in times(faults.agent_kills):
                world.at(due_s, lambda agent=agent: agent.kill(random.random() * 10))  # type: ignore[misc]
            for due_s in times(faults.agent_stops):
                world.at(due_s, lambda agent=agent: agent.stop(random.random() * 50))  # type: ignore[misc]
        for client in self.clients:
            for due_s in times(faults.client_links):
                world.at(due_s, client.break_link)
            for due_s in times(faults.cancels):
                world.at(due_s, client.cancel_something)
        for due_s in times(faults.coordinator_crashes):
            world.at(due_s, lambda: self.coordinator.crash(random.random() * random.choice([1, 1, 30])))
        for due_s in times(faults.coordinator_stalls):
            world.at(due_s, lambda: self.coordinator.stall(random.random() * 60))
        if faults.vanishing:
            world.at(start_s + random.random() * CHAOS_S, self.clients[-1].vanish)

    def run(self) -> History:
        world = self.world
        world.run(world.now_s + CHAOS_S)
        self.faults.end()
        for agent in self.agents:
            if agent.wire is not None and agent.wire.silent:
                world.after(1.0, lambda agent=agent, wire=agent.wire: agent.closed(wire))  # type: ignore[misc]
        if not world.run(world.now_s + PEACE_S, self._is_over):
            raise Violation(f"not all came to an end: {self._unfinished()}")
        world.run(world.now_s + SETTLE_S, lambda: not any(self._kept(agent) for agent in self.agents))
        if self.coordinator.is_up:
            self.coordinator.check_journal()
        self._judge()
        return self.history

    def _is_over(self) -> bool:
        return all(client.is_done() for client in self.clients)

    def _unfinished(self) -> list[str]:
        return [
            f"{plan.spec.job}: {plan.acknowledged} of {len(plan.tasks)} acknowledged, {len(plan.ends)} ended, "
            f"closed {plan.is_closed}, cancels {plan.cancels}"
            for client in self.clients
            for plan in client.plans
            if not client.is_done()
        ]

    def _judge(self) -> None:
        gone = {plan.spec.job for client in self.clients if client.is_gone for plan in client.plans}
        for key in sorted(self.history.acknowledged):
            if key[0] not in gone and key not in self.history.seen:
                raise Violation(f"{key} was accepted and has no terminal record")
        for key, end in self.history.seen.items():
            if end.outcome is Outcome.SUCCEEDED and not self.history.starts[key]:
                raise Violation(f"{key} succeeded and never ran")
        for agent in self.agents:
            if kept := self._kept(agent):
                raise Violation(f"all is over, and {agent.facts.node} still has {kept}")

    def _kept(self, agent: Agent) -> list[AttemptStart]:
        """Attempts that the agent still has, though all clients are content."""
        gone = {plan.spec.job for client in self.clients if client.is_gone for plan in client.plans}
        return [run.start for run in agent.runs.values() if run.start.job not in gone]


def simulate(seed: int) -> History:
    """Run one history.

    Raises:
        AssertionError: a promise or an invariant was broken. The seed reproduces it.
    """
    return Simulation(seed).run()
