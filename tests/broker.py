"""A real mosquitto of the test's own, with TLS, passwords and an access list, and a client that hears all of it.

It has a directory, ports and a configuration of its own; a mosquitto that the machine runs is not touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or "mosquitto"
STARTS_S = 15.0
EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30")
READER, READS = "monitor", "m0n"
DAEMON, SECRET = "daemon", "s3cret"


def openssl(*words: str | Path) -> None:
    done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def authority(base: Path, name: str = "ca") -> Path:
    """Make an authority; return its certificate."""
    openssl("req", "-x509", *EC, "-subj", f"/CN={name}", "-keyout", base / f"{name}.key", "-out", base / f"{name}.crt")
    return base / f"{name}.crt"


def signed(base: Path, name: str, alternative: str, ca: str = "ca") -> tuple[Path, Path]:
    """Make a certificate signed by an authority; return it and its key."""
    openssl("req", *EC, "-subj", f"/CN={name}", "-keyout", base / f"{name}.key", "-out", base / f"{name}.csr")
    (base / f"{name}.ext").write_text(f"subjectAltName={alternative}")
    openssl(
        "x509", "-req", "-in", base / f"{name}.csr", "-CA", base / f"{ca}.crt", "-CAkey", base / f"{ca}.key",
        "-CAcreateserial", "-days", "30", "-extfile", base / f"{name}.ext", "-out", base / f"{name}.crt",
    )  # fmt: skip
    return base / f"{name}.crt", base / f"{name}.key"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


class Broker:
    """mosquitto on two ports of loopback, one plain and one with TLS."""

    def __init__(
        self, base: Path, *, asks_certificate: bool = False, topics: Sequence[str] = (), more: Sequence[str] = ()
    ) -> None:
        """`topics`: what the daemon's user may besides the daemon's own; `more`: lines of the configuration."""
        self.base = base
        (base / "data").mkdir(parents=True)
        self.ca = authority(base)
        certificate, key = signed(base, "server", "DNS:localhost,IP:127.0.0.1")
        self.port, self.tls_port = free_port(), free_port()
        self.log = base / "broker.log"
        self.process: subprocess.Popen[bytes] | None = None
        (base / "passwd").touch(0o600)
        self.user(DAEMON, SECRET)
        self.user(READER, READS)
        self.allow("readwrite trigger-daemon/#", *topics)
        (base / "mosquitto.conf").write_text("\n".join([
            "per_listener_settings false",
            f"listener {self.port} 127.0.0.1",
            f"listener {self.tls_port} 127.0.0.1",
            f"cafile {self.ca}", f"certfile {certificate}", f"keyfile {key}",
            f"require_certificate {str(asks_certificate).lower()}",
            "allow_anonymous false", f"password_file {base / 'passwd'}", f"acl_file {base / 'acl'}",
            "persistence true", f"persistence_location {base / 'data'}/",
            # What is retained survives SIGKILL only so.
            "autosave_on_changes true", "autosave_interval 1",
            "max_queued_messages 0",
            # Started by root it would become another user, who cannot read the key.
            *(["user root"] if os.getuid() == 0 else []),
            f"log_dest file {self.log}", "log_type all", *more, "",
        ]))  # fmt: skip

    def user(self, name: str, password: str) -> None:
        """Let somebody in."""
        program = shutil.which("mosquitto_passwd") or "mosquitto_passwd"
        subprocess.run([program, "-b", self.base / "passwd", name, password], check=True)

    def allow(self, *topics: str) -> None:
        """Set what the daemon's user may; a running broker is told by `reload`."""
        lines = [f"user {DAEMON}", *(f"topic {topic}" for topic in topics), f"user {READER}", "topic readwrite #", ""]
        self.write_list("\n".join(lines))

    def write_list(self, text: str) -> None:
        """Set the access list."""
        (self.base / "acl").write_text(text)
        (self.base / "acl").chmod(0o600)

    def reload(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)

    def start(self) -> None:
        self.process = subprocess.Popen(
            [MOSQUITTO, "-c", str(self.base / "mosquitto.conf")], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + STARTS_S
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.02)  # another process; there is no clock to pass
        raise AssertionError("mosquitto does not listen")

    def hang(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def stop(self, number: int = signal.SIGTERM, *, go: bool = True) -> None:
        """End it; with `go`, one that hangs first does what it has not done yet."""
        if self.process is not None:
            if go:
                self.go()
            self.process.send_signal(number)
            self.process.wait(10)
            self.process = None

    def settings(self, **more: Any) -> dict[str, Any]:
        """Return the daemon's settings `mqtt` for this broker, over TLS."""
        password = self.base / "password"
        password.write_text(SECRET)
        password.chmod(0o600)
        return {
            "host": "localhost", "port": self.tls_port, "tls": {"ca": str(self.ca)}, "user": DAEMON,
            "password_file": str(password), "workstation": "krios1", **more,
        }  # fmt: skip


class Listener:
    """A client that hears everything from now on, in the order in which the broker tells it, also while it was away."""

    def __init__(
        self, broker: Broker, topic: str = "trigger-daemon/#", user: str = READER, password: str = READS
    ) -> None:
        self._news = threading.Condition()
        self.heard: list[tuple[str, dict[str, Any], bool]] = []  # topic, payload, retained
        self.messages: list[paho.MQTTMessage] = []  # the same, as they came
        self._topic = topic
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2, f"listener-{id(self)}", protocol=paho.MQTTv5)
        self._client.username_pw_set(user, password)
        self._client.reconnect_delay_set(1, 1)
        self._client.on_message = self._took
        self._client.on_connect = lambda *_: self._client.subscribe(topic, qos=1)
        self._client.on_subscribe = lambda *_: self.ready.set()
        self.ready = threading.Event()
        kept = Properties(PacketTypes.CONNECT)
        kept.SessionExpiryInterval = 3_600
        self._client.connect("127.0.0.1", broker.port, clean_start=False, properties=kept)
        self._client.loop_start()
        assert self.ready.wait(10)

    def _took(self, client: Any, userdata: Any, message: paho.MQTTMessage) -> None:
        with self._news:
            try:
                payload = dict(json.loads(message.payload))
            except (ValueError, RecursionError):  # a test may say anything
                payload = {"raw": message.payload}
            self.messages.append(message)
            self.heard.append((message.topic.rpartition("/")[2], payload, bool(message.retain)))
            self._news.notify_all()

    def say(self, topic: str, payload: Any, *, retain: bool = False) -> None:
        """Publish as the other user."""
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self._client.publish(topic, data, qos=1, retain=retain).wait_for_publish(10)

    def of(self, leaf: str) -> list[dict[str, Any]]:
        with self._news:
            return [payload for topic, payload, _ in self.heard if topic == leaf]

    def forget(self) -> None:
        with self._news:
            self.heard.clear()
            self.messages.clear()

    def until(self, leaf: str, wanted: Callable[[dict[str, Any]], bool], timeout_s: float = 20.0) -> dict[str, Any]:
        """Return the first message on a topic that is wanted; wait for it."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            found[:] = [payload for topic, payload, _ in self.heard if topic == leaf and wanted(payload)]
            return bool(found)

        with self._news:
            assert self._news.wait_for(there, timeout_s), f"nothing like it on {leaf}: {self.heard[-5:]}"
        return found[0]

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@contextlib.contextmanager
def running(base: Path, **more: Any) -> Iterator[Broker]:
    """A broker that is at work, and surely gone in the end."""
    broker = Broker(base, **more)
    broker.start()
    try:
        yield broker
    finally:
        broker.stop(signal.SIGKILL)
