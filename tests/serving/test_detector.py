"""Detectors: several models as one, and batches of files."""

from __future__ import annotations

import gzip
import io
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from dicom_files import GREYS, dicom_bytes, jpeg_file
from PIL import Image
from tiny_network import tiny_member

from pneumo_experiments.errors import UserError
from pneumo_experiments.metrics.thresholds import NativeThresholds, Thresholds
from pneumo_experiments.serving import Detector, make_ensemble

pytestmark = pytest.mark.usefixtures("tiny")


def detector(seed: int, **fields: Any) -> Detector:
    """Of a training with these settings, that saw one image of its own."""
    own = {
        name: fields.pop(name) for name in ("image_size", "thresholds", "data_fingerprint") if name in fields
    }
    one = Detector((tiny_member(seed, **fields),), 32, Thresholds(), "a", frozenset({f"image {seed}"}))
    return replace(one, **own)


def test_a_joined_model_has_seen_what_any_has_and_its_thresholds_are_means() -> None:
    several = [
        detector(0, thresholds=Thresholds(0.2, 0.6, 100, 0.3), fold="0"),
        detector(1, thresholds=Thresholds(0.7, 0.9, 201, 0.32), fold="1"),
        detector(2, thresholds=Thresholds(0.3, 0.7, 300, 0.4), fold="1", folds=3),
    ]
    for some in itertools.permutations(several):
        joined = make_ensemble(some)
        assert joined.training_images == {"image 0", "image 1", "image 2"}
        assert vars(joined.thresholds) == pytest.approx(vars(Thresholds(0.4, 0.73, 200, 0.34)), abs=1e-12)
        assert joined.thresholds == make_ensemble(several).thresholds
    assert [member.settings["fold"] for member in make_ensemble(several).members] == ["0", "1", "1"]
    natives = [replace(one, thresholds=NativeThresholds(*vars(one.thresholds).values())) for one in several]
    assert make_ensemble(natives).thresholds == NativeThresholds(
        *vars(make_ensemble(several).thresholds).values()
    )
    assert make_ensemble([natives[0], *several[1:]]).thresholds == make_ensemble(several).thresholds
    flat = make_ensemble([make_ensemble(several[:2]), several[2]])
    assert len(flat.members) == 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image_size": 64}, "one image size, but these were trained on images of 32 and 64 px"),
        ({"data_fingerprint": "b"}, "one data set, but these were trained on two"),
        ({"holdout": 0.3}, "holdout=0.2 split_seed=0 and holdout=0.3 split_seed=0: what one holds out has"),
        ({"split_seed": 7}, "holdout=0.2 split_seed=0 and holdout=0.2 split_seed=7: what one holds out has"),
    ],
)
def test_models_that_cannot_be_one_are_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as error:
        make_ensemble([detector(0), detector(1), detector(2, **changes)])
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_png_picture_and_a_gzip_file_are_answered_like_their_dicom_file() -> None:
    picture = io.BytesIO()
    Image.fromarray(GREYS).save(picture, "PNG")
    contents = [dicom_bytes(GREYS), picture.getvalue(), gzip.compress(dicom_bytes(GREYS))]
    original, *others = detector(0).detect([(str(n), content) for n, content in enumerate(contents)])
    assert original.error == ""
    for other in others:
        assert (other.error, other.presence) == ("", pytest.approx(original.presence, abs=1e-6))
        assert other.mask is not None
        assert np.array_equal(other.mask, original.mask)


def test_a_batch_of_any_size_keeps_its_order_and_its_outputs() -> None:
    files = [(str(n), b"no DICOM" if n % 5 == 4 else jpeg_file(GREYS)) for n in range(37)]
    one = detector(0)
    findings = list(one.detect(files))
    assert [finding.image_id for finding in findings] == [image_id for image_id, _ in files]
    assert [bool(finding.error) for finding in findings] == [n % 5 == 4 for n in range(37)]
    (alone,) = one.detect(files[:1])
    presences = [finding.presence for finding in findings if not finding.error]
    assert presences == [pytest.approx(alone.presence, abs=1e-5)] * 30
    assert [finding.error for finding in one.detect(files[4:5])] == ["4: not a DICOM file"]
    assert not list(one.detect([]))
