"""What surrounds the package: `make hooks` in a clone that has something there already, and what `make test` says of a stage."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import run_all

MAKEFILE = Path(__file__).parent.parent / "Makefile"
LINE = "*.ipynb merge=nbdev-merge"


@pytest.fixture
def clone(tmp_path, monkeypatch):
    "An empty repository, with nobody's global settings of git."
    for name in ("GLOBAL", "SYSTEM"): monkeypatch.setenv(f"GIT_CONFIG_{name}", os.devnull)
    if not (shutil.which("git") and shutil.which("make")): pytest.skip("git or make is not installed")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".git" / "hooks" / "post-merge").unlink(missing_ok=True)
    return tmp_path


def hooks(clone):
    "`make hooks` with an environment that is taken for ready."
    done = subprocess.run(
        ["make", "-f", str(MAKEFILE), "-o", ".venv/.ready", "hooks"], cwd=clone, capture_output=True, text=True
    )
    return done.returncode, done.stderr


def test_hooks_are_added(clone):
    "What stands in the attributes stays; twice is once; a hook that was ours names this environment again."
    attributes, hook = clone / ".git" / "info" / "attributes", clone / ".git" / "hooks" / "post-merge"
    attributes.parent.mkdir(exist_ok=True)
    attributes.write_text("*.png binary", encoding="utf-8")
    for _ in range(2):
        assert hooks(clone) == (0, "")
        assert attributes.read_text(encoding="utf-8").split("\n") == ["*.png binary", LINE, ""]
        assert f'exec "{clone}/.venv/bin/nbdev_trust" nbs\n' in hook.read_text(encoding="utf-8")
        assert os.access(hook, os.X_OK)
        hook.write_text('#!/bin/sh\nexec "/elsewhere/bin/nbdev_trust" nbs\n', encoding="utf-8")


@pytest.mark.parametrize("shared", [False, True])
def test_hooks_of_others_stay(clone, shared):
    "Another hook, or a folder of hooks for all clones, is left as it is, and said."
    folder = clone / "all my hooks" if shared else clone / ".git" / "hooks"
    folder.mkdir(exist_ok=True)
    if shared: subprocess.run(["git", "-C", clone, "config", "core.hooksPath", folder], check=True)
    else: (folder / "post-merge").write_text("#!/bin/sh\necho mine\n", encoding="utf-8")
    before = {p: p.read_bytes() for p in folder.iterdir()}
    status, said = hooks(clone)
    assert status and "nothing was changed" in said and {p: p.read_bytes() for p in folder.iterdir()} == before
    assert "nbdev" not in (clone / ".git" / "config").read_text(encoding="utf-8")


def test_notebooks_that_never_started():
    "Only notebooks that were completed are said to have run."
    done = "- Completed /nbs/a.ipynb\n- Completed /nbs/b.ipynb\n"
    assert run_all.notebooks_ran(0, done, 2) == (True, "2 of 2 notebooks ran")
    assert run_all.notebooks_ran(0, done, 3) == (False, "2 of 3 notebooks ran")
    assert run_all.notebooks_ran(0, "No files were eligible for testing", 51) == (False, "0 of 51 notebooks ran")
    failed = "nbdev Tests Failed On The Following Notebooks:\n\tb.ipynb\n"
    assert run_all.notebooks_ran(1, done + failed, 2) == (False, "1 of 2 notebooks ran, not b.ipynb")
    assert run_all.notebooks_ran(1, "No module named 'nbdev'", 51) == (
        False,
        "nbdev_test ended with status 1 and named no notebook",
    )


def test_output_that_is_not_utf8(capsys):
    "A stage may print any bytes; the summary of all stages still comes."
    status, said = run_all.run("python", "-c", "import os; os.write(1, b'caf\\xe9\\n'); print('over')")
    assert status == 0 and said == "caf\ufffd\nover\n"
