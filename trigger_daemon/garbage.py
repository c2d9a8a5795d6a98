"""Look for garbage in cycles seldom: what is made for each file makes none.

Python looks through its youngest objects whenever 700 more were made than let
go, and through all of them each time they have grown by a quarter. At 20,000
files/s that took a tenth of the daemon's time and found next to nothing, as it
did of the time of every import.
"""

from __future__ import annotations

import gc

YOUNG_MAX = 50_000  # objects, some 5 MB
YOUNG_TIMES, OLD_TIMES = 20, 20  # one look at the middle-aged, and at all, for so many at those before


def seldom() -> None:
    """Set the pace for this process."""
    gc.set_threshold(YOUNG_MAX, YOUNG_TIMES, OLD_TIMES)


def leave_out() -> None:
    """Never look through what is there now again: modules, functions, classes."""
    gc.freeze()
