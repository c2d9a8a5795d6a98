"""Keep a person's tokens in one file of 0600 that is never half written.

The SDK's own stores write in place, and set the umask of the whole process
meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any

from globus_sdk.token_storage import TokenStorage, TokenStorageData

from trigger_daemon.globus.kept import write


def seen_by_others(path: str) -> str:
    """Return why tokens are not ours alone, '' if they are."""
    try:
        mode = os.stat(path).st_mode & 0o777
    except OSError:  # there are none, or that is told where they are read
        return ""
    return f"{path} can be read by others (mode {mode:04o}), who could act with these tokens" if mode & 0o077 else ""


class TokenFile(TokenStorage):
    """Tokens by resource server. An unreadable file is as good as none: the login is asked for again."""

    def __init__(self, path: str, namespace: str = "DEFAULT") -> None:
        super().__init__(namespace)
        self._path = path

    def store_token_data_by_resource_server(
        self, token_data_by_resource_server: Mapping[str, TokenStorageData]
    ) -> None:
        kept = self._load()
        kept.update({server: data.to_dict() for server, data in token_data_by_resource_server.items()})
        write(self._path, kept)

    def get_token_data_by_resource_server(self) -> dict[str, TokenStorageData]:
        known = {}
        for server, data in self._load().items():
            # Of another version, or damaged: as good as none.
            with contextlib.suppress(ValueError, TypeError, LookupError):
                known[server] = TokenStorageData.from_dict(data)
        return known

    def remove_token_data(self, resource_server: str) -> bool:
        kept = self._load()
        if kept.pop(resource_server, None) is None:
            return False
        write(self._path, kept)
        return True

    def remove(self) -> bool:
        """Forget everything; say whether there was anything."""
        try:
            os.unlink(self._path)
        except FileNotFoundError:
            return False
        return True

    def _load(self) -> dict[str, Any]:
        try:
            with open(self._path, encoding="utf-8") as file:
                kept = json.load(file)
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        return {k: v for k, v in kept.items() if isinstance(v, dict)} if isinstance(kept, dict) else {}
