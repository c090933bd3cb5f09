"""What runs *on* a node while a cluster is brought up or taken down: one request in, one answer out.

The launcher sends this file's own source over the SSH channel's stdin and executes it under an interpreter of the
node, followed by one line of JSON (the request) and, for an installation, a tar archive. So it needs no Herder on the
node, imports the standard library only (Herder's own modules where a verb needs them, and then they are there), and
nothing secret is ever an argument or a variable of the environment. The answer is one line of JSON on stdout:
`{"ok": true, ...}`, or `{"ok": false, "error": "<one line>"}`.

What it starts is detached: a session of its own, no terminal, output to a log. sshd does not kill that when the
connection ends. A program is known by pid *and* start time *and* boot id, kept in `<folder>/program.json`: a pid alone
may be somebody else's by now.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import platform
import select
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

#: A log above this is put aside (one old one is kept) before a program starts.
LOG_BYTES_MAX = 16 * 1024 * 1024
_PROGRAM_FILE = "program.json"
_TAIL_BYTES = 4096

Request = dict[str, Any]
Answer = dict[str, Any]


class NodeError(Exception):
    """What was asked cannot be done here; the message is one line for the user."""


def shipped_folder(environ: Mapping[str, str], uid: int) -> Path:
    """Where environments go that were shipped here: always a disk of this node alone."""
    if chosen := environ.get("HERDER_STATE"):
        return Path(chosen) / "venvs"
    return Path("/var/lib/herder/venvs" if uid == 0 else f"/var/tmp/herder-{uid}/venvs")


def probe(request: Request) -> Answer:
    """What this interpreter is, whether Herder of the wanted version is there, and where state will live."""
    shipped = shipped_folder(os.environ, os.getuid()) / request["fingerprint"] / "bin" / "python"
    version = _herder_version()
    return {
        "executable": sys.executable,
        "version": list(sys.version_info[:3]),
        "implementation": sys.implementation.name,
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        "herder": version,
        "missing": [name for name in request["modules"] if importlib.util.find_spec(name) is None],
        "state_dir": _state_dir() if version is not None else None,
        "shipped": str(shipped) if shipped.exists() else None,
        "hostname": socket.gethostname(),
    }


def install(request: Request, payload: BinaryIO) -> Answer:
    """Make a virtual environment from wheels: no internet, no ensurepip. Kept under the hash of what it holds."""
    folder = shipped_folder(os.environ, os.getuid())
    private_folder(folder.parent)
    private_folder(folder)
    target = folder / request["fingerprint"]
    with _locked(folder / "install.lock"):
        if not (target / "bin" / "python").exists():
            _build_environment(target, request, payload)
        else:
            while payload.read(1 << 20):  # the sender must not find its channel closed
                pass
    return {"python": str(target / "bin" / "python")}


def look(request: Request) -> Answer:
    """Which of these programs run: for each folder its record, with `alive`."""
    return {"programs": {folder: _program_in(Path(folder)) for folder in request["folders"]}}


def bind_address(request: Request) -> Answer:
    """The first of the given names which is an address of this machine; 0.0.0.0 when none is."""
    for name in request["names"]:
        with contextlib.suppress(OSError):
            for family, kind, proto, _, address in socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM):
                with contextlib.suppress(OSError), socket.socket(family, kind, proto) as trial:
                    trial.bind(address)
                    return {"address": str(address[0])}
    return {"address": "0.0.0.0"}


def write_identity(request: Request) -> Answer:
    """Put an identity (certificate, key, authority's certificate) into its folder, each file 0600."""
    folder = private_folder(Path(request["folder"]))
    for name, content in request["files"].items():
        if Path(name).name != name:
            raise NodeError(f"{name!r} is not a plain file name")
        _write_private(folder / name, content.encode())
    return {}


def request_certificate(request: Request) -> Answer:
    """Make a key here, and a request for its certificate; `have` when there is one of this cluster already."""
    from herder_shared import tls
    from herder_shared.errors import ConfigError

    folder = Path(request["folder"])
    private_folder(folder.parent)
    try:
        if tls.cluster_of(folder) == request["cluster"] and _days_left(folder) > request["days_min"]:
            return {"have": True}
    except (ConfigError, OSError):
        pass  # none yet, or a damaged one: a new one replaces it
    private_folder(folder)
    return {"have": False, "request": tls.new_request(folder, request["name"]).decode()}


def install_certificate(request: Request) -> Answer:
    """Complete an identity whose key was made here."""
    from herder_shared import tls

    tls.install_certificate(Path(request["folder"]), request["certificate"].encode(), request["authority"].encode())
    return {}


def start(request: Request) -> Answer:
    """Start a program detached and wait for its hello line. One that runs already is left alone (`already`).

    The record is written before the hello is awaited: a launcher that is killed meanwhile leaves nothing unknown.
    """
    folder = private_folder(Path(request["folder"]))
    with _locked(folder / "launch.lock"):
        running = _program_in(folder)
        if running is not None and running["alive"] and running.get("hello"):
            return {"already": True, "program": running}
        if running is not None and running["alive"]:
            _end(running, request["grace_s"])
        return {"already": False, "program": _start_detached(folder, request)}


def stop(request: Request) -> Answer:
    """End the programs of these folders: SIGTERM, after the grace SIGKILL to all of its session."""
    ended: list[str] = []
    for folder in map(Path, request["folders"]):
        if not folder.is_dir():
            continue
        with _locked(folder / "launch.lock"):
            program = _program_in(folder)
            if program is not None and program["alive"]:
                _end(program, request["grace_s"])
                ended.append(str(folder))
            with contextlib.suppress(FileNotFoundError):
                (folder / _PROGRAM_FILE).unlink()
    return {"ended": ended}


def private_folder(folder: Path) -> Path:
    """Make a folder which only its owner can enter; one that is there must be so already.

    Raises:
        NodeError: it is a link, somebody else's, or open to others; with what to do.
    """
    try:
        for each in (*reversed(folder.parents), folder):
            if not each.exists():
                each.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise NodeError(f"cannot make {folder}: {error.strerror}; set HERDER_STATE to a folder of yours") from error
    if not stat.S_ISDIR(found.st_mode):
        raise NodeError(f"{folder} is not a folder; remove it or set HERDER_STATE")
    if found.st_uid != os.getuid():
        raise NodeError(f"{folder} belongs to uid {found.st_uid}, not to you ({os.getuid()}); set HERDER_STATE")
    if found.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def _build_environment(target: Path, request: Request, payload: BinaryIO) -> None:
    part = target.with_name(f"{target.name}.part{os.getpid()}")
    subprocess.run(["rm", "-rf", str(part)], check=True)
    wheels = part / "wheels"
    wheels.mkdir(parents=True)
    with tarfile.open(fileobj=payload, mode="r|") as archive:
        archive.extractall(wheels, filter="data")
    _checked([sys.executable, "-m", "venv", "--without-pip", str(part)], "make a virtual environment")
    # a script's shebang is not relocated, a `python -m` is: everything is started by `python -m`
    pip = next(wheels.glob("pip-*.whl"), None)
    if pip is None:
        raise NodeError("the wheels that were sent have no pip among them")
    argv = [str(part / "bin" / "python"), f"{pip}/pip", "install", "--quiet", "--no-index", "--no-compile"]
    _checked([*argv, "--disable-pip-version-check", "--find-links", str(wheels), *request["requirements"]], "install")
    subprocess.run(["rm", "-rf", str(wheels)], check=True)
    part.rename(target)


def _checked(argv: list[str], purpose: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise NodeError(f"cannot {purpose} with {sys.executable}: {lines[-1] if lines else done.returncode}")


def _start_detached(folder: Path, request: Request) -> Answer:
    log_path = folder / "log"
    with contextlib.suppress(FileNotFoundError):
        if log_path.stat().st_size > LOG_BYTES_MAX:
            log_path.rename(folder / "log.1")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SSH_", "XDG_SESSION"))}
    environ.update(request.get("environ", {}))
    # The program holds the write end of the pipe until it has said hello; we hold the read end until then.
    hello_read, hello_write = os.pipe()
    log_fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    log_from = os.fstat(log_fd).st_size
    try:
        argv = [*request["argv"], "--hello-fd", str(hello_write)]
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            pass_fds=(hello_write,),
            start_new_session=True,
            cwd="/",
            env=environ,
        )
    except OSError as error:
        os.close(hello_read)
        raise NodeError(f"cannot start {request['argv'][0]}: {error.strerror}") from error
    finally:
        os.close(hello_write)
        os.close(log_fd)
    program: Answer = {
        "pid": process.pid,
        "start": _start_time(process.pid),
        "boot": _boot_id(),
        "argv": request["argv"],
        "log": str(log_path),
    }
    _write_program(folder, program)
    try:
        program["hello"] = _wait_hello(process, hello_read, request["hello_timeout_s"], log_path, log_from)
    except NodeError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        (folder / _PROGRAM_FILE).unlink()
        raise
    finally:
        os.close(hello_read)
    _write_program(folder, program)
    return {**program, "alive": True}


def _wait_hello(
    process: subprocess.Popen[bytes], fd: int, timeout_s: float, log_path: Path, log_from: int
) -> dict[str, Any]:
    deadline_s = time.monotonic() + timeout_s
    said = b""
    while not said.endswith(b"\n"):
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not select.select([fd], [], [], left_s)[0]:
            raise NodeError(f"said no hello in {timeout_s:.0f} s: {_last_line(log_path, log_from)}")
        part = os.read(fd, 65536)
        if not part:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            raise NodeError(_last_line(log_path, log_from) or f"ended with status {process.returncode}")
        said += part
    hello = json.loads(said)
    assert isinstance(hello, dict)
    return hello


def _last_line(log_path: Path, log_from: int) -> str:
    with log_path.open("rb") as log:
        log.seek(0, os.SEEK_END)
        log.seek(max(log_from, log.tell() - _TAIL_BYTES))
        lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


def _program_in(folder: Path) -> Answer | None:
    try:
        program = json.loads((folder / _PROGRAM_FILE).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise NodeError(f"cannot read {folder / _PROGRAM_FILE}: {error}") from error
    assert isinstance(program, dict)
    program["alive"] = program["boot"] == _boot_id() and _start_time(program["pid"]) == program["start"]
    return program


def _end(program: Answer, grace_s: float) -> None:
    pid = program["pid"]
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if _start_time(pid) != program["start"]:  # looked at after the pidfd was opened: now it is surely the same
            return
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        if not select.select([pidfd], [], [], grace_s)[0]:
            os.killpg(pid, signal.SIGKILL)
            if not select.select([pidfd], [], [], grace_s)[0]:
                raise NodeError(f"process {pid} does not end, not even by SIGKILL")
    except ProcessLookupError:
        return
    finally:
        os.close(pidfd)


def _start_time(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat, in ticks since boot; None when there is no such process, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _write_program(folder: Path, program: Answer) -> None:
    _write_private(folder / _PROGRAM_FILE, json.dumps(program).encode())


def _write_private(path: Path, content: bytes) -> None:
    """Replace a file as a whole; it is 0600 from its first moment."""
    part = path.with_name(f"{path.name}.part")
    with contextlib.suppress(FileNotFoundError):
        part.unlink()
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(content)
    part.rename(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file; another launcher at work on the same folder is waited for."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _herder_version() -> str | None:
    if importlib.util.find_spec("herder_agent") is None:
        return None
    try:
        return importlib.metadata.version("herder")
    except importlib.metadata.PackageNotFoundError:
        return None


def _days_left(identity: Path) -> float:
    from cryptography import x509

    certificate = x509.load_pem_x509_certificate((identity / "cert.pem").read_bytes())
    return (certificate.not_valid_after_utc.timestamp() - time.time()) / 86400


def _state_dir() -> str:
    from herder_shared.config import default_state_dir
    from herder_shared.errors import ConfigError

    try:
        return str(default_state_dir(os.environ, os.getuid()))
    except ConfigError as error:
        raise NodeError(str(error)) from error


def main() -> None:
    """Read the request, do it, answer. What cannot be done is an answer too; a bug is a traceback and status 1."""
    if sys.path and sys.path[0] == "":
        del sys.path[0]  # `python -c` puts the current folder first; the user's home is no place to import from
    stdin = sys.stdin.buffer
    request: Request = json.loads(stdin.readline())
    try:
        verb = request["verb"]
        answer = install(request, stdin) if verb == "install" else VERBS[verb](request)
    except NodeError as error:
        answer = {"ok": False, "error": str(error)}
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT}:
            raise
        answer = {"ok": False, "error": f"{error.strerror}: {error.filename}"}
    sys.stdout.write(json.dumps({"ok": True, **answer}) + "\n")


VERBS = {
    "probe": probe,
    "look": look,
    "bind_address": bind_address,
    "write_identity": write_identity,
    "request_certificate": request_certificate,
    "install_certificate": install_certificate,
    "start": start,
    "stop": stop,
}

if __name__ == "__main__":
    main()
