"""The encoded form of every message, as peers in the field know it: `messages.golden` next to this file.

A field may be added at the end with a default; nothing else may change. A new message is recorded by running this file:
`python tests/shared/wire/test_messages.py`.
"""

from __future__ import annotations

import enum
import types
import typing
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import pytest

from herder_shared.wire import messages
from herder_shared.wire.messages import Message

GOLDEN = Path(__file__).with_name("messages.golden")
KINDS: list[type[msgspec.Struct]] = sorted(set(get_args(Message)), key=lambda kind: kind.__name__)
DEPTH_MAX = 8


def example(hint: Any, name: str = "x", depth: int = 0) -> Any:
    """A value of this type, always the same, in which as little as possible is a default."""
    if hasattr(hint, "__supertype__"):
        return example(hint.__supertype__, name, depth)
    if get_origin(hint) in (typing.Union, types.UnionType):
        return _example_of_union([part for part in get_args(hint) if part is not type(None)], hint, name, depth)
    if get_origin(hint) is Literal:
        return get_args(hint)[-1]
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        return tuple(example(part, name, depth + 1) for part in (parts[:1] if parts[-1] is Ellipsis else parts))
    if get_origin(hint) is dict:
        key, value = get_args(hint)
        return {example(key, name, depth + 1): example(value, name, depth + 1)}
    return _example_of_class(hint, name, depth)


def _example_of_union(parts: list[Any], hint: Any, name: str, depth: int) -> Any:
    if depth > DEPTH_MAX and type(None) in get_args(hint):
        return None
    return example(parts[0], name, depth)


def _example_of_class(kind: Any, name: str, depth: int) -> Any:
    if issubclass(kind, enum.Enum):
        return list(kind)[-1]
    if issubclass(kind, msgspec.Struct) or hasattr(kind, "_fields"):
        return kind(**{field: example(hint, field, depth + 1) for field, hint in get_type_hints(kind).items()})
    scalars: dict[type, Any] = {int: 7, float: 2.5, str: name, bytes: b"\x00\xff", bool: True}
    return scalars[kind]


def read_golden() -> dict[str, bytes]:
    lines = GOLDEN.read_text(encoding="ascii").splitlines()
    return {name: bytes.fromhex(text) for name, text in (line.split() for line in lines)}


def is_extension(old: Any, new: Any) -> bool:
    """Whether `new` says all that `old` says, in the same places."""
    if isinstance(old, list) and isinstance(new, list):
        return len(new) >= len(old) and all(is_extension(a, b) for a, b in zip(old, new, strict=False))
    if isinstance(old, dict) and isinstance(new, dict):
        return all(key in new and is_extension(old[key], new[key]) for key in old)
    return bool(old == new) and type(old) is type(new)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_encoded_form_is_what_it_always_was(kind: type[msgspec.Struct]) -> None:
    golden = read_golden()
    assert kind.__name__ in golden, f"a new message: record it with `python {Path(__file__).name}`"
    recorded = golden[kind.__name__]
    decoded = msgspec.msgpack.decode(recorded, type=kind)
    assert is_extension(msgspec.msgpack.decode(recorded), msgspec.msgpack.decode(msgspec.msgpack.encode(decoded)))
    now = msgspec.msgpack.decode(msgspec.msgpack.encode(example(kind)))
    assert is_extension(msgspec.msgpack.decode(recorded), now), "a field was removed, moved or changed its type"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_message_comes_back_as_it_was(kind: type[msgspec.Struct]) -> None:
    message = example(kind)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=kind) == message


def test_no_message_has_vanished() -> None:
    assert set(read_golden()) <= {kind.__name__ for kind in KINDS}


def test_every_message_class_has_a_direction() -> None:
    defined = {
        value
        for value in vars(messages).values()
        if isinstance(value, type) and issubclass(value, messages._Message) and value is not messages._Message
    }
    assert defined == set(KINDS)


def test_parts_decode_when_only_what_has_no_default_is_sent() -> None:
    body = msgspec.msgpack.encode(["OpenJob", {"job": "j", "name": "n", "workload": {"key": "k"}}])
    job = msgspec.msgpack.decode(body, type=messages.OpenJob).spec
    assert (job.workload.start, job.options.cores, job.kind) == ("auto", 1.0, "submit")


def record() -> None:
    """Add the messages that are not recorded yet; those that are stay as they are."""
    recorded = read_golden() if GOLDEN.exists() else {}
    for kind in KINDS:
        recorded.setdefault(kind.__name__, msgspec.msgpack.encode(example(kind)))
    lines = [f"{name} {recorded[name].hex()}\n" for name in sorted(recorded)]
    GOLDEN.write_text("".join(lines), encoding="ascii")


if __name__ == "__main__":
    record()
