"""Everything particular to Globus that more than one action or command needs.

One dedicated thread owns the app, the tokens and all clients (`service`), what
the service refuses becomes a fault with words for people (`faults`), and local
paths become those of a collection (`paths`). The SDK is imported when first
used: who starts no transfer does not pay for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trigger_daemon.credentials import secret

TASKS_MAX = 3  # transfers of one user that the service runs at once; further ones wait in its queue, not in ours
FILES_PER_TASK = 1_000  # the service's limit of a submission's size is not published
TOKENS = "globus-tokens.json"  # in the state directory
CREDENTIAL = "globus-client-secret"  # its name among the service manager's credentials
POLL_S = 2.0
LISTED_AFTER_S = 300.0  # how soon the service lists a new run or flow is not published
NO_CLIENT = (
    "no Globus client is set",
    "register a client at app.globus.org/settings/developers, and set `globus: client_id` in the settings",
)


@dataclass(frozen=True, slots=True)
class Account:
    """Who we are to Globus, and what of it lies where. `client_secret` is '' for a person's login."""

    client_id: str = ""
    client_secret: str = field(default="", repr=False)
    tokens: str = ""  # the file of a person's tokens
    collections: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # UUID -> local root -> collection path
    manifests: tuple[str, str] | None = None  # local directory, and the collection that shows it
    poll_s: float = POLL_S  # the shortest pause between two looks at one task
    listed_after_s: float = LISTED_AFTER_S  # when a run or flow that is not listed was surely never there


def account(settings: Mapping[str, Any], state_dir: str, env: Mapping[str, str] | None = None) -> Account:
    """Return the account that the settings describe. Raises OSError, ValueError for a secret that cannot be had."""
    manifests = settings.get("manifests") or {}
    return Account(
        client_id=str(settings.get("client_id") or ""),
        client_secret=secret(
            settings.get("client_secret"), CREDENTIAL, settings.get("client_secret_file"),
            os.environ if env is None else env,
        ),
        tokens=os.path.join(state_dir, TOKENS),
        collections={key: dict(roots) for key, roots in (settings.get("collections") or {}).items()},
        manifests=(str(manifests["path"]), str(manifests["collection"])) if manifests else None,
        poll_s=float(settings.get("poll_s") or POLL_S),
        listed_after_s=float(settings.get("listed_after_s") or LISTED_AFTER_S),
    )
