"""Stage 2 of the wing lsdm: losses on constructed inputs, kills and resumes, noise of items, collapses, files."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import kill_tree

from ucdm.core.randomness import generator
from ucdm.data.images import ImageSet
from ucdm.lsdm.generator import Generator, item_latents, NULL
from ucdm.lsdm.latent_diffusion import Denoiser, denoised, DiffusionConfig, item_denoised, train_denoiser
from ucdm.lsdm.latent_space import fit_pca
from ucdm.lsdm.matching import Batches, check_collapse, Checks, Collapsed, critic_loss, generator_loss, LOSSES
from ucdm.lsdm.one_step import fit_one_step, OneStepModel
from ucdm.lsdm.one_step_pairs import one_step_pairs
from ucdm.lsdm.one_step_prior import one_step_config, OneStepPrior
from ucdm.lsdm.train_generator import GeneratorConfig, train_generator
from ucdm.lsdm.training import StageTwoConfig
from ucdm.lsdm.transport import Critic, w1
from ucdm.method.generate import generate_pairs

SMALL = dict(width=24, blocks=1, batch=24, check_every=20, collapse_below=0.0)


def pairs(n=120, d=5, labels=3):
    "Clouds around one centre a label."
    x = torch.arange(n) % labels
    centres = 3 * torch.randn(labels, d, generator=generator(0, "centres"))
    return centres[x] + torch.randn(n, d, generator=generator(0, "rows")), x


def config(loss="energy", **changes): return GeneratorConfig(**dict(loss=loss, steps=40, d_noise=8) | SMALL | changes)


def train(loss="energy", checkpoint=None, minutes=0, **changes):
    z, x = pairs()
    recipe = config(loss, **changes)
    return train_generator(z, x, recipe, checkpoint=checkpoint, minutes=minutes, device="cpu", progress=False)


def same(a, b):
    "Whether two networks have the same weights, to the last bit."
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# losses

def test_losses_of_points():
    "Two rows of one label, all by hand: real 0 and 4, generated 1 and 1."
    x, z = torch.tensor([0, 0]), torch.tensor([[0.], [4]])
    def draw(x): return torch.ones(len(x), 1)
    assert generator_loss("energy", x, z, draw).item() == pytest.approx((1 + 3) / 2)
    assert generator_loss("plain_ot", x, z, draw).item() == pytest.approx((1 + 3) / 2)
    assert generator_loss("ot", x, z, draw).item() == pytest.approx((1 + 3 - 0 - 4) / 2)
    assert generator_loss("w1_critic", x, z, draw, lambda x, z: 5 * z[:, 0]).item() == pytest.approx(-5)
    assert critic_loss(lambda x, z: z[:, 0], x, z, draw(x)).item() == pytest.approx(-(2 - 1))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_against_each_loss_comes_closer(loss):
    "A generator that only shifts: the gradient points to the data."
    x, z = torch.arange(60) % 3, torch.randn(60, 4, generator=generator(1)) + 5
    shift, rng = torch.zeros(4, requires_grad=True), generator(2)
    def draw(x): return torch.randn(len(x), 4, generator=rng) + shift
    critic = None
    if loss == "w1_critic":
        torch.manual_seed(0)
        critic = Critic(4, 3, width=32, blocks=1)
        optimiser = torch.optim.Adam(critic.parameters(), 3e-3, betas=(0.0, 0.9))
        for _ in range(60):
            optimiser.zero_grad()
            critic_loss(critic, x, z, draw(x).detach(), rng=rng).backward()
            optimiser.step()
    step, = torch.autograd.grad(generator_loss(loss, x, z, draw, critic), shift)
    assert (step < 0).all()


def test_labels_are_matched_apart():
    "Swapped labels: the same points all together, far away within labels."
    x, z = torch.arange(40) % 2, torch.randn(40, 2, generator=generator(0)) + 9 * (torch.arange(40) % 2)[:, None]
    swapped = z[torch.arange(40) ^ 1]
    assert w1(z, swapped) < 1e-5
    for loss in ("plain_ot", "ot", "energy"):
        assert generator_loss(loss, x, z, lambda x: swapped.repeat(len(x) // 40, 1)).item() > 5


def test_batches_draw_the_pairs_distribution():
    "Rows are independent draws; the null condition draws from all."
    x = torch.tensor([0] * 30 + [1] * 10)
    rows, conditions = Batches(x, 20_000)(generator(0))
    assert (conditions == 1).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(x[rows], conditions)
    rows, conditions = Batches(x, 30_000, per_label=True, null_fraction=0.1)(generator(0))
    assert (x[rows[conditions == NULL]] == 1).float().mean().item() == pytest.approx(0.25, abs=0.02)
    numbers = torch.rand(40, 2)
    rows, conditions = Batches(numbers, 8, null_fraction=0.5)(generator(0))
    assert torch.equal(numbers[rows], conditions)


# collapses

@pytest.mark.parametrize("checks, loss, remedy", [
    (Checks(0.1, 0.1, 0.0, 0.0), "w1_critic", "n_critic"),
    (Checks(0.1, 0.1, 0.0, 0.0), "plain_ot", "loss='ot'"),
    (Checks(0.1, 0.1, 0.0, 0.0), "diffusion", "steps"),
    (Checks(math.nan, 1.0, 0.0, 0.0), "energy", "Lower `lr`"),
    (Checks(7.0, 7.0, 0.0, 0.0), "energy", "diverged"),
    (Checks(1.0, 0.01, 0.0, None), "energy", "kappa"),
])
def test_a_collapse_says_what_to_change(checks, loss, remedy):
    with pytest.raises(Collapsed, match=remedy): check_collapse(checks, loss)


def test_a_training_that_collapses_is_an_error():
    "Plain transport with small batches in many dimensions; who wants to look at it can."
    z, x = torch.randn(200, 32, generator=generator(0)), torch.arange(200) % 2
    recipe = config("plain_ot", steps=200, batch=8, collapse_below=0.8, null_fraction=0.0, lr=3e-3)
    with pytest.raises(Collapsed, match="loss='ot'"):
        train_generator(z, x, recipe, device="cpu", progress=False)
    kept = train_generator(z, x, replace(recipe, collapse_below=0.0), device="cpu", progress=False)
    assert 0 < kept.history[-1]["spread"] < 0.8


def test_a_loss_that_is_not_finite_is_an_error(tmp_path, monkeypatch):
    "And the checkpoint before it is still good."
    from ucdm.lsdm import train_generator as module
    real = module.generator_loss
    def breaks(name, *args):
        breaks.calls += 1
        return real(name, *args) * (math.nan if breaks.calls > 25 else 1)
    breaks.calls = 0
    monkeypatch.setattr(module, "generator_loss", breaks)
    with pytest.raises(FloatingPointError, match="still good. Lower lr"): train(checkpoint=tmp_path / "run.ckpt")
    monkeypatch.undo()
    assert same(train(checkpoint=tmp_path / "run.ckpt").net, train().net)


# kills

@pytest.mark.parametrize("loss", ["energy", "w1_critic", "ot"])
def test_resume_to_the_same_bits(loss, tmp_path, monkeypatch):
    "Interrupted twice, between any two updates."
    from ucdm.lsdm import train_generator as module
    update = module.GeneratorTraining.update
    def interrupted(at):
        def step(self, stage, k):
            if k == at: raise KeyboardInterrupt
            return update(self, stage, k)
        return step
    for at in (7, 31):
        monkeypatch.setattr(module.GeneratorTraining, "update", interrupted(at))
        with pytest.raises(KeyboardInterrupt): train(loss, tmp_path / "run.ckpt")
    monkeypatch.setattr(module.GeneratorTraining, "update", update)
    resumed, undisturbed = train(loss, tmp_path / "run.ckpt"), train(loss)
    assert same(resumed.net, undisturbed.net)
    without = [{k: v for k, v in row.items() if k != "seconds"} for row in undisturbed.history]
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in resumed.history] == without


def test_diffusion_resumes_to_the_same_bits(tmp_path, monkeypatch):
    z, x = pairs()
    recipe = DiffusionConfig(steps=30, **SMALL)
    def go(checkpoint=None):
        return train_denoiser(z, x, recipe, checkpoint=checkpoint, minutes=0, device="cpu", progress=False)
    from ucdm.lsdm import latent_diffusion as module
    error = module.noise_error
    def interrupted(*args):
        interrupted.calls += 1
        if interrupted.calls > 11: raise KeyboardInterrupt
        return error(*args)
    interrupted.calls = 0
    monkeypatch.setattr(module, "noise_error", interrupted)
    with pytest.raises(KeyboardInterrupt): go(tmp_path / "run.ckpt")
    monkeypatch.undo()
    assert same(go(tmp_path / "run.ckpt").net, go().net)


PROGRAM = """
import sys
from test_lsdm_generator import train
train("w1_critic", sys.argv[1], steps=300)
print("done", flush=True)
"""


def test_killed_for_real(tmp_path):
    "SIGKILL while it trains and writes a checkpoint after each update."
    path, env = tmp_path / "run.ckpt", os.environ | dict(OMP_NUM_THREADS="1")
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(path)], cwd=Path(__file__).parent, env=env)
    try:
        began = time.monotonic()
        while not path.exists() and time.monotonic() - began < 120: time.sleep(0.02)
        time.sleep(0.3)
        assert process.poll() is None, "it ended before it could be killed; give it more steps"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    finally: kill_tree(process.pid)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: assert same(train("w1_critic", path, minutes=1, steps=300).net, train("w1_critic", steps=300).net)
    finally: torch.set_num_threads(threads)


def test_a_budget_in_seconds_is_kept(tmp_path):
    "Its steps are decided once; a finished run is not prolonged."
    first = train(checkpoint=tmp_path / "run.ckpt", steps=None, seconds=0.5)
    assert first.steps >= 30 and 0.1 < first.seconds < 3
    again = train(checkpoint=tmp_path / "run.ckpt", steps=None, seconds=0.5)
    assert again.steps == first.steps and same(again.net, first.net)


@pytest.mark.parametrize("change, message", [
    (dict(lr=2e-3), "lr was 0.001, is 0.002"), (dict(loss="ot"), "loss was 'energy', is 'ot'"),
    (dict(seed=1), "seed was 0, is 1"),
])
def test_a_checkpoint_of_another_run_is_refused(change, message, tmp_path):
    train(checkpoint=tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match=message): train(checkpoint=tmp_path / "run.ckpt", **change)


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    train(checkpoint=tmp_path / "run.ckpt")
    z, x = pairs()
    with pytest.raises(ValueError, match="on other data"):
        train_generator(z + 1, x, config(), checkpoint=tmp_path / "run.ckpt", device="cpu", progress=False)
    (tmp_path / "run.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="truncated, damaged"): train(checkpoint=tmp_path / "run.ckpt")


# noise of items

def test_noise_belongs_to_the_item():
    "Other batches, another order, other company: the same latents."
    torch.manual_seed(0)
    for net, draw in ((Generator(torch.ones(6), 4, width=16, blocks=1, d_noise=8), item_latents),
                      (Denoiser(6, 4, width=16, blocks=1), item_denoised)):
        x, ids = torch.arange(40) % 4, list(range(40))
        names = [str(k) for k in x.tolist()]
        whole = draw(net, x, ids, names)
        assert torch.allclose(draw(net, x, ids, names, batch=7), whole, atol=1e-5)
        order = torch.randperm(40, generator=generator(3)).tolist()
        mixed = draw(net, x[order], [ids[k] for k in order], [names[k] for k in order])
        assert torch.allclose(mixed, whole[order], atol=1e-5)
        assert torch.allclose(draw(net, x[5:6], [5], [names[5]]), whole[5:6], atol=1e-5)
        assert len(whole.unique(dim=0)) == 40
        assert not torch.allclose(draw(net, x, ids, names, seed=1), whole, atol=0.1)


def test_the_null_condition_is_one_of_its_own():
    torch.manual_seed(0)
    net = Generator(torch.ones(6), 4, width=16, blocks=1, d_noise=8)
    x = torch.tensor([NULL, 0, 3])
    made = net(x, torch.ones(3, 8))
    assert len(made.unique(dim=0)) == 3
    with pytest.raises(ValueError, match="from -1"): item_latents(net, torch.tensor([4]), [0], [""])
    with pytest.raises(ValueError, match="from -1"): item_latents(net, torch.tensor([-2]), [0], [""])
    with pytest.raises(ValueError, match="whole numbers"): item_latents(net, torch.rand(3), [0, 1, 2], [""] * 3)


# diffusion

def test_both_variants_are_of_one_size():
    for d in (32, 64, 128, 256):
        sizes = [sum(p.numel() for p in net.parameters()) for net in (Generator(torch.ones(d), 10), Denoiser(d, 10))]
        assert abs(sizes[1] / sizes[0] - 1) < 0.1


def test_guidance_needs_labels():
    net = Denoiser(4, 0, 2, width=16, blocks=1)
    assert denoised(net, torch.rand(3, 2), torch.randn(3, 4), steps=2).shape == (3, 4)
    with pytest.raises(ValueError, match="needs labels"):
        denoised(net, torch.rand(3, 2), torch.randn(3, 4), guidance=2.0)


# settings and data

@pytest.mark.parametrize("values, message", [
    (dict(loss="w2"), "GeneratorConfig.loss must"), (dict(steps=0), "GeneratorConfig.steps must"),
    (dict(steps=None), "give one of them"), (dict(seconds=3.0), "give one of them"),
    (dict(lr=0.0), "GeneratorConfig.lr must"),
    (dict(lr=math.nan), "GeneratorConfig.lr must"), (dict(batch=-1), "GeneratorConfig.batch must"),
    (dict(null_fraction=1.0), "GeneratorConfig.null_fraction must"), (dict(kappa=-2.0), "GeneratorConfig.kappa must"),
    (dict(n_critic=0), "GeneratorConfig.n_critic must"), (dict(seed=-1), "GeneratorConfig.seed must"),
])
def test_bad_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message): GeneratorConfig(**values)


def test_settings_of_another_type_are_named():
    for values in (dict(steps=1.5), dict(lr="fast"), dict(batch=True)):
        with pytest.raises(TypeError, match=f"StageTwoConfig.{next(iter(values))} must"): StageTwoConfig(**values)


@pytest.mark.parametrize("z, x, message", [
    (torch.randn(6, 2), torch.arange(5), "5 conditions do not fit 6"),
    (torch.full((6, 2), torch.inf), torch.arange(6), "not finite"),
    (torch.randn(6, 2), torch.tensor([0, 0, 0, 2, 2, 2]), "label 1 of 3 has no pair"),
    (torch.randn(6, 2), torch.tensor([-1, 0, 0, 1, 1, 1]), "belong to the unpaired data"),
    (torch.randn(6, 2), torch.rand(6), "of shape"),
    (torch.arange(6)[:, None], torch.arange(6), "must be floats"),
    (torch.randn(1, 2), torch.zeros(1).long(), "N > 1"),
])
def test_bad_data_are_named(z, x, message):
    for fit, recipe in ((train_generator, config()), (train_denoiser, DiffusionConfig(steps=5, **SMALL))):
        with pytest.raises(ValueError, match=message): fit(z, x, recipe, device="cpu", progress=False)


def test_losses_within_labels_say_what_they_need():
    z, x = pairs()
    for loss in ("ot", "plain_ot"):
        with pytest.raises(ValueError, match="give 8 or more"):
            train_generator(z, x, config(loss, batch=7), progress=False)
        with pytest.raises(ValueError, match="no labels to compare"):
            train_generator(z, torch.rand(120, 2), config(loss), progress=False)


def test_a_single_pair_of_a_label_will_do():
    "Rows are drawn with replacement, so that debiasing has its two."
    z, x = pairs()
    x[1:] = x[1:] % 2
    x[0] = 2
    for loss in LOSSES: assert train_generator(z, x, config(loss, steps=5), device="cpu", progress=False).steps == 5


@pytest.mark.parametrize("loss", ["energy", "w1_critic"])
def test_conditions_in_numbers_keep_their_noise(loss):
    "One latent a condition: the generator that ignores its noise is not the best one."
    t = torch.rand(400, 1, generator=generator(0))
    z = torch.cat([torch.sin(6 * t), torch.cos(6 * t)], 1) + 0.5 * torch.randn(400, 2, generator=generator(1))
    recipe = GeneratorConfig(loss=loss, steps=250, batch=48, width=48, blocks=2, d_noise=8, check_every=250)
    end = train_generator(z, t, recipe, device="cpu", progress=False).history[-1]
    assert 0.25 < end["sensitivity"] < 0.75 # the truth: 0.5
    assert end["distance"] is None


# whole models

@pytest.fixture(scope="module")
def images():
    "Bright and dark images with noise."
    noise = torch.randint(0, 60, (60, 3, 8, 8), generator=generator(0))
    labels = torch.arange(60) % 2
    return ImageSet((noise + 150 * labels[:, None, None, None]).byte(), labels, ("dark", "bright"), "toy")


@pytest.fixture(scope="module")
def model(images):
    return fit_one_step(images[:40], images[40:], d=6, config=config(steps=150), device="cpu", progress=False)


def test_a_model_draws_what_it_is_asked_for(model):
    made = model.sample(["dark", "bright"] * 20)
    assert made.dtype == torch.uint8 and made.shape == (40, 3, 8, 8)
    means = made.float().mean((1, 2, 3))
    assert means[::2].mean() + 60 < means[1::2].mean()
    assert torch.equal(made[4:6], model.sample(["dark", "bright"], ids=[4, 5]))
    assert not torch.equal(made, model.sample(["dark", "bright"] * 20, seed=1))
    both = model.sample([None] * 60).float().mean((1, 2, 3))
    assert both.min() + 60 < both.max()


def test_unpaired_labels_are_not_read(images):
    blank = images.unlabelled()[40:]
    recipe = config(steps=10)
    def fit(rest): return fit_one_step(images[:40], rest, d=6, config=recipe, device="cpu", progress=False)
    assert fit(images[40:]).fingerprint == fit(blank).fingerprint
    with pytest.raises(ValueError, match="belong to the unpaired data"):
        fit_one_step(images.unlabelled(), config=recipe, d=6, progress=False)


def test_save_and_load(model, tmp_path):
    model.save(tmp_path)
    again = OneStepModel.load(tmp_path, device="cpu")
    assert (again.fingerprint, again.classes, again.record) == (model.fingerprint, model.classes, model.record)
    asked = ["dark", "bright", None]
    assert torch.equal(again.sample(asked), model.sample(asked))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for fact in ("in both stages | 40 |", "in stage 1 | 20 |", "150 steps", "dark, bright", "reading of LSDM"):
        assert fact in card
    model.save(tmp_path) # over itself


def test_damaged_models_are_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"): OneStepModel.load(tmp_path)
    def spoilt(name, change):
        folder = model.save(tmp_path / "spoilt")
        change(folder / name)
        with pytest.raises(ValueError, match="no whole one-step model") as error:
            OneStepModel.load(folder, device="cpu")
        assert "\n" not in str(error.value)
    def truncated(file): file.write_bytes(file.read_bytes()[:-50])
    def turned(file): file.write_bytes(bytes(reversed(file.read_bytes())))
    for name in ("generator.safetensors", "config.json", "latent_space/config.json",
                 "latent_space/latent_space.safetensors"):
        for change in (truncated, turned): spoilt(name, change)
        if name != "config.json": spoilt(name, Path.unlink)
    spoilt("config.json", lambda file: file.write_text(json.dumps(dict(_class_name="AutoencoderKL")), encoding="utf-8"))


def test_mixed_models_are_refused(model, images, tmp_path):
    other = fit_one_step(images[:50], d=6, config=config(steps=10), device="cpu", progress=False)
    for name in ("generator.safetensors", "latent_space"):
        a, b = model.save(tmp_path / name / "a"), other.save(tmp_path / name / "b")
        if (a / name).is_dir():
            shutil.rmtree(a / name)
            shutil.copytree(b / name, a / name)
        else: shutil.copy(b / name, a / name)
        with pytest.raises(ValueError, match="of two models"): OneStepModel.load(a, device="cpu")


def test_classes_are_checked(model):
    with pytest.raises(ValueError, match="did you mean 'bright'"): model.sample(["brihgt"])
    for bad in (2, -2, 0.5, True):
        with pytest.raises(ValueError, match="must be a whole number from -1"): model.sample([bad])
    assert model.sample([]).shape == (0, 3, 8, 8)
    with pytest.raises(ValueError, match="do not fit"):
        OneStepModel(fit_pca(torch.randn(9, 4), 2), model.net, model.classes)


# pairs

def test_pairs_do_not_depend_on_each_other(model):
    "Neither on the other images nor on the other classes; negatives of another class show it."
    both = one_step_pairs(model, range(30), ("dark", "bright"))
    alone = one_step_pairs(model, [7], ("bright",))
    assert torch.equal(both.positives[7, 1], alone.positives[0, 0])
    assert torch.equal(both.negatives[7, 1], alone.negatives[0, 0])
    light = [made.float().mean((2, 3, 4)) for made in (both.positives, both.negatives)]
    assert (light[0][:, 0] + 60 < light[0][:, 1]).all() and (light[1][:, 1] + 60 < light[1][:, 0]).all()
    null = one_step_pairs(model, range(30), ("dark",), "null").negatives.float().mean((2, 3, 4))
    assert null.min() + 60 < null.max()
    assert len(both.positives.flatten(0, 1).flatten(1).unique(dim=0)) == 60


def test_pairs_say_what_they_need(model):
    with pytest.raises(ValueError, match="did you mean 'dark'"): one_step_pairs(model, [0], ("drak",))
    with pytest.raises(ValueError, match="negative must"): one_step_pairs(model, [0], ("dark",), "inverted")


def test_algorithm_1_with_one_step(model, images, tmp_path):
    "Stores are filled and resumed as ever; a pair does not depend on the batch."
    prior, seeds = OneStepPrior(model, device="cpu"), images[:12].unlabelled()
    whole = generate_pairs(prior, seeds, ("dark", "bright"), one_step_config(), progress=False)
    generate_pairs(prior, seeds[:5], ("dark", "bright"), one_step_config(), tmp_path, batch_size=3, progress=False)
    kept = generate_pairs(prior, seeds, ("dark", "bright"), one_step_config(), tmp_path, batch_size=4, progress=False)
    for a, b in ((kept.positives, whole.positives), (kept.negatives, whole.negatives)):
        assert (torch.as_tensor(a[:]).int() - b.int()).abs().max() <= 1 # but for rounding in products of matrices
    light = whole.positives.float().mean((2, 3, 4))
    assert (light[:, 0] + 60 < light[:, 1]).all()
    other = OneStepPrior(fit_one_step(images[:50], d=6, config=config(steps=10), device="cpu", progress=False))
    with pytest.raises(ValueError, match="another specification"):
        generate_pairs(other, seeds, ("dark", "bright"), one_step_config(), tmp_path, progress=False)


@pytest.mark.parametrize("changes", [dict(steps=5), dict(positive_from="seed"), dict(negative_from="seed")])
def test_settings_that_one_step_cannot_do_are_refused(changes, model, images):
    seeds, config = images[:2].unlabelled(), one_step_config(**changes)
    with pytest.raises(ValueError, match="one_step_config"):
        generate_pairs(OneStepPrior(model), seeds, ("dark",), config, progress=False)


def test_a_prompt_without_a_class_is_refused(model, images):
    with pytest.raises(ValueError, match="names no class"):
        generate_pairs(OneStepPrior(model), images[:2].unlabelled(), ("zebra",), one_step_config(), progress=False)
