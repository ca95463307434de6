"""One or several networks as an ONNX file, which other runtimes run without this package."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pneumo_experiments import __version__
from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.device import ComputeConfig
from pneumo_experiments.learning.predict import AnyPredictor, Ensemble

PRODUCER = "pneumo_experiments"  # stands in the first bytes of the file
OPSET = 18  # torch 2.11 and later write it without a conversion
MAX_BYTES = 2**31 - 2**24  # protobuf reads 2 GiB at most; the rest is for the graph
INPUT, OUTPUTS = "pixels", ("mask", "presence")
MEANINGS = {
    "pixels": "radiographs (n, S, S), uint8: the area mean of the 8-bit image on a grid of S x S, 0 is black",
    "mask": "probability of each pixel (n, S, S), float32",
    "presence": "probability of a pneumothorax in the image (n,), float32",
}
LIBRARIES = ("onnx", "onnxruntime", "onnxscript")
ERRORS_ONLY = 3  # onnxruntime's number for it


class Difference(NamedTuple):
    """The largest absolute differences between two models' probabilities of pixels and of presence."""

    mask: float
    presence: float

    def __str__(self) -> str:
        return f"{self.mask:.1e} (mask), {self.presence:.1e} (presence)"

    def is_within(self, limit: float) -> bool:
        """Whether both are at most ``limit``; NaN is not."""
        return self.mask <= limit and self.presence <= limit


class _Graph(nn.Module):
    """From ``pixels`` to ``mask`` and ``presence``: what is in the file."""

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        self.members = ensemble.members
        self.networks = nn.ModuleList([member.network for member in ensemble.members])

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        images = (pixels.float() / 255)[:, None]
        masks, presences = zip(*(member.mean_of_views(images) for member in self.members), strict=True)
        return torch.stack(masks).mean(0), torch.stack(presences).mean(0)


def require_onnx() -> None:
    """Raises UserError unless the libraries are installed that write and run ONNX files."""
    for name in LIBRARIES:
        try:
            import_module(name)
        except ImportError as error:
            raise UserError(f"export=onnx: needs {name}; pip install 'pneumo-experiments[onnx]'") from error


def in_fp32(ensemble: Ensemble) -> Ensemble:
    """The same networks on the CPU in fp32, as the file computes."""
    compute = ComputeConfig(torch.device("cpu"), "fp32")
    return Ensemble(tuple(replace(member, compute=compute) for member in ensemble.members))


def write_onnx(path: Path, ensemble: Ensemble, image_size: int, facts: Mapping[str, str]) -> None:
    """Writes networks, views and means as one graph in fp32, with facts as metadata.

    Moves the networks to the CPU. Raises UserError for networks that are too large for one file, OSError when
    it cannot be written.
    """
    graph = _Graph(in_fp32(ensemble)).eval()
    graph.to(device="cpu", memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    tensors = graph.networks.state_dict().items()
    # The auxiliary head is for training alone, and not in the file.
    size = sum(tensor.nbytes for name, tensor in tensors if ".aux_head." not in name)
    if size > MAX_BYTES:
        count = len(ensemble.members)
        raise UserError(
            f"export=onnx: {count} networks of {size / 1e9:.1f} GB are more than the 2 GB that an ONNX file"
            f" holds; export at most {MAX_BYTES * count // size} of them"
        )
    exporter: Any = torch.onnx  # whose types are incomplete
    try:
        with _quiet():
            model = exporter.export(
                graph,
                # Two images: torch.export takes the number 1 for a constant.
                (torch.zeros(2, image_size, image_size, dtype=torch.uint8),),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                dynamic_shapes={INPUT: {0: torch.export.Dim("n")}},
                external_data=False,
                verbose=False,
            ).model_proto
    except exporter.OnnxExporterError as error:
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *LIBRARIES))
        raise UserError(f"export=onnx: failed with {versions}; install other versions of these") from error
    _describe(model, facts)
    path.write_bytes(model.SerializeToString())


def is_own_file(path: Path) -> bool:
    """Whether ``write_onnx`` wrote the file."""
    with path.open("rb") as file:
        return PRODUCER.encode() in file.read(64)


def open_session(path: Path, threads: int = 0) -> Any:
    """An ONNX file in onnxruntime, on the CPU, with so many threads; 0 leaves their number to it."""
    runtime: Any = import_module("onnxruntime")
    runtime.disable_telemetry_events()  # hospital networks must see no unexpected requests
    options = runtime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = threads
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def difference(path: Path, predictor: AnyPredictor, batches: Iterable[NDArray[np.uint8]]) -> Difference:
    """Between an ONNX file and a predictor on batches of 8-bit images (n, S, S).

    Raises UserError when an output of the predictor is NaN.
    """
    session, worst = open_session(path), np.zeros(2)
    for pixels in batches:
        predictions = list(predictor.predict(pixels, len(pixels)))
        expected = [one.mask for one in predictions], [one.presence for one in predictions]
        found = session.run(list(OUTPUTS), {INPUT: pixels})
        gaps = [np.abs(mine - theirs).max() for mine, theirs in zip(found, expected, strict=True)]
        worst = np.maximum(worst, gaps)  # which keeps NaN
    return Difference(float(worst[0]), float(worst[1]))


def _describe(model: Any, facts: Mapping[str, str]) -> None:
    """Names program, inputs, outputs and facts; removes what the exporter tells of this machine's files."""
    onnx: Any = import_module("onnx")
    model.producer_name, model.producer_version = PRODUCER, __version__
    model.doc_string = "Finds and outlines pneumothorax on chest radiographs. " + "; ".join(
        f"{name}: {meaning}" for name, meaning in MEANINGS.items()
    )
    graph = model.graph
    values = [*graph.input, *graph.output]
    for value in values:
        value.doc_string = MEANINGS[value.name]
    for part in (graph, *values, *graph.node, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]  # stack traces, with the paths of source files
    onnx.helper.set_model_props(model, dict(facts))


@contextmanager
def _quiet() -> Generator[None]:
    """Without the exporter's warnings and hints: the check afterwards tells what matters."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(before)
