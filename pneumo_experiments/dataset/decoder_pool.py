"""Decodes radiographs in parallel subprocesses: a file that crashes its decoder affects no other file.

The processes start on demand, are shared by all threads and are reused. They are plain subprocesses, since
multiprocessing cannot re-import the main program of some model servers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.dataset.decoder_process import OUT_OF_MEMORY, receive, send
from pneumo_experiments.dicom.archive import Member, read_member
from pneumo_experiments.dicom.geometry import Geometry
from pneumo_experiments.dicom.limits import (
    MAX_BYTES_PER_PIXEL,
    MAX_HEADER_BYTES,
    TIME_LIMIT_EXIT_CODE,
    max_seconds,
    memory_limit_message,
    time_limit_message,
)
from pneumo_experiments.dicom.radiograph import MAX_PIXELS
from pneumo_experiments.dicom.workers import ONE_THREAD, available_cores
from pneumo_experiments.errors import Rejected

MAX_DECODERS = min(available_cores(), 8)  # each may use limits.max_bytes of memory
MAX_FILE_BYTES = MAX_BYTES_PER_PIXEL * MAX_PIXELS + MAX_HEADER_BYTES
MAX_PENDING, MAX_PENDING_BYTES = 32, 2**28  # submitted files, and bytes of those not yet decoded

# Passes on sys.path, since the code folder of a served model is not on the default path.
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1])\n"
    "from pneumo_experiments.dataset.decoder_process import serve; serve()"
)


class DecodedImage(NamedTuple):
    """A radiograph at network size, 8-bit pixels (S, S), its native size, and what its header says.

    ``source`` is what a DICOM object about it repeats, if that was asked for: texts by keyword.
    """

    pixels: NDArray[np.uint8]
    rows: int
    columns: int
    geometry: Geometry
    source: Mapping[str, str] | None = None


File = tuple[str, bytes | Rejected]  # image id, and DICOM bytes or the reason why it could not be read


def read_files(root: Path, members: Iterable[Member]) -> Iterator[File]:
    """The files of an archive, read one by one; UserError as ``read_member`` raises it."""
    for member in members:
        try:
            yield member.image_id, read_member(root, member, MAX_PIXELS)
        except Rejected as reason:
            yield member.image_id, reason


def decode_all(
    files: Iterable[File], image_size: int, max_pixels: int = MAX_PIXELS, with_source: bool = False
) -> Generator[tuple[str, DecodedImage | Rejected]]:
    """Image id, and the decoded image or the reason for its rejection, for each file in order.

    ``with_source`` adds what a DICOM object about the image repeats of its header. Reads up to
    ``MAX_PENDING`` files ahead. Close the generator to kill decoders that are still busy.
    """
    busy, stopped = set[_Decoder](), threading.Event()

    def read(image_id: str, content: bytes | Rejected) -> DecodedImage | Rejected:
        if isinstance(content, Rejected):
            return content
        with _SLOTS, _decoder() as decoder:
            busy.add(decoder)
            if not stopped.is_set():
                result = decoder.read(image_id, content, image_size, max_pixels, with_source)
                busy.discard(decoder)
                if not stopped.is_set():
                    return result
            raise CancelledError  # the process is about to be killed and must not be reused

    def is_full() -> bool:
        undecoded_bytes = sum(size for _, size, future in pending if not future.done())
        return len(pending) >= MAX_PENDING or undecoded_bytes >= MAX_PENDING_BYTES

    pool, pending = (
        ThreadPoolExecutor(MAX_DECODERS),
        deque[tuple[str, int, Future[DecodedImage | Rejected]]](),
    )
    try:
        for image_id, content in files:
            while is_full():
                first_id, _, future = pending.popleft()
                yield first_id, future.result()
            size = 0 if isinstance(content, Rejected) else len(content)
            pending.append((image_id, size, pool.submit(read, image_id, content)))
        while pending:
            first_id, _, future = pending.popleft()
            yield first_id, future.result()
    finally:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for decoder in list(busy):
            decoder.kill()
        pool.shutdown()


class _Decoder:
    """A subprocess that decodes one file at a time."""

    def __init__(self) -> None:
        path = [str(Path(__file__).parents[2]), *sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, json.dumps(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | ONE_THREAD,
            process_group=0,  # Ctrl-C does not reach it
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        try:
            receive(self._replies)
        except EOFError:
            raise RuntimeError(f"{sys.executable}: the decoder process does not start") from None

    def read(
        self, image_id: str, content: bytes, image_size: int, max_pixels: int, with_source: bool
    ) -> DecodedImage | Rejected:
        """The decoded image or the reason for its rejection; kills the process after a crash or time-out."""
        if len(content) > MAX_BYTES_PER_PIXEL * max_pixels + MAX_HEADER_BYTES:
            return Rejected(
                f"{image_id}: rejected because {len(content):,} bytes are more than max_pixels allows"
            )
        request = {
            "image_id": image_id,
            "image_size": image_size,
            "max_pixels": max_pixels,
            "seconds": max_seconds(len(content)),
            "with_source": with_source,
        }
        try:
            send(self._requests, request, content)
            reply, pixels = receive(self._replies)
        except (OSError, EOFError):
            reasons = {
                TIME_LIMIT_EXIT_CODE: time_limit_message(len(content)),
                OUT_OF_MEMORY: memory_limit_message(max_pixels),
            }
            return Rejected(f"{image_id}: {reasons.get(self.kill(), 'its decoder crashed')}")
        if "reason" in reply:
            return Rejected(reply["reason"])
        resized = np.frombuffer(pixels, np.uint8).reshape(image_size, image_size)
        left_edge, spacing, spacing_mm = reply["geometry"]
        geometry = Geometry(left_edge, spacing, spacing_mm and tuple(spacing_mm))
        return DecodedImage(resized, reply["rows"], reply["columns"], geometry, reply["source"])

    def kill(self) -> int:
        """Kills the process if it is still running; returns its exit code."""
        self._process.kill()
        return self._process.wait()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self.kill()
        for stream in (self._requests, self._replies):
            with suppress(OSError):  # unread request
                stream.close()


_SLOTS = threading.BoundedSemaphore(MAX_DECODERS)
_IDLE = deque[_Decoder]()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_IDLE.clear)  # a forked child must not share them


@contextmanager
def _decoder() -> Generator[_Decoder]:
    """An idle decoder or a new one; returns to the idle ones after the block if it is still alive."""
    decoder = None
    with suppress(IndexError):
        while decoder is None:
            decoder = _IDLE.pop()
            if not decoder.is_alive():
                decoder = decoder.close()
    decoder = decoder or _Decoder()
    try:
        yield decoder
    except BaseException:
        decoder.close()
        raise
    if decoder.is_alive():
        _IDLE.append(decoder)
    else:
        decoder.close()
