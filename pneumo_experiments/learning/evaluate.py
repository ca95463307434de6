"""How many pixels of a prediction reach each hundredth, counted on the device where the network computes.

A probability map at native size takes 4 MB, its two tables less than 1 kB: only they come to the host.
"""
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pneumo_experiments.learning.device import copied_to
from pneumo_experiments.learning.predict import Predictor, require_finite

AT_ONCE = 2**23  # native pixels, about 30 bytes each while they are counted


class ThresholdCounter:
    """Counts predictions against the truth on the predictor's device; nothing comes back before ``read``."""

    def __init__(self, predictor: Predictor, hundredths: NDArray[np.float32]) -> None:
        """``hundredths`` (101,) from 0 to 1 are the numbers that pixels are compared with."""
        self._predictor = predictor
        device = predictor.compute.device
        self._hundredths = copied_to(device, torch.from_numpy(hundredths))
        # A CPU counts one image in its cache; with several it waits for memory, twice as long and more.
        self._at_once = 0 if device.type == "cpu" else AT_ONCE
        self._tables = [self._hundredths.new_empty((0, 2, 101), dtype=torch.int32)]
        self._presence = [self._hundredths.new_empty(0)]

    def add(self, images: NDArray[np.uint8], truths: Iterable[NDArray[np.bool_]]) -> None:
        """Predicts 8-bit images (n, S, S) and counts them, given the truth (H, W) of each at native size."""
        following = iter(truths)
        for masks, presence in self._predictor.answers(images):
            some = list(islice(following, len(masks)))
            self._tables.append(count_at_thresholds(masks, some, self._hundredths, self._at_once))
            self._presence.append(presence)

    def read(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Tables (n, 2, 101) as ``count_at_thresholds`` gives them, and presences (n,), in order.

        UserError where the network's answers are no numbers.
        """
        presence, tables = torch.cat(self._presence), torch.cat(self._tables)
        # In one piece, so that the host waits for the device once.
        both = torch.cat([presence.view(torch.int32)[:, None], tables.flatten(1)], dim=1).cpu().numpy()
        presence = np.ascontiguousarray(both[:, 0]).view(np.float32)
        require_finite(presence)
        return np.ascontiguousarray(both[:, 1:]).reshape(-1, 2, 101), presence


@torch.inference_mode()
def count_at_thresholds(
    masks: Tensor, truths: Sequence[NDArray[np.bool_]], hundredths: Tensor, at_once: int = 0
) -> Tensor:
    """Pixels at or above each hundredth (n, 2, 101), int32: in all, and those within the truth.

    Probabilities (n, S, S), float32, are interpolated to the size of each truth (H, W) as ``to_native`` does.
    Nan is taken for 0. Images of one size are counted together, up to ``at_once`` native pixels.
    """
    if len(masks) != len(truths):
        raise ValueError(f"{len(masks)} predictions for {len(truths)} truths")
    tables = torch.empty((len(masks), 2, 101), dtype=torch.int32, device=masks.device)
    for rows in _alike([truth.shape for truth in truths], at_once):
        # Rows are taken one by one: a list of indices would travel to the device, and be waited for.
        some = torch.stack([masks[row] for row in rows])
        inside = torch.zeros((len(rows), *truths[rows[0]].shape), dtype=torch.bool, device=masks.device)
        for place, row in enumerate(rows):
            if truths[row].any():  # most are empty
                inside[place].copy_(copied_to(masks.device, torch.from_numpy(truths[row])))
        for row, table in zip(rows, _count_alike(some, inside, hundredths), strict=True):
            tables[row] = table
    return tables


def _alike(shapes: Sequence[tuple[int, ...]], at_once: int) -> list[list[int]]:
    """Rows of images to be counted together: of one shape, and a single one or up to ``at_once`` pixels."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(row)
    chunks: list[list[int]] = []
    for shape, rows in groups.items():
        size = max(1, at_once // int(np.prod(shape)))
        chunks += [rows[start : start + size] for start in range(0, len(rows), size)]
    return chunks


def _count_alike(masks: Tensor, inside: Tensor, hundredths: Tensor) -> Tensor:
    """Tables (n, 2, 101) of probabilities (n, S, S) and truths (n, H, W) of one size."""
    size = (inside.shape[1], inside.shape[2])
    # The nan of a network that diverged would index past the end; the error comes when all is read.
    small = masks.nan_to_num(0.0)[:, None]
    native = functional.interpolate(small, size=size, mode="bilinear", align_corners=False)[:, 0]
    # 0 to 100 where the truth is False, 101 to 201 where it is True.
    code = _levels(native, hundredths).add_(inside.view(torch.uint8), alpha=101).int().long()
    # bincount would make the host wait for the size of its answer. A table for each row of pixels keeps apart
    # what would else contend for one number, since most pixels of a radiograph are at level 0.
    by_row = torch.zeros((*code.shape[:2], 202), dtype=torch.int32, device=code.device)
    by_row.scatter_add_(2, code, torch.ones_like(code, dtype=torch.int32))
    outside, within = by_row.sum(1, dtype=torch.int32).view(-1, 2, 101).flip(-1).cumsum(-1).flip(-1).unbind(1)
    return torch.stack((outside + within, within), 1).int()


def _levels(native: Tensor, hundredths: Tensor) -> Tensor:
    """Level 0 to 100 of each probability (n, H, W), float32: the hundredths from 0.01 up that it reaches.

    As ``scoring.thresholds.levels``: a product that is never too high, then one exact comparison. In float32,
    since a CPU compares, adds and counts mixed types several times more slowly.
    """
    following = functional.pad(hundredths[1:], (0, 1), value=float("inf"))
    level = (native * 99.999).floor_()
    return level.add_(following.index_select(0, level.view(-1).int()).view_as(native).le_(native))
