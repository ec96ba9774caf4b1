"Pairs and results are known by everything that decides them."
import ast
import functools
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from ucdm.core import remembered, source
from ucdm.core.files import ASSETS
from ucdm.data.datasets import load_dataset
from ucdm.diffusion.prior import load_prior
from ucdm.method.differences import REFERENCE
from ucdm.method.generate import generate_pairs
from ucdm.method.pairs import PairConfig
from ucdm.runs import identity, pools
from ucdm.runs.code import code_hash
from ucdm.runs.identity import prior_identity, resolve, spec_hash
from ucdm.runs.registry import METHODS, register_method
from ucdm.runs.result import read_result
from ucdm.runs.run import run
from ucdm.runs.spec import RunSpec

SPEC = RunSpec(n_seeds=8, n_test=24, pairs=dict(steps=2))


@pytest.fixture(autouse=True)
def own_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("UCDM_CACHE", str(tmp_path / "memory"))


@pytest.fixture
def other_code(monkeypatch):
    "Pretend that the source of a function is another one."
    def change(module, name, old, new):
        text = source.PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        assert text.count(old) >= 1
        texts = source._sources() | {module: text.replace(old, new)}
        monkeypatch.setattr(source, "_sources", lambda: texts)
        source._module.cache_clear(), source.source_hash.cache_clear()
    yield change
    source._module.cache_clear(), source.source_hash.cache_clear()


def folders(tmp_path):
    r = resolve(SPEC)
    return pools.pool_folders(r, pools.run_data(r), tmp_path)


def test_pairs_of_other_code(tmp_path, other_code, capsys):
    "After a change of the inversion, stored pairs are not used, and whoever needs new ones is told."
    pools.pair_set(SPEC, tmp_path)
    before = folders(tmp_path)
    other_code("ucdm.diffusion.schedule", "ddim_inverse_step", "def ddim_inverse_step(", "def ddim_inverse_step(changed, ")
    after = folders(tmp_path)
    assert set(before.values()).isdisjoint(after.values())
    pools.pair_set(SPEC, tmp_path)
    assert str(before["negative"]) in capsys.readouterr().out


def test_messages_and_comments_are_no_other_code(tmp_path, other_code):
    before = folders(tmp_path)
    other_code("ucdm.diffusion.prior", "Prior", "an inpainting, depth or upscaling model", "something else")
    assert folders(tmp_path) == before


def test_another_python_is_no_other_code(tmp_path, monkeypatch):
    "Functions have one field more from Python 3.12 on, empty: stored results and pairs stay good."
    before = folders(tmp_path), code_hash("ucdm")
    monkeypatch.setattr(ast.FunctionDef, "_fields", (*ast.FunctionDef._fields, "later"))
    monkeypatch.setattr(ast.FunctionDef, "later", None, raising=False)
    monkeypatch.setattr(ast.FunctionDef, "type_params", [], raising=False)
    if "type_params" not in ast.FunctionDef._fields:
        monkeypatch.setattr(ast.FunctionDef, "_fields", (*ast.FunctionDef._fields, "type_params"))
    monkeypatch.setattr(remembered, "_KNOWN", {})
    monkeypatch.setenv("UCDM_CACHE", str(tmp_path / "nothing remembered"))
    source._module.cache_clear(), source.source_hash.cache_clear()
    assert (folders(tmp_path), code_hash("ucdm")) == before


def test_hashes_of_code_are_remembered(monkeypatch, other_code):
    "Another process does not parse again what has not changed, and does what has."
    def another_process(): monkeypatch.setattr(remembered, "_KNOWN", {}), source.source_hash.cache_clear()
    another_process()
    before = code_hash("ucdm")
    another_process()
    with monkeypatch.context() as m:
        m.setattr(source, "_trees_hash", lambda *_: "parsed again")
        assert code_hash("ucdm") == before
        other_code("ucdm.method.losses", "pair_loss", "def pair_loss(", "def pair_loss(changed, ")
        assert code_hash("ucdm") == "parsed again"


def test_a_rule_decides_results(other_code):
    "What answers by a rule for `other` counts as code of the result."
    before = code_hash("fixmatch")
    other_code("ucdm.runs.mismatch", "by_rule", "def by_rule(", "def by_rule(changed, ")
    assert code_hash("fixmatch") != before


def test_store_of_other_code(tmp_path, other_code):
    "A folder of one's own is refused, with a reason."
    seeds, prior = load_dataset("fashion-mnist", "train")[torch.arange(3)], load_prior()
    make = lambda: generate_pairs(prior, seeds, ("bag",), PairConfig(steps=1), tmp_path / "mine", progress=False)
    make()
    other_code("ucdm.diffusion.schedule", "ddim_step", "def ddim_step(", "def ddim_step(changed, ")
    with pytest.raises(ValueError, match="differ in code"): make()


def test_whole_generator(tmp_path):
    "A byte deep inside a large file, the order of weights, and a file that changes meanwhile are noticed."
    folder = tmp_path / "prior"
    shutil.copytree(ASSETS / "priors" / "fashion-mnist", folder)
    first = prior_identity(str(folder))
    assert first == prior_identity("fashion-mnist")
    for byte in (b"a", b"b"): # in the middle of 66 MB
        (folder / "extra.bin").write_bytes(bytes(1 << 21) + byte + bytes(1 << 26))
        assert (now := prior_identity(str(folder))) != first
        first = now
    prior = load_prior()
    weight = next(p for p in prior.pipe.unet.parameters() if p.ndim == 4)
    turned = load_prior()
    turned.files = None
    with torch.no_grad(): next(p for p in turned.pipe.unet.parameters() if p.ndim == 4).copy_(weight.flip(-1))
    assert turned.fingerprint != prior.fingerprint # the sums are the same


def test_hub_commit(monkeypatch):
    "A hub id is what it means today."
    monkeypatch.setattr(identity, "hub_commit", lambda name: "0123")
    first = spec_hash(RunSpec(prior="owner/model"))
    monkeypatch.setattr(identity, "hub_commit", lambda name: "4567")
    assert spec_hash(RunSpec(prior="owner/model")) != first


def test_committed_results_keep_their_names(monkeypatch):
    "The results of this repository are found under their specifications; a generator that is not here is what its file says."
    files = sorted(Path(__file__).parent.parent.glob("outputs/committed/*/results/runs/*.json"))
    here, recorded = identity.prior_identity, {}
    for result in map(read_result, files):
        of = result.provenance["prior"] # None where the method asks no generator
        if of and not identity.is_packaged(result.spec.prior): recorded[result.spec.prior] = of
    monkeypatch.setattr(identity, "prior_identity", lambda name: recorded.get(name) or here(name))
    fits, learnt = identity.check_generator_kind, identity.training_record # ask for files of a one-step generator
    monkeypatch.setattr(identity, "check_generator_kind", lambda r: r.spec.prior in recorded or fits(r))
    monkeypatch.setattr(identity, "training_record", lambda name: {} if name in recorded else learnt(name))
    assert len(files) > 500 and [r.hash for r in map(read_result, files) if spec_hash(r.spec) != r.hash] == []


class Even:
    "Answers everything alike."
    def __init__(self, classes): self.K = len(classes)
    def predict(self, images): return tuple(torch.full((len(images), n), 1 / n) for n in (self.K, self.K + 1))


@pytest.fixture
def own_method():
    yield lambda fit: register_method("own")(fit)
    METHODS.pop("own", None)


OWN = RunSpec(method="own", n_seeds=8, n_test=24)


def test_edited_while_it_runs(tmp_path, own_method, other_code):
    "A result is stamped with the code that its run began with."
    def fit(task):
        other_code("ucdm.runs.mismatch", "by_rule", "def by_rule(", "def by_rule(changed, ")
        return Even(task.classes)
    own_method(fit)
    before = code_hash("own")
    assert run(OWN, tmp_path, progress=False).provenance["code"] == before != code_hash("own")


def test_whatever_can_be_called_is_a_method(tmp_path, own_method):
    "A partial function, a method of an object: the run is kept, and told from another one."
    def fit(task, rate): return Even(task.classes)
    class Trainer:
        def __init__(self, rate): self.rate = rate
        def fit(self, task): return Even(task.classes)
        def __call__(self, task): return Even(task.classes)
    codes = []
    for rate in (0.1, 0.5):
        for made in (functools.partial(fit, rate=rate), Trainer(rate).fit, Trainer(rate), lambda task: fit(task, rate)):
            own_method(made)
            codes.append(run(OWN, tmp_path, fresh=True, progress=False).provenance["code"])
    assert len({*codes[:4]} & {*codes[4:]}) == 0


def test_differences_that_came_later_leave_addresses_as_they_were():
    "At its default a later difference is not part of what a run is called; switched, it is."
    def parts(**differences): return resolve(RunSpec(differences=differences)).identity
    later = dict(flip_once=("config", "pairs"), flip_seed_images=("pairs",))
    for name, where in later.items():
        plain, switched = parts(), parts(**{name: True})
        assert not any(name in plain[part] for part in where)
        assert all(switched[part][name] is True for part in where)
    assert parts(sample_latents=True)["pairs"]["sample_latents"] is True


def test_the_released_code_is_all_of_it():
    "Every difference that the preset switches arrives in the settings of pairs or of the training."
    r = resolve(RunSpec(differences=asdict(REFERENCE)))
    arrived = asdict(r.config) | asdict(r.pairs)
    switched = {k: v for k, v in asdict(REFERENCE).items() if k != "test_batch_norm"}
    assert {"sample_latents", "flip_seed_images", "flip_once"} <= set(switched)
    assert {k: arrived[k] for k in switched} == switched
    assert arrived["label_batch_norm"] == "batch" and arrived["clean_level"] == "one"
