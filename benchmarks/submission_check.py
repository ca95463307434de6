"""How often the check of a submission names the mistake in its masks, and how often it doubts right masks.

Run in the project's environment: python benchmarks/submission_check.py [--repeats 2000]

Right masks are the challenge's annotations, labels/train-rle.csv.gz in PNEUMO_REAL_DATA or ../shared/siim.
Submissions are random images of these; each mistake is made in all their masks. Prints errors and doubts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from measure import REAL_DATA, machine
from numpy.typing import NDArray
from tqdm import tqdm

from pneumo_experiments.dataset.annotations import read_annotations, unite
from pneumo_experiments.dataset.rle import EMPTY, encode, to_lengths
from pneumo_experiments.findings.submission_check import CHALLENGE, MaskTraits, likely_mistakes, traits_of

SHAPE, IMAGES = (1024, 1024), (10, 30, 100, 1377)
Mask = NDArray[np.bool_]


def smaller(size: int) -> Callable[[Mask], str]:
    """Encodes masks at a smaller size."""
    factor = SHAPE[0] // size
    return lambda mask: encode(mask.reshape(size, factor, size, factor).mean((1, 3)) >= 0.5)


def absolute(mask: Mask) -> str:
    """Starts that count from 1 at the first pixel."""
    lengths = to_lengths(encode(mask))
    return " ".join(map(str, np.c_[np.cumsum(lengths)[::2] + 1, lengths[1::2]].ravel()))


MISTAKES: dict[str, Callable[[Mask], str]] = {
    "none": encode,
    **{f"{size} px": smaller(size) for size in (128, 256, 512)},
    "row by row": lambda mask: encode(mask.T),
    "absolute starts": absolute,
    "upside down": lambda mask: encode(mask[::-1]),
    "left and right swapped": lambda mask: encode(mask[:, ::-1]),
    "inverted": lambda mask: encode(~mask),
    "whole images": lambda mask: encode(np.ones_like(mask)),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=2000)
    repeats, rng = parser.parse_args().repeats, np.random.default_rng(0)
    annotations = read_annotations(REAL_DATA / "labels" / "train-rle.csv.gz")
    traits: dict[str, list[MaskTraits]] = {name: [] for name in MISTAKES}
    for image_id, texts in tqdm(annotations.items(), leave=False):
        mask = unite(texts, SHAPE, image_id)[0]
        for name, made in MISTAKES.items():
            traits[name].append(traits_of(made(mask) if texts else EMPTY, SHAPE, image_id))
    print(
        f"{machine()}\n\n| mistake | "
        + " | ".join(f"{n:,} images" for n in (*IMAGES, len(annotations)))
        + " |"
    )
    print("|---" * (len(IMAGES) + 2) + "|")
    for name, masks in traits.items():
        cells = list[str]()
        for size in (*IMAGES, len(masks)):
            ends = list[str]()
            for _ in range(repeats if size < 1000 else repeats // 20 if size < len(masks) else 1):
                chosen = [masks[i] for i in rng.choice(len(masks), size, replace=False)]
                certain, doubts = likely_mistakes(chosen, CHALLENGE)
                is_error = certain or any(mask.is_absolute or mask.fault for mask in chosen)
                ends.append("error" if is_error else "doubt" if doubts else "")
            cells.append(f"{ends.count('error') / len(ends):.2%}, {ends.count('doubt') / len(ends):.2%}")
        print(f"| {name} | " + " | ".join(cells) + " |")
