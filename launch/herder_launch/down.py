"""Take a cluster down: ask the coordinator, then make sure on every host, by pid and start time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import msgspec

from herder_launch import control, record
from herder_launch.display import Board
from herder_launch.hosts import HostSpec
from herder_launch.place import LocalPlace, Place, SshPlace
from herder_launch.plan import LOCAL
from herder_launch.record import Record, Started
from herder_launch.ssh import FAN_OUT_MAX, Connection
from herder_launch.up import stop
from herder_shared.config import Profile, save_profile
from herder_shared.errors import HerderError

#: The coordinator answers at once or not at all: then the hosts are gone through without it.
ANSWER_TIMEOUT_S = 5.0


def take_down(profile: Profile, board: Board) -> dict[str, str]:
    """End everything that `herder up` started for this profile. What could not be ended: its row and the reason.

    What could not be ended stays recorded, so that a second `down` tries again.

    Raises:
        ConfigError: another launcher is at work, or the record is damaged.
    """
    with record.exclusive(profile.folder):
        launched = record.load(profile.folder)
        failures: dict[str, str] = {}
        is_asked = _ask_coordinator(profile, board)
        if launched.is_empty and profile.addresses and not is_asked:
            failures["coordinator"] = "does not answer, and was not started by `herder up`: end it where it runs"
        with ThreadPoolExecutor(FAN_OUT_MAX, "launch") as pool:
            groups = _by_host(launched)
            futures = {rows: pool.submit(_stop_all, programs) for rows, programs in groups.items()}
            for rows, future in futures.items():
                try:
                    ended = future.result()
                except HerderError as error:
                    failures |= dict.fromkeys(rows, str(error))
                    _tell(board, rows, "failed", str(error))
                    continue
                _forget(launched, rows)
                record.save(profile.folder, launched)
                _tell(board, rows, "stopped", "" if ended or is_asked else "it ran no more")
        if not failures:
            save_profile(msgspec.structs.replace(profile, addresses=(), http=""))
        return failures


def _ask_coordinator(profile: Profile, board: Board) -> bool:
    if not profile.addresses:
        return False
    try:
        control.shut_down(profile, ANSWER_TIMEOUT_S)
    except HerderError as error:
        board.set("coordinator", "stopping", f"does not answer ({error}): ending it on its host")
        return False
    board.set("coordinator", "stopping", "ends its agents, then itself")
    return True


def _by_host(launched: Record) -> dict[tuple[str, ...], list[Started]]:
    """The programs of each host, agents first, under the names of their rows."""
    hosts: dict[tuple[str, str | None, int | None], list[tuple[str, Started]]] = {}
    programs = [(f"agent {node}", started) for node, started in launched.agents.items()]
    if launched.coordinator is not None:
        programs.append(("coordinator", launched.coordinator))
    for row, started in programs:
        hosts.setdefault((started.host.host, started.host.user, started.host.port), []).append((row, started))
    return {tuple(row for row, _ in group): [started for _, started in group] for group in hosts.values()}


def _stop_all(programs: list[Started]) -> list[str]:
    place = _place_of(programs[0].host)
    try:
        return stop(place, *programs)
    finally:
        place.close()


def _place_of(spec: HostSpec) -> Place:
    return LocalPlace() if spec.host == LOCAL else SshPlace(Connection.open(spec))


def _forget(launched: Record, rows: tuple[str, ...]) -> None:
    for row in rows:
        if row == "coordinator":
            launched.coordinator = None
        else:
            launched.agents = {node: each for node, each in launched.agents.items() if f"agent {node}" != row}


def _tell(board: Board, rows: tuple[str, ...], state: str, detail: str) -> None:
    for row in rows:
        board.set(row, state, detail)
