"""The digests that remotes keep of their files, made here of a source while it is read.

Which of them a remote has is rclone's to say; one that both can make is
compared. CRCs are not among them: they find accidents of a line, and two files
of one sum are made at will.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

PIECE = 1024 * 1024


class Hash(Protocol):
    def update(self, data: Any, /) -> object: ...
    def hexdigest(self) -> str: ...


class Dropbox:
    """SHA-256 of the SHA-256 of each block of 4 MiB."""

    BLOCK = 4 * 1024 * 1024

    def __init__(self) -> None:
        self._all = hashlib.sha256()
        self._block = hashlib.sha256()
        self._in_block = 0

    def update(self, data: Any) -> None:
        view = memoryview(data)
        while view:
            some = view[: self.BLOCK - self._in_block]
            self._block.update(some)
            self._in_block += len(some)
            view = view[len(some) :]
            if self._in_block == self.BLOCK:
                self._close()

    def _close(self) -> None:
        self._all.update(self._block.digest())
        self._block, self._in_block = hashlib.sha256(), 0

    def hexdigest(self) -> str:
        if self._in_block:
            self._close()
        return self._all.hexdigest()


class QuickXor:
    """Microsoft's QuickXorHash: byte i is XORed into 160 bits at bit 11 i, and the length into the end.

    160 bytes go round once, so blocks of them are XORed with each other first, as large numbers.
    """

    BITS, SHIFT = 160, 11
    ROUND = 160
    FOLD = ROUND << 12

    def __init__(self) -> None:
        self._folded = 0
        self._rest = b""
        self._length = 0

    def update(self, data: Any) -> None:
        self._length += len(data)
        data = self._rest + bytes(data)
        whole = len(data) - len(data) % self.ROUND
        for at in range(0, whole, self.FOLD):
            self._folded ^= self._fold(data[at : min(whole, at + self.FOLD)])
        self._rest = data[whole:]

    def _fold(self, data: bytes) -> int:
        """Return the XOR of all blocks, halving them."""
        while len(data) > self.ROUND:
            half = (len(data) // self.ROUND + 1) // 2 * self.ROUND
            low, high = int.from_bytes(data[:half], "little"), int.from_bytes(data[half:], "little")
            data = (low ^ high).to_bytes(half, "little")
        return int.from_bytes(data, "little")

    def hexdigest(self) -> str:
        state, mask = 0, (1 << self.BITS) - 1
        folded = self._folded ^ int.from_bytes(self._rest, "little")
        for at, byte in enumerate(folded.to_bytes(self.ROUND, "little")):
            turn = self.SHIFT * at % self.BITS
            state ^= (byte << turn | byte << turn >> self.BITS) & mask
        state ^= self._length << self.BITS - 64
        return (state & mask).to_bytes(self.BITS // 8, "little").hex()


# What rclone calls it -> what proofs call it, and what makes it. The first that a remote has is compared.
_BLAKE3, _XXHASH = "blake3", "xxhash"
DIGESTS: dict[str, tuple[str, Callable[[], Hash]]] = {
    "sha256": ("sha256", hashlib.sha256),
    "blake3": ("blake3", lambda: importlib.import_module(_BLAKE3).blake3()),
    "sha512": ("sha512", hashlib.sha512),
    "xxh128": ("xxh3", lambda: importlib.import_module(_XXHASH).xxh3_128()),
    "sha1": ("sha1", functools.partial(hashlib.sha1, usedforsecurity=False)),
    "md5": ("md5", functools.partial(hashlib.md5, usedforsecurity=False)),
    "dropbox": ("dropbox", Dropbox),
    "quickxor": ("quickxor", QuickXor),
}


def common(kept: Sequence[str]) -> str:
    """Return what rclone calls the digest that is compared with a remote that keeps these, '' if there is none."""
    return next((name for name in DIGESTS if name in kept), "")
