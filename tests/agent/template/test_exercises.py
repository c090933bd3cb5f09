"""What a canary does for the libraries that are loaded."""

from __future__ import annotations

import sys

import cloudpickle
import pytest

from agent.template import driver

# Nobody but this process can import a test module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

LIBRARIES = ["numpy", "scipy.fft", "polars", "pyarrow.acero", "duckdb", "torch", "cv2"]


def _exercise() -> list[str]:
    import sys

    done: list[str] = sys.modules["_herder_template.exercises"].run()
    return done


@pytest.mark.slow
def test_each_loaded_library_is_exercised_and_none_raises() -> None:
    import importlib.util

    loaded = [name for name in LIBRARIES if importlib.util.find_spec(name.partition(".")[0])]
    if not loaded:
        pytest.skip("none of the libraries is installed")
    with driver.ready(preload=loaded) as running:
        done = running.fork().run(_exercise, threads=2)
    # A library's own imports may load another of them.
    assert set(loaded) <= set(done)
    assert not [name for name in done if name.startswith("(")]
