"""Native threads: OpenMP's and BLAS's, whose they are and what is done about them."""

from __future__ import annotations

import sys
from typing import Any

import cloudpickle
import pytest

from agent.template import driver

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
def test_polars_pool_of_a_child_has_its_slots_threads() -> None:
    pytest.importorskip("polars")

    def count() -> Any:
        import polars

        return polars.thread_pool_size()

    with driver.ready(preload=["polars"], env={**driver.ONE_THREAD, "POLARS_MAX_THREADS": "1"}) as running:
        for threads in (1, 3):
            assert running.fork().run(count, threads=threads) == threads
