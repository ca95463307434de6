"""What a user types: values, mistakes, and how each mistake ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

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
