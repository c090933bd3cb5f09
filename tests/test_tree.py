"""What a linter cannot see: the tree keeps its own rules."""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
import tomllib
from enum import Enum
from importlib.metadata import entry_points
from pathlib import Path

import full_size
import pytest

from herder_shared.states import AGENT_TRANSITIONS, TASK_TRANSITIONS

ROOT = Path(__file__).resolve().parent.parent

#: Package folder, and the folder of its tests.
PACKAGES = {
    "client/herder": "client",
    "shared/herder_shared": "shared",
    "coordinator/herder_coordinator": "coordinator",
    "agent/herder_agent": "agent",
    "launch/herder_launch": "launch",
}

#: Modules which no test imports or is named for, and where they are tested instead. A new module is tested by itself.
TESTED_ELSEWHERE: dict[str, str] = {
    # what `herder bench` measures with
    "client/herder/cli/bench/*": "tests/client/cli/test_bench.py",
    # the way of an attempt, as a whole agent with real children
    "agent/herder_agent/core/attempts.py": "tests/agent/runtime/test_loop.py",
    "agent/herder_agent/runtime/children.py": "tests/agent/runtime/test_loop.py",
    "agent/herder_agent/runtime/connection.py": "tests/agent/runtime/test_loop.py",
    "agent/herder_agent/runtime/environments.py": "tests/agent/runtime/test_loop.py",
    "agent/herder_agent/runtime/memory.py": "tests/agent/runtime/test_loop.py",
    "agent/herder_agent/runtime/templates.py": "tests/agent/runtime/test_loop.py",
    # what one task must not leave to the next, under every start method
    "agent/herder_agent/template/baseline.py": "tests/agent/template/test_isolation.py",
    # in a template whose memory is heavy
    "agent/herder_agent/template/weigh.py": "tests/agent/template/test_transplant.py",
    # the parts of one step, in every history of the simulator
    "coordinator/herder_coordinator/core/apply.py": "tests/sim/test_simulation.py",
    # the client, as its users see it
    "client/herder/calls.py": "tests/system/test_executor_semantics.py",
    "client/herder/completed.py": "tests/system/test_executor_semantics.py",
    "client/herder/connection.py": "tests/system/test_executor_semantics.py",
    "client/herder/conversation.py": "tests/system/test_executor_semantics.py",
    "client/herder/in_task.py": "tests/system/test_executor_semantics.py",
    "client/herder/outcomes.py": "tests/system/test_executor_semantics.py",
    "client/herder/progress.py": "tests/system/test_executor_semantics.py",
    # commands, on a cluster
    "client/herder/cli/run.py": "tests/client/cli/test_init_and_run.py",
    "client/herder/cli/session.py": "tests/client/cli/test_init_and_run.py",
    # on hosts with a real sshd
    "launch/herder_launch/up.py": "tests/system/test_launch_netlab.py",
    "launch/herder_launch/down.py": "tests/system/test_launch_netlab.py",
    "launch/herder_launch/control.py": "tests/system/test_launch_netlab.py",
}

#: Words of other systems for what has a name of ours (docs/GLOSSARY.md), in names of files, classes and functions.
FOREIGN_WORDS = re.compile(r"(?i)(?:^|_)(?:workers?|masters?|slaves?|managers?|handlers?|helpers?|utils?)(?:_|$)")
FOREIGN_IN_CLASS = re.compile(r"(?:Worker|Master|Slave|Manager|Handler|Helper|Util)s?(?![a-z])")

#: Top-level folders which every Linux machine has. A path below another one is some developer's own.
KNOWN_ROOTS = {"bin", "boot", "dev", "etc", "home", "lib", "mnt", "nfs", "opt", "path", "proc", "root", "run", "sbin"}
KNOWN_ROOTS |= {"srv", "sys", "tmp", "usr", "var"}
#: The first parts of our own URLs, and words of examples.
URL_ROOTS = {"api", "agents", "metrics", "sd", "healthz", "readyz", "nowhere", "no", "b", "data", "jobs", "scratch"}


def tracked(*suffixes: str) -> list[Path]:
    """Files that git knows or would take, of these kinds, that exist."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [ROOT / name for name in listing.splitlines() if name.endswith(suffixes) and (ROOT / name).is_file()]


def modules() -> list[Path]:
    return [path for path in tracked(".py") if any((ROOT / folder) in path.parents for folder in PACKAGES)]


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in tracked(".py")
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def imported_by_tests() -> set[str]:
    """Every module that a test imports by name, as the path of its file."""
    names: set[str] = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import(names=aliases):
                    names.update(alias.name for alias in aliases)
                case ast.ImportFrom(module=str(module), names=aliases):
                    names.add(module)
                    names.update(f"{module}.{alias.name}" for alias in aliases)
                case _:
                    continue
    return {f"{name.replace('.', '/')}.py" for name in names}


def test_every_module_has_its_test() -> None:
    imported = imported_by_tests()
    untested = []
    for path in modules():
        folder = next(folder for folder in PACKAGES if (ROOT / folder) in path.parents)
        relative = str(path.relative_to(ROOT))
        named = list((ROOT / "tests" / PACKAGES[folder]).rglob(f"test_{path.stem}*.py"))
        elsewhere = any(fnmatch.fnmatch(relative, pattern) for pattern in TESTED_ELSEWHERE)
        empty = path.name in ("__init__.py", "__main__.py")
        if not (empty or elsewhere or named or relative.partition("/")[2] in imported):
            untested.append(relative)
    assert untested == []


def test_what_is_listed_as_tested_elsewhere_exists() -> None:
    for pattern, tests in TESTED_ELSEWHERE.items():
        assert list(ROOT.glob(pattern)), pattern
        assert (ROOT / tests).exists(), tests


def test_names_are_those_of_the_glossary() -> None:
    found = []
    for path in modules():
        if FOREIGN_WORDS.search(path.stem):
            found.append(str(path))
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.ClassDef(name=name) if FOREIGN_IN_CLASS.search(name):
                    found.append(f"{path}: {name}")
                case ast.FunctionDef(name=name) if FOREIGN_WORDS.search(name) and "handler" not in name:  # of signals
                    found.append(f"{path}: {name}")
                case _:
                    continue
    assert found == []


def test_no_path_of_a_developers_machine_is_in_the_tree() -> None:
    absolute = re.compile(r"""(?:^|[\s"'`(=])/([a-z_.]+)/[\w.]""")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0].strip()}"
        for path in tracked(".py", ".md", ".toml", ".sh", ".yml", ".yaml", "Makefile", "run", "check")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for match in absolute.finditer(line)
        if match[1] not in KNOWN_ROOTS | URL_ROOTS
    ]
    assert found == []


@pytest.mark.parametrize(("heading", "table"), [("### Task", TASK_TRANSITIONS), ("### Agent", AGENT_TRANSITIONS)])
def test_the_documented_states_are_those_of_the_code(heading: str, table: dict[Enum, frozenset[Enum]]) -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    section = text.split(f"{heading}\n", 1)[1].split("\n#", 1)[0]
    documented = {}
    for line in section.splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]
        if len(cells) == 3 and cells[0] != "state" and not cells[0].startswith("-"):
            documented[cells[0]] = {word.strip().strip("`") for word in cells[2].split(",") if word.strip()}
    assert documented == {state.value: {after.value for after in follows} for state, follows in table.items()}


def test_every_metric_is_documented() -> None:
    page = ROOT / "docs" / "METRICS.md"
    documented = set(re.findall(r"\bherder_[a-z_]+[a-z]", page.read_text()))
    used = set()
    for path in modules():
        if path.name not in ("metrics.py", "accounts.py", "account.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and re.fullmatch(r"herder_[a-z_]+[a-z]", str(node.value)):
                used.add(str(node.value))
    packages = {folder.rpartition("/")[2] for folder in PACKAGES}
    missing = {name for name in used - packages if name not in documented and f"{name}_total" not in documented}
    assert missing == set()


def test_every_fault_has_its_row_and_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "FAULTS.md").read_text()
    rows = [int(number) for number in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)]
    assert rows == list(range(1, 50))
    defined = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert set(re.findall(r"`(test_\w+)`", page)) - defined == set()
    assert set(re.findall(r"`full_size\.py (\w+)`", page)) == set(full_size.CASES)


def test_every_command_of_pyproject_can_be_loaded() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = set(table["project"]["entry-points"]["herder.commands"])
    points = {point.name: point for point in entry_points(group="herder.commands")}
    assert declared <= set(points)
    for name in declared:
        assert callable(points[name].load())


def loaded_after(statement: str, *flags: str) -> set[str]:
    """The modules that a fresh interpreter has after this statement, beyond those it started with."""
    code = f"import sys; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


@pytest.mark.slow
def test_importing_herder_is_light_enough_for_every_task() -> None:
    heavy = {"asyncio", "msgspec", "cloudpickle", "cryptography", "ssl", "rich", "click", "logging", "socket"}
    assert loaded_after("import herder") & heavy == set()


@pytest.mark.slow
def test_a_template_starts_with_next_to_nothing() -> None:
    folder = ROOT / "agent" / "herder_agent" / "template"
    package = f"p = type(sys)('_herder_template'); p.__path__ = [{str(folder)!r}]; sys.modules['_herder_template'] = p"
    heavy = {"asyncio", "dataclasses", "logging", "msgspec", "typing", "inspect", "threading", "socket", "ssl"}
    loaded = loaded_after(f"{package}; import _herder_template.life", "-P", "-S", "-X", "utf8")
    assert loaded & heavy == set()
    assert not [name for name in loaded if name.startswith("herder")]


@pytest.mark.slow
@pytest.mark.parametrize("core", ["herder_coordinator.core.step", "herder_agent.core.step"])
def test_the_cores_bring_in_no_loop_no_socket_and_no_log(core: str) -> None:
    loaded = loaded_after(f"import {core}")
    assert loaded & {"asyncio", "socket", "ssl", "logging", "subprocess", "random", "selectors", "sqlite3"} == set()


@pytest.mark.slow
def test_the_client_knows_neither_coordinator_nor_agent() -> None:
    loaded = loaded_after("import herder; herder.Client")
    assert not [name for name in loaded if name.startswith(("herder_coordinator", "herder_agent", "herder_launch"))]
