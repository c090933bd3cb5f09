"""What is read from /proc and done by ctypes."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys

from herder_agent.template import system


def test_mappings_hold_this_interpreters_code() -> None:
    maps = system.mappings()
    assert any("x" in mapping.permissions and mapping.path.startswith("/") for mapping in maps)
    assert all(mapping.start < mapping.end for mapping in maps)


def test_mappings_are_described_with_their_private_bytes_and_flags() -> None:
    length = 64 << 10
    address = system.map_pages(-1, length, 3)
    try:
        ctypes.memset(address, 1, 3 * 4096)
        of_it = [each for each in system.described_mappings() if each[0].start <= address < each[0].end]
        ((mapping, anonymous, huge, flags),) = of_it
        assert mapping.permissions == "rw-p"
        assert anonymous >= 3 * 4096
        assert huge <= anonymous
        assert {"rd", "wr"} <= flags
    finally:
        system.unmap_pages(address, length)


def test_descendants_are_found_at_any_depth() -> None:
    code = (
        "import os, time\n"
        "if os.fork() == 0 and os.fork() == 0:\n"
        "    os.setsid()\n"
        "    os.write(1, b'up')\n"
        "time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.read(2)
            below = system.descendants_of(process.pid)
            assert len(below) == 2
            assert system.children_of(process.pid) == below[:1]
        finally:
            fds = [os.pidfd_open(pid) for pid in system.descendants_of(process.pid)]
            for pid in system.descendants_of(process.pid):
                os.kill(pid, 9)
            process.kill()
            for fd in fds:
                os.close(fd)
    assert system.children_of(process.pid) == []


def test_a_limit_never_exceeds_the_hard_one_that_there_is() -> None:
    before = resource.getrlimit(resource.RLIMIT_CORE)
    code = (
        "import os, resource, sys; sys.path.insert(0, sys.argv[1]); import system; "
        "os.getuid() or os.setuid(65534); resource.setrlimit(resource.RLIMIT_CORE, (10, 20)); "
        "system.set_limit('RLIMIT_CORE', resource.RLIM_INFINITY, resource.RLIM_INFINITY); "
        "system.set_limit('RLIMIT_NO_SUCH', 1, 1); print(resource.getrlimit(resource.RLIMIT_CORE))"
    )
    folder = os.path.dirname(system.__file__)
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout == "(20, 20)\n"
    assert resource.getrlimit(resource.RLIMIT_CORE) == before


def test_memory_and_threads_of_this_process_are_seen() -> None:
    resident, anonymous = system.memory_bytes()
    assert 1 << 20 < anonymous <= resident
    assert os.getpid() in system.thread_ids()
