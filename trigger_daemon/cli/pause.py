"""`pause` and `resume`: everything of ours at once."""

from __future__ import annotations

import click

from trigger_daemon.cli.commands import Command, Setup, pass_setup, why_option


@click.command(cls=Command)
@why_option
@pass_setup
def pause(setup: Setup, why: str) -> None:
    """Let nothing new start and copies stand still, until `resume`. It survives a restart of the daemon.

    Files are watched, settled and batched meanwhile: nothing is missed.
    """
    setup.order("pause", why)


@click.command(cls=Command)
@why_option
@pass_setup
def resume(setup: Setup, why: str) -> None:
    """Let everything go on after `pause`."""
    setup.order("resume", why)
