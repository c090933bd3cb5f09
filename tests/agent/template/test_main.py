"""What a template's entry leaves visible to tasks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from agent.template import driver


def test_templates_folder_is_not_importable_by_tasks() -> None:
    def look() -> list[str]:
        import importlib.util

        return [name for name in ("life", "audit", "seal", "wire", "serve") if importlib.util.find_spec(name)]

    with driver.ready() as running:
        child = running.fork()
        assert child.run(look) == []
        assert str(driver.FOLDER) not in running.fork().run(lambda: sys.path)


def test_a_spawner_imports_little() -> None:
    with driver.ready(spawner=True) as running:
        maps = Path(f"/proc/{running.process.pid}/maps").read_text()
        assert "_pickle" not in maps
        assert running.ready["start_s"] < 2


def test_main_module_of_a_task_is_blank(bare: driver.Template) -> None:
    def look() -> list[str]:
        import sys

        return [name for name in vars(sys.modules["__main__"]) if not name.startswith("__")]

    assert bare.fork().run(look) == []


def test_heavy_modules_are_not_imported_by_the_template_itself() -> None:
    code = (
        "import sys; package = type(sys)('_herder_template'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['_herder_template'] = package; before = set(sys.modules); import _herder_template.life; "
        "print(*sorted(set(sys.modules) - before))"
    )
    command = [sys.executable, "-I", "-S", "-c", code, str(driver.FOLDER)]
    loaded = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert loaded & {"asyncio", "dataclasses", "logging", "typing", "msgspec", "threading", "pickle", "socket"} == set()
