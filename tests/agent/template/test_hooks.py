"""Fork hooks: left out where they are needless, and nowhere else."""

from __future__ import annotations

import os

from agent.template import driver


def test_no_two_processes_share_a_random_stream() -> None:
    def draw() -> tuple[float, float]:
        import random

        read, write = os.pipe()
        if os.fork() == 0:
            os.write(write, repr(random.random()).encode())
            os._exit(0)
        os.wait()
        mine, theirs = random.random(), float(os.read(read, 100))
        os.close(read)
        os.close(write)
        return mine, theirs

    with driver.ready(preload=["random"]) as running:
        drawn = [number for _ in range(2) for number in running.fork().run(draw)]
    assert len(set(drawn)) == 4


def test_half_of_a_pair_of_normal_deviates_is_not_inherited() -> None:
    def setup() -> None:
        import random

        random.gauss()

    def draw() -> float:
        import random

        return random.gauss()

    with driver.ready(setup, preload=["random"]) as running:
        assert running.fork().run(draw) != running.fork().run(draw)


def test_threads_and_logging_work_in_a_child_and_in_its_copies(bare: driver.Template) -> None:
    def work() -> list[object]:
        import logging
        import threading

        seen: list[object] = [threading.current_thread() is threading.main_thread(), threading.active_count()]
        thread = threading.Thread(target=lambda: seen.append("ran"))
        thread.start()
        thread.join()
        logging.getLogger("x").warning("heard")
        pid = os.fork()
        if pid == 0:
            second = threading.Thread(target=logging.getLogger("x").warning, args=("heard, too",))
            second.start()
            second.join()
            os._exit(threading.active_count())
        seen.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        return seen

    child = bare.fork()
    assert child.run(work) == [True, 1, "ran", 1]
    assert child.output()[1] == "heard\nheard, too\n"


def test_hooks_of_the_users_run_in_every_child_and_in_its_copies() -> None:
    def setup() -> list[int]:
        seen: list[int] = []
        os.register_at_fork(after_in_child=lambda: seen.append(os.getpid()))
        return seen

    def look() -> bool:
        import herder

        seen = herder.shared()
        pid = os.fork()
        if pid == 0:
            os._exit(0 if seen[-2:] == [os.getppid(), os.getpid()] else 1)
        return os.waitpid(pid, 0)[1] == 0 and seen[-1] == os.getpid()

    with driver.ready(setup) as running:
        assert running.fork().run(look)


def test_what_registers_hooks_is_the_systems_own_in_a_child(bare: driver.Template) -> None:
    assert bare.fork().run(lambda: os.register_at_fork.__module__) == "posix"


def test_all_hooks_run_where_a_thread_of_pythons_lives() -> None:
    def setup() -> None:
        import threading

        threading.Thread(target=threading.Event().wait, daemon=True, name="idler").start()

    def count() -> tuple[int, bool]:
        import threading

        return threading.active_count(), threading.current_thread() is threading.main_thread()

    with driver.ready(setup, allow_threads=["idler"], start="fork") as running:
        assert running.fork().run(count) == (1, True)
