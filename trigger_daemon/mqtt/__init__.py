"""What a facility is told by MQTT, and what it may ask: one broker, many workstations, each with topics of its own.

It is off unless the settings name a broker. The library is imported when it is
on. Everything runs on a thread of its own (`edge`), which takes what it tells
from the last heartbeat and from the journal: the loop hands over a reference
and goes on, however the broker is.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trigger_daemon.config.settings import MqttSettings


def workstation_of(settings: MqttSettings) -> str:
    """Return what this machine is called in topics: as set, else the host's name."""
    return settings.workstation or socket.gethostname() or "unnamed"


def topic_of(settings: MqttSettings, leaf: str, workstation: str = "") -> str:
    """Return a topic of a workstation, of this one if none is named."""
    return f"{settings.prefix}/{workstation or workstation_of(settings)}/{leaf}"
