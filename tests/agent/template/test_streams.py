"""Random streams: none shared, and equal with a seed."""

from __future__ import annotations

import sys
from typing import Any

import cloudpickle
import pytest

from agent.template import driver
from herder_agent.template import streams

pytest.importorskip("numpy")

# Nobody but this process can import a test module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


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


def test_deviate_in_store_in_the_template_does_not_come_out_of_each_child() -> None:
    def setup() -> None:
        import numpy as np

        np.random.seed(5)
        np.random.normal()

    def draw() -> float:
        import numpy as np

        return float(np.random.normal())

    with driver.ready(setup, preload=["numpy"]) as running:
        assert len({running.fork().run(draw) for _ in range(3)}) == 3


def test_templates_own_stream_is_as_it_was() -> None:
    numpy_random = pytest.importorskip("numpy").random
    numpy_random.seed(7)
    first = numpy_random.random()
    numpy_random.seed(7)
    part = streams.parting()
    assert numpy_random.random() == first
    part()
    assert numpy_random.random() not in (first, 0.0)


def test_a_module_that_the_task_itself_imports_is_seeded_too(numpy_template: driver.Template) -> None:
    def draw() -> tuple[float, float]:
        import random

        import numpy as np

        return random.random(), float(np.random.rand())

    preloaded = numpy_template.fork().run(draw, seed=1)
    with driver.ready() as bare:
        assert bare.fork().run(draw, seed=1) == preloaded
    assert preloaded[0] != preloaded[1]


def test_seed_of_a_task_depends_on_the_jobs_seed_and_its_index() -> None:
    seeds = {streams.task_seed(seed, index) for seed in (1, 2) for index in (0, 1)}
    assert len(seeds) == 4
    assert all(0 <= seed < 1 << 64 for seed in seeds)
