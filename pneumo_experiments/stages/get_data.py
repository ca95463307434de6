"""Entry point ``get_data``: the challenge's files from Kaggle, in the layout that ``preprocess`` reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path, PurePosixPath

from pneumo_experiments import tracking
from pneumo_experiments.dataset.annotations import MAX_TABLE_BYTES, read_annotations
from pneumo_experiments.dataset.kaggle import download, read_token
from pneumo_experiments.dataset.patients import count_shipped, shipped_grouping, warn
from pneumo_experiments.dicom.containers import is_packed, list_packed, read_file
from pneumo_experiments.dicom.radiograph import MAX_PIXELS
from pneumo_experiments.errors import UserError
from pneumo_experiments.files import file_name, write_atomically, writing
from pneumo_experiments.locks import LOCK, work_folder
from pneumo_experiments.progress_bar import ProgressBar
from pneumo_experiments.settings import GetData
from pneumo_experiments.words import command, plural, rows

TRAIN, TEST, TABLE, ORDER = (
    "dicom-images-train",
    "dicom-images-test",
    "train-rle.csv",
    "sample_submission.csv",
)
TEST_ID = "ID_"  # ids of test images begin with it, all others are UIDs
RECORD = "get_data.json"  # what the folder holds; written last


def get_data(settings: GetData) -> Path:
    """Downloads and unpacks what the folder does not have yet, and checks it; returns the folder.

    In a run of MLflow, as on the command line. Raises UserError if there is no token, if Kaggle refuses or
    cannot be reached, if there is no room, or if the source has none of the challenge's labelled images.
    """
    folder, work = settings.output_dir, settings.output_dir / "download"
    waiting = f"get_data: another process writes {folder}; waiting until it ends"
    with tracking.run("get_data", settings), writing(f"output_dir={folder}"):
        with work_folder(work, waiting):
            if not (is_complete := _is_complete(settings)):
                token = read_token()
                archives = [download(source, work, token) for source in settings.source.split(",")]
                for archive in archives:
                    _unpack(archive, folder)
            result = _check(folder)
            record = {"source": settings.source, "files": _count(folder)}
            _write(folder / RECORD, json.dumps(record).encode(), work)
            for file in work.iterdir():  # archives, and what killed processes left
                if file.name != LOCK:
                    file.unlink()
        tracking.describe(f"{result}, from {settings.source}.")
        print(f"get_data: {result} in {folder}" + (", as before" if is_complete else ""))
    if tracking.active_run() is None:
        print(rows({"next": command("preprocess", dicom_dir=folder / TRAIN, rle_csv=folder / TABLE)}))
    return folder


def _is_complete(settings: GetData) -> bool:
    """Whether the folder has all files of the source."""
    try:
        record = json.loads((settings.output_dir / RECORD).read_bytes())
    except (OSError, ValueError):
        return False
    is_there = (settings.output_dir / TABLE).is_file()
    return is_there and record == {"source": settings.source, "files": _count(settings.output_dir)}


def _count(folder: Path) -> int:
    return sum(1 for part in (TRAIN, TEST) for _ in (folder / part).glob("*.dcm"))


def _unpack(archive: Path, folder: Path) -> None:
    """Writes the radiographs and tables of an archive that the folder does not have, and nothing else of it.

    Of paths in the archive only the names count, so no file can get elsewhere. Raises UserError if the
    archive is damaged, which removes it.
    """
    try:
        if not is_packed(archive):
            raise UserError("Kaggle sent no zip file")
        members = [*list_packed(archive)]
        with ProgressBar(f"unpack {archive.name}", len(members), "file", is_kept=True) as bar:
            for member in members:
                path = PurePosixPath(member.name.replace("\\", "/"))
                member = replace(member, image_id=path.name)  # for what is said of a damaged one
                place = folder / _place(path)
                if place.name == TABLE:
                    if member.size <= MAX_TABLE_BYTES:
                        _keep_best(place, read_file(archive, member, MAX_PIXELS), archive.parent)
                elif place != folder and not place.exists():
                    _write(place, read_file(archive, member, MAX_PIXELS), archive.parent)
                bar.update()
    except UserError as error:
        archive.unlink(missing_ok=True)
        raise UserError(f"{archive.name}: {error}; run the command again, which downloads it anew") from None


def _place(path: PurePosixPath) -> str:
    """Where a file of an archive belongs; empty if nowhere."""
    if "__MACOSX" in path.parts or path.name.startswith("."):
        return ""
    if path.suffix.lower() == ".dcm":
        return f"{TEST if path.name.startswith(TEST_ID) else TRAIN}/{file_name(path.name)}"
    if path.suffix.lower() == ".csv":
        return ORDER if path.name.endswith(ORDER) else TABLE
    return ""


def _write(path: Path, content: bytes, work: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with write_atomically(path, work) as part:
        part.write_bytes(content)


def _keep_best(path: Path, content: bytes, work: Path) -> None:
    """Writes the table unless the one that is there labels as many of the challenge's images."""
    # The table of the second stage has the test images of the first one as well.
    if len(_known(path, content)) > (len(_known(path)) if path.exists() else 0):
        _write(path, content, work)


def _known(path: Path, content: bytes | None = None) -> set[str]:
    """Ids of the table that are in the shipped table of patients; none if it is another kind of table."""
    try:
        return {*shipped_grouping(read_annotations(path, content)).hashes}
    except UserError:
        return set()


def _check(folder: Path) -> str:
    """What the folder holds, in words; warns of labelled images of the challenge that are missing."""
    labelled = _known(folder / TABLE) if (folder / TABLE).exists() else set[str]()
    if not labelled:
        raise UserError(
            "source: no table in it labels images of the challenge; name one that has train-rle.csv or"
            " stage_2_train.csv"
        )
    present = {path.stem for path in (folder / TRAIN).glob("*.dcm")} & labelled
    every = count_shipped()
    if len(present) < every:
        warn(
            f"{folder}: has {len(present):,} of the challenge's {every:,} labelled images:"
            f" {every - len(labelled):,} have no label, {len(labelled - present):,} have no file"
        )
    tests = sum(1 for _ in (folder / TEST).glob("*.dcm"))
    return f"{plural(len(present), 'labelled image')} and {plural(tests, 'test image')}"
