"""`roots`: the watched directories."""

from __future__ import annotations

import click

from trigger_daemon.cli.commands import FILE_NAME, Group, Setup, absolute, pass_setup, why_option


@click.group(cls=Group)
def roots() -> None:
    """The watched directories; `status` tells the health of each."""


@roots.command("accept")
@click.argument("path", type=FILE_NAME)
@why_option
@pass_setup
def accept(setup: Setup, path: str, why: str) -> None:
    """Confirm that the file system now at a root is the right one.

    After a root was away and came back as another device, it is suspect: nothing is batched or forgotten there until
    somebody says so.
    """
    setup.order("roots.accept", why, path=absolute(path))
