"""Templates shared by the tests of a module; their children are not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agent.template import driver


@pytest.fixture(scope="module")
def one_template() -> Iterator[driver.Template]:
    with driver.ready() as running:
        yield running


@pytest.fixture
def bare(one_template: driver.Template) -> Iterator[driver.Template]:
    """A template without a workload's modules, for children of one task."""
    yield one_template
    one_template.drop_children()


@pytest.fixture(scope="module")
def one_spawner() -> Iterator[driver.Template]:
    with driver.ready(spawner=True) as running:
        yield running


@pytest.fixture
def spawner(one_spawner: driver.Template) -> Iterator[driver.Template]:
    """The node's spawner."""
    yield one_spawner
    one_spawner.drop_children()
