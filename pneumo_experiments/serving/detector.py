"""Trained networks with their thresholds, from DICOM bytes to masks."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from math import fsum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.dataset.decoder_pool import MAX_FILE_BYTES, DecodedImage, File, decode_all
from pneumo_experiments.dicom.header import Geometry
from pneumo_experiments.errors import Rejected, UserError, reason_of
from pneumo_experiments.learning.calibration import log_odds
from pneumo_experiments.learning.device import choose_compute
from pneumo_experiments.learning.predict import BatchPrediction, Ensemble, Predictor, read_presence, to_native
from pneumo_experiments.learning.threshold_counts import masks_on_device
from pneumo_experiments.metrics.thresholds import NativeThresholds, Thresholds, apply_thresholds
from pneumo_experiments.settings import AUTO, Device, SplitSettings, from_flat

BATCH_SIZE = 16  # radiographs

Decoded = Sequence[tuple[str, DecodedImage | Rejected]]  # image ids, and images or why they cannot be used


class Finding(NamedTuple):
    """The model's output for one radiograph; where it cannot be read, only id and ``error`` are set.

    ``mask`` is boolean at native size (H, W), ``pixels`` what the networks saw: 8 bit (S, S). ``source`` is
    what a DICOM object about the image repeats of its header, if that was asked for.
    """

    image_id: str
    presence: float | None = None
    mask: NDArray[np.bool_] | None = None
    pixels: NDArray[np.uint8] | None = None
    geometry: Geometry | None = None
    source: Mapping[str, str] | None = None
    error: str = ""


@dataclass(frozen=True)
class TrainedNetwork:
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

    ``training_images`` holds digests of the images, and of their patients, that trained them or chose their
    epochs and thresholds. ``prevalence`` is the fraction of positives among these images; None if unknown.
    The torch modules are ``members[k].predictor.network``.

    >>> detector = load_model("model")
    >>> for finding in detector.detect_files(["radiographs/a.dcm", "radiographs/no.dcm"]):
    ...     print(finding.error or (finding.image_id, finding.mask.shape))
    ('a', (1024, 1024))
    no: cannot be read (No such file or directory)
    >>> stricter = detector.with_thresholds({"presence_threshold": 0.9})
    >>> images = torch.zeros(2, 1, detector.image_size, detector.image_size)
    >>> detector.members[0].predictor.network(images).mask.shape
    torch.Size([2, 16, 16])
    """

    members: tuple[TrainedNetwork, ...]
    image_size: int
    thresholds: Thresholds
    data_fingerprint: str
    training_images: frozenset[str] = frozenset()
    prevalence: float | None = None

    @property
    def predictor(self) -> Ensemble:
        """The mean of the members."""
        return Ensemble(tuple(member.predictor for member in self.members))

    @property
    def networks(self) -> str:
        """The different networks of the members, with commas between."""
        return _listed(member.settings["network"] for member in self.members)

    @property
    def ttas(self) -> str:
        """The different test-time augmentations of the members, with commas between."""
        return _listed(member.predictor.tta for member in self.members)

    @property
    def precisions(self) -> str:
        """The different number formats of the members, with commas between."""
        return _listed(member.predictor.compute.precision for member in self.members)

    def on(self, settings: Device) -> Detector:
        """The same on that device, each member in the format of its training unless the settings name one."""
        return self._with_predictors(
            lambda one: replace(one, compute=choose_compute(settings, one.compute.precision))
        )

    def with_thresholds(self, given: Mapping[str, float | None]) -> Detector:
        """The same with the thresholds that are given; None stands for the model's own.

        Raises UserError for values out of range.
        """
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(self, thresholds=replace(self.thresholds, **changes))

    def at_prevalence(self, prevalence: float | None) -> Detector:
        """The same where that fraction of the radiographs has a pneumothorax; None: as in its training.

        The log-odds of presence move by the difference of those of both prevalences (Saerens, Latinne,
        Decaestecker, Adjusting the Outputs of a Classifier to New a Priori Probabilities, 2002). Raises
        UserError for a value out of range, and if the model does not know the prevalence of its training.
        """
        if prevalence is None:
            return self
        trained_on = self.prevalence or 0.0
        if not (0 < prevalence < 1 and 0 < trained_on < 1):
            raise UserError(
                f"prevalence={prevalence}: needs a fraction between 0 and 1, and a model that holds that of"
                f" its training; this one holds {self.prevalence}"
            )
        shift = log_odds(prevalence) - log_odds(trained_on)
        return self._with_predictors(
            lambda one: replace(one, calibration=replace(one.calibration, bias=one.calibration.bias + shift))
        )

    def with_tta(self, tta: str) -> Detector:
        """The same with that test-time augmentation for all members; auto leaves each its own."""
        if tta == AUTO:
            return self
        return self._with_predictors(lambda one: replace(one, tta=tta))

    def _with_predictors(self, change: Callable[[Predictor], Predictor]) -> Detector:
        members = (replace(member, predictor=change(member.predictor)) for member in self.members)
        return replace(self, members=tuple(members))

    def detect(self, dicom: bytes, image_id: str = "image") -> Finding:
        """Presence and mask of one radiograph: the bytes of a DICOM file, or of a PNG or JPEG copy.

        Raises Rejected, a UserError, with the reason why it cannot be used.

        >>> finding = load_model("model").detect(Path("radiographs/a.dcm").read_bytes())
        >>> 0 <= finding.presence <= 1, finding.mask.dtype, finding.mask.shape
        (True, dtype('bool'), (1024, 1024))
        """
        (finding,) = self.detect_each([(image_id, dicom)])
        if finding.error:
            raise Rejected(finding.error)
        return finding

    def detect_files(self, paths: Iterable[Path | str]) -> Generator[Finding]:
        """Presence and mask of each file, in order; its image id is its name without the suffix.

        An unusable file has its error in its finding. Files are read slightly ahead, and never all at once.

        >>> detector = load_model("model")
        >>> findings = detector.detect_files(sorted(Path("radiographs").glob("*.dcm")))
        >>> [(finding.image_id, rle.encode(finding.mask)) for finding in findings]
        [('a', '...'), ('b', '...')]
        """
        return self.detect_each(map(_read, map(Path, paths)))

    def detect_each(self, files: Iterable[File], with_source: bool = False) -> Generator[Finding]:
        """Presence and mask of each radiograph, in order; an unusable file has its error in its finding.

        Files (image id, DICOM bytes) are read slightly ahead, decoded in parallel and predicted in batches.
        ``with_source`` adds what a DICOM object about the image repeats of its header.
        """
        predictor = self.predictor
        finished: Iterable[Finding] = ()
        with closing(decode_all(files, self.image_size, with_source=with_source)) as decoded:
            while batch := list(islice(decoded, BATCH_SIZE)):
                pixels = [image.pixels for _, image in batch if isinstance(image, DecodedImage)]
                predicted = next(predictor.predict_batches(np.stack(pixels), BATCH_SIZE)) if pixels else None
                yield from finished  # while a GPU computes the next ones
                finished = self._findings(batch, predicted)
                if predicted is not None and predicted.mask.device.type != "cpu":
                    finished = list(finished)
            yield from finished

    def _findings(self, batch: Decoded, predicted: BatchPrediction | None) -> Iterator[Finding]:
        """The findings of a batch, in order; ``predicted`` are its radiographs that could be read."""
        images = [image for _, image in batch if isinstance(image, DecodedImage)]
        outputs: Iterator[tuple[float, NDArray[np.bool_]]] = iter(())
        if predicted is not None:
            presences: list[float] = read_presence(predicted).tolist()
            outputs = zip(presences, self._masks(predicted, presences, images), strict=True)
        for image_id, image in batch:
            if isinstance(image, DecodedImage):
                presence, mask = next(outputs)
                yield Finding(image_id, presence, mask, image.pixels, image.geometry, image.source)
            else:
                yield Finding(image_id, error=str(image))

    def _masks(
        self, predicted: BatchPrediction, presences: Sequence[float], images: Sequence[DecodedImage]
    ) -> Iterator[NDArray[np.bool_]]:
        """Mask of each image at native size; only those with presence are upsampled, on a GPU together."""
        shapes = [(image.rows, image.columns) for image in images]
        present = [row for row, presence in enumerate(presences) if self.thresholds.are_reached(presence)]
        maps = [predicted.mask[row] for row in present]
        masks = (  # one at a time
            apply_thresholds(to_native(each.numpy(), shapes[row]), presences[row], self.thresholds)
            for each, row in zip(maps, present, strict=True)
        )
        if predicted.mask.device.type != "cpu":
            masks = iter(masks_on_device(maps, [shapes[row] for row in present], self.thresholds))
        for row, shape in enumerate(shapes):
            yield next(masks) if row in present else np.zeros(shape, np.bool_)


def _read(path: Path) -> File:
    """The image id and the bytes of a file, or the reason why it has none."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            reason = f"rejected because a file may have {MAX_FILE_BYTES:,} bytes at most"
        elif path.is_file():
            return path.stem, path.read_bytes()
        else:
            reason = "is no file"  # a pipe would block
    except OSError as error:
        reason = f"cannot be read ({reason_of(error)})"
    except ValueError:
        reason = "is no file: its path has a null character"
    return path.stem, Rejected(f"{path.stem}: {reason}")


def _listed(values: Iterable[object]) -> str:
    return ",".join(dict.fromkeys(map(str, values)))


def make_ensemble(detectors: Sequence[Detector]) -> Detector:
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
        training_images=frozenset[str]().union(*(one.training_images for one in detectors)),
        prevalence=first.prevalence if len({detector.prevalence for detector in detectors}) == 1 else None,
    )


def _mean_thresholds(several: Sequence[Thresholds]) -> Thresholds:
    """The mean of each threshold, whatever their order; scores are rounded to hundredths, areas to pixels."""
    count = len(several)
    kind = NativeThresholds if all(one.min_area_of is None for one in several) else Thresholds
    return kind(
        presence_threshold=fsum(one.presence_threshold for one in several) / count,
        top_score=round(fsum(one.top_score for one in several) / count, 2),
        min_area_px=round(sum(one.min_area_px for one in several) / count),
        bottom_score=round(fsum(one.bottom_score for one in several) / count, 2),
    )
