"""The campaign of faults at their full size: that its cases run and hold at a size for every day."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FULL_SIZE = Path(__file__).resolve().parents[2] / "benchmarks" / "full_size.py"


@pytest.mark.slow
def test_cases_hold_at_a_small_size() -> None:
    sizes = ["--gib", "0.06", "--cancelled", "1000", "--cancelled-running", "4"]
    command = [sys.executable, str(FULL_SIZE), "result", "cancelled", *sizes]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("holds") == 2
