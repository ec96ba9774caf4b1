"""A one-step model as a run's generator: its name, its address, what is refused, and what stays as it was."""
import shutil
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from fastcore.test import test_eq as same, test_ne as differ
from typer.testing import CliRunner

from ucdm.core.source import reached
from ucdm.data.datasets import load_dataset
from ucdm.data.images import ImageSet
from ucdm.lsdm.generator import Generator, NULL
from ucdm.lsdm.latent_space import fit_pca
from ucdm.lsdm.one_step import OneStepModel
from ucdm.lsdm.one_step_prior import OneStepPrior
from ucdm.method.generate import generate_pairs, MAKES_PAIRS
from ucdm.method.pair_store import PairStore
from ucdm.method.pairs import PairConfig
from ucdm.runs.identity import prior_identity, resolve, spec_hash
from ucdm.runs.pools import fill_pools, pair_set, pool_folders, run_data, run_prior
from ucdm.runs.run import run
from ucdm.runs.spec import RunSpec

ONE_STEP = {"preset": "one_step"}
SMALL = dict(n_seeds=8, n_test=6, pairs=ONE_STEP, train=dict(rounds=1, epochs_per_round=1, depth=10, width=1))


@cache
def latent_space():
    train = load_dataset("fashion-mnist", "train")
    return fit_pca(train.images[:40], 4, 0), train.classes


def model(classes=None, seed=0, data="others"):
    "An untrained model of 4 numbers; what it draws does not matter here."
    torch.manual_seed(seed)
    space, names = latent_space()
    classes = names if classes is None else classes
    net = Generator(torch.ones(4), len(classes), 0, 8, 1, 4)
    return OneStepModel(space, net, classes, dict(data=data, paired=40, unpaired=0, config={}, steps=1, seconds=1.0,
                                                  checks=dict(spread=1.0)))


@pytest.fixture
def folder(tmp_path): return model().save(tmp_path / "model")


def spec_of(folder, options="", **changes): return RunSpec(prior=f"lsdm:{folder}{options}", **SMALL | changes)


def test_what_diffusion_models_made_keeps_its_address():
    same(len(prior_identity("fashion-mnist")), 16)
    for roots in (MAKES_PAIRS, {("ucdm.runs.pools", "fill_locally"), ("ucdm.runs.pools", "read_pairs")}):
        assert not any(m.startswith(("ucdm.lsdm", "ucdm.runs.registry", "ucdm.runs.identity")) for m, _ in reached(roots))


def test_address_is_the_content(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    same(spec_hash(spec_of(folder)), spec_hash(spec_of(copy)))
    same(len(prior_identity(f"lsdm:{folder}").removeprefix("lsdm:")), 64)
    (copy / "README.md").write_text("a card decides nothing", encoding="utf-8")
    same(spec_hash(spec_of(folder)), spec_hash(spec_of(copy)))
    other = model(seed=1).save(tmp_path / "other")
    addresses = [spec_hash(spec_of(f, o)) for f in (folder, other) for o in ("", "?negative=other")]
    same(len(set(addresses)), 4)
    same(spec_hash(spec_of(folder)), spec_hash(spec_of(folder, "?negative=null")))


def test_pools_follow_the_content(folder, tmp_path):
    cache = tmp_path / "cache"
    pools = {}
    for options in ("", "?negative=other"):
        r = resolve(spec_of(folder, options))
        pools[options] = pool_folders(r, run_data(r), cache)
        stores = fill_pools(r, run_data(r), cache)
        same([len(PairStore(f).held(run_data(r).split.seed_index.tolist())) for f in pools[options].values()], [8, 8])
        same(set(stores), {"positive", "negative"})
    same(len({f for of in pools.values() for f in of.values()}), 4)


def test_pairs_do_not_depend_on_the_batch(folder):
    prior, train = run_prior(spec_of(folder, "?negative=other")), load_dataset("fashion-mnist", "train")
    same(prior.negative, "other")
    config, names = PairConfig.preset("one_step"), ("bag", "coat")
    make = lambda n, size: generate_pairs(prior, train[:n].unlabelled(), names, config, ids=range(n), batch_size=size,
                                          progress=False)
    whole, alone = make(6, 5), make(2, 1)
    for kind in ("positives", "negatives"):
        assert (getattr(whole, kind)[:2].int() - getattr(alone, kind).int()).abs().max() <= 1


def test_negatives_of_another_class(monkeypatch):
    drawn = []
    class Told(torch.nn.Module):
        d_noise = 4
        def forward(self, labels, noise):
            drawn.append(labels)
            return noise
    m = model(("bag", "coat", "shirt"))
    seeds = ImageSet(torch.zeros(40, 3, 32, 32, dtype=torch.uint8), torch.full((40,), -1), ("bag", "coat"), "seeds")
    priors = {kind: OneStepPrior(m, device="cpu", negative=kind) for kind in ("null", "other")}
    monkeypatch.setattr(m, "net", Told())
    def negatives(kind): # labels of all negatives, pair by pair
        drawn.clear()
        generate_pairs(priors[kind], seeds, ("bag", "coat"), PairConfig.preset("one_step"), ids=range(40), batch_size=80,
                       progress=False)
        return drawn[-1].chunk(3)[2]
    own = torch.tensor([0, 1] * 40)
    assert (negatives("null") == NULL).all()
    others = negatives("other")
    assert (others >= 0).all() and not (others == own).any() and len(others.unique()) == 3


def test_a_run(folder, tmp_path):
    result = run(spec_of(folder), tmp_path, progress=False)
    same(result.provenance["prior"], prior_identity(f"lsdm:{folder}"))
    same(run(spec_of(folder), tmp_path, progress=False).hash, result.hash)


@pytest.mark.parametrize("changes, why", [
    (dict(pairs={}), "steps=20.*eta_negative=0.2.*give the preset one_step"),
    (dict(pairs=ONE_STEP | {"eta_positive": 0.5}), "settings of pairs: eta_positive=0.5 makes no sense"),
    (dict(pairs=ONE_STEP | {"inversion": "ode"}), "inversion='ode' makes no sense"),
    (dict(pairs=ONE_STEP | {"positive_from": "seed"}), "positive_from='seed' makes no sense"),
    (dict(dataset="cifar10"), "unknown class 'airplane'"),
    (dict(method="diffusion_classifier", train={}), "needs a diffusion model"),
])
def test_refused_at_the_door(folder, changes, why):
    with pytest.raises(ValueError, match=why): resolve(spec_of(folder, **changes))


@pytest.mark.parametrize("name, error, why", [
    ("lsdm:", ValueError, "names no folder"),
    ("lsdm:nowhere", FileNotFoundError, "RunSpec prior 'lsdm:nowhere': nowhere holds no one-step model"),
    ("lsdm:{}/latent_space", ValueError, "holds no one-step model, its format is"),
    ("lsdm:{}?negative=none", ValueError, "negative must be 'null' or 'other'"),
    ("lsdm:{}?negatives=other", ValueError, "did you mean 'negative'"),
    ("lsmd:{}", ValueError, "did you mean 'lsdm'"),
])
def test_refused_names(folder, name, error, why):
    with pytest.raises(error, match=why): resolve(RunSpec(prior=name.format(folder), **SMALL))


def test_a_model_of_the_seed_images_is_refused(tmp_path):
    folder = model(data="fashion-mnist").save(tmp_path / "model")
    with pytest.raises(ValueError, match="has learnt from fashion-mnist's training images"): spec_hash(spec_of(folder))
    spec_hash(RunSpec()) # the packaged diffusion model has not


def test_a_damaged_model_is_refused(folder):
    held = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(held.replace("shirt", "skirt", 1), encoding="utf-8")
    with pytest.raises(ValueError, match="RunSpec prior .*Save or copy the model again"): resolve(spec_of(folder))


def test_located_from_any_folder(folder, monkeypatch):
    from ucdm.runs.ray_engine import located
    monkeypatch.chdir(folder.parent)
    relative = spec_of(folder.name, "?negative=other")
    there = located(relative)
    same(there.prior, f"lsdm:{folder.resolve()}?negative=other")
    same(spec_hash(there), spec_hash(relative))
    differ(there, relative)


def test_planning_does_not_count_its_evaluations_as_those_of_a_unet(folder):
    from ucdm.batch.planning import _generation
    plan = SimpleNamespace(priors=[f"lsdm:{folder}"], evaluations=100)
    assert "is no diffusion model" in _generation(plan, None)[0]


def test_the_command_makes_pairs(folder, tmp_path):
    from ucdm.app.cli import app
    words = f"pairs fashion-mnist bag coat --first 3 --prior lsdm:{folder} --store {tmp_path / 'pairs'}"
    refused = CliRunner().invoke(app, words.split())
    assert refused.exit_code == 2 and not (tmp_path / "pairs").exists()
    done = CliRunner().invoke(app, [*words.split(), "--preset", "one_step"])
    assert done.exit_code == 0, done.output
    assert len(PairStore(tmp_path / "pairs" / "positive").index()) > 0
