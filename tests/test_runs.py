"""Pairs and runs when things go wrong: killed, out of disk space, damaged files, wrong names."""
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import finish, python, read_until

from ucdm.diffusion import prior as prior_module
from ucdm.data.datasets import load_dataset
from ucdm.method.pairs import PairConfig
from ucdm.method.generate import generate_pairs
from ucdm.diffusion.prior import load_prior
from ucdm.runs.spec import RunSpec
from ucdm.runs.pools import cache_folder, pair_set, run_split
from ucdm.runs.provenance import git_state
from ucdm.runs.identity import prior_identity, spec_hash
from ucdm.runs.run import run
from ucdm.runs.many import run_many
from ucdm.diffusion.stable_diffusion_2 import SD2_BASE, clip_tokenizer, random_pipeline, shrunk
from ucdm.method.pair_store import CorruptShard, PairStore

STEPS = dict(steps=2)
SPEC = RunSpec(
    n_seeds=12,
    n_test=10,
    mismatch=0.5,
    pairs=STEPS,
    train=dict(rounds=2, epochs_per_round=3, batch_size=4, depth=10, width=1, precision="float32"),
)


@pytest.fixture(scope="module")
def prior(): return load_prior("fashion-mnist", dtype=torch.float32)


@pytest.fixture(scope="module")
def seeds(): return load_dataset("fashion-mnist", "train")[torch.arange(20)].unlabelled()


def generate(prior, seeds, store=None):
    return generate_pairs(
        prior, seeds, ("T-shirt", "trouser"), PairConfig(**STEPS), store=store, shard_size=4, progress=False,
        ids=range(len(seeds)),
    )


def same_to_rounding(a, b):
    "Equal but for a gray level here and there: one kind of images was made alone, so the network saw other batches."
    gap = (a.int() - b.int()).abs()
    return gap.max() <= 1 and (gap > 0).float().mean() < 0.001


CHILD = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
import test_runs as t
from ucdm.method.pair_store import PairStore
append = PairStore.append
def said(self, ids, images):
    append(self, ids, images)
    print(self.spec["kind"], ids[0], flush=True)
    if self.spec["kind"] == "positive" and ids[0] == 8: import time; time.sleep(600)
PairStore.append = said
t.generate(t.load_prior("fashion-mnist", dtype=torch.float32), t.load_dataset("fashion-mnist", "train")[torch.arange(20)].unlabelled(), {store!r})
"""


def test_pairs_killed_and_resumed(tmp_path, prior, seeds, one_thread):
    """Killed after three of five shards of positives and two of negatives: those are not made again, and all pairs are
    what an undisturbed run gives; the third shard of negatives, made alone, to rounding.
    """
    store = tmp_path / "pairs"
    child = python("-c", CHILD.format(tests=os.path.dirname(__file__), store=str(store)))
    read_until(child, lambda line: line.strip() == "positive 8")
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -9
    shards = sorted(store.rglob("*.safetensors"))
    assert len(shards) == 5
    written = [p.stat().st_mtime_ns for p in shards]
    resumed, whole = generate(prior, seeds, store), generate(prior, seeds, tmp_path / "undisturbed")
    assert [p.stat().st_mtime_ns for p in shards] == written
    assert len(resumed) == 20
    assert torch.equal(resumed.positives, whole.positives)
    alone = torch.zeros(20, dtype=torch.bool)
    alone[8:12] = True
    assert torch.equal(resumed.negatives[~alone], whole.negatives[~alone]) and same_to_rounding(
        resumed.negatives[alone], whole.negatives[alone]
    )


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_shard(tmp_path, prior, seeds, damage, one_thread):
    "The damaged shard is named, with what to do; doing it brings the same pairs back."
    before = generate(prior, seeds[torch.arange(8)], tmp_path)
    shard = next((tmp_path / "negative").glob("pairs-0000004-*.safetensors"))
    content = shard.read_bytes()
    if damage == "missing": shard.unlink()
    else: shard.write_bytes(content[:-100] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        CorruptShard,
        match=rf"pairs-0000004.*{'missing' if damage == 'missing' else 'truncated or altered'}.*repair\(\)",
    ):
        generate(prior, seeds[torch.arange(8)], tmp_path)
    assert [e["ids"] for e in PairStore(tmp_path / "negative").repair()] == [[4, 5, 6, 7]]
    after = generate(prior, seeds[torch.arange(8)], tmp_path)
    assert (
        torch.equal(before.positives, after.positives)
        and torch.equal(before.negatives[:4], after.negatives[:4])
        and same_to_rounding(before.negatives[4:], after.negatives[4:])
    )


@contextmanager
def room_for(n_bytes):
    "No file may grow beyond this."
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_while_generating(tmp_path, prior, seeds):
    "One error that names the shard; what was written stays, and the rest follows when there is room."
    first = generate(prior, seeds[torch.arange(8)], tmp_path / "whole")
    for kind, images in (("positive", first.positives), ("negative", first.negatives)):
        PairStore(tmp_path / "pairs" / kind, PairStore(tmp_path / "whole" / kind).spec).append([0, 1, 2, 3], images[:4])
    with room_for(20_000), pytest.raises(OSError, match=r"could not write .*pairs-0000004.*Make room") as e:
        generate(prior, seeds[torch.arange(8)], tmp_path / "pairs")
    assert e.value.errno == errno.EFBIG
    assert not list((tmp_path / "pairs").rglob("*.partial"))
    assert torch.equal(generate(prior, seeds[torch.arange(8)], tmp_path / "pairs").negatives, first.negatives)


@pytest.mark.parametrize("break_it, message", [
    (lambda f: shutil.rmtree(f), "no prior .*not a packaged prior"),
    (lambda f: (f / "model_index.json").unlink(), "is not a diffusers pipeline: it has no model_index.json"),
    (lambda f: shutil.rmtree(f / "unet"), "is not a whole pipeline: the folders unet are missing"),
    (lambda f: (f / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}', encoding="utf-8"), "holds a StableDiffusionXLPipeline"),
    (lambda f: (f / "model_index.json").write_text("{", encoding="utf-8"), r"model_index.json is truncated or damaged .*Delete .*model_index.json and download or copy it again"),
    (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut off"), r"unet/diffusion_pytorch_model.safetensors is truncated or damaged .*Delete .* and download or copy it again"),
])
def test_prior_that_is_no_pipeline(tmp_path, break_it, message):
    folder = tmp_path / "my prior"
    shutil.copytree(prior_module.PACKAGED / "fashion-mnist", folder)
    break_it(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as e: load_prior(str(folder))
    assert "my prior" in str(e.value)


RUN = """
import sys, time, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
import test_runs as t, ucdm.method.training as training
train_epoch, n = training.train_epoch, [0]
def slow(*args, **kwargs):
    out = train_epoch(*args, **kwargs)
    n[0] += 1
    print("epoch", n[0], flush=True)
    if n[0] == {stop}: time.sleep(600)
    return out
training.train_epoch = slow
train_ucdm = training.train_ucdm
training.train_ucdm = lambda *args, **kwargs: train_ucdm(*args, **kwargs, checkpoint_every=0.0)
print("balance", t.run(t.SPEC, {cache!r}, progress=False).protocols)
"""


def run_in_child(cache, stop=0):
    return python("-c", RUN.format(tests=os.path.dirname(__file__), cache=str(cache), stop=stop))


def test_run_killed_and_resumed(tmp_path):
    """Killed in the second round of training: the run goes on and ends with the same numbers; the next call only reads
    them.
    """
    child = run_in_child(tmp_path / "a", stop=5)
    read_until(child, lambda line: line.strip() == "epoch 5")
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (tmp_path / "a" / "partial" / spec_hash(SPEC)).exists()
    said = [finish(run_in_child(tmp_path / name))[0].splitlines() for name in ("a", "b")]
    assert sum(line.startswith("epoch") for line in said[0]) < sum(line.startswith("epoch") for line in said[1]) == 6
    assert said[0][-1] == said[1][-1] and said[0][-1].startswith("balance")
    assert not (tmp_path / "a" / "partial" / spec_hash(SPEC)).exists()
    began = time.monotonic()
    run(SPEC, tmp_path / "a", progress=False)
    assert time.monotonic() - began < 5


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A finished run in its cache."
    cache = tmp_path_factory.mktemp("cache")
    return cache, run(SPEC, cache, progress=False)


def test_provenance(done):
    "A result says what it was computed from."
    _, result = done
    assert {
        "packages",
        "commit",
        "device",
        "started",
        "seconds",
        "data",
        "prior",
        "peak_memory_mb",
        "threads",
    } <= result.provenance.keys()
    assert set(result.protocols) == {"running", "group_pure", "mixed", "held_out"}


def test_damaged_result(done, tmp_path):
    "A result that was cut off or altered is computed again, with a warning that names it."
    cache, result = done
    shutil.copytree(cache, tmp_path / "cache")
    path = tmp_path / "cache" / "runs" / f"{spec_hash(SPEC)}.json"
    whole = path.read_text(encoding="utf-8")
    for content in (whole[:200], whole.replace('"closed": ', '"closed": 1')):
        path.write_text(content, encoding="utf-8")
        with pytest.warns(UserWarning, match=f"{path.name}.*computed again"):
            again = run(SPEC, tmp_path / "cache", progress=False)
        assert again.protocols == result.protocols


def test_damaged_pool(done, tmp_path):
    "Pairs damaged in the cache are made again, the others kept."
    cache, _ = done
    shutil.copytree(cache, tmp_path / "cache")
    before = pair_set(SPEC, cache)
    shard = next((tmp_path / "cache" / "pairs").rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=shard.name): after = pair_set(SPEC, tmp_path / "cache")
    assert torch.equal(before.negatives, after.negatives)


@pytest.mark.parametrize("fields, message", [
    (dict(mismatch=1.0), "mismatch must be less than 1, got 1.0"),
    (dict(mismatch=-0.1), "mismatch must be greater than or equal to 0, got -0.1"),
    (dict(mismatch="60%"), "mismatch must be a valid number, got '60%'"),
    (dict(n_seeds=0), "n_seeds must be greater than or equal to 1, got 0"),
    (dict(class_split="2/6"), "class_split must .*, got '2/6'"),
    (dict(train=dict(round=3)), "unknown field 'round': did you mean 'rounds'"),
    (dict(train=dict(rounds="3")), "rounds must be a valid integer, got '3'"),
    (dict(pairs=dict(stepz=3)), "unknown field 'stepz': did you mean 'steps'"),
    (dict(method="ucmd"), "unknown method 'ucmd': did you mean 'ucdm'"),
    (dict(dataset="fashion-mnits"), "class splits: unknown data set 'fashion-mnits': did you mean 'fashion-mnist'"),
])
def test_specification_that_cannot_be(tmp_path, fields, message):
    "Every wrong field is named before anything is computed."
    with pytest.raises((ValueError, TypeError), match=message): run(RunSpec(**fields), tmp_path)


def test_failed_run_costs_only_itself(done, tmp_path):
    "Of several runs one fails; the others are computed and kept, and the error names the one."
    cache, _ = done
    shutil.copytree(cache, tmp_path / "cache")
    bad = RunSpec(**{**SPEC.__dict__, "prior": str(tmp_path / "nowhere")})
    with pytest.raises(RuntimeError, match=r"1 of 2 runs failed(?s:.*)nowhere") as e:
        run_many([bad, SPEC], tmp_path / "cache", progress=False)
    assert e.value.results[1] is not None


def test_run_with_stable_diffusion_2(tmp_path):
    """A folder in Stable Diffusion 2's layout, small and with random weights, is a run's generator like any other:
    pairs, training and evaluation go through, and the result says whose pairs they were.
    """
    folder, split = tmp_path / "stable-diffusion-2", run_split(SPEC)
    random_pipeline(
        shrunk(SD2_BASE), clip_tokenizer([f"A photo of a {name}" for name in split.known_names])
    ).save_pretrained(folder)
    spec = replace(SPEC, prior=str(folder))
    result = run(spec, tmp_path / "cache", progress=False)
    assert result.provenance["prior"] == prior_identity(str(folder)) and -25 < result.metrics["balance"] <= 100
    pairs = pair_set(spec, tmp_path / "cache")
    assert pairs.positives.shape == pairs.negatives.shape == (12, split.n_known, 3, 32, 32) and not torch.equal(
        pairs.positives, pairs.negatives
    )
    stores = [PairStore(p.parent) for p in (tmp_path / "cache" / "pairs").glob("*/spec.json")]
    assert {s.spec["prior"] for s in stores} == {load_prior(str(folder)).fingerprint}


def test_cache_is_ignored_by_git(tmp_path):
    assert (cache_folder(tmp_path / "cache") / ".gitignore").read_text(encoding="utf-8") == "*\n"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_package_inside_another_repository(tmp_path):
    "A package that is installed below some repository does not take that one's commit for its own."
    git = lambda *args: subprocess.run(
        ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *args],
        check=True,
        capture_output=True,
    )
    module = tmp_path / "site-packages" / "ucdm" / "runs.py"
    module.parent.mkdir(parents=True)
    module.touch()
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "theirs")
    assert git_state(module) == dict(commit=None, dirty=None)
    git("add", ".")
    git("commit", "-q", "-m", "with the package")
    held = git_state(module)
    assert len(held["commit"]) == 40 and held["dirty"] is False
