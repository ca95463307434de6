"""Whether what an entry point reads is there: known before anything heavy is imported or a run starts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pneumo_experiments.errors import UserError, reason_of
from pneumo_experiments.settings.entry_points import Main, Preprocess
from pneumo_experiments.settings.fields import NONE, Leaf, flat, leaves

ADDRESS = re.compile(r"[\w+.-]{2,}:/")  # such as models:/…, where a file may stand as well


def input_paths(settings: object) -> Iterator[tuple[Leaf, Path]]:
    """The settings of an entry point that name what it reads, and the paths."""
    values = flat(settings)
    absent = (None, "", NONE)
    for leaf in leaves(type(settings)):
        arg, value = leaf.arg, str(values[leaf.name] or NONE)
        is_path = value not in (NONE, *arg.names_file) and not ADDRESS.match(value)
        if arg.missing and is_path and all(values[name] in absent for name in arg.unless):
            paths = [value] if leaf.type is not str or Path(value).exists() else value.split(",")
            yield from ((leaf, Path(path.strip())) for path in paths)


def check_inputs(settings: object) -> None:
    """Raises UserError if a file or folder to read is not given, is not there, or is the other of the two."""
    if isinstance(settings, Preprocess) and settings.source.dicom_dir is None:
        raise UserError("dicom_dir: none given; name the folder that holds the DICOM files")
    source = settings.source if isinstance(settings, Main) else None
    if source and source.dicom_dir and source.rle_csv is None and source.masks_dir is None:
        raise UserError(
            "rle_csv: none given; the chain trains, so it needs dicom_dir's annotations (train-rle.csv),"
            " or masks_dir"
        )
    for leaf, path in input_paths(settings):
        given, remedy = f"{leaf.name}={path}", leaf.arg.missing
        try:
            is_there, is_folder = path.exists(), path.is_dir()
        except OSError as error:  # such as a name that is too long
            raise UserError(f"{given}: {reason_of(error)}; {remedy}") from None
        if not is_there:
            kind = "file or folder" if leaf.arg.folder_too else "file"
            raise UserError(f"{given}: no such {kind}; {remedy}")
        if is_folder and not leaf.arg.folder_too:
            raise UserError(f"{given}: is a folder; {remedy}")
