"""Commands: a list is exec'd, a text goes to the shell; a non-zero exit is an error unless `check=False`."""

import herder


def main() -> None:
    with herder.LocalCluster(cores=2) as cluster, cluster.client() as client:
        print("kernel:", client.command(["uname", "-r"]).result().text().strip())

        counted = client.command("sort | uniq -c", stdin=b"b\na\nb\n").result()
        print(counted.text())

        job = client.command_array([["expr", str(number), "*", str(number)] for number in range(1, 11)])
        print("squares:", *(done.text().strip() for done in job.results()))

        try:
            client.command(["ls", "/no/such/folder"]).result()
        except herder.CommandFailed as error:
            print("exit status", error.completed.returncode, error.completed.stderr.decode().strip())


if __name__ == "__main__":
    main()
