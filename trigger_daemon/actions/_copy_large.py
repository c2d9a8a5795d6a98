"""Large files: written in segments past the page cache, each read back while the next is written.

One thread reads the source and hashes; each destination has a thread that
writes and syncs and one that reads back. Every block has its own digest, so
what was read back is compared block by block, and an attempt that was cut short
goes on after the last segment that was read back: its blocks are read once more
and compared with their recorded digests, never believed.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from trigger_daemon.actions._copy_files import (
    BLOCK,
    PIECE,
    Changed,
    Differs,
    Hash,
    Source,
    Trouble,
    at_destination,
    new_hash,
    open_past_cache,
    printable,
    version_tag,
)
from trigger_daemon.actions._copy_pace import Cancelled
from trigger_daemon.actions._copy_room import has_all
from trigger_daemon.actions._copy_system import ALIGNMENT, aligned_buffer, drop_cached, reserve, set_direct
from trigger_daemon.failpoints import fail_point

if TYPE_CHECKING:
    from trigger_daemon.actions._copy_job import File, Job, Unit

BUFFERS = 4  # blocks between the reading and the writing threads
BLOCK_DIGEST = 16  # bytes

block_hash = new_hash("xxh3")


class Sink:
    """One destination of one large file."""

    def __init__(self, job: Job, unit: Unit, source: Source) -> None:
        self.job = job
        self.unit = unit
        self.key = (job.run_id, unit.file.index, unit.dest.index)
        way = f"{job.digest}/{job.segment_bytes}/{source.state.st_ctime_ns}"
        self.version = version_tag(unit.file.size, unit.file.mtime_ns, way)
        self.blocks: list[bytes] = []
        self.direct = False
        self.back_direct = unit.dest.direct
        self.back = -1
        self.fd = -1
        self.segment_blocks = job.segment_bytes // BLOCK
        self.writer = ThreadPoolExecutor(1, "write")
        self.checker = ThreadPoolExecutor(1, "read-back")
        self.own = unit.file.own_digest()
        self.broken: OSError | None = None
        self.pending: deque[Future[Any]] = deque()
        try:
            self.proven_blocks = self._open(source)
        except BaseException:
            self.close()
            raise

    def _open(self, source: Source) -> int:
        """Open the temporary file, an earlier attempt's if it can go on; return how many blocks of it are recorded."""
        job, unit = self.job, self.unit
        key, version = self.key, self.version
        part = job.store.part(*key)
        if part and part.version == version and not job.second:
            with contextlib.suppress(FileNotFoundError):
                self.fd = os.open(part.temp, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                unit.temp = part.temp
                job.lies(unit, self.fd)
                unit.has_room = not unit.reserve or has_all(self.fd, unit.file.size)
                for blocks in part.segments:
                    self.blocks += [blocks[i : i + BLOCK_DIGEST] for i in range(0, len(blocks), BLOCK_DIGEST)]
        if self.fd < 0:
            if part:
                with contextlib.suppress(OSError):
                    os.unlink(part.temp)
            self.fd = job.open_temp(unit, source.state.st_mode)
            job.take_room(unit, self.fd)
            if not unit.reserve and not unit.dest.in_memory:  # there it would only be filled twice
                reserve(self.fd, unit.file.size)
            job.store.begin_part(*key, unit.temp, version)
        if unit.dest.direct:
            with contextlib.suppress(OSError):
                set_direct(self.fd, on=True)
                self.direct = True
        self.back, self.back_direct = open_past_cache(unit.temp, unit.dest.direct)
        return len(self.blocks)

    def begin_anew(self) -> None:
        """Believe nothing of what an earlier attempt left."""
        self.blocks.clear()
        self.own = self.unit.file.own_digest()
        self.job.store.begin_part(*self.key, self.unit.temp, self.version)

    def submit_write(self, view: memoryview, offset: int) -> Future[Any]:
        return self.writer.submit(self._write, view, offset)

    def _write(self, view: memoryview, offset: int) -> None:
        """Write a block, unless an earlier one failed: that error is the one to tell."""
        if self.broken:
            raise self.broken
        try:
            self._write_block(view, offset)
        except OSError as fault:
            self.broken = fault
            raise

    def _write_block(self, view: memoryview, offset: int) -> None:
        """Write a block; its unaligned end (the file's last) through the page cache."""
        self.job.pace.doing = "writing " + printable(self.unit.target)
        fail_point("copy.large_write")
        self.job.look_for_room(self.unit, self.fd, len(view))
        whole = len(view) // ALIGNMENT * ALIGNMENT
        done = 0
        while done < len(view):
            if self.direct and (done == whole or done % ALIGNMENT):
                self._go_buffered()
            # In pieces: a disk ends the request that it has begun before it serves the instrument's.
            end = min(done + PIECE, whole if self.direct else len(view))
            try:
                done += os.pwrite(self.fd, view[done:end], offset + done)
            except OSError as fault:
                if not self.direct or fault.errno != errno.EINVAL:
                    raise
                self._go_buffered()
            self.job.pace.step()

    def _go_buffered(self) -> None:
        set_direct(self.fd, on=False)
        self.direct = False

    def submit_segment(self, number: int, first: int, count: int) -> None:
        """Sync what was written of a segment, then read it back."""
        self.pending.append(self.writer.submit(self._end_segment, number, first, count))

    def _end_segment(self, number: int, first: int, count: int) -> None:
        if self.broken:
            raise self.broken  # reading back would only find what was never written
        self.job.pace.doing = "syncing " + printable(self.unit.target)
        fail_point("copy.large_sync")
        os.fdatasync(self.fd)
        self.pending.append(self.checker.submit(self._check_segment, number, first, count))

    def _check_segment(self, number: int, first: int, count: int) -> None:
        """Read a segment back, compare, and record it as proven."""
        if fail_point("copy.large_flip"):
            from trigger_daemon.actions._copy_job import damage

            damage(self.unit.temp, first * BLOCK)
        self.read_blocks(first, count, None)
        job = self.job
        if count == self.segment_blocks:
            digests = b"".join(self.blocks[first : first + count])
            job.store.add_segment(*self.key, number, digests)
        fail_point("copy.large_segment")

    def read_blocks(self, first: int, count: int, whole: Hash | None) -> None:
        """Compare blocks on the disk with their digests; raise Differs. `whole` and the own digest are fed with them.

        Each block comes here once, in order: what an earlier attempt left first, then the segments.
        """
        buffer = aligned_buffer(BLOCK)
        size = self.unit.file.size
        if not self.back_direct:
            drop_cached(self.back, first * BLOCK, count * BLOCK)
        for number in range(first, first + count):
            length = min(BLOCK, size - number * BLOCK)
            self.job.pace.spend_back(length, len(self.job.dests))
            self.job.pace.doing = "reading back " + printable(self.unit.target)
            self._read(buffer, number * BLOCK, length)
            if block_hash_of(buffer[:length]) != self.blocks[number]:
                raise Differs(f"block {number} differs")
            if whole is not None:
                whole.update(buffer[:length])
            if self.own is not None:
                self.own.feed(buffer[:length], number * BLOCK)
        if not self.back_direct:
            drop_cached(self.back, first * BLOCK, count * BLOCK)

    def _read(self, buffer: memoryview, offset: int, length: int) -> None:
        got = 0
        while got < length:
            end = min(got + PIECE, -(-length // ALIGNMENT) * ALIGNMENT if self.back_direct else length)
            try:
                n = os.preadv(self.back, [buffer[got:end]], offset + got)
            except OSError as fault:
                if not self.back_direct or fault.errno != errno.EINVAL:
                    raise
                set_direct(self.back, on=False)
                self.back_direct = False
                drop_cached(self.back)
                continue
            if n == 0:
                raise Differs("ended before its size")
            got += n

    def finish(self, digest: str, mtime_ns: int, atime_ns: int) -> None:
        """Wait for all segments, then make size and times durable. Raises Differs, OSError, Cancelled.

        Raises Trouble if the file does not match its own digest.
        """
        self.wait()
        if self.own is not None:
            self.own.check()
        unit = self.unit
        os.ftruncate(self.fd, unit.file.size)
        os.utime(self.fd, ns=(atime_ns, mtime_ns))
        os.fsync(self.fd)
        there = os.fstat(self.fd)
        unit.digest, unit.inode, unit.mtime_ns = digest, there.st_ino, there.st_mtime_ns
        unit.how = self.job.how(unit.dest, self.back_direct, there.st_dev)

    def poll(self) -> None:
        """Raise what has gone wrong so far."""
        while self.pending and self.pending[0].done():
            self.pending.popleft().result()

    def wait(self) -> None:
        """Wait for all segments; raise what went wrong first."""
        while self.pending:  # the end of a segment adds its reading back before it is done
            self.pending[0].result()
            self.pending.popleft()

    def close(self) -> None:
        self.writer.shutdown(wait=True, cancel_futures=True)
        self.checker.shutdown(wait=True, cancel_futures=True)
        for fd in (self.fd, self.back):
            if fd >= 0:
                os.close(fd)


def block_hash_of(view: memoryview) -> bytes:
    found = block_hash()
    found.update(view)
    return found.digest()


def copy_large(job: Job, file: File, units: Sequence[Unit]) -> None:
    """Copy one large file to all of `units`; errors of one destination stop only that one.

    Raises Changed, Trouble, Cancelled. What was read back stays as a part for
    the next attempt, unless the version is gone or nobody wants it any more.
    """
    if not units:
        return
    job.pace.doing = "reading " + file.path
    source = file.open(units)
    sinks: list[Sink] = []
    placed: list[Unit] = []
    try:
        for unit in units:
            job.pace.doing = "writing " + printable(unit.target)
            try:
                sinks.append(Sink(job, unit, source))
            except OSError as fault:
                _discard(job, unit)
                job.note_at(unit.dest, fault, "write", unit.target)
        digest = _stream(job, source, sinks) if sinks else ""
        source.check()
        for sink in sinks.copy():
            try:
                sink.finish(digest, file.mtime_ns, source.state.st_atime_ns)
            except (OSError, Differs) as fault:
                _drop(job, sinks, sink, fault)
            except Trouble as trouble:
                job.store.end_part(*sink.key)
                job.refuse(sink.unit, trouble)
            else:
                placed.append(sink.unit)
    except (Changed, Cancelled):
        for sink in sinks:
            sink.close()
            _discard(job, sink.unit)
        sinks.clear()
        raise
    except Trouble:
        job.left = True
        raise
    finally:
        job.moving = 0
        source.close()
        for sink in sinks:
            sink.close()
    job.put_in_place(placed)
    for unit in placed:
        job.store.end_part(job.run_id, file.index, unit.dest.index)


def _stream(job: Job, source: Source, sinks: list[Sink]) -> str:
    """Read, hash, and hand blocks to the sinks; return the digest of the whole. `sinks` loses those that fail."""
    size = source.size
    start, whole = _resume(job, sinks)
    buffers = [aligned_buffer(BLOCK) for _ in range(BUFFERS)]
    writing: deque[list[tuple[Sink, Future[Any]]]] = deque()
    segment_blocks = job.segment_bytes // BLOCK
    total = -(-size // BLOCK)
    for number in range(start, total):
        if len(writing) == BUFFERS:
            _await(job, sinks, writing.popleft())
        for sink in sinks.copy():
            try:
                sink.poll()
            except (OSError, Differs) as fault:
                _drop(job, sinks, sink, fault)
        if not sinks:
            return ""
        offset = number * BLOCK
        view = buffers[number % BUFFERS][: min(BLOCK, size - offset)]
        block = block_hash()
        for begin in range(0, len(view), PIECE):
            piece = view[begin : begin + PIECE]
            source.fill(piece, offset + begin, job.pace)
            whole.update(piece)
            block.update(piece)
        digest = block.digest()
        futures = []
        for sink in sinks:
            sink.blocks.append(digest)
            futures.append((sink, sink.submit_write(view, offset)))
        writing.append(futures)
        job.moving = offset + len(view)
        if (number + 1) % segment_blocks == 0 or number + 1 == total:
            source.check()
            segment = number // segment_blocks
            for sink in sinks:
                sink.submit_segment(segment, segment * segment_blocks, number + 1 - segment * segment_blocks)
    while writing:
        _await(job, sinks, writing.popleft())
    return whole.hexdigest()


def _resume(job: Job, sinks: Sequence[Sink]) -> tuple[int, Hash]:
    """Prove what earlier attempts left; return the first block still to be read, and the digest up to there.

    The source is not read again: what stands at the destination is, because
    both its blocks and the digest of the whole need it.
    """
    whole = job.make()
    start = min(sink.proven_blocks for sink in sinks)
    try:
        for place, sink in enumerate(sinks):
            del sink.blocks[start:]
            sink.read_blocks(0, start, whole if place == 0 else None)
    except (Differs, OSError):
        for sink in sinks:
            sink.begin_anew()
        return 0, job.make()
    job.resumed += start * BLOCK
    return start, whole


def _await(job: Job, sinks: list[Sink], futures: Sequence[tuple[Sink, Future[Any]]]) -> None:
    for sink, future in futures:
        if sink not in sinks:
            continue
        try:
            future.result()
        except OSError as fault:
            _drop(job, sinks, sink, fault)


def _drop(job: Job, sinks: list[Sink], sink: Sink, fault: OSError | Differs) -> None:
    """Go on without a destination that failed: its copy is bad and written anew, or it is away and goes on later."""
    from trigger_daemon.actions._copy_job import reads_differently

    sinks.remove(sink)
    sink.close()
    unit = sink.unit
    if isinstance(fault, Differs):
        job.store.end_part(*sink.key)
        job.again(unit, reads_differently(unit))
    elif fault.errno == errno.EIO:
        job.store.end_part(*sink.key)
        job.again(unit, at_destination(fault, "write", unit.target))
    else:
        job.left = True
        job.note_at(unit.dest, fault, "write", unit.target)


def _discard(job: Job, unit: Unit) -> None:
    """Leave nothing of a file's copy that is under way."""
    job.store.end_part(job.run_id, unit.file.index, unit.dest.index)
    if unit.temp:
        with contextlib.suppress(OSError):
            os.unlink(unit.temp)
