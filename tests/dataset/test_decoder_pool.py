"""Radiographs read in processes of their own, that may die."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from bombs import deflated_header, many_scans, tiny_precincts
from dicom_files import GREYS, dicom_bytes, jpeg_file
from helpers import ROOT, decoders

from pneumo_experiments.dataset import decoder_pool
from pneumo_experiments.dataset.decoder_pool import (
    MAX_PENDING,
    Crashed,
    DecodedImage,
    File,
    Request,
    call_all,
    close_idle,
    decode_all,
)
from pneumo_experiments.dataset.resize import resize_image
from pneumo_experiments.dicom import limits
from pneumo_experiments.dicom.radiograph import read_radiograph
from pneumo_experiments.errors import Rejected, UserError

SIZE = 16
GOOD = jpeg_file(GREYS)


def shifted(number: int) -> bytes:
    return dicom_bytes(np.roll(GREYS, number, axis=1)[:, : 20 + number % 7])


def outcomes(*files: File) -> list[DecodedImage | Rejected]:
    found = list(decode_all(files, SIZE))
    assert [image_id for image_id, _ in found] == [image_id for image_id, _ in files]
    return [outcome for _, outcome in found]


def peak_bytes(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def wait_for_one_at_work() -> psutil.Process:
    """The decoder that has used a quarter of a second since this was asked, or a new one after its start."""
    before = {child.pid: sum(child.cpu_times()[:2]) for child in decoders()}
    while True:
        for child in decoders():
            if sum(child.cpu_times()[:2]) > before.setdefault(child.pid, 1.0) + 0.25:
                return child
        time.sleep(0.01)


def kill_decoders() -> list[psutil.Process]:
    killed = decoders()
    for decoder in killed:
        decoder.kill()
    return killed


def test_many_files_come_back_in_order_as_a_plain_reading_gives_them() -> None:
    files: list[File] = [(str(number), shifted(number)) for number in range(2 * MAX_PENDING + 5)]
    files[3], files[40] = ("cut", GOOD[:-300]), ("unread", Rejected("unread: no permission"))
    found = outcomes(*files)
    for number, outcome in enumerate(found):
        if number == 3:
            assert str(outcome) == "cut: no pixel data: not an image, or truncated"
        elif number == 40:
            assert outcome is files[40][1]
        else:
            assert isinstance(outcome, DecodedImage)
            pixels = read_radiograph(shifted(number), "").pixels
            assert (outcome.rows, outcome.columns) == pixels.shape
            assert np.array_equal(outcome.pixels, resize_image(pixels, SIZE))


def test_files_are_drawn_only_a_little_ahead() -> None:
    drawn = list[int]()
    found = decode_all(((str(number), GOOD) for number in range(9999) if drawn.append(number) is None), SIZE)
    for taken in range(1, 50):
        next(found)
        assert len(drawn) <= taken + MAX_PENDING
    found.close()
    assert len(drawn) < 50 + MAX_PENDING


def test_threads_share_the_processes_and_get_their_own_pictures() -> None:
    expected = [resize_image(read_radiograph(shifted(n), "").pixels, SIZE) for n in range(7)]

    def ask(number: int) -> None:
        for _ in range(5):
            found = outcomes(*((f"{number} {n}", shifted(n)) for n in range(7)))
            for outcome, pixels in zip(found, expected, strict=True):
                assert isinstance(outcome, DecodedImage)
                assert np.array_equal(outcome.pixels, pixels)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(ask, range(6)))
    before = {child.pid for child in decoders()}
    outcomes(("again", GOOD))
    assert {child.pid for child in decoders()} == before  # none is started without need


def test_a_file_that_takes_too_long_costs_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BASE_SECONDS", 1)
    monkeypatch.setattr(limits, "SECONDS_PER_MEGABYTE", 0)
    files = {"a": GOOD, "scans": many_scans(), "header": deflated_header(), "z": GOOD}
    good, scans, header, last = outcomes(*files.items())
    assert isinstance(good, DecodedImage)
    assert isinstance(last, DecodedImage)
    assert str(scans) == "scans: needs more than 1 s of CPU time to decode"
    assert str(header) == "header: needs more than 1 s of CPU time to decode"


def test_a_file_that_takes_too_much_memory_costs_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BASE_SECONDS", 3)
    close_idle()  # no decoder has a peak yet
    pixels = 2**20
    files: list[File] = [("a", GOOD), ("items", deflated_header()), ("z", GOOD)]
    good, items, last = (outcome for _, outcome in decode_all(files, SIZE, pixels))
    # Python may be slow to give up: then the other limit ends it.
    assert re.fullmatch("items: needs more than (0.3 GB of memory|3 s of CPU time) to decode", str(items))
    assert isinstance(good, DecodedImage)
    assert isinstance(last, DecodedImage)
    monkeypatch.setattr(decoder_pool, "MAX_DECODERS", 1)
    close_idle()  # the next one meets the bomb before any JPEG; OpenJPEG frees nothing when it fails
    files = [("precincts", tiny_precincts(2000)), ("y", GOOD), ("z", GOOD)]
    precincts, *others = (outcome for _, outcome in decode_all(files, SIZE, 4 * pixels))
    assert str(precincts) == "precincts: needs more than 0.3 GB of memory to decode"
    assert [type(outcome) for outcome in others] == [DecodedImage, DecodedImage]
    # Without a limit the first takes up to 1.2 GB, the second 2.4.
    assert max(map(peak_bytes, decoders())) < limits.max_bytes(4 * pixels) + 10**8
    ((_, outcome),) = decode_all([("x", bytes(2**24 + 401))], SIZE, max_pixels=100)  # not even sent
    assert str(outcome) == "x: rejected because 16,777,617 bytes are more than max_pixels allows"


def test_a_decoder_that_dies_costs_one_row_or_none() -> None:
    outcomes(*[("warm", GOOD)] * 4)
    killed = list[psutil.Process]()

    def kill_all() -> None:
        wait_for_one_at_work()
        killed.extend(kill_decoders())

    killer = threading.Thread(target=kill_all)
    killer.start()
    (struck,) = outcomes(("scans", many_scans()))
    killer.join()
    assert str(struck) == "scans: its decoder crashed"
    for process in killed:  # one that is still dying could take one more file with it
        with suppress(ChildProcessError):  # that of the file, whose end the pool has seen
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    # Those that were idle are dead as well, which nobody notices.
    assert all(isinstance(outcome, DecodedImage) for outcome in outcomes(*[("again", GOOD)] * 4))


class Unreadable:
    def __reduce__(self) -> Any:
        return int, ("x",)  # ValueError when it is unpickled


def test_a_request_that_cannot_be_unpickled_ends_its_process_not_the_work() -> None:
    watchdog = threading.Timer(30, kill_decoders)
    watchdog.start()
    ((_, reply),) = call_all([Request("a", 1, 1, print, (Unreadable(),))])
    watchdog.cancel()
    assert isinstance(reply, Crashed)
    assert reply.returncode == 1


@pytest.mark.parametrize(
    ("program", "reason"), [("/no/such/python", "No such file"), ("/bin/false", "exit code 1")]
)
def test_a_process_that_does_not_start_is_one_line(
    program: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    psutil.wait_procs(kill_decoders())
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(UserError, match=rf"does not start \({reason}.*\); free memory, or set fewer workers"):
        outcomes(("a", GOOD))


def test_who_stops_asking_ends_what_is_being_read() -> None:
    found = decode_all([("a", GOOD), ("scans", many_scans()), ("z", GOOD)], SIZE)
    next(found)
    worker = wait_for_one_at_work()
    found.close()
    assert not worker.is_running()
    assert isinstance(outcomes(("again", GOOD))[0], DecodedImage)


SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
from pneumo_experiments.dataset.decoder_pool import decode_all

print("once", flush=True)
def read(name):
    ((_, outcome),) = decode_all([(name, open(name, "rb").read())], 16)
    return outcome.rows, outcome.columns
print(read("wide"), flush=True)  # what is buffered the child would print, too
child = os.fork()
for _ in range(20):
    assert read("wide" if child else "tall") == ((32, 48) if child else (48, 32))
if child:
    print(os.waitpid(child, 0)[1], sorted(name for name in sys.modules if name in ("torch", "mlflow")))
"""


def test_a_script_without_a_main_guard_and_a_fork_of_it_can_use_them(tmp_path: Path) -> None:
    (tmp_path / "wide").write_bytes(GOOD)
    (tmp_path / "tall").write_bytes(jpeg_file(np.ascontiguousarray(GREYS.T)))
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong one')")  # of the folder, not the script
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "ask.py").write_text(SCRIPT.format(root=str(ROOT)))
    done = subprocess.run(
        [sys.executable, "script/ask.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("once\n(32, 48)\n0 []\n", "")


def test_no_decoder_outlives_a_process_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "scans").write_bytes(many_scans())
    code = "from pneumo_experiments.dataset.decoder_pool import decode_all\n"
    code += f"list(decode_all([('x', open({str(tmp_path / 'scans')!r}, 'rb').read())], 16))"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
        while not (children := psutil.Process(process.pid).children()):
            time.sleep(0.01)
        while sum(children[0].cpu_times()[:2]) < 1.2:  # it has begun
            time.sleep(0.01)
        process.kill()
    assert psutil.wait_procs(children, timeout=10)[1] == []
