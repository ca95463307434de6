"""``get_data``, on a server that stands for Kaggle: layout, checks, resuming, failures."""

from __future__ import annotations

import io
import json
import os
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from command_server import CommandServer
from helpers import Call, End, environment
from kaggle_server import BEARER, KEY, SECRET, USER, Kaggle, kaggle_server
from tracked import last_run

from pneumo_experiments.dataset import patients
from pneumo_experiments.dataset.kaggle import CHUNK_BYTES

CONTEST, COPY = "competitions/siim-acr-pneumothorax-segmentation", "datasets/seesee/siim-train-test"
UIDS = [f"1.2.276.{number}" for number in range(6)]
LABELLED = UIDS[:5]  # 5 has no annotation, as 37 of the challenge's images
HEAD = "ImageId, EncodedPixels\n"


def zipped(files: dict[str, str | bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


def image(name: str) -> bytes:
    """Some bytes that do not compress, and that tell whose file it is."""
    return name.encode() + np.random.default_rng(len(name)).bytes(3000)


def rows(ids: list[str]) -> str:
    return HEAD + "".join(f"{image_id}, -1\n" for image_id in ids)


@pytest.fixture
def kaggle(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kaggle]:
    """The challenge's data in small, and a shipped table of its five labelled images."""
    table = np.array(sorted((patients.image_number(uid), 1) for uid in LABELLED), patients.ROW)
    home = tmp_path_factory.mktemp("home")
    table.tofile(home / "patients.bin")
    monkeypatch.setattr(patients, "SHIPPED", home / "patients.bin")
    for name in [name for name in os.environ if name.startswith("KAGGLE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(home))
    (home / "kaggle.json").write_text(json.dumps({"username": USER, "key": KEY}))
    with kaggle_server() as server:
        monkeypatch.setenv("KAGGLE_API_ENDPOINT", server.address)
        server.files[CONTEST] = zipped(
            {
                "stage_2_train.csv": rows(LABELLED),
                "stage_2_sample_submission.csv": HEAD + "ID_1, -1\nID_2, -1\n",
                **{f"stage_2_images/ID_{n}.dcm": image(f"ID_{n}") for n in (1, 2)},
            }
        )
        server.files[COPY] = zipped({
            # The table of the first stage, whose test images have no label in it.
            "siim/train-rle.csv": rows(LABELLED[:3]),
            **{f"siim/dicom-images-train/{n}/{uid}/{uid}.dcm": image(uid) for n, uid in enumerate(UIDS[:4])},
            **{f"siim/dicom-images-test/{n}/{uid}/{uid}.dcm": image(uid) for n, uid in enumerate(UIDS[4:])},
            # What must not be written, or not outside.
            "__MACOSX/siim/dicom-images-train/._1.dcm": "junk",
            "__MACOSX/siim/dicom-images-train/junk.dcm": "junk",
            ".hidden.dcm": "junk",
            "siim/readme.txt": "junk",
            "../../outside.dcm": "escaped",
            "/absolute.dcm": "escaped",
            "..\\..\\windows.dcm": "escaped",
        })  # fmt: skip
        yield server


LARGE = {
    "noise": np.random.default_rng(0).bytes(3 * CHUNK_BYTES),
    "train-rle.csv": rows(LABELLED),
    "1.dcm": image("whole"),
}
ESCAPED = ["absolute.dcm", "outside.dcm", "windows.dcm"]  # within the layout, where they harm nobody


Get = Callable[[str], End]


@pytest.fixture
def get(kaggle: Kaggle, store: Path, call: Call) -> Get:
    """How the command ends in the working directory; it shows no secret."""

    def run(words: str) -> End:
        end = call(["get-data", *words.split()])
        assert not any(secret in end.out + end.err for secret in (KEY, BEARER, SECRET))
        return end

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_it_makes_the_layout_and_the_same_command_downloads_nothing_again(
    kaggle: Kaggle, store: Path, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = get("")
    assert (end.code, end.err) == (0, "")
    assert "get_data: 5 labelled images and 2 test images in siim\n" in end.out
    assert "preprocess --dicom_dir siim/dicom-images-train --rle_csv siim/train-rle.csv" in end.out
    found = contents(store / "siim")
    assert json.loads(found.pop("get_data.json")) == {"source": f"{CONTEST},{COPY}", "files": 11}
    assert found.pop("train-rle.csv").decode() == rows(LABELLED)  # the one that labels the most images
    assert found.pop("sample_submission.csv").decode().endswith("ID_2, -1\n")
    assert [found.pop(f"dicom-images-train/{name}") for name in ESCAPED] == [b"escaped"] * 3
    expected = {f"dicom-images-train/{uid}.dcm": image(uid) for uid in UIDS}
    assert found == expected | {f"dicom-images-test/{uid}.dcm": image(uid) for uid in ("ID_1", "ID_2")}
    assert not (store / "outside.dcm").exists() and not (store.parent / "outside.dcm").exists()
    assert kaggle.leaked == []  # the server of the files got no token
    run = last_run("get_data")
    assert run.info.status == "FINISHED" and run.data.tags["mlflow.note.content"].endswith(
        f"5 labelled images and 2 test images, from {CONTEST},{COPY}."
    )
    asked = len(kaggle.downloads)
    (store.parent / "home").mkdir(exist_ok=True)
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(store.parent / "home"))  # it needs no token any more
    end = get("")
    assert (end.code, len(kaggle.downloads)) == (0, asked)
    assert "get_data: 5 labelled images and 2 test images in siim, as before\n" in end.out


def test_a_missing_file_is_fetched_again_and_no_other_is_changed(store: Path, get: Get) -> None:
    get("")
    lost, own = (store / "siim" / "dicom-images-train" / f"{uid}.dcm" for uid in UIDS[:2])
    lost.unlink()
    own.write_bytes(b"own")
    assert get("").code == 0
    assert (lost.read_bytes(), own.read_bytes()) == (image(UIDS[0]), b"own")


def test_images_that_are_missing_are_counted(
    kaggle: Kaggle, get: Get, caplog: pytest.LogCaptureFixture
) -> None:
    files = {f"{uid}.dcm": image(uid) for uid in UIDS[:2]}
    kaggle.files[COPY] = zipped(files | {"train-rle.csv": rows(LABELLED[:3])})
    end = get(f"--source {COPY}")
    assert "2 labelled images and 0 test images" in end.out
    said = "has 2 of the challenge's 5 labelled images: 2 have no label, 1 have no file"
    assert [record.getMessage().partition("siim: ")[2] for record in caplog.records] == [said]


@pytest.mark.parametrize("changed", [False, True])
def test_after_kill_9_it_goes_on_unless_the_file_has_changed(
    changed: bool, kaggle: Kaggle, store: Path, get: Get, commands: CommandServer
) -> None:
    kaggle.files[COPY] = zipped(LARGE)
    kaggle.stalls_after = CHUNK_BYTES + 5000
    command = commands.start("get_data", "--source", COPY, folder=store, environment=environment())
    assert kaggle.stalled.wait(60)
    while [file.stat().st_size for file in (store / "siim" / "download").glob("*.part")] != [CHUNK_BYTES]:
        time.sleep(0.01)
    os.kill(command.pid, signal.SIGKILL)
    command.communicate()
    kaggle.stalls_after = None
    kaggle.downloads.clear()
    if changed:
        kaggle.tag = '"2"'
        kaggle.files[COPY] = zipped({"train-rle.csv": rows(LABELLED), "1.dcm": image("changed")})
    end = get(f"--source {COPY}")
    assert end.code == 0, end
    assert kaggle.downloads == [(COPY, ""), (COPY, f"bytes={CHUNK_BYTES}-")][: 1 if changed else 2]
    expected = image("changed" if changed else "whole")
    assert (store / "siim" / "dicom-images-train" / "1.dcm").read_bytes() == expected
    assert not (store / "siim" / "download").exists()


def test_a_broken_connection_and_a_refusal_cost_nothing_that_is_there(kaggle: Kaggle, get: Get) -> None:
    kaggle.refusals[COPY] = 403
    assert get("").code == 2
    kaggle.refusals.clear()
    kaggle.files[COPY], kaggle.breaks_after = zipped(LARGE), CHUNK_BYTES + 5000
    line = get("").mistake
    assert line.startswith(f"source={COPY}: the connection to Kaggle failed (")
    assert line.endswith("; check the network, and run the command again: it goes on from there")
    kaggle.breaks_after = None
    assert get("").code == 0
    assert [source for source, _ in kaggle.downloads].count(CONTEST) == 1
    assert kaggle.downloads[-1] == (COPY, f"bytes={CHUNK_BYTES}-")


NEW_TOKEN = "create a new one at https://www.kaggle.com/settings"
REFUSED = {
    401: f"Kaggle does not accept the token (401); {NEW_TOKEN}",
    403: f"Kaggle refuses it (403); open https://www.kaggle.com/{COPY} in a browser, with the account of the"
    " token, accept the rules, and run the command again",
    404: "Kaggle has nothing of that name, or does not show it to you (404); name another source",
    503: "Kaggle answers with 503; run the command again later",
}


@pytest.mark.parametrize("status", REFUSED)
def test_what_kaggle_refuses_is_one_line(status: int, kaggle: Kaggle, store: Path, get: Get) -> None:
    kaggle.refusals[COPY] = status
    assert get(f"--source {COPY}").mistake == f"source={COPY}: {REFUSED[status]}"
    assert not (store / "siim").exists()


def test_without_a_token_or_with_a_damaged_one_it_says_what_to_do(
    kaggle: Kaggle, store: Path, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(store))
    assert get("").mistake == (
        "no token for Kaggle; create one at https://www.kaggle.com/settings, and save it as"
        " kaggle.json, or set KAGGLE_USERNAME and KAGGLE_KEY"
    )
    for content in (f'{{"key": "{KEY}"', f'["{KEY}"]', f'{{"username": null, "key": "{KEY}"}}', "\0"):
        (store / "kaggle.json").write_text(content)
        line = "kaggle.json: damaged; create a new token at https://www.kaggle.com/settings"
        assert get("").mistake == line
    (store / "kaggle.json").unlink()
    (store / "kaggle.json").mkdir()
    assert get("").mistake.startswith(f"{store}: the token cannot be read (Is a directory)")
    assert kaggle.downloads == []


@pytest.mark.parametrize("way", ["KAGGLE_KEY", "KAGGLE_API_TOKEN", "access_token", "wrong"])
def test_a_token_is_taken_from_where_kaggle_s_client_takes_it(
    way: str, store: Path, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(store))
    if way == "access_token":
        (store / way).write_text(f"{BEARER}\n")
    elif way == "KAGGLE_API_TOKEN":
        monkeypatch.setenv(way, BEARER)
    else:
        monkeypatch.setenv("KAGGLE_USERNAME", USER)
        monkeypatch.setenv("KAGGLE_KEY", KEY if way == "KAGGLE_KEY" else "ä wrong one")
    end = get("")
    assert end.code == (2 if way == "wrong" else 0)
    assert (f"(401); {NEW_TOKEN}" in end.err) == (way == "wrong")


def test_what_is_no_archive_or_a_damaged_one_is_downloaded_again(kaggle: Kaggle, get: Get) -> None:
    whole = kaggle.files[COPY]
    flipped = bytearray(whole)
    flipped[whole.index(image(UIDS[1])) + 100] ^= 1
    reasons = {
        b"<html>please log in</html>": "Kaggle sent no zip file",
        whole[:-40]: "Kaggle sent no zip file",
        bytes(flipped): f"{UIDS[1]}.dcm: damaged in the zip file",
    }
    for content, reason in reasons.items():
        kaggle.files[COPY], kaggle.tag = content, f'"{len(reason)}"'
        line = get(f"--source {COPY}").mistake
        assert line.endswith(f"{reason}; run the command again, which downloads it anew")
    kaggle.files[COPY], kaggle.tag = whole, '"whole"'
    assert get(f"--source {COPY}").code == 0


@pytest.mark.parametrize(
    "source", ["", "seesee/siim", "datasets/siim", f"{COPY},", f"{COPY}/../x", "models/a/b"]
)
def test_a_source_is_a_data_set_or_a_competition(source: str, call: Call) -> None:
    line = call(["get_data", "--source", source]).mistake
    assert line.startswith(f"source: {source!r} is not datasets/OWNER/NAME or competitions/NAME")


def test_a_source_without_the_challenge_s_labels_is_refused(kaggle: Kaggle, get: Get) -> None:
    kaggle.files[COPY] = zipped({"a.dcm": image("a"), "train.csv": rows(["a"]), "odd.csv": "a;b\n"})
    line = get(f"--source {COPY}").mistake
    assert line.startswith("source: no table in it labels images of the challenge; ")
    assert last_run("get_data").info.status == "FAILED"


def test_a_full_disk_is_one_line_and_the_same_command_does_the_rest(
    kaggle: Kaggle, store: Path, get: Get, commands: CommandServer
) -> None:
    kaggle.files[COPY] = zipped(LARGE)
    options = {"folder": store, "environment": environment(), "max_file_bytes": 2 * CHUNK_BYTES}
    code, output = commands.start("get_data", "--source", COPY, **options).communicate()
    lines = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert (code, len(lines)) == (2, 1), output
    assert "cannot be written (File too large)" in lines[0] and KEY not in output
    assert get(f"--source {COPY}").code == 0
