"""Arguments and results of Globus Compute as text, in the one form that is safe at both ends: JSON.

What its SDK calls JSONData: three characters that name the form, then JSON.
A pickled result is never opened: that would run whatever its sender put into
it. The forms are those of globus-compute-sdk 4.19; the tests hold bytes of its
own making.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

JSON_DATA = "globus_compute_sdk.serialize.concretes.JSONData"  # as a submission asks for results in this form
_JSON, _COMBINED = "11\n", "13\n"
_PICKLED = "00\n"
_LENGTH = re.compile(r"([0-9]{1,9})\n")  # the service takes no more than some megabytes
RETURN_JSON = (
    "let the function return what JSON can say (texts, numbers, lists, mappings with texts as keys), and the endpoint's"
    " `result_serializers` name JSONData"
)


class Unreadable(ValueError):
    """A result is there, and not in a form that is read."""


def pack(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return what a task is submitted with: both as JSON, each after its length in characters. Raises ValueError."""
    parts = [_JSON + json.dumps(given, allow_nan=False) for given in (list(args), dict(kwargs))]
    return "".join(f"{len(part)}\n{part}" for part in parts)


def read(result: Any) -> Any:
    """Return the value of a result. Raises Unreadable in words; nothing in it is ever executed."""
    if not isinstance(result, str):
        raise Unreadable("the result is not in the form of Globus Compute")
    form = result[: len(_JSON)]
    if form == _JSON:
        return _value(result)
    if form == _COMBINED:  # the same value in several forms
        for part in _parts(result[len(_COMBINED) :]):
            if part.startswith(_JSON):
                return _value(part)
        raise Unreadable("the result holds what JSON cannot say, and is pickled: that is never opened")
    if form == _PICKLED:
        raise Unreadable("the result is pickled: that is never opened")
    raise Unreadable("the result is in a form that is not known")


def _parts(packed: str) -> list[str]:
    parts, at = [], 0
    while at < len(packed):
        found = _LENGTH.match(packed, at)
        if found is None or found.end() + int(found[1]) > len(packed):
            raise Unreadable("the result is damaged")
        at = found.end() + int(found[1])
        parts.append(packed[found.end() : at])
    return parts


def _value(part: str) -> Any:
    try:
        # NaN and Infinity are no JSON: nothing that reads our journal could take them.
        return json.loads(part[len(_JSON) :], parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        raise Unreadable("the result is damaged") from None
