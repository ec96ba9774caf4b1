"""Training when things go wrong: killed, out of disk space, out of numbers, or resumed from a damaged file."""
import errno
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from processes import finish, python, read_until

from ucdm.core.tensor_files import read_tensors, write_tensors
from ucdm.method.classifier import UCDM
from ucdm.method.train_config import TrainConfig
from ucdm.method.training import train_ucdm

CONFIG = TrainConfig(
    depth=10,
    width=1,
    rounds=3,
    epochs_per_round=3,
    batch_size=8,
    delta=0.0,
    bn_affine_steps=4,
    label_batch_norm="batch",
    bn_statistics="seeds",
)


def toy_data(n=20, n_known=2):
    "Seed images and pairs of noise around a grey level that depends on the class."
    g = torch.Generator().manual_seed(0)
    def noise(*shape): return torch.randint(0, 64, (*shape, 3, 32, 32), generator=g)
    level = torch.tensor([0, 90]).view(1, n_known, 1, 1, 1)
    seeds = noise(n) + torch.randint(0, 190, (n, 1, 1, 1), generator=g)
    pairs = SimpleNamespace(
        positives=(noise(n, n_known) + level).byte(),
        negatives=(noise(n, n_known) + 190 - level).byte(),
        classes=("dark", "grey"),
    )
    return seeds.byte(), pairs


def train(checkpoint, callback=None, config=CONFIG, every=0.):
    return train_ucdm(
        *toy_data(),
        config,
        checkpoint=checkpoint,
        callback=callback,
        progress=False,
        device="cpu",
        checkpoint_every=every,
    )


def stop_after(round, epoch):
    class Stop(Exception): pass
    def callback(entry, ucdm):
        if entry["kind"] == "epoch" and (entry["round"], entry["epoch"]) == (round, epoch): raise Stop
    return Stop, callback


def stopped_run(path, round=1, epoch=1):
    "A checkpoint of a run that was stopped after an epoch."
    Stop, callback = stop_after(round, epoch)
    with pytest.raises(Stop): train(path, callback)
    return path.read_bytes()


CHILD = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from test_training import train
torch.set_num_threads(1)
def callback(entry, ucdm):
    if entry["kind"] == "epoch":
        print(entry["round"], entry["epoch"], flush=True)
        time.sleep({pause})
train({checkpoint!r}, callback)
"""


def child(checkpoint, pause=0., **env):
    code = CHILD.format(tests=os.path.dirname(__file__), checkpoint=str(checkpoint), pause=pause)
    return python("-c", code, env=os.environ | env)


def same_result(a, b):
    """Two checkpoints hold the same tensors (weights, Adam's moments, pseudo-labels) and the same history but for the
    time taken.
    """
    (tensors_a, meta_a), (tensors_b, meta_b) = read_tensors(a), read_tensors(b)
    assert tensors_a.keys() == tensors_b.keys()
    for k, t in tensors_a.items(): assert torch.equal(t, tensors_b[k]), k
    for meta in (meta_a, meta_b):
        for entry in meta["history"]: entry.pop("seconds", None)
    assert meta_a == meta_b


def test_killed_and_resumed(tmp_path):
    "SIGKILL in the second round; started again, the run ends as one that was left alone."
    alone, killed = tmp_path / "alone.ckpt", tmp_path / "killed.ckpt"
    process = child(killed, pause=.5)
    read_until(process, lambda line: line.split() == ["1", "1"])
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    _, meta = read_tensors(killed)
    assert meta["round"] == 1 and meta["epoch"] in (1, 2), "it was killed in the second round"

    (tmp_path / "killed.ckpt.partial").write_bytes(b"what a write in progress left behind")
    resumed = child(killed)
    epochs = finish(resumed)[0].split("\n")
    assert resumed.returncode == 0 and epochs[0] in ("1 1", "1 2"), "it went on where it was, and did not start anew"
    process = child(alone)
    finish(process)
    assert process.returncode == 0
    same_result(alone, killed)
    labels = UCDM.load(killed).pseudo_labels
    assert len(set(labels.tolist())) > 1, "the comparison should cover labelled images"


@pytest.mark.parametrize("keep", [0, 7, 1000, -1])
def test_truncated_checkpoint(tmp_path, keep):
    path = tmp_path / "run.ckpt"
    whole = stopped_run(path, 0, 1)
    path.write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"run\.ckpt is truncated.*Delete it") as e: train(path)
    assert "\n" not in str(e.value)
    path.unlink()
    train(path)


def test_full_disk(tmp_path):
    "The operating system refuses to write more than a few bytes: one error, and the previous checkpoint is as it was."
    resource = pytest.importorskip("resource")
    path = tmp_path / "run.ckpt"
    before = stopped_run(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not write .*run\.ckpt .*unchanged\. Make room"): train(path)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.ckpt"], "nothing half-written stays behind"
    assert train(path).history[-1]["kind"] == "round"


def test_no_space_left(tmp_path, monkeypatch):
    "The same when the disk is found full only as data are flushed, on the very first checkpoint."
    def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device. Make room") as e: train(tmp_path / "run.ckpt")
    assert e.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_nan_loss(tmp_path):
    "The error names place and remedy, the checkpoint from before stays, and the remedy works."
    path = tmp_path / "run.ckpt"
    before = stopped_run(path)
    def poison(entry, ucdm):
        if entry["kind"] == "epoch": ucdm.model.stem.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(
        FloatingPointError,
        match=r'loss of the \w+ pairs is not finite in round 2, epoch 3, iteration 1\. The checkpoint .*run\.ckpt '
        r'.*below 0\.005 or precision="float32"',
    ):
        train(path, poison, every=1e6)
    assert path.read_bytes() == before
    cured = train(path, config=replace(CONFIG, lr=1e-3, precision="float32"))
    assert cured.history[-1]["round"] == 2
    changed = [h for h in cured.history if h["kind"] == "changed"]
    assert changed == [
        {"kind": "changed", "round": 1, "epoch": 1, "lr": [5e-3, 1e-3], "precision": ["bfloat16", "float32"]}
    ]


def test_weights_that_overflow_are_not_kept(tmp_path):
    """A step may ruin the weights after the last loss of an epoch was fine: such a state must not replace a good
    checkpoint.
    """
    path = tmp_path / "run.ckpt"
    before = stopped_run(path)
    def poison(entry, ucdm): ucdm.model.stem.weight.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="weights are not finite"): train(path, poison)
    assert path.read_bytes() == before


def test_checkpoint_of_another_run(tmp_path):
    path = tmp_path / "run.ckpt"
    before = stopped_run(path, 0, 1)
    with pytest.raises(ValueError, match="other settings .seed was 0, is 1"):
        train(path, config=replace(CONFIG, seed=1))
    seeds, pairs = toy_data()
    pairs.negatives[3, 1] += 1
    with pytest.raises(ValueError, match="other images"):
        train_ucdm(seeds, pairs, CONFIG, checkpoint=path, progress=False)
    with pytest.raises(ValueError, match="is a folder"): train(tmp_path)
    assert path.read_bytes() == before


def test_compile_without_a_compiler(tmp_path):
    "Asked to compile where there is no C++ compiler, training goes on without."
    code = f"import sys\nsys.path.insert(0, {os.path.dirname(__file__)!r})\n" \
        "from test_training import *\n" \
        "u = train(None, config=replace(CONFIG, compile=True, rounds=1, epochs_per_round=1))\n" \
        "v = train(None, config=replace(CONFIG, rounds=1, epochs_per_round=1))\n" \
        "assert all(torch.equal(a, b) for a, b in zip(u.model.parameters(), v.model.parameters()))"
    env = os.environ | {
        "CXX": str(tmp_path / "no-compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_resumed_with_batch_norm_learning_until_real_images_come(tmp_path):
    "Stopped right after the first labels, or later: scale and shift are frozen as in the run that was left alone."
    config = replace(CONFIG, bn_affine_steps="generated")
    alone = train(None, config=config)
    for at in ((0, 1), (1, 1)):
        Stop, callback = stop_after(*at)
        with pytest.raises(Stop): train(tmp_path / f"{at}", callback, config)
        resumed = train(tmp_path / f"{at}", config=config)
        assert all(map(torch.equal, alone.model.state_dict().values(), resumed.model.state_dict().values()))
    assert not alone.model.bn.weight.requires_grad


def test_a_checkpoint_from_before_a_setting(tmp_path):
    "A setting that came later counts as what the code did without it."
    path = tmp_path / "run"
    stopped_run(path)
    tensors, meta = read_tensors(path)
    del meta["config"]["flip_once"]
    write_tensors(path, tensors, meta)
    train(path)
    with pytest.raises(ValueError, match="flip_once was False, is True"): train(path, config=replace(CONFIG, flip_once=True))


def test_a_freeze_that_never_comes_is_said(tmp_path):
    "Once, at the end; not where learning throughout was asked for."
    late, throughout = (replace(CONFIG, rounds=1, bn_affine_steps=n) for n in (100, 10**9))
    with pytest.warns(UserWarning, match="learnt throughout.*bn_affine_steps=100") as caught: train(None, config=late)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(None, config=throughout)
        train(None, config=CONFIG)


@pytest.mark.parametrize("there", (True, False))
def test_bfloat16_only_where_the_hardware_has_it(monkeypatch, there):
    "What a classifier, a compared method and a model compute in, where the hardware has bfloat16 and where it has not."
    from ucdm.app.model import Model
    from ucdm.baselines.learner import Learner
    from ucdm.data.images import ImageSet
    monkeypatch.setattr("ucdm.core.device.computes_bfloat16", lambda kind: there)
    seen, images = [], torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    def note(module, inputs, output): seen.append(output.dtype)
    small = dict(depth=10, width=1, precision="bfloat16")
    ucdm = UCDM(["a", "b"], TrainConfig(**small), device="cpu")
    learner = Learner(ImageSet(images, torch.tensor([0, 1]), ("a", "b"), "two"), Learner.Config(**small), "cpu")
    for network, ask in ((ucdm.model, lambda: ucdm.predict(images)),
                         (learner.model, lambda: learner.features(images.float(), model=learner.model)),
                         ((model := Model(["a", "b"], **small)).network, lambda: model.predict(images))):
        network.stem.register_forward_hook(note)
        ask()
    assert seen == [torch.bfloat16 if there else torch.float32] * 3
