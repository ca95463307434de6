from __future__ import annotations

import numpy as np
import pytest

from pneumo_experiments.figures import (
    BACKGROUND,
    PREDICTION,
    TRUTH,
    contact_sheet,
    history_of_trials,
    overlay,
    pyplot_picture,
)


def square(top: int, left: int, side: int, shape: tuple[int, int] = (256, 256)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def radiograph(shape: tuple[int, int] = (256, 256)) -> np.ndarray:
    rows, columns = np.indices(shape)
    return ((rows + columns) * 255 // (rows + columns).max()).astype(np.uint8)


def panels(picture: np.ndarray, count: int, size_px: int) -> list[np.ndarray]:
    """The panels without captions, located by the layout: equal gaps, in one row."""
    gap = (picture.shape[1] - count * size_px) // (count + 1)
    text = picture.shape[0] - size_px - 4 * gap  # two lines
    top = 2 * gap + text // 2
    lefts = [gap + i * (size_px + gap) for i in range(count)]
    return [picture[top : top + size_px, left : left + size_px].astype(int) for left in lefts]


def reddish(picture: np.ndarray) -> np.ndarray:
    return picture[..., 0] > picture[..., 2] + 20


def greenish(picture: np.ndarray) -> np.ndarray:
    return picture[..., 1] > picture[..., 0] + 20


def test_each_mask_is_drawn_in_its_colour_on_its_own_panel() -> None:
    picture = overlay(radiograph(), square(40, 40, 80), square(140, 120, 60), "Dice 0.00", size_px=256)
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    plain, truth, prediction = panels(picture, 3, 256)
    assert np.abs(plain - radiograph()[..., None]).max() <= 2
    assert not reddish(truth).any()
    assert not greenish(prediction).any()
    assert greenish(truth)[45:115, 45:115].mean() > 0.3
    assert not greenish(truth)[130:, :].any()
    assert reddish(prediction)[145:195, 125:175].mean() > 0.3
    assert not reddish(prediction)[:130, :].any()


def test_an_outline_is_two_pixels_wide_and_stands_on_the_edge() -> None:
    mask = square(64, 64, 128)
    plain, *masked = panels(overlay(radiograph(), mask, mask, "", size_px=256), 3, 256)
    for panel, colour in zip(masked, (TRUTH, PREDICTION), strict=True):
        line = (np.abs(panel - np.array(colour)) <= 3).all(axis=2)
        assert np.flatnonzero(line[128]).tolist() == [63, 64, 191, 192]
        touched = (panel != plain).any(axis=2)
        assert np.flatnonzero(touched[128]).tolist() == list(range(63, 193))


def test_an_empty_mask_leaves_its_panel_as_it_is() -> None:
    none = np.zeros((256, 256), bool)
    plain, truth, prediction = panels(overlay(radiograph(), none, none, "Dice 1.00", 256), 3, 256)
    assert np.array_equal(plain, truth)
    assert np.array_equal(plain, prediction)


def test_without_truth_there_are_two_panels() -> None:
    picture = overlay(radiograph(), None, square(40, 40, 80), "presence 0.93", size_px=256)
    plain, prediction = panels(picture, 2, 256)
    assert not reddish(plain).any()
    assert reddish(prediction).any()
    whole = picture.astype(int)
    assert not (np.abs(whole - np.array(TRUTH)) < 20).all(axis=2).any()


def test_a_single_native_pixel_is_still_seen() -> None:
    large = (2048, 2048)
    none = np.zeros(large, bool)
    speck = square(1001, 777, 1, large)
    _, _, prediction = panels(overlay(np.zeros(large, np.uint8), none, speck, "", 128), 3, 128)
    assert reddish(prediction).sum() >= 4


def test_a_long_caption_is_cut_and_changes_no_size() -> None:
    arguments = (radiograph(), None, square(40, 40, 80))
    short, long = overlay(*arguments, "Dice 0.87"), overlay(*arguments, "Dice\n0.87 " * 100)
    assert short.shape == long.shape
    assert not np.array_equal(short, long)
    assert (long[:, -8:] == BACKGROUND).all()


@pytest.mark.parametrize(("shape", "panel"), [((100, 200), (64, 128)), ((300, 100), (128, 43))])
def test_a_panel_keeps_the_aspect_of_the_radiograph(shape: tuple[int, int], panel: tuple[int, int]) -> None:
    picture = overlay(radiograph(shape), None, square(0, 0, 20, shape), "", size_px=128)
    wide = overlay(radiograph((128, 128)), None, square(0, 0, 20, (128, 128)), "", size_px=128)
    assert wide.shape[0] - picture.shape[0] == 128 - panel[0]
    assert wide.shape[1] - picture.shape[1] == 2 * (128 - panel[1])


def test_a_contact_sheet_holds_every_picture_whole_in_reading_order() -> None:
    sizes = [(20, 30), (40, 10), (15, 25), (33, 33), (8, 50)]
    pictures = [np.full((*size, 3), 60 + 30 * i, np.uint8) for i, size in enumerate(sizes)]
    sheet = contact_sheet(pictures, columns=3)
    corners = []
    for i, size in enumerate(sizes):
        rows, columns = np.nonzero((sheet == 60 + 30 * i).all(axis=2))
        assert len(rows) == size[0] * size[1]
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == size
        corners.append((rows.max(), rows.min(), columns.max(), columns.min()))
    assert corners[0][2] < corners[1][3] and corners[1][2] < corners[2][3]
    assert max(corner[0] for corner in corners[:3]) < min(corner[1] for corner in corners[3:])
    middle = (corners[1][2] + corners[1][3]) / 2
    assert abs(middle - (corners[4][2] + corners[4][3]) / 2) <= 1
    assert (sheet[0] == BACKGROUND).all() and (sheet[:, -1] == BACKGROUND).all()


def test_fewer_pictures_than_columns_make_a_narrow_sheet() -> None:
    picture = np.zeros((10, 10, 3), np.uint8)
    assert contact_sheet([picture], columns=4).shape[1] < 40


def test_a_style_that_a_pyplot_picture_sets_ends_with_it() -> None:
    from matplotlib import pyplot

    before = pyplot.rcParams["axes.facecolor"]

    def draw() -> None:
        pyplot.style.use("ggplot")
        assert pyplot.rcParams["axes.facecolor"] != before
        pyplot.plot([0, 1])

    assert pyplot_picture(draw).std() > 1
    assert pyplot.rcParams["axes.facecolor"] == before


def test_the_history_shows_pruned_trials_with_a_mark_of_their_own() -> None:
    complete, best = [(0, 0.7), (2, 0.8)], [(0, 0.7), (2, 0.8)]
    orange = np.array([255, 127, 14])  # Matplotlib's second colour
    counts = [
        (history_of_trials({"complete": complete, "pruned": pruned}, best) == orange).all(axis=2).sum()
        for pruned in ([], [(1, 0.6)])
    ]
    assert counts[0] == 0 < counts[1]
