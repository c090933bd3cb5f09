"""Have Herder on a host: found there, found as shipped by an earlier `up`, or shipped now.

Shipping needs nothing on the host but a CPython 3.11 or later: neither pip nor ensurepip nor the internet. The launcher
packs a wheel of the very Herder that it runs (also of an editable installation), collects wheels of what it depends on
for the host's version and machine (pip's own cache, an index, or `--wheels DIR`), and sends all of it, with pip, over
the SSH channel; `node.install` makes the environment. Both sides keep what they made under a hash of Herder's own
files, so it is done once.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import shlex
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from herder_launch.errors import HostFailed
from herder_launch.place import Place, ask, local_python
from herder_launch.plan import (
    MODULES,
    PYTHON_NAMES,
    Impossible,
    Interpreter,
    Reuse,
    Ship,
    Use,
    choose_interpreter,
)

PACKAGES = ("herder", "herder_shared", "herder_coordinator", "herder_agent", "herder_launch")
#: An environment of some 20 wheels on a slow disk.
INSTALL_TIMEOUT_S = 600.0
DOWNLOAD_TIMEOUT_S = 300.0
#: glibc versions for which wheels are named.
_GLIBC_MINOR_MIN = 17
#: Needed by dependencies on some of the interpreters which we ship to, and maybe not on ours.
_ALSO = ("typing-extensions",)

_collecting = threading.Lock()


@dataclass(frozen=True, slots=True)
class Installed:
    """An interpreter of a host under which Herder can be imported, and where the host keeps state."""

    python: str
    state_dir: str


def ensure_installed(
    place: Place, python: str | None, roles: tuple[str, ...], wheels: Path | None, tell: Callable[[str], None]
) -> Installed:
    """Find Herder on a host, or ship it there. `python` is the only candidate if given. `tell` hears what takes long.

    Raises:
        HostFailed: no suitable interpreter, or the installation failed; says why.
    """
    modules = tuple(sorted({name for role in roles for name in MODULES[role]}))
    found, unusable = _look_around(place, python, modules)
    match choose_interpreter(found, unusable, importlib.metadata.version("herder")):
        case Use(interpreter):
            assert interpreter.state_dir is not None
            return Installed(interpreter.executable, interpreter.state_dir)
        case Reuse(shipped):
            return _installed(place, shipped, modules)
        case Ship(interpreter):
            tell("collecting wheels")
            archive = _archive_for(interpreter, wheels, place.name)
            tell(f"installing ({len(archive) >> 20} MiB)")
            request: dict[str, object] = {
                "verb": "install",
                "fingerprint": fingerprint(),
                "requirements": ["herder[coordinator,agent]"],
            }
            answer = ask(place, interpreter.executable, request, archive, INSTALL_TIMEOUT_S)
            return _installed(place, answer["python"], modules)
        case Impossible(reason):
            raise HostFailed(place.name, reason)


@functools.cache
def fingerprint() -> str:
    """Names this Herder by the bytes of all its files: an edited tree is another one."""
    digest = hashlib.sha256(importlib.metadata.version("herder").encode())
    for name, path in _own_files():
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def own_wheel(folder: Path) -> Path:
    """Pack the Herder that runs here into a wheel, as the format's specification says. Returns its path."""
    distribution = importlib.metadata.distribution("herder")
    stem = f"herder-{distribution.version}"
    path = folder / f"{stem}-py3-none-any.whl"
    info = f"{stem}.dist-info"
    content = {name: file.read_bytes() for name, file in _own_files()}
    content[f"{info}/METADATA"] = (distribution.read_text("METADATA") or "").encode()
    content[f"{info}/entry_points.txt"] = (distribution.read_text("entry_points.txt") or "").encode()
    content[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: herder\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{name},sha256={_record_hash(data)},{len(data)}\n" for name, data in content.items())
    content[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in content.items():
            wheel.writestr(name, data)
    return path


def platform_tags(machine: str, libc: str) -> list[str]:
    """The wheel tags that a machine takes, the newest first: `libc` is "glibc 2.36"."""
    name, _, version = libc.partition(" ")
    if name != "glibc":
        return [f"musllinux_1_{minor}_{machine}" for minor in (2, 1)]
    minor = int(version.split(".")[1])
    return [f"manylinux_2_{each}_{machine}" for each in range(minor, _GLIBC_MINOR_MIN - 1, -1)] + [
        f"manylinux2014_{machine}",
        f"linux_{machine}",
    ]


def _look_around(place: Place, python: str | None, modules: tuple[str, ...]) -> tuple[list[Interpreter], list[str]]:
    names = [python] if python else [local_python(), *PYTHON_NAMES]
    script = "; ".join(f"command -v {shlex.quote(name)} || true" for name in names)
    executables = dict.fromkeys(place.shell(script).split("\n"))
    found: list[Interpreter] = []
    unusable: list[str] = []
    for executable in filter(None, executables):
        try:
            interpreter = _probe(place, executable, modules)
        except HostFailed as error:
            unusable.append(f"{executable}: {error.reason}")
            continue
        found.append(interpreter)
        if isinstance(choose_interpreter(found, (), importlib.metadata.version("herder")), Use):
            break
    if python and not found and not unusable:
        unusable.append(f"{python}: not there")
    return found, unusable


def _probe(place: Place, executable: str, modules: tuple[str, ...]) -> Interpreter:
    answer = ask(place, executable, {"verb": "probe", "fingerprint": fingerprint(), "modules": list(modules)})
    major, minor, micro = answer["version"]
    return Interpreter(
        executable=answer["executable"] or executable,
        version=(major, minor, micro),
        implementation=answer["implementation"],
        machine=answer["machine"],
        libc=answer["libc"],
        herder=answer["herder"],
        missing=tuple(answer["missing"]),
        state_dir=answer["state_dir"],
        shipped=answer["shipped"],
    )


def _installed(place: Place, python: str, modules: tuple[str, ...]) -> Installed:
    interpreter = _probe(place, python, modules)
    if interpreter.state_dir is None or interpreter.missing:
        raise HostFailed(place.name, f"the environment of {python} is damaged: remove its folder, then run `up` again")
    return Installed(python, interpreter.state_dir)


def _archive_for(interpreter: Interpreter, wheels: Path | None, host: str) -> bytes:
    """A tar of all wheels for this interpreter; collected once for all hosts alike."""
    version = ".".join(map(str, interpreter.version[:2]))
    libc = interpreter.libc.replace(" ", "-")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "herder" / "wheels"
    folder = cache / f"{fingerprint()}-cp{version}-{interpreter.machine}-{libc}"
    with _collecting:
        if not folder.is_dir():
            _collect(folder, interpreter, version, wheels, host)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name)
    return buffer.getvalue()


def _collect(folder: Path, interpreter: Interpreter, version: str, wheels: Path | None, host: str) -> None:
    part = folder.with_name(f"{folder.name}.part{os.getpid()}")
    part.mkdir(parents=True, exist_ok=True)
    wheel = own_wheel(part)
    source = ["--no-index", "--find-links", str(wheels)] if wheels else []
    tags = [word for tag in platform_tags(interpreter.machine, interpreter.libc) for word in ("--platform", tag)]
    argv = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(part)),
        *("--only-binary=:all:", "--implementation", "cp", "--python-version", version),
        *tags,
        *source,
        *(f"{wheel}[coordinator,agent]", "pip", *_ALSO),
    ]
    cure = "give a folder that has them with --wheels"
    purpose = f"cannot collect wheels for CPython {version} on {interpreter.machine}"
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise HostFailed(host, f"{purpose}: not done in {DOWNLOAD_TIMEOUT_S:.0f} s; {cure}") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise HostFailed(host, f"{purpose}: {lines[-1] if lines else 'pip failed'}; {cure}")
    part.rename(folder)


def _own_files() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"{package}/{path.relative_to(root)}", path


def _record_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
