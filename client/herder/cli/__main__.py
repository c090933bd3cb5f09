"""`python -m herder.cli` is `herder`, for an interpreter whose scripts are not on the path."""

from herder.cli.main import main

main()
