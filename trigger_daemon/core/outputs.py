"""What a run puts out, as a record can keep it: JSON that any program reads, whatever a stranger has answered.

Numbers like 1e999 and lists in lists a thousand deep are read without a fault,
and break whoever reads them from the journal later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LEVELS_MAX = 50  # within each other; nobody means more, and each reader has a limit of its own
TOO_DEEP = "nested too deeply to be kept"


def plain(output: Any, levels: int = LEVELS_MAX) -> Any:
    """Return a value of JSON as it is kept: no number for what is none in JSON, words for what is no JSON at all."""
    match output:
        case None | bool() | int() | str():
            return output
        case float():
            return output if math.isfinite(output) else None
        case Mapping() | list() | tuple() if not levels:
            return TOO_DEEP
        case Mapping():
            return {str(key): plain(value, levels - 1) for key, value in output.items()}
        case list() | tuple():
            return [plain(value, levels - 1) for value in output]
    return f"what JSON cannot say: {type(output).__name__}"
