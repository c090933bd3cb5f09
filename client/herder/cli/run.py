"""`herder run SCRIPT.py`: the script, in this terminal, with `herder.Client()` ready."""

from __future__ import annotations

import os
import sys

import click

from herder.cli.session import profile_option
from herder_shared.config import load_profile


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@profile_option
@click.argument("script", type=click.Path(exists=True, dir_okay=False))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(profile: str | None, script: str, arguments: tuple[str, ...]) -> None:
    """Run a Python script with herder.Client() ready.

    The script runs here, under this interpreter, and takes this process over: signals, terminal and exit status are its
    own. HERDER_PROFILE names the profile.
    """
    loaded = load_profile(profile)
    environment = {**os.environ, "HERDER_PROFILE": loaded.name}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, script, *arguments], environment)
