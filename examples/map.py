"""A client is an executor: `map` and `submit`, a process for each task."""

import math

import herder


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def main() -> None:
    numbers = range(10**9, 10**9 + 40)
    with herder.LocalCluster(cores=2) as cluster, cluster.client() as client:
        primes = [number for number, prime in zip(numbers, client.map(is_prime, numbers), strict=True) if prime]
        print("primes:", *primes)

        future = client.options(retries=2, timeout=30).submit(is_prime, 2**31 - 1)
        print("2**31 - 1 is a prime:", future.result())
        usage = future.usage()
        print(f"on {usage.node} by {usage.start_method}, {usage.wall_s * 1e3:.1f} ms, attempt {usage.attempt}")


if __name__ == "__main__":
    main()
