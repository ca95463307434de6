"""Milliseconds per annotation of decoding and encoding run lengths: ours, pycocotools, a loop over pixels.

python benchmarks/run_lengths.py              the real annotations where they lie, else masks of phantoms
python benchmarks/run_lengths.py TABLE        annotations of 1024 x 1024 images, a CSV or .csv.gz as Kaggle's

pycocotools is needed for the comparison only: pip install pycocotools
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial, reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from measure import REAL_DATA, machine
from tqdm import tqdm

from pneumo_experiments.dataset import rle
from pneumo_experiments.dataset.annotations import read_annotations
from pneumo_experiments.errors import UserError
from pneumo_experiments.synthetic import anatomy, radiographs

try:
    from pycocotools import mask as coco
except ImportError:
    sys.exit("pycocotools is not installed; this comparison needs it: pip install pycocotools")

TABLE = REAL_DATA / "labels" / "train-rle.csv.gz"
SHAPE = (1024, 1024)
PHANTOMS = 60
LOOPED = 20  # masks for the loop over pixels, which takes a fifth of a second each
REPEATS = 3


def coco_decode(text: str) -> np.ndarray:
    """From the text to a mask (H, W), by pycocotools."""
    counts = list(map(int, text.split()))
    counts.append(SHAPE[0] * SHAPE[1] - sum(counts))
    return coco.decode(coco.frPyObjects({"size": list(SHAPE), "counts": counts}, *SHAPE))


def coco_encode(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths; pycocotools takes masks in Fortran order alone."""
    return coco.encode(np.asfortranarray(mask, np.uint8))


def loop_encode(mask: np.ndarray) -> str:
    """SIIM's text, one pixel after the other."""
    rows, columns = mask.shape
    lengths = [0]
    last = False
    for x in range(columns):
        for y in range(rows):
            filled = bool(mask[y, x])
            if filled != last:
                lengths.append(0)
                last = filled
            lengths[-1] += 1
    if not last:
        del lengths[-1]
    return " ".join(map(str, lengths)) or rle.EMPTY


def unite(texts: list[str]) -> str:
    """One text for the union of an image's annotations."""
    return rle.encode(reduce(np.logical_or, [rle.decode(text, SHAPE) for text in texts]))


def real_annotations(table: Path) -> tuple[list[str], list[str]]:
    """Every annotation, and the united mask of every positive image as run lengths."""
    images = {image_id: texts for image_id, texts in read_annotations(table).items() if texts}
    texts = [text for texts in images.values() for text in texts]
    united = tqdm(images.values(), desc="unite", unit="image", leave=False)
    return texts, [unite(texts) for texts in united]


def phantom_annotations() -> tuple[list[str], list[str]]:
    """The same of phantoms with 1 to 3 annotations each."""
    texts: list[str] = []
    united: list[str] = []
    for number in range(PHANTOMS):
        rng = np.random.default_rng(number)
        radiograph = radiographs.draw_radiograph(
            rng, anatomy.build(rng, "F"), "PA", annotations=1 + number % 3
        )
        of_phantom = [rle.encode(mask) for mask in radiograph.annotations]
        texts += of_phantom
        united.append(unite(of_phantom))
    return texts, united


def check(texts: list[str], united: list[str], looped: list[str]) -> None:
    """Ends the program unless all ways have the same results."""
    for text in tqdm(texts, desc="same masks", unit="annotation", leave=False):
        if not np.array_equal(rle.decode(text, SHAPE).T, coco_decode(text).T):
            sys.exit(f"decode and pycocotools differ on {text[:60]}…")
    for text in tqdm(united, desc="same run lengths", unit="mask", leave=False):
        mask = c_order(text)
        counts = list(map(int, text.split()))
        counts.append(mask.size - sum(counts))
        theirs = coco.frPyObjects({"size": list(SHAPE), "counts": counts}, *SHAPE)
        if rle.encode(mask) != text or coco_encode(mask) != theirs:
            sys.exit(f"encode and pycocotools differ on {text[:60]}…")
    if any(loop_encode(c_order(text)) != text for text in looped):
        sys.exit("encode and the loop over pixels differ")


def c_order(text: str) -> np.ndarray:
    """A mask as a network's answer lies in memory."""
    return np.ascontiguousarray(rle.decode(text, SHAPE))


def compare(
    ours: Callable[[Any], Any],
    theirs: Callable[[Any], Any],
    texts: list[str],
    prepare: Callable[[str], Any],
    desc: str,
) -> str:
    """Cells of the table: number of texts, ours and theirs in ms, and the ratio.

    The two take turns on every text, so that they share the machine's noise; the time is the median over
    all texts. Of the repeats the middle ratio is given, and the least and the most.
    """
    medians: list[list[float]] = []
    for number in range(REPEATS):
        times: dict[Callable[[Any], Any], list[float]] = {ours: [], theirs: []}
        for text in tqdm(texts, desc=f"{desc}, {number + 1} of {REPEATS}", unit="mask", leave=False):
            argument = prepare(text)
            for way, seconds in times.items():
                start = time.perf_counter()
                way(argument)
                seconds.append(time.perf_counter() - start)
        medians.append([1000 * statistics.median(seconds) for seconds in times.values()])
    least, middle, most = np.quantile([their / our for our, their in medians], [0, 0.5, 1])
    our, their = np.median(medians, axis=0)
    return f"{len(texts):,} | {our:.3f} | {their:.3f} | {middle:.1f} ({least:.1f} to {most:.1f})"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", nargs="?", type=Path, help="annotations of 1024 x 1024 images")
    table: Path | None = parser.parse_args().table or (TABLE if TABLE.exists() else None)
    texts, united = real_annotations(table) if table else phantom_annotations()
    looped = united[:: max(1, len(united) // LOOPED)][:LOOPED]
    check(texts, united, looped)

    decode = partial(rle.decode, shape=SHAPE)
    rows = {
        "decode: text to mask | pycocotools": compare(decode, coco_decode, texts, str, "decode"),
        "encode: mask to text | pycocotools": compare(rle.encode, coco_encode, united, c_order, "encode"),
        "encode: mask to text | loop over mask[y, x]": compare(
            rle.encode, loop_encode, looped, c_order, "loop"
        ),
    }
    print(f"{machine()}, NumPy {np.__version__}, pycocotools {version('pycocotools')}")
    source = "real annotations" if table else f"annotations of {PHANTOMS} phantoms"
    print(
        f"{len(texts):,} {source} and their {len(united):,} united masks, {SHAPE[1]} x {SHAPE[0]} pixels;"
        f" masks to encode in C order.\nMedian over the masks, of {REPEATS} repeats; the ratio's range is"
        " that of the repeats.\n"
    )
    print("| ours | against | masks | ours, ms | theirs, ms | ratio |\n|---|---|---|---|---|---|")
    for name, cells in rows.items():
        print(f"| {name} | {cells} |")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
