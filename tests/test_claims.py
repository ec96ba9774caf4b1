"""What experiments say of made-up numbers: the cells that decide about a part of a claim, run by themselves."""
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from ucdm.report import ablations, claims, comparisons
from ucdm.report import style as labels
from ucdm.runs.result import RunResult
from ucdm.runs.spec import RunSpec

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
    names = cells("beyond/pair_quality", "def shown_as_asked", "def of_positives", made=made, the_judge=Sure(), torch=torch)
    values = names["shown_as_asked"](0)
    assert values.tolist() == [0.0] * 3 + [100.0] * 19
    assert names["of_positives"](values, 440).outcome == claims.OPEN
    all_right = lambda n: names["of_positives"](pd.Series([100.0] * n), 20 * n).outcome
    assert [all_right(n) for n in (19, 20, 40)] == [None, claims.HINT, claims.HOLDS] # a tenth could be wrong and not among 20
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


def goals(left, kept): return [claims.difference(pd.Series(x), 0.0) for x in (left, kept)]


@pytest.mark.parametrize("notebook", ["beyond/pair_quality", "beyond/erasure_study"])
def test_some_setting_of_many(notebook):
    "A hint of one setting is none among many; what one goal alone refutes is refuted, though the other has few images."
    spread = np.linspace(-10, 10, 40)
    unsure, fails, few = goals(spread + 1.2, spread + 20), goals(spread - 20, spread), goals(spread - 20, spread[:5])
    row = pd.DataFrame([dict(setting="a", left=0.1, kept=0.2)])
    names = dict(rows=row, trained=row, n_showing=40, n_others=40, chosen_setting="a", best=row.iloc[0],
                 room=lambda rooms: rooms, LEAST_COUNT=20)
    outcome = lambda rooms: cells(notebook, "too_few =", rooms=rooms, sweep_specs=rooms, **names)["some_setting"].outcome
    assert [outcome(r) for r in ([unsure], [unsure] * 6, [fails, few], [unsure, fails])] == [
        claims.HINT, claims.OPEN, claims.FAILS, claims.OPEN]
    assert outcome([goals(spread[:5], spread)]) is None


def test_what_limits_compares_by_shared_runs():
    "A mix that looks best by runs that UCDM lacks is not picked, and a lead of the best of many is no hint by itself."
    scores = {"UCDM": {0: 50.0, 1: 52.0, 2: 54.0}, "positives real": {0: 49.0, 1: 51.0, 2: 53.0, 3: 99.0, 4: 99.0},
              "negatives real": {0: 52.0, 1: 53.0, 2: 57.0}, **{f"UCDM, {k}": {0: 50.0, 1: 53.0, 2: 55.5} for k in range(8)}}
    frame = pd.DataFrame([dict(variant=v, seed=s, metric="balance", value=x) for v, of in scores.items() for s, x in of.items()])
    others = [v for v in scores if v.startswith("UCDM, ")]
    columns = ("positives as asked", "class left in negatives", "new classes in negatives")
    names = dict(frame=frame, ours="UCDM", both="negatives real", mixes=dict.fromkeys(list(scores)[:3]), overrides=scores, math=math,
                 replace=replace, of_generator=others, other=others, qualities=pd.DataFrame(0.0, index=list(scores), columns=columns))
    names = cells("beyond/what_limits", "def score(name)", "tried = {name", **names)
    assert names["best"] == "negatives real" and "UCDM 52.0; negatives real: +2.0" in names["checks"][3].evidence
    assert "positives real 51.0, UCDM 52.0" in names["checks"][1].evidence and "2 runs without a counterpart" in names["checks"][1].evidence
    alone = claims.difference(pd.Series([0.0, 1.0, 1.5]), 0.0)
    assert alone.outcome == claims.HINT and names["checks"][4].outcome == claims.OPEN
    assert names["checks"][4].p == min(1, 8 * alone.p) and names["checks"][4].refuted == pytest.approx(alone.lag)


def test_fewer_steps_are_several():
    "That some smaller number of steps suffices is no hint where the best of six leads by a little."
    cell = "enough = [compared"
    steps = [5, 8, 10, 12, 15, 20]
    values = {5: (57.0, 58.0, 58.5), 20: (60.0, 60.0, 60.0)} # 3 points are allowed
    frame = pd.DataFrame([dict(variant=f"{n:,} seeds, {s} steps", seed=r, metric="balance", value=x)
                          for n in (10, 20) for s in steps for r, x in enumerate(values.get(s, (57.5, 56.5, 57.0)))])
    grid = pd.DataFrame([dict(seeds=n, steps=s, evaluations=n * s, balance=60.0) for n in (10, 20) for s in steps])
    names = cells("beyond/cost_and_benefit", "def label(n, s)", results=None, run_variants=lambda *_, **__: {}, counts=[10, 20],
                  steps=steps, n_seeds=None, N=20, base=None, run_seeds=[0], out="", engine=None, epochs=lambda n: 1)
    names = cells("beyond/cost_and_benefit", cell, **names | dict(frame=frame, grid=grid, tolerance=3.0))
    part = claims.some("", names["enough"], "")
    assert len(names["enough"]) == 5 and claims.HINT in {c.outcome for c in names["enough"]}
    assert part.outcome == claims.OPEN and part.refuted == max(c.refuted for c in names["enough"])


def test_two_steps_against_the_best_rule():
    "Table 3's last parts: a closed-set method counts with its rule for \"other\", and the claim says at which mismatch."
    def run(method, mismatch, seed, balance, auroc, **ruled):
        both = {"running": dict(balance=balance + seed, auroc=auroc + seed / 2)} | {
            f"running+{k}": dict(balance=v + 2 * seed, auroc=99.0) for k, v in ruled.items()}
        return RunResult(RunSpec(method=method, mismatch=mismatch, seed=seed), f"{method}{mismatch}{seed}", both, [], [], {}, {})
    results = [r for s in range(3) for r in (
        run("diffusion_classifier_two_steps", 0.6, s, 30, 80), run("fixmatch", 0.6, s, 0, 50, msp=40, energy=20),
        run("ucdm", 0.6, s, 20, 60), run("ucdm", 0.2, s, 90, 90))]
    methods = list(dict.fromkeys(r.spec.method for r in results))
    names = {k: getattr(module, k) for module in (comparisons, labels) for k in module.__all__}
    names |= dict(results=results, methods=methods, mismatches=[0.2, 0.6], checks=[], replace=replace)
    balance, auroc = cells("paper/table_03_open_set_cifar100", "def by_best_rule", "TWO_STEPS =", **names)["checks"]
    assert balance.outcome == claims.FAILS and 'FixMatch with "other" by confidence 42.0' in balance.evidence
    assert auroc.outcome == claims.HOLDS and "FixMatch 50.5" in auroc.evidence
    assert all("of all rows at 60% mismatch" in part.claim for part in (balance, auroc))
