from __future__ import annotations
import os, time, sys, math
from pathlib import Path
import numpy as np
from measure import ROOT
from pneumo_experiments.dataset.annotations import read_annotations
from pneumo_experiments.dataset.patients import SHIPPED, ROW, image_number
from pneumo_experiments.scoring.scores import ScoredImages
from scipy import stats

LABELS = (
    Path(os.environ.get("PNEUMO_REAL_DATA") or ROOT.parent / "shared" / "siim") / "labels/train-rle.csv.gz"
)


def truth_of(rng):
    table = np.frombuffer(SHIPPED.read_bytes(), ROW)
    area = np.zeros(len(table))
    ann = read_annotations(LABELS)
    for id, texts in ann.items():
        i = np.searchsorted(table["image"], np.uint64(image_number(id)))
        assert table["image"][i] == image_number(id)
        area[i] = sum(sum(map(int, t.split()[1::2])) for t in texts)
    return table["patient"].astype(int) - 1, area


def population(seed=0, rho=0.4):
    rng = np.random.default_rng(seed)
    patient, area = truth_of(rng)
    n = len(area)
    P = patient.max() + 1
    truth = area > 0
    size = np.where(truth, np.log(np.maximum(area, 1) / 8630), 0)

    def effect():
        return math.sqrt(rho) * rng.normal(size=P)[patient] + math.sqrt(1 - rho) * rng.normal(size=n)

    latent = np.where(truth, 1.0 + 0.5 * size, -1.6) + effect()
    predicted = latent > 0
    quality = 0.9 + 0.45 * size + effect()
    dices = np.where(truth & predicted, 1 / (1 + np.exp(-quality)), truth == predicted)
    return ScoredImages(dices, predicted, truth, (1 / (1 + np.exp(-latent))).astype(np.float32), patient)


if __name__ == "__main__":
    pop = population()
    G = np.bincount(pop.patients)
    posp = np.bincount(pop.patients, pop.truth)
    print(len(G), len(pop.truth), pop.truth.sum(), (posp > 0).sum(), G.max(), posp.max(), np.bincount(G)[:15])
    one = np.ones((1, len(pop.truth)))
    for k, m in pop.measures().items():
        print(k, m(one)[0])

    # ICC of truth and of dice among positives
    def icc(v, g):
        g = np.unique(g, return_inverse=True)[1]
        n = np.bincount(g)
        N = len(v)
        k = len(n)
        mean = np.bincount(g, v) / n
        msb = (n * (mean - v.mean()) ** 2).sum() / (k - 1)
        msw = ((v - mean[g]) ** 2).sum() / (N - k)
        n0 = (N - (n**2).sum() / N) / (k - 1)
        return (msb - msw) / (msb + (n0 - 1) * msw)

    print(
        "icc truth",
        icc(pop.truth.astype(float), pop.patients),
        "dice+",
        icc(pop.dices[pop.truth], pop.patients[pop.truth]),
        "fa",
        icc(pop.predicted[~pop.truth].astype(float), pop.patients[~pop.truth]),
        "logarea",
    )
