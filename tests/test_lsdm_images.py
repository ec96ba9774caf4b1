"""Trials on images: nothing is computed twice, a killed training goes on, and what decides a result decides its place."""
import dataclasses

import pytest
import torch

from ucdm.core.files import CorruptResult
from ucdm.core.randomness import generator
from ucdm.data.images import ImageSet
from ucdm.evaluation.judge import Judge
from ucdm.lsdm import image_trials
from ucdm.lsdm.image_trials import balanced_rows, image_measures, Trial, trial_images, Trials
from ucdm.lsdm.training import StageTwo
from ucdm.method.two_head_wideresnet import WideResNet

CLASSES = "left", "right"
SHORT = dict(steps=6, batch=8, width=8, check_every=6, collapse_below=0.0)
TRIAL = Trial(0.5, True, "energy", 4, training=SHORT)


def pictures(n, purpose):
    "Noise, brighter on the side that the class says."
    labels = torch.arange(n) % 2
    pixels = torch.randint(0, 100, (n, 3, 32, 32), generator=generator(0, purpose), dtype=torch.uint8)
    for side in (0, 1): pixels[labels == side, ..., 16 * side:16 * side + 16] += 100
    return ImageSet(pixels, labels, CLASSES)


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return Judge(WideResNet(2, depth=10, width=1), CLASSES, {})


def made(folder, judge, seed=0, n_test=12):
    images = trial_images(pictures(60, "train"), pictures(30, "test"), 24, n_test, 16, seed)
    return Trials(images, judge, folder, device="cpu")


def weights(trials, trial=TRIAL): return trials.trained(trial).net.state_dict()


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", ["energy", "w1_critic", "diffusion"])
def test_a_second_call_computes_nothing(tmp_path, judge, monkeypatch, method):
    "Neither a training, nor a measurement, nor a reference."
    trial, first = dataclasses.replace(TRIAL, method=method), made(tmp_path, judge)
    found = first.measured(trial, 2), first.reference(), first.reference(trial), weights(first, trial)
    assert len(first.computed) == 5 # latent space, training, measurement, two references
    def never(*args, **kwargs): raise AssertionError("computed again")
    for name in ("train_generator", "train_denoiser", "fit_pca", "image_measures", "bound_terms"):
        monkeypatch.setattr(image_trials, name, never)
    second = made(tmp_path, judge)
    assert (second.measured(trial, 2), second.reference(), second.reference(trial)) == found[:3]
    assert same(weights(second, trial), found[3]) and second.computed == []


def test_a_killed_training_goes_on(tmp_path, judge, monkeypatch):
    "From its checkpoint, to the same weights as without the interruption; the checkpoint is then gone."
    run, spend, taken = StageTwo.run, StageTwo._spend, []
    def saving(self, update, measure, loss, minutes=1.0, progress=True): return run(self, update, measure, loss, 0.0, False)
    def dying(self, seconds):
        spend(self, seconds)
        taken.append(self.step)
        if self.step == 4 and len(taken) == 4: raise KeyboardInterrupt
    monkeypatch.setattr(StageTwo, "run", saving)
    whole = weights(made(tmp_path / "whole", judge))
    monkeypatch.setattr(StageTwo, "_spend", dying)
    trials = made(tmp_path / "killed", judge)
    with pytest.raises(KeyboardInterrupt): trials.trained(TRIAL)
    assert len(list((tmp_path / "killed").glob("*.part"))) == 1
    resumed = weights(made(tmp_path / "killed", judge))
    assert taken == [1, 2, 3, 4, 4, 5, 6] # the fourth was not saved
    assert same(resumed, whole) and not list((tmp_path / "killed").glob("*.part"))


def test_what_decides_the_place(tmp_path, judge, monkeypatch):
    "Settings, data, seed and code; not what one only looks with."
    trials = made(tmp_path, judge)
    at = trials.net_address(TRIAL)
    others = [dataclasses.replace(TRIAL, **change) for change in (
        dict(fraction=1.0), dict(unpaired=False), dict(method="ot"), dict(d=5), dict(training=SHORT | dict(lr=1e-4)))]
    places = [trials.net_address(trial) for trial in others] + [made(tmp_path, judge, seed=1).net_address(TRIAL)]
    assert len({at, *places}) == 7
    assert made(tmp_path, judge, n_test=10).net_address(TRIAL) == at # held-out images train nothing
    monkeypatch.setattr(image_trials, "source_hash", lambda code: "other code")
    assert trials.net_address(TRIAL) != at


def test_a_measurement_follows_what_it_is_measured_with(tmp_path, judge):
    "Another judge or other held-out images: measured anew, not trained anew."
    made(tmp_path, judge).measured(TRIAL)
    torch.manual_seed(1)
    for trials in (made(tmp_path, Judge(WideResNet(2, depth=10, width=1), CLASSES, {})), made(tmp_path, judge, n_test=10)):
        trials.measured(TRIAL)
        assert [name.split()[0] for name in trials.computed] == ["measurement"]


def test_damaged_files_are_not_believed(tmp_path, judge):
    "An altered measurement and a truncated network, each with its file's name."
    trials = made(tmp_path, judge)
    trials.measured(TRIAL)
    numbers, network = next(tmp_path.glob("*.json")), next(tmp_path.glob("*.safetensors"))
    numbers.write_text(numbers.read_text(encoding="utf-8").replace('"spread": ', '"spread": 1'), encoding="utf-8")
    with pytest.raises(CorruptResult, match=numbers.name): trials.measured(TRIAL)
    network.write_bytes(network.read_bytes()[:100])
    with pytest.raises(ValueError, match=network.name): trials.trained(TRIAL)


def test_labels_of_further_images_are_not_read(tmp_path, judge):
    "Neither those of more images, nor those of the pool beyond the pairs."
    trials = made(tmp_path / "a", judge)
    before, other = weights(trials), made(tmp_path / "b", judge)
    other.images.more.labels.fill_(0)
    other.images.pool.labels[12:] = 0
    assert same(weights(other), before)


def test_unequal_classes_take_turns_while_they_last():
    rows = balanced_rows(torch.tensor([0] * 5 + [1] * 2 + [2] * 3), "test")
    labels = torch.tensor([0] * 5 + [1] * 2 + [2] * 3)[rows]
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 2, 0, 0] and len(rows.unique()) == 10


def test_images_of_a_class_that_nobody_knows(judge):
    strange = ImageSet(pictures(4, "x").images, torch.tensor([0, 1, 0, 1]), ("left", "up"))
    with pytest.raises(ValueError, match="does not know 'up'"): image_measures(strange, strange, strange.images, judge)
