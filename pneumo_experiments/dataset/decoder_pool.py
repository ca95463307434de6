"""Reads radiographs in parallel subprocesses: a file that crashes its decoder affects no other file.

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
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.dataset.decoder_process import OUT_OF_MEMORY, Message, receive, send
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
from pneumo_experiments.dicom.workers import ENVIRONMENT, available_cores
from pneumo_experiments.errors import Rejected, UserError

MAX_DECODERS = min(available_cores(), 8)  # each may use limits.max_bytes of memory
MAX_FILE_BYTES = MAX_BYTES_PER_PIXEL * MAX_PIXELS + MAX_HEADER_BYTES
NO_SLOTS = nullcontext()
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


Item = TypeVar("Item")
File = tuple[str, bytes | Rejected]  # image id, and DICOM bytes or the reason why it could not be read


def read_files(root: Path, members: Iterable[Member]) -> Iterator[File]:
    """The files of an archive, read one by one; UserError as ``read_member`` raises it."""
    for member in members:
        try:
            yield member.image_id, read_member(root, member, MAX_PIXELS)
        except Rejected as reason:
            yield member.image_id, reason


@dataclass(frozen=True)
class Request:
    """What a process is to do with a file: a task of ``decoder_process`` and its arguments, for JSON."""

    task: str
    image_id: str
    content: bytes
    max_pixels: int
    arguments: Mapping[str, Any]


class Crashed(Rejected):
    """The process that read a file ended, with this exit code of its own."""

    def __init__(self, reason: str, returncode: int) -> None:
        super().__init__(reason)
        self.returncode = returncode


def decode_all(
    files: Iterable[File], image_size: int, max_pixels: int = MAX_PIXELS, with_source: bool = False
) -> Generator[tuple[str, DecodedImage | Rejected]]:
    """Image id, and the decoded image or the reason for its rejection, for each file in order.

    ``with_source`` adds what a DICOM object about the image repeats of its header. Reads up to
    ``MAX_PENDING`` files ahead. Close the generator to kill decoders that are still busy.
    """
    arguments = {"image_size": image_size, "with_source": with_source}

    def request(file: File) -> Request | Rejected:
        image_id, content = file
        if isinstance(content, Rejected):
            return content
        return Request("decode", image_id, content, max_pixels, arguments)

    def held_bytes(file: File) -> int:
        return 0 if isinstance(file[1], Rejected) else len(file[1])

    with closing(run_all(files, request, MAX_DECODERS, _SLOTS, held_bytes)) as replies:
        for (image_id, _), reply in replies:
            yield image_id, reply if isinstance(reply, Rejected) else _decoded(reply, image_size)


def _decoded(message: Message, image_size: int) -> DecodedImage:
    fields, pixels = message
    resized = np.frombuffer(pixels, np.uint8).reshape(image_size, image_size)
    left_edge, spacing, spacing_mm = fields["geometry"]
    geometry = Geometry(left_edge, spacing, spacing_mm and tuple(spacing_mm))
    return DecodedImage(resized, fields["rows"], fields["columns"], geometry, fields["source"])


def run_all(
    items: Iterable[Item],
    request: Callable[[Item], Request | Rejected],
    workers: int,
    slots: AbstractContextManager[object] = NO_SLOTS,
    held_bytes: Callable[[Item], int] = lambda _: 0,
) -> Generator[tuple[Item, Message | Rejected]]:
    """Each item in order, and the reply of a process to its request or the reason for its rejection.

    ``request`` runs in a thread, with any exception for the caller. ``slots`` limits what several threads
    run at once, ``held_bytes`` the items that are drawn ahead. Close the generator to kill the processes that
    are still busy.
    """
    busy, stopped = set[_Decoder](), threading.Event()

    def read(item: Item) -> Message | Rejected:
        wanted = request(item)
        if isinstance(wanted, Rejected):
            return wanted
        with slots, _decoder() as decoder:
            busy.add(decoder)
            if not stopped.is_set():
                result = decoder.read(wanted)
                busy.discard(decoder)
                if not stopped.is_set():
                    return result
            raise CancelledError  # the process is about to be killed and must not be reused

    def is_full() -> bool:
        undone_bytes = sum(size for _, size, future in pending if not future.done())
        return len(pending) >= max(MAX_PENDING, 2 * workers) or undone_bytes >= MAX_PENDING_BYTES

    pool, pending = ThreadPoolExecutor(workers), deque[tuple[Item, int, Future[Message | Rejected]]]()
    try:
        for item in items:
            while is_full():
                first, _, future = pending.popleft()
                yield first, future.result()
            pending.append((item, held_bytes(item), pool.submit(read, item)))
        while pending:
            first, _, future = pending.popleft()
            yield first, future.result()
    finally:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for decoder in list(busy):
            decoder.kill()
        pool.shutdown()


def close_idle() -> None:
    """Ends the processes that wait for work."""
    with suppress(IndexError):
        while True:
            _IDLE.pop().close()


NOT_STARTED = "a process that reads files does not start ({}); free memory, or set fewer workers"


class _Decoder:
    """A subprocess that does one request at a time."""

    def __init__(self) -> None:
        path = [str(Path(__file__).parents[2]), *sys.path]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", START, json.dumps(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | ENVIRONMENT,
                process_group=0,  # Ctrl-C does not reach it
            )
        except OSError as error:  # too many processes or open files, or no memory
            raise UserError(NOT_STARTED.format(error.strerror)) from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        try:
            receive(self._replies)
        except EOFError:
            self.close()
            raise UserError(NOT_STARTED.format(f"exit code {self._process.returncode}")) from None

    def read(self, request: Request) -> Message | Rejected:
        """The reply, or the reason why there is none; kills the process after a crash or time-out."""
        image_id, size, max_pixels = request.image_id, len(request.content), request.max_pixels
        if size > MAX_BYTES_PER_PIXEL * max_pixels + MAX_HEADER_BYTES:
            return Rejected(f"{image_id}: rejected because {size:,} bytes are more than max_pixels allows")
        fields = {
            "task": request.task,
            "image_id": image_id,
            "max_pixels": max_pixels,
            "seconds": max_seconds(size),
            **request.arguments,
        }
        try:
            send(self._requests, fields, request.content)
            reply, content = receive(self._replies)
        except (OSError, EOFError):
            reasons = {
                TIME_LIMIT_EXIT_CODE: time_limit_message(size),
                OUT_OF_MEMORY: memory_limit_message(max_pixels),
            }
            exit_code = self.kill()
            return Crashed(f"{image_id}: {reasons.get(exit_code, 'its decoder crashed')}", exit_code)
        return Rejected(reply["reason"]) if "reason" in reply else (reply, content)

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
