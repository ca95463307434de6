"""How long the main job on the sample takes, the most memory it needs, and how soon --help answers.

python benchmarks/demo.py            everything; a few minutes
python benchmarks/demo.py --help_only
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
ENTRY_POINTS = ("main", "sample", "preprocess", "train", "search", "score", "register")
REPEATS = 7


def machine() -> str:
    """The machine in one line."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    units = [name for name in ("amx_bf16", "avx512_bf16") if name in flags]
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{model}, {os.cpu_count()} cores ({', '.join(units) or 'no bf16 units'}), {memory:.0f} GiB,"
        f" Python {platform.python_version()}"
    )


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


def watch_memory(process: psutil.Process, peak: list[float], done: threading.Event) -> None:
    """Keeps the largest sum of resident memory over the process and all below it, in GB."""
    while not done.wait(0.1):
        total = 0
        for one in [process, *process.children(recursive=True)]:
            try:
                total += one.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak[0] = max(peak[0], total / 1e9)


def demo() -> None:
    """`mlflow run` of main on the sample, in an empty folder with a store of its own."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        }
        command = ["mlflow", "run", str(ROOT), "--env-manager", "local", "-P", f"output_dir={folder}/output"]
        start = time.perf_counter()
        with subprocess.Popen(
            command, env=environment, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            peak, done = [0.0], threading.Event()
            watcher = threading.Thread(target=watch_memory, args=(psutil.Process(process.pid), peak, done))
            watcher.start()
            output, _ = process.communicate()
            done.set()
            watcher.join()
        seconds = time.perf_counter() - start
        if process.returncode:
            sys.exit(output[-3000:])
        print(f"main on the sample: {seconds:.0f} s, peak memory of all processes {peak[0]:.2f} GB")
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
