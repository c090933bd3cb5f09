"""SSH connections by paramiko: resolved as OpenSSH resolves them, host keys verified, every wait bounded.

Theory of operation. `ssh -G` gives OpenSSH's own answer for a host (Include, Match, ProxyJump, tokens), which
paramiko's parser does not; that parser is only used where there is no `ssh`. Host keys are looked up by
`known_hosts.py` and never added. Paramiko leaves Nagle's algorithm on, which costs 40 ms a command, and its keep-alive
only sends and never notices a dead peer; so the socket is ours, with TCP_NODELAY and TCP_USER_TIMEOUT. sshd drops
connections at random when many log in at once (MaxStartups): such a drop, and nothing else, is tried again after a
jittered wait. A wrong key, a refused login or a refused connection would end the same way again.
"""

from __future__ import annotations

import binascii
import getpass
import logging
import random
import shutil
import socket
import subprocess
import threading
import time
from base64 import b64decode
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import paramiko

from herder_launch.errors import ConnectFailed, HostFailed
from herder_launch.hosts import HostSpec, parse_host
from herder_launch.known_hosts import known_name, lookup

#: TCP connect, banner, key exchange and login: each may take this long.
CONNECT_TIMEOUT_S = 15.0
#: Sent data that stays unacknowledged for this long ends the connection.
DEAD_PEER_MS = 30_000
#: Connections at a time in one launch: more gain nothing (both ends are bound by their key exchange).
FAN_OUT_MAX = 24
#: Tries of a connection that sshd drops unanswered.
TRIES_MAX = 6
JUMPS_MAX = 8
#: `Channel.sendall` of much at once is quadratic.
SEND_PIECE_BYTES = 256 * 1024
#: What a command may print before it is cut off.
OUTPUT_BYTES_MAX = 4 * 1024 * 1024

# It prints tracebacks of connections that are tried again; all that matters comes back as an exception.
logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)


@dataclass(frozen=True, slots=True)
class Target:
    """Where and how to connect, resolved. `jumps` are SSH destinations, the first to be reached first."""

    host: str
    port: int
    user: str
    identities: tuple[str, ...] = ()
    known_hosts: tuple[Path, ...] = ()
    identities_only: bool = False
    jumps: tuple[str, ...] = ()
    host_key_alias: str = ""
    connect_timeout_s: float = CONNECT_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class Output:
    """What a command printed and how it ended."""

    status: int
    stdout: bytes
    stderr: bytes


def resolve(spec: HostSpec) -> Target:
    """What `~/.ssh/config` and the system's say of a host; what the user named wins.

    Raises:
        ConnectFailed: the configuration is broken, as `ssh` says.
    """
    options = _options_by_ssh(spec) if shutil.which("ssh") else _options_by_paramiko(spec)

    def one(key: str, default: str = "") -> str:
        return options.get(key, [default])[0]

    jump = one("proxyjump", "none")
    timeout = one("connecttimeout", "none")
    known = " ".join([*options.get("userknownhostsfile", []), *options.get("globalknownhostsfile", [])]).split()
    return Target(
        host=one("hostname", spec.host),
        port=spec.port or int(one("port", "22")),
        user=spec.user or one("user") or getpass.getuser(),
        identities=tuple(str(path) for path in map(_expanded, options.get("identityfile", [])) if path.exists()),
        known_hosts=tuple(map(_expanded, known)),
        identities_only=one("identitiesonly") == "yes",
        jumps=() if jump.lower() == "none" else tuple(jump.split(",")),
        host_key_alias=one("hostkeyalias"),
        connect_timeout_s=float(timeout) if timeout.isdecimal() else CONNECT_TIMEOUT_S,
    )


class Connection:
    """One SSH connection with the jump hosts it goes through. Close it; it owns one thread for each hop."""

    def __init__(self, spec: HostSpec, hops: list[paramiko.SSHClient], target: Target) -> None:
        self.spec = spec
        self.target = target
        self._hops = hops

    @classmethod
    def open(cls, spec: HostSpec) -> Self:
        """Connect and log in.

        Raises:
            ConnectFailed: with the reason and what to do. Trying again at once does not help.
        """
        target = resolve(spec)
        if len(target.jumps) > JUMPS_MAX:
            raise ConnectFailed(str(spec), f"ProxyJump names more than {JUMPS_MAX} hosts")
        hops: list[paramiko.SSHClient] = []
        try:
            for jump in target.jumps:
                hop = resolve(parse_host(jump.removeprefix("ssh://")))
                hops.append(_connect(str(spec), hop, hops[-1] if hops else None))
                _open_session_once(hops[-1])
            hops.append(_connect(str(spec), target, hops[-1] if hops else None))
        except BaseException:
            _close_all(hops)
            raise
        return cls(spec, hops, target)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, and its threads. Idempotent."""
        _close_all(self._hops)

    def run(self, command: str, stdin: bytes = b"", timeout_s: float = 30.0) -> Output:
        """Run a command line in the login shell of the other side.

        Raises:
            HostFailed: no answer in `timeout_s`, the connection broke, or it prints more than `OUTPUT_BYTES_MAX`.
        """
        transport = _transport(self._hops[-1])
        try:
            channel = transport.open_session(timeout=timeout_s)
            try:
                return _converse(channel, command, stdin, timeout_s)
            finally:
                channel.close()
        except TimeoutError as error:
            raise HostFailed(str(self.spec), f"no answer in {timeout_s:.0f} s") from error
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise HostFailed(str(self.spec), f"the SSH connection broke: {error or type(error).__name__}") from error


def _converse(channel: paramiko.Channel, command: str, stdin: bytes, timeout_s: float) -> Output:
    channel.settimeout(timeout_s)
    channel.exec_command(command)
    # stdout and stderr share one window: both are read at the same time, and before the exit status
    stderr: list[bytes] = []
    reader = threading.Thread(target=_read_all, args=(channel.recv_stderr, stderr), daemon=True)
    reader.start()
    stdout: list[bytes] = []
    try:
        _send_all(channel, stdin)
        _read_all(channel.recv, stdout, strict=True)
        if not channel.status_event.wait(timeout_s):
            raise TimeoutError
        status = channel.recv_exit_status()
    finally:
        channel.close()
        reader.join(timeout_s)
    return Output(status, b"".join(stdout), b"".join(stderr))


def _send_all(channel: paramiko.Channel, stdin: bytes) -> None:
    try:
        for start in range(0, len(stdin), SEND_PIECE_BYTES):
            channel.sendall(stdin[start : start + SEND_PIECE_BYTES])
        channel.shutdown_write()
    except TimeoutError:
        raise
    except OSError:
        return  # the command ended without reading all of it: its output and status say why


def _read_all(receive: object, into: list[bytes], *, strict: bool = False) -> None:
    assert callable(receive)
    size = 0
    try:
        while part := receive(65536):
            size += len(part)
            if size > OUTPUT_BYTES_MAX:
                raise OSError(f"the command printed more than {OUTPUT_BYTES_MAX} bytes")
            into.append(part)
    except OSError:
        if strict:
            raise


def _connect(name: str, target: Target, via: paramiko.SSHClient | None) -> paramiko.SSHClient:
    known = lookup(target.known_hosts, known_name(target.host_key_alias or target.host, target.port))
    for attempt in range(1, TRIES_MAX + 1):
        client = paramiko.SSHClient()  # its policy for unknown host keys is to refuse them
        spelled = known_name(target.host, target.port)
        for kind, key in known.keys:
            _add_key(client, spelled, kind, key)
        try:
            sock = _direct(target) if via is None else _through(via, target)
            if not known.keys:  # said only of a host that answers: else that is what is wrong with it
                sock.close()
                raise ConnectFailed(name, _unknown_host(target, has_authority=known.has_authority))
            _log_in(client, target, sock)
        except paramiko.BadHostKeyException as error:
            client.close()
            raise ConnectFailed(name, _changed_host(target, error)) from error
        except paramiko.PasswordRequiredException as error:
            client.close()
            raise ConnectFailed(name, "the SSH key has a passphrase: load it into ssh-agent (ssh-add)") from error
        except paramiko.AuthenticationException as error:
            client.close()
            tried = ", ".join(target.identities) or "those of ssh-agent"
            reason = f"SSH refused the login of {target.user!r} at {target.host} port {target.port} (keys: {tried})"
            raise ConnectFailed(name, reason) from error
        except (paramiko.SSHException, OSError, EOFError) as error:
            client.close()
            if attempt == TRIES_MAX or not _is_drop(error):
                raise ConnectFailed(name, _cannot_connect(target, error)) from error
            time.sleep(0.2 * 1.6**attempt * random.uniform(0.5, 1.5))
        else:
            return client
    raise AssertionError("the last try returns or raises")


def _log_in(client: paramiko.SSHClient, target: Target, sock: socket.socket | paramiko.Channel) -> None:
    wait_s = target.connect_timeout_s
    try:
        client.connect(
            target.host,
            target.port,
            target.user,
            key_filename=list(target.identities),  # type: ignore[arg-type]  # the stubs know one name only
            allow_agent=not target.identities_only,
            look_for_keys=False,
            timeout=wait_s,
            banner_timeout=CONNECT_TIMEOUT_S,
            auth_timeout=CONNECT_TIMEOUT_S,
            channel_timeout=CONNECT_TIMEOUT_S,
            sock=sock,
        )
    except BaseException:
        sock.close()
        raise
    _transport(client).set_keepalive(30)


def _direct(target: Target) -> socket.socket:
    sock = socket.create_connection((target.host, target.port), timeout=target.connect_timeout_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_PEER_MS)
    return sock


def _through(via: paramiko.SSHClient, target: Target) -> paramiko.Channel:
    return _transport(via).open_channel(
        "direct-tcpip", (target.host, target.port), ("127.0.0.1", 0), timeout=target.connect_timeout_s
    )


def _open_session_once(client: paramiko.SSHClient) -> None:
    """sshd sets TCP_NODELAY on its side of a jump only after a session was opened on it."""
    channel = _transport(client).open_session(timeout=CONNECT_TIMEOUT_S)
    channel.settimeout(CONNECT_TIMEOUT_S)
    channel.exec_command("true")
    channel.recv_exit_status()
    channel.close()


def _is_drop(error: Exception) -> bool:
    """sshd closed the connection before its banner: too many at once (MaxStartups). Nothing else is tried again."""
    if isinstance(error, ConnectionResetError | EOFError):
        return True
    return isinstance(error, paramiko.SSHException) and "protocol banner" in str(error)


def _cannot_connect(target: Target, error: Exception) -> str:
    reason = "no answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or str(error)
    return f"cannot connect to {target.host} port {target.port}: {reason or type(error).__name__}"


def _unknown_host(target: Target, *, has_authority: bool) -> str:
    spelled = known_name(target.host_key_alias or target.host, target.port)
    if has_authority:
        return f"only a @cert-authority vouches for {spelled}: add the host's own key to known_hosts"
    files = " or ".join(map(str, target.known_hosts[:1])) or "~/.ssh/known_hosts"
    return f"the host key of {spelled} is not in {files}: check it, then add it (connect once with `ssh`)"


def _changed_host(target: Target, error: paramiko.BadHostKeyException) -> str:
    spelled = known_name(target.host_key_alias or target.host, target.port)
    return (
        f"wrong host key: {spelled} shows {error.key.get_name()} {error.key.fingerprint}, known_hosts has "
        f"{error.expected_key.fingerprint}; only if the host was reinstalled: `ssh-keygen -R '{spelled}'`"
    )


def _add_key(client: paramiko.SSHClient, spelled: str, kind: str, text: str) -> None:
    try:
        key = paramiko.PKey.from_type_string(kind, b64decode(text))
    except (paramiko.SSHException, binascii.Error, ValueError):
        return  # a kind of key that paramiko does not know cannot be what it negotiates
    client.get_host_keys().add(spelled, kind, key)


def _transport(client: paramiko.SSHClient) -> paramiko.Transport:
    transport = client.get_transport()
    if transport is None:
        raise paramiko.SSHException("the connection is closed")
    return transport


def _close_all(hops: list[paramiko.SSHClient]) -> None:
    while hops:
        client = hops.pop()
        transport = client.get_transport()
        client.close()
        if transport is not None:
            transport.join(CONNECT_TIMEOUT_S)


def _options_by_ssh(spec: HostSpec) -> dict[str, list[str]]:
    argv = ["ssh", "-G", "-T"]
    if spec.user:
        argv += ["-l", spec.user]
    if spec.port:
        argv += ["-p", str(spec.port)]
    try:
        done = subprocess.run(
            [*argv, "--", spec.host],
            capture_output=True,
            text=True,
            timeout=CONNECT_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise ConnectFailed(str(spec), f"`ssh -G {spec.host}` did not answer") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise ConnectFailed(str(spec), f"`ssh -G {spec.host}`: {lines[-1] if lines else done.returncode}")
    options: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        key, _, value = line.partition(" ")
        options.setdefault(key.lower(), []).append(value)
    return options


def _options_by_paramiko(spec: HostSpec) -> dict[str, list[str]]:
    path = Path("~/.ssh/config").expanduser()
    parser = paramiko.SSHConfig.from_path(str(path)) if path.exists() else paramiko.SSHConfig()
    found: dict[str, list[str]] = {"userknownhostsfile": ["~/.ssh/known_hosts"]}
    entry = parser.lookup(spec.host)
    identities: object = entry.pop("identityfile", None)
    found |= {key: [value] for key, value in entry.items()}
    if isinstance(identities, list):
        found["identityfile"] = identities
    found["globalknownhostsfile"] = ["/etc/ssh/ssh_known_hosts"]
    found.setdefault("identityfile", [f"~/.ssh/id_{kind}" for kind in ("ed25519", "ecdsa", "rsa")])
    return found


def _expanded(path: str) -> Path:
    return Path(path.strip('"')).expanduser()
