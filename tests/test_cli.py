"""What a user types: values, mistakes, and how each mistake ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.shell_completion import BashComplete
from helpers import ROOT, Call, End, ended

from pneumo_experiments import __version__, cli
from pneumo_experiments.errors import UserError
from pneumo_experiments.search.space import as_range_text, search_space
from pneumo_experiments.settings import (
    DEMO,
    ENTRY_POINTS,
    Main,
    Recipe,
    Search,
    Train,
    as_now,
    flat,
    leaves,
)


def resolved(name: str, *words: str) -> Any:
    command = cli.cli.commands[name]
    context = command.make_context(name, [*words], parent=cli.cli.make_context("", [name]))
    (one,) = cli.resolve(context, ENTRY_POINTS[name])
    return one


HELP = "; see python -m pneumo_experiments"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("train --learning_rate banana", f"learning_rate: 'banana' is not a valid number{HELP}"),
        ("train --learning_rate nan", f"learning_rate: 'nan' is not a finite number{HELP}"),
        ("train --epochs 1.5", f"epochs: '1.5' is not a valid whole number{HELP}"),
        ("train --epochs 0", f"epochs: 0 is not in the range 1<=x<=100000{HELP}"),
        ("train --ema 2", f"ema: 2.0 is not in the range 0<=x<=1{HELP}"),
        ("train --network unet", "network: 'unet' is no network; the nearest are unet:"),
        ("train --augment perhaps", f"augment: 'perhaps' is not one of 'none', 'mild', 'strong'{HELP}"),
        ("train --compile=", f"compile: '' is not a valid boolean; give true or false{HELP}"),
        ("train --lerning_rate 1", "No such option '--lerning_rate'. Did you mean '--learning_rate'?"),
        (
            "train --image_size 64",
            f"image_size is a setting of main and preprocess, not of train{HELP} train --",
        ),
        ("sample --epochs 3", f"epochs is a setting of main and train, not of sample{HELP} sample --help"),
        ("train --dry_run perhaps", "dry_run: 'perhaps' is not a valid boolean"),
        ("tain", "No such command 'tain'"),
        ("train stray", f"Got unexpected extra argument (stray){HELP}"),
        (f"train --epochs {'9' * 5000}", f"epochs: '{'9' * 49}… is not a valid whole number{HELP}"),
        (f"train --fold {'9' * 5000}", f"fold: '{'9' * 49}… is not the number of a part, or all{HELP}"),
        ("score --dataset ~nosuchuser/x", "dataset: '~nosuchuser/x' names the home of a user whom this"),
        ("score --dataset a\0b", "dataset: 'a\\x00b' holds a character that no path can have"),
        ("score --dataset=", f"dataset: give a path{HELP}"),
        ("search --study a\nb", "study: 'a\\nb' holds characters that cannot be shown"),
        ("register --name \udcff", "name: '\\udcff' holds characters that cannot be shown"),
        ("train --fold postgresql://u:Secret@h/x", "fold: 'postgresql://u:***@h/x' is not the number"),
        (f"register --model {'m' * 1001}", "has 1001 characters, more than 1000"),
    ],
)
def test_a_mistyped_value_or_name_is_one_line_and_exit_code_2(words: str, line: str, call: Call) -> None:
    assert line in call(words.split(" ")).mistake


def test_an_eof_error_that_is_our_bug_is_not_reported_as_an_interrupt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read_on() -> None:
        raise EOFError("a bug")

    monkeypatch.setitem(cli.cli.commands, "buggy", click.Command("buggy", callback=read_on))
    monkeypatch.setattr("sys.argv", ["pneumo_experiments", "buggy"])
    with pytest.raises(EOFError, match="a bug"):
        cli.main()


HOSTILE = [
    *("", " ", "-1", "nan", "inf", "-inf", "1e20", "1e400", "0x10", "1" + "0" * 20, "9" * 5000, "x" * 5000),
    *("9" * 4000, "a\nb", "a\0b", "\udcff", "~nosuchuser/x", "x/" * 3000, "/dev/null", "/"),
    *("'; --", "{x}", "%s"),
]


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_a_hostile_value_of_any_setting_is_one_short_line_or_within_the_limits(name: str) -> None:
    """Only the reading of the command line; what stages make of paths and addresses is tested elsewhere."""
    for leaf in leaves(ENTRY_POINTS[name]):
        is_number = leaf.type in (int, float)
        for value in HOSTILE:
            try:
                taken = cli.cli.commands[name].make_context(name, [f"--{leaf.name}", value]).params[leaf.name]
            except click.BadParameter as refused:
                line = cli._one_line(refused)
                assert line.startswith(f"{leaf.name}: ")
                assert len(line) < 250, line
                continue
            if is_number:
                assert leaf.arg.min is not None and leaf.arg.max is not None
                assert leaf.arg.min <= taken <= leaf.arg.max
            elif isinstance(taken, Path):
                assert "\0" not in str(taken)
            else:
                assert leaf.type is not bool
                assert taken is None or (len(taken) <= 1000 and taken.isprintable())


WRITES = """
import os, sys, time
from pneumo_experiments.terminal import make_streams_unfailing
make_streams_unfailing()
print("to stdout")
for line in range(100):
    print(line)
    time.sleep(0.001)
file = open("file", "w+")
print("to stderr", file=sys.stderr)
sys.stdout.flush()
assert file.read() == "" and os.fstat(file.fileno()).st_size == 0
file.write("done")
"""


@pytest.mark.parametrize(
    ("streams", "heard"),
    [
        ("> /dev/full", "stdout: cannot be written (No space left on device); continuing without it\n"),
        ("2> /dev/full", ""),
        (">&- 2>&-", ""),
        ("<&- >&- 2>&-", ""),
        ("2>&-", ""),
        ("| true; test -s file", ""),  # the reader is gone, as that of `| head`
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


def test_main_without_data_and_config_takes_the_demo_s_values_and_with_data_the_defaults() -> None:
    demo, real = flat(resolved("main")), flat(resolved("main", "--dicom_dir", "radiographs"))
    small = yaml.safe_load(DEMO.read_text())
    assert small.items() <= demo.items()
    assert not small.items() & real.items()
    given = {"dicom_dir": Path("radiographs").absolute(), "storage": f"sqlite:///{Path.cwd()}/optuna.db"}
    given |= {
        name: Path(text).absolute()
        for name, text in (("output_dir", "output"), ("checkpoints", "output/checkpoints"))
    }
    assert real == flat(Main()) | given
    assert flat(resolved("main", "--image_size", "64"))["image_size"] == 64


def test_an_option_beats_the_config_file_and_the_file_beats_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("epochs: 3\nlearning_rate: 1e-5\ndataset: other.h5\naugment: no\nsubmission: s.csv\n")
    words = ("--config", str(config), "--epochs", "5", "--dataset", "output/dataset.h5")
    train = resolved("train", *words)
    assert (train.schedule.epochs, train.recipe.optimizer.learning_rate) == (5, 1e-5)
    assert train.recipe.batches.augment == "none"  # which no was, when it was true or false
    assert train.schedule.best_k == Train().schedule.best_k
    assert train.dataset == Path("output/dataset.h5").absolute()
    # `mlflow run` passes what MLproject declares as if it were chosen: the file beats that.
    monkeypatch.setenv("MLFLOW_RUN_ID", "a" * 32)
    assert resolved("train", *words).dataset == Path("other.h5").absolute()
    assert resolved("train", *words[:-1], "mine.h5").dataset == Path("mine.h5").absolute()


@pytest.mark.parametrize("folder", ["was ist das?", "100%41", "a#b"])
def test_an_address_stays_relative_in_a_folder_whose_name_means_something_in_it(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    assert resolved("search", "--dataset", "d.h5").study.storage == "sqlite:///optuna.db"


@pytest.mark.parametrize(
    ("entry_point", "setting", "text", "expected"),
    [
        ("train", "dataset", "d.h5", Path("{here}/d.h5")),
        ("train", "dataset", "/x/d.h5", Path("/x/d.h5")),
        ("train", "checkpoints", "../c", Path("{here}/../c")),
        ("preprocess", "rle_csv", "none", None),
        ("preprocess", "patients_csv", "p.csv", "{here}/p.csv"),
        ("preprocess", "patients_csv", "~/p.csv", "{here}/p.csv"),
        ("preprocess", "patients_csv", "none.csv", "none.csv"),
        ("preprocess", "patients_csv", "auto", "auto"),
        ("preprocess", "patients_csv", "none", "none"),
        ("search", "storage", "sqlite:///o/s.db?timeout=3", "sqlite:///{here}/o/s.db?timeout=3"),
        ("search", "storage", "sqlite:////x/s.db", "sqlite:////x/s.db"),
        ("search", "storage", "sqlite:///:memory:", "sqlite:///:memory:"),
        ("search", "storage", "sqlite://", "sqlite://"),
        ("search", "storage", "postgresql://host/a", "postgresql://host/a"),
        ("search", "storage", "none", "none"),
        ("train", "weights", "coco", "coco"),
        ("train", "weights", "~/p.csv", "{here}/p.csv"),
        ("train", "weights", "models:/m@champion", "models:/m@champion"),
        ("train", "weights", "w" * 999, "w" * 999),
    ],
)
def test_paths_are_absolute_and_nothing_else_is_taken_for_one(
    entry_point: str,
    setting: str,
    text: str,
    expected: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for file in ("p.csv", "coco"):
        (tmp_path / file).touch()
    found = flat(resolved(entry_point, f"--{setting}", text))[setting]
    assert (type(found), str(found)) == (type(expected), str(expected).replace("{here}", str(tmp_path)))


def test_a_config_file_is_the_caller_s_before_the_project_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("train", "--config", "configs/demo.yaml")
    monkeypatch.chdir(tmp_path)
    demo = yaml.safe_load(DEMO.read_text())
    for name in ("configs/demo.yaml", "demo"):
        assert resolved("train", "--config", name).schedule.epochs == demo["epochs"]
        says, others = capsys.readouterr().out.splitlines()
        assert says == f"train: config: {DEMO}"
        assert others.startswith(f"train: config={DEMO}: train does not use images (of main and sample), ")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").write_text("epochs: 777")
    assert resolved(*words).schedule.epochs == 777
    assert capsys.readouterr().out == ""
    for name in ("configs/other.yaml", "other/demo.yaml"):
        with pytest.raises(UserError, match=rf"^config={name}: cannot be read"):
            resolved("train", "--config", name)


def test_of_several_config_files_the_later_one_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("epochs: 7\nseed: 1")
    Path("b.yaml").write_text("epochs: 8\nwarmup: 0.1")
    found = resolved("train", "--config", "demo,a.yaml, b.yaml", "--seed", "3")
    assert (found.schedule.epochs, found.recipe.seed, found.recipe.optimizer.warmup) == (8, 3, 0.1)
    assert found.recipe.network.weights == "none"  # of the demo
    Path("a,b").write_text("epochs: 9")
    assert resolved("train", "--config", "a,b").schedule.epochs == 9
    with pytest.raises(UserError, match=r"^config=nix: no such file, and none of competition, demo, fast, "):
        resolved("train", "--config", "a.yaml,nix")
    # Each on top of config, and an option beats them all; without repetitions.
    context = cli.cli.commands["train"].make_context(
        "train",
        ["--config", "a.yaml", "--configs", "b.yaml,demo", "--seed", "0,1,0", "--batch_size", "4"],
        parent=cli.cli.make_context("", ["train"]),
    )
    each: Any = cli.resolve(context, Train)
    assert [(one.schedule.epochs, one.recipe.seed) for one in each] == [(8, 0), (8, 1), (1, 0), (1, 1)]
    assert {one.recipe.batches.batch_size for one in each} == {4}
    line = call(["train", "--seed", "0,x"]).mistake
    assert line == f"seed: 'x' is not a valid whole number{HELP} train --help"


def test_the_earlier_name_of_a_setting_is_understood_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text("positive_share: 0.7\nfinal_positive_share: 0.3")
    found = resolved("train", "--config", "old.yaml", "--positive-share", "0.6").recipe.batches
    assert (found.positive_fraction, found.final_positive_fraction) == (0.6, 0.3)
    assert Train.of(positive_share=0.5).recipe.batches.positive_fraction == 0.5
    assert as_now(Train, {"positive_share": "0.4"})["positive_fraction"] == 0.4
    Path("space.yaml").write_text("positive_share: {low: 0.1, high: 0.2}")
    study = Search.of(searched="final_positive_share,positive_share", space="space.yaml").study
    ranges = search_space(study, Recipe())
    assert [*ranges] == ["final_positive_fraction", "positive_fraction"]
    assert as_range_text(ranges["positive_fraction"]) == "0.1 to 0.2"


def test_a_command_works_in_the_folder_of_the_process_that_called_it_or_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # and back at the end, for other tests
    monkeypatch.setitem(cli.cli.commands, "where", click.Command("where", callback=lambda: print(Path.cwd())))
    monkeypatch.chdir(tmp_path)
    with subprocess.Popen(["sleep", "60"], cwd="/") as caller:
        cli.cli.main(["--mlflow_pid", str(caller.pid), "where"], standalone_mode=False)
        assert capsys.readouterr().out == "/\n"
        assert os.environ["PYTHONSAFEPATH"] == "1"  # nothing of that folder is imported
        caller.kill()
    for gone in (str(caller.pid), "$PPID"):
        monkeypatch.chdir(tmp_path)
        cli.cli.main(["--mlflow_pid", gone, "where"], standalone_mode=False)
        told, where = capsys.readouterr().out.splitlines()
        assert told.startswith(f"relative paths are of {tmp_path}: no working directory of `mlflow run` (")
        assert where == str(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rat: 1", "did you mean learning_rate?"),
        ("epochs: 0", "epochs: 0 is not in the range"),
        ("epochs: [1, 2]", "epochs: give one value"),
        ("learning_rate: .nan", "not a finite number"),
        ("- epochs", "not a mapping"),
        ("a: [", "not valid YAML"),
        ("network: unet", "network: 'unet' is no network; the nearest are unet:"),
        ("!!python/object/apply:os.system ['false']", "not valid YAML"),
    ],
)
def test_a_config_file_s_mistake_is_named(text: str, expected: str, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    with pytest.raises(UserError) as caught:
        resolved("train", "--config", str(config))
    assert str(caught.value).startswith(f"config={config}: ")
    assert expected in str(caught.value)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_the_printed_config_repeats_the_command(name: str, tmp_path: Path, call: Call) -> None:
    changes = {
        "main": "--epochs 7",
        "sample": "--images 11",
        "get_data": "--source datasets/a/b",
        "preprocess": "--dicom_dir x --pixel-dtype uint8",
        "train": "--augment no --fold 3",
        "search": "--searched learning_rate",
        "score": "--top_score 0.5",
        "register": "--version 2",
    }
    words = changes[name].split()
    end = call([name, *words, "--print-config"])
    assert (end.code, end.err.count("\n")) == (0, name == "main")  # which names the demo's config
    (tmp_path / "c.yaml").write_text(end.out)
    expected = resolved(name, *words)
    assert resolved(name, "--config", str(tmp_path / "c.yaml")) == expected != ENTRY_POINTS[name]()


def test_a_printed_config_shows_no_password(call: Call) -> None:
    end = call(["search", "--storage", "postgresql://me:secret@host/studies", "--print_config"])
    assert "secret" not in end.out
    assert "# storage: postgresql://me:***@host/studies  # the password is not shown" in end.out.splitlines()
    assert "storage" not in yaml.safe_load(end.out)


def test_a_setting_of_others_in_a_config_file_is_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "small.yaml"
    config.write_text("image_size: 64\nepochs: 3\n")
    for name, unused in (
        ("train", "image_size (of main and preprocess)"),
        ("preprocess", "epochs (of main and train)"),
    ):
        resolved(name, "--config", str(config))
        assert capsys.readouterr().out == f"{name}: config={config}: {name} does not use {unused}\n"
    resolved("main", "--config", str(config))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("tra", {"train"}),
        ("u", {"ui"}),
        ("train --netw", {"--network"}),
        ("train --network fcn", {"fcn_resnet50", "fcn_resnet101", "fcn_resnet50_s4"}),
        ("train --augment s", {"strong"}),
        ("train --weights ima", {"file"}),
        ("train --dataset outp", {"file"}),
        ("train --log_level d", {"debug"}),
        ("completion f", {"fish"}),
    ],
)
def test_words_are_completed(typed: str, offered: set[str]) -> None:
    *before, last = typed.split()
    found = BashComplete(cli.cli, {}, "pneumo", "_PNEUMO_COMPLETE").get_completions(before, last)
    assert {item.type if item.type == "file" else item.value for item in found} == offered


def test_bash_completes_the_script_pneumo(tmp_path: Path) -> None:
    script = tmp_path / "pneumo"
    script.write_text(f"#!{sys.executable}\nfrom pneumo_experiments.cli import main\nmain()\n")
    script.chmod(0o755)
    asked = """eval "$(pneumo completion bash)"; COMP_WORDS=(pneumo sea); COMP_CWORD=1
        _pneumo_completion pneumo; echo "${COMPREPLY[@]}"; pneumo tain; pneumo --version"""
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == ["search", f"pneumo, version {__version__}"]
    assert done.stderr.endswith("; see pneumo --help\n") or "See pneumo --help" in done.stderr


def test_a_quiet_command_shows_mistakes_alone(
    store: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", "--output_dir", "s", "--images", "10", "--test_images", "0"]
    assert ended([*words, "--quiet"], monkeypatch, capfd) == End(0, "", "")
    assert ended(words, monkeypatch, capfd).out.startswith("sample: s exists already\nnext ")
    (store / "s" / "sample.json").unlink()
    end = ended([*words, "--quiet", "true"], monkeypatch, capfd)
    assert (end.code, end.out, end.err.count("\n")) == (2, "", 1)


def test_dashes_are_underscores_and_h_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert resolved("train", "--learning-rate", "0.5").recipe.optimizer.learning_rate == 0.5
    cli.cli.main(["train", "-h"], standalone_mode=False)
    out = capsys.readouterr().out
    headings = [line[:-1] for line in out.splitlines() if line and not line.startswith((" ", "Usage"))]
    assert headings[:2] == ["Options", "Epochs"]
    assert "Split by patient" in headings


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_help_names_every_setting_with_meaning_and_default(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.cli.main([name, "--help"], standalone_mode=False)
    shown = " ".join(capsys.readouterr().out.split())
    names = [leaf.name for leaf in leaves(ENTRY_POINTS[name])]
    assert len(set(names)) == len(names) >= 2
    for leaf in leaves(ENTRY_POINTS[name]):
        assert f"--{leaf.name}" in shown
        assert leaf.arg.help.split(";")[0].split()[0] in shown
    assert shown.count("[default:") == 1 + len(leaves(ENTRY_POINTS[name]))
