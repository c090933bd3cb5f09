"""The agent's program: flags, file and environment -> configuration -> one event loop until it is told to stop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import fcntl
import gc
import json
import logging
import os
import resource
import secrets
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path

import click
import uvloop

from herder_agent.core.state import new_state
from herder_agent.metrics import Exposition, MetricsServer, NodeCollector, own_version
from herder_agent.runtime import host, reap
from herder_agent.runtime.environments import marker
from herder_agent.runtime.loop import AgentLoop, Place
from herder_shared.config import AgentConfig, default_state_dir, load_config, parse_address, parse_bytes, parse_walltime
from herder_shared.errors import ConfigError, HerderError
from herder_shared.ids import ClusterId, Incarnation, NodeName
from herder_shared.limits import PROTOCOL_VERSION
from herder_shared.tls import client_context, cluster_of, own_peer, server_name
from herder_shared.wire.messages import Heartbeat, Hello, NodeFacts
from herder_shared.wire.stream import Dialler

_log = logging.getLogger("herder.agent")

_DEFAULT_PORT = 7711
_METRICS_TIMEOUT_S = 5.0
#: "I am still trying" is logged at most this often.
_FAILING_LOG_S = 30.0


class Agent:
    """One life of an agent."""

    def __init__(self, config: AgentConfig, node: NodeName, cluster: ClusterId) -> None:
        self._config = config
        self._node = node
        self._cluster = cluster
        self._incarnation = Incarnation(secrets.token_hex(8))
        self._epoch_file = config.state_dir / "epoch"
        self._epoch_seen = _read_epoch(self._epoch_file)
        self._hello_fd = config.hello_fd
        self._failing_logged_s = -_FAILING_LOG_S
        cpus = config.cpus or host.usable_cpus()
        self._cores = config.cores or host.core_count(cpus, os.environ)
        self._cpus = cpus
        self._memory_bytes = parse_bytes(config.memory) if config.memory else host.memory_total_bytes()
        self._metrics: MetricsServer | None = None
        #: When the machine is no longer ours, by our own clock.
        self._end_s = end_of_node_s(config, time.monotonic(), time.time())

    async def run(self) -> None:
        """Until SIGTERM, SIGINT, the end of the lifeline, or the coordinator's word.

        Raises:
            HerderError: the coordinator refuses us for good.
        """
        loop = asyncio.get_running_loop()
        self._stopping: asyncio.Future[str] = loop.create_future()
        config = self._config
        state = new_state(
            self._node,
            self._cores,
            self._memory_bytes,
            time.monotonic(),
            cpus=self._cpus if config.pin else (),
            gpus=config.gpus,
            resources=config.resources,
            pids=config.pids,
            places=host.places(self._cpus) if config.pin else (),
        )
        place = Place(self._cluster, config.state_dir, dict(os.environ), config.cgroup)
        self._agent = agent = AgentLoop(state, place, stop=self._stop, linked=self._linked)
        collector = NodeCollector(
            state,
            advance=lambda: state.account.advance(time.monotonic()),
            template_pids=agent.templates.pids,
            blob_bytes=lambda: agent.store.size_bytes,
        )
        agent.exposition = Exposition(agent.counts, collector)
        if config.metrics_listen is not None:
            self._serve_metrics(config.metrics_listen, loop)
        dialler = Dialler(
            addresses=[parse_address(address, _DEFAULT_PORT) for address in config.coordinator],
            context=client_context(config.identity),
            server_name=server_name(self._cluster),
            hello=self._hello,
            observer=agent.connection,
            heartbeat=self._heartbeat,
            failing=self._failing,
        )
        self._watch(loop)
        try:
            await self._until_stopped(dialler)
        finally:
            await agent.close()
            if self._metrics is not None:
                self._metrics.close()

    async def _until_stopped(self, dialler: Dialler) -> None:
        refused: HerderError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(dialler.run())
                reason = await self._stopping
                _log.info("stopping: %s", reason)
                self._agent.leave(reason)
                await self._agent.close()
                await dialler.close()
        except* HerderError as errors:
            first = errors.exceptions[0]
            assert isinstance(first, HerderError)
            refused = first
        if refused is not None:
            raise refused

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, signal.Signals(number).name)
        fd = self._config.lifeline_fd
        if fd is not None:

            def ended() -> None:
                if not os.read(fd, 1):
                    loop.remove_reader(fd)
                    self._agent.end_now()
                    self._stop("the lifeline ended")

            loop.add_reader(fd, ended)

    def _stop(self, reason: str) -> None:
        if not self._stopping.done():
            self._stopping.set_result(reason)

    def _hello(self) -> Hello:
        metrics = self._metrics
        facts = NodeFacts(
            node=self._node,
            cores=self._cores,
            memory_bytes=self._memory_bytes,
            labels=self._config.labels,
            gpus=self._config.gpus,
            resources=self._config.resources,
            cpus=self._cpus,
            host=host.host_name(),
            pid=os.getpid(),
            python=python_tag(),
            kernel=host.kernel(),
            state_dir=str(self._config.state_dir),
            metrics_listen="{}:{}".format(*metrics.address) if metrics is not None else "",
            limits=self._agent.groups.reason,
            ends_in_s=max(0.0, self._end_s - time.monotonic()) if self._end_s is not None else None,
        )
        return Hello(
            protocol=PROTOCOL_VERSION,
            cluster=self._cluster,
            incarnation=self._incarnation,
            version=own_version(),
            epoch_seen=self._epoch_seen,
            node=facts,
            python=python_tag(),
        )

    def _heartbeat(self, n: int) -> Heartbeat:
        self._agent.connection.beat(n)
        return Heartbeat(n, self._agent.report())

    def _linked(self, epoch: int) -> None:
        """A session is open: from now on no coordinator of a lower epoch is obeyed, in our next life neither."""
        if epoch > self._epoch_seen:
            self._epoch_seen = epoch
            part = self._epoch_file.with_suffix(".part")
            try:
                part.write_text(f"{epoch}\n")
                part.replace(self._epoch_file)
            except OSError as error:  # our next life may obey an older coordinator: better than not to work at all
                _log.error("the epoch cannot be kept in %s: %s", self._epoch_file, error)
        if self._hello_fd is not None:
            hello = {
                "pid": os.getpid(),
                "address": "",
                "http": "{}:{}".format(*self._metrics.address) if self._metrics is not None else "",
                "epoch": epoch,
                "cluster": self._cluster,
                "node": self._node,
            }
            os.write(self._hello_fd, (json.dumps(hello) + "\n").encode())
            os.close(self._hello_fd)
            self._hello_fd = None

    def _failing(self, error: HerderError, away_s: float) -> None:
        if away_s - self._failing_logged_s >= _FAILING_LOG_S or away_s < self._failing_logged_s:
            self._failing_logged_s = away_s
            _log.warning("without a coordinator for %.0f s: %s", away_s, error)

    def _serve_metrics(self, listen: str, loop: asyncio.AbstractEventLoop) -> None:
        def ask(openmetrics: bool) -> tuple[bytes, str]:
            answer: concurrent.futures.Future[tuple[bytes, str]] = concurrent.futures.Future()
            loop.call_soon_threadsafe(lambda: answer.set_result(self._agent.exposition(openmetrics)))
            return answer.result(_METRICS_TIMEOUT_S)

        address, port = parse_address(listen, 0)
        try:
            self._metrics = MetricsServer(address, port, ask)
        except OSError as error:
            raise ConfigError(f"metrics_listen {listen!r} cannot be had: {error}; choose another port") from error


def end_of_node_s(config: AgentConfig, now_s: float, wall_s: float) -> float | None:
    """When it is over, on the clock of `now_s`: by `walltime`, by `ends_at`, or by the sooner of both."""
    ends = [now_s + parse_walltime(config.walltime)] if config.walltime is not None else []
    if config.ends_at is not None:
        ends.append(now_s + config.ends_at - wall_s)
    return min(ends, default=None)


def python_tag() -> str:
    """Interpreter and cloudpickle of this process, as "3.11/3.1"."""
    cloudpickle = ".".join(version("cloudpickle").split(".")[:2])
    return f"{sys.version_info.major}.{sys.version_info.minor}/{cloudpickle}"


def _read_epoch(file: Path) -> int:
    try:
        text = file.read_text().strip()
    except FileNotFoundError:
        return 0
    return int(text) if text.isdecimal() else 0


def _lock(state_dir: Path) -> int:
    """Hold the state folder for our life.

    Raises:
        ConfigError: another agent has it.
    """
    fd = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(fd, 100).decode("ascii", "replace").strip()
        os.close(fd)
        raise ConfigError(
            f"another agent (pid {holder}) runs on {state_dir}: stop it, or choose another folder"
        ) from None
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return fd


def _prepare_process() -> None:
    """What must be so before the first child: nothing of ours is inherited, orphans come to us, nobody reads us."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2:
            try:
                os.set_inheritable(fd, False)
            except OSError:
                continue  # The descriptor of the listing itself.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    reap.become_subreaper()
    reap.become_undumpable()


def run(config: AgentConfig) -> None:
    """Run an agent until it is told to stop.

    Raises:
        HerderError: the configuration is wrong, or the coordinator refuses us.
    """
    host.prepare_state_dir(config.state_dir)
    cluster = cluster_of(config.identity)
    node = NodeName(config.node or own_peer(config.identity).name)
    lock = _lock(config.state_dir)
    try:
        agent = Agent(config, node, cluster)
        _prepare_process()
        stale = reap.kill_stale(marker(Place(cluster, config.state_dir, {}), node))
        if stale:
            _log.warning("killed %d processes that an earlier agent left behind", stale)
        # Hardly anything that is made per task is part of a cycle.
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(agent.run())
    finally:
        os.close(lock)


@click.command("agent")
@click.option("--config", "file", type=click.Path(path_type=Path, dir_okay=False), help="TOML file with these keys.")
@click.option("--identity", type=click.Path(path_type=Path), help="Folder with cert.pem, key.pem and ca.pem.")
@click.option("--state-dir", type=click.Path(path_type=Path), help="Node-local folder of this agent.")
@click.option("--coordinator", multiple=True, help="HOST:PORT; may be given more than once.")
@click.option("--node", help="Name of this node; default: the one in the certificate.")
@click.option("--cores", type=click.IntRange(1), help="Slots to offer; default: as found on the machine.")
@click.option("--cpus", help="CPUs to use, as 0-3,8.")
@click.option("--memory", help="Memory to offer, as 64GiB.")
@click.option("--label", "labels", multiple=True, help="Label for placement; may be given more than once.")
@click.option("--resource", "resources", multiple=True, help="NAME=AMOUNT; may be given more than once.")
@click.option("--gpus", type=click.IntRange(0), help="GPUs to offer.")
@click.option("--metrics-listen", help="HOST:PORT of an own port for Prometheus.")
@click.option("--pin/--no-pin", default=None, help="Pin tasks to the CPUs of their slots.")
@click.option("--cgroup", help="auto, off, or a folder of control groups v2 that is the agent's own.")
@click.option("--pids", type=click.IntRange(1), help="Processes and threads of one task, where it does not say.")
@click.option("--walltime", help="For how long the machine is ours: seconds, or [[days-]hours:]minutes:seconds.")
@click.option("--ends-at", type=float, help="When it stops being ours, in seconds since 1970 ($SLURM_JOB_END_TIME).")
@click.option("--hello-fd", type=int, help="Write one JSON line there when connected.")
@click.option("--lifeline-fd", type=int, help="End at once when this descriptor ends.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
def command(file: Path | None, **flags: object) -> None:
    """Run this node's agent in the foreground."""
    try:
        config = _configure(file, flags)
        logging.basicConfig(
            level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
        )
        run(config)
    except ConfigError as error:
        click.echo(f"herder agent: {error}", err=True)
        sys.exit(2)
    except HerderError as error:
        click.echo(f"herder agent: {error}", err=True)
        sys.exit(3)


def _configure(file: Path | None, flags: dict[str, object]) -> AgentConfig:
    given: dict[str, object] = {name: value for name, value in flags.items() if value not in (None, ())}
    cpus = given.get("cpus")
    if isinstance(cpus, str):
        try:
            given["cpus"] = tuple(host.parse_cpu_list(cpus))
        except ValueError as error:
            raise ConfigError(f"--cpus {cpus!r} is no list of CPUs, as 0-3,8") from error
    pairs = given.get("resources")
    if isinstance(pairs, tuple):
        try:
            given["resources"] = {name: float(amount) for name, _, amount in (p.partition("=") for p in pairs)}
        except ValueError as error:
            raise ConfigError(f"--resource must be NAME=AMOUNT: {error}") from error
    environ = dict(os.environ)
    given.setdefault("state_dir", _state_dir(file, environ))
    return load_config(AgentConfig, file=file, environ=environ, prefix="agent", flags=given)


def _state_dir(file: Path | None, environ: dict[str, str]) -> Path | None:
    """The default, where neither file nor environment names one."""
    if file is not None or "HERDER_AGENT_STATE_DIR" in environ:
        return None
    return default_state_dir(environ, os.getuid()) / "agent"
