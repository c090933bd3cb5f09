"""HTTP, read-only: metrics, service discovery, health, the JSON API and the page. Nothing that it serves changes
anything.

It runs in the coordinator's event loop, so that a request sees the state between two turns and never in the middle of
one. A request's `Host` must be an address, a loopback name or a name of this machine: a page elsewhere that has its
own name point here (DNS rebinding) is turned away. Nothing but GET and HEAD is known."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import logging
import re
import socket
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from herder_coordinator.core import views
from herder_coordinator.core.state import State
from herder_coordinator.server.agents import Agents
from herder_coordinator.server.metrics import Metrics
from herder_shared.errors import ConfigError, Unreachable
from herder_shared.ids import JobId, NodeName
from herder_shared.limits import EXPOSITION_AGE_S_MAX, SD_LOST_AGENT_S
from herder_shared.states import AgentState
from herder_shared.wire.messages import Metrics as Exposition
from herder_shared.wire.messages import NodeInfo, StatusInfo

log = logging.getLogger(__name__)

#: Path and query together. Ours are below 100.
URL_BYTES_MAX = 2_048
#: Open connections; more are answered 503. Browsers and Prometheus need a few each.
CONNECTIONS_MAX = 256
#: ... and more than so many are not answered at all: each costs a descriptor, which agents and clients need.
SOCKETS_MAX = 2 * CONNECTIONS_MAX
#: For the first request to come.
FIRST_REQUEST_S = 10.0
#: An agent has this long to answer; Prometheus waits 10 s by default.
PULL_TIMEOUT_S = 5.0
#: Expositions of agents kept: one of each form per node.
EXPOSITIONS_MAX = 4_096

_LOOPBACK_NAMES = frozenset({"localhost", "localhost.localdomain", "ip6-localhost"})
_PAGE = (Path(__file__).parent / "page.html").read_bytes()


@dataclass(slots=True)
class Sources:
    """What HTTP reads. `state` gives None until the journal is replayed; `why_not_ready` and `trouble` (what keeps a
    live coordinator from serving as it should) give "" when all is well."""

    state: Callable[[], State | None]
    now_s: Callable[[], float]
    status: Callable[[State], StatusInfo]
    why_not_ready: Callable[[], str]
    trouble: Callable[[], str]
    agents: Callable[[], Agents | None]
    metrics: Metrics


class _Server(uvicorn.Server):
    """uvicorn without its signal handling: signals belong to the program."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()


class _Connection(H11Protocol):
    """Bounded in number, and closed when it asks for nothing."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > SOCKETS_MAX:
            transport.abort()
        else:
            self._patience = self.loop.call_later(FIRST_REQUEST_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._patience is not None:
            self._patience.cancel()

    def _look(self) -> None:
        if not self.headers:  # of its first request
            self.transport.abort()


class HttpServer:
    """Listens, and serves `app`."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self.address = ""

    async def listen(self, host: str, port: int) -> str:
        """Start. Gives "host:port" as bound.

        Raises:
            ConfigError: the address cannot be had.
        """
        listener = _bind(host, port)
        bound = listener.getsockname()
        self.address = f"[{bound[0]}]:{bound[1]}" if ":" in bound[0] else f"{bound[0]}:{bound[1]}"
        names = {host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
        config = uvicorn.Config(
            Guard(make_app(self._sources), frozenset(names)),
            log_config=None,
            access_log=False,
            lifespan="off",
            http=_Connection,
            ws="none",
            server_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS_MAX,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=16 * 1024,
        )
        self._server = _Server(config)
        self._serving = asyncio.ensure_future(self._server.serve(sockets=[listener]))
        await self._server.is_up.wait()
        return self.address

    async def close(self) -> None:
        """Answer what is under way, for a second at most, and end."""
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await asyncio.wait([self._serving])
            self._serving = self._server = None


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen for HTTP on {host}:{port}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        cure = "another program has this port; use another with --http-listen" if error.errno == 98 else str(error)
        raise ConfigError(f"cannot listen for HTTP on {host}:{port}: {cure}") from error
    return listener


class Guard:
    """In front of everything: the length of the URL, the host's name, headers that tell browsers to stay careful."""

    def __init__(self, app: ASGIApp, names: frozenset[str]) -> None:
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        refused = self._refusal(scope) if scope["type"] == "http" else None
        if refused is not None:
            await refused(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        if len(scope.get("raw_path", b"")) + len(scope["query_string"]) > URL_BYTES_MAX:
            return PlainTextResponse("the URL is too long\n", 414)
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or not is_known_host(hosts[0], self._names):
            return PlainTextResponse("this host name is not one of the coordinator's\n", 421)
        return None


def is_known_host(text: str, names: frozenset[str]) -> bool:
    """Whether a `Host` header names us: an address (which no rebinding needs), a loopback name, or one of `names`."""
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::\d{1,5})?", text)
    if found is None:
        return False
    host = found[1].strip("[]").lower().rstrip(".")
    if host in _LOOPBACK_NAMES or host in names:
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def make_app(sources: Sources) -> Starlette:
    """The application."""
    pages = _Pages(sources)
    routes = {
        "/": pages.page,
        "/metrics": pages.metrics,
        "/sd": pages.service_discovery,
        "/agents/{node}/metrics": pages.agent_metrics,
        "/healthz": pages.health,
        "/readyz": pages.readiness,
        "/api/v1/status": pages.status,
        "/api/v1/nodes": pages.nodes,
        "/api/v1/jobs": pages.jobs,
        "/api/v1/jobs/{job}": pages.job,
        "/api/v1/jobs/{job}/tasks": pages.tasks,
        "/api/v1/workloads": pages.workloads,
    }
    return Starlette(routes=[Route(path, endpoint, methods=["GET"]) for path, endpoint in routes.items()])


class _Pages:
    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._expositions: dict[tuple[NodeName, bool], tuple[float, Exposition]] = {}
        self._pulls: dict[tuple[NodeName, bool], asyncio.Future[Exposition]] = {}
        style, script = _inline_hashes(_PAGE)
        self._page_headers = {
            "content-security-policy": (
                f"default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; img-src data:;"
                " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            ),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }

    async def page(self, _request: Request) -> Response:
        return Response(_PAGE, media_type="text/html; charset=utf-8", headers=self._page_headers)

    async def metrics(self, request: Request) -> Response:
        content, content_type = self._sources.metrics.exposition(request.headers.get("accept", ""))
        return Response(content, headers={"content-type": content_type})

    async def health(self, _request: Request) -> Response:
        """Whether the program lives, which a new start could not mend; and what troubles it."""
        return PlainTextResponse(f"{self._sources.trouble() or 'ok'}\n")

    async def readiness(self, _request: Request) -> Response:
        reason = self._sources.why_not_ready()
        return PlainTextResponse(f"{reason}\n", 503) if reason else PlainTextResponse("ready\n")

    # --- service discovery, agents' metrics --------------------------------------------------------------------------

    async def service_discovery(self, request: Request) -> Response:
        state = self._sources.state()
        nodes = views.nodes(state, self._sources.now_s()) if state is not None else []
        return _json([_target(node, request.headers["host"]) for node in nodes if _is_listed(node)])

    async def agent_metrics(self, request: Request) -> Response:
        state, agents = self._sources.state(), self._sources.agents()
        node = NodeName(request.path_params["node"])
        if state is None or agents is None:
            return self._not_ready()
        if node not in state.nodes:
            return PlainTextResponse("no such node\n", 404)
        openmetrics = "application/openmetrics-text" in request.headers.get("accept", "")
        try:
            exposition = await self._exposition(agents, node, openmetrics)
        except Unreachable as error:
            return PlainTextResponse(f"{error}\n", 503)
        # Only what an exposition can be: an agent must not choose how a browser shows its bytes.
        kind = exposition.content_type
        kind = kind if kind.startswith(("text/plain", "application/openmetrics-text")) else "text/plain"
        return Response(exposition.text, headers={"content-type": kind, "x-content-type-options": "nosniff"})

    async def _exposition(self, agents: Agents, node: NodeName, openmetrics: bool) -> Exposition:
        """As pulled within the last `EXPOSITION_AGE_S_MAX`; those who ask at once share one pull."""
        key = (node, openmetrics)
        cached = self._expositions.get(key)
        if (
            cached is not None
            and self._sources.now_s() - cached[0] <= EXPOSITION_AGE_S_MAX
            and agents.is_connected(node)
        ):
            return cached[1]
        pull = self._pulls.get(key)
        if pull is None:
            pull = asyncio.ensure_future(agents.pull_metrics(node, openmetrics=openmetrics, timeout_s=PULL_TIMEOUT_S))
            self._pulls[key] = pull
            pull.add_done_callback(lambda done: self._pulled(key, done))
        exposition = await asyncio.shield(pull)
        self._expositions.pop(key, None)
        self._expositions[key] = (self._sources.now_s(), exposition)
        while len(self._expositions) > EXPOSITIONS_MAX:
            del self._expositions[next(iter(self._expositions))]
        return exposition

    def _pulled(self, key: tuple[NodeName, bool], done: asyncio.Future[Exposition]) -> None:
        self._pulls.pop(key, None)
        if not done.cancelled():
            done.exception()  # whoever asked may have gone: then nobody else would take it

    # --- the JSON API ------------------------------------------------------------------------------------------------

    async def status(self, _request: Request) -> Response:
        return self._read(lambda state, _now_s: self._sources.status(state))

    async def nodes(self, _request: Request) -> Response:
        return self._read(views.nodes)

    async def jobs(self, _request: Request) -> Response:
        return self._read(views.jobs)

    async def workloads(self, _request: Request) -> Response:
        return self._read(lambda state, _now_s: views.workloads(state))

    async def job(self, request: Request) -> Response:
        job = JobId(request.path_params["job"])
        return self._read(lambda state, now_s: views.job(state, job, now_s))

    async def tasks(self, request: Request) -> Response:
        job = JobId(request.path_params["job"])
        return self._read(lambda state, _now_s: views.tasks(state, job))

    def _read(self, view: Callable[[State, float], Any]) -> Response:
        state = self._sources.state()
        if state is None:
            return self._not_ready()
        found = view(state, self._sources.now_s())
        if found is None:
            return _json({"error": "JobNotFound", "message": "there is no such job, or it has been forgotten"}, 404)
        return _json(found)

    def _not_ready(self) -> Response:
        text = self._sources.why_not_ready() or "not ready"
        return _json({"error": "Unreachable", "message": text}, 503)


def _json(content: Any, status_code: int = 200) -> Response:
    headers = {"x-content-type-options": "nosniff", "cache-control": "no-store"}
    return Response(msgspec.json.encode(content), status_code, headers, media_type="application/json")


def _is_listed(node: NodeInfo) -> bool:
    return node.state is not AgentState.LOST or node.silent_s <= SD_LOST_AGENT_S


def _target(node: NodeInfo, host: str) -> dict[str, object]:
    """One entry of Prometheus's HTTP service discovery. `host` is how Prometheus reached us."""
    name = node.facts.node
    if node.facts.metrics_listen:
        return {"targets": [node.facts.metrics_listen], "labels": {"node": name}}
    return {"targets": [host], "labels": {"node": name, "__metrics_path__": f"/agents/{quote(name, safe='')}/metrics"}}


def _inline_hashes(page: bytes) -> tuple[str, str]:
    """The page's own style and script, as a content security policy names them: no other may run."""
    hashes = []
    for tag in (b"style", b"script"):
        found = re.search(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        assert found is not None
        hashes.append(f"sha256-{b64encode(hashlib.sha256(found[1]).digest()).decode()}")
    return hashes[0], hashes[1]
