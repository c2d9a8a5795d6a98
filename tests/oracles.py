"""An oracle proves itself: a world in which one thing was broken on purpose breaks the laws that speak of it, only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest


def sees_what_is_broken(
    world: Callable[[Path], Any], judge: Callable[..., Iterable[Any]],
    broken: Sequence[tuple[Callable[[Any], None], set[str]]],
) -> Callable[..., None]:  # fmt: skip
    """Return the test for all of `broken`: what breaks a world, and the laws that are broken then."""

    @pytest.mark.parametrize(("breaking", "laws"), broken, ids=[case.__name__ for case, _ in broken])
    def test(tmp_path: Path, breaking: Callable[[Any], None], laws: set[str]) -> None:
        """One thing wrong in an otherwise good world."""
        made = world(tmp_path)
        breaking(made)

        assert {violation.law for violation in judge(made.scene, idle=True)} == laws

    return test
