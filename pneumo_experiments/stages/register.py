"""Entry point ``register``: a version in the model registry, and the alias champion if it earned that."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from pneumo_experiments import tracking
from pneumo_experiments.errors import ServerUnreachable, UserError
from pneumo_experiments.evaluation.models import addresses_of, common_images, load_models
from pneumo_experiments.export.onnx_file import export_onnx, refuse_to_replace
from pneumo_experiments.learning.onnx_export import require_onnx
from pneumo_experiments.registry import champions, lineage, model_scores, versions
from pneumo_experiments.registry.model_card import model_card
from pneumo_experiments.registry.promotion import (
    CHAMPION,
    Decision,
    Pair,
    compared,
    counted,
    decide,
    rows_by_image,
)
from pneumo_experiments.serving import Detector, load, save
from pneumo_experiments.settings import BEST, NONE, Device, Register, Score
from pneumo_experiments.stages.score import score

NEW = "the new version"
# Longer than it takes another `register` to move the alias after its last look at it.
SETTLE_SECONDS = 0.5


def register(settings: Register) -> versions.Version | None:
    """Registers the model, or the experiment's best one, as a new version; returns it.

    With ``version`` it makes that version the champion and returns it. With ``history`` it prints the
    champions, and returns the current one, None if there is none.
    """
    with tracking.run("register", settings):
        _refuse_conflicts(settings)
        if settings.history:
            return _print_history(settings.registry.name)
        if settings.version is not None:
            return _move_champion(settings.registry.name, str(settings.version))
        return _register(settings)


def _refuse_conflicts(settings: Register) -> None:
    modes = {"history": settings.history, "version": settings.version is not None}
    given = [name for name, is_given in modes.items() if is_given]
    if len(given) > 1:
        raise UserError("version and history: two tasks; give one of them")
    if given and settings.model != BEST:
        raise UserError(
            f"{given[0]} and model={settings.model}: {given[0]} registers nothing; give one of them"
        )
    if given and settings.export != NONE:
        raise UserError(
            f"{given[0]} and export={settings.export}: {given[0]} exports nothing; leave out export"
        )
    if given == ["version"] and settings.registry.promote != "auto":
        raise UserError(
            f"version and promote={settings.registry.promote}: version moves the alias in any case; leave out"
            " promote"
        )


def _register(settings: Register) -> versions.Version:
    name, model, models = settings.registry.name, settings.model, 1
    if settings.export == "onnx":
        require_onnx()
        refuse_to_replace(settings.onnx_file)  # not only when the model is loaded
    if model == BEST:
        champion = versions.champion_of(name)
        images = None if champion is None else (champion.tags or {}).get("identity")
        model, why, models = model_scores.best_model(images)
        print(f"register: {model} is the {why}")
    addresses = addresses_of(model)
    detector = load_models(model, settings.dataset, Device())  # what cannot be loaded must not be registered
    if settings.export == "onnx":
        export_onnx(settings.onnx_file, detector)
    members = [id for address in addresses if (id := tracking.model_id_of(address))]
    versions.claim(name)
    address = addresses[0] if len(addresses) == 1 else _log_joined(detector)
    origin = lineage.lineage(members, detector.data_fingerprint, None)
    tags = {"data_fingerprint": detector.data_fingerprint, "network": detector.networks}
    tags |= {"code_version": origin.code_version} | ({"members": ",".join(members)} if members[1:] else {})
    with versions.registering(address, name, tags) as number:
        champion = versions.champion_of(name)
        while True:
            pair, why = _compare(settings, address, detector, champion)
            scores = model_scores.scores_of(tracking.model_id_of(address))
            if pair is not None and settings.registry.promote != "never":
                pair = counted(pair, settings.registry, number, models)
            decision = decide(settings.registry, scores, champion, pair, why)
            score_run = decision.score.run_id if decision.score else None
            origin = lineage.lineage(members, detector.data_fingerprint, score_run)
            card = model_card(name, number, detector, decision, origin)
            before, champion = champion, versions.champion_of(name)
            if _number(before) != _number(champion):
                continue  # decided against one that is no longer champion
            champions.describe_version(name, number, card)
            champions.decide(name, number, decision.alias, decision.reason, decision.tags(champion))
            if decision.alias != CHAMPION:
                break
            time.sleep(SETTLE_SECONDS)
            champion = versions.champion_of(name)
            if _number(champion) == number:
                champions.describe_champion(name, number, card)
                break
            # With promote=always each would take the alias back from the other: the last one keeps it.
            if champion is None or settings.registry.promote == "always":
                break
    is_champion = decision.alias == CHAMPION and _number(champion) == number
    state = "champion" if is_champion else "not champion"
    line = f"{name} version {number} is {state}: {decision.reason}"
    tracking.describe(f"{line}.\nModel {model}.")
    print(f"register: {line}")
    version = versions.version_of(name, number)
    return replace(version, champion=is_champion) if version else _deleted(name, number, decision)


def _number(version: versions.Version | None) -> str | None:
    return None if version is None else version.number


def _deleted(name: str, number: str, decision: Decision) -> versions.Version:
    """The version as it was decided, although somebody has deleted it since."""
    return versions.Version(name, number, decision.alias == CHAMPION, decision.reason)


def _log_joined(detector: Detector) -> str:
    """Logs an ensemble as a model of the active run; returns its address."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), detector)
        return tracking.log_model(Path(folder))


def _compare(
    settings: Register, address: str, detector: Detector, champion: versions.Version | None
) -> tuple[Pair | None, str]:
    """Compares with the champion, or all-empty masks; None and why, if it cannot.

    Scores both first, if they have no score on the same images.
    """
    model_id, why = tracking.model_id_of(address), ""

    def pair() -> Pair | None:
        others = model_scores.scores_of(champion.model_id) if champion else {}
        return compared(model_scores.scores_of(model_id), champion, others)

    found = pair()
    if found is None and settings.registry.promote != "never":
        why = _score(settings.dataset, address, detector, champion)
        found = pair()
    return found, why


def _score(dataset: Path, address: str, detector: Detector, champion: versions.Version | None) -> str:
    """Scores the new version, and the champion if there is one, on common images; returns why it cannot."""
    try:
        models = {NEW: (address, detector)}
        if champion is not None:
            models[f"version {champion.number}"] = (
                champion.source,
                load(tracking.model_data(champion.source)),
            )
        images = common_images(dataset, {name: detector for name, (_, detector) in models.items()})
        for name, (model, _) in models.items():
            last = model_scores.scores_of(tracking.model_id_of(model)).get(images.identity)
            if last is not None and rows_by_image(last) is not None:
                continue
            print(f"register: scores {name}, {model}, on {dataset}")
            score(Score(model=model, dataset=dataset, subset=images.subset, overlays=0))
    except ServerUnreachable:
        raise
    except UserError as error:
        return str(error)
    return ""


def _move_champion(name: str, number: str) -> versions.Version:
    """Moves the alias champion to an existing version."""
    versions.require_ours(name)
    version, before = versions.version_of(name, number), versions.champion_of(name)
    if version is None:
        raise UserError(f"version={number}: {name} has no such version; history=true lists the champions")
    if version.champion:
        print(f"register: {name} version {number} is the champion already")
        return version
    load(tracking.model_data(version.source))  # one that nobody could load must not be served
    reason = f"moved by hand from version {before.number}" if before else "moved by hand"
    champions.move_champion(version, reason)
    line = f"{name} version {number} is champion: {reason}"
    tracking.describe(f"{line}.")
    print(f"register: {line}")
    return replace(version, champion=True, reason=reason)


def _print_history(name: str) -> versions.Version | None:
    """Prints the champions in order."""
    versions.require_ours(name)
    reigns = champions.history(name)
    tracking.log_json({"champions": [asdict(reign) for reign in reigns]}, "champions.json")
    if not reigns:
        print(f"register: {name} has had no champion")
    for line in champions.history_lines(reigns) if reigns else []:
        print(line)
    return versions.champion_of(name)
