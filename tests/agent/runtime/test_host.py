"""The machine as the agent sees it, and the environment that it gives on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from herder_agent.runtime import host
from herder_shared.errors import ConfigError
from herder_shared.ids import WorkloadKey
from herder_shared.wire.messages import WorkloadSpec


def test_lists_of_cpus_are_read_as_the_kernel_writes_them() -> None:
    assert host.parse_cpu_list("0-2,8,10-11\n") == [0, 1, 2, 8, 10, 11]
    assert host.parse_cpu_list("") == []
    with pytest.raises(ValueError):
        host.parse_cpu_list("0-x")


def test_cores_are_the_least_of_affinity_and_what_slurm_gave() -> None:
    cpus = tuple(range(64))
    most = host.core_count(cpus, {})
    assert 1 <= most <= 64
    assert host.core_count((0,), {}) == 1
    assert host.core_count(cpus, {"SLURM_CPUS_ON_NODE": "1"}) == 1
    assert host.core_count(cpus, {"SLURM_CPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": str(most)}) == most
    assert host.core_count(cpus, {"SLURM_CPUS_ON_NODE": "16(x2)"}) == most


def test_all_usable_cpus_are_listed_once() -> None:
    assert sorted(host.usable_cpus()) == sorted(os.sched_getaffinity(0))


def test_places_are_read_from_the_kernels_lists(tmp_path: Path) -> None:
    for node, cpus in ((0, "0-1,4-5"), (1, "2-3,6-7")):
        (tmp_path / f"node/node{node}").mkdir(parents=True)
        (tmp_path / f"node/node{node}/cpulist").write_text(f"{cpus}\n")
    for cpu in range(7):
        (tmp_path / f"cpu/cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu/cpu{cpu}/topology/thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    found = host.places((0, 1, 2, 3, 4, 5, 6, 7), tmp_path)
    assert [place.numa for place in found] == [0, 0, 1, 1, 0, 0, 1, 1]
    # Of the last the kernel says nothing.
    assert [place.core for place in found] == [0, 1, 2, 3, 0, 1, 2, 7]


def test_command_has_the_threads_of_its_slot_unless_somebody_says(tmp_path: Path) -> None:
    spec = WorkloadSpec(WorkloadKey("w" * 16), env={"OMP_NUM_THREADS": "1"})
    environment = host.template_environment({"PATH": "/bin"}, spec, {}) | {"MKL_NUM_THREADS": "7"}
    threads = host.thread_environment(environment, spec, 4)
    assert threads["OPENBLAS_NUM_THREADS"] == "4"
    assert not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & threads.keys()


def test_memory_and_processor_use_are_plausible() -> None:
    assert 0 < host.memory_used_bytes() < host.memory_total_bytes() * 100
    assert set(host.cpu_seconds()) >= set(os.sched_getaffinity(0))
    assert 0.0 <= host.CpuUse(host.usable_cpus()).busy_ratio() <= 1.0


def test_environment_takes_what_is_allowed_and_puts_the_workloads_and_our_marks_on_top() -> None:
    spec = WorkloadSpec(WorkloadKey("w" * 16), env={"MINE": "1", "OMP_NUM_THREADS": "4", "HERDER_CLUSTER": "no"})
    environ = {"PATH": "/bin", "LC_ALL": "C", "SECRET": "s", "PYTHONPATH": "/p", "PYTHONINSPECT": "1", "HOME": "/h"}
    environment = host.template_environment(environ, spec, {"HERDER_CLUSTER": "c"})
    assert {"PATH": "/bin", "LC_ALL": "C", "PYTHONPATH": "/p", "HOME": "/h"}.items() <= environment.items()
    assert "SECRET" not in environment
    assert "PYTHONINSPECT" not in environment
    assert environment["MINE"] == "1"
    assert environment["OMP_NUM_THREADS"] == "4"
    assert environment["OPENBLAS_NUM_THREADS"] == "1"
    assert environment["HERDER_CLUSTER"] == "c"


def test_state_folder_is_made_private_and_one_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    host.prepare_state_dir(tmp_path / "state")
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another"):
        host.prepare_state_dir(tmp_path / "file" / "state")


def test_cloudpickle_is_offered_alone_and_again(tmp_path: Path) -> None:
    host.prepare_state_dir(tmp_path)
    folder = Path(host.offer_cloudpickle(tmp_path))
    assert host.offer_cloudpickle(tmp_path) == str(folder)
    assert [path.name for path in folder.iterdir()] == ["cloudpickle"]
    assert (folder / "cloudpickle" / "__init__.py").exists()
