"""What the main job on the sample computes, how long it takes and what it reaches; how soon --help answers.

python benchmarks/demo.py                    one seed; minutes
python benchmarks/demo.py --seeds 0 1 2
python benchmarks/demo.py --help_only
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import ROOT, gflop_per_second, machine, peak_memory

ENTRY_POINTS = ("main", "sample", "preprocess", "train", "search", "score", "register")
REPEATS = 7
TOLD = ("Dice  ", "Dice on", "all-empty", "  trial", "  confirm", "search: best", "train: kept")


def help_seconds(words: list[str]) -> float:
    """Median wall time of a command's --help after one run to warm up."""
    times: list[float] = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "pneumo_experiments", *words, "--help"],
            cwd=ROOT, stdout=subprocess.DEVNULL, check=True,
        )  # fmt: skip
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def demo(config: Path, seed: int) -> None:
    """Runs main in an empty folder with a store of its own; prints its work by step, and its scores."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        counts = Path(folder) / "counts.json"
        script = ROOT / "benchmarks" / "counted_main.py"
        command = [sys.executable, str(script), str(counts), "--config", str(config), "--seed", str(seed)]
        start = time.perf_counter()
        with (
            subprocess.Popen(
                command,
                env=environment,
                cwd=folder,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            ) as process,
            peak_memory(process.pid) as peak,
        ):
            output, _ = process.communicate()
        seconds = time.perf_counter() - start
        if process.returncode:
            sys.exit(output[-3000:])
        print(f"\nseed {seed}")
        print_work(json.loads(counts.read_text()), seconds)
        print(f"peak memory of all processes {peak.gigabytes:.2f} GB")
        for line in output.splitlines():
            if line.startswith(TOLD):
                print(f"  {line.strip()}")


def print_work(rows: dict[str, dict[str, float]], seconds: float) -> None:
    """Prints a table of the steps: TFLOP, seconds, images, GFLOP/s; the rest of the time is no network's."""
    rows["all networks"] = {
        name: sum(row[name] for row in rows.values()) for name in ("flop", "seconds", "images")
    }
    for name, row in rows.items():
        rate = row["flop"] / row["seconds"] / 1e9
        print(
            f"  {name:<34} {row['flop'] / 1e12:7.2f} TFLOP  {row['seconds']:6.1f} s"
            f"  {row['images']:5.0f} images  {rate:5.0f} GFLOP/s"
        )
    print(f"  {'everything':<34} {'':13}  {seconds:6.1f} s")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--help_only", action="store_true", help="only the start-up times")
    parser.add_argument("--config", type=Path, default=ROOT / "pneumo_experiments/configs/demo.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    print(f"{machine()}; {gflop_per_second():.0f} GFLOP/s in a convolution")
    print(f"--help: {help_seconds([]):.2f} s (median of {REPEATS})")
    for name in ENTRY_POINTS:
        print(f"{name} --help: {help_seconds([name]):.2f} s")
    if not arguments.help_only:
        for seed in arguments.seeds:
            demo(arguments.config.resolve(), seed)


if __name__ == "__main__":
    main()
