"""Entry point ``sample``: a synthetic data set in Kaggle's layout."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from pneumo_experiments import tracking
from pneumo_experiments.settings import Sample
from pneumo_experiments.synthetic.files import is_sample, write_sample


def sample(settings: Sample) -> Path:
    """Writes the sample, or keeps one that the same settings made; returns its folder."""
    folder = settings.output_dir
    with tracking.run(
        "sample", settings, f"{settings.size.images} labelled synthetic radiographs in {folder}."
    ):
        total, written = settings.size.images + settings.size.test_images, False
        if not is_sample(folder, settings.size.images, settings.size.test_images, settings.seed):
            with tqdm(total=total, desc="sample", unit="image", disable=None) as bar:

                def advance() -> None:
                    bar.update()

                written = write_sample(
                    folder, settings.size.images, settings.size.test_images, settings.seed, advance
                )
        found = f"{total} synthetic radiographs in {folder}" if written else f"{folder} is there already"
        print(f"sample: {found}")
    return folder
