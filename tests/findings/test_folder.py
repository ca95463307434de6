"""A folder of one's own: table, overlays and DICOM Segmentation objects, and who is told what."""

from __future__ import annotations

import csv
import shutil
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from command_server import Command, CommandServer
from dicom_files import dicom_bytes, with_uids
from helpers import End, ended, environment, make, soak, store_address
from mlflow import MlflowClient
from PIL import Image
from pydicom.uid import generate_uid
from tiny_network import CPU, tiny_member
from tracked import log_model

from pneumo_experiments import tracking
from pneumo_experiments.dataset.resize import resize_image
from pneumo_experiments.dataset.rle import decode
from pneumo_experiments.dicom.radiograph import read_radiograph
from pneumo_experiments.errors import UserError
from pneumo_experiments.findings import folder as folder_findings
from pneumo_experiments.findings.folder import COLUMNS, write_findings
from pneumo_experiments.learning.network import Output
from pneumo_experiments.learning.predict import Predictor, to_native
from pneumo_experiments.metrics.thresholds import Thresholds, apply_thresholds
from pneumo_experiments.serving import Detector, TrainedNetwork
from pneumo_experiments.settings import Score, Train
from pneumo_experiments.stages.score import _score_folder

SIZE = 32
SHAPE = (75, 61)  # as a mask not a whole number of bytes
MODEL = "models:/x@champion"
NAME = "Mustermann^Erika"
IDENTITY = {"PatientName": NAME, "PatientID": "4711-x", "PatientBirthDate": "19500101", "PatientSex": "F"}


class Bright(torch.nn.Module):
    """Finds what is bright: probabilities above 0.5 are pixels above the middle grey."""

    def forward(self, images: torch.Tensor) -> Output:
        logits = (images[:, 0] - 0.5) * 40
        return Output(logits, logits, logits.amax((1, 2)))


THRESHOLDS = Thresholds(min_area_px=20, top_score=0.6, bottom_score=0.4)
DETECTOR = Detector((TrainedNetwork(Predictor(Bright(), CPU), {"network": "bright"}),), SIZE, THRESHOLDS, "")  # type: ignore[arg-type]


def picture(columns: slice = slice(0, 0), shape: tuple[int, int] = SHAPE) -> np.ndarray:
    pixels = np.full(shape, 20, np.uint8)
    pixels[:, ::2] += 1
    pixels[20:50, columns] = 230
    return pixels


def radiograph(pixels: np.ndarray, **header: Any) -> bytes:
    uids = {name: generate_uid(prefix=None) for name in ("StudyInstanceUID", "SeriesInstanceUID")}
    image = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.1", "SOPInstanceUID": generate_uid(prefix=None)}
    return dicom_bytes(pixels, **({"Modality": "CR"} | IDENTITY | uids | image | header))


LEFT = picture(slice(40, 55))  # of the patient, as displayed
FILES = {
    "left": radiograph(LEFT, PixelSpacing=[0.2, 0.1], PatientOrientation=["L", "F"]),
    "mirrored": radiograph(LEFT, ImagerPixelSpacing=[0.2, 0.1], PatientOrientation=["R", "F"]),
    "both": radiograph(picture(slice(20, 41))),
    "large": radiograph(picture(slice(5, 25), (128, 96)), StudyInstanceUID=""),
    "dark": radiograph(picture()),
    "broken": radiograph(LEFT)[:400],
}


def filled(folder: Path, files: Mapping[str, bytes]) -> Path:
    """The folder, with these files; a name without a suffix gets that of DICOM files."""
    for name, content in files.items():
        path = folder / (name if Path(name).suffix else f"{name}.dcm")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    twice = {"a/twice": FILES["left"], "b/twice": FILES["dark"]}
    others = {"junk.txt": b"no radiograph", "._left.dcm": b"of a Mac"}
    return filled(tmp_path_factory.mktemp("dicom"), FILES | twice | others)


def written(folder: Path, **settings: Any) -> dict[str, dict[str, str]]:
    """The rows of findings.csv by image id."""
    chosen = settings_of(folder, **settings)
    write_findings(chosen, DETECTOR, folder, MODEL)
    return rows_of(chosen.findings)


def settings_of(folder: Path, **settings: Any) -> Score:
    return make(Score, **({"dicom_dir": folder, "image_id": "stem", "model": MODEL} | settings))


def score_folder(settings: Score, detector: Detector = DETECTOR) -> None:
    """What ``score`` does with a folder once its model is loaded."""
    with tracking.run("score", settings):
        _score_folder(settings, detector, settings.dicom_dir or Path())


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: an empty folder; there is no run."""
    (desk := tmp_path / "desk").mkdir()
    monkeypatch.chdir(desk)
    return desk


def rows_of(findings: Path) -> dict[str, dict[str, str]]:
    with (findings / "findings.csv").open(newline="", encoding="utf-8") as file:
        assert next(file) == ",".join(COLUMNS) + "\n"
        return {row["image_id"]: row for row in csv.DictReader(file, COLUMNS)}


def mask_of(pixels: np.ndarray) -> np.ndarray:
    """The mask, one image at a time and step by step."""
    prediction = next(DETECTOR.predictor.predict(resize_image(pixels, SIZE)[None]))
    native = to_native(prediction.mask, (pixels.shape[0], pixels.shape[1]))
    return apply_thresholds(native, prediction.presence, THRESHOLDS)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_every_file_has_a_row_and_every_finding_a_picture(
    folder: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score_folder(settings_of(folder, dicom_seg=True, overlays=2))
    rows = rows_of(Path("output/findings"))
    assert list(rows) == sorted([*FILES, "twice"])
    pixels = {"left": LEFT, "mirrored": LEFT, "both": picture(slice(20, 41))}
    pixels["large"] = picture(slice(5, 25), (128, 96))
    for name, image in pixels.items():
        mask, row = mask_of(image), rows[name]
        assert 200 < mask.sum() < 900
        assert np.array_equal(decode(row["rle"], mask.shape), mask)
        assert row["area_px"] == str(mask.sum())
        assert float(row["presence"]) > 0.9
    area = int(rows["left"]["area_px"])
    spacings = {name: (row["area_mm2"], row["spacing"]) for name, row in rows.items()}
    assert spacings["left"] == (f"{area * 0.02:.1f}", "PixelSpacing")
    assert spacings["mirrored"] == (f"{area * 0.02:.1f}", "ImagerPixelSpacing")
    assert spacings["both"] == spacings["broken"] == ("", "")
    sides = {name: row["side"] for name, row in rows.items()}
    assert sides == {
        **{"left": "left", "mirrored": "right", "both": "both", "large": "right"},
        **{"dark": "", "broken": "", "twice": ""},
    }
    assert list(rows["dark"].values()) == ["dark", rows["dark"]["presence"], "0", "", "", "", "-1", ""]
    assert float(rows["dark"]["presence"]) < 0.1
    for name in ("broken", "twice"):
        assert [text for text in rows[name].values() if text] == [name, rows[name]["error"]]
        assert rows[name]["error"].startswith(f"{name}: ")
    assert rows["large"]["error"] == ("large: no DICOM Segmentation: the file's StudyInstanceUID is missing")
    segmented = {"left", "mirrored", "both"}
    assert names(Path("output/findings")) - {".lock", ".findings.csv.sha256"} == {
        "findings.csv",
        *(f"overlays/{name}.png" for name in pixels),
        *(f"segmentations/{name}.dcm" for name in segmented),
    }
    with Path("output/submission.csv").open(newline="") as file:
        submitted = {row["ImageId"]: row["EncodedPixels"] for row in csv.DictReader(file)}
    assert submitted == {name: row["rle"] or "-1" for name, row in rows.items()}

    (run,) = MlflowClient().search_runs(["0"])
    counts = {name: run.data.params[name] for name in ("images", "rejected", "masks")}
    assert counts == {"images": "7", "rejected": "2", "masks": "4"}
    artifacts = names(Path("mlruns/0") / run.info.run_id / "artifacts")
    shown = sorted(name for name in artifacts if name.startswith("overlays/"))
    assert artifacts == {"config.yaml", "findings.csv", "submission.csv", *shown}
    assert [name[:12] for name in shown] == ["overlays/01-", "overlays/02-"]
    said = capsys.readouterr()
    assert "4 with a finding: output/findings/findings.csv, overlays and 3 DICOM Seg" in said.out
    assert "7 images in output/submission.csv, 2 could not be read" in said.out
    assert said.out.splitlines()[-1].endswith("beside it")  # and no warning
    for text in (said.out, said.err, *(rows[name]["error"] for name in rows), str(run.data.tags)):
        assert "Mustermann" not in text


def test_png_copies_give_the_findings_of_the_radiographs_without_their_header(
    folder: Path, desk: Path
) -> None:
    (copies := desk / "png").mkdir()
    expected = written(folder, findings=Path("of-dicom"))
    for name in ("left", "both", "dark"):
        pixels = read_radiograph(FILES[name], name).pixels
        Image.fromarray(pixels).save(copies / f"{name}.png")
    (copies / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    rows = written(copies, dicom_seg=True, max_rejected=0.5)
    for name in ("left", "both", "dark"):
        header_free = ("image_id", "presence", "area_px", "rle")
        assert [rows[name][column] for column in header_free] == [expected[name][c] for c in header_free]
    assert (rows["left"]["side"], rows["left"]["area_mm2"]) == ("left", "")
    assert rows["left"]["error"] == "left: no DICOM Segmentation: the file's StudyInstanceUID is missing"
    assert rows["broken"]["error"].startswith("broken: cannot be decoded: damaged")
    single = written(copies / "left.png", findings=Path("single"))
    assert list(single) == ["left"]
    assert single["left"]["rle"] == rows["left"]["rle"]


def test_an_overlay_shows_the_outline_in_the_proportions_of_the_radiograph(folder: Path, desk: Path) -> None:
    written(folder)
    shown = np.asarray(Image.open("output/findings/overlays/large.png")).astype(int)[40:-40]  # no captions
    plain, outlined = shown[:, : shown.shape[1] // 2], shown[:, shown.shape[1] // 2 :]
    orange = (outlined[..., 0] - outlined[..., 2] > 150).nonzero()
    high, wide = np.ptp(orange[0]), np.ptp(orange[1])
    assert high / wide == pytest.approx(30 / 20, abs=0.3)
    assert not (plain[..., 0] - plain[..., 2] > 150).any()


def test_a_segmentation_is_read_by_another_library(folder: Path, desk: Path) -> None:
    rows = written(folder, dicom_seg=True)
    for name in ("left", "mirrored", "both"):
        read = pydicom.dcmread(f"output/findings/segmentations/{name}.dcm")
        source = pydicom.dcmread(folder / f"{name}.dcm")
        assert np.array_equal(read.pixel_array.astype(bool), decode(rows[name]["rle"], SHAPE))
        facts = (read.Rows, read.Columns, read.NumberOfFrames, read.SegmentationType, read.Modality)
        assert facts == (*SHAPE, 1, "BINARY", "SEG")
        for keyword in ("StudyInstanceUID", *IDENTITY):
            assert read[keyword].value == source[keyword].value
        assert read.SeriesInstanceUID != source.SeriesInstanceUID
        (series,) = read.ReferencedSeriesSequence
        assert series.SeriesInstanceUID == source.SeriesInstanceUID
        (image,) = series.ReferencedInstanceSequence
        (frame,) = read.PerFrameFunctionalGroupsSequence
        (derived,) = frame.DerivationImageSequence[0].SourceImageSequence
        for reference in (image, derived):
            assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
            assert reference.ReferencedSOPClassUID == source.SOPClassUID
        assert derived.SpatialLocationsPreserved == "YES"
        assert "FrameOfReferenceUID" not in read  # a projection has no place in space
        assert read.PatientOrientation == source.get("PatientOrientation", "")
        (shared,) = read.SharedFunctionalGroupsSequence
        assert "PixelMeasuresSequence" not in shared  # GDCM reads none without a plane
        (segment,) = read.SegmentSequence
        codes = (segment.SegmentedPropertyTypeCodeSequence, segment.SegmentedPropertyCategoryCodeSequence)
        assert [(code.CodingSchemeDesignator, code.CodeValue) for (code,) in codes] == [
            ("SCT", "36118008"),
            ("SCT", "49755003"),
        ]
        assert segment.SegmentAlgorithmType == "AUTOMATIC"
        (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
        assert "top_score=0.6" in algorithm.AlgorithmParameters
        assert "models:/x@champion" in algorithm.AlgorithmParameters


ODD = {
    "series": ({"SeriesInstanceUID": "1.02.3"}, "SeriesInstanceUID is not valid"),
    "instance": ({"SOPInstanceUID": "ID_0011fe81e"}, "SOPInstanceUID is not valid"),
    "patient": ({"PatientID": "x" * 65}, "PatientID is not valid"),
}
EMPTIED = {
    "PatientSex": "X",
    "StudyDate": "1.1.2020",
    "StudyTime": "noon",
    "AccessionNumber": "longer than sixteen",
    "PatientBirthDate": "unknown",
}


@pytest.mark.filterwarnings("ignore:Invalid value for VR", "ignore:The value length")
def test_an_odd_header_costs_its_object_or_its_value_and_never_the_run(desk: Path, tmp_path: Path) -> None:
    umlaut = {"PatientName": "Müller^Jörg", "SpecificCharacterSet": "ISO_IR 100"}
    headers = {name: header for name, (header, _) in ODD.items()} | {"emptied": EMPTIED, "umlaut": umlaut}
    odd = filled(tmp_path / "odd", {name: radiograph(LEFT, **header) for name, header in headers.items()})
    settings = settings_of(odd, dicom_seg=True)
    lines = write_findings(settings, DETECTOR, odd, MODEL).lines
    rows = rows_of(settings.findings)
    for name, (_, reason) in ODD.items():
        assert rows[name]["error"] == f"{name}: no DICOM Segmentation: the file's {reason}"
        assert rows[name]["side"] == "left"
    objects = Path("output/findings/segmentations")
    assert {path.stem for path in objects.iterdir()} == {"emptied", "umlaut"}
    read = pydicom.dcmread(objects / "emptied.dcm")
    assert {read[keyword].value or "" for keyword in EMPTIED} == {""}
    assert read.PatientName == NAME
    assert str(pydicom.dcmread(objects / "umlaut.dcm").PatientName) == "Müller^Jörg"
    assert "Müller" not in "".join(lines)


def test_objects_without_pictures_and_equal_names_cost_no_image(desk: Path, tmp_path: Path) -> None:
    report = with_uids(FILES["left"], sop_class="1.2.840.10008.5.1.4.1.1.88.11")
    images = {"a/IM-0001": FILES["left"], "b/IM-0001": FILES["both"]}
    rows = written(filled(tmp_path / "study", images | {"a/SR": report, "b/SR": report}), image_id="auto")
    assert {image_id: row["side"] for image_id, row in rows.items()} == {
        "a/IM-0001": "left",
        "b/IM-0001": "both",
    }
    overlays = [path.name for path in sorted(Path("output/findings/overlays").iterdir())]
    assert [name[:10] for name in overlays] == ["a_IM-0001-", "b_IM-0001-"]
    with Path("output/submission.csv").open(newline="") as file:
        assert [row["ImageId"] for row in csv.DictReader(file)] == ["a/IM-0001", "b/IM-0001"]


def test_absurd_masks_are_warnings_on_the_terminal_and_in_the_description(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [(picture() + 210).astype(np.uint8)] * 2 + [LEFT] * 10 + [picture()] * 8
    files = {f"{number}": radiograph(image) for number, image in enumerate(images)}
    chosen = make(Score, dicom_dir=filled(tmp_path / "many", files))
    score_folder(chosen, replace(DETECTOR, prevalence=0.22))
    warnings = [
        "2 masks cover more than half of their image: look at their overlays",
        "a finding on 60% of the images, 22% in training: check the thresholds, and that the model suits"
        " these images",
    ]
    assert capsys.readouterr().out.splitlines()[-2:] == [f"score: {each}" for each in warnings]
    (run,) = MlflowClient().search_runs(["0"])
    assert run.data.tags["mlflow.note.content"].splitlines()[-2:] == [f"{each}." for each in warnings]


def test_a_zip_file_gives_what_its_folder_gives(folder: Path, desk: Path) -> None:
    expected = written(folder)
    with zipfile.ZipFile("all.zip", "w") as archive:
        for path in folder.rglob("*"):
            archive.write(path, Path("a patient's name") / path.relative_to(folder))
    assert written(Path("all.zip"), findings=Path("from-zip")) == expected
    assert names(Path("from-zip")) == names(Path("output/findings"))


def test_the_same_command_twice_and_fewer_files_later(folder: Path, desk: Path, tmp_path: Path) -> None:
    first = written(folder, dicom_seg=True)
    assert written(folder, dicom_seg=True) == first
    shutil.copytree(folder, tmp_path / "fewer")
    (tmp_path / "fewer" / "left.dcm").unlink()
    Path("output/findings/overlays/left.png.1234.part").write_bytes(b"of a killed run")
    Path("output/findings/notes.txt").write_text("of a radiologist")
    rows = written(tmp_path / "fewer")
    assert rows == {name: row for name, row in first.items() if name != "left"} | {
        "large": rows["large"]  # without the reason for its missing object
    }
    assert names(Path("output/findings")) - {".lock", ".findings.csv.sha256"} == {
        *("findings.csv", "notes.txt"),
        *(f"overlays/{name}.png" for name in ("both", "large", "mirrored")),
    }


def test_what_is_not_its_own_is_not_touched(folder: Path, desk: Path) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="findings=mine: exists and was not created by score; name another"):
        written(folder, findings=Path("mine"))
    assert names(Path("mine")) == {"thesis.txt"}
    with pytest.raises(UserError, match=r"findings=mine/thesis.txt: is a file; name a folder"):
        written(folder, findings=Path("mine/thesis.txt"))
    written(folder)
    table = Path("output/findings/findings.csv")
    table.write_text(table.read_text() + "a radiologist's row\n")
    with pytest.raises(UserError, match=r"findings.csv: exists, and is not as score wrote it"):
        written(folder)
    assert "radiologist" in table.read_text()
    Path("file").write_text("")
    with pytest.raises(UserError, match=r"findings=file/below: cannot be written \(Not a directory\)"):
        written(folder, findings=Path("file/below"))


def test_max_rejected_decides_about_the_end_and_all_is_written_before(folder: Path, store: Path) -> None:
    assert write_findings(settings_of(folder, max_rejected=2 / 7), DETECTOR, folder, MODEL).failure == ""
    shutil.rmtree("output")
    with pytest.raises(UserError) as error:
        score_folder(settings_of(folder, max_rejected=0.28))
    assert str(error.value).startswith(
        f"dicom_dir={folder}: 2 of 7 images could not be read, more than max_rejected=0.28; all files are"
        " written; the first: broken: "
    )
    assert len(rows_of(Path("output/findings"))) == len(FILES) + 1
    run = MlflowClient().search_runs(["0"], order_by=["attributes.start_time DESC"])[0]
    assert (run.info.status, run.data.params["rejected"]) == ("FAILED", "2")
    artifacts = names(Path("mlruns/0") / run.info.run_id / "artifacts")
    assert {"findings.csv", "submission.csv"} < artifacts


def test_an_interrupted_run_leaves_whole_files_and_the_next_one_finishes(
    folder: Path, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = set(threading.enumerate())
    with monkeypatch.context() as patch:
        patch.setattr(folder_findings, "write_segmentation", stop)
        with pytest.raises(KeyboardInterrupt):
            written(folder, dicom_seg=True)
    assert not {name for name in names(Path("output")) if name.endswith((".part", ".csv", ".dcm"))}
    for path in Path("output/findings/overlays").iterdir():
        Image.open(path).load()
    assert set(threading.enumerate()) <= before
    assert len(written(folder, dicom_seg=True)) == len(FILES) + 1


def test_a_name_that_is_too_long_with_its_suffix_is_shortened(desk: Path, tmp_path: Path) -> None:
    ids = ["x" * 250 + end for end in "ab"]
    assert list(written(filled(tmp_path / "long", dict.fromkeys(ids, FILES["left"])))) == ids
    assert len([*Path("output/findings/overlays").iterdir()]) == 2


@pytest.fixture
def model(store: Path, tiny: None) -> str:
    """The address of a logged model that finds something everywhere."""
    detector = Detector((tiny_member(0),), 32, Thresholds(0, 0, 0, 0), "")
    return log_model(detector, make(Train, network="tiny"))


@pytest.fixture
def command(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., End]:
    """``score`` with that model."""

    def run(*words: object) -> End:
        return ended(["score", "--model", model, *map(str, words)], monkeypatch, capsys)

    return run


def test_the_command_and_the_mistakes_of_newcomers(
    command: Callable[..., End], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = command("--dicom_dir", folder, "--image_id", "stem", "--dicom_seg", "true", "--overlays", "0")
    assert (end.code, end.err) == (0, "")
    assert "5 with a finding" in end.out
    assert rows_of(Path("output/findings"))["dark"]["area_px"] == str(SHAPE[0] * SHAPE[1])
    shutil.rmtree("output")

    filled(tmp_path / "broken", {"x": FILES["broken"]})
    monkeypatch.setitem(sys.modules, "highdicom", None)
    lines = {
        ("--dicom_dir", "broken"): "dicom_dir=broken: no file can be used; the first: x: ",
        ("--dicom_dir", str(folder), "--dicom_seg", "true"): "dicom_seg=true: needs highdicom; pip install",
        ("--dicom_dir", str(folder), "--bottom_score", "0.333"): "bottom_score=0.333: give a whole hundredth",
    }
    for words, line in lines.items():
        end = command(*words)
        assert end.code == 2, words
        assert end.err.startswith(f"Error: {line}"), end.err
        assert len(end.err.splitlines()) == 1
        assert not Path("output").exists(), words
    runs = MlflowClient().search_runs(["0"])
    assert {run.info.status for run in runs} == {"FINISHED", "FAILED"}


@soak
def test_killed_among_its_files_the_same_command_leaves_what_an_undisturbed_one_leaves(
    commands: CommandServer, folder: Path, store: Path, model: str
) -> None:
    many = store / "many"
    many.mkdir()
    for number in range(100):
        for name in ("left", "both", "dark"):
            (many / f"{name}-{number}.dcm").hardlink_to(folder / f"{name}.dcm")
    variables = environment() | {"MLFLOW_TRACKING_URI": store_address(store)}

    def start(place: str) -> Command:
        (store / place).mkdir(exist_ok=True)
        words = ["score", "--dicom_dir", many, "--model", model]
        return commands.start(*words, folder=store / place, environment=variables, tiny=True)

    def left(place: str) -> dict[str, bytes]:
        files = {path.relative_to(store / place): path for path in (store / place).rglob("*.*")}
        return {
            str(name): path.read_bytes() for name, path in files.items() if path.suffix in (".csv", ".png")
        }

    whole = start("whole")
    assert whole.communicate()[0] == 0
    killed = start("killed")
    while killed.poll() is None and len([*(store / "killed").rglob("*.png")]) < 20:
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    assert killed.communicate()[0] == -signal.SIGKILL
    assert not [*(store / "killed").rglob("*.csv")]
    assert start("killed").communicate()[0] == 0
    assert left("killed") == left("whole")
    assert len(left("whole")) > 100
    scores = [
        run.info.status
        for run in MlflowClient().search_runs(["0"])
        if run.data.tags["pneumo.stage"] == "score"
    ]
    assert sorted(scores) == ["FINISHED", "FINISHED", "KILLED"]
