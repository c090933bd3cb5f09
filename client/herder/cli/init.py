"""`herder init`: a new profile, with keys of its own. The root authority's key never leaves the profile's folder."""

from __future__ import annotations

import click

from herder.cli.output import print_json
from herder.cli.session import json_option
from herder_shared.config import create_profile


@click.command()
@click.option(
    "--profile", "name", metavar="NAME", default="default", show_default=True, help="Name of the new profile."
)
@click.option("--address", "addresses", metavar="HOST[:PORT]", multiple=True, help="Where the coordinator will listen.")
@json_option
def command(name: str, addresses: tuple[str, ...], as_json: bool) -> None:
    """Make a profile: certificate authority, coordinator and client keys.

    It becomes the active one if there is none yet. An existing profile is never overwritten.
    """
    profile = create_profile(name, addresses=addresses)
    if as_json:
        print_json({"name": profile.name, "folder": str(profile.folder), "cluster": profile.cluster})
        return
    click.echo(f"profile {profile.name}: {profile.folder} (cluster {profile.cluster})")
    named = "" if name == "default" else f" --profile {name}"
    click.echo(f"next: herder up{named} --hosts HOST,HOST   starts a coordinator and agents over SSH")
