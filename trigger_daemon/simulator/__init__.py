"""Simulated instruments that write as real ones do, for the demo and for tests.

Every writer takes a path, sizes, and a `pause(seconds)`; it calls `pause`
after every single write (0 where an instrument would go straight on), so a
caller sees the file at each of its write boundaries, and may end the writer by
raising. What it returns says what an onlooker must find at the destination.
All pixels are pseudo-random and depend on `seed` alone.

Bytes are scaled down, headers, orders and seconds are those of instruments.
Those that write HDF5 are in `simulator_hdf5`.
"""

from __future__ import annotations

from trigger_daemon.simulator.beamline import CHIP_IMAGES, cbf_image, chip
from trigger_daemon.simulator.epu import Odd, companion_xml, epu_session, tomo5_series
from trigger_daemon.simulator.files import Dated, Pause, Written
from trigger_daemon.simulator.files import written as _written
from trigger_daemon.simulator.movies import eer_movie, lzw_movie, mrc_movie, tiff_movie
from trigger_daemon.simulator.others import light_sheet, mri_series, sequencer_run
from trigger_daemon.simulator.serialem import CONDITIONS, k3_movies, serialem_tilt_series, tilt_angles
from trigger_daemon.simulator.session import (
    FRAMES,
    LATE_S,
    MRC_FRAMES,
    SAMPLE,
    SESSION,
    STALLED_AFTER,
    session,
)  # fmt: skip

__all__ = [
    "CHIP_IMAGES", "CONDITIONS", "FRAMES", "LATE_S", "MRC_FRAMES", "SAMPLE", "SESSION", "STALLED_AFTER", "Dated", "Odd",
    "Pause", "Written", "_written", "cbf_image", "chip", "companion_xml", "eer_movie", "epu_session", "k3_movies",
    "light_sheet", "lzw_movie", "mrc_movie", "mri_series", "sequencer_run", "serialem_tilt_series", "session",
    "tiff_movie", "tilt_angles", "tomo5_series",
]  # fmt: skip
