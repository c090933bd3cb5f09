"""Random generators that setup and preloaded modules made: no stream is shared by two tasks, and a seed settles all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from agent.template import driver
from herder_agent.template import generators

numpy = pytest.importorskip("numpy")

# Nobody but this process can import a test module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def _make() -> dict[str, Any]:
    """One of each kind, half of a pair drawn where there are pairs."""
    import random

    import numpy as np

    kinds = (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
    made: dict[str, Any] = {kind.__name__: np.random.Generator(kind(42)) for kind in kinds}
    for generator in made.values():
        generator.integers(0, 100, dtype=np.uint32)
    legacy = np.random.RandomState(42)
    legacy.normal()
    own = random.Random(42)
    own.gauss(0, 1)
    elements = np.empty(1, object)
    elements[0] = np.random.default_rng(42)
    return {**made, "legacy": legacy, "own": own, "sequence": np.random.SeedSequence(42), "array": elements}


def _draw() -> dict[str, Any]:
    import numpy as np

    import herder

    made = dict(herder.shared())
    elements, sequence, legacy, own = (made.pop(name) for name in ("array", "sequence", "legacy", "own"))
    drawn: dict[str, Any] = {name: generator.random() for name, generator in made.items()}
    drawn.update({f"{name} word": int(each.integers(0, 2**32, dtype=np.uint32)) for name, each in made.items()})
    drawn.update({f"{name} spawned": each.spawn(1)[0].random() for name, each in made.items()})
    drawn["legacy"], drawn["own"], drawn["array"] = legacy.normal(), own.gauss(0, 1), elements[0].random()
    drawn["own random"], drawn["legacy random"] = own.random(), legacy.random_sample()
    drawn["sequence"] = np.random.default_rng(sequence).random()
    drawn["sequence spawned"] = np.random.default_rng(sequence.spawn(1)[0]).random()
    return drawn


@pytest.fixture(scope="module", params=[1, 0], ids=["forked", "reused"])
def one_template(request: pytest.FixtureRequest) -> Iterator[tuple[driver.Template, bool]]:
    with driver.ready(_make, preload=["numpy", "random"], max_tasks_per_child=request.param) as running:
        yield running, request.param == 0


@pytest.fixture
def tasks(one_template: tuple[driver.Template, bool]) -> Iterator[Any]:
    """Runs tasks, each in a child of its own or all in two."""
    running, reuses = one_template
    two = [running.fork() for _ in range(2)] if reuses else []

    def run(function: Any, **options: Any) -> Any:
        if not reuses:
            return running.fork().run(function, **options)
        two.append(two.pop(0))
        return two[-1].run(function, **options)

    yield run
    running.drop_children()


def _alike(drawn: list[dict[str, Any]]) -> set[str]:
    return {name for name in drawn[0] if len({each[name] for each in drawn}) < len(drawn)}


def test_no_two_tasks_share_a_stream_of_a_generator_made_in_setup(tasks: Any) -> None:
    assert _alike([tasks(_draw) for _ in range(4)]) == set()


def test_two_generators_with_one_seed_differ_and_the_module_wide_ones_are_others(tasks: Any) -> None:
    drawn = tasks(_draw, seed=3)
    numbers = [value for name, value in drawn.items() if not name.endswith("word")]
    assert len(set(numbers)) == len(numbers)


def test_a_seed_gives_equal_streams_in_every_attempt_and_others_to_other_tasks(tasks: Any) -> None:
    first = tasks(_draw, seed=1, index=5)
    tasks(_draw)
    assert tasks(_draw, seed=1, index=5, ordinal=2) == first
    assert tasks(_draw, seed=1, index=5, ordinal=3) == first
    assert _alike([first, tasks(_draw, seed=1, index=6), tasks(_draw, seed=2, index=5)]) == set()


def test_a_task_without_a_seed_after_one_with_draws_anew(tasks: Any) -> None:
    drawn = [tasks(_draw, seed=1), tasks(_draw), tasks(_draw), tasks(_draw)]
    assert _alike(drawn) == set()


def test_a_seed_gives_the_same_streams_in_fresh_interpreters() -> None:
    head = {"t": "open", "workload": {"preload": ["numpy", "random"], "max_tasks_per_child": 0, "setup_name": "setup"}}
    with driver.ready(_make, preload=["numpy", "random"]) as running:
        forked = running.fork().run(_draw, seed=1, index=5)
    with driver.ready(spawner=True) as running:
        children = [running.fresh() for _ in range(2)]
        for child in children:
            child.task_socket.send({**head, "cloudpickle_path": driver.CLOUDPICKLE_PATH}, cloudpickle.dumps(_make))
            assert child.task_socket.receive()[0]["t"] == "idle"
        assert [child.run(_draw, seed=1, index=5) for child in children] == [forked, forked]
        assert _alike([child.run(_draw) for child in children]) == set()


def test_generators_in_modules_and_classes_are_found_too(tmp_path: Path) -> None:
    (tmp_path / "users_module.py").write_text(
        "import random, numpy as np\nrng = np.random.default_rng(1)\n"
        "class Model:\n    own = random.Random(2)\n"
        "    def __init__(self):\n        self.rng = np.random.RandomState(3)\n"
        "models = [Model()]\n"
        "def draw():\n    return {'g': rng.random(), 'class': Model.own.random(), 'o': models[0].rng.random_sample()}\n"
    )
    draw = b"cusers_module\ndraw\n."
    with driver.ready(paths=[str(tmp_path)], preload=["users_module"]) as running:
        drawn = [running.fork().run(int, raw_function=draw) for _ in range(3)]
        seeded = [running.fork().run(int, raw_function=draw, seed=1) for _ in range(2)]
    assert _alike(drawn) == set()
    assert seeded[0] == seeded[1]


@pytest.mark.parametrize(("mode", "fork_point"), [("mapped", "setup"), ("per child", "import numpy")])
def test_generators_differ_although_setup_left_a_thread(mode: str, fork_point: str) -> None:
    def setup() -> Any:
        import threading

        import numpy as np

        threading.Thread(target=threading.Event().wait, daemon=True).start()
        return np.random.default_rng(42), threading.Lock() if mode == "per child" else None

    def draw() -> float:
        import herder

        return float(herder.shared()[0].random())

    with driver.ready(setup, preload=["numpy"]) as running:
        assert (running.ready["fork_point"], running.ready["setup_mode"]) == (fork_point, mode)
        assert running.fork().run(draw) != running.fork().run(draw)


def test_what_a_task_seeded_is_not_seeded_for_the_next(tasks: Any) -> None:
    def seed_and_draw() -> dict[str, Any]:
        import random

        import numpy as np

        import herder

        drawn = {"random": random.random(), "numpy": np.random.random(), "own": herder.shared()["own"].random()}
        random.seed(1)
        np.random.seed(1)
        herder.shared()["own"].seed(1)
        return drawn

    assert _alike([tasks(seed_and_draw) for _ in range(6)]) == set()


def test_nothing_is_found_where_nobody_made_a_generator() -> None:
    script = """if True:
        import importlib, random, sys, tempfile, numpy.random
        next(tempfile._get_candidate_names())
        package = type(sys)("package")
        package.__path__ = [sys.argv[1]]
        sys.modules["package"] = package
        generators = importlib.import_module("package.generators")
        before = len(generators.find(None))
        own = numpy.random.default_rng()
        print(before, len(generators.find(None)))
    """
    folder = str(Path(generators.__file__).parent)
    printed = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    # The generator's state, and the seeds of what it may spawn.
    assert printed.stdout.split() == ["0", "2"]


def test_every_bit_generator_of_numpys_is_overwritten_in_place() -> None:
    for kind in generators._family(numpy.random.BitGenerator):
        if kind is not numpy.random.BitGenerator:
            assert generators._place_of(kind(5)) is not None, kind


def test_places_of_generators_do_not_depend_on_the_process() -> None:
    named = []
    for _ in range(2):
        value = _make()
        makers = generators._makers()
        known = set(map(id, generators._others()))
        found = generators._named(value, makers, known, [])
        named.append([(name, type(thing)) for name, thing in found if name.startswith("setup/")])
    assert named[0] == named[1]
    assert len(named[0]) >= 14


def test_too_many_generators_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    import random

    monkeypatch.setattr(generators, "FOUND_MAX", 1)
    found = generators.find([random.Random(1), random.Random(2)])
    assert len(found) == 1
    assert "begin alike" in found.notes[0]
