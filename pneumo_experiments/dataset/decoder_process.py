"""A subprocess that decodes, or converts, one radiograph at a time: requests on stdin, replies on stdout.

A message is the lengths of both parts, then a JSON object, then raw bytes. Needs no torch.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from queue import SimpleQueue
from typing import IO, Any

from pneumo_experiments.dataset.convert import convert
from pneumo_experiments.dataset.resize import resize_image
from pneumo_experiments.dicom.limits import limit_memory, limit_time
from pneumo_experiments.dicom.radiograph import read_radiograph
from pneumo_experiments.dicom.source import read_source
from pneumo_experiments.errors import Rejected

LENGTHS = struct.Struct("<IQ")  # of the JSON and of the bytes
OUT_OF_MEMORY = 3  # exit code

Message = tuple[dict[str, Any], bytes]


def send(stream: IO[bytes], fields: dict[str, Any], content: bytes = b"") -> None:
    """Writes one message."""
    text = json.dumps(fields).encode()
    stream.write(LENGTHS.pack(len(text), len(content)) + text)
    stream.write(content)
    stream.flush()


def receive(stream: IO[bytes]) -> Message:
    """Reads one message; raises EOFError if the other side has ended."""
    text_bytes, content_bytes = LENGTHS.unpack(_read_exactly(stream, LENGTHS.size))
    return json.loads(_read_exactly(stream, text_bytes)), _read_exactly(stream, content_bytes)


def _read_exactly(stream: IO[bytes], count: int) -> bytes:
    content = stream.read(count)
    if len(content) < count:
        raise EOFError
    return content


def serve() -> None:
    """Replies to requests until stdin is closed; then ends at once, even while it decodes."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    devnull = os.open(os.devnull, os.O_RDWR)
    send(replies, {})  # ready: all modules are imported
    for descriptor in (0, 1, 2):  # C decoders print to stdout and stderr
        os.dup2(devnull, descriptor)
    messages = SimpleQueue[Message]()
    threading.Thread(target=_receive_all, args=(requests, messages), daemon=True).start()
    while True:
        fields, content = messages.get()
        try:
            send(replies, *_do(content, **fields))
        except MemoryError:
            os._exit(OUT_OF_MEMORY)


def _receive_all(requests: IO[bytes], messages: SimpleQueue[Message]) -> None:
    try:
        while True:
            messages.put(receive(requests))
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except EOFError:
        os._exit(0)


def _do(content: bytes, task: str, max_pixels: int, seconds: float, **arguments: Any) -> Message:
    limit_memory(max_pixels)
    with limit_time(seconds):
        return {"decode": _decode, "convert": convert}[task](content, max_pixels=max_pixels, **arguments)


def _decode(content: bytes, image_id: str, max_pixels: int, image_size: int, with_source: bool) -> Message:
    try:
        radiograph = read_radiograph(content, image_id, max_pixels)
        resized = resize_image(radiograph.pixels, image_size)
        source = read_source(content, max_pixels) if with_source else None
    except Rejected as reason:
        return {"reason": str(reason)}, b""
    rows, columns = radiograph.shape
    fields = {"rows": rows, "columns": columns, "geometry": radiograph.geometry, "source": source}
    return fields, resized.tobytes()
