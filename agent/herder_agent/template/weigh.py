"""What a fork of this template costs for its private memory, and whose memory that is.

What can be moved or folded into huge pages has been, when this looks. The unit costs were measured (fork, exit and reap
together); a machine without virtualisation is faster.
"""

from __future__ import annotations

import sys
from itertools import islice

from . import transplant

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

#: Seconds per byte in pages of 4 KiB and of 2 MiB, and per mapping with private pages.
SECONDS_PER_BYTE = 36e-3 / (1 << 30)
SECONDS_PER_HUGE_BYTE = 0.8e-3 / (1 << 30)
SECONDS_PER_MAPPING = 2.8e-6
#: Rule R10: a fork that costs this much more for private memory is worth a word.
SECONDS_WORTH_A_NOTE = 5e-3
#: How many elements of a container are looked at to guess the rest, how deep, and how many objects in all.
_SAMPLE = 16
_DEPTH = 6
_OBJECTS_MAX = 20_000
_NAMED_MAX = 3


class Part:
    """An object below setup's value, with its estimated size and how it is reached."""

    __slots__ = ("path", "size_bytes", "value")

    def __init__(self, path: str, value: Any, size_bytes: float) -> None:
        self.path = path
        self.value = value
        self.size_bytes = size_bytes

    def __str__(self) -> str:
        return f"{describe(self.value)}, about {_in_units(self.size_bytes)}: {self.path}"


def notes(value: Any) -> list[str]:
    """What the user may want to know of this process's private memory; nothing where forks are cheap."""
    private = huge = count = 0
    for _, anonymous, folded in transplant.private_memory():
        private, huge, count = private + anonymous, huge + folded, count + (anonymous > 0)
    small = private - huge
    cost_s = small * SECONDS_PER_BYTE + huge * SECONDS_PER_HUGE_BYTE + count * SECONDS_PER_MAPPING
    if cost_s < SECONDS_WORTH_A_NOTE:
        return []
    text = (
        f"R10: each fork costs about {cost_s * 1e3:.0f} ms more for {_in_units(private)} of private memory"
        f" ({_in_units(huge)} of it in huge pages)."
    )
    named = [part for part in largest(value) if part.size_bytes > private / 20]
    if named:
        text += f" The largest: {'; '.join(map(str, named))}."
    else:
        text += " It is not in setup's value: libraries and modules hold it."
    return [
        text
        + " Cure: hold data in numpy, pandas or arrow arrays, which are shared and cost forks nothing, or load in the "
        "tasks what few of them need"
    ]


def largest(value: Any) -> list[Part]:
    """The largest parts of `setup`'s value: the way down goes on as long as one part is most of the whole."""
    parts = [Part("setup's value", value, estimate(value))]
    for _ in range(_DEPTH):
        heaviest = max(parts, key=lambda part: part.size_bytes)
        below = [Part(path, each, estimate(each)) for path, each in _named_parts(heaviest)]
        below = [part for part in below if part.size_bytes > heaviest.size_bytes / 4]
        if not below:
            break
        parts = [part for part in parts if part is not heaviest] + below
    return sorted(parts, key=lambda part: -part.size_bytes)[:_NAMED_MAX]


def estimate(value: Any) -> float:
    """Bytes of private memory below this object, guessed from samples."""
    left = [_OBJECTS_MAX]
    return _estimate(value, _DEPTH, left)


def _estimate(value: Any, depth: int, left: list[int]) -> float:
    left[0] -= 1
    size = float(_own_bytes(value))
    if depth == 0 or left[0] <= 0:
        return size
    count, sample = _elements(value)
    weights = [_estimate(each, depth - 1, left) for each in sample]
    return size + (sum(weights) * count / len(weights) if weights else 0.0)


def _own_bytes(value: Any) -> int:
    try:
        return sys.getsizeof(value)
    except Exception:  # noqa: BLE001 - a user's `__sizeof__`
        return 0


def _elements(value: Any) -> tuple[int, list[Any]]:
    """How many objects this one holds, and some of them, from all over where that is cheap."""
    kind = type(value)
    if kind is dict:
        some = [each for item in islice(value.items(), _SAMPLE // 2) for each in item]
        return 2 * len(value), some
    if kind in (list, tuple):
        return len(value), list(value[:: max(1, len(value) // _SAMPLE)][:_SAMPLE])
    if kind in (set, frozenset):
        return len(value), list(islice(value, _SAMPLE))
    own = _attributes(value)
    return len(own), list(own.values())[:_SAMPLE]


def _attributes(value: Any) -> dict[str, Any]:
    if isinstance(value, (type, type(sys))) or not hasattr(type(value), "__dictoffset__"):
        return {}
    try:
        own = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return own if type(own) is dict else {}


def _named_parts(part: Part) -> Iterator[tuple[str, Any]]:
    value = part.value
    if type(value) is dict and len(value) <= _SAMPLE * 4:
        for key, each in value.items():
            yield f"{part.path}[{str(key)[:40]!r}]" if type(key) is str else f"{part.path}[...]", each
    elif type(value) in (list, tuple) and len(value) <= _SAMPLE * 4:
        for index, each in enumerate(value):
            yield f"{part.path}[{index}]", each
    else:
        for name, each in islice(_attributes(value).items(), _SAMPLE * 4):
            yield f"{part.path}.{name}", each


def describe(value: Any) -> str:
    """Type and size: "dict of 12,000,000 entries"."""
    kind = type(value)
    if kind in (list, tuple, set, frozenset, dict):
        return f"{kind.__name__} of {len(value):,} entries"
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _in_units(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"
