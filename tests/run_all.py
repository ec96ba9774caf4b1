"""`make test`: everything that has to hold, stage by stage.

A failed stage does not stop the next ones, and one that hangs ends after its time limit. What was skipped inside a
stage is named after the last of them; the last line counts.

Run some of them with `make test ARGS="export clean"`.
"""
import ast
import difflib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import house as rules
from processes import kill_tree

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
EXPERIMENTS = sorted((ROOT / "nbs" / "experiments").rglob("[!_]*.ipynb"))
WORKERS = min(4, os.cpu_count() or 1)  # notebooks or experiments at the same time
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("[!_]*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


class Skipped(Exception):
    "A stage that cannot run here, and why."


def start(*command, cwd=ROOT, stdout=subprocess.PIPE, **env):
    "Start a program of this environment."
    return subprocess.Popen([BIN / command[0], *command[1:]], cwd=cwd, env={**os.environ, **env},
                            encoding="utf-8", errors="replace", # a log may hold anything
                            stdout=stdout, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


def run(*command, cwd=ROOT, **env):
    """Run a program of this environment, show what it prints as it comes, and return its exit status and text.

    It does not outlive this call, however that ends.
    """
    process, lines = start(*command, cwd=cwd, **env), []
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        return process.wait(), "".join(lines)
    finally:
        if process.poll() is None: kill_tree(process.pid)


class Beside:
    "A program that runs beside the stages; they do not wait for it before its own."
    def __init__(self, *command):
        self.printed = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.process = start(*command, stdout=self.printed)

    def result(self):
        "Wait for it, show what it printed, and return its exit status and text."
        try: status = self.process.wait()
        finally:
            self.end()
            self.printed.seek(0)
            text = self.printed.read()
            print(text, end="", flush=True)
        return status, text

    def end(self):
        if self.process.poll() is None: kill_tree(self.process.pid)


@contextmanager
def limited(stage, minutes):
    "TimeoutError, with the stage's name, if the block runs for longer."
    def late(*_):
        raise TimeoutError(f"stage {stage} was stopped after its limit of {minutes:g} minutes (LIMITS in run_all.py)")
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def copy_of_sources():
    "The notebooks and their settings in a folder of their own, so that a check changes nothing here."
    with tempfile.TemporaryDirectory(prefix="ucdm-") as folder:
        copy = Path(folder)
        shutil.copy(ROOT / "settings.ini", copy)
        shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        yield copy


def modules(folder):
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in sorted(folder.rglob("*.py"))}


def code_cells(notebook):
    "The code cells of a notebook as (source, tags)."
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
        if cell["cell_type"] == "code":
            yield source, cell["metadata"].get("tags", [])


def parameter_problems(notebook):
    """What papermill would misread in the parameters of an experiment: it knows them by a tag and parses them line by
    line.
    """
    cells = [source for source, tags in code_cells(notebook) if "parameters" in tags]
    if len(cells) != 1:
        return [f"{len(cells)} cells tagged `parameters` instead of one"]
    problems = []
    for line in cells[0].splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([a-z_]\w*) = (.+?)  # ([^=]+)", line)
        try:
            json.dumps(value := ast.literal_eval(match[2]))
            fine = not isinstance(value, tuple)
        except (TypeError, ValueError, SyntaxError):
            fine = False
        if not fine:
            problems.append(f"parameter line is not `name = JSON literal  # help without an equals sign`: {line}")
    return problems


def format_problems(notebook):
    """What keeps `papermill NOTEBOOK OUT` from starting (no kernel named), bloats the file (widget states), or makes it no
    notebook by the format (cells with one id).
    """
    content = json.loads(notebook.read_text(encoding="utf-8"))
    keys, ids = set(content["metadata"]), Counter(cell["id"] for cell in content["cells"] if "id" in cell)
    problems = [f"{n} cells have the id {i}" for i, n in ids.items() if n > 1]
    without = sum("id" not in cell for cell in content["cells"])
    if without and (content["nbformat"], content["nbformat_minor"]) >= (4, 5): problems.append(f"{without} cells have no id")
    if keys != {"kernelspec"}:
        problems.append(f"the metadata must be a kernelspec and nothing else, found {', '.join(sorted(keys)) or 'nothing'}")
    return problems


def import_problems(notebook):
    "Cells that mix imports with other code: nbdev_docs runs every cell that imports, but not the ones before it."
    problems = []
    for source, _ in code_cells(notebook):
        if re.search(r"^#\|\s*exports?\b|nbdev_export\(\)|^\s*[%!]", source, re.M):
            continue
        nodes = ast.parse(source).body
        imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
        if imports and len(imports) < len(nodes):
            problems.append(
                f"a cell mixes imports and other code; give this a cell of its own: {ast.unparse(imports[0])}"
            )
    return problems


def export():
    "Exported modules and README are what the notebooks say, numbers in prose what the results say."
    with copy_of_sources() as copy:
        status, _ = run("nbdev_export", cwd=copy)
        fresh, here = modules(copy / "ucdm"), modules(ROOT / "ucdm")
    for name in sorted(fresh.keys() | here.keys()):
        diff = list(difflib.unified_diff(here.get(name, "").splitlines(), fresh.get(name, "").splitlines(),
                                         f"ucdm/{name} here", f"ucdm/{name} exported", lineterm="", n=1))
        if diff:
            print("\n".join(diff[:40]), "\nrun nbdev_export", sep="")
            status = 1
    readme, _ = run("ucdm-docs", "readme", "--check")
    numbers, _ = run("ucdm-docs", "numbers", "--check")
    return status == readme == numbers == 0, f"{len(fresh)} modules, README, numbers in prose"


def clean():
    "Notebooks hold no execution counts or stray metadata; parameters and imports are where tools expect them."
    with copy_of_sources() as copy:
        status, _ = run("nbdev_clean", cwd=copy)
        dirty = [p for p in NOTEBOOKS if (copy / p.relative_to(ROOT)).read_bytes() != p.read_bytes()]
    problems = [f"{p.relative_to(ROOT)}: not clean: run nbdev_clean" for p in dirty]
    problems += [f"{p.relative_to(ROOT)}: {problem}" for p in NOTEBOOKS for problem in format_problems(p)]
    problems += [f"{p.relative_to(ROOT)}: {problem}" for p in EXPERIMENTS for problem in parameter_problems(p)]
    problems += [
        f"{p.relative_to(ROOT)}: {problem}" for p in NOTEBOOKS if p not in EXPERIMENTS for problem in import_problems(p)
    ]
    print(*problems, sep="\n", end="\n" if problems else "")
    return status == 0 and not problems, f"{len(NOTEBOOKS)} notebooks"


def house():
    "Short cells, lines, prose and modules; imports from earlier wings only; every name that is written exists."
    problems = rules.check(ROOT)
    print(*problems, sep="\n", end="\n" if problems else "")
    kept = ", ".join(f"{name} {value:.3g}" for name, value in rules.figures(ROOT).items() if "median" in name)
    return not problems, f"{len(problems)} problems; {kept}"


def notebooks():
    "Every notebook of the library runs from top to bottom."
    status, text = run("python", "tests/run_notebooks.py", "--n_workers", str(WORKERS), "--timing", "--do_print",
                       OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    return *notebooks_ran(status, text, len(NOTEBOOKS) - len(EXPERIMENTS)), *skipped_in_notebooks(text)


def skipped_in_notebooks(text):
    "What notebooks say that they did not run, a line each."
    return re.findall(r"^- Skipped (.+)$", text, re.M)


def notebooks_ran(status, text, total):
    "What nbdev_test says of the notebooks, in a line."
    failed = re.findall(r"^\t(\S+\.ipynb)$", text, re.M)
    if status and not failed:
        return False, f"nbdev_test ended with status {status} and named no notebook"
    ran = text.count("- Completed ") - len(failed)  # it says so of those that fail, too
    return status == 0 and ran == total, f"{ran} of {total} notebooks ran" + "".join(f", not {n}" for n in failed)


def tests():
    "Processes from outside: kill and resume, command line, bad input."
    status, text = run(
        "python",
        "-m",
        "pytest",
        "tests",
        "--durations=5",
        "-rsx",
        "-n",
        str(WORKERS + 1), # those of a cluster mostly wait
        "--dist",
        "loadgroup",
        OMP_NUM_THREADS="1",
    )
    counted = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", text.splitlines()[-1] if text else "")
    return status == 0, ", ".join(counted) + " in pytest", *skipped_in_pytest(text)


def skipped_in_pytest(text):
    "Tests that were skipped and why, a line each place that skips."
    found = re.findall(r"^SKIPPED \[(\d+)\] (.+?)(?::\d+)?: (.+)$", text, re.M)
    return [f"{place}: {reason}" + (f" ({n} tests)" if n != "1" else "") for n, place, reason in found]


def experiments():
    "The whole batch, small."
    status, text = run("ucdm-reproduce", "--profile", "smoke", "--fresh", "--jobs", str(WORKERS))
    ran = re.search(r"(\d+) of \d+ notebooks done", text)
    on_request = re.findall(r"(\d+ more run on request) \(", text)
    return status == 0, f"{ran[1] if ran else 0} of {len(EXPERIMENTS)} experiments ran", *on_request


SITE = []  # where the site is built while the experiments run: it takes one core, and for a part of its time


def build_beside():
    try: SITE.append(Beside("ucdm-docs", "build"))
    except OSError: pass  # the stage itself says why


def docs():
    "The site builds, and no link in it is broken."
    begun = bool(SITE)
    status, text = SITE.pop().result() if begun else run("ucdm-docs", "build")
    if status == 3:
        raise Skipped(text.strip().splitlines()[-1])
    found = re.search(r"\d+ pages, \d+ links", text)
    return status == 0, (found[0] if found else "no site") + (", begun with the experiments" if begun else "")


STAGES = [export, clean, house, notebooks, tests, experiments, docs]
# minutes, several times what a stage takes on two cores: they end what hangs, and spare a slow machine
LIMITS = dict(export=15, clean=15, house=10, notebooks=60, tests=60, experiments=60, docs=30)


def attempt(stage):
    "Run a stage: (what became of it, a line about it, what was skipped inside)."
    try:
        with limited(stage.__name__, LIMITS[stage.__name__]): passed, detail, *skipped = stage()
        return "passed" if passed else "failed", detail, skipped
    except Skipped as reason: return "skipped", str(reason), [str(reason)]
    except Exception as error:  # a stage that cannot even start has failed; the others still run
        return "failed", f"{type(error).__name__}: {error}", []


def summary(rows):
    "The closing lines: a line each stage (name, result, seconds, detail, skipped), all that was skipped, the count."
    lines = [f"{name:12} {result:8} {seconds:6.0f} s   {detail}" for name, result, seconds, detail, _ in rows]
    skipped = [f"{name}: {what}" for name, *_, parts in rows for what in parts]
    if skipped: lines += ["", "skipped:", *(f"  {line}" for line in skipped), ""]
    count = {kind: sum(row[1] == kind for row in rows) for kind in ("passed", "failed", "skipped")}
    stages = f", {count['skipped']} skipped" if count["skipped"] else ""
    parts = f"; {len(skipped)} parts skipped" if skipped else "; nothing skipped"
    return [*lines, f"stages: {count['passed']} passed, {count['failed']} failed{stages}{parts}"]


def main():
    names = sys.argv[1:] or [stage.__name__ for stage in STAGES]
    unknown = set(names) - {stage.__name__ for stage in STAGES}
    if unknown:
        sys.exit(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(s.__name__ for s in STAGES)}")
    rows = []
    try:
        for stage in (s for s in STAGES if s.__name__ in names):
            print(f"\n==> {stage.__name__}: {stage.__doc__}", flush=True)
            if stage is experiments and "docs" in names: build_beside()
            began = time.time()
            result, detail, skipped = attempt(stage)
            rows.append((stage.__name__, result, time.time() - began, detail, skipped))
            print(f"<== {stage.__name__} {result} after {rows[-1][2]:.0f} s ({detail})", flush=True)
    finally:
        while SITE: SITE.pop().end()
    print("", *summary(rows), sep="\n")
    sys.exit(any(row[1] == "failed" for row in rows))


if __name__ == "__main__":
    main()
