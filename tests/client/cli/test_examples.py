"""Each example runs by itself, from any folder, and says what it should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"
SAYS = {
    "map.py": "2**31 - 1 is a prime: True",
    "shared_data.py": "mean 10.0",
    "commands.py": "squares: 1 4 9 16 25 36 49 64 81 100",
    "asyncio_tasks.py": "too slow; cancelled: True",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example_says_what_it_should(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
