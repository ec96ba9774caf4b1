"""What experiments say of made-up numbers: the cells that decide about a part of a claim, run by themselves."""
import json
from pathlib import Path

import pandas as pd
import pytest

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
