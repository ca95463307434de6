"""Masks at native size, upsampled and thresholded on the device where the network computes.

A probability map at native size takes 4 MB, its mask a quarter of that: only masks are copied to the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pneumo_experiments.learning.evaluate import MAX_PIXELS_AT_ONCE, group_by_shape


@torch.inference_mode()
def outline(
    masks: Sequence[Tensor],
    shapes: Sequence[tuple[int, int]],
    *,
    top_score: float,
    least_core_px: Sequence[int],
    bottom_score: float,
) -> list[NDArray[np.bool_]]:
    """The mask (H, W) of each probability map (S, S), float32, for its native size; all present.

    ``least_core_px`` are the native pixels that must reach ``top_score``, of each.
    As ``scoring.thresholds.apply_thresholds`` does it on the host, which is faster for a CPU. The scores are
    float32 numbers. Images of one size are upsampled together.
    """
    found: dict[int, NDArray[np.bool_]] = {}
    for rows in group_by_shape(shapes, MAX_PIXELS_AT_ONCE):
        # One row at a time: the host would wait while a list of indices is copied to the device.
        small = torch.stack([masks[row] for row in rows])[:, None]
        native = functional.interpolate(small, size=shapes[rows[0]], mode="bilinear", align_corners=False)[
            :, 0
        ]
        outlined = native >= bottom_score
        if (least := least_core_px[rows[0]]) > 0:
            core = (native >= top_score).flatten(1).sum(1) >= least
            outlined &= core[:, None, None]
        found |= zip(rows, outlined.cpu().numpy(), strict=True)
    return [found[row] for row in range(len(masks))]
