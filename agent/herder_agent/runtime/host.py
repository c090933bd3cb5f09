"""The machine: CPUs that we may use, memory, NUMA order, use, and the environment that templates get."""

from __future__ import annotations

import math
import os
import platform
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from herder_agent.core.slots import Place
from herder_shared.errors import ConfigError
from herder_shared.limits import MIB
from herder_shared.wire.messages import WorkloadSpec

#: Below this share of it memory is low.
_LOW_SHARE = 0.1
#: What a template's environment takes from the agent's. Everything else stays with the agent.
_ALLOWED = frozenset(
    [
        "HOME",
        "LANG",
        "LANGUAGE",
        "LOGNAME",
        "PATH",
        "SHELL",
        "TERM",
        "TMPDIR",
        "TMP",
        "TEMP",
        "TZ",
        "USER",
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "XDG_DATA_HOME",
        "XDG_RUNTIME_DIR",
        "LD_LIBRARY_PATH",
        "CUDA_VISIBLE_DEVICES",
        "VIRTUAL_ENV",
        "CONDA_PREFIX",
        "CONDA_DEFAULT_ENV",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "http_proxy",
        "https_proxy",
        "no_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
        "MPLCONFIGDIR",
    ]
)
_ALLOWED_PREFIXES = ("LC_", "PYTHON", "SLURM_")
_NOT_PYTHON = frozenset({"PYTHONSTARTUP", "PYTHONINSPECT", "PYTHONBREAKPOINT", "PYTHONASYNCIODEBUG", "PYTHONDEVMODE"})
_ONE_THREAD = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMEXPR_MAX_THREADS",
    "NUMBA_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "BLIS_NUM_THREADS",
    "POLARS_MAX_THREADS",
)
_TEMPLATE_THREADS = "1"
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_NO_LIMIT_BYTES = 1 << 60


#: A disk with less is full: logs of templates, the epoch and small blobs still fit.
DISK_FREE_BYTES_MIN = 32 * MIB


def usable_cpus() -> tuple[int, ...]:
    """The CPUs that we may run on, those of one NUMA node together; in each, one of every core, then their siblings."""
    cpus = sorted(os.sched_getaffinity(0))
    where = dict(zip(cpus, places(tuple(cpus)), strict=True))
    rank = {cpu: sum(where[other] == where[cpu] for other in cpus if other < cpu) for cpu in cpus}
    return tuple(sorted(cpus, key=lambda cpu: (where[cpu].numa, rank[cpu], cpu)))


def places(cpus: Sequence[int], root: Path = Path("/sys/devices/system")) -> tuple[Place, ...]:
    """Where these CPUs are; a core is known by the least of its CPUs."""
    nodes = {cpu: node for node, members in _numa_nodes(root).items() for cpu in members}
    return tuple(Place(nodes.get(cpu, 0), _core_of(cpu, root)) for cpu in cpus)


def _core_of(cpu: int, root: Path) -> int:
    text = _text(root / f"cpu/cpu{cpu}/topology/thread_siblings_list")
    return min(parse_cpu_list(text)) if text.strip() else cpu


def _numa_nodes(root: Path) -> dict[int, list[int]]:
    nodes: dict[int, list[int]] = {}
    for folder in (root / "node").glob("node[0-9]*"):
        text = _text(folder / "cpulist")
        if text:
            nodes[int(folder.name[4:])] = parse_cpu_list(text)
    return nodes


def parse_cpu_list(text: str) -> list[int]:
    """Read the kernel's list of CPUs, as "0-3,8".

    Raises:
        ValueError: it is none.
    """
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def core_count(cpus: tuple[int, ...], environ: Mapping[str, str]) -> int:
    """How many slots to offer: the least of affinity, the cgroup's quota and what Slurm gave."""
    counts = [len(cpus)]
    quota = _cgroup_cores()
    if quota is not None:
        counts.append(max(1, math.floor(quota + 1e-9)))
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        if environ.get(name, "").isdecimal():
            counts.append(int(environ[name]))
            break
    return max(1, min(counts))


def _cgroup_folders() -> list[Path]:
    """Our cgroups (v2, and v1's cpu and memory), and all above them."""
    folders: list[Path] = []
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        names = ["."] if not controllers else [c for c in ("cpu", "memory") if c in controllers.split(",")]
        for name in names:
            folder = _CGROUP_ROOT / name / path.lstrip("/")
            while folder.is_relative_to(_CGROUP_ROOT / name):
                folders.append(folder)
                if folder == folder.parent:
                    break
                folder = folder.parent
    return folders


def _cgroup_cores() -> float | None:
    limits: list[float] = []
    for folder in _cgroup_folders():
        fields = _text(folder / "cpu.max").split()
        if len(fields) == 2 and fields[0].isdecimal():
            limits.append(int(fields[0]) / int(fields[1]))
        quota, period = _text(folder / "cpu.cfs_quota_us").strip(), _text(folder / "cpu.cfs_period_us").strip()
        if quota.isdecimal() and period.isdecimal():
            limits.append(int(quota) / int(period))
    return min(limits) if limits else None


def memory_total_bytes() -> int:
    """Memory of the machine, or the cgroup's limit where that is less."""
    total = _meminfo().get("MemTotal", 0)
    limits = [total]
    for folder in _cgroup_folders():
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _text(folder / name).strip()
            if text.isdecimal() and int(text) < _NO_LIMIT_BYTES:
                limits.append(int(text))
    return min(limits)


def is_there(pid: int) -> bool:
    """Whether there is such a process, other than as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1] != b"Z"
    except OSError:
        return False


def disk_trouble(folder: Path) -> str:
    """What is wrong with the disk that `folder` is on; "" = nothing."""
    try:
        disk = os.statvfs(folder)
    except OSError as error:
        return f"its folder {folder} cannot be used: {error}"
    free_bytes = disk.f_bavail * disk.f_frsize
    if free_bytes < min(DISK_FREE_BYTES_MIN, disk.f_blocks * disk.f_frsize // 20):
        return f"its disk is full: {free_bytes // MIB} MiB are free at {folder}"
    return ""


def is_memory_low() -> bool:
    """Whether hardly any of the machine's memory could be had."""
    fields = _meminfo()
    return fields.get("MemAvailable", 0) < _LOW_SHARE * fields.get("MemTotal", 0)


def memory_used_bytes() -> int:
    """Memory of the machine that could not be had."""
    fields = _meminfo()
    return fields.get("MemTotal", 0) - fields.get("MemAvailable", 0)


def _meminfo() -> dict[str, int]:
    fields: dict[str, int] = {}
    for line in _text(Path("/proc/meminfo")).splitlines():
        name, _, value = line.partition(":")
        amount = value.split()
        if amount and amount[0].isdecimal():
            fields[name] = int(amount[0]) * 1024
    return fields


def cpu_seconds() -> dict[int, dict[str, float]]:
    """Seconds by CPU and mode since the machine started, from `/proc/stat`."""
    tick = os.sysconf("SC_CLK_TCK")
    modes = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
    seconds: dict[int, dict[str, float]] = {}
    for line in _text(Path("/proc/stat")).splitlines():
        if not line.startswith("cpu"):
            break
        fields = line.split()
        if fields[0] != "cpu":
            seconds[int(fields[0][3:])] = {
                mode: int(ticks) / tick for mode, ticks in zip(modes, fields[1:], strict=False)
            }
    return seconds


class CpuUse:
    """The share of our CPUs that was busy between two calls."""

    def __init__(self, cpus: tuple[int, ...]) -> None:
        self._cpus = cpus
        self._last = self._read()

    def busy_ratio(self) -> float:
        """0 to 1, since the last call."""
        now = self._read()
        busy, total = now[0] - self._last[0], now[1] - self._last[1]
        if total <= 0:
            return 0.0
        self._last = now
        return max(0.0, min(1.0, busy / total))

    def _read(self) -> tuple[float, float]:
        busy = total = 0.0
        seconds = cpu_seconds()
        for cpu in self._cpus:
            modes = seconds.get(cpu, {})
            every = sum(modes.values())
            total += every
            busy += every - modes.get("idle", 0.0) - modes.get("iowait", 0.0)
        return busy, total


def host_name() -> str:
    return socket.gethostname()


def kernel() -> str:
    return platform.release()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def template_environment(
    environ: Mapping[str, str], spec: WorkloadSpec | None, marks: Mapping[str, str]
) -> dict[str, str]:
    """A clean environment: what is allowed of ours, one thread for every numerical library (a child raises it to its
    cores), allocators that fork well, the workload's own on top, our marks last."""
    environment = {
        name: value
        for name, value in environ.items()
        if (name in _ALLOWED or name.startswith(_ALLOWED_PREFIXES)) and name not in _NOT_PYTHON
    }
    environment.update(dict.fromkeys(_ONE_THREAD, _TEMPLATE_THREADS))
    environment["ARROW_DEFAULT_MEMORY_POOL"] = "system"
    if _has_transparent_huge_pages():
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    if spec is not None:
        environment.update(spec.env)
    environment.update(marks)
    return environment


def thread_environment(environment: Mapping[str, str], spec: WorkloadSpec, threads: int) -> dict[str, str]:
    """What a command is told of threads: those of its slot, where neither the workload nor its prologue says."""
    return {
        name: str(threads)
        for name in _ONE_THREAD
        if name not in spec.env and environment.get(name, _TEMPLATE_THREADS) == _TEMPLATE_THREADS
    }


def _has_transparent_huge_pages() -> bool:
    """glibc 2.35 and later asks for huge pages by itself where `madvise` is the system's policy."""
    version = platform.libc_ver()[1].split(".")
    is_new = len(version) >= 2 and all(part.isdecimal() for part in version) and tuple(map(int, version)) >= (2, 35)
    return is_new and "[never]" not in _text(Path("/sys/kernel/mm/transparent_hugepage/enabled"))


def prepare_state_dir(state_dir: Path) -> None:
    """Make the agent's folders, ours alone.

    Raises:
        ConfigError: it belongs to somebody else, or cannot be written.
    """
    try:
        for folder in (state_dir, state_dir / "logs", state_dir / "blobs", state_dir / "python"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Of an earlier life's attempts.
        shutil.rmtree(state_dir / "scratch", ignore_errors=True)
        owner = state_dir.stat().st_uid
    except OSError as error:
        raise ConfigError(f"the agent's state_dir {state_dir} cannot be used: {error}; choose another") from error
    if owner != os.getuid():
        raise ConfigError(f"the agent's state_dir {state_dir} belongs to user {owner}: choose another")


def offer_cloudpickle(state_dir: Path) -> str:
    """A folder with our cloudpickle and nothing else, for interpreters that have none."""
    import cloudpickle

    target = Path(cloudpickle.__file__).parent
    folder = state_dir / "python"
    link = folder / "cloudpickle"
    if not link.is_symlink() or Path(os.readlink(link)) != target:
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    return str(folder)
