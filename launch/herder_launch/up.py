"""Bring a cluster up, or repair it: the coordinator on its host, then an agent on each host, all at the same time.

The way of `herder up`: every host is connected to and given Herder at once; the coordinator starts as soon as its host
is ready, and each agent as soon as the coordinator's address is known. Keys: the coordinator's identity travels over
the SSH channel's stdin; an agent makes its key on its node and only the request and the certificate travel. What was
started is recorded *before* it is started, so that a launcher which is killed leaves nothing that `herder down` does
not know. A host that fails is named with its reason and left out; the others go on.
"""

from __future__ import annotations

import os
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from herder_launch import control, record
from herder_launch.display import Board
from herder_launch.errors import HostFailed, NotDone
from herder_launch.hosts import HostList, HostSpec
from herder_launch.install import Installed, ensure_installed
from herder_launch.place import LocalPlace, Place, SshPlace, ask, local_python
from herder_launch.plan import LOCAL, agent_action, choose_coordinator
from herder_launch.record import Record, Started
from herder_launch.ssh import FAN_OUT_MAX, Connection
from herder_shared import tls
from herder_shared.config import PORT, Profile, create_profile, load_profile, parse_address, profiles_dir, save_profile
from herder_shared.errors import HerderError
from herder_shared.ids import NodeName

#: A program under load reads its journal or probes its machine before it says hello.
HELLO_TIMEOUT_S = 30.0
#: Between SIGTERM and SIGKILL of an agent or coordinator: its children have their own grace within.
END_GRACE_S = 10.0
#: How long agents which said hello may take to be listed.
LISTED_TIMEOUT_S = 20.0
#: A certificate with fewer days left is replaced.
CERTIFICATE_DAYS_MIN = 7
DEFAULT_PROFILE = "default"


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What the user asked for beyond the hosts. None: as found."""

    profile: str | None = None
    coordinator: str | None = None
    listen: str | None = None
    http_listen: str | None = None
    wheels: Path | None = None


@dataclass(slots=True)
class UpResult:
    """What came of it. `failures` maps a program's row to its reason."""

    profile: Profile
    nodes: list[NodeName] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    is_coordinator_up: bool = False


def bring_up(hosts: HostList, options: UpOptions, board: Board) -> UpResult:
    """Bring the cluster up and wait until its agents are listed. Safe to repeat: what runs is left alone.

    Raises:
        ConfigError: nothing can be done at all: the profile, the hosts or the options are wrong.
    """
    profile = open_profile(options.profile)
    with record.exclusive(profile.folder):
        launch = _Launch(profile, hosts, options, board)
        return launch.run()


def open_profile(name: str | None) -> Profile:
    """The profile to use; made when there is none of that name."""
    chosen = name or os.environ.get("HERDER_PROFILE")
    root = profiles_dir(os.environ)
    if chosen is None and not (root / "active").exists():
        chosen = DEFAULT_PROFILE
    if chosen is not None and not (root / chosen / "profile.toml").exists():
        return create_profile(chosen)
    return load_profile(chosen)


class _Launch:
    """One `herder up`. Its methods that take a place run in threads of the pool; `_record` is theirs under `_lock`."""

    def __init__(self, profile: Profile, hosts: HostList, options: UpOptions, board: Board) -> None:
        self._profile = profile
        self._hosts = hosts
        self._options = options
        self._board = board
        self._record: Record = record.load(profile.folder)
        self._lock = threading.Lock()
        self._failures: dict[str, str] = {}

    def run(self) -> UpResult:
        recorded = self._record.coordinator.host if self._record.coordinator else None
        spec = choose_coordinator(self._hosts, self._options.coordinator, recorded)
        with ThreadPoolExecutor(FAN_OUT_MAX, "launch") as pool:
            try:
                # first in the pool's queue, so whoever waits for it does not wait for ever
                coordinator = pool.submit(self._coordinator, spec)
                agents = {each.node: pool.submit(self._agent, each, coordinator) for each in self._hosts.hosts}
                up = {node for node, future in agents.items() if self._succeeded(f"agent {node}", future)}
                is_up = self._succeeded("coordinator", coordinator)
                listed = self._listed(up) if is_up else set()
                listed |= self._replaced(pool, coordinator, up - listed)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return UpResult(self._profile, sorted(listed), dict(self._failures), is_up)

    # --- the coordinator ---

    def _coordinator(self, spec: HostSpec | None) -> tuple[str, ...]:
        """Have it running; its addresses."""
        if self._profile.addresses and self._record.coordinator is None and not self._options.coordinator:
            self._board.set("coordinator", "ready", f"{', '.join(self._profile.addresses)}, not started by `up`")
            return self._profile.addresses
        self._board.set("coordinator", "connecting", str(spec or LOCAL))
        place, host = _place_of(spec)
        try:
            return self._coordinator_on(place, spec, host)
        finally:
            place.close()

    def _coordinator_on(self, place: Place, spec: HostSpec | None, host: str) -> tuple[str, ...]:
        python = spec.python if spec else local_python()
        installed = self._install(place, python, "coordinator", "coordinator")
        folder = f"{installed.state_dir}/{self._profile.cluster[:12]}/coordinator"
        started = Started(spec or HostSpec(LOCAL), folder, installed.python)
        with self._lock:
            self._record.coordinator = started
            record.save(self._profile.folder, self._record)
        listen, http = self._listen_addresses(place, installed, host)
        identity = f"{folder}/identity"
        files = {path.name: path.read_text() for path in self._profile.coordinator.iterdir() if path.suffix == ".pem"}
        program = self._program(place, started)
        if program is None or not program["alive"]:
            self._board.set("coordinator", "starting", str(spec or LOCAL))
            ask(place, installed.python, {"verb": "write_identity", "folder": identity, "files": files})
        argv = [*_module(installed, "herder_coordinator"), "--identity", identity, "--state-dir", f"{folder}/state"]
        program = self._start(place, started, [*argv, "--listen", listen, "--http-listen", http])
        address = self._advertised(program["hello"]["address"], host)
        self._profile = msgspec.structs.replace(
            self._profile, addresses=(address,), http=program["hello"].get("http") or ""
        )
        save_profile(self._profile)
        self._board.set(
            "coordinator", "ready", f"{address}, pid {program['pid']} on {spec or LOCAL}, state in {folder}"
        )
        return self._profile.addresses

    def _listen_addresses(self, place: Place, installed: Installed, host: str) -> tuple[str, str]:
        """What the coordinator is to bind: an address which agents reach, and HTTP on loopback."""
        known = self._profile.addresses
        port = parse_address(known[0], PORT)[1] if known else PORT
        if self._options.listen:
            bind, port = parse_address(self._options.listen, PORT)
        else:
            bind = ask(place, installed.python, {"verb": "bind_address", "names": [host]})["address"]
        return _joined(bind, port), self._options.http_listen or f"127.0.0.1:{port + 1}"

    def _advertised(self, bound: str, host: str) -> str:
        """Where agents and clients find it: as the user said, else by the name or address that SSH uses."""
        port = parse_address(bound, PORT)[1]
        asked = parse_address(self._options.listen, PORT)[0] if self._options.listen else ""
        return _joined(asked if asked not in ("", "0.0.0.0", "::") else host, port)

    # --- agents ---

    def _agent(self, spec: HostSpec, coordinator: Future[tuple[str, ...]], *, replace: bool = False) -> None:
        row = f"agent {spec.node}"
        self._board.set(row, "connecting", str(spec))
        place, _ = _place_of(spec)
        try:
            installed = self._install(place, spec.python, "agent", row)
            self._board.set(row, "waiting", "for the coordinator")
            try:
                addresses = coordinator.result()
            except HerderError as error:
                raise HostFailed(str(spec), "not started, as the coordinator is not up") from error
            self._agent_on(place, spec, installed, addresses, replace=replace)
        finally:
            place.close()

    def _agent_on(
        self, place: Place, spec: HostSpec, installed: Installed, addresses: tuple[str, ...], *, replace: bool
    ) -> None:
        row = f"agent {spec.node}"
        folder = f"{installed.state_dir}/{self._profile.cluster[:12]}/agent-{spec.node}"
        started = Started(spec, folder, installed.python)
        with self._lock:
            self._record.agents[spec.node] = started
            record.save(self._profile.folder, self._record)
        program = self._program(place, started)
        running = program["argv"] if program is not None and program["alive"] and program.get("hello") else None
        action = "replace" if replace else agent_action(running, addresses)
        if action == "keep":
            assert program is not None
            self._board.set(row, "waiting", f"runs already, pid {program['pid']}")
            return
        if action == "replace":
            self._board.set(row, "stopping", "to be replaced")
            stop(place, started)
        self._board.set(row, "starting", "key and certificate")
        self._enrol(place, started, spec)
        argv = [
            *_module(installed, "herder_agent"),
            "--identity",
            f"{folder}/identity",
            "--state-dir",
            f"{folder}/state",
        ]
        for address in addresses:
            argv += ["--coordinator", address]
        program = self._start(place, started, [*argv, "--node", spec.node, *_settings(spec)])
        self._board.set(row, "waiting", f"started, pid {program['pid']}")

    def _enrol(self, place: Place, started: Started, spec: HostSpec) -> None:
        """The node makes a key; the profile's authority signs. Nothing secret travels."""
        identity = f"{started.folder}/identity"
        answer = ask(
            place,
            started.python,
            {
                "verb": "request_certificate",
                "folder": identity,
                "name": spec.node,
                "cluster": self._profile.cluster,
                "days_min": CERTIFICATE_DAYS_MIN,
            },
        )
        if answer["have"]:
            return
        certificate = tls.sign_request(self._profile.authority, answer["request"].encode(), "agent", spec.node)
        ask(
            place,
            started.python,
            {
                "verb": "install_certificate",
                "folder": identity,
                "certificate": certificate.decode(),
                "authority": (self._profile.authority / "ca.pem").read_text(),
            },
        )

    # --- both ---

    def _install(self, place: Place, python: str | None, role: str, row: str) -> Installed:
        self._board.set(row, "preparing", "looking for Herder")
        return ensure_installed(
            place, python, (role,), self._options.wheels, lambda what: self._board.set(row, "preparing", what)
        )

    def _program(self, place: Place, started: Started) -> dict[str, Any] | None:
        answer = ask(place, started.python, {"verb": "look", "folders": [started.folder]})
        program: dict[str, Any] | None = answer["programs"][started.folder]
        return program

    def _start(self, place: Place, started: Started, argv: list[str]) -> dict[str, Any]:
        request: dict[str, object] = {
            "verb": "start",
            "folder": started.folder,
            "argv": argv,
            "hello_timeout_s": HELLO_TIMEOUT_S,
            "grace_s": END_GRACE_S,
        }
        try:
            answer = ask(place, started.python, request, timeout_s=HELLO_TIMEOUT_S + 2 * END_GRACE_S)
        except NotDone:
            self._unrecord(started)
            raise
        program: dict[str, Any] = answer["program"]
        return program

    def _unrecord(self, started: Started) -> None:
        """It is known not to run: nothing is left that `down` would have to end."""
        with self._lock:
            if self._record.coordinator == started:
                self._record.coordinator = None
            agents = self._record.agents
            self._record.agents = {node: each for node, each in agents.items() if each != started}
            record.save(self._profile.folder, self._record)

    def _succeeded(self, row: str, future: Future[Any]) -> bool:
        try:
            future.result()
        except HerderError as error:
            self._fail(row, str(error))
            return False
        return True

    def _fail(self, row: str, reason: str) -> None:
        self._failures[row] = reason
        self._board.set(row, "failed", reason)

    # --- the end ---

    def _listed(self, nodes: set[NodeName]) -> set[NodeName]:
        """Wait until the coordinator lists them. Where it cannot be reached from here, their hello must do."""
        try:
            listed = control.wait_nodes(self._profile, nodes, LISTED_TIMEOUT_S)
        except HerderError as error:
            self._board.set("client", "waiting", f"cannot reach the coordinator from here: {error}")
            listed = nodes
        for node in listed:
            self._board.set(f"agent {node}", "ready", "")
        return listed

    def _replaced(
        self, pool: ThreadPoolExecutor, coordinator: Future[tuple[str, ...]], nodes: set[NodeName]
    ) -> set[NodeName]:
        """Agents that run and are not listed are hung, or were started for another life: start them anew, once."""
        if not nodes or not self._succeeded("coordinator", coordinator):
            return set()
        again = {
            spec.node: pool.submit(self._agent, spec, coordinator, replace=True)
            for spec in self._hosts.hosts
            if spec.node in nodes
        }
        up = {node for node, future in again.items() if self._succeeded(f"agent {node}", future)}
        listed = self._listed(up)
        for node in up - listed:
            self._fail(f"agent {node}", f"started, but not listed within {LISTED_TIMEOUT_S:.0f} s: see its log")
        return listed


def stop(place: Place, *programs: Started) -> list[str]:
    """End programs of one host; the folders of those which ran.

    Raises:
        HostFailed: one does not end, or the host does not answer.
    """
    request: dict[str, object] = {
        "verb": "stop",
        "folders": [program.folder for program in programs],
        "grace_s": END_GRACE_S,
    }
    timeout_s = 30.0 + 2 * END_GRACE_S * len(programs)
    ended: list[str] = ask(place, programs[0].python, request, timeout_s=timeout_s)["ended"]
    return ended


def _place_of(spec: HostSpec | None) -> tuple[Place, str]:
    """Connect to a host; with the name or address by which others reach it."""
    if spec is None or spec.host == LOCAL:
        return LocalPlace(), _own_address()
    connection = Connection.open(spec)
    return SshPlace(connection), connection.target.host


def _own_address() -> str:
    """The address with which this machine goes out: no packet is sent for it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("198.51.100.1", 9))  # TEST-NET-2: only the route is looked up
        except OSError:
            return socket.gethostname()
        return str(sock.getsockname()[0])


def _module(installed: Installed, name: str) -> list[str]:
    return [installed.python, "-P", "-m", name]


def _settings(spec: HostSpec) -> list[str]:
    """What the user fixed for this node, as the agent's options."""
    argv: list[str] = []
    for option, value in (("--cores", spec.cores), ("--memory", spec.memory), ("--gpus", spec.gpus)):
        if value is not None:
            argv += [option, str(value)]
    for label in spec.labels:
        argv += ["--label", label]
    return argv


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
