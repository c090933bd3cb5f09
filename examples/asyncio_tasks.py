"""Tasks in asyncio: `client.gather`, `wrap_future`, and a timeout that kills the task and not only the waiting."""

import asyncio
import time

import herder


def slow_square(number: int, seconds: float) -> int:
    time.sleep(seconds)
    return number * number


async def run(client: herder.Client) -> None:
    futures = [client.submit(slow_square, number, 0.05) for number in range(8)]
    print("squares:", await client.gather(*futures))

    endless = client.submit(slow_square, 1, 3600.0)
    try:
        await asyncio.wait_for(asyncio.wrap_future(endless), timeout=0.5)
    except TimeoutError:
        print("too slow; cancelled:", endless.cancelled())


def main() -> None:
    with herder.LocalCluster(cores=2) as cluster, cluster.client() as client:
        asyncio.run(run(client))


if __name__ == "__main__":
    main()
