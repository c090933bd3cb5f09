"""Where the functions are that benchmarks run inside tasks and templates, also of interpreters without Herder."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

#: Put on `PYTHONPATH` of interpreters which cannot import Herder.
FOLDER = Path(__file__).parent / "in_tasks"
NAME = "herder_bench_data"
#: How many bytes of arrays, and of Python objects, `setup` makes.
SIZE_VARIABLE = "HERDER_BENCH_BYTES"
OBJECTS_VARIABLE = "HERDER_BENCH_OBJECT_BYTES"


def setup_path(function: str) -> str:
    """For a workload's `setup`, in an interpreter that has Herder."""
    return f"herder.cli.bench.in_tasks.{NAME}:{function}"


def by_bare_name() -> ModuleType:
    """The module under a name by which any interpreter with `FOLDER` on its path can import it; functions of it are
    pickled by reference."""
    if NAME not in sys.modules:
        path = str(FOLDER / f"{NAME}.py")
        loader = SourceFileLoader(NAME, path)
        module = module_from_spec(ModuleSpec(NAME, loader, origin=path))
        loader.exec_module(module)
        sys.modules[NAME] = module
    return sys.modules[NAME]
