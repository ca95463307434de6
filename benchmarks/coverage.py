"""How often 95% intervals of scores hold the truth, with as many images a patient as the challenge has.

Run in the project's environment: python benchmarks/coverage.py [--repeats 400]

The population is the challenge's 12,047 images: patients from the table that ships, areas of the findings
from labels/train-rle.csv.gz in PNEUMO_REAL_DATA or in ../shared/siim; without that file synthetic ones, more
often in patients with many images, as there. The predictions are simulated. Area, patient (WITHIN of the
rest) and chance make the probability of presence, so misses and false alarms, and the Dice of what is found.
Patients are drawn with replacement, with all their images, and the intervals compared with the scores of the
population. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from statistics import NormalDist

import numpy as np
from measure import REAL_DATA, machine
from numpy.typing import NDArray
from tqdm import tqdm

from pneumo_experiments.dataset.annotations import read_annotations
from pneumo_experiments.dataset.patients import ROW, SHIPPED, image_number
from pneumo_experiments.metrics.dice import Z, bootstrap, interval_of
from pneumo_experiments.metrics.scores import OF_ALL_PATIENTS, ScoredImages

LABELS = REAL_DATA / "labels" / "train-rle.csv.gz"
PATIENTS = (10, 25, 51, 103, 256, 1233)  # about 20, 48, 100, 200, 500 and 2,407 images
SMALL = PATIENTS[:5]  # for all scores, by patients with a finding
COMPARED = ("dice", "dice_positive", "sensitivity", "specificity", "auroc")
METHODS = ("percentile bootstrap", "BCa bootstrap", "Student's t", "the project's")
CONCERNED = {"1": 1, "2": 2, "3": 3, "4": 4, "5 to 9": 5, "10 to 19": 10, "20 to 199": 20, "256": 200}
WITHIN = 0.4
NORMAL = NormalDist()


def areas(rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Patient from 0 and annotated pixels (n,) of each image of the population."""
    table = np.frombuffer(SHIPPED.read_bytes(), ROW)
    patient, area = table["patient"].astype(np.int64) - 1, np.zeros(len(table))
    if LABELS.exists():
        for image_id, texts in read_annotations(LABELS).items():
            row = np.searchsorted(table["image"], np.uint64(image_number(image_id)))
            area[row] = sum(sum(map(int, text.split()[1::2])) for text in texts)  # overlaps count twice
        return patient, area
    liability = mixed(patient, rng) + 0.35 * np.log(np.bincount(patient))[patient]
    size = np.exp(np.log(8630) + 1.1 * mixed(patient, rng)).clip(55, 161_421)
    return patient, size * (liability > np.quantile(liability, 1 - 0.2215))


def mixed(patient: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Standard normal values (n,) of which the patient explains WITHIN."""
    own = rng.normal(size=patient.max() + 1)[patient]
    return np.sqrt(WITHIN) * own + np.sqrt(1 - WITHIN) * rng.normal(size=len(patient))


def simulated() -> ScoredImages:
    """The population with its predictions; sorted by patient, who are numbers here."""
    rng = np.random.default_rng(0)
    patient, area = areas(rng)
    order = np.argsort(patient, kind="stable")
    patient, area = patient[order], area[order]
    truth = area > 0
    size = np.where(truth, np.log(area.clip(1) / 8630), 0)
    presence = np.where(truth, 1 + 0.5 * size, -1.6) + mixed(patient, rng)
    predicted = presence > 0
    found = 1 / (1 + np.exp(-(0.9 + 0.45 * size + mixed(patient, rng))))
    dices = np.where(truth & predicted, found, truth == predicted)
    return ScoredImages(dices, predicted, truth, (1 / (1 + np.exp(-presence))).astype(np.float32), patient)


def compared(
    images: ScoredImages, patients: int, rng: np.random.Generator
) -> dict[str, list[tuple[float, float]]]:
    """The intervals of each of COMPARED by METHODS but the last; none for undefined scores."""
    measures = {name: measure for name, measure in images.measures().items() if name in COMPARED}
    without = (np.asarray(images.patients) != np.arange(patients)[:, None]).astype(float)
    found = dict[str, list[tuple[float, float]]]()
    for name, resamples in bootstrap(measures, images.patients, rng, 1000).items():
        score = measures[name](np.ones((1, len(images.dices))))[0]
        if np.isnan(score):
            continue
        left = measures[name](without)
        left = left[~np.isnan(left)]
        away = left.mean() - left if len(left) else np.zeros(1)
        half = (
            Z * (1 + (Z**2 + 1) / (4 * (patients - 1))) * np.sqrt((patients - 1) / patients * (away**2).sum())
        )
        defined = resamples[~np.isnan(resamples)]
        below = np.mean(defined < score) + np.mean(defined == score) / 2
        bias = NORMAL.inv_cdf(min(max(below, 1e-3), 1 - 1e-3))
        skew = (away**3).sum() / (6 * (away**2).sum() ** 1.5) if away.any() else 0.0
        ends = [NORMAL.cdf(bias + (bias + z) / (1 - skew * (bias + z))) for z in (-Z, Z)]
        low, high = np.quantile(defined, ends)
        found[name] = [interval_of(resamples), (low, high), (score - half, score + half)]
    return found


class Hits:
    """How often intervals held a value, lay below or above it, and how wide they were."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def text(self, true: float, least: int = 1, is_short: bool = False) -> str:
        if len(self.ends) < least:
            return ""
        low, high = np.array(self.ends).T
        above, below = np.mean(low > true + 1e-12), np.mean(high < true - 1e-12)
        width = "" if is_short else f" ({100 * above:.1f}, {100 * below:.1f}) {np.mean(high - low):.3f}"
        return f"{1 - above - below:.3f}{width}"


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--repeats", type=int, default=400)
    repeats = options.parse_args().repeats
    population, rng = simulated(), np.random.default_rng(1)
    measures, patient = population.measures(), np.asarray(population.patients)
    true = {name: float(measure(np.ones((1, len(patient))))[0]) for name, measure in measures.items()}
    sizes = np.bincount(patient)
    print(
        f"{machine()}, NumPy {np.__version__}, {repeats} repeats,"
        f" {'real' if LABELS.exists() else 'synthetic'} areas."
        f" {len(patient):,} images of {len(sizes):,} patients, {len(set(patient[population.truth])):,} with a"
        f" finding. {', '.join(f'{name} {value:.3f}' for name, value in true.items())}.\n"
    )
    print("Coverage (percent of intervals too high, too low) and mean width:\n")
    print(
        f"| patients: images, with a finding | score | {' | '.join(METHODS)} |"
        f"\n|---|---|{'---|' * len(METHODS)}"
    )
    by_concerned: defaultdict[tuple[str, str], Hits] = defaultdict(Hits)
    for count in PATIENTS:
        hits: defaultdict[tuple[str, str], Hits] = defaultdict(Hits)
        images_drawn, positive_patients = [], []
        for _ in tqdm(range(repeats), desc=f"{count} patients", disable=None, leave=False):
            drawn = rng.integers(len(sizes), size=count)
            number = np.repeat(np.arange(count), sizes[drawn])
            offset = np.arange(len(number)) - np.repeat(np.cumsum(sizes[drawn]) - sizes[drawn], sizes[drawn])
            rows = np.searchsorted(patient, drawn)[number] + offset
            arrays = (population.dices, population.predicted, population.truth, population.presence)
            images = ScoredImages(*(values[rows] for values in arrays), number)
            images_drawn.append(len(rows))
            positive_patients.append(images.counts()["positive_patients"])
            ends = images.intervals(() if count in SMALL else COMPARED)
            for name, others in compared(images, count, rng).items():
                own = (ends[f"{name}_low"], ends[f"{name}_high"])
                for method, each in zip(METHODS, [*others, own], strict=True):
                    hits[name, method].ends.append(each)
            for name in measures if count in SMALL else ():
                own = (ends[f"{name}_low"], ends[f"{name}_high"])
                concerned = count if name in OF_ALL_PATIENTS else positive_patients[-1]
                label = [label for label, least in CONCERNED.items() if concerned >= least][-1:]
                if label and not np.isnan(own[0]):
                    by_concerned[name, label[0]].ends.append(own)
        drawn_text = f"{count:,}: {np.mean(images_drawn):,.0f}, {np.mean(positive_patients):.1f}"
        for name in COMPARED:
            cells = [hits[name, method].text(true[name]) for method in METHODS]
            print(f"| {drawn_text} | {name} | {' | '.join(cells)} |", flush=True)
    print(
        "\nCoverage of the project's by patients with a finding (* of all patients),"
        " of samples up to 256 patients:\n"
    )
    print(f"| score | {' | '.join(CONCERNED)} |\n|---|{'---|' * len(CONCERNED)}")
    for name in measures:
        cells = [by_concerned[name, label].text(true[name], 50, is_short=True) for label in CONCERNED]
        print(f"| {name}{' *' * (name in OF_ALL_PATIENTS)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
