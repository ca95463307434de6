"""Trained networks with their thresholds, from DICOM bytes to masks."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from math import fsum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.dataset.decoder_pool import DecodedImage, File, decode_all
from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.device import choose_compute_for
from pneumo_experiments.learning.predict import Ensemble, Prediction, Predictor, to_native
from pneumo_experiments.scoring.thresholds import Thresholds, apply_thresholds
from pneumo_experiments.settings import AUTO, Device, SplitSettings, from_flat

BATCH_SIZE = 16  # radiographs


class Finding(NamedTuple):
    """The model's output for one radiograph; where it cannot be read, only id and ``error`` are set.

    ``mask`` is boolean at native size (H, W), ``pixels`` what the networks saw: 8 bit (S, S).
    """

    image_id: str
    presence: float | None = None
    mask: NDArray[np.bool_] | None = None
    pixels: NDArray[np.uint8] | None = None
    error: str = ""


@dataclass(frozen=True)
class Member:
    """A predictor and the settings that trained its network."""

    predictor: Predictor
    settings: Mapping[str, Any]

    @property
    def split(self) -> SplitSettings:
        """How its data set was split."""
        return from_flat(SplitSettings, self.settings)


@dataclass(frozen=True)
class Detector:
    """One or several networks, their input size in pixels, and the thresholds for their mean probabilities.

    ``seen`` holds digests of the images that trained them or chose their epochs and thresholds.
    """

    members: tuple[Member, ...]
    image_size: int
    thresholds: Thresholds
    data_fingerprint: str
    seen: frozenset[str] = frozenset()

    @property
    def predictor(self) -> Ensemble:
        """The mean of the members."""
        return Ensemble(tuple(member.predictor for member in self.members))

    @property
    def networks(self) -> str:
        """The different networks of the members, with commas between."""
        return ",".join(dict.fromkeys(str(member.settings["network"]) for member in self.members))

    @property
    def ttas(self) -> str:
        """The different test-time augmentations of the members, with commas between."""
        return ",".join(dict.fromkeys(member.predictor.tta for member in self.members))

    @property
    def precisions(self) -> str:
        """The different number formats of the members, with commas between."""
        return ",".join(dict.fromkeys(member.predictor.compute.precision for member in self.members))

    def on(self, settings: Device) -> Detector:
        """The same on that device, each member in the format of its training unless the settings name one."""

        def moved(member: Member) -> Member:
            predictor = member.predictor
            compute = choose_compute_for(predictor.compute.precision, settings)
            return replace(member, predictor=replace(predictor, compute=compute))

        return replace(self, members=tuple(map(moved, self.members)))

    def with_thresholds(self, given: Mapping[str, float | None]) -> Detector:
        """The same with the thresholds that are given; None stands for the model's own.

        Raises UserError for values out of range.
        """
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(self, thresholds=replace(self.thresholds, **changes))

    def with_tta(self, tta: str) -> Detector:
        """The same with that test-time augmentation for all members; auto leaves each its own."""
        if tta == AUTO:
            return self
        members = (replace(member, predictor=replace(member.predictor, tta=tta)) for member in self.members)
        return replace(self, members=tuple(members))

    def detect(self, files: Iterable[File]) -> Generator[Finding]:
        """Presence and mask of each radiograph, in order; an unusable file has its error in its finding.

        Files (image id, DICOM bytes) are read slightly ahead, decoded in parallel and predicted in batches.
        """
        predictor = self.predictor
        with closing(decode_all(files, self.image_size)) as decoded:
            while batch := list(islice(decoded, BATCH_SIZE)):
                pixels = [image.pixels for _, image in batch if isinstance(image, DecodedImage)]
                predictions = predictor.predict(np.stack(pixels), BATCH_SIZE) if pixels else iter(())
                for image_id, image in batch:
                    if isinstance(image, DecodedImage):
                        yield self._finding(image_id, image, next(predictions))
                    else:
                        yield Finding(image_id, error=str(image))

    def _finding(self, image_id: str, image: DecodedImage, prediction: Prediction) -> Finding:
        native = to_native(prediction.mask, (image.rows, image.columns))
        mask = apply_thresholds(native, prediction.presence, self.thresholds)
        return Finding(image_id, prediction.presence, mask, image.pixels)


def join(detectors: Sequence[Detector]) -> Detector:
    """The ensemble of all members of n >= 1 models; each of its thresholds is the mean of the models'.

    Raises UserError for models of different image sizes, and for models with different hold-outs: patients
    that one has never seen would have trained another.
    """
    first = detectors[0]
    for other in detectors[1:]:
        if first.image_size != other.image_size:
            raise UserError(
                "model: an ensemble needs models of one image size, but these were trained on images of"
                f" {first.image_size} and {other.image_size} px"
            )
        if first.data_fingerprint != other.data_fingerprint:
            raise UserError(
                "model: an ensemble needs models of one data set, but these were trained on two: what one"
                " holds out may have trained another"
            )
    members = tuple(member for detector in detectors for member in detector.members)
    holdouts = dict.fromkeys((member.split.holdout, member.split.split_seed) for member in members)
    if len(holdouts) > 1:
        texts = " and ".join(f"holdout={holdout} split_seed={seed}" for holdout, seed in holdouts)
        raise UserError(
            f"model: an ensemble needs models with one hold-out, but these were trained with {texts}: what"
            " one holds out has trained another; train with the same holdout and split_seed"
        )
    return replace(
        first,
        members=members,
        thresholds=_mean_thresholds([detector.thresholds for detector in detectors]),
        seen=frozenset[str]().union(*(detector.seen for detector in detectors)),
    )


def _mean_thresholds(several: Sequence[Thresholds]) -> Thresholds:
    """The mean of each threshold, whatever their order; scores are rounded to hundredths, areas to pixels."""
    count = len(several)
    return Thresholds(
        presence_threshold=fsum(one.presence_threshold for one in several) / count,
        top_score=round(fsum(one.top_score for one in several) / count, 2),
        min_area_px=round(sum(one.min_area_px for one in several) / count),
        bottom_score=round(fsum(one.bottom_score for one in several) / count, 2),
    )
