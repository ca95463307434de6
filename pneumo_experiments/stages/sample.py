"""Entry point ``sample``: a synthetic data set in Kaggle's layout."""

from __future__ import annotations

from pathlib import Path

from pneumo_experiments import tracking
from pneumo_experiments.progress_bar import ProgressBar
from pneumo_experiments.settings import Sample
from pneumo_experiments.synthetic.kaggle_layout import Contents, is_sample, write_sample
from pneumo_experiments.words import command, rows


def sample(settings: Sample) -> Path:
    """Writes the sample unless the folder has one with the same settings; returns the folder.

    In a run of MLflow, as on the command line. Raises UserError if it cannot be written.

    >>> folder = sample(Sample.of(output_dir="sample", images=10, test_images=0))
    sample: 10 synthetic radiographs in ...
    >>> len(list(folder.rglob("*.dcm"))), (folder / "train-rle.csv").is_file()
    (10, True)
    """
    folder, size = settings.output_dir, settings.size
    total, written = size.images + size.test_images, False
    contents = Contents(size.images, size.test_images, settings.seed, settings.difficulty)
    with tracking.run("sample", settings):
        tracking.describe(f"{size.images} labelled synthetic radiographs in {folder}.")
        if not is_sample(folder, contents):
            with ProgressBar("sample", total, is_kept=True) as bar:
                written = write_sample(folder, contents, bar.update)
        result = f"{total} synthetic radiographs in {folder}" if written else f"{folder} exists already"
        print(f"sample: {result}")
    if tracking.active_run() is None:
        files = {"dicom_dir": folder / "dicom-images-train", "rle_csv": folder / "train-rle.csv"}
        print(rows({"next": command("preprocess", **files)}))
    return folder
