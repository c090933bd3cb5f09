"""Known cures, applied without being asked where the user has not decided otherwise, and reported.

A cure of the environment must stand before the library is loaded, so all of them are set at the step "start"; it is
reported at the step in which a library that obeys it turns up. Threads of numerical libraries are kept at one by the
agent (`host.template_environment`), for fresh interpreters, too, and a child is given its slot's number with each task.
Not among them, on purpose: settings which a child could not take back, such as the number of arrow's threads for I/O.
"""

from __future__ import annotations

import os
import sys

from . import system


class Cure:
    """An environment variable. `stems` begin the names of the libraries that obey it; `ours`: set here, not by the
    agent."""

    __slots__ = ("effect", "ours", "stems", "value", "variable")

    def __init__(self, variable: str, value: str, stems: tuple[str, ...], effect: str, ours: bool = True) -> None:
        self.variable = variable
        self.value = value
        self.stems = stems
        self.effect = effect
        self.ours = ours


_NO_POOL = "no thread pool is made here; each task gets its cores"
CURES = (
    Cure("JE_ARROW_MALLOC_CONF", "background_thread:false", ("libarrow.",), "arrow's allocator starts no thread"),
    Cure("_RJEM_MALLOC_CONF", "background_thread:false", ("_polars_runtime", "polars."),
         "polars' allocator starts no thread"),
    Cure("GRPC_ENABLE_FORK_SUPPORT", "1", ("cygrpc",), "gRPC stops its threads around a fork"),
    Cure("KMP_INIT_AT_FORK", "TRUE", ("libiomp5", "libomp"), "Intel's and LLVM's OpenMP start anew in a child"),
    Cure("ARROW_DEFAULT_MEMORY_POOL", "system", ("libarrow.",), "arrow's buffers lie where huge pages are used", False),
    Cure("OMP_NUM_THREADS", "1", ("libgomp", "libomp", "libiomp5"), _NO_POOL, False),
    Cure("OPENBLAS_NUM_THREADS", "1", ("libopenblas", "libscipy_openblas"), _NO_POOL, False),
    Cure("MKL_NUM_THREADS", "1", ("libmkl_rt", "libmkl_core"), _NO_POOL, False),
    Cure("BLIS_NUM_THREADS", "1", ("libblis",), _NO_POOL, False),
    Cure("POLARS_MAX_THREADS", "1", ("_polars_runtime", "polars."), _NO_POOL, False),
    Cure("NUMEXPR_NUM_THREADS", "1", ("interpreter.cpython",), _NO_POOL, False),
    Cure("NUMBA_NUM_THREADS", "1", ("workqueue.cpython", "omppool.cpython", "tbbpool.cpython"), _NO_POOL, False),
)  # fmt: skip
#: Runtimes of OpenMP whose idle threads can be told to end.
OPENMP = ("libgomp", "libomp.", "libomp-", "libiomp5")


class Environment:
    """The cures of the environment, over the life of a template."""

    def __init__(self) -> None:
        self._reported: set[str] = set()

    def apply(self) -> None:
        """Set what is not set."""
        for cure in CURES:
            if cure.ours:
                os.environ.setdefault(cure.variable, cure.value)

    def take_effect(self, maps: list[system.Mapping]) -> list[str]:
        """The cures that hold and whose library is loaded, each once."""
        names = {mapping.path.rpartition("/")[2] for mapping in maps if mapping.path}
        lines = []
        for cure in CURES:
            # polars puts its own settings around ours.
            if cure.variable in self._reported or cure.value not in os.environ.get(cure.variable, "").split(","):
                continue
            if any(name.startswith(cure.stems) for name in names):
                self._reported.add(cure.variable)
                lines.append(f"{cure.variable}={cure.value}: {cure.effect}")
        return lines


def end_openmp(maps: list[system.Mapping]) -> list[str]:
    """End the idle threads of each OpenMP runtime (it makes them again on need). Returns the base names of those that
    did so."""
    paths = sorted({m.path for m in maps if m.path.rpartition("/")[2].startswith(OPENMP)})
    return [path.rpartition("/")[2] for path in system.pause_openmp(paths)]


def tell_polars() -> None:
    """In a child: polars 2 reads its settings when it is imported, and again when it is told; its pool is made by the
    first query."""
    reload = getattr(sys.modules.get("polars._plr"), "config_reload_env_vars", None)
    if reload is not None:
        reload()
