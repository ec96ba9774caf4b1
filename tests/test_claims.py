"""What experiments say of made-up numbers: the cells that decide about a part of a claim, run by themselves."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from ucdm.report import ablations, claims

EXPERIMENTS = Path(__file__).parent.parent / "nbs" / "experiments"


def cells(notebook, *texts, **values):
    "What the cells define that hold each of these texts, given these values."
    found = json.loads((EXPERIMENTS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in found if c["cell_type"] == "code"]
    names = {k: getattr(module, k) for module in (ablations, claims) for k in module.__all__} | {"pd": pd} | values
    for text in texts:
        (source,) = (s for s in sources if text in s)
        exec(source, names)
    return names


@pytest.mark.parametrize("best, n, outcome, p", [("a", 3, claims.HOLDS, None), ("a", 1, claims.HINT, None),
                                                 ("b", 3, claims.HINT, pytest.approx(0.092, abs=0.001))])
def test_the_chosen_setting_is_not_compared_with_itself(best, n, outcome, p):
    "A setting cannot be behind itself: no chance is in that."
    test = pd.DataFrame({"a": [60.0, 61.0, 62.0], "b": [61.0, 64.0, 63.0]})[:n]
    behind = cells("beyond/settings_without_labels", "def behind", chosen="a", best=best, test=test, results=test)["behind"]
    part = behind()
    assert (part.outcome, part.p, part.central) == (outcome, p, True)


@pytest.mark.parametrize("right, outcome", [(99, claims.HINT), (60, claims.OPEN)])
def test_one_training_is_a_hint_at_most(right, outcome):
    "However many labels there are: another training has another fraction of right ones."
    reliable = cells("paper/figure_11_pseudo_labels", "def percent")["reliable"]
    counts = lambda *selected: pd.DataFrame(dict(answer=["shirt", "other"], selected=selected, correct=[0, right]))
    part = reliable(0.6, counts(0, 100))
    assert (part.outcome, part.evidence) == (outcome, f"labelled rightly: {right} of 100, {right}.0% (one training).")
    assert reliable(0.6, counts(0, 0)).outcome is None
    assert reliable(0.6, pd.DataFrame(dict(answer=["shirt"], selected=[19], correct=[19]))).outcome is None


class Sure:
    "A judge that reads the class off the first pixel."
    classes = ("shirt", "shoe")
    def probs(self, images): return torch.eye(2)[images.long()]


def test_positives_of_one_image_count_once():
    "Twenty-two images with twenty positives each, alike within an image: three images that are wrong show nothing."
    right = torch.ones(22)
    right[:3] = 0
    positives = torch.stack([1 - right] * 10 + [right] * 10, 1) # asked: ten shirts, ten shoes
    made = {0: SimpleNamespace(positives=positives, classes=["shirt"] * 10 + ["shoe"] * 10)}
    names = cells("beyond/pair_quality", "def shown_as_asked", made=made, the_judge=Sure(), torch=torch)
    values = names["shown_as_asked"](0)
    assert values.tolist() == [0.0] * 3 + [100.0] * 19
    assert names["over_images"]("", claims.difference(values, 90), "", False).outcome == claims.OPEN
    assert claims.of_counts(380, 440, 0.9)[0] == claims.FAILS # each positive counted


def second_best(draws, runs, rivals):
    "Table 1's central part, of made-up accuracies: draws(proportion) has a row a method, UCDM first."
    values = {}
    names = cells("paper/table_01_closed_set", "def among_two", results=[])
    names["of_method"] = lambda method, d, p: values[method, p]
    for p in (0.2, 0.6):
        for m, row in zip(("ucdm", *range(rivals)), draws(p)): values[m, p] = pd.Series(row[:runs])
    return names["at_two_places"]("", [names["among_two"]("d", p, range(rivals)) for p in (0.2, 0.6)], "")


def test_second_best_by_chance():
    "Of rows that are all equally good none is shown to be second best, and hardly one not to be."
    rng = np.random.default_rng(0)
    found = pd.Series([second_best(lambda p: rng.normal(85, 2, (14, 3)), 3, 13).outcome for _ in range(100)])
    assert (found == claims.OPEN).mean() >= 0.97


@pytest.mark.parametrize("ahead, runs, outcome", [(0, 3, claims.HOLDS), (1, 3, claims.HOLDS), (2, 3, claims.FAILS),
                                                  (13, 3, claims.FAILS), (1, 2, claims.OPEN)])
def test_second_best_where_it_is_clear(ahead, runs, outcome):
    "Rows that are far ahead or far behind; two runs show nothing."
    rng = np.random.default_rng(1)
    far = np.array([0.0] + [40.0] * ahead + [-40.0] * (13 - ahead))[:, None]
    part = second_best(lambda p: far + rng.normal(0, 0.5, (14, 3)), runs, 13)
    assert part.outcome == outcome and 0 <= part.p <= 1 and 0 <= part.refuted <= 1
