"""Real libraries in a template: OpenMP and BLAS threads, random streams, other interpreters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from agent.template import driver
from support import interpreters

pytest.importorskip("sklearn")

# Nobody but this process can import a test module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def _fit() -> Any:
    from sklearn.datasets import make_classification
    from sklearn.ensemble import HistGradientBoostingClassifier

    x, y = make_classification(400, 8, random_state=0)
    return HistGradientBoostingClassifier(max_iter=3).fit(x, y).score(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("env", [driver.ONE_THREAD, {}], ids=["one thread", "openmp's own threads"])
def test_fit_in_setup_and_again_in_children_does_not_hang(env: dict[str, str]) -> None:
    with driver.ready(_fit, preload=["sklearn.ensemble", "sklearn.datasets"], env=env) as running:
        steps = {step["step"]: step for step in running.steps}
        assert steps["setup"]["threads"] == 1
        assert any("threadpool_limits(1)" in cure for cure in steps["setup"]["applied"])
        assert running.ready["fork_point"] == "setup"
        assert running.fork().run(_fit, threads=2) > 0.5


def _fit_with_two_threads() -> Any:
    import threadpoolctl

    threadpoolctl.threadpool_limits(2)
    return _fit()


@pytest.mark.slow
def test_openmp_threads_left_by_setup_are_ended_and_children_fit_again() -> None:
    with driver.ready(_fit_with_two_threads, preload=["sklearn.ensemble", "sklearn.datasets"], env={}) as running:
        steps = {step["step"]: step for step in running.steps}
        assert any("omp_pause_resource_all" in cure for cure in steps["setup"]["applied"]), steps["setup"]
        assert running.ready["fork_point"] == "setup"
        assert running.fork().run(_fit_with_two_threads) > 0.5


@pytest.mark.slow
def test_openmp_left_running_is_found_when_it_cannot_be_ended() -> None:
    def setup() -> None:
        # As if by a library whose OpenMP is older than 5.0.
        import sys

        sys.modules["_herder_template.system"].pause_openmp = lambda paths: []  # type: ignore[attr-defined]
        _fit_with_two_threads()

    with driver.template(env={}) as running:
        answer = running.open(setup, preload=["sklearn.ensemble", "sklearn.datasets"], start="fork")
    assert answer["t"] == "failed", answer
    assert "libgomp" in answer["message"]
    assert "OMP_NUM_THREADS=1" in answer["message"]


@pytest.fixture(scope="module")
def numpy_for_all() -> Any:
    with driver.ready(preload=["numpy"]) as running:
        yield running


@pytest.fixture
def numpy_template(numpy_for_all: driver.Template) -> Any:
    """A template that has imported numpy."""
    yield numpy_for_all
    numpy_for_all.drop_children()


def _draw() -> tuple[float, float]:
    import random

    import numpy as np

    return random.random(), float(np.random.random())


def test_no_two_children_share_a_random_stream(numpy_template: driver.Template) -> None:
    drawn = [numpy_template.fork().run(_draw) for _ in range(4)]
    assert len({first for first, _ in drawn}) == 4
    assert len({second for _, second in drawn}) == 4


def test_a_seed_gives_equal_streams_for_a_task_and_others_for_the_next(numpy_template: driver.Template) -> None:
    first = numpy_template.fork().run(_draw, seed=1, index=5)
    again = numpy_template.fork().run(_draw, seed=1, index=5, ordinal=2)
    neighbour = numpy_template.fork().run(_draw, seed=1, index=6)
    other = numpy_template.fork().run(_draw, seed=2, index=5)
    assert first == again
    assert len({first, neighbour, other}) == 3


def test_blas_threads_are_gone_at_the_fork_and_may_be_raised_in_a_child() -> None:
    def setup() -> Any:
        import numpy as np

        return float((np.ones((300, 300)) @ np.ones((300, 300))).sum())

    def multiply() -> tuple[float, int]:
        import numpy as np
        import threadpoolctl

        pools = threadpoolctl.threadpool_info()
        total = float((np.ones((300, 300)) @ np.ones((300, 300))).sum())
        return total, max(pool["num_threads"] for pool in pools)

    with driver.ready(setup, preload=["numpy"], env={}) as running:
        assert running.ready["fork_point"] == "setup"
        total, threads = running.fork().run(multiply, threads=2)
        assert total == 300.0**3
        assert threads == 2


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
        assert child.run(len, raw_function=look, raw_args=_NOTHING, python=tag) == ("value", "j0b.7", version)
        child.send(len, raw_function=b"cusers_module\nfail\n.", raw_args=_NOTHING, function_id="f2")
        head, error = child.answer()
        assert isinstance(error, ValueError)
        assert "as itself" in head["traceback"]
        child.send(len, python="2.7/1.0")
        assert child.answer()[0]["cause"] == "version_mismatch"


_NOTHING = b"((t}t."
