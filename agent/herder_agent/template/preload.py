"""The steps by which an interpreter becomes a workload's: paths, cloudpickle, each preload, `setup`. No audit in here.

A template takes all of them (or those before its fork point), a forked child the rest, a fresh interpreter all.
"""

from __future__ import annotations

import os
import sys
import time

from . import failures

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

START = "start"
SETUP = "setup"


class Broken(Exception):
    """A step raised. `head` is what `failed` says of it: cause, message, traceback."""

    def __init__(self, cause: str, message: str, error: BaseException | None = None) -> None:
        super().__init__(message)
        text = "" if error is None else failures.traceback_text(error)
        self.head: dict[str, Any] = {
            "cause": cause,
            "type": "" if error is None else failures.type_name(error),
            "message": failures.clip(message),
            "traceback": text,
        }


class Preload:
    """A workload's steps, in order: "start", "import NAME"..., "setup" (where it has one)."""

    def __init__(self, opening: dict[str, Any], setup: bytes, seen: ModuleType) -> None:
        self._opening = opening
        self._workload: dict[str, Any] = opening.get("workload") or {}
        self._setup = setup
        self._seen = seen
        self.names = [START, *(f"import {name}" for name in self._workload.get("preload") or ())]
        if setup or self._workload.get("setup_import"):
            self.names.append(SETUP)
        self.applied: list[str] = []
        #: Where setup's value came from: "ran" in this process, or "mapped"; "" before its step. And what that took.
        self.setup_from = ""
        self.value: Any = None
        self.setup_s: float | None = opening.get("setup_s")
        #: What another process made of setup and published.
        self._published = _published(opening.get("value_fd", -1))

    def take(self, name: str) -> float:
        """Do this step. Returns the seconds it took; raises Broken."""
        began = time.perf_counter()
        if name == START:
            self._start()
        elif name == SETUP:
            self._run_setup()
        else:
            self._import(name.removeprefix("import "))
        import_late_parts()
        return time.perf_counter() - began

    def _start(self) -> None:
        folder = self._workload.get("working_dir")
        if folder:
            try:
                os.chdir(folder)
            except OSError as error:
                message = f"the workload's working_dir {folder!r} cannot be entered on this node: {error.strerror}"
                raise Broken("start_failed", message, error) from error
        else:
            self._enter_clients_folder()
        paths = [*([folder] if folder else []), *(self._workload.get("paths") or ())]
        sys.path[:0] = [path for path in dict.fromkeys(paths) if path not in sys.path and os.path.isdir(path)]
        import_cloudpickle(self._opening.get("cloudpickle_path") or "")
        provide_herder(self._seen)

    def _enter_clients_folder(self) -> None:
        """Where the node has the folder in which the client runs (the last of `paths`), tasks run there, too."""
        for folder in (self._workload.get("paths") or ())[-1:]:
            try:
                os.chdir(folder)
            except OSError:
                return  # not on this node: the agent's own

    def _import(self, name: str) -> None:
        try:
            __import__(name)
        except BaseException as error:
            hint = ""
            if isinstance(error, ModuleNotFoundError):
                hint = (
                    f" ({error.name!r} is not importable by {sys.executable}: install it there, or name an interpreter "
                    "that has it with Workload(python=...))"
                )
            message = f"preload of {name!r} failed: {failures.type_name(error)}: {failures.message_of(error)}{hint}"
            raise Broken("setup_failed", message, error) from error

    def _run_setup(self) -> None:
        if self._published is not None and self._map_value():
            return
        began = time.perf_counter()
        name = self._workload.get("setup_name") or self._workload.get("setup_import") or "setup"
        try:
            function = self._load_setup()
        except BaseException as error:
            message = failures.unpickling_message(f"setup {name!r}", error)
            raise Broken("setup_failed", message, error) from error
        try:
            with one_native_thread(self.applied):
                value = function()
        except BaseException as error:
            message = f"setup {name!r} raised {failures.type_name(error)}: {failures.message_of(error)}"
            raise Broken("setup_failed", message, error) from error
        self._seen.share(value)
        self.value = value
        self.setup_from, self.setup_s = "ran", time.perf_counter() - began

    def _map_value(self) -> bool:
        """Take the published value. False when its types refuse to be unpickled: then setup runs here after all."""
        try:
            self._seen.share(self._published.load())
        except Exception as error:  # noqa: BLE001 - whatever a user's type raises
            self.applied.append(f"setup runs here: its published value does not unpickle ({error!r:.200})")
            self._published = None
            return False
        self.setup_from = "mapped"
        return True

    @property
    def can_map_value(self) -> bool:
        """Whether the step "setup" takes a published value instead of running setup."""
        return self._published is not None

    def _load_setup(self) -> Any:
        if self._setup:
            import pickle

            return pickle.loads(self._setup)
        module, _, path = self._workload["setup_import"].partition(":")
        found = __import__(module, fromlist=["_"])
        for part in path.split("."):
            found = getattr(found, part)
        return found


def _published(fd: int) -> Any:
    if fd < 0:
        return None
    from . import publish

    return publish.Value(fd)


class one_native_thread:  # noqa: N801 - a context manager, used as a function
    """While `setup` runs, native thread pools that can be told keep to the calling thread, so that none need exist."""

    def __init__(self, applied: list[str]) -> None:
        self._limits: Any = None
        self._applied = applied

    def __enter__(self) -> None:
        if "numpy" not in sys.modules:
            return
        try:
            from threadpoolctl import threadpool_limits
        except ImportError:
            return
        self._limits = threadpool_limits(1)
        self._applied.append("threadpoolctl.threadpool_limits(1) around setup")

    def __exit__(self, *error: object) -> None:
        if self._limits is not None:
            self._limits.restore_original_limits()


def import_cloudpickle(path: str) -> None:
    """The user's own cloudpickle, else the one in `path`, put last on `sys.path`."""
    try:
        import cloudpickle
    except ImportError:
        if path:
            sys.path.append(path)
        try:
            import cloudpickle  # noqa: F401
        except ImportError as error:
            raise Broken(
                "start_failed", f"{sys.executable} has no cloudpickle, nor is there one in {path!r}", error
            ) from error


def provide_herder(seen: ModuleType) -> None:
    """Make `import herder` work in tasks: the real package where it is importable (it is light), else a stand-in."""
    if "herder" in sys.modules:
        return
    try:
        import herder

        # Resolved now, so that no child has to.
        _ = herder.shared, herder.task, herder.current_client
    except ImportError:
        sys.modules.pop("herder", None)
        stand_in = type(sys)(
            "herder", "What a task may use of Herder; the package is not installed in this interpreter."
        )
        stand_in.shared = seen.shared  # type: ignore[attr-defined]
        stand_in.task = seen.task  # type: ignore[attr-defined]
        stand_in.current_client = seen.no_client  # type: ignore[attr-defined]
        sys.modules["herder"] = stand_in


def import_late_parts() -> None:
    """What children would otherwise each import on first use."""
    if "numpy" in sys.modules and "numpy.random" not in sys.modules:
        __import__("numpy.random")


def python_tag() -> str:
    """ "3.11/3.1": this interpreter and its cloudpickle, as VersionMismatch compares them."""
    import cloudpickle

    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"{own}/{'.'.join(cloudpickle.__version__.split('.')[:2])}"


def thread_controller() -> Any:
    """A threadpoolctl controller over the native pools loaded by now, where threadpoolctl is installed, else None."""
    if "numpy" not in sys.modules:
        return None
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController()
