"""The lab of hosts itself, and the leak check: what other tests rely on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import leaks
from support.netlab import HostSpec, Lab


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab([HostSpec("desk", sshd=False), HostSpec("n1"), HostSpec("n2", ssh_port=2222)]) as running:
        yield running


@pytest.mark.netlab
@pytest.mark.slow
def test_each_host_has_its_own_name_address_and_host_key(lab: Lab) -> None:
    for name in ("n1", "n2"):
        assert lab["desk"].run(["ssh", name, "hostname"]).stdout.strip() == name
        assert lab[name].address in lab["desk"].run(["ssh", name, "ip -br addr"]).stdout
    keys = {lab[name].run("ssh-keygen -lf /etc/ssh/lab_host_key").stdout.split()[1] for name in ("n1", "n2")}
    assert len(keys) == 2


@pytest.mark.netlab
@pytest.mark.slow
def test_blocked_hosts_cannot_talk_until_healed_and_a_crashed_host_comes_back(lab: Lab) -> None:
    lab["n1"].block(lab["desk"])
    assert lab["desk"].run("ssh -o ConnectTimeout=1 n1 true", check=False).returncode == 255
    lab["n1"].heal()
    lab["n1"].run("echo kept > /var/tmp/kept")
    lab["n1"].crash()
    lab["n1"].reboot()
    assert lab["desk"].run("ssh -o ConnectTimeout=5 n1 cat /var/tmp/kept").stdout == "kept\n"


def test_a_leaked_process_thread_descriptor_and_file_are_each_named(tmp_path: Path) -> None:
    before = leaks.footprint(tmp_path, with_shm=False)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="leaked thread")
    thread.start()
    process = subprocess.Popen(["sleep", "600"])
    descriptor = os.open("/dev/null", os.O_RDONLY)
    (tmp_path / "leaked file").touch()
    try:
        found = leaks._differences(before, tmp_path, with_shm=False)
    finally:
        stop.set()
        thread.join()
        process.kill()
        process.wait()
        os.close(descriptor)
    assert [line.split()[0] for line in found] == ["process", "thread", "descriptor", "file"]
    (tmp_path / "leaked file").unlink()
    assert leaks.leaks_since(before, tmp_path, with_shm=False) == []


def test_a_grandchild_whose_parent_is_gone_is_still_found(tmp_path: Path) -> None:
    before = leaks.footprint(tmp_path, with_shm=False)
    subprocess.run(["sh", "-c", "setsid sleep 600 </dev/null >/dev/null 2>&1 &"], check=True)
    assert leaks.wait_until(lambda: any("sleep 600" in name for name in leaks.direct_children().values()), 5)
    leaks.end_leaked_children(before)
    assert leaks.leaks_since(before, tmp_path, with_shm=False) == []


def test_shared_memory_of_another_user_of_the_machine_is_no_leak(tmp_path: Path) -> None:
    before = leaks.footprint(tmp_path, with_shm=True)
    code = (
        "import mmap, os, sys; file = open(sys.argv[1], 'w+b'); file.truncate(4096); "
        "mapped = mmap.mmap(file.fileno(), 4096); print(flush=True); sys.stdin.read(); os.unlink(sys.argv[1])"
    )
    name = f"/dev/shm/test-of-leaks-{os.getpid()}"
    argv = [sys.executable, "-c", code, name]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={}) as other:
        assert other.stdout is not None
        other.stdout.readline()
        found = [line for line in leaks._differences(before, tmp_path, with_shm=True) if name in line]
        Path(f"{name}-ours").touch()
        ours = [line for line in leaks._differences(before, tmp_path, with_shm=True) if "-ours" in line]
        Path(f"{name}-ours").unlink()
        assert other.stdin is not None
        other.stdin.close()
    assert [line for line in found if line.startswith("file")] == []
    assert ours == [f"file {name}-ours"]
