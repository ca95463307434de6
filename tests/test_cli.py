"""What a user types: values, mistakes, and how each mistake ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest
from conftest import ROOT

from pneumo_experiments import cli
from pneumo_experiments.settings import ENTRY_POINTS, Main, Train, as_params, derive, from_names


@pytest.fixture(autouse=True)
def signals_stay_as_they_were() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])


def error_of(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command line prints for a mistake."""
    monkeypatch.setattr("sys.argv", ["pneumo_experiments", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("words", "culprit", "mend"),
    [
        (["train", "--learning_rate", "banana"], "learning_rate: 'banana' is not a number", "--help"),
        (["train", "--learning_rate", "nan"], "learning_rate: 'nan' is not a finite number", "--help"),
        (["train", "--epochs", "1.5"], "epochs: '1.5' is not a whole number", "--help"),
        (["train", "--epochs", "0"], "epochs: 0 is less than 1", "--help"),
        (["train", "--positive_share", "2"], "positive_share: 2 is more than 1", "--help"),
        (["train", "--network", "unet"], "network: 'unet' is not one of", "fcn_resnet50"),
        (["train", "--augment", "perhaps"], "augment: 'perhaps' is not a valid boolean", "true"),
        (["train", "--lerning_rate", "1"], "'--lerning_rate'", "--learning_rate"),
        (["tain"], "'tain'", "'train'"),
        (["train", "stray"], "stray", "--help"),
        (["train", "--seed", "1e20"], "seed: '1e20' is not a whole number", "--help"),
        (["train", "--seed", "1" + "0" * 20], "is more than 4294967295", "--help"),
        (["preprocess", "--image_size", "1000000"], "image_size: 1000000 is more than 4096", "--help"),
        (["train", "--epochs", "9" * 5000], f"epochs: '{'9' * 49}… is not a whole number", "--help"),
        (["train", "--fold", "9" * 5000], f"fold: '{'9' * 49}… is not the number of a part, or all", "help"),
        (["train", "--augment", ""], "augment: '' is not a valid boolean", "true"),
        (
            ["score", "--dataset", "~nosuchuser/x"],
            "dataset: '~nosuchuser/x' names the home of a user",
            "help",
        ),
        (["score", "--dataset", f"x/{'é' * 128}"], "has a name of 256 bytes, more than 255", "--help"),
        (["score", "--dataset", "a\0b"], "dataset: 'a\\x00b' holds a character that no path can", "--help"),
        (["search", "--study", "a\nb"], "study: 'a\\nb' holds characters that cannot be shown", "--help"),
        (["register", "--name", "\udcff"], "name: '\\udcff' holds characters that cannot", "--help"),
        (["register", "--model", "m" * 1001], "has 1001 characters, more than 1000", "--help"),
    ],
)
def test_a_mistyped_value_or_name_is_one_line_and_exit_code_2(
    words: list[str],
    culprit: str,
    mend: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = error_of(words, monkeypatch, capsys)
    assert culprit in line
    assert mend in line


def test_an_end_of_file_that_is_our_bug_is_not_told_as_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_on() -> None:
        raise EOFError("a bug")

    monkeypatch.setitem(cli.cli.commands, "buggy", click.Command("buggy", callback=read_on))
    monkeypatch.setattr("sys.argv", ["pneumo_experiments", "buggy"])
    with pytest.raises(EOFError, match="a bug"):
        cli.main()


HOSTILE = [
    *("", " ", "-1", "nan", "inf", "-inf", "1e20", "1e400", "0x10", "1" + "0" * 20, "9" * 5000, "x" * 300),
    *(
        "x" * 5000,
        "a\nb",
        "a\0b",
        "\udcff",
        "~nosuchuser/x",
        "x/" * 3000,
        "/dev/null",
        "/",
        "'; --",
        "{x}",
        "%s",
    ),
]


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_a_hostile_value_of_any_setting_is_one_short_line_or_within_the_limits(name: str) -> None:
    """Only the reading of the command line; what stages make of paths and addresses is tested elsewhere."""
    for f in fields(ENTRY_POINTS[name]):
        notes, is_number = f.metadata, str(f.type) in ("int", "float")
        assert not is_number or notes["most"] is not None, f"{f.name} may grow without limit"
        for value in HOSTILE:
            try:
                taken = cli.cli.commands[name].make_context(name, [f"--{f.name}", value]).params[f.name]
            except click.BadParameter as refused:
                line = cli._one_line(refused)
                assert line.startswith(f"{f.name}: ")
                assert len(line) < 250, line
                continue
            if is_number:
                assert notes["least"] <= taken <= notes["most"]
            elif isinstance(taken, Path):
                assert max(len(part.encode(errors="surrogateescape")) for part in taken.parts) < 256
                assert "\0" not in str(taken)
            else:
                assert str(f.type) != "bool"
                assert taken is None or (len(taken) <= 1000 and taken.isprintable())


WRITES = """
import os, sys
from pneumo_experiments.terminal import make_streams_unfailing
make_streams_unfailing()
print("to stdout")
file = open("file", "w+")
print("to stderr", file=sys.stderr)
sys.stdout.flush()
assert file.read() == "" and os.fstat(file.fileno()).st_size == 0
"""


@pytest.mark.parametrize(
    ("streams", "heard"),
    [
        ("> /dev/full", "stdout: cannot be written (No space left on device); continuing without it\n"),
        ("2> /dev/full", ""),
        (">&- 2>&-", ""),
        ("<&- >&- 2>&-", ""),
        ("2>&-", ""),
    ],
)
def test_a_terminal_that_is_full_or_closed_ends_no_work(streams: str, heard: str, tmp_path: Path) -> None:
    shell = f'"$0" -c "$1" {streams}'
    done = subprocess.run(
        ["sh", "-c", shell, sys.executable, WRITES],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stderr.replace("to stderr\n", "") == heard
    assert ("to stdout" in done.stdout) == (streams in ("2> /dev/full", "2>&-"))


def test_main_takes_the_small_values_on_the_sample_and_the_full_ones_on_real_data() -> None:
    sample, real = from_names(Main, {}), from_names(Main, {"dicom_dir": Path("radiographs")})
    assert (sample.weights, real.weights) == ("none", "auto")
    assert sample.image_size < real.image_size == 384
    assert from_names(Main, {"image_size": 96}).image_size == 96


def test_settings_pass_from_main_to_a_step_under_the_same_name() -> None:
    main = from_names(Main, {"learning_rate": 0.5, "seed": 3})
    train = derive(Train, main, bce_weight=0.25)
    assert (train.learning_rate, train.seed, train.bce_weight) == (0.5, 3, 0.25)
    assert train.epochs == main.epochs


def test_every_setting_is_a_param_in_the_text_that_mlproject_declares() -> None:
    assert as_params(Train())["augment"] == "true"
    assert as_params(Train())["learning_rate"] == "0.0003"
    assert as_params(Main())["dicom_dir"] == "none"


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_help_names_every_setting_with_meaning_and_default(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.cli.main([name, "--help"], standalone_mode=False)
    told = " ".join(capsys.readouterr().out.split())
    for f in ENTRY_POINTS[name].__dataclass_fields__.values():
        assert f"--{f.name}" in told
        assert f.metadata["meaning"].split(";")[0].split()[0] in told
    assert told.count("[default:") == len(ENTRY_POINTS[name].__dataclass_fields__)
