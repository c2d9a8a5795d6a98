"""What became of a batch's members at their source, for actions that read none of them."""

from __future__ import annotations

import os

from trigger_daemon.actions import Request


def changed_members(request: Request) -> tuple[str, ...]:
    """Return the members that are gone, or no longer the manifest's version, at the source: somebody met others."""
    changed = []
    for file in request.files:
        try:
            now = os.lstat(os.path.join(file.root, file.path))
        except FileNotFoundError:
            changed.append(file.path)
            continue
        except OSError:
            continue  # a mount that is away: not known
        if (now.st_size, now.st_mtime_ns) != (file.size, file.mtime_ns):
            changed.append(file.path)
    return tuple(changed)
