"""nbdev_test with a time limit for each cell, and a line for each part of a notebook that did not run."""
import os
import re
from functools import partial

import nbdev.test
from execnb.shell import CaptureShell
from nbdev.test import nbdev_test, test_nb

SECONDS = 900  # of one cell; the longest takes a minute
SKIPPED = re.compile(r"^['\"]?Skipped: (.*?)['\"]?$", re.M)


def texts(cell):
    "What a cell printed and showed."
    for output in cell.outputs:
        yield "".join(output.get("text", output.get("data", {}).get("text/plain", "")))


class LimitedShell(CaptureShell):
    "Runs a notebook's cells, and says which of them did not run and what the others say that they skipped."
    def __init__(self, path, seconds):
        super().__init__(path, timeout=seconds)
        self.name = f"{path.parent.name}/{path.name}"

    def run_all(self, nb, exc_stop=False, preproc=lambda cell: False):
        idle, said = [], []
        def noted(cell):
            skip = preproc(cell)
            if skip and cell.cell_type == "code" and "nbdev_export" + "(" not in cell.source: idle.append(cell)
            return skip
        def listened(cell): said.extend(why for text in texts(cell) for why in SKIPPED.findall(text))
        try: super().run_all(nb, exc_stop=exc_stop, preproc=noted, postproc=listened)
        except TimeoutError as e:
            if not e.args: print(f"- Stopped {self.name}: a cell ran longer than {self.timeout} s", flush=True)
            raise
        if idle: said.append(f"cells marked not to be run (eval: false): {len(idle)}")
        for why in said: print(f"- Skipped {self.name}: {why}", flush=True)


def limited(path, *args, seconds=SECONDS, **kwargs):
    "`test_nb` with a time limit."
    nbdev.test.CaptureShell = partial(LimitedShell, seconds=seconds)
    return test_nb(path, *args, **kwargs)


if __name__ == "__main__":
    from run_notebooks import limited  # by a name that workers find: in them the main module is the notebook

    nbdev.test.test_nb = partial(limited, seconds=int(os.environ.get("UCDM_CELL_SECONDS", SECONDS)))
    nbdev_test()
