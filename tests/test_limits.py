"""What hangs ends by itself and shows what it printed; what is skipped is named."""
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import run_all
from processes import finish, read_until

ROOT = Path(__file__).parent.parent
HANGS = "import time; print('begun', flush=True); time.sleep(600)"
BEARS = (
    "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    "print(p.pid, flush=True); time.sleep(600)"
)


def python(code, **kwargs):
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, **kwargs)


def gone(pid, seconds=20):
    "Whether a process ends soon."
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE: return True
        except psutil.NoSuchProcess: return True
        time.sleep(0.05)
    return False


def test_waiting_for_a_line():
    "A line that does not come: the process and its children are killed, and what it printed is shown."
    process = python(BEARS)
    with pytest.raises(AssertionError, match=r"did not come within 3 s.*\n\d+") as e:
        read_until(process, lambda line: "never" in line, seconds=3)
    assert process.returncode == -9 and gone(int(str(e.value).splitlines()[1]))
    process = python("import sys; print('one'); sys.exit('no more')", stderr=subprocess.PIPE)
    with pytest.raises(AssertionError, match="ended with status 1. Printed:\none\nno more"):
        read_until(process, lambda line: "never" in line)
    process = python("print('one'); print('two'); print('three')")
    assert read_until(process, lambda line: line == "two\n") == ["one\n", "two\n"]
    assert read_until(process, lambda line: True) == ["three\n"] and process.wait(60) == 0


def test_waiting_for_an_end():
    "A process that does not end is killed, and what it printed is shown."
    process = python(HANGS)
    with pytest.raises(AssertionError, match="did not end within 3 s. Printed:\nbegun"): finish(process, 3)
    assert process.returncode == -9


def test_hanging_test(tmp_path):
    "It fails at its time limit with the line it hangs in, its process ends, and the next test runs."
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(
        "import subprocess, sys, time\nimport pytest\n@pytest.mark.timeout(3)\ndef test_hangs():\n"
        f"    print(subprocess.Popen([sys.executable, '-c', {HANGS!r}]).pid, 'is the child')\n    time.sleep(600)\n"
        "def test_next(): pass\n", encoding="utf-8"
    )
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120)
    assert "1 failed, 1 passed" in done.stdout and "Timeout (>3.0s)" in done.stdout, done.stdout + done.stderr
    child, = (line.split()[0] for line in done.stdout.splitlines() if line.endswith(" is the child"))
    assert gone(int(child))


def test_groups_stay_together(tmp_path):
    "Tests of a group run in one of several processes, the others in any."
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]", encoding="utf-8")
    code = "import os, time\nimport pytest\n{}\n@pytest.mark.parametrize('n', range(6))\ndef test_it(n):\n" \
        "    time.sleep(.2)\n    with open('{}', 'a') as f: print(os.getpid(), file=f)\n"
    mark = "pytestmark = pytest.mark.xdist_group('x')"
    for name, first in (("test_a", mark), ("test_b", mark), ("test_c", "")):
        (tmp_path / f"{name}.py").write_text(code.format(first, tmp_path / f"{name}.txt"), encoding="utf-8")
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120)
    assert "18 passed" in done.stdout, done.stdout + done.stderr
    ran = {name: (tmp_path / f"test_{name}.txt").read_text(encoding="utf-8").split() for name in "abc"}
    assert len({*ran["a"], *ran["b"]}) == 1 and [len(pids) for pids in ran.values()] == [6, 6, 6]


def test_every_test_has_a_limit(request):
    assert 60 <= float(request.config.getini("timeout")) <= 600 and request.config.pluginmanager.has_plugin("timeout")


def test_hanging_stage(monkeypatch, capsys):
    "A stage that hangs fails at its limit, which names it; its process ends, and the next stage runs."
    def tests(): return run_all.run("python", "-c", BEARS)[0] == 0, "never"
    def docs(): return True, "all there"
    def house():
        while True: time.sleep(0.1)  # no process of its own
    monkeypatch.setattr(run_all, "STAGES", [house, tests, docs])
    monkeypatch.setattr(run_all, "LIMITS", dict(house=0.02, tests=0.05, docs=1))
    monkeypatch.setattr(sys, "argv", ["run_all.py"])
    with pytest.raises(SystemExit) as e: run_all.main()
    printed = capsys.readouterr().out
    assert e.value.code == 1 and "TimeoutError: stage house was stopped after its limit of 0.02 minutes" in printed
    assert "stage tests was stopped after its limit of 0.05 minutes" in printed and "docs         passed" in printed
    assert printed.splitlines()[-1] == "stages: 1 passed, 2 failed; nothing skipped"
    assert gone(int(next(line for line in printed.splitlines() if line.isdigit())))


def cell(source, id): return dict(cell_type="code", source=source, id=id, metadata={}, outputs=[], execution_count=None)


def test_notebooks_that_hang_or_skip(tmp_path):
    """A cell that hangs fails its notebook and no other; what a notebook says it skipped is named, and cells that are
    not to be run are counted.
    """
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "nbs").mkdir()
    notebooks = dict(
        hangs=["import time", "while True: time.sleep(0.1)"],
        skips=["'Skipped: there is no moon.'", "print('Skipped: no sun')", "#| eval: false\n1 / 0", "'not Skipped: x'"],
        fine=["1"],
    )
    for name, sources in notebooks.items():
        content = dict(cells=[cell(s, f"{i:08d}") for i, s in enumerate(sources)], metadata={}, nbformat=4,
                       nbformat_minor=5)
        (tmp_path / "nbs" / f"{name}.ipynb").write_text(json.dumps(content), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "run_notebooks.py"), "--n_workers", "2", "--do_print"],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | dict(UCDM_CELL_SECONDS="5"), timeout=200,
    )
    printed = done.stdout + done.stderr
    assert run_all.notebooks_ran(done.returncode, printed, 3) == (False, "2 of 3 notebooks ran, not hangs.ipynb")
    assert "- Stopped nbs/hangs.ipynb: a cell ran longer than 5 s" in printed and "TimeoutError" in printed
    assert sorted(run_all.skipped_in_notebooks(printed)) == [
        "nbs/skips.ipynb: cells marked not to be run (eval: false): 1",
        "nbs/skips.ipynb: no sun",
        "nbs/skips.ipynb: there is no moon.",
    ]


def test_skips_are_named():
    "The closing lines name what was skipped inside stages that passed, and the last one counts it."
    text = (
        "SKIPPED [2] tests/test_data.py:410: no local CIFAR-10: set UCDM_DATA\n"
        "SKIPPED [1] tests/test_pages.py:26: not a git checkout\n298 passed, 3 skipped in 384.00s (0:06:24)\n"
    )
    skipped = run_all.skipped_in_pytest(text)
    assert skipped == ["tests/test_data.py: no local CIFAR-10: set UCDM_DATA (2 tests)",
                       "tests/test_pages.py: not a git checkout"]
    lines = run_all.summary([("tests", "passed", 384, "298 passed, 3 skipped in pytest", skipped),
                             ("docs", "skipped", 1, "needs Python 3.11", ["needs Python 3.11"])])
    assert lines[2:] == ["", "skipped:", *(f"  tests: {line}" for line in skipped), "  docs: needs Python 3.11", "",
                         "stages: 1 passed, 0 failed, 1 skipped; 3 parts skipped"]


def test_the_site_is_built_beside_the_experiments(monkeypatch, capsys):
    "It is shown in its own stage, fails as it would there, and does not outlive what is stopped."
    started, Beside = [], run_all.Beside
    def program(code):
        def start(*command):
            started.append((command, Beside("python", "-c", code)))
            return started[-1][1]
        return start

    def experiments(): return True, "all"
    def interrupted(): raise KeyboardInterrupt
    def ended(stage, code):
        stage.__name__ = "experiments"
        for name, value in dict(experiments=stage, STAGES=[stage, run_all.docs], Beside=program(code)).items():
            monkeypatch.setattr(run_all, name, value)
        with pytest.raises((SystemExit, KeyboardInterrupt)) as e: run_all.main()
        return getattr(e.value, "code", None)

    monkeypatch.setattr(sys, "argv", ["run_all.py"])
    assert ended(experiments, "print('3 pages, 4 links')") == 0
    printed = capsys.readouterr().out
    assert printed.index("<== experiments") < printed.index("\n3 pages") and "s   3 pages, 4 links, begun with the experiments" in printed
    assert ended(experiments, "import sys; print('a broken link'); sys.exit(1)") == 1
    assert "a broken link" in capsys.readouterr().out
    assert ended(interrupted, HANGS) is None and gone(started[-1][1].process.pid) and not run_all.SITE
    assert [command for command, _ in started] == [("ucdm-docs", "build")] * 3
