"""Entry point ``sample``: a synthetic data set in Kaggle's layout."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from pneumo_experiments import tracking
from pneumo_experiments.data.phantom_files import is_sample, write_sample
from pneumo_experiments.settings import Sample


def sample(settings: Sample) -> Path:
    """Writes the sample, or keeps one that the same settings made; returns its folder."""
    folder = settings.output_dir
    with tracking.run("sample", settings, f"{settings.images} labelled synthetic radiographs in {folder}."):
        if is_sample(folder, settings.images, settings.test_images, settings.seed):
            print(f"sample: {folder} is there already")
        else:
            total = settings.images + settings.test_images
            with tqdm(total=total, desc="sample", unit="image", disable=None) as bar:

                def advance() -> None:
                    bar.update()

                write_sample(folder, settings.images, settings.test_images, settings.seed, advance)
            print(f"sample: {total} synthetic radiographs in {folder}")
    return folder
