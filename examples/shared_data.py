"""Data made once per node: `setup`'s value is `herder.shared()` in every task, each in a process of its own."""

import random

import herder


def load() -> list[float]:
    """Runs once per node, before tasks are forked; stands for what takes minutes and gigabytes."""
    generator = random.Random(1)
    return [generator.gauss(10.0, 2.0) for _ in range(100_000)]


def mean_of_sample(_sample: int) -> float:
    """One bootstrap sample. Random streams differ from task to task, and `seed` makes them repeatable."""
    measurements: list[float] = herder.shared()
    return sum(random.choices(measurements, k=2_000)) / 2_000


def main() -> None:
    workload = herder.Workload("bootstrap", preload=["random"], setup=load)
    with herder.LocalCluster(cores=2) as cluster, cluster.client(workload=workload, seed=7) as client:
        job = client.array(mean_of_sample, range(200), name="bootstrap")
        means = sorted(job.results())
        print(f"mean {sum(means) / len(means):.2f}, 95 % between {means[5]:.2f} and {means[-6]:.2f}")
        for info in client.workloads():
            for node, report in info.reports.items():
                print(f"{node}: {report.start_method} after {report.fork_point!r}, {report.reason}")


if __name__ == "__main__":
    main()
