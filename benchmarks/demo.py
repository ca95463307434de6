"""How long the main job on the sample takes, the most memory it needs, and how soon --help answers.

python benchmarks/demo.py            everything; a few minutes
python benchmarks/demo.py --help_only
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import ROOT, machine, peak_memory

ENTRY_POINTS = ("main", "sample", "preprocess", "train", "search", "score", "register")
REPEATS = 7


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


def demo() -> None:
    """`mlflow run` of main on the sample, in an empty folder with a store of its own."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        }
        command = ["mlflow", "run", str(ROOT), "--env-manager", "local", "-P", f"output_dir={folder}/output"]
        command += ["-P", f"storage=sqlite:///{folder}/optuna.db"]  # else a second run finds the trials done
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
        print(f"main on the sample: {seconds:.0f} s, peak memory of all processes {peak.gigabytes:.2f} GB")
        for line in output.splitlines():
            if line.startswith(("Dice  ", "Dice on", "all-empty")):
                print(f"  {line}")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--help_only", action="store_true", help="only the start-up times")
    arguments = parser.parse_args()
    print(machine())
    print(f"--help: {help_seconds([]):.2f} s (median of {REPEATS})")
    for name in ENTRY_POINTS:
        print(f"{name} --help: {help_seconds([name]):.2f} s")
    if not arguments.help_only:
        demo()


if __name__ == "__main__":
    main()
