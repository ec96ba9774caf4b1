"""The batch from outside: the command line on folders of tiny notebooks, with failures, kills and wrong parameters."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml
from processes import ran

from ucdm.batch.kernels import can_fork
from ucdm.batch.profiles import find_experiments, load_profile, plan

COMMAND = [sys.executable, "-m", "ucdm.batch.cli"]


def notebook(parameters="size = 3  # how many", body="", title="A tiny experiment"):
    "An experiment notebook that checks its parameters, runs `body`, and leaves its mark."
    cells = [
        nbformat.v4.new_markdown_cell(f"# {title}\n\n> It runs."),
        nbformat.v4.new_code_cell(
            "from ucdm.batch.parameters import check_parameters\nfrom ucdm.core.files import atomic_json\nfrom ucdm.runs.result import mark_done"
        ),
        nbformat.v4.new_code_cell(parameters + '\nout = "."  # where results go', metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("check_parameters()"),
        nbformat.v4.new_code_cell(body or parameters.split()[0]),
        nbformat.v4.new_code_cell(
            'atomic_json(f"{out}/results/{NAME}.json", dict(verdict="holds"))\nmark_done(out, NAME)'
        ),
    ]
    return nbformat.v4.new_notebook(
        cells=cells, metadata={"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    )


@pytest.fixture
def project(tmp_path):
    "A folder of notebooks with a profile; call it with name=notebook to fill it."
    home = tmp_path / "nbs" / "experiments"
    (home / "profiles").mkdir(parents=True)

    def fill(profile=None, **notebooks):
        for name, nb in notebooks.items():
            nb.cells[-1].source = nb.cells[-1].source.replace("NAME", repr(name))
            nbformat.write(nb, home / f"{name}.ipynb")
        (home / "profiles" / "quick.yml").write_text(yaml.safe_dump(profile or {}), encoding="utf-8")
        return tmp_path
    return fill


def arguments(folder, *more):
    return [*COMMAND, "--notebooks", str(folder / "nbs" / "experiments"), "--out", str(folder / "out"), *more]


def batch(folder, *more):
    done = ran(*arguments(folder, *more)[1:])
    return done.returncode, done.stdout, done.stderr


def test_all_run_and_are_kept(project):
    "Every notebook runs once; the second call finds them done; a changed parameter runs only what it concerns."
    folder = project(table_01=notebook(), figure_02=notebook("width = 1.5  # of the figure"))
    status, said, _ = batch(folder)
    assert status == 0 and "2 of 2 notebooks done (0 from before)" in said
    assert (folder / "out" / "index.html").exists() and (folder / "out" / "notebooks" / "table_01.ipynb").exists()
    status, said, _ = batch(folder)
    assert status == 0 and said.count("already done") == 2
    assert "invocations" not in (folder / "out" / "index.html").read_text(encoding="utf-8")
    project(dict(notebooks=dict(table_01=dict(parameters=dict(size=4)))))
    status, said, _ = batch(folder)
    assert status == 0 and said.count("already done") == 1 and "table_01  done" in said
    executed = nbformat.read(folder / "out" / "notebooks" / "table_01.ipynb", 4)
    assert "4" in [
        o.data["text/plain"] for c in executed.cells if c.cell_type == "code" for o in c.outputs if "data" in o
    ]


def test_forked_kernels(project):
    """Notebooks that share imports are forked from one process where that is safe; each has a namespace and modules of
    its own, may start processes, and shows its figures.
    """
    body = """import json, math, multiprocessing, matplotlib.pyplot as plt
from concurrent.futures import ProcessPoolExecutor
assert not hasattr(json, "touched"), "another notebook's change is seen here"
json.touched = True
with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool: print(list(pool.map(math.sqrt, [4, 9])))
plt.plot([1, 2]); plt.show()
multiprocessing.parent_process() is not None"""
    names = [f"table_0{i}" for i in range(3)]
    folder = project(**{name: notebook(body=body) for name in names})
    status, said, error = batch(folder, "--jobs", "1")
    assert status == 0, said
    assert "leaked" not in error and "Warning" not in error, error
    for name in names:
        outputs = [
            o
            for c in nbformat.read(folder / "out" / "notebooks" / f"{name}.ipynb", 4).cells
            if c.cell_type == "code"
            for o in c.outputs
        ]
        assert "[2.0, 3.0]\n" in [o.get("text") for o in outputs]
        assert any("image/png" in o.get("data", {}) for o in outputs)
        assert str(can_fork()) in [o["data"]["text/plain"] for o in outputs if "data" in o]
        assert not (folder / "out" / "logs" / f"{name}.log").read_text(encoding="utf-8").strip()


@pytest.mark.parametrize("missing", ["no_such_module", "broken"])
def test_import_that_fails(project, tmp_path, monkeypatch, missing):
    "What the notebooks share cannot be imported: each says so, as it would alone."
    (tmp_path / "broken.py").write_text("raise RuntimeError('broken on purpose')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = project(table_01=notebook(body=f"import {missing}"), table_02=notebook(body=f"import {missing}"))
    status, said, _ = batch(folder)
    assert (
        status == 1
        and said.count(
            "failed: ModuleNotFoundError: No module named"
            if missing != "broken"
            else "failed: RuntimeError: broken on purpose"
        )
        == 2
    )
    assert ("their common start failed" in said) == (missing == "broken" and can_fork())


def test_one_fails(project):
    "The failing notebook is named with its error, the others run, the exit status tells."
    folder = project(table_01=notebook(body="1 / 0"), table_02=notebook())
    status, said, _ = batch(folder)
    assert status == 1
    assert "table_01: failed: ZeroDivisionError: division by zero" in said and "table_02  done" in said
    assert "The same command goes on where this one stopped" in said
    page = (folder / "out" / "index.html").read_text(encoding="utf-8")
    assert "ZeroDivisionError" in page
    project(table_01=notebook(body="0 / 1"))
    status, said, _ = batch(folder)
    assert status == 0 and "table_02  already done" in said


@pytest.mark.parametrize("profile, complaint", [
    (dict(notebooks=dict(table_01=dict(parameters=dict(siez=4)))), "table_01: unknown parameter 'siez': did you mean 'size'"),
    (dict(notebooks=dict(table_01=dict(parameters=dict(size="four")))), "table_01: size='four' must be a whole number"),
    (dict(all=dict(siez=4)), "unknown parameter 'siez'"),
    (dict(notebooks=dict(tabel_01=dict())), "unknown notebook 'tabel_01': did you mean 'table_01'"),
    (dict(notebook=dict()), "unknown key 'notebook': did you mean 'notebooks'"),
    (dict(notebooks=dict(table_01=dict(size=4))), "unknown key 'size'"),
    (dict(notebooks=["table_01"]), "quick.yml: notebooks=['table_01'] must be a mapping"),
])
def test_profile_that_does_not_fit(project, profile, complaint):
    "What is wrong in a profile is found before anything runs."
    folder = project(profile, table_01=notebook())
    status, said, error = batch(folder)
    assert status == 2 and complaint in error and "Traceback" not in error
    assert "started" not in said


@pytest.mark.parametrize("more, complaint", [
    (["--profile", "quik"], "unknown profile 'quik': did you mean 'quick'"),
    (["--only", "tabel_01"], "unknown notebook 'tabel_01': did you mean 'table_01'"),
    (["table_01"], "write `--only table_01`"),
])
def test_command_line_that_does_not_fit(project, more, complaint):
    folder = project(table_01=notebook())
    status, _, error = batch(folder, *more)
    assert status == 2 and complaint in error and "Traceback" not in error


@pytest.mark.parametrize("option, complaint", [
    (["-p", "siez", "4"], "unknown parameter 'siez': did you mean 'size'"),
    (["-p", "size", "four"], "size='four' must be a whole number"),
])
def test_papermill_by_hand(project, option, complaint):
    "Without the batch, the notebook itself refuses a parameter that papermill would only warn of."
    folder = project(table_01=notebook())
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            str(folder / "nbs/experiments/table_01.ipynb"),
            str(folder / "out.ipynb"),
            "--no-progress-bar",
            *option,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0 and complaint in done.stderr


def waiting(folder, mark="begun"):
    "A notebook that says it has begun and then waits."
    body = (
        f"import pathlib, os, time\npathlib.Path({str(folder / mark)!r}).write_text(str(os.getpid()))\nif not "
        f"pathlib.Path({str(folder / 'go')!r}).exists(): time.sleep(600)"
    )
    return notebook(body=body)


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition(): return found
        time.sleep(0.2)
    raise AssertionError("it did not happen in time")


def alive(pid):
    "Whether a process runs (a dead one that nobody has asked about yet does not)."
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as f: return f.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError: return False


def begun(folder):
    mark = folder / "begun"
    return int(mark.read_text(encoding="utf-8")) if mark.exists() and mark.read_text(encoding="utf-8") else None


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed(project, tmp_path, how):
    """Killed or interrupted in the second of two notebooks: its kernel goes too, and the same command does just the
    rest.
    """
    folder = project(dict(notebooks=dict(a=None, b=None)), a=notebook(), b=waiting(tmp_path))
    in_background = how == signal.SIGTERM  # as after `nohup ... &`, where SIGINT is ignored
    start = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN if in_background else signal.SIG_DFL)
    process = subprocess.Popen(
        arguments(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=start
    )
    kernel = until(lambda: begun(folder))
    process.send_signal(how)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130), said
    until(lambda: not alive(kernel))
    (folder / "go").touch()
    status, said, _ = batch(folder)
    assert status == 0 and "a  already done" in said and "b  done" in said
    held = json.loads((folder / "out" / "results" / "batch.json").read_text(encoding="utf-8"))
    assert [s["notebooks"] for s in held["invocations"]] == [1, 1] and held["invocations"][1]["seconds"] >= held[
        "jobs"
    ]["b"]["seconds"]
    # who is killed writes nothing down
    assert held["jobs"]["b"]["invocations"] == [s["started"] for s in held["invocations"]][how == signal.SIGKILL:]
    assert "in 2 invocations" in (folder / "out" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("warm", [False, True])
def test_kernel_that_dies(project, warm):
    "As when memory runs out: the batch says so, and goes on."
    nb = notebook()
    nb.cells[-1].source = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    more = dict(c=notebook(), d=notebook()) if warm else {}
    status, said, _ = batch(project(b=nb, **more))
    assert status == 1 and "Kernel died" in said, said
    assert all(f"{name}  done" in said for name in more)


def test_time_limit(project, tmp_path):
    folder = project(dict(notebooks=dict(b=dict(limit_minutes=0.1))), b=waiting(tmp_path))
    status, said, _ = batch(folder)
    assert status == 1 and "b: timed out" in said and "Raise limit_minutes" in said


@pytest.mark.parametrize("more", [[], ["--fresh"]])
def test_two_batches_at_once(project, tmp_path, more):
    "The second is refused, and forgets nothing of the first."
    folder = project(b=waiting(tmp_path))
    first = subprocess.Popen(arguments(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: begun(folder))
        (folder / "out" / "cache" / "runs").mkdir()
        status, _, error = batch(folder, *more)
        assert status == 1 and "another batch is writing" in error and (folder / "out" / "cache" / "runs").exists()
    finally:
        first.send_signal(signal.SIGTERM)
        first.wait(60)


def test_notebook_without_a_mark(project):
    nb = notebook()
    nb.cells[-1].source = "size"
    status, said, _ = batch(project(table_01=nb))
    assert status == 1 and "it must call `conclude`" in said


def test_fresh_and_list(project):
    folder = project(table_01=notebook(), table_02=notebook())
    batch(folder)
    status, said, _ = batch(folder, "--list")
    assert status == 0 and said.count("done  table") == 2 and "size = 3" in said
    status, said, _ = batch(folder, "--fresh", "--only", "table_02")
    assert status == 0 and "table_02  done" in said and "table_01" not in said


def test_on_request(project):
    """A notebook that a profile marks so runs when it is named, and only then.

    The page of all links to it; once its file is gone, the page forgets it.
    """
    folder = project(dict(notebooks=dict(table_02=dict(on_request=True))), table_01=notebook(), table_02=notebook())
    status, said, _ = batch(folder)
    assert (
        status == 0 and "1 of 1 notebooks done" in said and "1 more run on request" in said and "table_02  " not in said
    )
    status, said, _ = batch(folder, "--all")
    assert status == 0 and "2 of 2 notebooks done (1 from before)" in said and "on request" not in said
    status, said, _ = batch(folder, "--only", "table_02", "--fresh")
    assert status == 0 and "table_02  done" in said
    shutil.rmtree(folder / "out" / "notebooks")
    page = lambda: batch(folder, "--page")[0] == 0 and (folder / "out" / "index.html").read_text(encoding="utf-8")
    assert 'href="../nbs/experiments/table_02.ipynb"' in page()
    (folder / "nbs" / "experiments" / "table_02.ipynb").unlink()
    project()
    assert "table_02" not in page() and "table_01" in page()


def test_help():
    done = subprocess.run(
        [*COMMAND, "--help"], capture_output=True, text=True, timeout=60, env=os.environ | {"COLUMNS": "200"}
    )
    assert done.returncode == 0 and "--fresh" in done.stdout and "Examples" in done.stdout


def test_results_are_json(project):
    "What the batch leaves for machines can be read by them."
    folder = project(table_01=notebook())
    batch(folder)
    held = json.loads((folder / "out" / "results" / "batch.json").read_text(encoding="utf-8"))
    assert held["jobs"]["table_01"]["status"] == "done"
    assert {"python", "packages", "device", "commit", "started"} <= held.keys()
    invocation, = held["invocations"]
    assert invocation["seconds"] >= held["jobs"]["table_01"]["seconds"] > 0 and (
        invocation["notebooks"],
        invocation["at_once"],
        invocation["commit"],
    ) == (1, 1, held["commit"])


@pytest.mark.parametrize("profile", ["smoke", "quick", "standard", "paper"])
def test_profiles_fit(profile):
    """Every profile names notebooks and parameters that exist, gives values of their types, and says of every notebook
    how long it takes.
    """
    home = Path(__file__).parent.parent / "nbs" / "experiments"
    experiments, content = find_experiments(home), load_profile(profile, home / "profiles")
    assert len(plan(experiments, content, "..")) == len(experiments)
    assert not (
        silent := [n for n in experiments if not ((content["notebooks"].get(n) or {}).get("seconds") or 0) > 0]
    ), f"{profile} does not say how long these take: {', '.join(silent)}"


def test_plan_of_the_paper(tmp_path):
    """Table 3 without any data set on disk: nothing is downloaded or written, and the pairs are those of three draws of
    40,000 seeds and 20 classes.

    Table 11, which has no runs, is rehearsed too.
    """
    env = os.environ | dict(UCDM_DATA=str(tmp_path / "data"))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ucdm.batch.cli",
            "--profile",
            "paper",
            "--only",
            "table_03",
            "--only",
            "table_11",
            "--plan",
            "--rate",
            "1000",
            "--training-rate",
            "1000",
            "--out",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "4,800,000 to generate" in done.stdout
        and "192,000,000 of them for pairs" in done.stdout
        and "without reading any: cifar100" in done.stdout
        and "would fail" not in done.stdout
    )
    assert not list(tmp_path.iterdir())


def test_plan_finds_no_fault(tmp_path):
    "A plan computes nothing, and what it replaces by stand-ins is no reason to report a notebook."
    asked = ["--only", "lsdm", "--only", "figure_05", "--plan", "--rate", "1000", "--training-rate", "1000"]
    command = [sys.executable, "-m", "ucdm.batch.cli", *asked, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "lsdm_bound: trains small models itself" in done.stdout and "would fail" not in done.stdout
    assert not list(tmp_path.iterdir())


def test_plan_with_a_fault(tmp_path):
    "A plan in which a notebook would fail says so, and ends with 1: nothing that comes after it should start."
    asked = ["--only", "table_02", "--set", "methods=[ucmd]", "--plan", "--rate", "1000", "--training-rate", "1000"]
    command = [sys.executable, "-m", "ucdm.batch.cli", *asked, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "unknown method 'ucmd': did you mean 'ucdm'?" in done.stdout, done.stderr


def test_another_profiles_folder(tmp_path):
    "Results of one profile are not shown, published or gone on with as another's."
    out = tmp_path / "out"
    (out / "results").mkdir(parents=True)
    (out / "results" / "batch.json").write_text('{"profile": "smoke"}', encoding="utf-8")
    for asked in (["--page"], ["--publish"], ["--only", "figure_05"]):
        command = [sys.executable, "-m", "ucdm.batch.cli", "--profile", "quick", *asked, "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and "results of the profile 'smoke', not 'quick'" in done.stderr, done.stderr
    assert [f.name for f in out.rglob("*") if f.is_file() and "lock" not in f.name] == ["batch.json"]


def test_committed_results():
    """What is committed (or staged) fits together: the results of profile quick were made with the profile's parameters,
    and the page of results links only to files of the repository.
    """
    root = Path(__file__).parent.parent
    git = lambda *args: (
        subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True).stdout
    )
    try: files = set(git("ls-files").splitlines())
    except (OSError, subprocess.SubprocessError): pytest.skip("not a git checkout")
    read = lambda name: git("show", f":{name}")
    committed, home = "outputs/committed/quick", root / "nbs" / "experiments"
    batch = json.loads(read(f"{committed}/results/batch.json"))["jobs"]
    for job in plan(find_experiments(home), load_profile("quick", home / "profiles"), root / "outputs" / "quick"):
        wanted = {} if job.on_request else json.loads(json.dumps({k: v for k, v in job.parameters.items() if k != "out"}))
        assert not (other := {k: v for k, v in wanted.items() if batch[job.name]["parameters"].get(k) != v}), (
            f"{job.name} was run with other parameters than the profile's {other}"
        )
    links = {
        os.path.normpath(f"{committed}/{link}")
        for link in re.findall(r'href="([^"#]+)"', read(f"{committed}/index.html"))
        if not link.startswith("http")
    }
    assert len(links) > 100 and not links - files, sorted(links - files)[:5]


def test_page_alone(project):
    "The page of a folder without its executed notebooks: the same claims and facts, links to the sources, nothing run."
    folder = project(table_01=notebook(), table_02=notebook(body="1 / 0"))
    assert batch(folder)[0] == 1
    facts = json.loads((folder / "out" / "results" / "batch.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder / "out" / "notebooks")
    status, said, _ = batch(folder, "--page")
    assert status == 0 and "started" not in said
    assert json.loads((folder / "out" / "results" / "batch.json").read_text(encoding="utf-8")) == facts
    page = (folder / "out" / "index.html").read_text(encoding="utf-8")
    links = [link for link in re.findall(r'href="([^"#]+)"', page)]
    assert "../nbs/experiments/table_01.ipynb" in links and all((folder / "out" / link).exists() for link in links)
    assert "ZeroDivisionError" in page and "holds at this scale" in page
