"""Several hosts on one machine, for tests that need real addresses, real sshd and real faults.

A host is a set of namespaces (network, pid, mount, uts, ipc) with its own name, address, copy-on-write root file
system, host key and sshd. One bridge, in a namespace of its own, joins them; nothing is attached to the machine's
network and no host has a default route, so no packet leaves the lab. Addresses are of 198.18.0.0/15, which RFC 2544
keeps for benchmarks: they are never anybody's.

Theory of operation. Nothing has a name that could be left over: each network namespace is held by a `sleep` of its own,
and everything is started through `setpriv --pdeathsig KILL`, so a test process that is killed takes the lab with it (a
parent-death signal fires when the creating *thread* ends: make labs in the main thread). PID 1 of a host takes all of
the host's processes along. Only a folder in `/dev/shm` can outlive a killed creator; the next lab removes it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from support.leaks import wait_until

INIT = Path(__file__).with_name("lab_host_init.sh")
SHM = Path("/dev/shm")
PREFIX = "herder-netlab-"
#: What `lab_host_init.sh` mounts afresh.
HIDDEN = (Path("/dev"), Path("/proc"), Path("/run"), Path("/sys"), Path("/tmp"))
NETWORK = "198.18.10"
#: The first host's last octet.
FIRST_OCTET = 10
#: A host is up within a second; a machine under load may take several.
BOOT_TIMEOUT_S = 60.0
COMMAND_TIMEOUT_S = 60.0

_SSHD_CONFIG = """\
Port {port}
HostKey /etc/ssh/lab_host_key
PidFile /run/sshd.pid
AuthorizedKeysFile .ssh/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UsePAM no
UseDNS no
PrintMotd no
"""

_SSH_CONFIG_END = """\
Host *
  User root
  IdentityFile ~/.ssh/id_ed25519
  IdentitiesOnly yes
  UserKnownHostsFile ~/.ssh/known_hosts
  StrictHostKeyChecking yes
"""


@functools.cache
def why_not() -> str | None:
    """The reason why no lab can be made here, or None."""
    if os.geteuid() != 0:
        return "the lab of hosts needs root: it creates network, pid and mount namespaces"
    for tool, package in (
        ("ip", "iproute2"),
        ("nft", "nftables"),
        ("nsenter", "util-linux"),
        ("unshare", "util-linux"),
        ("setpriv", "util-linux"),
        ("/usr/sbin/sshd", "openssh-server"),
        ("ssh-keygen", "openssh-client"),
    ):
        if shutil.which(tool) is None and shutil.which(tool, path="/usr/sbin:/sbin") is None:
            return f"the lab of hosts needs {tool!r} (Debian package {package})"
    probe = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--mount", "--uts", "--ipc", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"this kernel or sandbox forbids namespaces: {probe.stderr.strip()}" if probe.returncode else None


@dataclass(frozen=True, slots=True)
class HostSpec:
    """One host to be. `sshd=False`: a desk, from which others are reached."""

    name: str
    sshd: bool = True
    ssh_port: int = 22


class Host:
    """One lab host. Invariant: `pid` (its PID 1, as seen from outside) is set exactly while it is up."""

    def __init__(self, lab: Lab, spec: HostSpec, index: int) -> None:
        self.lab = lab
        self.spec = spec
        self.name = spec.name
        self.address = f"{NETWORK}.{FIRST_OCTET + index}"
        self.disk = lab.folder / "disks" / spec.name
        self.pid: int | None = None
        self._network: subprocess.Popen[bytes] | None = None
        self._init: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        """Start PID 1 and wait until it is ready.

        Raises:
            RuntimeError: the host did not come up; with what it said.
        """
        assert self._init is None, f"{self.name} is up"
        self.disk.mkdir(parents=True, exist_ok=True)
        self._init = start(
            [
                "nsenter",
                f"--net=/proc/{self._holder().pid}/ns/net",
                *("unshare", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child=KILL"),
                *(str(INIT), self.name, str(self.disk), str(self.lab.etc), "yes" if self.spec.sshd else "no"),
                *_other_folders(),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._init.stdout is not None
        assert self._init.stderr is not None
        if self._init.stdout.readline().strip() != b"READY":
            said = self._init.stderr.read().decode(errors="replace")
            raise RuntimeError(f"lab host {self.name} did not boot: {said}")
        # setpriv, nsenter and unshare exec each other; unshare --fork has one child: the host's PID 1
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text().split()
        self.pid = int(children[0])

    def power_off(self) -> None:
        """Kill every process of the host at once. Its disk stays. Idempotent."""
        if self._init is None:
            return
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._init.wait(5)
        _end(self._init)
        self._init = self.pid = None

    def crash(self) -> None:
        """Lose power: the network goes silent first, so that no FIN or RST gets out."""
        self.plug(connected=False)
        self.power_off()

    def reboot(self) -> None:
        """Off, cable in, on again, with the same disk."""
        self.power_off()
        self.plug(connected=True)
        self.boot()

    def run(
        self, command: Sequence[str] | str, *, check: bool = True, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a command (a string goes to bash) on the host, as root.

        Raises:
            RuntimeError: it ended with another status than 0 and `check` is set; with its output.
        """
        argv = ["bash", "-c", command] if isinstance(command, str) else list(command)
        done = subprocess.run(
            self.entered(argv),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
            env=self.environment(),
        )
        if check and done.returncode:
            raise RuntimeError(f"{self.name}$ {shlex.join(argv)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def start(self, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a command on the host; its output is dropped. The caller ends it and waits for it."""
        return start(self.entered(argv), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=self.environment())

    def entered(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` inside the host."""
        assert self.pid is not None, f"{self.name} is down"
        return ["nsenter", "-t", str(self.pid), "--mount", "--uts", "--ipc", "--net", "--pid", "--wdns=/root", *argv]

    def environment(self) -> dict[str, str]:
        """What a login as root would have, and nothing of the test's own."""
        return {"HOME": "/root", "USER": "root", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}

    def processes(self, needle: str) -> dict[int, str]:
        """The host's processes whose command line contains `needle`: pid (seen from outside) to command line."""
        assert self.pid is not None, f"{self.name} is down"
        namespace = os.stat(f"/proc/{self.pid}/ns/pid").st_ino
        found: dict[int, str] = {}
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{entry}/ns/pid").st_ino != namespace:
                    continue
                command = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if needle in command:
                    found[int(entry)] = command.strip()
        return found

    def plug(self, *, connected: bool) -> None:
        """Pull the network cable, or put it back, at the switch."""
        self.lab.on_switch(["ip", "link", "set", self._port, "up" if connected else "down"])

    def block(self, *others: Host) -> None:
        """Silently drop what comes from and goes to some hosts."""
        rules = [
            "add table inet lab",
            "add chain inet lab i { type filter hook input priority 0; }",
            "add chain inet lab o { type filter hook output priority 0; }",
        ]
        for other in others:
            rules.append(f"add rule inet lab i ip saddr {other.address} drop")
            rules.append(f"add rule inet lab o ip daddr {other.address} drop")
        self._in_network(["nft", "-f", "-"], "\n".join(rules))

    def heal(self) -> None:
        """Undo `block` and `plug`."""
        self.plug(connected=True)
        self._in_network(["nft", "-f", "-"], "add table inet lab\ndelete table inet lab\n")

    @property
    def _port(self) -> str:
        return f"p-{self.name}"[:15]

    def _holder(self) -> subprocess.Popen[bytes]:
        assert self._network is not None
        return self._network

    def _hold_network(self) -> None:
        self._network = start(["unshare", "--net", "sleep", "infinity"])

    def _connect(self) -> None:
        pid = self._holder().pid
        self.lab.on_switch(
            ["ip", "-batch", "-"],
            f"link add {self._port} type veth peer name eth0 netns {pid}\nlink set {self._port} master lab up",
        )
        batch = f"link set lo up\naddr add {self.address}/24 dev eth0\nlink set eth0 up"
        self._in_network(["ip", "-batch", "-"], batch)

    def _in_network(self, argv: Sequence[str], text: str = "") -> None:
        checked(["nsenter", f"--net=/proc/{self._holder().pid}/ns/net", *argv], text)

    def _destroy(self) -> None:
        self.power_off()
        if self._network is not None:
            _end(self._network)
            self._network = None


class Lab:
    """The hosts, their switch, and their SSH keys. Use it as a context manager."""

    def __init__(self, specs: Iterable[HostSpec]) -> None:
        if reason := why_not():
            raise RuntimeError(reason)
        _remove_abandoned()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=SHM))
        self.folder.chmod(0o755)
        self.etc = self.folder / "etc"
        self.etc.mkdir(mode=0o700)
        self.hosts: Mapping[str, Host] = {spec.name: Host(self, spec, index) for index, spec in enumerate(specs)}
        self._switch: subprocess.Popen[bytes] | None = None

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def __enter__(self) -> Self:
        try:
            self._raise()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything and remove the folder. Idempotent."""
        for host in self.hosts.values():
            host._destroy()
        if self._switch is not None:
            _end(self._switch)
            self._switch = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def on_switch(self, argv: Sequence[str], text: str = "") -> None:
        """Run a command in the switch's network namespace."""
        assert self._switch is not None
        checked(["nsenter", f"--net=/proc/{self._switch.pid}/ns/net", *argv], text)

    def _raise(self) -> None:
        self._write_etc()
        self._switch = start(["unshare", "--net", "sleep", "infinity"])
        for host in self.hosts.values():
            host._hold_network()
        own = os.stat("/proc/self/ns/net").st_ino
        for holder in (self._switch, *(host._holder() for host in self.hosts.values())):
            path = f"/proc/{holder.pid}/ns/net"
            if not wait_until(functools.partial(_differs, path, own), BOOT_TIMEOUT_S, 0.001):
                raise RuntimeError("unshare --net did not make a namespace in time")
        self.on_switch(["ip", "-batch", "-"], "link add lab type bridge\nlink set lab up")
        for host in self.hosts.values():
            host._connect()
            host.boot()

    def _write_etc(self) -> None:
        _make_key(self.etc / "id_ed25519")
        shutil.copy(self.etc / "id_ed25519.pub", self.etc / "authorized_keys")
        names = "".join(f"{host.address} {host.name}\n" for host in self.hosts.values())
        (self.etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        known, config = [], []
        for host in self.hosts.values():
            config.append(f"Host {host.name}\n  HostName {host.address}\n  Port {host.spec.ssh_port}\n")
            if host.spec.sshd:
                key = self.etc / f"{host.name}.host_key"
                _make_key(key)
                known.append(f"{_known_name(host)} {public_key(key)}\n")
                (self.etc / f"{host.name}.sshd_config").write_text(_SSHD_CONFIG.format(port=host.spec.ssh_port))
        (self.etc / "known_hosts").write_text("".join(known))
        (self.etc / "ssh_config").write_text("\n".join([*config, _SSH_CONFIG_END]))


def public_key(private: Path) -> str:
    """Type and base64 of the public half of a key made by this lab."""
    return " ".join(Path(f"{private}.pub").read_text().split()[:2])


def _other_folders() -> list[str]:
    """Where this repository and its interpreters are, as far as a host would not see it: its root is the machine's root
    file system without what is mounted below that, and without `HIDDEN`."""
    root = os.stat("/").st_dev
    prefixes = (sys.prefix, sys.base_prefix, Path(sys.executable).resolve().parents[1])
    places = sorted({Path(__file__).resolve().parents[2], *(Path(prefix).resolve() for prefix in prefixes)})
    shown: list[Path] = []
    for place in places:
        device = place.stat().st_dev
        is_hidden = device != root or any(place.is_relative_to(folder) for folder in HIDDEN)
        if is_hidden and not any(place.is_relative_to(each) and each.stat().st_dev == device for each in shown):
            shown.append(place)
    return list(map(str, shown))


def _known_name(host: Host) -> str:
    return host.address if host.spec.ssh_port == 22 else f"[{host.address}]:{host.spec.ssh_port}"


def _differs(path: str, inode: int) -> bool:
    return os.stat(path).st_ino != inode


def _make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", path], check=True)


def start(
    argv: Sequence[str],
    *,
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start what dies with this thread."""
    return subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *argv], stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=env
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def checked(argv: Sequence[str], text: str) -> None:
    """Run a command with this input.

    Raises:
        RuntimeError: its status was not 0; with what it said.
    """
    done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(argv)}: exit {done.returncode}\n{text}\n{done.stdout}{done.stderr}")


def _remove_abandoned() -> None:
    """Remove folders of labs whose creator is gone."""
    for folder in SHM.glob(f"{PREFIX}*"):
        if not Path("/proc", folder.name.removeprefix(PREFIX).split("-")[0]).exists():
            shutil.rmtree(folder, ignore_errors=True)
