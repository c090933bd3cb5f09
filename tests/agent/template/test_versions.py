"""Interpreters other than the agent's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent.template import driver
from support import interpreters


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_other_interpreters_without_herder_installed(version: str, tmp_path: Path) -> None:
    python = str(interpreters.require(version))
    (tmp_path / "users_module.py").write_text(
        "import os\ndef setup():\n    return 'value'\ndef look():\n    import herder, sys\n"
        "    return herder.shared(), herder.task().id, '%d.%d' % sys.version_info[:2]\n"
        "def fail():\n    raise ValueError('as itself')\n"
    )
    options: dict[str, Any] = {"paths": [str(tmp_path)], "setup_import": "users_module:setup", "max_tasks_per_child": 0}
    with driver.ready(python=python, **options) as running:
        child = running.fork()
        tag = running.ready["python"]
        assert tag.startswith(f"{version}/")
        look = b"cusers_module\nlook\n."
        assert child.run(len, raw_function=look, raw_args=NOTHING, python=tag) == ("value", "j0b.7", version)
        child.send(len, raw_function=b"cusers_module\nfail\n.", raw_args=NOTHING, function_id="f2")
        head, error = child.answer()
        assert isinstance(error, ValueError)
        assert "as itself" in head["traceback"]
        child.send(len, python="2.7/1.0")
        assert child.answer()[0]["cause"] == "version_mismatch"


NOTHING = b"((t}t."
