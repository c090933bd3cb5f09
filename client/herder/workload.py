"""Workload: how tasks start. Checked here, described on the wire by `WorkloadSpec`."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from herder.options import size_bytes
from herder_shared.ids import WorkloadKey
from herder_shared.limits import NAME_CHARS_MAX
from herder_shared.wire.messages import WorkloadSpec

_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_ENCODER = msgspec.msgpack.Encoder(order="deterministic")


@dataclass(frozen=True, slots=True)
class WireWorkload:
    """A workload as it travels. `code_by_value`: its `setup` was pickled by value, so interpreters must match."""

    spec: WorkloadSpec
    code_by_value: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """How tasks start: interpreter, imports, shared value, start method, environment, limits (API.md has each field).

    Cheap to make and reusable; two with equal fields share their templates on the nodes.

    Raises:
        TypeError, ValueError: a field that cannot be right; the message names it and what is allowed.
    """

    name: str | None = field(default=None, kw_only=False)
    start: Literal["auto", "fork", "fresh"] = "auto"
    preload: Sequence[str] = ()
    setup: Callable[[], Any] | str | None = None
    #: Seconds.
    setup_timeout: float = 600
    #: Interpreter on the nodes: a path, or a name that is looked up there; None is the agent's own. A relative path is
    #: taken from the client's current folder at submit, and so must exist there.
    python: str | os.PathLike[str] | None = None
    prologue: str | None = None
    env: Mapping[str, str] | None = None
    #: A folder on the nodes; a relative one as with `python`.
    working_dir: str | os.PathLike[str] | None = None
    #: None reuses children without limit. "auto" is one task a child, unless each child had to run `setup` itself.
    max_tasks_per_child: int | Literal["auto"] | None = "auto"
    warm: int | None = None
    blas_threads: int | Literal["cores"] = "cores"
    #: Limit of the template itself, as bytes or "4GiB".
    memory: int | str | None = None
    immortal: bool = True
    #: Names of threads that are harmless to a fork.
    allow_threads: Sequence[str] = ()
    #: Processes and threads of one task; None is the node's own limit.
    pids: int | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)
        if self.start not in {"auto", "fork", "fresh"}:
            raise ValueError(f"start must be 'auto', 'fork' or 'fresh', not {self.start!r}")
        if isinstance(self.preload, str):
            raise TypeError(f"preload must be a sequence of module names, not the text {self.preload!r}")
        for module in self.preload:
            if not isinstance(module, str) or not _MODULE.fullmatch(module):
                raise ValueError(f"preload: {module!r} is not the name of a module")
        _check_setup(self.setup)
        for name in ("python", "working_dir"):
            _check_path(name, getattr(self, name))
        if not self.setup_timeout > 0:
            raise ValueError(f"setup_timeout must be more than 0 s, not {self.setup_timeout!r}")
        if self.max_tasks_per_child != "auto":
            _check_count("max_tasks_per_child", self.max_tasks_per_child, 1)
        _check_count("pids", self.pids, 1)
        _check_count("warm", self.warm, 0)
        if self.blas_threads != "cores":
            _check_count("blas_threads", self.blas_threads, 1)
        if self.memory is not None:
            size_bytes("memory", self.memory)
        for key, value in (self.env or {}).items():
            if not isinstance(key, str) or not isinstance(value, str) or not key or "=" in key or "\0" in key + value:
                raise ValueError(f"env: {key!r}={value!r} is not an environment variable of texts")

    def for_wire(self, kind: Literal["python", "command"] = "python") -> WireWorkload:
        """This workload as it travels, keyed by the hash of everything but its name.

        Raises:
            NotSerializable: `setup` cannot be pickled.
            ValueError: `python` or `working_dir` is a relative path to what is not here.
        """
        setup, setup_import, setup_name, code_by_value = None, None, "", False
        if kind == "python" and self.setup is not None:
            if isinstance(self.setup, str):
                setup_import = setup_name = self.setup
            else:
                from herder.payload import pickle_plainly

                pickled = pickle_plainly(self.setup, "the workload's setup")
                setup, code_by_value = pickled.content, pickled.code_by_value
                setup_name = getattr(self.setup, "__qualname__", type(self.setup).__qualname__)
        spec = WorkloadSpec(
            key=WorkloadKey(""),
            name=self.name or "auto",
            kind=kind,
            start=self.start,
            preload=tuple(self.preload) if kind == "python" else (),
            setup=setup,
            setup_import=setup_import,
            setup_name=setup_name,
            setup_timeout_s=float(self.setup_timeout),
            python=_interpreter(self.python),
            prologue=self.prologue,
            env=dict(self.env or {}),
            working_dir=None if self.working_dir is None else _from_here("working_dir", self.working_dir),
            paths=user_code_paths() if kind == "python" else (),
            max_tasks_per_child=self._tasks_max() if kind == "python" else 1,
            warm=self.warm,
            blas_threads=self.blas_threads,
            memory_bytes=None if self.memory is None else size_bytes("memory", self.memory),
            immortal=self.immortal,
            allow_threads=tuple(self.allow_threads),
            max_tasks_given=self.max_tasks_per_child != "auto",
            pids=self.pids,
        )
        return WireWorkload(msgspec.structs.replace(spec, key=workload_key(spec)), code_by_value)

    def _tasks_max(self) -> int:
        """As on the wire: 0 is without limit."""
        return 1 if self.max_tasks_per_child == "auto" else self.max_tasks_per_child or 0


def workload_key(spec: WorkloadSpec) -> WorkloadKey:
    """The hash of all that makes two workloads need different templates: every field but `key` and `name`."""
    anonymous = msgspec.structs.replace(spec, key=WorkloadKey(""), name="")
    return WorkloadKey(hashlib.blake2b(_ENCODER.encode(anonymous), digest_size=8).hexdigest())


#: Inside a task: those of the workload that it runs in.
task_paths: tuple[str, ...] | None = None


def user_code_paths() -> tuple[str, ...]:
    """Folders which tasks import the user's modules from, where a node has them: the script's, then the current one."""
    if task_paths is not None:
        return task_paths
    main = sys.modules.get("__main__")
    script = getattr(main, "__file__", None)
    folders = []
    if script is not None and getattr(main, "__spec__", None) is None:
        folder = os.path.dirname(os.path.abspath(script))
        if folder != os.path.join(sys.prefix, "bin"):
            folders.append(folder)
    try:
        folders.append(os.getcwd())
    except FileNotFoundError:
        pass  # the current folder was removed: nothing can be imported from it
    return tuple(dict.fromkeys(folders))


def _check_name(name: str | None) -> None:
    if name is None:
        return
    if not isinstance(name, str):
        raise TypeError(f"name must be a text, not {name!r}")
    if not name or len(name) > NAME_CHARS_MAX or not name.isprintable():
        raise ValueError(f"name must have 1 to {NAME_CHARS_MAX} printable characters, not {name!r}")


def _check_path(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{name} must be a path, as a text or a Path, not {value!r}")
    if not os.fspath(value) or "\0" in os.fspath(value):
        raise ValueError(f"{name}={value!r} is not a path")


def _interpreter(python: str | os.PathLike[str] | None) -> str | None:
    """As the nodes find it: a bare name on their PATH, a path from the root."""
    if python is None or (isinstance(python, str) and "/" not in python):
        return python
    return _from_here("python", python)


def _from_here(name: str, value: str | os.PathLike[str]) -> str:
    """A path that means the same everywhere. Links are kept: a virtual environment's interpreter is one.

    Raises:
        ValueError: it is relative, and there is no such thing here.
    """
    path = os.path.expanduser(os.fspath(value))
    if os.path.isabs(path):
        return path
    here = os.path.abspath(path)
    if name == "python" and not os.access(here, os.X_OK):
        raise ValueError(
            f"python={os.fspath(value)!r}: there is no interpreter {here}. A relative path is taken from the client's "
            "current folder; for one that only the nodes have, give the path from the root"
        )
    if name == "working_dir" and not os.path.isdir(here):
        raise ValueError(
            f"working_dir={os.fspath(value)!r}: there is no folder {here}. A relative path is taken from the client's "
            "current folder; for one that only the nodes have, give the path from the root"
        )
    return here


def _check_setup(setup: object) -> None:
    if setup is None or (callable(setup) and not isinstance(setup, str)):
        return
    if not isinstance(setup, str):
        raise TypeError(
            f"setup must be a callable without arguments or a text 'package.module:function', not {setup!r}"
        )
    module, colon, function = setup.partition(":")
    if not colon or not _MODULE.fullmatch(module) or not _MODULE.fullmatch(function):
        raise ValueError(f"setup={setup!r} is not of the form 'package.module:function'")


def _check_count(name: str, value: object, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number or None, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value!r}")
