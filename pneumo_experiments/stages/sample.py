"""Entry point ``sample``: a synthetic data set in Kaggle's layout."""

from __future__ import annotations

import json
from pathlib import Path

from tqdm import tqdm

from pneumo_experiments import tracking
from pneumo_experiments.data.phantoms import SAMPLE_FILE, sample_description, write_sample
from pneumo_experiments.errors import UserError
from pneumo_experiments.settings import Sample


def sample(settings: Sample) -> Path:
    """Writes the sample, or keeps one that the same settings made; returns its folder."""
    folder = settings.output_dir
    with tracking.run("sample", settings, f"{settings.images} labelled synthetic radiographs in {folder}."):
        wanted = sample_description(settings.images, settings.test_images, settings.seed)
        if _description(folder) == wanted:
            print(f"sample: {folder} is there already")
        elif folder.exists() and any(folder.iterdir()):
            raise UserError(f"output_dir={folder}: holds other files; name an empty or new folder")
        else:
            total = settings.images + settings.test_images
            with tqdm(total=total, desc="sample", unit="image", disable=None) as bar:
                write_sample(
                    folder, settings.images, settings.test_images, settings.seed, lambda: _advance(bar)
                )
            print(f"sample: {total} synthetic radiographs in {folder}")
    return folder


def _advance(bar: tqdm[None]) -> None:
    bar.update()


def _description(folder: Path) -> object:
    try:
        return json.loads((folder / SAMPLE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
