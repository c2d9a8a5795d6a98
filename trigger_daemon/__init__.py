"""trigger-daemon: watches instrument output, decides when it is complete, and starts transfers: once."""

__version__ = "0.1.0"
