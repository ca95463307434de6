from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pneumo_experiments.dataset.rle import decode, encode
from pneumo_experiments.errors import UserError

MASKS = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12))
PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


def slow_decode(text: str, rows: int, columns: int) -> np.ndarray:
    """The rule of the format, one pixel at a time."""
    mask = np.zeros((rows, columns), bool)
    numbers = [int(number) for number in text.split()]
    pixel = 0
    for gap, length in zip(numbers[::2], numbers[1::2], strict=True):
        pixel += gap
        for _ in range(length):
            mask[pixel % rows, pixel // rows] = True
            pixel += 1
    return mask


def slow_encode(mask: np.ndarray) -> str:
    """The rule of the format, one pixel at a time."""
    numbers = [0]
    for pixel in (bool(pixel) for column in mask.T for pixel in column):
        if pixel == (len(numbers) % 2 == 1):  # a gap ends, or a run
            numbers.append(0)
        numbers[-1] += 1
    return " ".join(map(str, numbers[: len(numbers) // 2 * 2])) or "-1"


@given(MASKS)
def test_decoding_an_encoded_mask_restores_it(mask: np.ndarray) -> None:
    assert np.array_equal(decode(encode(mask), mask.shape), mask)


@given(PAIRS, st.integers(1, 9))
def test_decoding_agrees_with_the_rule_pixel_by_pixel(pairs: list[tuple[int, int]], rows: int) -> None:
    text = " ".join(f"{gap} {length}" for gap, length in pairs)
    columns = sum(map(sum, pairs)) // rows + 1
    assert np.array_equal(decode(text, (rows, columns)), slow_decode(text, rows, columns))


@given(MASKS, st.sampled_from(["C", "F", "transposed", "every second", "mirrored"]))
def test_encoding_agrees_with_the_rule_however_the_pixels_lie_in_memory(mask: np.ndarray, lie: str) -> None:
    views = {
        "C": np.ascontiguousarray(mask),
        "F": np.asfortranarray(mask),
        "transposed": mask.T,
        "every second": mask[::2, ::2],
        "mirrored": mask[:, ::-1],
    }
    before = mask.copy()
    assert encode(views[lie]) == slow_encode(views[lie])
    assert np.array_equal(mask, before)


@given(PAIRS, st.sampled_from([" ", "  ", "\t", "\r\n", " \v\f", "\xa0", "\u2003", "\x1c"]), st.booleans())
def test_any_blanks_may_part_and_surround_the_numbers(
    pairs: list[tuple[int, int]], blank: str, around: bool
) -> None:
    numbers = [f"{number:03d}" for pair in pairs for number in pair]
    edge = blank if around else ""
    columns = sum(map(sum, pairs)) // 5 + 1
    expected = slow_decode(" ".join(numbers), 5, columns)
    assert np.array_equal(decode(edge + blank.join(numbers) + edge, (5, columns)), expected)


@pytest.mark.parametrize(("text", "pixels"), [("2 3", 3), ("-1", 0)])
def test_a_decoded_mask_can_be_painted_and_shares_nothing_with_the_next(text: str, pixels: int) -> None:
    decode(text, (3, 4))[:] = True
    assert np.count_nonzero(decode(text, (3, 4))) == pixels


def test_the_first_runs_of_a_real_annotation_lie_where_the_format_says() -> None:
    mask = decode("387620 23 996 33", (1024, 1024))
    expected = np.zeros((1024, 1024), bool)
    expected[548:571, 378] = True
    expected[543:576, 379] = True
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (3, 0), (0, 0)])
def test_minus_one_is_an_empty_mask_with_or_without_blanks(shape: tuple[int, int]) -> None:
    for text in ("-1", " -1", "-1 \r\n"):
        mask = decode(text, shape)
        assert mask.shape == shape
        assert not mask.any()
    assert encode(np.zeros(shape, bool)) == "-1"


NINES = int("9" * 18)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("3 2 1", "odd number of run lengths (3)"),
        ("12" * 9, "odd number of run lengths (1)"),
        ("3 -2", "'-2' is negative"),
        ("-1 4", "'-1' is negative"),
        *((f"{number} 2", f"'{number}' is not a whole number") for number in ("1_0", "+1", "0x1", "1e1")),
        *((f"3 {number}", f"'{number}' is not a whole number") for number in ("2.5", "x", "1,2")),
        *((f"{number} 2", "is not a whole number") for number in ("1\u0665", "1\x00")),
        *((f"1 {number}", "is not a whole number") for number in ("9" * 5000, "0" * 19)),
        ("1 2 " * 10**5 + "x", "'x' is not a whole number"),
        *((text, "reach pixel 13 of an image with 12") for text in ("0 13", "13 0")),
        (f"0 {NINES} 5 {NINES}", "of an image with 12"),
        ("5 9 " * 10**5, "reach pixel 1400000 of an image with 12"),
        (" ".join([str(NINES)] * 20), f"reach pixel {20 * NINES} of an image with 12"),
        *((blank, "no run lengths") for blank in ("", " \n")),
    ],
)
def test_bad_run_lengths_are_one_line_that_names_the_image(text: str, fault: str) -> None:
    with pytest.raises(UserError) as caught:
        decode(text, (3, 4), "image-7")
    message = str(caught.value)
    assert message.startswith("image-7: ")
    assert fault in message
    assert message.isprintable()
    assert len(message) < 200


def test_every_real_annotation_survives_decoding_and_encoding(real_data: Path) -> None:
    with gzip.open(real_data / "labels" / "train-rle.csv.gz", "rt") as table:
        texts = [row[1].strip() for row in csv.reader(table)][1:]
    assert len(texts) == 12954
    for number, text in enumerate(text for text in texts if text != "-1"):
        mask = decode(text, (1024, 1024))
        assert np.count_nonzero(mask.T) == sum(map(int, text.split()[1::2]))
        assert encode(mask) == text
        if number % 50 == 0:
            assert encode(np.ascontiguousarray(mask)) == text
