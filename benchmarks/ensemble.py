"""Whether the demo's five folds together beat each of them, on hold-out images that trained none.

Run in the project's environment: python benchmarks/ensemble.py

Trains `fold=all` with config=demo on the synthetic sample, in an empty folder with its own store: some
minutes. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import ROOT, machine


def command(folder: Path, *words: str) -> str:
    """What a command of the package prints."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pneumo_experiments", *words, "--config", "demo"],
        cwd=folder, env=environment, text=True, capture_output=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    return done.stdout


def metrics_of_last_run(folder: Path) -> dict[str, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs(["0"], order_by=["attributes.start_time DESC"], max_results=1)
    return run.data.metrics


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(f"{machine()}.\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command(folder, "sample", "--output_dir", "s", "--test_images", "0")
        source = ["--dicom_dir", "s/dicom-images-train", "--rle_csv", "s/train-rle.csv"]
        command(folder, "preprocess", *source, "--dataset", "d.h5")
        said = command(folder, "train", "--dataset", "d.h5", "--fold", "all", "--overlays", "0")
        members = re.findall(r"kept .* logged as (models:/\S+)", said)
        (ensemble,) = re.findall(r"together logged as (models:/\S+)", said)
        print("| hold-out | Dice | ensemble's Dice minus it | 95% interval | probability that it is better |")
        print("|---|---|---|---|---|")
        for fold, member in enumerate(members):
            score = [
                "score",
                "--model",
                ensemble,
                "--baseline",
                member,
                "--dataset",
                "d.h5",
                "--overlays",
                "0",
            ]
            command(folder, *score)
            found = metrics_of_last_run(folder)
            if not fold:
                low, high = found["dice_low"], found["dice_high"]
                print(f"| ensemble | {found['dice']:.4f} ({low:.3f} to {high:.3f}) | | | |")
            low, high = found["dice_difference_low"], found["dice_difference_high"]
            print(
                f"| fold {fold} | {found['baseline_model_dice']:.4f} | {found['dice_difference']:+.4f} |"
                f" {low:+.4f} to {high:+.4f} | {found['probability_better']:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
