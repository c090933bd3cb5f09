"""Options: what tasks ask for and how their ends are treated, checked when they are given and not when they fail."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from herder_shared.config import parse_bytes
from herder_shared.errors import ConfigError
from herder_shared.limits import NAME_CHARS_MAX
from herder_shared.wire.messages import TaskOptions

if TYPE_CHECKING:
    from herder.workload import Workload


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `client.options`, normalised and hashable: equal ones share an open job."""

    workload: Workload | None = None
    cores: float = 1
    memory: int | None = None
    gpus: int = 0
    resources: tuple[tuple[str, float], ...] = ()
    nodes: tuple[str, ...] = ()
    priority: int = 0
    timeout: float | None = None
    retries: int = 0
    retry_on: tuple[type[BaseException], ...] = ()
    backoff: float = 0.0
    max_crashes: int = 3
    idempotent: bool = True
    cancel_running: bool = True
    seed: int | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()
    detached: bool = False
    stdout: Literal["capture", "stream", "discard"] = "capture"
    memory_max: int | None = None
    memory_growth: float = 2.0
    placement: Literal["spread", "pack"] = "spread"

    def with_given(self, given: Mapping[str, Any]) -> Options:
        """These options with some replaced by what a user wrote.

        Raises:
            TypeError: an unknown option (the nearest is named), or a value of the wrong type.
            ValueError: a value out of range.
        """
        check_options(given)
        if not given:
            return self
        options = replace(self, **{name: _CHECKS[name](name, value) for name, value in given.items()})
        if options.memory_max is not None and options.memory is None:
            raise ValueError("memory_max is how far `memory` may grow: give that as well")
        return options

    def for_wire(self) -> TaskOptions:
        """What coordinator and agent need to know of them."""
        return TaskOptions(
            cores=float(self.cores),
            memory_bytes=self.memory or 0,
            gpus=self.gpus,
            resources=dict(self.resources),
            nodes=self.nodes,
            priority=self.priority,
            timeout_s=self.timeout,
            retries=self.retries,
            retry_on=_pickled_types(self.retry_on),
            backoff_s=self.backoff,
            max_crashes=self.max_crashes,
            idempotent=self.idempotent,
            cancel_running=self.cancel_running,
            seed=self.seed,
            stdout=self.stdout,
            memory_max_bytes=self.memory_max or 0,
            memory_growth=self.memory_growth,
            placement=self.placement,
        )


OPTION_NAMES = tuple(field.name for field in fields(Options))


def check_options(given: Mapping[str, Any]) -> None:
    """Raises:
    TypeError: an unknown option; the message names the nearest known one.
    """
    for name in given:
        if name not in OPTION_NAMES:
            raise TypeError(unknown_keyword("option", name, OPTION_NAMES))


def unknown_keyword(what: str, name: str, known: Sequence[str]) -> str:
    """A message for a keyword which does not exist."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"unknown {what} {name!r}: {hint}"


def size_bytes(name: str, value: int | float | str) -> int:
    """`4 * 2**30`, `"4GiB"`, `"500MB"`, `"1.5G"` (a single letter is binary) as bytes.

    Raises:
        TypeError, ValueError: not a size; the message names the option.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(f"{name} must be a number of bytes or a text such as '4GiB', not {value!r}")
    if isinstance(value, str):
        try:
            return parse_bytes(value)
        except ConfigError as error:
            raise ValueError(f"{name}: {error}") from None
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}={value!r} is not a size: write bytes or a text such as '4GiB'")
    return int(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{name} must be a finite number, not {value!r}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, not {value!r}")
    return float(value)


def _cores(name: str, value: Any) -> float:
    amount = _number(name, value)
    if amount > 1 and amount != int(amount):
        raise ValueError(f"{name}={value!r}: above 1 it must be a whole number; below 1 tasks share a core")
    return amount


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < 0 and name not in {"priority", "seed"}:
        raise ValueError(f"{name} must not be negative, not {value!r}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}={value!r} does not fit into 64 bits")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return value


def _seconds_or_none(name: str, value: Any) -> float | None:
    if value is None:
        return None
    seconds = _number(name, value)
    if seconds == 0:
        raise ValueError(f"{name} must be more than 0 s; None means no limit")
    return seconds


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a text or several, not {value!r}")
    texts = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be texts, not {value!r}")
    return texts


def _resources(name: str, value: Any) -> tuple[tuple[str, float], ...]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict of name and amount, not {value!r}")
    return tuple(sorted((str(key), _number(f"{name}[{key!r}]", amount)) for key, amount in value.items()))


def _exceptions(name: str, value: Any) -> tuple[type[BaseException], ...]:
    if isinstance(value, str) or not isinstance(value, Iterable | type):
        raise TypeError(f"{name} must be exception types, not {value!r}")
    types = (value,) if isinstance(value, type) else tuple(value)
    for each in types:
        if not (isinstance(each, type) and issubclass(each, BaseException)):
            raise TypeError(f"{name} must be exception types, not {each!r}")
    return types


def _name(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a text, not {value!r}")
    if value is not None and len(value) > NAME_CHARS_MAX:
        raise ValueError(f"{name} has {len(value)} characters; at most {NAME_CHARS_MAX} are allowed")
    return value


def _stdout(name: str, value: Any) -> str:
    if value not in {"capture", "stream", "discard"}:
        raise ValueError(f"{name} must be 'capture', 'stream' or 'discard', not {value!r}")
    return str(value)


def _growth(name: str, value: Any) -> float:
    factor = _number(name, value)
    if factor <= 1:
        raise ValueError(f"{name}={value!r}: each attempt must get more than the last, so it must be above 1")
    return factor


def _placement(name: str, value: Any) -> str:
    if value not in {"spread", "pack"}:
        raise ValueError(f"{name} must be 'spread' or 'pack', not {value!r}")
    return str(value)


def _workload(name: str, value: Any) -> Workload | None:
    from herder.workload import Workload

    if value is not None and not isinstance(value, Workload):
        raise TypeError(f"{name} must be a herder.Workload, not {value!r}")
    return value


_CHECKS: dict[str, Any] = {
    "workload": _workload,
    "cores": _cores,
    "memory": lambda name, value: None if value is None else size_bytes(name, value),
    "gpus": _whole,
    "resources": _resources,
    "nodes": _texts,
    "priority": _whole,
    "timeout": _seconds_or_none,
    "retries": _whole,
    "retry_on": _exceptions,
    "backoff": _number,
    "max_crashes": _whole,
    "idempotent": _flag,
    "cancel_running": _flag,
    "seed": lambda name, value: None if value is None else _whole(name, value),
    "name": _name,
    "tags": _texts,
    "detached": _flag,
    "stdout": _stdout,
    "memory_max": lambda name, value: None if value is None else size_bytes(name, value),
    "memory_growth": _growth,
    "placement": _placement,
}


def _pickled_types(types: tuple[type[BaseException], ...]) -> bytes:
    if not types:
        return b""
    from herder.payload import pickle_plainly

    return pickle_plainly(types, "retry_on").content
