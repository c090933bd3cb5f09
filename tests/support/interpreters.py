"""Find Python interpreters of other minor versions, on `PATH` or below pyenv, for tests of mixed versions."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

from support.requirements import unmet

#: An interpreter that takes longer than this to print its version is not usable.
PROBE_TIMEOUT_S = 60.0


@functools.cache
def find(version: str) -> Path | None:
    """The real executable of CPython `version` ("3.12"), or None. Pyenv's shims are looked through, not returned.

    One with libraries installed is named by HERDER_TEST_PYTHON_312 (its virtual environment's `bin/python`).
    """
    for candidate in _candidates(version):
        executable = _executable_of(candidate, version)
        if executable is not None:
            return executable
    return None


def require(version: str) -> Path:
    """As `find`; where there is none the test is skipped, on CI it fails."""
    found = find(version)
    if found is None:
        unmet(f"this test needs a CPython {version} on PATH or below ~/.pyenv/versions")
    return found


def _candidates(version: str) -> list[str]:
    root = Path(os.environ.get("PYENV_ROOT", str(Path("~/.pyenv").expanduser())))
    below_pyenv = sorted(root.glob(f"versions/{version}.*/bin/python{version}"), reverse=True)
    on_path = shutil.which(f"python{version}")
    named = os.environ.get(f"HERDER_TEST_PYTHON_{version.replace('.', '')}")
    return [path for path in (named, *map(str, below_pyenv), on_path) if path]


def _executable_of(candidate: str, version: str) -> Path | None:
    code = "import sys; print('%d.%d' % sys.version_info[:2], sys.implementation.name, sys.executable)"
    try:
        done = subprocess.run(
            [candidate, "-I", "-c", code], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = done.stdout.split(maxsplit=2)
    if done.returncode or len(words) != 3 or words[:2] != [version, "cpython"]:
        return None
    return Path(words[2].strip())
