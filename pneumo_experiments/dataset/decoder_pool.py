"""Reads radiographs in subprocesses that may die: a file that crashes its decoder affects no other file.

The processes start on demand, are shared by all threads and are reused. They are plain subprocesses, since
multiprocessing cannot re-import the main program of some model servers. A request is a pickle on stdin. A
reply, on stdout, comes from where untrusted bytes are decoded: a line of JSON, and raw bytes.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.dataset.resize import resize_image
from pneumo_experiments.dicom.containers import DicomFile, read_file
from pneumo_experiments.dicom.header import Geometry, read_source
from pneumo_experiments.dicom.limits import (
    ENVIRONMENT,
    TIME_LIMIT_EXIT_CODE,
    available_cores,
    check_file_size,
    limit_memory,
    limit_time,
    max_bytes,
    max_file_bytes,
    max_seconds,
)
from pneumo_experiments.dicom.radiograph import MAX_PIXELS, read_radiograph
from pneumo_experiments.errors import Rejected, UserError

MAX_DECODERS = min(available_cores(), 8)  # each may use limits.max_bytes of memory
MAX_FILE_BYTES = max_file_bytes(MAX_PIXELS)
MAX_PENDING, MAX_PENDING_BYTES = 32, 2**28  # submitted files, and bytes of those not yet decoded
OUT_OF_MEMORY = 3  # exit code
NOT_STARTED = "a process that reads files does not start ({}); free memory, or set fewer workers"

# Passes on sys.path, since the code folder of a served model is not on the default path.
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1])\n"
    "from pneumo_experiments.dataset.decoder_pool import serve; serve()"
)

File = tuple[str, bytes | Rejected]  # image id, and DICOM bytes or the reason why it could not be read
Message = tuple[dict[str, Any], bytes]


class DecodedImage(NamedTuple):
    """A radiograph at network size, 8-bit pixels (S, S), its native size, and what its header says.

    ``source`` is what a DICOM object about it repeats, if that was asked for: texts by keyword.
    """

    pixels: NDArray[np.uint8]
    rows: int
    columns: int
    geometry: Geometry
    source: Mapping[str, str] | None = None


class Crashed(Rejected):
    """The process that read a file ended, with this exit code of its own."""

    def __init__(self, reason: str, image_id: str, returncode: int) -> None:
        super().__init__(reason, image_id)
        self.returncode = returncode


@dataclass(frozen=True)
class Request:
    """A call ``function(image_id, max_pixels, *arguments)`` in a process, about a file of so many bytes."""

    image_id: str
    max_pixels: int
    file_bytes: int
    function: Callable[..., Message]
    arguments: tuple[Any, ...]
    refused: Rejected | None = None  # why not to call it


def read_files(root: Path, members: Iterable[DicomFile]) -> Iterator[File]:
    """The files of an archive, read one by one; UserError as ``read_file`` raises it."""
    for member in members:
        try:
            yield member.image_id, read_file(root, member, MAX_PIXELS)
        except Rejected as reason:
            yield member.image_id, reason


def decode_all(
    files: Iterable[File], image_size: int, max_pixels: int = MAX_PIXELS, with_source: bool = False
) -> Generator[tuple[str, DecodedImage | Rejected]]:
    """Image id, and the decoded image or the reason for its rejection, for each file in order.

    ``with_source`` adds what a DICOM object about the image repeats of its header. Reads up to
    ``MAX_PENDING`` files ahead. Close the generator to kill decoders that are still busy.
    """

    def request(image_id: str, content: bytes | Rejected) -> Request:
        refused = content if isinstance(content, Rejected) else None
        size = 0 if isinstance(content, Rejected) else len(content)
        try:
            check_file_size(size, max_pixels, image_id)
        except Rejected as reason:
            refused = reason
        return Request(image_id, max_pixels, size, _decode, (content, image_size, with_source), refused)

    with closing(call_all(request(*file) for file in files)) as replies:
        for asked, reply in replies:
            if isinstance(reply, Rejected):
                yield asked.image_id, reply
            else:
                fields, pixels = reply
                left_edge, spacing, spacing_mm = fields.pop("geometry")
                geometry = Geometry(left_edge, spacing, spacing_mm and tuple(spacing_mm))
                resized = np.frombuffer(pixels, np.uint8).reshape(image_size, image_size)
                yield asked.image_id, DecodedImage(resized, geometry=geometry, **fields)


def _decode(image_id: str, max_pixels: int, content: bytes, image_size: int, with_source: bool) -> Message:
    radiograph = read_radiograph(content, image_id, max_pixels)
    resized = resize_image(radiograph.pixels, image_size)
    source = read_source(content, max_pixels) if with_source else None
    rows, columns = radiograph.shape
    fields = {"rows": rows, "columns": columns, "geometry": radiograph.geometry, "source": source}
    return fields, resized.tobytes()


def call_all(
    requests: Iterable[Request], workers: int | None = None
) -> Generator[tuple[Request, Message | Rejected]]:
    """Each request in order, and its reply or the reason for its rejection.

    UserError that a call raises is raised. Without a number of ``workers`` all threads together use
    ``MAX_DECODERS`` processes. Close the generator to kill the processes that are still busy.
    """
    busy, stopped = set[_Decoder](), threading.Event()
    slots, workers = nullcontext() if workers else _SLOTS, workers or MAX_DECODERS

    def call(request: Request) -> Message | Rejected:
        if request.refused is not None:
            return request.refused
        with slots, _decoder() as decoder:
            busy.add(decoder)
            if not stopped.is_set():
                result = decoder.call(request)
                busy.discard(decoder)
                if not stopped.is_set():
                    return result
            raise CancelledError  # the process is about to be killed and must not be reused

    def is_full() -> bool:
        undone_bytes = sum(request.file_bytes for request, future in pending if not future.done())
        return len(pending) >= max(MAX_PENDING, 2 * workers) or undone_bytes >= MAX_PENDING_BYTES

    pool, pending = ThreadPoolExecutor(workers), deque[tuple[Request, Future[Message | Rejected]]]()
    try:
        for request in requests:
            while is_full():
                first, future = pending.popleft()
                yield first, future.result()
            pending.append((request, pool.submit(call, request)))
        while pending:
            first, future = pending.popleft()
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
            _receive(self._replies)
        except EOFError:
            self.close()
            raise UserError(NOT_STARTED.format(f"exit code {self._process.returncode}")) from None

    def call(self, request: Request) -> Message | Rejected:
        """The reply, or the reason why there is none; kills the process after a crash or time-out."""
        seconds = max_seconds(request.file_bytes)
        try:
            pickle.dump((request, seconds), self._requests, pickle.HIGHEST_PROTOCOL)
            self._requests.flush()
            fields, content = _receive(self._replies)
        except (OSError, EOFError):
            gigabytes, exit_code = max_bytes(request.max_pixels) / 1e9, self.kill()
            reasons = {
                TIME_LIMIT_EXIT_CODE: f"needs more than {seconds} s of CPU time to decode",
                OUT_OF_MEMORY: f"needs more than {gigabytes:.1f} GB of memory to decode",
            }
            reason = reasons.get(exit_code, "its decoder crashed")
            return Crashed(reason, request.image_id, exit_code)
        if "error" in fields:
            raise UserError(fields["error"])
        if "rejected" in fields:
            return Rejected(fields["rejected"], request.image_id)
        return fields, content

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


def serve() -> None:
    """Replies to requests until stdin is closed; then ends at once, even while it decodes."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    devnull = os.open(os.devnull, os.O_RDWR)
    with suppress(ImportError):  # where a model is served: it lacks packages, and decodes only
        importlib.import_module("pneumo_experiments.dataset.shards")  # has the function `convert`
    _send(replies, {})  # ready: all modules are imported
    for descriptor in (0, 1, 2):  # C decoders print to stdout and stderr
        os.dup2(devnull, descriptor)
    received = SimpleQueue[tuple[Request, int]]()

    def receive_all() -> None:
        try:
            while True:
                received.put(pickle.load(requests))
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        except (EOFError, pickle.UnpicklingError):  # the other side has ended
            os._exit(0)
        except BaseException:  # this thread alone would end, and both sides would wait forever
            os._exit(1)

    threading.Thread(target=receive_all, daemon=True).start()
    while True:
        request, seconds = received.get()
        try:
            limit_memory(request.max_pixels)
            with limit_time(seconds):
                reply = request.function(request.image_id, request.max_pixels, *request.arguments)
        except Rejected as reason:
            reply = {"rejected": reason.reason}, b""
        except UserError as error:
            reply = {"error": str(error)}, b""
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        _send(replies, *reply)


def _send(stream: IO[bytes], fields: dict[str, Any], content: bytes = b"") -> None:
    stream.write(json.dumps([fields, len(content)]).encode() + b"\n")
    stream.write(content)
    stream.flush()


def _receive(stream: IO[bytes]) -> Message:
    """Reads one reply; raises EOFError if the other side has ended."""
    if not (line := stream.readline()).endswith(b"\n"):
        raise EOFError
    fields, size = json.loads(line)
    if len(content := stream.read(size)) < size:
        raise EOFError
    return fields, content
