"""Radiographs read by processes of their own, side by side: a bad file costs its own row and nothing else.

The processes are shared by all threads, start when they are needed, and stay for the next files. They are
plain subprocesses, since a model is served in programs that multiprocessing could not start again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.dataset.decoder_process import OUT_OF_MEMORY, receive, send
from pneumo_experiments.dicom.limits import (
    LARGEST_HEADER,
    LARGEST_PIXEL,
    TIME_LIMIT_EXIT_CODE,
    max_seconds,
    memory_limit_message,
    time_limit_message,
)
from pneumo_experiments.dicom.radiograph import MAX_PIXELS
from pneumo_experiments.dicom.workers import ONE_THREAD, available_cores
from pneumo_experiments.errors import Rejected

DECODERS = min(available_cores(), 8)  # each may take limits.most_bytes
AHEAD, AHEAD_BYTES = 32, 2**28  # files in hand, and how much of them still waits to be read

# The same modules as here, wherever they came from: a model's own folder is on no path.
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1])\n"
    "from pneumo_experiments.dataset.decoder_process import serve; serve()"
)


class DecodedImage(NamedTuple):
    """A radiograph as a network takes it, 8-bit greys (S, S), and its own size."""

    pixels: NDArray[np.uint8]
    rows: int
    columns: int


File = tuple[str, bytes | Rejected]  # image id, and DICOM bytes, or why there are none


def decode_all(
    files: Iterable[File], image_size: int, max_pixels: int = MAX_PIXELS
) -> Generator[tuple[str, DecodedImage | Rejected]]:
    """Image id, and the picture or the reason why not, of each file in order; drawn a little ahead.

    Close it to end what is still being read.
    """
    busy, stopped = set[_Decoder](), threading.Event()

    def read(image_id: str, content: bytes | Rejected) -> DecodedImage | Rejected:
        if isinstance(content, Rejected):
            return content
        with _TURNS, _decoder() as decoder:
            busy.add(decoder)
            if not stopped.is_set():
                result = decoder.read(image_id, content, image_size, max_pixels)
                busy.discard(decoder)
                if not stopped.is_set():
                    return result
            raise CancelledError  # the process is about to be killed: nobody else may get it

    def is_full() -> bool:
        unread = sum(size for _, size, future in begun if not future.done())
        return len(begun) >= AHEAD or unread >= AHEAD_BYTES

    pool, begun = ThreadPoolExecutor(DECODERS), deque[tuple[str, int, Future[DecodedImage | Rejected]]]()
    try:
        for image_id, content in files:
            while is_full():
                first, _, future = begun.popleft()
                yield first, future.result()
            size = 0 if isinstance(content, Rejected) else len(content)
            begun.append((image_id, size, pool.submit(read, image_id, content)))
        while begun:
            first, _, future = begun.popleft()
            yield first, future.result()
    finally:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for decoder in list(busy):
            decoder.kill()
        pool.shutdown()


class _Decoder:
    """One process, which reads one file at a time."""

    def __init__(self) -> None:
        path = [str(Path(__file__).parents[2]), *sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, json.dumps(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | ONE_THREAD,
            process_group=0,  # Ctrl-C is left to this process
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._questions, self._answers = self._process.stdin, self._process.stdout
        try:
            receive(self._answers)
        except EOFError:
            raise RuntimeError(f"{sys.executable} does not start a process that reads DICOM files") from None

    def read(
        self, image_id: str, content: bytes, image_size: int, max_pixels: int
    ) -> DecodedImage | Rejected:
        """The picture, or why not; a process that reached a limit or crashed is gone then."""
        if len(content) > LARGEST_PIXEL * max_pixels + LARGEST_HEADER:
            return Rejected(f"{image_id}: {len(content):,} bytes, more than a picture of max_pixels can need")
        words = {"image_id": image_id, "image_size": image_size, "max_pixels": max_pixels}
        try:
            send(self._questions, words | {"seconds": max_seconds(len(content))}, content)
            answer, pixels = receive(self._answers)
        except (OSError, EOFError):
            reasons = {
                TIME_LIMIT_EXIT_CODE: time_limit_message(len(content)),
                OUT_OF_MEMORY: memory_limit_message(max_pixels),
            }
            return Rejected(f"{image_id}: {reasons.get(self.kill(), 'its decoder crashed')}")
        if "reason" in answer:
            return Rejected(answer["reason"])
        small = np.frombuffer(pixels, np.uint8).reshape(image_size, image_size)
        return DecodedImage(small, answer["rows"], answer["columns"])

    def kill(self) -> int:
        """Ends the process, where it has not ended; how it ended."""
        self._process.kill()
        return self._process.wait()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self.kill()
        for stream in (self._questions, self._answers):
            with suppress(OSError):  # a question that nobody read
                stream.close()


_TURNS = threading.BoundedSemaphore(DECODERS)
_IDLE = deque[_Decoder]()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_IDLE.clear)  # two processes must not share one


@contextmanager
def _decoder() -> Generator[_Decoder]:
    """One that is idle, or a new one; it stays for the next file unless it ended."""
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
