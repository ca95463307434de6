"""benchmarks/gpu.sh: the rows of its table, and that it ends in time with a whole table."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import ROOT
from samples import write
from tiny_network import CPU
from torch import Tensor, nn

from pneumo_experiments.errors import UserError


class Usual(nn.Module):
    """In place of torchvision's network, which takes a while."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return dict.fromkeys(("out", "aux"), self.layer(images))


@pytest.fixture
def benchmark(tiny: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("train")
    monkeypatch.setattr(benchmark, "SAMPLE", 24)
    monkeypatch.setattr(benchmark, "fcn_resnet50", Usual)
    return benchmark


def cells(line: str, benchmark: ModuleType) -> dict[str, str]:
    return dict(zip(benchmark.COLUMNS, line.strip("| \n").split(" | "), strict=True))


def test_a_row_compares_with_the_usual_script_and_the_matrix_rate(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "16.h5"
    write(path, count=24, pixel_dtype="float32")
    arguments = argparse.Namespace(dry_run=True, workers=0, compile=False, processes=1)
    for name in (benchmark.USUAL, "tiny", "unknown"):
        benchmark.print_rows(name, path, arguments, CPU)
    usual, ours, unknown = (cells(line, benchmark) for line in capsys.readouterr().out.splitlines())
    rates = json.loads((tmp_path / "rates.json").read_text())
    training = float(ours["training, images/s"])
    assert rates["16"] == pytest.approx(float(usual["training, images/s"]), rel=0.01)
    assert usual["training / usual script"] == "1.00"
    ratio = float(ours["training / usual script"])
    assert ratio == pytest.approx(training / rates["16"], abs=0.01, rel=0.02)
    fraction = float(ours["fraction of the matrix rate"].rstrip("%")) / 100
    flops = benchmark.flops_per_image(16, "tiny")
    assert fraction == pytest.approx(training * flops / rates["matrix"], abs=0.001, rel=0.01)
    assert float(ours["prediction, images/s"]) > 0
    assert [usual[name] for name in ("cache", "prediction, images/s", "result")] == ["file", "–", "ok"]
    assert [ours[name] for name in ("what", "size, px", "batch", "compile")] == ["tiny", "16", "2", "no"]
    assert [ours[name] for name in ("cache", "peak memory, GB", "result")] == ["host", "–", "ok"]
    assert unknown["what"] == "unknown" and unknown["result"].startswith("not available: ")


def test_what_fails_costs_its_row(
    benchmark: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(*_: object) -> None:
        raise UserError("a | b\nsecond line")

    monkeypatch.setattr(benchmark, "our_speed", failing)
    path = tmp_path / "16.h5"
    write(path, count=24, pixel_dtype="float32")
    arguments = argparse.Namespace(dry_run=True, workers=0, compile=False, processes=1)
    benchmark.print_rows("tiny", path, arguments, CPU)
    (line,) = capsys.readouterr().out.splitlines()
    assert cells(line, benchmark)["result"] == "failed: UserError: a / b"


def test_the_operations_of_a_step_are_those_of_its_layers(benchmark: ModuleType) -> None:
    """Of the tiny network, counted by hand: two per product, forward, and for weights and inputs backward."""
    side, pixels = 32, 4 * 4
    stem, widen = 3 * 4 * 8 * 8 * pixels, 4 * 2048 * pixels
    heads = 2048 * 4 * pixels + 4 * 4 * pixels + 2 * 4 * pixels
    presence = 2 * 2048
    # The images need no gradient.
    forward = stem + widen + heads + presence
    assert benchmark.flops_per_image(side, "tiny") == 2 * (3 * forward - stem)


PYTHON = """\
#!/bin/bash
case "$*" in
    *device_count*) echo 1 ;;
    *--head*) echo "a card"; echo; echo "| what | result |" ;;
    *pytest*) echo "FAILED test_a - 1 | 2"; echo "1 failed, 2 passed in 3 s"; exit 1 ;;
    *--check*) echo "a card"; echo "cache=host: ok, loss 1"; echo "fp32: FAILED: E: it"; exit 1 ;;
    *--compile*) sleep 100 ;;
    *broken*) echo "Traceback"  >&2; echo "OutOfMemory: 3 | 4" >&2; exit 1 ;;
    *--rows*) echo "| ${@: -1} | row |" ;;
esac
"""


def test_it_ends_in_time_and_a_part_that_fails_costs_its_row(tmp_path: Path) -> None:
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    start = time.monotonic()
    done = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", "first", "broken"],
        env=os.environ | {"PYTHON": str(tmp_path / "python"), "GPU_SECONDS": "4"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, time.monotonic() - start < 30) == (0, True)
    head, empty, *table = done.stdout.splitlines()
    assert (head, empty, table[0]) == ("a card", "", "| what | result |")
    rows = [(line.split(" | ")[0].strip("| "), line.split(" | ")[-1].strip("| ")) for line in table[1:]]
    assert rows[:-2] == [
        ("usual script", "row"),
        ("first", "row"),
        ("broken", "failed: OutOfMemory: 3 / 4"),
        ("check cache=host", "ok, loss 1"),
        ("check fp32", "FAILED: E: it"),
        ("checks", "failed"),
        ("tests on the device", "FAILED test_a - 1 / 2"),
        ("tests on the device", "1 failed, 2 passed in 3 s"),
        ("tests on the device", "failed"),
        ("two processes", "not run: one card"),
    ]
    assert rows[-2][0] == "first, compile" and rows[-2][1].startswith("stopped after ")
    assert rows[-1] == ("broken, compile", "not run: the time is over")


def test_the_rows_of_the_script_have_the_columns_of_the_table(benchmark: ModuleType) -> None:
    text = (ROOT / "benchmarks" / "gpu.sh").read_text(encoding="utf-8")
    assert text.count(" –") == len(benchmark.COLUMNS) - 2  # between what and result
