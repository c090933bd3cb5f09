"""Random generators that `setup` and preloaded modules made: each task gets a stream of its own from every one of them.

They are found once, in the template: all that the garbage collector tracks is looked at by type, and what is found is
given a name by where it hangs (its place in `setup`'s value, else in a module), so that `seed` gives the same stream
under every start method. A child only overwrites their states: in place and without numpy's help where the address of
the state was tried out in the template, since numpy's own seeding costs a child 150 page faults.
"""

from __future__ import annotations

import gc
import os
import sys

from . import system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    #: Gives so many random bytes.
    Give = Callable[[int], bytes]
    Part = Callable[[Give], object]
    Settle = Callable[[], object]
    #: Either may be None.
    Made = tuple[Part | None, Settle | None]
    Maker = Callable[[Any], Made]

#: More generators than this are not parted, and the template says so: each costs every task some microseconds.
FOUND_MAX = 10_000
#: Objects looked at to give names; generators beyond are named by the order in which they were found.
VISITS_MAX = 2_000_000
VISITS_PER_MODULE_MAX = 20_000
_BLOCK_BYTES = 64


class Generators:
    """What was found: names with, for each, how to give it a new state. `notes` are for the user."""

    __slots__ = ("_parts", "_settlers", "notes")

    def __init__(self, parts: list[tuple[str, Part]], settlers: list[Settle], notes: list[str]) -> None:
        self._parts = parts
        self._settlers = settlers
        self.notes = notes

    def __len__(self) -> int:
        return len(self._parts)

    def joined(self, other: Generators) -> Generators:
        """These and others; what is in both is given a state twice, the same where there is a seed."""
        return Generators(self._parts + other._parts, self._settlers + other._settlers, self.notes + other.notes)

    def part(self) -> None:
        """Give each a stream that no other process has."""
        for _, part in self._parts:
            part(os.urandom)

    def settle(self) -> None:
        """Drop what was drawn and not yet given out, and begin to count anew; done already when they are found."""
        for settle in self._settlers:
            settle()

    def seed(self, seed: int) -> None:
        """Give each the stream which is its own under this seed of 64 bits."""
        for name, part in self._parts:
            part(_stream(seed, name))


def find(value: Any) -> Generators:
    """The generators in this process: those reachable from `value` (of `setup`), then all others."""
    makers = _makers()
    if not makers:
        return NONE
    known = set(map(id, _others()))
    tracked = [thing for old in (0, 1, 2) for thing in gc.get_objects(old) if type(thing) in makers]
    tracked = [thing for thing in tracked if id(thing) not in known]
    if not tracked and "torch" not in sys.modules:
        return NONE
    named = _named(value, makers, known, tracked)
    notes = []
    if len(named) > FOUND_MAX:
        notes.append(
            f"{len(named)} random generators were found; only {FOUND_MAX} get a stream of their own in each task, the "
            "others begin alike in all of them"
        )
        del named[FOUND_MAX:]
    parts: list[tuple[str, Part]] = []
    settlers: list[Settle] = []
    for name, thing in named:
        try:
            part, settle = makers[type(thing)](thing)
            if part is not None:
                parts.append((name, part))
            if settle is not None:
                settle()
                settlers.append(settle)
        except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
            kind = f"{type(thing).__module__}.{type(thing).__qualname__}"
            notes.append(f"a random generator ({kind}) begins alike in all tasks: it cannot be seeded anew ({error})")
    return Generators(parts, settlers, notes)


NONE = Generators([], [], [])


def _makers() -> dict[type, Maker]:
    """By exact type: what makes a generator's `Part`. Subclasses that the user defined are in it."""
    found: dict[type, Maker] = {}
    random = sys.modules.get("random")
    if random is not None:
        found.update(dict.fromkeys(_family(random.Random), _of_random))
        for kind in _family(random.SystemRandom):
            del found[kind]
    if "numpy.random" in sys.modules:
        numpy = sys.modules["numpy.random"]
        found.update(dict.fromkeys(_family(numpy.BitGenerator), _of_bits))
        found.update(dict.fromkeys(_family(numpy.RandomState), _of_legacy))
        found.update(dict.fromkeys(_family(numpy.SeedSequence), _of_sequence))
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "Generator"):
        found[torch.Generator] = _of_torch
    return found


def _family(kind: type) -> Iterator[type]:
    yield kind
    below: type
    for below in type.__subclasses__(kind):
        yield from _family(below)


def _others() -> Iterator[object]:
    """The module-wide generators, which `streams` deals with; and tempfile's, which looks at the process id."""
    if "random" in sys.modules:
        yield sys.modules["random"]._inst
    if "numpy.random" in sys.modules:
        legacy = sys.modules["numpy.random"].mtrand._rand
        yield legacy
        yield legacy._bit_generator
        yield getattr(legacy._bit_generator, "_seed_seq", None)
    if "torch" in sys.modules:
        yield getattr(sys.modules["torch"], "default_generator", None)
    if "tempfile" in sys.modules:
        yield getattr(sys.modules["tempfile"]._name_sequence, "_rng", None)


def _named(value: Any, makers: dict[type, Maker], known: set[int], tracked: list[Any]) -> list[tuple[str, Any]]:
    """Each generator once, with a name that does not depend on the process: first those of the value, in its order."""
    named: list[tuple[str, Any]] = []
    seen = set(known)

    def name(place: str, things: Iterable[Any]) -> None:
        number = 0
        for thing in things:
            if type(thing) in makers:
                if id(thing) not in seen:
                    seen.add(id(thing))
                    named.append((f"{place}/{number}", thing))
                number += 1

    barriers = {id(vars(module)) for module in list(sys.modules.values()) if type(module) is type(sys)}
    name("setup", _below([value], barriers, VISITS_MAX))
    modules = sorted((key, vars(module)) for key, module in list(sys.modules.items()) if type(module) is type(sys))
    for key, variables in modules:
        name(key, list(variables.values()))
    for key, variables in modules:
        if all(id(thing) in seen for thing in tracked):
            break
        there = list(variables.values())
        # Listed first: looking at a class may bring one of its enumerations' or lazy modules' attributes into being.
        own = [each for kind in there if isinstance(kind, type) for each in list(vars(kind).values())]
        name(f"{key}:", _below([*there, *own], barriers, VISITS_PER_MODULE_MAX))
    name("?", tracked)
    return named


def _below(roots: list[Any], barriers: set[int], visits_max: int) -> Iterator[Any]:
    """What is reachable, depth first and in the order in which containers hold it; not through modules and types."""
    visited: set[int] = set()
    stack = roots[::-1]
    while stack and len(visited) < visits_max:
        thing = stack.pop()
        if id(thing) in visited or id(thing) in barriers or isinstance(thing, (type, type(sys))):
            continue
        visited.add(id(thing))
        yield thing
        stack.extend(reversed(_held_by(thing)))


def _held_by(thing: Any) -> list[Any]:
    """What a container holds; of arrays of objects, too, which the garbage collector does not look into."""
    if not gc.is_tracked(thing):
        numpy = sys.modules.get("numpy")
        if numpy is None or not isinstance(thing, numpy.ndarray) or not thing.dtype.hasobject:
            return gc.get_referents(thing) if type(thing) is tuple or type(thing) is dict else []
        return [thing.base, *thing.ravel().tolist()]
    return gc.get_referents(thing)


# --- one maker for each kind -----------------------------------------------------------------------------------------


def _of_random(generator: Any) -> Made:
    seed = sys.modules["_random"].Random.seed.__get__(generator)

    def settle() -> None:
        # Half of a pair of normal deviates may be in store.
        generator.gauss_next = None

    return lambda give: seed(int.from_bytes(give(16), "little")), settle


def _of_legacy(generator: Any) -> Made:
    """A `RandomState`; its bit generator is found by itself."""

    def settle() -> None:
        state = generator.get_state(legacy=False)
        if state.get("has_gauss"):
            generator.set_state({**state, "has_gauss": 0, "gauss": 0.0})

    return None, settle


def _of_sequence(sequence: Any) -> Made:
    pool_words = sequence.pool_size
    begin_anew = type(sequence).__init__

    def part(give: Give) -> None:
        begin_anew(sequence, int.from_bytes(give(16), "little"), pool_size=pool_words)

    return part, None


def _of_torch(generator: Any) -> Made:
    return lambda give: generator.manual_seed(int.from_bytes(give(8), "little") >> 1), None


def _of_bits(generator: Any) -> Made:
    """A numpy bit generator."""

    def settle() -> None:
        state = generator.state
        for name in ("has_uint32", "uinteger"):
            if name in state:
                state[name] = 0
        if "buffer_pos" in state:
            state["buffer_pos"] = len(state["buffer"])
        if "pos" in state["state"]:
            state["state"]["pos"] = len(state["state"]["key"])
        if "counter" in state["state"]:
            state["state"]["counter"][:] = 0
        generator.state = state

    settle()
    place = _place_of(generator)
    if place is None:
        return _by_numpy(generator), settle
    address, length, odd = place
    write = system.write_memory

    def part(give: Give) -> None:
        write(address, _with_odd(give(length), odd))

    return part, settle


def _by_numpy(generator: Any) -> Part:
    kind = type(generator)

    def part(give: Give) -> None:
        generator.state = kind(int.from_bytes(give(16), "little")).state

    part(os.urandom)  # that it can be done shows here, and not in a child
    return part


def _with_odd(content: bytes, odd: int | None) -> bytes:
    """With the byte at this place made odd."""
    if odd is None:
        return content
    return content[:odd] + bytes((content[odd] | 1,)) + content[odd + 1 :]


def _place_of(generator: Any) -> tuple[int, int, int | None] | None:
    """Where the state lies, its length, and which byte must be odd; None where that is not to be relied upon."""
    before = generator.state
    layout = _LAYOUTS.get(before["bit_generator"])
    if layout is None:
        return None
    pointer, length, odd = layout
    address = int(generator.ctypes.state_address)
    if pointer is not None:
        address = int.from_bytes(system.read_memory(address + pointer, 8), sys.byteorder)
    if system.read_memory(address, length) != _shown(generator):
        return None
    pattern = _with_odd(os.urandom(length), odd)
    system.write_memory(address, pattern)
    is_where_we_think = _shown(generator) == pattern
    generator.state = before
    return (address, length, odd) if is_where_we_think else None


#: By name: where the structure holds a pointer to the state (None: it is the state), its length, the byte to make odd.
_LAYOUTS: dict[str, tuple[int | None, int, int | None]] = {
    "MT19937": (None, 624 * 4, None),
    "PCG64": (0, 32, 16),
    "PCG64DXSM": (0, 32, 16),
    "Philox": (8, 16, None),
    "SFC64": (None, 32, None),
}


def _shown(generator: Any) -> bytes:
    """The state as numpy tells it, in the order in which it lies in memory."""
    state = generator.state["state"]
    for name in ("key", "state"):
        if hasattr(state.get(name), "tobytes"):
            return bytes(state[name].tobytes())
    return b"".join(int(state[name]).to_bytes(16, sys.byteorder) for name in ("state", "inc"))


def _stream(seed: int, name: str) -> Give:
    """Bytes that follow from the seed and the generator's name."""
    from _blake2 import blake2b

    blocks = 0

    def give(length: int) -> bytes:
        nonlocal blocks
        content = b""
        while len(content) < length:
            content += blake2b(
                f"{seed}/{blocks}/{name}".encode(), digest_size=_BLOCK_BYTES, person=b"herder-streams"
            ).digest()
            blocks += 1
        return content[:length]

    return give
