"""A served model: what a request costs beyond the network, four clients, a batch, many requests, and loading.

python benchmarks/serve.py                   some minutes
python benchmarks/serve.py --requests 1000   with a thousand requests from 4 clients

It starts a real `mlflow models serve` with an untrained FCN-ResNet50 at 384 pixels (with flip) on synthetic
radiographs of 1024 x 1024 pixels. A request and the bare forward pass in this process take turns, so that
other work on the machine slows both. Medians; the load says what else ran.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
from measure import machine

from pneumo_experiments.learning.device import choose_compute
from pneumo_experiments.learning.network import PneumothoraxNet
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.metrics.thresholds import Thresholds
from pneumo_experiments.serving import Detector, TrainedNetwork, new_folder, save
from pneumo_experiments.settings import Device, Train, as_config
from pneumo_experiments.synthetic.kaggle_layout import Contents, write_sample
from pneumo_experiments.tracking.models import save_model

SIZE_PX, BATCH, CLIENTS, WARM_REQUESTS = 384, 20, 4, 100
LOADING = """
import json, sys, time
def seconds(work):
    start = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start[0], time.process_time() - start[1]
def torch_and_weights():
    import torch
    torch.load(sys.argv[2], weights_only=True)
def model():
    import mlflow.pyfunc
    mlflow.pyfunc.load_model(sys.argv[1])
import logging; logging.disable()
if sys.argv[3] == "model":
    import mlflow.pyfunc
    print(json.dumps(seconds(model)))
else:
    print(json.dumps(seconds(torch_and_weights)))
"""


@dataclass
class Server:
    """A served model, and how many of its answers were wrong."""

    url: str
    process: psutil.Process
    seconds: list[float] = field(default_factory=list[float])
    lost: int = 0

    def ask(self, body: bytes, rows: int = 1) -> float:
        """Seconds until the answer; counts it as lost unless it has this number of rows without errors."""
        start = time.perf_counter()
        request = urllib.request.Request(
            self.url + "/invocations", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                answer = json.load(response)["predictions"]
            self.lost += [row["error"] for row in answer] != [""] * rows
        except (OSError, ValueError, LookupError):
            self.lost += 1
        return time.perf_counter() - start

    def ask_at_once(self, bodies: list[bytes], requests: int) -> list[float]:
        """Seconds of each request, sent by several clients that do not wait for each other."""
        taken = list[float]()

        def client(number: int) -> None:
            for n in range(number, requests, CLIENTS):
                taken.append(self.ask(bodies[n % len(bodies)]))

        clients = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
        for one in clients:
            one.start()
        for one in clients:
            one.join()
        return taken

    def megabytes(self) -> float:
        """Memory of the server and the processes below it that nothing else uses."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(one.memory_full_info().uss for one in family) / 1e6


@contextmanager
def serve(model: Path, folder: Path) -> Generator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    words = ["models", "serve", "-m", model, "--env-manager", "local", "--host", "127.0.0.1", "--port", port]
    words += ["--timeout", 600]
    command = [str(Path(sys.executable).parent / "mlflow"), *map(str, words)]
    variables = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with (
        (folder / "serve.log").open("w") as log,
        # In a group of its own, so that uvicorn below it ends as well.
        subprocess.Popen(
            command, cwd=folder, env=variables, stdout=log, stderr=log, process_group=0
        ) as process,
    ):
        try:
            server = Server(f"http://127.0.0.1:{port}", psutil.Process(process.pid))
            while process.poll() is None:
                try:
                    urllib.request.urlopen(server.url + "/ping", timeout=2).close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield server
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turns(forward: Callable[[], object], ask: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Median milliseconds of both."""
    taken = [(seconds_of(forward), ask()) for _ in range(repeats)]
    forwards, requests = zip(*taken, strict=True)
    return 1000 * statistics.median(forwards), 1000 * statistics.median(requests)


def body_of(files: list[Path]) -> bytes:
    data = [[file.stem, b64encode(file.read_bytes()).decode()] for file in files]
    return json.dumps({"dataframe_split": {"columns": ["image_id", "dicom"], "data": data}}).encode()


def seconds_of_loading(model: Path, what: str, repeats: int) -> tuple[float, float]:
    """Median seconds, and of CPU time, in new processes."""
    weights = model / "data" / "detector" / "weights.pt"
    command = [sys.executable, "-c", LOADING, str(model), str(weights), what]
    outputs = [
        subprocess.run(command, cwd=model.parent, capture_output=True, text=True, check=True).stdout
        for _ in range(repeats)
    ]
    walls, cpus = zip(*(json.loads(output.splitlines()[-1]) for output in outputs), strict=True)
    return statistics.median(walls), statistics.median(cpus)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15, help="requests of one file, forward passes of one")
    parser.add_argument("--requests", type=int, default=200, help=f"from {CLIENTS} clients; 100 and more")
    arguments = parser.parse_args()
    before = os.getloadavg()[0]
    settings = Train()
    predictor = Predictor(PneumothoraxNet(settings.recipe.network.network), choose_compute(Device()), "flip")
    detector = Detector(
        (TrainedNetwork(predictor, as_config(settings)),), SIZE_PX, Thresholds(presence_threshold=0), ""
    )
    images = np.random.default_rng(0).integers(0, 256, (BATCH, SIZE_PX, SIZE_PX), np.uint8)
    lines = list[tuple[str, str]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with new_folder() as data:
            save(data, detector)
            save_model(folder / "model", data)
        write_sample(folder / "sample", Contents(BATCH, 1, 0))
        files = sorted((folder / "sample" / "dicom-images-train").rglob("*.dcm"))[:BATCH]
        (folder / "empty").mkdir()
        with serve(folder / "model", folder / "empty") as server:
            one, batch = body_of(files[:1]), body_of(files)
            for body, rows in ((one, 1), (batch, BATCH)):
                server.ask(body, rows)  # starts the decoders
            bare, asked = in_turns(
                lambda: list(predictor.predict(images[:1])), lambda: server.ask(one), arguments.repeats
            )
            lines += [
                ("forward pass of one radiograph", f"{bare:.0f} ms"),
                ("request of one radiograph", f"{asked:.0f} ms: {asked - bare:+.0f} ms"),
            ]
            bare, asked = in_turns(
                lambda: list(predictor.predict(images)),
                lambda: server.ask(batch, BATCH),
                max(3, arguments.repeats // 5),
            )
            lines += [
                (f"forward passes of {BATCH}", f"{bare:.0f} ms"),
                (f"request of {BATCH}", f"{asked:.0f} ms: {asked / bare:.2f} times"),
            ]
            bodies = [body_of([file]) for file in files]
            server.ask_at_once(bodies, WARM_REQUESTS)
            early = server.megabytes()
            server.lost = 0
            taken = server.ask_at_once(bodies, arguments.requests)
            late = server.megabytes()
            lines += [
                (f"request, {CLIENTS} clients", f"{1000 * statistics.median(taken):.0f} ms"),
                (f"lost of {arguments.requests} requests, {CLIENTS} clients", str(server.lost)),
                (
                    f"memory after {WARM_REQUESTS}, at the end",
                    f"{early:.0f}, {late:.0f} MB: {late / early - 1:+.1%}",
                ),
            ]
        torch_seconds, torch_cpu = seconds_of_loading(folder / "model", "torch", 3)
        model_seconds, model_cpu = seconds_of_loading(folder / "model", "model", 3)
        lines += [
            ("import of torch and reading the weights", f"{torch_seconds:.1f} s, {torch_cpu:.1f} s of CPU"),
            (
                "loading the model, mlflow imported",
                f"{model_seconds:.1f} s, {model_cpu:.1f} s of CPU: {model_cpu / torch_cpu:.2f} times",
            ),
        ]
    print(f"{machine()}; {predictor.compute.precision}, torch {torch.__version__};", end=" ")
    print(f"load {before:.1f} before, {os.getloadavg()[0]:.1f} after (its own is {os.cpu_count()})\n")
    print("| what | median |\n|---|---|")
    for what, value in lines:
        print(f"| {what} | {value} |")


if __name__ == "__main__":
    main()
