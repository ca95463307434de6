"""What train, search, score and serving spend their time on, start included, by kind of work.

python benchmarks/where_time_goes.py
python benchmarks/where_time_goes.py --root ../older      the same of another checkout

On a few synthetic radiographs. The profiler slows Python code down, not what torch, SQLite or a codec
computes; what other processes and threads do shows as waiting. The imports are those of all stages together.
"""

from __future__ import annotations

import argparse
import os
import pstats
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from measure import ROOT, machine

IMAGES, TEST_IMAGES, REQUESTS = 80, 16, 10
LEARNING = {"dataset": "d.h5", "folds": 4, "holdout": 0.2, "device": "cpu", "precision": "fp32"}
LEARNING |= {"weights": "none", "tta": "none", "aux_weight": 0, "batch_size": 4}
# Kinds of work by what is in a function's name or path; the first that fits.
KINDS = {
    "networks: backward": ("run_backward",),
    "networks: optimizer": ("/torch/optim/", "/torch/amp/", "clip_grad", "_adamw", "_amp_", "_foreach"),
    "imports": ("importlib", "<module>", "marshal.loads", "__build_class__", "builtins.compile"),
    "waiting": ("acquire", "select.", "'poll'", "waitpid", "time.sleep", "posix.read", "/threading.py"),
    "networks: forward": ("torch.", "/torch/", "/torchvision/"),
    "pictures": ("/matplotlib/", "/PIL/", "/pyparsing/", "/optuna/visualization/", "Imaging", "ft2font"),
    "MLflow and its store": ("/mlflow/", "/sqlalchemy/", "sqlite3", "/alembic/", "/yaml/", "/git/"),
    "Optuna": ("/optuna/", "/sklearn/", "/scipy/"),
    "DICOM": ("/pydicom/", "/imagecodecs/"),
    "pneumo_experiments": ("/pneumo_experiments/",),
}
# Imports are timed as a whole, without the profiler: they call functions of all kinds.
COMMAND = """
import cProfile, sys, time
start = time.perf_counter()
import mlflow.pyfunc
import pneumo_experiments.serving, pneumo_experiments.stages.main
with open("imports", "w") as file:
    file.write(str(time.perf_counter() - start))
profile = cProfile.Profile()
profile.enable()
try:
    {code}
finally:
    profile.disable()
    profile.dump_stats("profile")
"""
CLI = 'import runpy; runpy.run_module("pneumo_experiments", run_name="__main__", alter_sys=True)'
SERVE = f"""
    from pathlib import Path
    import mlflow, pandas
    model = mlflow.pyfunc.load_model(sys.argv[1])
    files = sorted(Path(sys.argv[2]).glob("**/*.dcm"))
    for file in files[:{REQUESTS}]:
        answer = model.predict(pandas.DataFrame({{"image_id": [file.stem], "dicom": [file.read_bytes()]}}))
        assert list(answer["error"]) == [""], answer
"""


def run(root: Path, folder: Path, code: str, *words: object) -> str:
    """Output of a profiled command in the folder, by the package of that checkout."""
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMMAND.format(code=code), *map(str, words)],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stdout[-3000:])
    return done.stdout


def kind_of(function: tuple[str, int, str]) -> str | None:
    name = f"{function[0]} {function[2]}".replace(os.sep, "/")
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), None)


def seconds_by_kind(path: Path) -> dict[str, float]:
    """Seconds of each kind; a built-in function that has none of its own counts for its callers."""
    stats: Any = pstats.Stats(str(path))
    seconds = defaultdict[str, float](float)
    for function, (_, _, own, _, callers) in stats.stats.items():
        kind = kind_of(function)
        if kind is None and function[0] == "~":
            for caller, (_, _, part, _) in callers.items():
                seconds[kind_of(caller) or "else"] += part
        else:
            seconds[kind or "else"] += own
    return seconds


def report(title: str, folder: Path) -> None:
    seconds = seconds_by_kind(folder / "profile")
    seconds["imports"] += float((folder / "imports").read_text())
    total = sum(seconds.values())
    print(f"\n{title:<28} {total:6.1f} s")
    for kind in (*KINDS, "else"):
        if seconds[kind] > 0.005 * total:
            print(f"  {kind:<26} {seconds[kind]:6.1f} s  {seconds[kind] / total:4.0%}")


def main() -> None:
    """Prints a table for each command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose package runs")
    root = parser.parse_args().root.resolve()
    print(f"{machine()}; {IMAGES} radiographs at 64 px")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def command(stage: str, **values: object) -> str:
            words = [word for key, value in values.items() for word in (f"--{key}", value)]
            return run(root, folder, CLI, stage, *words)

        command("sample", output_dir="s", images=IMAGES, test_images=TEST_IMAGES)
        source = {"dicom_dir": "s/dicom-images-train", "rle_csv": "s/train-rle.csv"}
        command("preprocess", **source, dataset="d.h5", image_size=64)
        output = command("train", **LEARNING, epochs=2, best_k=1)
        report("train, 2 epochs", folder)
        (model,) = set(re.findall(r"models:/\S+[0-9a-f]", output))
        command("search", **LEARNING, trials=4, search_epochs=1, search_images=16, confirm=0, keep=1)
        report("search, 4 trials", folder)
        command("score", model=model, dataset="d.h5", tta="none")
        report("score, the hold-out", folder)
        command("score", model=model, dicom_dir="s/dicom-images-test", tta="none")
        report(f"score, {TEST_IMAGES} DICOM files", folder)
        run(root, folder, SERVE, model, "s/dicom-images-test")
        report(f"serving, {REQUESTS} requests of one", folder)


if __name__ == "__main__":
    main()
