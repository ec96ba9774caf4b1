"""The package as others get it: an sdist, a wheel made from it, its use outside a checkout with what it requires and no
more; and the lock that this repository's own environment is made from.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from email.parser import HeaderParser
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_pages import photographs, readme_code

from ucdm.batch.toy_experiments import add_toy

ROOT = Path(__file__).parent.parent
SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
LISTS = {name: SETTINGS["DEFAULT"][name].split() for name in SETTINGS["DEFAULT"] if name.endswith("requirements")}
ASIDE = shutil.ignore_patterns(".*", "_docs", "_proc", "outputs", "build", "dist", "*.egg-info", "__pycache__")
pytestmark = pytest.mark.xdist_group("package") # they share what is built


def run(*command, cwd, **env):
    "A program that knows nothing of this checkout."
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=alone | env, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The sdist of these sources, and the wheel that is made from it alone."
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "sources", ignore=ASIDE)
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "sources", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def needed(requirements):
    "The distributions that some requirements stand for on this system, with all that those require."
    found, todo = {}, [(Requirement(r), "") for r in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}): continue
        for wanted in ("", *requirement.extras):
            key = canonicalize_name(requirement.name), wanted
            if key in found: continue
            found[key] = distribution(requirement.name)
            todo += [(Requirement(r), wanted) for r in found[key].requires or ()]
    return {name: package for (name, _), package in found.items()}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    "The wheel in an environment of its own, which holds what the wheel requires (as it is here) and no more."
    folder = tmp_path_factory.mktemp("installed") / "environment"
    venv.create(folder)
    site = next(folder.glob("lib/python*/site-packages"))
    for package in needed(LISTS["requirements"]).values():
        for top in {file.parts[0] for file in package.files} - {"..", "__pycache__"}:
            if not (site / top).exists(): (site / top).symlink_to(Path(package.locate_file(top)).resolve())
    (folder / "share").symlink_to(Path(sys.prefix) / "share") # kernels and templates of Jupyter
    here = str(Path(distribution("installer").locate_file("")))
    command = [folder / "bin" / "python", "-m", "installer", "--no-compile-bytecode", built[1]]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": here}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def test_sdist_and_wheel_are_complete(built):
    "Modules, embedded files and notebooks are in, results and tests are not; settings.ini's requirements are stated."
    here = {p.relative_to(ROOT).as_posix() for p in (ROOT / "ucdm").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    with zipfile.ZipFile(built[1]) as wheel:
        assert {name for name in wheel.namelist() if ".dist-info/" not in name} == here
        metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        said = HeaderParser().parsestr(wheel.read(metadata).decode("utf-8"))
    with tarfile.open(built[0]) as sdist: names = {name.partition("/")[2] for name in sdist.getnames()}
    notebooks = {p.relative_to(ROOT).as_posix() for p in (ROOT / "nbs").rglob("*.ipynb")}
    notebooks = {name for name in notebooks if ".ipynb_checkpoints" not in name}
    assert here | notebooks | {"settings.ini", "requirements.lock"} <= names
    assert not {name for name in names if name.startswith(("outputs", "tests", "_"))}

    def exact(text, extra=None):
        r = Requirement(text)
        marker = " and ".join(m for m in (str(r.marker or ""), f'extra == "{extra}"' if extra else "") if m)
        return canonicalize_name(r.name), str(r.specifier), marker
    wanted = {exact(r) for r in LISTS["requirements"]}
    extras = [key for key in LISTS if key.endswith("_requirements")]
    assert {"dev_requirements", "cluster_requirements", "heic_requirements", "export_requirements"} <= {*extras}
    for key in extras: wanted |= {exact(r, key.removesuffix("_requirements")) for r in LISTS[key]}
    assert {exact(r) for r in said.get_all("Requires-Dist")} == wanted
    assert "Operating System :: POSIX :: Linux" in said.get_all("Classifier")


def test_wheel_needs_only_what_it_requires(installed, tmp_path):
    "Every module can be imported without the tools of this repository, and none comes from the checkout."
    code = (
        "import importlib, json, pkgutil, sys, ucdm as package\n"
        "for m in pkgutil.walk_packages(package.__path__, 'ucdm.'): importlib.import_module(m.name)\n"
        "print(json.dumps([package.__file__, *sorted(m for m in sys.modules if m.startswith('ucdm.'))]))"
    )
    done = run(installed / "python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file, *modules = json.loads(done.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(installed.parent) and len(modules) > 100
    tools = run(installed / "python", "-c", "import nbdev", cwd=tmp_path)
    assert tools.returncode and "No module named 'nbdev'" in tools.stderr


def test_wheel_learns_from_own_images(installed, tmp_path):
    "The README's code runs outside a checkout."
    photographs(tmp_path, 4)
    (tmp_path / "own.py").write_text(readme_code() + "\nprint(len(names), set(names))", encoding="utf-8")
    done = run(installed / "python", "own.py", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("40 {")


def test_wheel_has_commands(installed, tmp_path):
    "Without notebooks they say in a line what to do; with notebooks the batch runs and writes its page."
    for command, remedy in (("ucdm-reproduce", "--notebooks"), ("ucdm-docs", "pip install 'ucdm[dev]'")):
        done = run(installed / command, *{"ucdm-docs": ["readme"]}.get(command, ["--list"]), cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert done.stderr.startswith(f"{command}: ") and remedy in done.stderr
    add_toy(tmp_path / "toys", "table_01", 'out = "."')
    (tmp_path / "toys" / "profiles").mkdir()
    (tmp_path / "toys" / "profiles" / "quick.yml").write_text("description: small\n", encoding="utf-8")
    done = run(installed / "ucdm-reproduce", "--notebooks", "toys", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "table_01" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", ["fcntl", "resource"])
def test_other_systems_are_told(module, tmp_path):
    "Where Python lacks a module, the parts that need it name the systems that have it."
    parts = {"fcntl": ["ucdm.batch.runner"], "resource": ["ucdm.runs.provenance"]}
    for part in parts[module]:
        code = f"import sys; sys.modules[{module!r}] = None; import {part}"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        last = done.stderr.splitlines()[-1]
        assert last.startswith("ImportError: ") and f"no module {module}" in last and "WSL" in last


def test_needed_follows_extras_and_markers():
    "What the environment of the wheel is made from: dependencies of dependencies, but no extra that nobody asked for."
    assert {"numpy", "scipy", "lazy-loader"} <= needed(["scikit-image"]).keys()
    assert needed(['pytest; python_version < "3"']) == {}
    assert "pytest" not in needed(["scikit-image", "typer"])


def pins():
    "The lock's lines as (name, version, marker)."
    text = re.sub(r"\s*#.*", "", (ROOT / "requirements.lock").read_text(encoding="utf-8"))
    found = [Requirement(line) for line in text.splitlines() if line]
    return [(canonicalize_name(r.name), str(r.specifier).removeprefix("=="), r.marker) for r in found]


def test_lock_fits_everywhere():
    "Versions and nothing else: no address, no option, no build for one kind of machine."
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text and not re.search(r"^ *-", text, re.M) and "@" not in text
    assert len(pins()) > 150 and all(re.fullmatch(r"\d[\w.]*", version) for _, version, _ in pins())


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system, machine", [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")])
def test_lock_is_in_step_with_settings(python, system, machine):
    "Every requirement has one version on each system, and it is one that settings.ini allows: else `make lock`."
    target = default_environment() | dict(
        python_version=python, python_full_version=f"{python}.9", sys_platform=system, platform_machine=machine,
        platform_system=system.capitalize(), os_name="posix",
    )
    def applies(marker): return marker is None or marker.evaluate(target)
    versions = {}
    for name, version, marker in pins():
        if applies(marker): versions.setdefault(name, []).append(version)
    assert not {name: found for name, found in versions.items() if len(found) > 1}
    for requirement in map(Requirement, [r for required in LISTS.values() for r in required]):
        if not applies(requirement.marker): continue
        version, = versions.get(canonicalize_name(requirement.name), [None])
        assert version and requirement.specifier.contains(version), f"{requirement}: the lock has {version}"


@pytest.fixture
def make(tmp_path):
    "`make` in a copy of what it reads, with a uv that writes down what it is asked for."
    if not shutil.which("make"): pytest.skip("make is not installed")
    names = "Makefile settings.ini setup.py pyproject.toml requirements.lock"
    for name in names.split(): shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    uv = tmp_path / "bin" / "uv"
    script = '#!/bin/sh\n[ "$1" = --version ] || echo "$UV_DEFAULT_INDEX" "$@" >> asked\nmkdir -p .venv\n'
    uv.write_text(script, encoding="utf-8")
    uv.chmod(0o755)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_", "MAKE"))}
    env |= dict(PATH=f"{uv.parent}:{os.environ['PATH']}", PIP_INDEX_URL="https://index.example/simple")
    def make(*arguments):
        command = ["make", f"PYTHON={sys.executable}", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "asked").read_text(encoding="utf-8").splitlines()[-1]
    return make


def test_make_installs_the_locked_versions(make):
    "As constraints, from the index that pip's settings name; `LOCK=` does without."
    asked = make(".venv/.ready")
    assert asked.startswith("https://index.example/simple pip install")
    assert asked.endswith("-c requirements.lock -e .[dev]")
    assert make("-B", "LOCK=", ".venv/.ready").endswith("python -e .[dev]")


def test_make_lock(make):
    "It compiles for all systems from the oldest Python on, and writes no address."
    asked = make("lock", "ARGS=--upgrade")
    oldest = SETTINGS["DEFAULT"]["min_python"]
    for part in ("pip compile", "--universal", f"--python-version {oldest}", "--no-emit-index-url", "--extra dev",
                 "--extra cluster", "--extra heic", "--extra export", "-o requirements.lock setup.py --upgrade"): assert part in asked
    keys = re.search(r"^cache-keys = (.+)$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    assert '"settings.ini"' in keys, "uv would go on with the requirements that it remembers"
