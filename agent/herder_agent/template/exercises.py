"""What a canary does: a little work for each loaded library that has a thread pool, so that a pool which did not
survive the fork hangs or crashes the canary and not a task.

The results do not matter, nor does an exception (a library may have changed its ways): only that it comes back. All of
them together take some 50 ms, once for each template, in a process that ends right after.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

#: Native threads that the canary is given: one would never ask a pool for anything.
THREADS = 2


def run() -> list[str]:
    """Exercise what is loaded. Returns the libraries' names, those that raised in parentheses."""
    done = []
    for name, exercise in _EXERCISES.items():
        module = sys.modules.get(name)
        if module is None:
            continue
        try:
            exercise(module)
        except Exception as error:  # noqa: BLE001 - an exception is an answer, and no hang
            done.append(f"({name}: {type(error).__name__})")
        else:
            done.append(name)
    return done


def _threading(threading: Any) -> None:
    thread = threading.Thread(target=len, args=("",))
    thread.start()
    thread.join()


def _numpy(numpy: Any) -> None:
    square = numpy.ones((256, 256))
    _ = square @ square
    _ = numpy.linalg.solve(square + numpy.eye(256), square)


def _polars(polars: Any) -> None:
    frame = polars.DataFrame({"key": [n % 7 for n in range(1000)], "value": list(range(1000))})
    frame.group_by("key").agg(polars.col("value").sum()).sort("key")


def _pyarrow(_: Any) -> None:
    pyarrow = sys.modules["pyarrow"]
    keys = pyarrow.array([n % 7 for n in range(1000)])
    pyarrow.table({"key": keys, "value": keys}).group_by("key").aggregate([("value", "sum")])


def _duckdb(duckdb: Any) -> None:
    with duckdb.connect() as connection:
        _ = connection.execute("select sum(i) from range(300000) t(i)").fetchall()


def _torch(torch: Any) -> None:
    torch.set_num_threads(THREADS)
    square = torch.ones(256, 256)
    _ = (square @ square).sum()


def _opencv(cv2: Any) -> None:
    numpy = sys.modules["numpy"]
    _ = cv2.GaussianBlur(numpy.ones((600, 600), numpy.float32), (5, 5), 0)


def _scipy_fft(fft: Any) -> None:
    _ = fft.fft(sys.modules["numpy"].ones((64, 256)), workers=THREADS)


_EXERCISES: dict[str, Callable[[Any], None]] = {
    "threading": _threading,
    "numpy": _numpy,
    "scipy.fft": _scipy_fft,
    "polars": _polars,
    # Not "pyarrow" alone: a second's imports would come with it, of what has not been used yet.
    "pyarrow.acero": _pyarrow,
    "duckdb": _duckdb,
    "torch": _torch,
    "cv2": _opencv,
}
