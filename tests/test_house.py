"""Each house rule, on a made-up repository that keeps them all and then breaks just that one."""
import json
import subprocess
import sys
from pathlib import Path

import house
import pytest


def notebook(file, *cells, tags=()):
    "Write a notebook; a cell that begins with `md:` is prose."
    content = [
        dict(cell_type="markdown", metadata={}, source=cell.removeprefix("md:"))
        if cell.startswith("md:")
        else dict(cell_type="code", metadata={"tags": list(tags)}, source=cell, outputs=[], execution_count=None)
        for cell in cells
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(cells=content, metadata={}, nbformat=4, nbformat_minor=5)), encoding="utf-8")


def room(root, name, code, *more, number="01"):
    "A module of a wing and the notebook that it comes from."
    wing, module = name.split(".")
    notebook(root / "nbs" / wing / f"{number}_{module}.ipynb", f"#| default_exp {name}", f"#| export\n{code}", *more)
    (root / "ucdm" / wing).mkdir(parents=True, exist_ok=True)
    (root / "ucdm" / wing / "__init__.py").touch()
    (root / "ucdm" / wing / f"{module}.py").write_text(code, encoding="utf-8")


@pytest.fixture
def root(tmp_path):
    "A small repository in which everything is as it should be."
    (tmp_path / "ucdm").mkdir()
    (tmp_path / "ucdm" / "__init__.py").write_text('__version__ = "1"', encoding="utf-8")
    room(tmp_path, "core.files", "def save(path): ...", "md:A file is written at once.")
    images = "from ucdm.core.files import save\n\nclass Images:\n    def __init__(self): self.n = 0"
    room(tmp_path, "data.images", images,
         "md:See [files](../core/01_files.ipynb) and `ucdm.core.files.save`.", 'x = "ucdm.data.images:Images"')
    notebook(tmp_path / "nbs" / "index.ipynb", "md:# ucdm\n\nStart with [images](data/01_images.ipynb).")
    experiments = tmp_path / "nbs" / "experiments"
    notebook(experiments / "paper" / "table_01.ipynb", "size = 3  # how many", tags=["parameters"])
    (experiments / "profiles").mkdir()
    profile = "notebooks: {table_01: {parameters: {size: 4}}}"
    (experiments / "profiles" / "quick.yml").write_text(profile, encoding="utf-8")
    (tmp_path / "nbs" / "sidebar.yml").write_text("contents: [index.ipynb, data/*.ipynb]", encoding="utf-8")
    readme = "[images](nbs/data/01_images.ipynb), `python -m ucdm.data.images`"
    (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    return tmp_path


def problems(root):
    "What is wrong now."
    house.cells.cache_clear(), house.tree.cache_clear()
    return house.check(root)


def test_all_kept(root):
    assert problems(root) == []


def test_long_cell(root):
    room(root, "core.files", "\n".join(["def save(path):"] + ["    path"] * 59))
    assert not [p for p in problems(root) if "an exported cell of" in p]
    room(root, "core.files", "\n".join(["def save(path):"] + ["    path"] * 60))
    assert "nbs/core/01_files.ipynb: an exported cell of 61 lines" in problems(root)


def test_median_and_percentile_of_cells(root):
    room(root, "core.files", "\n".join(["def save(path):"] + ["    path"] * 40))
    room(root, "core.more", "\n".join(["def more(path):"] + ["    path"] * 40), number="02")
    assert problems(root) == ["exported cells, median lines: 41, at most 12",
                              "exported cells, 90th percentile: 41, at most 35"]


def test_several_definitions_in_a_cell(root):
    room(root, "core.files", "def save(path): ...\n\ndef load(path): ...")
    assert problems(root) == ["exported cells with several definitions, %: 50, at most 10"]


@pytest.mark.parametrize("folder", ["data", "experiments/paper"])
def test_long_line(root, folder):
    file = root / "nbs" / folder / "02_wide.ipynb"
    short = ["x = 1\n" * 80]
    notebook(file, *short, f"y = '{'a' * 134}'")
    assert problems(root) == []
    notebook(file, *short, f"y = '{'a' * 135}'")
    found, = problems(root)
    assert found.startswith(f"nbs/{folder}/02_wide.ipynb: 141 characters: y = ")


def test_line_of_a_parameter(root):
    "Papermill wants a parameter on one line, so it may be long; the same line elsewhere may not."
    file, line = root / "nbs" / "experiments" / "paper" / "table_01.ipynb", f"size = '{'a' * 140}'  # how many"
    notebook(file, line, tags=["parameters"])
    assert problems(root) == []
    notebook(file, line)
    assert any("characters: size = " in p for p in problems(root))


def test_many_wide_lines(root):
    notebook(root / "nbs" / "data" / "02_wide.ipynb", f"y = '{'a' * 120}'")
    found, = problems(root)
    assert found.startswith("code lines over 120 characters, %: ")


def test_long_prose(root):
    "A median: one long cell is fine, three of five are not. Headings alone, code and tables do not count."
    text, code = "md:" + "word " * 36, "md:# Title\n\n```python\n" + "word " * 99 + "\n```\n\n| " + "word " * 99 + "|"
    notebook(root / "nbs" / "data" / "02_words.ipynb", text, code)
    assert problems(root) == []
    notebook(root / "nbs" / "data" / "02_words.ipynb", text, text, text)
    assert problems(root) == ["words a prose cell, median: 36, at most 35"]


def test_long_module(root):
    file = root / "ucdm" / "core" / "files.py"
    file.write_text("def save(path): ...\n" + "#\n" * 399, encoding="utf-8")
    assert problems(root) == []
    file.write_text("def save(path): ...\n" + "#\n" * 400, encoding="utf-8")
    assert problems(root) == ["ucdm.core.files: 401 lines, at most 400"]


@pytest.mark.parametrize("code", [
    "from ucdm.data.images import Images",
    "from ..data.images import Images",
    "from ucdm.data import images",
    "import ucdm.data.images",
    "def lazy():\n    from ucdm.data.images import Images",
    "import importlib\n\ndef by_name(): return importlib.import_module('ucdm.data.images')",
])
def test_import_of_a_later_wing(root, code):
    "However it is written; what the later wing imports of this one is fine."
    room(root, "core.device", code, number="02")
    assert problems(root) == ["ucdm.core.device imports ucdm.data.images, of a later wing"]


def test_import_circle(root):
    room(root, "core.device", "def late():\n    from .batching import portions", number="02")
    room(root, "core.batching", "from .device import late\nportions = 2", number="03")
    assert problems(root) == ["import circle: ucdm.core.batching -> ucdm.core.device -> ucdm.core.batching"]


@pytest.mark.parametrize("place, cells, complaint", [
    ("stray.ipynb", ["x = 1"], "lies outside every wing"),
    ("garden/01_rose.ipynb", ["x = 1"], "lies outside every wing"),
    ("data/deep/01_rose.ipynb", ["x = 1"], "lies outside every wing"),
    ("experiments/01_rose.ipynb", ["x = 1"], "lies outside every wing"),
    ("data/rose.ipynb", ["x = 1"], "has no number"),
    ("data/02_rose.ipynb", ["#| default_exp data.tulip"], "exports to data.tulip, not to data.rose"),
    ("data/02_rose.ipynb", ["#| default_exp core.rose"], "exports to core.rose, not to data.rose"),
    ("data/02_rose.ipynb", ["#| default_exp data.rose", "#| export core.files\nx = 1"], "exports to core.files"),
    ("data/02_rose.ipynb", ["#| export\nx = 1"], "names no module"),
    ("experiments/paper/table_02.ipynb", ["#| default_exp data.table_02"], "exports, which only"),
    ("findings.ipynb", ["#| export\nx = 1"], "exports, which only"),
])
def test_notebook_out_of_place(root, place, cells, complaint):
    notebook(root / "nbs" / place, *cells)
    found, = problems(root)
    assert found.startswith(f"nbs/{place}: ") and complaint in found


@pytest.mark.parametrize("cell, name", [
    ("md:See `ucdm.data.gone`.", "ucdm.data.gone"),
    ("md:See `ucdm.data.images.Gone`.", "ucdm.data.images.Gone"),
    ("md:See `ucdm.data.images.Images.gone`.", "ucdm.data.images.Images.gone"),
    ("md:```sh\npython -m ucdm.gone 3\n```", "ucdm.gone"),
    ("md:[there](../core/02_gone.ipynb)", "../core/02_gone.ipynb"),
    ("md:![plot](../../outputs/gone.png)", "../../outputs/gone.png"),
    ("md:`80_runs` says more.", "80_runs"),
    ('x = "ucdm.data.images:Gone"', "ucdm.data.images:Gone"),
    ('x = mock.patch("ucdm.core.files.gone")', "ucdm.core.files.gone"),
    ('x = f"{y} ucdm.core.gone"', "ucdm.core.gone"),
    ('x = {"data.images.gone": 1}', "data.images.gone"),
    ("x = 1 # as in ucdm.core.gone", "ucdm.core.gone"),
    ('x = "81_report"', "81_report"),
    ('x = "../core/gone.ipynb"', "../core/gone.ipynb"),
])
def test_name_that_does_not_exist(root, cell, name):
    notebook(root / "nbs" / "data" / "02_rose.ipynb", cell)
    assert f"nbs/data/02_rose.ipynb: there is no {name}" in problems(root)


@pytest.mark.parametrize("cell", [
    "md:`ucdm.data.images.Images.n`, `ucdm.__version__`, [web](https://example.org/ucdm.git), `ucdm.data.images`.",
    "md:[part](#part), [files](../core/01_files.ipynb#part), `[not](a_link.ipynb)`, 01_files, github.com/x/ucdm.git",
    'x = "ucdm.core.files.save", "ucdm.core.files:save", "core.files.save", "../core/01_files.ipynb", "data.parquet"',
    "ucdm = model; ucdm.predict(images) # an object of that name",
])
def test_names_that_exist(root, cell):
    notebook(root / "nbs" / "data" / "02_rose.ipynb", cell)
    assert problems(root) == []


@pytest.mark.parametrize("code", [
    "from .files import gone",
    "from ucdm.core import gone",
    "import ucdm.core.gone",
    "def late():\n    from ..gone import x",
])
def test_import_of_what_is_not_there(root, code):
    room(root, "core.device", code, number="02")
    found, = problems(root)
    assert found.startswith("ucdm/core/device.py: there is no ucdm.") and found.endswith(" to import")


def test_import_of_what_is_not_there_in_a_demonstration_or_test(root):
    notebook(root / "nbs" / "data" / "02_rose.ipynb", "from ucdm.core.files import save, gone")
    (root / "tests").mkdir()
    (root / "tests" / "test_x.py").write_text("from ucdm.gone import x", encoding="utf-8")
    assert problems(root) == ["nbs/data/02_rose.ipynb: there is no ucdm.core.files.gone to import",
                              "tests/test_x.py: there is no ucdm.gone.x to import"]


def test_patched_method(root):
    "A method that `@patch` adds in another module belongs to the class."
    code = "from fastcore.basics import patch\nfrom .images import Images\n\n@patch\ndef flip(self: Images): ..."
    room(root, "data.more", code, "md:`ucdm.data.images.Images.flip`", number="02")
    assert problems(root) == []


@pytest.mark.parametrize("file, text, name", [
    ("README.md", "`python -m ucdm.gone`", "ucdm.gone"),
    ("CONTRIBUTING.md", "[licence](LICENSE)", "LICENSE"),
    ("ucdm/assets/card.md", "made by `ucdm.data.gone`", "ucdm.data.gone"),
    ("Makefile", "bench:\n\tpython -m ucdm.gone", "ucdm.gone"),
    ("settings.ini", "console_scripts = x=ucdm.data.images:gone", "ucdm.data.images:gone"),
    (".github/workflows/test.yml", "run: python -m ucdm.gone", "ucdm.gone"),
    ("tests/test_x.py", "import ucdm\nmock.patch('ucdm.core.files.gone')", "ucdm.core.files.gone"),
    ("nbs/sidebar.yml", "contents: [gone/*.ipynb]", "gone/*.ipynb"),
    ("nbs/_quarto.yml", "href: data/gone.ipynb", "data/gone.ipynb"),
    ("nbs/experiments/profiles/quick.yml", "notebooks: {table_09: {seconds: 1}}", "experiment table_09"),
    ("nbs/experiments/profiles/quick.yml", "notebooks: {table_01: {parameters: {sise: 4}}}",
     "parameter sise of table_01"),
])
def test_name_in_another_file(root, file, text, name):
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(text, encoding="utf-8")
    assert problems(root) == [f"{file}: there is no {name}"]


def test_command(root):
    "It prints the figures, and its exit status tells."
    command = [sys.executable, Path(house.__file__), root]
    fine = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert fine.returncode == 0 and "exported cells, median lines" in fine.stdout and "\n0 problems" in fine.stdout
    (root / "README.md").write_text("ucdm.gone", encoding="utf-8")
    bad = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert bad.returncode == 1 and "README.md: there is no ucdm.gone\n1 problems" in bad.stdout


def test_defined_twice(root):
    "A second definition of a name is found; methods of two classes that are called alike are not."
    patches = "class A: ...\nclass B: ...\n@patch\ndef save(self: A): ...\n@patch\ndef save(self: B): ..."
    room(root, "core.classes", patches, number="02")
    assert not any("twice" in problem for problem in problems(root))
    room(root, "core.classes", "def save(): ...\n\n\ndef save(): ...", number="02")
    assert "ucdm.core.classes defines save twice" in problems(root)


@pytest.mark.parametrize("call", [
    "path.read_text()", "path.write_text('x')", "path.write_text(data='x')", "open(path)", "open(path, 'w')",
    "open(path, mode='a+')", "path.open()", "path.open('w')", "open(path, 'rb' if raw else 'r')",
])
def test_text_without_encoding(root, call):
    "In a notebook and in a test; with the encoding named, nothing is said."
    fine = "open(path, 'rb'), path.open('wb'), store.open(ids), Image.open(file), gzip.open(file), os.open(log, flags)"
    named = f"{call[:-1]}, encoding='utf-8')".replace("(, ", "(")
    notebook(root / "nbs" / "data" / "02_rose.ipynb", fine, named)
    assert problems(root) == []
    notebook(root / "nbs" / "data" / "02_rose.ipynb", call)
    (root / "tests").mkdir()
    (root / "tests" / "test_x.py").write_text(call, encoding="utf-8")
    found = problems(root)
    assert len(found) == 2 and all(f".{end}: name the encoding: " in line for end, line in zip(("ipynb", "py"), found))


def test_requirements_are_what_is_imported(root):
    "By users: modules and experiments; by developers: the wing dev, demonstrations, tests. Names differ from modules'."
    room(root, "core.device", "import torch, PIL.Image\nfrom .files import save\nimport os", "import pandas", number="02")
    room(root, "dev.bench", "def run():\n    import yaml")
    notebook(root / "nbs" / "experiments" / "paper" / "table_02.ipynb", "size = 3  # how many", tags=["parameters"])
    (root / "tests").mkdir()
    (root / "tests" / "helpers.py").touch()
    (root / "tests" / "test_x.py").write_text("import helpers, pytest", encoding="utf-8")

    def said(users, developers):
        text = f"[DEFAULT]\nrequirements = {users}\ndev_requirements = {developers}\n"
        (root / "settings.ini").write_text(text, encoding="utf-8")
        return problems(root)
    assert said("torch>=2 Pillow", "pandas pyyaml pytest pytest-xdist") == []
    assert said("torch>=2", "pandas pyyaml pytest") == [
        "ucdm/core/device.py: PIL is not among the requirements of settings.ini",
        "nbs/core/02_device.ipynb: PIL is not among the dev_requirements of settings.ini"]
    assert said("torch pillow", "pyyaml pytest") == [
        "nbs/core/02_device.ipynb: pandas is not among the dev_requirements of settings.ini"]
    assert said("torch pillow pandas", "pyyaml pytest xlrd") == [
        "settings.ini: nothing imports pandas, one of the requirements",
        "settings.ini: nothing imports xlrd, one of the dev_requirements"]
