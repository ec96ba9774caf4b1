"""Inputs that cannot be: each is refused before anything is computed, in one line that names the input and the remedy;
commands end with status 2 and write nothing.
"""
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import nbformat
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from ucdm.baselines.diffusion_classifier import DiffusionClassifierConfig
from ucdm.baselines.oracles import OracleConfig
from ucdm.batch.cli import app as reproduce
from ucdm.batch.kernels import socket_folder
from ucdm.batch.profiles import find_experiments, load_profile, plan, with_values
from ucdm.data.class_names import check_class_names
from ucdm.data.folder import load_unlabelled
from ucdm.diffusion.prior import load_prior
from ucdm.diffusion.prior_pipeline import MiniPriorConfig
from ucdm.method.generate import app as generate, generate_pairs
from ucdm.method.pair_store import PairStore
from ucdm.method.pairs import PairConfig
from ucdm.method.train_config import TrainConfig
from ucdm.runs.identity import resolve, spec_hash
from ucdm.runs.pools import fill_locally, pair_set
from ucdm.runs.registry import get_method, METHODS
from ucdm.runs.result import read_result
from ucdm.runs.spec import grid, RunSpec

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("make, field, complaint", [
    (lambda: TrainConfig(depth=11), "TrainConfig.depth", "6n + 4 with n >= 1 (10, 16, 22, 28, ...), got 11"),
    (lambda: TrainConfig(width=0), "TrainConfig.width", "greater than or equal to 1, got 0"),
    (lambda: TrainConfig(seed=-1), "TrainConfig.seed", "greater than or equal to 0, got -1"),
    (lambda: OracleConfig(depth=11), "OracleConfig.depth", "6n + 4"),
    (lambda: PairConfig(steps=0), "PairConfig.steps", "greater than or equal to 1, got 0"),
    (lambda: PairConfig(steps=-3), "PairConfig.steps", "greater than or equal to 1, got -3"),
    (lambda: PairConfig(seed=-1), "PairConfig.seed", "greater than or equal to 0, got -1"),
    (lambda: PairConfig(guidance=INF), "PairConfig.guidance", "a finite number, got inf"),
    (lambda: PairConfig(inversion_guidance=NAN), "PairConfig.inversion_guidance", "a finite number, got nan"),
    (lambda: PairConfig(template="A {x} of {}"), "PairConfig.template", "contain {} once"),
    (lambda: PairConfig(template=["A {}", "A {0}"]), "PairConfig.template", "contain {} once"),
    (lambda: DiffusionClassifierConfig(template="A {x} of {}"), "DiffusionClassifierConfig.template", "contain {} once"),
    (lambda: DiffusionClassifierConfig(seed=-1), "DiffusionClassifierConfig.seed", "greater than or equal to 0"),
    (lambda: MiniPriorConfig(steps=0), "MiniPriorConfig.steps", "greater than or equal to 1, got 0"),
    (lambda: MiniPriorConfig(seed=-1), "MiniPriorConfig.seed", "greater than or equal to 0, got -1"),
    (lambda: MiniPriorConfig(lr=INF), "MiniPriorConfig.lr", "a finite number, got inf"),
    (lambda: MiniPriorConfig(templates=("A {x} of {}",)), "MiniPriorConfig.templates", "contain {} once"),
    (lambda: RunSpec(seed=-1), "RunSpec.seed", "greater than or equal to 0, got -1"),
    (lambda: RunSpec(split_seed=-1), "RunSpec.split_seed", "greater than or equal to 0, got -1"),
    (lambda: RunSpec(pairs=dict(prompts={"bga": ["A bag"]})), "prompts", "did you mean 'bag'?"),
    (lambda: spec_hash(RunSpec(train=dict(depth=11))), "depth", "6n + 4"),
    (lambda: spec_hash(RunSpec(pairs=dict(steps=-3))), "steps", "greater than or equal to 1, got -3"),
])
def test_setting_that_cannot_be(make, field, complaint):
    with pytest.raises(ValueError) as refused: make()
    assert field in str(refused.value) and complaint in str(refused.value) and "\n" not in str(refused.value)


def test_every_method_at_the_door():
    "Depth 11 and negative random seeds are refused by whatever configuration has them."
    spec_hash(RunSpec(method="fixmatch")) # registers all
    found = {name: get_method(name).config_type for name in METHODS}
    for name, config in found.items():
        if config is None: continue
        for bad in (dict(depth=11), dict(seed=-1), dict(batch_size=0)):
            if {*bad} <= set(config.__dataclass_fields__):
                with pytest.raises(ValueError, match=f"{config.__name__}.{next(iter(bad))} must be"): config(**bad)
    assert sum(c is not None for c in found.values()) > 10


@pytest.fixture(scope="module")
def prior(): return load_prior("fashion-mnist")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "A folder with three images."
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3): Image.new("RGB", (32, 32), (80 * i, 0, 0)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("names, complaint", [
    (("", "bag"), "must not be empty, got ''"),
    (("  ",), "must not be empty, got '  '"),
    (("bag", "bag"), "must be a list of names that differ, got 'bag' twice"),
    (("bag", " bag "), "must be a list of names that differ, got 'bag' twice"),
    ("bag", "must be a list of one or more different names, got 'bag'"),
    ((), "must be a list of one or more different names"),
    (("caf\udce9",), "set PYTHONUTF8=1"),
])
def test_class_names_that_cannot_be(prior, photos, names, complaint):
    "The same check stands at every door."
    seeds = load_unlabelled(photos, ("bag",))
    for door in (check_class_names, lambda n: load_unlabelled(photos, n), lambda n: generate_pairs(prior, seeds, n)):
        with pytest.raises(ValueError) as refused: door(names)
        assert complaint in str(refused.value) and "\n" not in str(refused.value)


def test_class_names_that_deserve_a_word(prior, photos):
    "Blanks around a name go; names that differ in capital letters, or that a small generator cannot read, are warned of."
    assert check_class_names([" ankle boot"]) == load_unlabelled(photos, [" ankle boot"]).classes == ("ankle boot",)
    with pytest.warns(UserWarning, match="'Bag' and 'bag' differ only in capital letters"):
        check_class_names(["Bag", "bag"])
    few, quick = load_unlabelled(photos, ("bag",)), PairConfig(steps=1)
    with pytest.warns(UserWarning, match="no word for 'rabbit' and spells it 'r a b b i t'.*T-shirt, trouser"):
        made = generate_pairs(prior, few, [" rabbit "], quick, progress=False)
    assert made.classes == ("rabbit",)


@pytest.mark.parametrize("config, complaint", [
    (dict(steps=7), "steps=7 must divide"),
    (dict(prompts={"bga": ["A bag"]}), "unknown class name 'bga': did you mean 'bag'?"),
    (dict(template=["A {}", "very " * 20 + "{}"]), "shorten it"),
])
def test_settings_that_do_not_fit_the_generator(prior, photos, tmp_path, config, complaint):
    "Whatever image and class would meet it, and however late."
    with pytest.raises(ValueError) as refused:
        generate_pairs(prior, load_unlabelled(photos, ["bag"]), ["bag"], PairConfig(**config), tmp_path / "store")
    assert complaint in str(refused.value) and not (tmp_path / "store").exists()


def test_run_that_does_not_fit_its_generator(tmp_path):
    "Nothing is begun in the pools; a generator that has no words for the data set's classes is said to have none."
    spec = RunSpec(n_seeds=2, n_test=2, pairs=dict(steps=7))
    with pytest.raises(ValueError, match="steps=7 must divide"): pair_set(spec, tmp_path)
    assert not list(tmp_path.rglob("spec.json"))
    r, names = resolve(RunSpec(prior="cifar10", pairs=dict(steps=1))), SimpleNamespace(known_names=("rabbit",))
    filled = mock.patch("ucdm.runs.pools.fill_with")
    with filled, pytest.warns(UserWarning, match="no word for 'rabbit'.*airplane"):
        fill_locally(r, SimpleNamespace(split=names), {})


def refused(app, *command):
    "What a command says when it is refused, after usage and hints."
    done = CliRunner().invoke(app, list(map(str, command)))
    assert done.exit_code == 2, (done.output, done.exception)
    said = [line for line in done.output.splitlines() if line.strip() and not line.startswith(("Usage:", "Try "))]
    assert "Traceback" not in done.output
    return said


@pytest.mark.parametrize("options, complaint", [
    (["bag", "bag"], "classes must be a list of names that differ, got 'bag' twice; give each once"),
    (["bag", ""], "class names must not be empty, got ''; leave it out"),
    (["bag", "--first", "9000"], "--first 9000: PHOTOS holds only 3 images; ask for no more"),
    (["bag", "--first", "10"], "--first 10: PHOTOS holds only 3 images; ask for no more"),
    (["bag", "--first", "-3"], "--first must be greater than or equal to 1, got -3"),
    (["bag", "--first", "-1"], "--first must be greater than or equal to 1, got -1"),
    (["bag", "--first", "0"], "--first must be greater than or equal to 1, got 0"),
    (["bag", "--steps", "0"], "--steps must be greater than or equal to 1, got 0"),
    (["bag", "--steps", "-3"], "--steps must be greater than or equal to 1, got -3"),
    (["bag", "--steps", "7"], "steps=7 must divide the 1000 train steps"),
    (["bag", "--size", "0"], "--size must be greater than or equal to 1, got 0"),
    (["bag", "--batch-size", "0"], "--batch-size must be greater than or equal to 1, got 0"),
    (["bag", "--preset", "papre"], "unknown preset 'papre': did you mean 'paper'?"),
    (["bag", "--prior", "fashion"], "no prior 'fashion': it is not a packaged prior (cifar10, fashion-mnist)"),
])
def test_generate_refuses(photos, tmp_path, options, complaint):
    line, = refused(generate, photos, *options, "--store", tmp_path / "store")
    assert complaint.replace("PHOTOS", str(photos)) in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["my_photos", "no/such/folder", "fashion-mnits"])
def test_generate_without_images(tmp_path, missing):
    line, = refused(generate, missing, "bag", "--store", tmp_path / "store")
    assert f"there is no folder {missing}" in line and "fashion-mnist" in line and not list(tmp_path.iterdir())


def test_generate_into_a_store_that_is_held(photos, tmp_path):
    "Another process writes to it: one line, and what is there stays as it is."
    command = photos, "bag", "--steps", 1, "--store", tmp_path, "--batch-size", 2
    with mock.patch("ucdm.method.generate.fill_stores"): # the stores are begun
        assert CliRunner().invoke(generate, list(map(str, command))).exit_code == 0
    files = lambda: {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file() and f.name != ".lock"}
    before = files()
    with PairStore(tmp_path / "positive").lock(): line = refused(generate, *command)[-1]
    assert "another process" in line and str(tmp_path / "positive") in line and files() == before


@pytest.fixture
def project(tmp_path):
    "A folder of tiny experiments, and the options that name it."
    home = tmp_path / "nbs" / "experiments"
    (home / "profiles").mkdir(parents=True)
    def fill(profile=None, **bodies):
        for name, body in bodies.items():
            nb = nbformat.v4.new_notebook(cells=[
                nbformat.v4.new_markdown_cell("# Café · a title\n\n> It runs."),
                nbformat.v4.new_code_cell("from ucdm.core.files import atomic_json\nfrom ucdm.runs.result import mark_done"),
                nbformat.v4.new_code_cell('lr = 0.1  # rate\nout = "."  # results', metadata={"tags": ["parameters"]}),
                nbformat.v4.new_code_cell(body),
                nbformat.v4.new_code_cell(
                    f'atomic_json(f"{{out}}/results/{name}.json", dict(verdict="holds · é"))\nmark_done(out, {name!r})'
                ),
            ])
            nbformat.write(nb, home / f"{name}.ipynb")
        (home / "profiles" / "quick.yml").write_text(profile or yaml.safe_dump({}), encoding="utf-8")
        return ["--notebooks", home, "--out", tmp_path / "results"]
    return fill


@pytest.mark.parametrize("profile, options, complaint", [
    ("", ["--set", "out=elsewhere"], "--set out=elsewhere: where results go is said once for all; write --out elsewhere"),
    ("", ["--set", "lr=fast"], "lr='fast' must be a number"),
    ("", ["--set", "lr=.nan"], "lr=nan must be a number"),
    ("", ["--set", "lr=.inf"], "lr=inf must be a number"),
    ("", ["--set", "lr"], "write it as NAME=VALUE"),
    ("", ["--set", "rl=1e-3"], "unknown parameter 'rl'"),
    ("all: {out: elsewhere}", [], "out is where results go; leave it out and give --out FOLDER"),
    ("notebooks: {a: {parameters: {out: elsewhere}}}", [], "leave it out and give --out FOLDER"),
    ("limit_minutes: .inf", [], "limit_minutes=inf must be a number"),
    ("notebooks: {a: {seconds: -1}}", [], "seconds and limit_minutes must be above 0"),
    ("", ["--profile", "quik"], "unknown profile 'quik': did you mean 'quick'?"),
    ("", ["--engine", "rya"], "unknown engine 'rya'"),
])
def test_reproduce_refuses(project, tmp_path, profile, options, complaint):
    "The line may come after one that says what the others are about."
    said = refused(reproduce, *project(profile, a="lr"), *options)
    assert len(said) <= 2 and complaint in said[-1] and not (tmp_path / "results").exists()


@pytest.mark.parametrize("text, value", [
    ("1e-3", 1e-3), ("1E5", 1e5), ("1.5e-3", 1.5e-3), (".5", 0.5), ("-2", -2), ("2.", 2.0),
])
def test_numbers_are_numbers(project, text, value):
    "`1e-3` is one, too, on the command line and in a profile."
    home = project("notebooks: {a: {parameters: {lr: %s}}}" % text, a="lr", b="lr")[1]
    experiments, profile = find_experiments(home), load_profile("quick", home / "profiles")
    jobs = plan(experiments, with_values(profile, {"b": experiments["b"]}, [f"lr={text}"]), "out")
    assert [j.parameters["lr"] for j in jobs] == [value, value]


@pytest.fixture
def stack():
    with ExitStack() as entered: yield entered


@pytest.mark.parametrize("trouble", ["log", "tmpdir", "ascii"])
def test_reproduce_anywhere(project, tmp_path, stack, trouble):
    """A log and an error that are not UTF-8, a folder for temporary files whose name has 118 characters, a terminal that knows only
    ASCII: the notebooks run, and the summary is written.
    """
    body = "from ucdm.core.progress import say\nsay('· é')\nprint('é')\nimport os; os.write(1, b'\\xe9\\n')"
    options = project(a=body + "; raise OSError(os.fsdecode(b'caf\\xe9.png'))" if trouble == "log" else body, b=body)
    more = {}
    if trouble == "tmpdir":
        long = stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp"))
        more = dict(TMPDIR=f"{long}/{'x' * (117 - len(long))}")
        Path(more["TMPDIR"]).mkdir()
    if trouble == "ascii": more = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    done = subprocess.run([sys.executable, "-m", "ucdm.batch.cli", *map(str, options)], env=os.environ | more,
                          capture_output=True, timeout=300)
    said = done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
    assert done.returncode == (trouble == "log"), said
    assert "Traceback (most recent call last)" not in done.stderr.decode(errors="replace"), said
    assert "their common start failed" not in said and "b  done" in said, said
    page = (tmp_path / "results" / "index.html").read_text(encoding="utf-8")
    assert "Café · a title" in page
    assert b"\xe9\n" in (tmp_path / "results" / "logs" / "b.log").read_bytes()


def test_no_folder_for_sockets(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 117)
    with pytest.raises(ValueError, match=r"too long for sockets \(118 bytes, at most \d+\); set TMPDIR"): socket_folder(())


def test_specifications_that_are_equal():
    "They have one hash, in the dictionary and on disk."
    texts = lambda kind: dict(template=kind(["A photo of a {}", "A {}"]))
    for one, other in (
        (RunSpec(mismatch=-0.0), RunSpec(mismatch=0.0)),
        (RunSpec(pairs=dict(eta_negative=-0.0)), RunSpec(pairs=dict(eta_negative=0.0))),
        (RunSpec(train=dict(delta=-0.0)), RunSpec(train=dict(delta=0.0))),
        (RunSpec(pairs=texts(list)), RunSpec(pairs=texts(tuple))),
    ):
        assert one == other and hash(one) == hash(other) and spec_hash(one) == spec_hash(other)
        assert repr(one) == repr(other)


def test_specification_is_its_own():
    "Changing what was passed changes nothing."
    given = dict(prompts={"bag": ["A photo of a bag"]})
    spec = RunSpec(pairs=given)
    before, text = spec_hash(spec), repr(spec)
    given["prompts"]["bag"].append("A photo of a handbag")
    given["steps"] = 3
    assert (spec_hash(spec), repr(spec)) == (before, text)
    config = PairConfig(prompts=(prompts := {"bag": ["A photo of a bag"]}))
    prompts["bag"].append("A photo of a handbag")
    assert config.prompts == {"bag": ["A photo of a bag"]}


@pytest.mark.parametrize("axes, kind, complaint", [
    (dict(method="ucdm"), TypeError, "method must be a list of values, got 'ucdm'; write method=['ucdm']"),
    (dict(seed=3), TypeError, "seed must be a list of values, got 3; write seed=[3]"),
    (dict(seeds=[3]), ValueError, "did you mean 'seed'?"),
])
def test_grid_wants_lists(axes, kind, complaint):
    with pytest.raises(kind) as refused: grid(RunSpec(), **axes)
    assert complaint in str(refused.value)


@pytest.mark.parametrize("make", [
    lambda: PairConfig(prompts={"bag": "A photo of a bag"}),
    lambda: spec_hash(RunSpec(pairs=dict(prompts={"bag": "A photo of a bag"}))),
    lambda: MiniPriorConfig(unet_channels="64"),
])
def test_string_for_a_list(make):
    with pytest.raises(TypeError, match="must be a valid (list|tuple)"): make()


def test_committed_addresses():
    "Results that are there are found under the names they have."
    committed = Path(__file__).parent.parent / "outputs" / "committed" / "standard" / "results" / "runs"
    files = sorted(committed.glob("*.json"))[:20]
    found = {f.stem: spec_hash(read_result(f).spec) for f in files}
    assert sum(name == now for name, now in found.items()) >= len(found) - 6
