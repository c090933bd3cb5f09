"""Random streams: no two children share one, and with a seed all attempts of a task do.

`random` is seeded anew by CPython after each fork. numpy's module-wide generator is not, and seeding it as one would
costs a child 150 page faults: a third of a whole task. So its state is overwritten in place with bytes of the
system's entropy (any 624 words are a state of a Mersenne Twister), at an address that was found, and tried out, in
the template."""

from __future__ import annotations

import os
import sys

from . import generators, system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

TWISTER_BYTES = 624 * 4


def task_seed(seed: int, index: int) -> int:
    """H(seed, index): equal for all attempts of a task, on any node, under any start method, and when the same program
    runs again (a job's id is random, a task's index is not); 64 bits."""
    from _blake2 import blake2b  # hashlib would bring OpenSSL along

    digest = blake2b(f"{seed}/{index}".encode(), digest_size=8, person=b"herder-seed").digest()
    return int.from_bytes(digest, "big")


_SEEDERS: dict[str, Callable[[Any, int], object]] = {
    "random": lambda module, seed: module.seed(seed),
    # A word more: `random` makes the same stream of the same two.
    "numpy.random": lambda module, seed: module.seed([seed & 0xFFFFFFFF, seed >> 32, 1]),
    "torch": lambda module, seed: module.manual_seed(seed & 0x7FFFFFFFFFFFFFFF),
}


def seed_all(seed: int) -> None:
    """Give the module-wide random streams that exist in this process this seed of 64 bits."""
    for name, give in _SEEDERS.items():
        if name in sys.modules:
            give(sys.modules[name], seed)


class Latecomers:
    """A finder that seeds the modules which a task imports only as it runs: what was preloaded must not matter."""

    def __init__(self) -> None:
        self.seed: int | None = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Finds nothing by itself; what others find is seeded when it has been executed."""
        if self.seed is None or name not in _SEEDERS:
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if finder is not self else None
            if spec is not None:
                self._seed_after(name, spec.loader)
                return spec
        return None

    def _seed_after(self, name: str, loader: Any) -> None:
        execute, seed = loader.exec_module, self.seed

        def execute_and_seed(module: Any) -> None:
            execute(module)
            _SEEDERS[name](module, seed or 0)

        loader.exec_module = execute_and_seed


def parting(found: generators.Generators = generators.NONE) -> Callable[[], None]:
    """What a forked child calls to have streams of its own. Made in the template, when all is loaded."""
    part_modules = _parting_of_modules()
    if not len(found):
        return part_modules

    def part() -> None:
        part_modules()
        found.part()

    return part


def _parting_of_modules() -> Callable[[], None]:
    if "torch" not in sys.modules:
        if "numpy.random" not in sys.modules:
            return _nothing
        address = twister_address(sys.modules["numpy.random"])
        if address:
            return _overwriting(system.memory_at(address, TWISTER_BYTES).cast("B"))
    return seed_anew


def _overwriting(state: memoryview) -> Callable[[], None]:
    urandom = os.urandom

    def overwrite() -> None:
        state[:] = urandom(TWISTER_BYTES)

    return overwrite


def seed_anew() -> None:
    """Give the module-wide streams a seed that nobody else has."""
    seed_all(int.from_bytes(os.urandom(8), "little"))


def _nothing() -> None:
    return None


def twister_address(module: Any) -> int:
    """Where the state of numpy's module-wide generator lies; 0 where that is not to be relied upon."""
    try:
        # Half of a pair of normal deviates may be in store: it would come out of every child.
        kind, key, position, _, _ = module.get_state()
        module.set_state((kind, key, position, 0, 0.0))
        generator = module.mtrand._rand._bit_generator
        if kind != "MT19937" or type(generator) is not module.MT19937:
            return 0
        address = int(generator.ctypes.state_address)
        pattern = os.urandom(TWISTER_BYTES)
        if system.read_memory(address, TWISTER_BYTES) != key.tobytes():
            return 0
        system.write_memory(address, pattern)
        is_where_we_think = bool(module.get_state()[1].tobytes() == pattern)
        module.set_state((kind, key, position, 0, 0.0))
    except (AttributeError, TypeError, ValueError):
        return 0
    return address if is_where_we_think else 0
