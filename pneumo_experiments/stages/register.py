"""Entry point ``register``: a version in the model registry, and the alias champion if earned."""

from __future__ import annotations

from pneumo_experiments import tracking
from pneumo_experiments.experiment.onnx_file import export_onnx, refuse_to_replace
from pneumo_experiments.learning.onnx_export import require_onnx
from pneumo_experiments.serving import load
from pneumo_experiments.settings import Register


def register(settings: Register) -> tracking.Version:
    """Registers the model, or the experiment's best one, as a new version."""
    with tracking.run("register", settings):
        if settings.export == "onnx":
            require_onnx()
            refuse_to_replace(settings.onnx_file)  # not only when the model is loaded
        model = settings.model
        if model == "best":
            model, why = tracking.best_model(settings.registry.name)
            print(f"register: {model} is the {why}")
        detector = load(tracking.model_data(model))  # what cannot be loaded must not be registered
        if settings.export == "onnx":
            export_onnx(settings.onnx_file, detector)
        tags = {"data_fingerprint": detector.data_fingerprint, "network": detector.networks}
        version = tracking.register_model(model, settings.registry.name, settings.registry.promote, tags)
        state = "champion" if version.champion else "not champion"
        line = f"{version.name} version {version.number} is {state}: {version.reason}"
        tracking.describe(f"{line}.\nModel {model}.")
        print(f"register: {line}")
    return version
