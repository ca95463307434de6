"""A process that reads one radiograph at a time: it is asked on stdin and answers on stdout.

A message is JSON after its length, and bytes after theirs. Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from queue import SimpleQueue
from typing import IO, Any

from pneumo_experiments.dataset.resize import resize_image
from pneumo_experiments.dicom.limits import limit_memory, limit_time
from pneumo_experiments.dicom.radiograph import read_radiograph
from pneumo_experiments.errors import Rejected

LENGTHS = struct.Struct("<IQ")  # of the JSON and of the bytes
OUT_OF_MEMORY = 3  # exit code

Message = tuple[dict[str, Any], bytes]


def send(stream: IO[bytes], words: dict[str, Any], content: bytes = b"") -> None:
    """Writes one message."""
    text = json.dumps(words).encode()
    stream.write(LENGTHS.pack(len(text), len(content)) + text)
    stream.write(content)
    stream.flush()


def receive(stream: IO[bytes]) -> Message:
    """Reads one message; EOFError where the other side has ended."""
    text, content = LENGTHS.unpack(_exactly(stream, LENGTHS.size))
    return json.loads(_exactly(stream, text)), _exactly(stream, content)


def _exactly(stream: IO[bytes], count: int) -> bytes:
    content = stream.read(count)
    if len(content) < count:
        raise EOFError
    return content


def serve() -> None:
    """Answers until stdin ends, and ends then in the midst of a picture, too."""
    asked, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    send(answers, {})  # ready: all is imported
    for standard in (0, 1, 2):  # decoders print from C
        os.dup2(nowhere, standard)
    messages = SimpleQueue[Message]()
    threading.Thread(target=_take, args=(asked, messages), daemon=True).start()
    while True:
        words, content = messages.get()
        try:
            send(answers, *_read(content, **words))
        except MemoryError:
            os._exit(OUT_OF_MEMORY)


def _take(asked: IO[bytes], messages: SimpleQueue[Message]) -> None:
    try:
        while True:
            messages.put(receive(asked))
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except EOFError:
        os._exit(0)


def _read(content: bytes, image_id: str, image_size: int, max_pixels: int, seconds: float) -> Message:
    limit_memory(max_pixels)
    try:
        with limit_time(seconds):
            pixels = read_radiograph(content, image_id, max_pixels).pixels
            small = resize_image(pixels, image_size)
    except Rejected as reason:
        return {"reason": str(reason)}, b""
    rows, columns = pixels.shape
    return {"rows": rows, "columns": columns}, small.tobytes()
