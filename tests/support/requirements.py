"""What a test needs of the machine: where it is missing the test is skipped with the reason, and on CI it fails.

A skip on CI would hide a hole, so `HERDER_CI=1` (set by `.ci/run`) turns every unmet requirement into a failure.
"""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest


def is_ci() -> bool:
    """Everything must be there: a missing requirement is a failure and not a skip."""
    return os.environ.get("HERDER_CI") == "1"


def unmet(reason: str) -> NoReturn:
    """End this test because the machine lacks something: skipped, or failed on CI."""
    if is_ci():
        pytest.fail(f"HERDER_CI=1 and {reason}", pytrace=False)
    pytest.skip(reason)


def require_root() -> None:
    """Skip (on CI: fail) unless the tests run as root."""
    if os.geteuid() != 0:
        unmet("this test needs root")


def require_program(name: str, package: str) -> str:
    """The absolute path of a program; skip (on CI: fail) with the Debian package that has it."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")
    if path is None:
        unmet(f"this test needs {name!r} (Debian package {package})")
    return path
