"""Decoders of compressed DICOM pixels against each other: pixels, speed, memory, damaged streams.

python benchmarks/codecs.py

imagecodecs encodes the picture, noise on soft shadows, of 12 bits (8 for JPEG Baseline), and each decoder
reads the same stream. A library that is not installed is a line of the table: pip install python-gdcm
pylibjpeg-openjpeg pyjpegls. Damaged streams are read in processes of their own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
from measure import machine
from numpy.typing import NDArray
from PIL import Image

Decoder = Callable[[bytes, int], NDArray[Any]]  # of a stream and the picture's side
Image.MAX_IMAGE_PIXELS = None
END = b"\xff\xd9"
OUTCOMES = ("error", "same", "silent")  # of a damaged stream
SMALL = 256


def pillow(frame: bytes, side: int) -> NDArray[Any]:
    return np.asarray(Image.open(BytesIO(frame)))


def by_imagecodecs(name: str) -> Decoder:
    return lambda frame, side: getattr(imagecodecs, f"{name}_decode")(frame)


def by_pyjpegls(frame: bytes, side: int) -> NDArray[Any]:
    return np.frombuffer(import_module("jpeg_ls").decode_pixel_data(frame)[0], "<u2").reshape(side, side)


def by_openjpeg(frame: bytes, side: int) -> NDArray[Any]:
    pixels = import_module("openjpeg").decode(frame, j2k_format=0, reshape=False)
    return np.frombuffer(pixels, "<u2").reshape(side, side)


def by_gdcm(frame: bytes, side: int) -> NDArray[Any]:
    gdcm: Any = import_module("gdcm")
    fragment, fragments = gdcm.Fragment(), gdcm.SequenceOfFragments.New()
    fragment.SetByteStringValue(frame)
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image, monochrome = gdcm.Image(), gdcm.PhotometricInterpretation.MONOCHROME2
    image.SetNumberOfDimensions(2)
    image.SetDimensions((side, side, 1))
    image.SetDataElement(element)
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(monochrome))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    image.SetPixelFormat(gdcm.PixelFormat(1, 12, 12, 11, 0))
    pixels = image.GetBuffer().encode("utf-8", "surrogateescape")
    return np.frombuffer(pixels, "<u2").reshape(side, side)


class Codec(NamedTuple):
    """An encoder and the decoders of its streams; in a lossy one they are compared with the first."""

    encode: Callable[[NDArray[Any]], bytes]
    decoders: dict[str, tuple[str, Decoder]]  # the module that has to be there, and the call


JPEG8, JPEG2K = ("imagecodecs", by_imagecodecs("jpeg8")), ("imagecodecs", by_imagecodecs("jpeg2k"))
CODECS = {
    "JPEG Baseline, 8 bit": Codec(
        lambda pixels: imagecodecs.jpeg8_encode((pixels >> 4).astype(np.uint8), level=90),
        {"Pillow": ("PIL", pillow), "imagecodecs jpeg8": JPEG8},
    ),
    "JPEG Extended, 12 bit": Codec(
        lambda pixels: imagecodecs.jpeg8_encode(pixels, level=90, bitspersample=12),
        {"GDCM": ("gdcm", by_gdcm), "imagecodecs jpeg8": JPEG8},
    ),
    "JPEG Lossless": Codec(
        lambda pixels: imagecodecs.jpeg8_encode(pixels, lossless=True, predictor=1, bitspersample=12),
        {
            "GDCM": ("gdcm", by_gdcm),
            "imagecodecs jpeg8": JPEG8,
            "imagecodecs ljpeg": ("imagecodecs", by_imagecodecs("ljpeg")),
            "imagecodecs jpegsof3": ("imagecodecs", by_imagecodecs("jpegsof3")),
        },
    ),
    "JPEG-LS": Codec(
        imagecodecs.jpegls_encode,
        {
            "pyjpegls": ("jpeg_ls", by_pyjpegls),
            "imagecodecs jpegls": ("imagecodecs", by_imagecodecs("jpegls")),
        },
    ),
    "JPEG 2000 lossless": Codec(
        lambda pixels: imagecodecs.jpeg2k_encode(
            pixels, codecformat="J2K", bitspersample=12, reversible=True, resolutions=6
        ),
        {"pylibjpeg-openjpeg": ("openjpeg", by_openjpeg), "imagecodecs jpeg2k": JPEG2K},
    ),
    "HTJ2K lossless": Codec(
        lambda pixels: imagecodecs.htj2k_encode(pixels, reversible=True),
        {
            "pylibjpeg-openjpeg": ("openjpeg", by_openjpeg),
            "imagecodecs jpeg2k": JPEG2K,
            "imagecodecs htj2k": ("imagecodecs", by_imagecodecs("htj2k")),
        },
    ),
}


def picture(side: int) -> NDArray[np.uint16]:
    y, x = np.mgrid[:side, :side] / side
    noise = np.random.default_rng(0).normal(0, 12, (side, side))
    return (2048 + 1200 * np.sin(5 * x) * np.cos(4 * y) + noise).clip(0, 4095).astype(np.uint16)


def damaged(frame: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    """Streams that were cut and closed again, and streams with four other bytes."""
    rng, start = np.random.default_rng(0), len(frame) // 20
    for place in rng.integers(start, len(frame) - 2, count):
        yield "cut", frame[:place] + END
    for _ in range(count):
        other = bytearray(frame)
        for place in rng.integers(start, len(frame) - 2, 4):
            other[place] = rng.integers(256)
        yield "changed", bytes(other)


def damage(decode: Decoder, frame: bytes, expected: NDArray[Any]) -> str:
    """What becomes of a damaged stream, in a process of its own."""

    def work() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            pixels = decode(frame, len(expected))
        except Exception:
            os._exit(0)
        os._exit(1 if np.array_equal(pixels, expected) else 2)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(20)
    if process.is_alive():
        process.kill()
        process.join()
        return "hang"
    return OUTCOMES[code] if (code := process.exitcode or 0) >= 0 else "crash"


def peak() -> int:
    return int(Path("/proc/self/status").read_text().split("VmPeak:")[1].split()[0]) * 1024


def memory(codec: str, name: str, small: bytes, large: bytes, side: int, send: Connection) -> None:
    """Sends the address space, which dicom/limits.py limits, that a large picture takes: bytes per pixel."""
    decode = CODECS[codec].decoders[name][1]
    decode(small, SMALL)  # loads the library
    before = peak()
    decode(large, side)
    send.send((peak() - before) / side**2)


def bytes_per_pixel(*arguments: Any) -> str:
    context = multiprocessing.get_context("spawn")  # with no memory of this one
    receive, send = context.Pipe()
    process = context.Process(target=memory, args=(*arguments, send))
    process.start()
    process.join()
    return f"{receive.recv():.1f}" if receive.poll() else "crash"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", type=int, nargs="*", default=[1024, 2048], help="pixels, to be timed")
    parser.add_argument("--large", type=int, default=10_000, help="pixels a side, for the memory")
    parser.add_argument("--damaged", type=int, default=100, help="streams of each kind of damage")
    parser.add_argument("--repeats", type=int, default=5, help="in turn; the fastest counts")
    arguments = parser.parse_args()
    print(machine())
    sides = " | ".join(f"images/s, {side}²" for side in arguments.sides)
    print(
        f"\n| | pixels | {sides} | s per MB | bytes per pixel | cut: silent | changed: silent | crash, hang |"
    )
    print("|---" * (7 + len(arguments.sides)) + "|")
    for codec, (encode, decoders) in CODECS.items():
        small, large = encode(picture(SMALL)), encode(picture(arguments.large))
        frames = {side: encode(picture(side)) for side in arguments.sides}
        here = {name: decode for name, (module, decode) in decoders.items() if find_spec(module)}
        seconds = {(name, side): [0.0] * 0 for name in here for side in frames}
        for _ in range(arguments.repeats):
            for (name, side), measured in seconds.items():
                start = time.perf_counter()
                here[name](frames[side], side)
                measured.append(time.perf_counter() - start)
        reference = picture(SMALL)
        if "lossless" not in codec.lower() and codec != "JPEG-LS":
            reference = next(iter(here.values()))(small, SMALL)
        for name in decoders:
            if name not in here:
                print(f"| {codec}: {name} | not installed |")
                continue
            pixels = here[name](small, SMALL)
            difference = np.abs(pixels.astype(int) - reference).max()
            fates = Counter(
                (kind, damage(here[name], each, pixels)) for kind, each in damaged(small, arguments.damaged)
            )
            fatal = {fate: fates["cut", fate] + fates["changed", fate] for fate in ("crash", "hang")}
            fastest = {side: min(seconds[name, side]) for side in frames}
            last = arguments.sides[-1]
            print(
                f"| {codec}: {name}",
                f"differ by {difference}" if difference else "same",
                *(f"{1 / fastest[side]:.1f}" for side in frames),
                f"{fastest[last] / len(frames[last]) * 1e6:.3f}",
                bytes_per_pixel(codec, name, small, large, arguments.large),
                f"{fates['cut', 'silent']} of {arguments.damaged}",
                f"{fates['changed', 'silent']} of {arguments.damaged}",
                f"{fatal['crash']}, {fatal['hang']} |",
                sep=" | ",
                flush=True,
            )


if __name__ == "__main__":
    main()
