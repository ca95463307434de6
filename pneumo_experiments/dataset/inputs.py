"""What determines a data set: files, their labels and patients, and the settings; read and compared."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pneumo_experiments.dataset.annotations import (
    ANNOTATIONS,
    FILE_NAMES,
    match_ids,
    read_annotations,
    read_file_names,
    read_table,
)
from pneumo_experiments.dataset.labels import Label, run_length_labels
from pneumo_experiments.dataset.packed_image import salted
from pneumo_experiments.dataset.patients import Grouping, make_grouping, source_of, warn
from pneumo_experiments.dataset.shards import LabelledFile
from pneumo_experiments.dicom.archive import Archive, open_archive
from pneumo_experiments.dicom.containers import DicomFile
from pneumo_experiments.errors import Rejected, UserError
from pneumo_experiments.progress_bar import ProgressBar
from pneumo_experiments.settings import NONE, Preprocess
from pneumo_experiments.words import plural

# The inputs that a data set records in its settings, and their names in messages.
RECORDED = {
    "image_size": "image_size",
    "pixel_dtype": "pixel_dtype",
    "max_pixels": "max_pixels",
    "rle_csv": "annotations",
    "patients_csv": "patients",
    "salt": "PNEUMO_PATIENT_SALT",
    "rle_size": "rle_size",
    "masks": "masks",
}
STAMP, FILES = "stamp", "files"  # recorded too: digests of the files' sizes and times, and of their contents
FileNames = Mapping[str, tuple[str, bool]]  # by name of a file: image id, and whether it has a pneumothorax


@dataclass(frozen=True)
class Inputs:
    """Everything that determines a data set; ``members`` are the files to read."""

    archive: Archive
    labels: dict[str, Label] | None  # None for a set without labels
    grouping: Grouping
    members: tuple[DicomFile, ...]
    max_pixels: int
    recorded: dict[str, str]  # the values of ``RECORDED``

    @property
    def stamp(self) -> str:
        """Digest that changes with the size or modification time of a file, and the place of a mask."""
        masks = {image_id: f" {label.key}" for image_id, label in (self.labels or {}).items() if label.file}
        return digest(f"{m.image_id} {m.size} {m.stamp}{masks.get(m.image_id, '')}" for m in self.members)

    def differences(self, recorded: Mapping[str, str]) -> list[str]:
        """How the inputs recorded in an existing data set differ from these; empty if they are the same."""
        differences = [
            _describe_difference(name, str(recorded.get(name)), str(self.recorded.get(name)))
            for name in RECORDED
            if recorded.get(name) != self.recorded.get(name)
        ]
        # Copied or touched files have other stamps; only their content decides.
        if differences or recorded.get(STAMP) == self.stamp or recorded.get(FILES) == self._hash_contents():
            return differences
        return ["other images or masks" if "masks" in self.recorded else "other DICOM files"]

    def _hash_contents(self) -> str:
        def lines() -> Iterator[str]:
            with ProgressBar("compare", len(self.members), "file") as bar:
                for member in self.members:
                    file, content = LabelledFile(root, member, labels.get(member.image_id), ""), ""
                    with suppress(Rejected):
                        *_, content = file.read(self.max_pixels)
                    yield f"{member.image_id} {content}"
                    bar.update()

        root, labels = self.archive.root, self.labels or {}

        return digest(lines())


def digest(lines: Iterable[str]) -> str:
    """SHA-256 of lines, in hexadecimal digits."""
    result = hashlib.sha256()
    for line in lines:
        result.update(f"{line}\n".encode())
    return result.hexdigest()


def read_inputs(settings: Preprocess) -> Inputs:
    """The files, labels and patients that the settings name; UserError if they do not belong together."""
    source = settings.source
    dicom_dir, masks_dir, rle_csv = source.dicom_dir, source.masks_dir, source.rle_csv
    if dicom_dir is None:
        raise UserError("dicom_dir: none given; name the folder that holds the DICOM files")
    if masks_dir is not None and masks_dir.resolve() == dicom_dir.resolve():
        raise UserError("masks_dir: is dicom_dir; name the folder that holds the masks alone")
    texts, names, table_digest = None, dict[str, tuple[str, bool]](), NONE
    if rle_csv is not None:
        content = read_table(rle_csv, ANNOTATIONS if masks_dir is None else FILE_NAMES)
        table_digest = hashlib.sha256(content).hexdigest()
        if masks_dir is None:
            texts = read_annotations(rle_csv, content)
        else:
            names = read_file_names(rle_csv, content)
    new_names = {name: image_id for name, (image_id, _) in names.items()}
    try:
        archive = open_archive(dicom_dir, source.image_id, texts or names, other=masks_dir, names=new_names)
    except UserError as error:
        raise UserError(f"dicom_dir={error}") from None
    labels = None
    if masks_dir is not None:
        labels = _mask_labels(archive, masks_dir, names)
    elif texts is not None:
        labels = run_length_labels(match_ids(texts, archive.image_ids), source.rle_size)
        if not archive.image_ids & labels.keys():
            raise UserError(
                f"rle_csv={rle_csv}: names none of the {len(archive.image_ids)} files in {dicom_dir};"
                " name a table and a folder that belong together"
            )
    members = tuple(m for m in archive.members if labels is None or m.image_id in labels)
    grouping = make_grouping(source.patients_csv, [member.image_id for member in members])
    recorded = {
        "image_size": str(settings.format.image_size),
        "pixel_dtype": settings.format.pixel_dtype,
        "max_pixels": str(settings.reading.max_pixels),
        "rle_csv": table_digest,
        "patients_csv": grouping.digest,
        "salt": salted("salt"),
    }
    recorded |= {"rle_size": str(source.rle_size)} if source.rle_size else {}
    recorded |= {} if masks_dir is None else {"masks": "files"}
    return Inputs(archive, labels, grouping, members, settings.reading.max_pixels, recorded)


def _mask_labels(archive: Archive, masks_dir: Path, names: FileNames) -> dict[str, Label]:
    """The labels of the images that have a mask file, or that a table says to have no pneumothorax.

    A mask has its image's id as its path below the folder, or else as its name, whatever the folder.
    """
    if not masks_dir.exists():
        raise UserError(
            f"masks_dir={masks_dir}: no such file or folder; name the folder that holds the masks"
        )
    try:
        masks = open_archive(masks_dir, "path")
    except UserError as error:
        raise UserError(f"masks_dir={error}") from None
    presences, by_name = dict(names.values()), defaultdict[str, list[DicomFile | None]](list)
    by_path: dict[str, DicomFile | None] = {member.image_id: member for member in masks.members}
    by_path |= dict.fromkeys(masks.differing)
    for path, member in by_path.items():
        stem = PurePosixPath(path).name
        by_name[names[stem][0] if stem in names else stem].append(member)
    labels, left_out = dict[str, Label](), list[str]()
    for image_id in (member.image_id for member in archive.members):
        files = [by_path[image_id]] if image_id in by_path else by_name[image_id]
        presence = presences.get(image_id)
        if len(files) == 1 and files[0] is not None:
            labels[image_id] = Label(root=masks.root, file=files[0], presence=presence)
        elif not files and presence is False:
            labels[image_id] = Label(presence=False)
        elif files or presence:
            left_out.append(image_id)
    with_mask = sum(label.file is not None for label in labels.values())
    if not with_mask or with_mask < len(left_out):
        raise UserError(
            f"masks_dir={masks_dir}: holds the mask of {with_mask} of {len(archive.members)} images; masks"
            " are named like their images, one for each"
        )
    if left_out:
        warn(
            f"masks_dir={masks_dir}: left out because has_pneumo is 1 and there is no mask, or because there"
            f" are several: {plural(len(left_out), 'image')}, such as {left_out[0]}"
        )
    return labels


def _describe_difference(name: str, recorded: str, current: str) -> str:
    if name == RECORDED[name]:
        return f"{name} {recorded}, not {current}"
    if name == "patients_csv" and source_of(recorded) != source_of(current):
        return f"patients by {source_of(recorded)}, not by {source_of(current)}"
    return f"other {RECORDED[name]}"
