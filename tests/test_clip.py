"""CLIP and SigLIP from the hub and from folders: what is asked of the hub, downloads that are killed, files that arrive damaged.
Vectors that are kept: an interruption, a damaged file. As a method: its settings, and all protocols of a run."""
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

import ucdm.baselines.clip_zero_shot as zero_shot_module
import ucdm.baselines.image_text_model as model_module
import ucdm.baselines.train_clip as train_module
from ucdm.baselines.clip_zero_shot import ZeroShot, ZeroShotConfig
from ucdm.baselines.image_text_model import (
    load_image_text_model, model_identity, packaged_clips, PACKAGED_CLIPS, save_model, small_model
)
from ucdm.baselines.train_clip import SmallClipConfig
from ucdm.data import embedded
from ucdm.data.datasets import load_dataset
from ucdm.diffusion.captions import build_tokenizer
from ucdm.diffusion.prior import PACKAGED
from ucdm.diffusion.train_prior import Clock
from ucdm.runs.identity import hub_commit, method_config, spec_hash
from ucdm.runs.run import run
from ucdm.runs.spec import RunSpec

LOCAL_CIFAR = embedded.data_root() / "cifar10" # before the fixture sets UCDM_DATA
KINDS = ("clip", "siglip")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "A folder with a small model of each kind."
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    tokenizer = build_tokenizer(["A photo of a trouser", "A photo of a bag", "something else"], 300, 16)
    for kind in KINDS: save_model(small_model(tokenizer, kind), tokenizer, folder / kind)
    return folder


@pytest.fixture
def copy(models, tmp_path):
    "A CLIP that a test may damage."
    return Path(shutil.copytree(models / "clip", tmp_path / "copy"))


def pictures(n, seed=0, size=32):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def load(folder, **kwargs): return load_image_text_model(str(folder), "cpu", **kwargs)


# what is asked of the hub

@pytest.mark.parametrize("name, revision", [("owner/model", None), ("owner/model@v1", "v1"), ("owner/model@refs/pr/3", "refs/pr/3")])
def test_the_hub_is_asked_for_the_revision_and_for_safetensors_only(models, monkeypatch, name, revision):
    asked = []
    monkeypatch.setattr(model_module, "hub_commit", lambda *args: COMMIT)
    monkeypatch.setattr(model_module, "snapshot_download", lambda hub_id, **kw: asked.append((hub_id, kw)) or str(models / "clip"))
    model = load(name)
    (hub_id, kwargs), = asked
    assert (hub_id, kwargs["revision"]) == ("owner/model", revision)
    assert not any(p.endswith((".bin", ".py", ".msgpack", ".h5")) or p == "*" for p in kwargs["allow_patterns"])
    assert model.identity == model_identity(name) == f"hub:owner/model@{COMMIT}"


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    def fails(*args, **kwargs): raise ConnectionError("no route")
    monkeypatch.setattr(model_module, "hub_commit", lambda *args: "")
    monkeypatch.setattr(model_module, "snapshot_download", fails)
    with pytest.raises(ValueError, match="owner/nothing could not be downloaded; see that the id and revision are right"):
        load("owner/nothing")
    for name in ("ViT-B/32 of OpenAI", "nowhere", "../nowhere/", ""):
        with pytest.raises(FileNotFoundError, match="no model .* it is not a packaged one"): load(name)


def test_without_a_network_the_cache_serves_or_says_what_it_lacks(models, copy, monkeypatch):
    "What an earlier download left is used; where it was interrupted the missing file is named, and why it was not fetched."
    def fails(*args, **kwargs): raise ConnectionError("no route")
    monkeypatch.setattr(model_module, "hub_commit", lambda *args: "")
    monkeypatch.setattr(model_module, "snapshot_download", fails)
    monkeypatch.setattr(model_module, "try_to_load_from_cache", lambda *args, **kwargs: str(copy / "config.json"))
    assert torch.equal(load("owner/model").embed_images(pictures(2)), load(models / "clip").embed_images(pictures(2)))
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors is missing.*The hub could not be asked: ConnectionError"): load("owner/model")


def test_the_commit_of_a_model_comes_from_the_cache_without_a_network(tmp_path, monkeypatch):
    "A CLIP has no model_index.json, by which a generator in the cache is known."
    import huggingface_hub
    class Down:
        def model_info(self, *args, **kwargs): raise ConnectionError("no route")
    at = {"config.json": tmp_path / COMMIT / "config.json"}
    monkeypatch.setattr(huggingface_hub, "HfApi", Down)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda hub_id, file, revision=None: str(at[file]) if file in at else None)
    hub_commit.cache_clear()
    assert model_identity("owner/clip") == f"hub:owner/clip@{COMMIT}" and hub_commit("owner/clip") == ""
    hub_commit.cache_clear()


# files that are not what they should be

def _text(text): return lambda file: file.write_text(text, encoding="utf-8")


def _cut(file): os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("file, damage, message", [
    ("config.json", Path.unlink, "config.json is missing"),
    ("config.json", _cut, "config.json is truncated or damaged"),
    ("config.json", _text('{"model_type": "clip_text_model"}'), "the type 'clip_text_model', not one with an image tower"),
    ("config.json", _text('{"model_type": "bert", "auto_map": {"AutoModel": "evil.Model"}}'), "the type 'bert', not one with"),
    ("config.json", _text("{}"), "the type None, not one with an image tower"),
    ("model.safetensors", Path.unlink, "model.safetensors is missing"),
    ("model.safetensors", _cut, "model.safetensors is truncated or damaged"),
    ("model.safetensors", _text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), r"pointer of Git LFS.*git lfs pull` in .*copy\."),
    ("tokenizer.json", Path.unlink, "tokenizer.json is missing"),
    ("preprocessor_config.json", Path.unlink, "preprocessor_config.json is missing"),
    ("preprocessor_config.json", _text("[1]"), "preprocessor_config.json is truncated or damaged"),
])
def test_one_clear_error_for_a_file(copy, file, damage, message):
    damage(copy / file)
    with pytest.raises(ValueError, match=message): load(copy)


def test_pickled_weights_are_not_read(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no model.safetensors, only pytorch_model.bin, which may run code.*refs/pr/1"): load(copy)


def test_sharded_weights(models, copy):
    model = load(copy).model
    for file in copy.glob("model*"): file.unlink()
    model.save_pretrained(copy, max_shard_size="60KB")
    assert len(list(copy.glob("model-*.safetensors"))) > 1
    assert torch.equal(load(copy).embed_images(pictures(2)), load(models / "clip").embed_images(pictures(2)))
    next(copy.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match="model-00002-of.* is missing"): load(copy)


def test_code_that_comes_with_a_model_is_not_run(copy):
    (copy / "evil.py").write_text("open('ran', 'w')\nclass Model: pass\n", encoding="utf-8")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        held = json.loads((copy / name).read_text(encoding="utf-8"))
        extra = dict(auto_map={"AutoModel": "evil.Model", "AutoTokenizer": ["evil.Model", None], "AutoImageProcessor": "evil.Model"})
        (copy / name).write_text(json.dumps(held | extra), encoding="utf-8")
    load(copy).embed_texts(["bag"])
    assert not Path("ran").exists() and not (copy / "ran").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_too_long(models, kind):
    with pytest.raises(ValueError, match=r"the text '(bag )+bag' \(and 1 more\) has \d+ tokens, the text tower .* takes 16; shorten it"):
        load(models / kind).embed_texts(["A photo of a bag", " ".join(["bag"] * 30), " ".join(["trouser"] * 30)])


# vectors that are kept

@pytest.mark.parametrize("kind", KINDS)
def test_vectors_do_not_depend_on_the_batch_or_on_the_order(models, kind):
    x, model = pictures(7), load(models / kind)
    whole = model.embed_images(x)
    assert torch.allclose(whole.flip(0), load(models / kind).embed_images(x.flip(0), batch_size=2), atol=1e-5)
    words = ["A photo of a bag", "bag", "something else trouser"]
    assert torch.allclose(model.embed_texts(words)[1:2], load(models / kind).embed_texts(words[1:2]), atol=1e-5)
    assert model.embed_images(pictures(2, size=96)).shape == (2, model.dim)


def test_an_interrupted_embedding_goes_on(models, tmp_path, monkeypatch):
    "Stopped in the third file: the first two are not computed again."
    monkeypatch.setattr(model_module, "TOGETHER", 4)
    x, sizes = pictures(10), []
    def limited(model, most):
        features = model.model.get_image_features
        def get(pixel_values):
            if len(sizes) == most: raise KeyboardInterrupt
            sizes.append(len(pixel_values))
            return features(pixel_values=pixel_values)
        model.model.get_image_features = get
        return model
    with pytest.raises(KeyboardInterrupt): limited(load(models / "clip", cache=tmp_path), 2).embed_images(x)
    found = limited(load(models / "clip", cache=tmp_path), 9).embed_images(x)
    assert sizes == [4, 4, 2] and torch.allclose(found, load(models / "clip").embed_images(x), atol=1e-5)


def test_models_do_not_share_vectors(models, tmp_path):
    a, b = (load(models / kind, cache=tmp_path).embed_images(pictures(2)) for kind in KINDS)
    assert a.shape != b.shape and len(list(tmp_path.iterdir())) == 2


def test_a_damaged_file_of_vectors(models, tmp_path):
    whole = load(models / "clip", cache=tmp_path).embed_images(pictures(3))
    file, = tmp_path.rglob("*.safetensors")
    os.truncate(file, 30)
    with pytest.warns(UserWarning, match="is damaged: what it held is computed again"):
        assert torch.equal(load(models / "clip", cache=tmp_path).embed_images(pictures(3)), whole)


# as a method

def spec_of(folder, **train): return RunSpec(method="clip_zero_shot", n_seeds=20, n_test=5, train=dict(model=str(folder), **train))


def test_all_protocols_of_a_run(models, tmp_path):
    (tmp_path / "words.txt").write_text("teapot\nlamp\n", encoding="utf-8")
    result = run(spec_of(models / "siglip", words=str(tmp_path / "words.txt"), rule="neglabel"), tmp_path, progress=False)
    assert list(result.protocols) == ["running", "running+mcm", "running+neglabel", "running+random_words",
                                      "running+other_prompt", "running+sigmoid", "held_out"]
    assert result.protocols["running"] == result.protocols["running+neglabel"]
    assert result.seeds["labelled"] == 0 and result.provenance["prior"] is None


def test_what_is_asked_of_the_settings(models, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'rule'"): method_config(spec_of(models / "clip", rul="mcm"))
    with pytest.raises(ValueError, match="settings of clip_zero_shot: rule must be 'mcm'"): method_config(spec_of(models / "clip", rule="msp"))
    with pytest.raises(ValueError, match="words.txt, the file of negative words, cannot be read"):
        method_config(spec_of(models / "clip", words=str(tmp_path / "words.txt")))
    with pytest.raises(ValueError, match="'sigmoid' is for a SigLIP"): run(spec_of(models / "clip", rule="sigmoid"), tmp_path, progress=False)
    with pytest.raises(ValueError, match="'neglabel' needs negative words"): run(spec_of(models / "clip", rule="neglabel"), tmp_path, progress=False)
    (tmp_path / "words.txt").write_text("word " * 40, encoding="utf-8")
    with pytest.raises(ValueError, match="the text tower of .* takes 16; shorten it"):
        run(spec_of(models / "clip", words=str(tmp_path / "words.txt")), tmp_path, progress=False)


def test_other_weights_are_another_result(models, copy, tmp_path):
    first = spec_hash(spec_of(copy))
    torch.manual_seed(1)
    tokenizer = load(models / "clip").tokenizer
    save_model(small_model(tokenizer), tokenizer, copy)
    assert spec_hash(spec_of(copy)) != first


def test_a_small_model_is_not_asked_about_the_images_it_learnt_from(copy, tmp_path):
    (copy / "training.json").write_text(json.dumps(dict(dataset="cifar10", classes=["cat"])), encoding="utf-8")
    spec = replace(spec_of(copy), dataset="cifar10")
    task = type("Task", (), dict(config=ZeroShotConfig(model=str(copy)), spec=spec))
    with pytest.raises(ValueError, match="has learnt from cifar10's training images"): zero_shot_module.fit_clip_zero_shot(task)


def test_the_names_a_small_model_was_taught_are_its_negative_words(copy, tmp_path):
    (copy / "training.json").write_text(json.dumps(dict(dataset="x", classes=["trouser", "bag", "T-shirt"])), encoding="utf-8")
    result = run(spec_of(copy), tmp_path, progress=False)
    assert "running+neglabel" in result.protocols


def test_a_teacher_that_finds_nothing_of_a_class(models, tmp_path):
    "A CLIP with random weights calls all images the same."
    few = dict(depth=10, width=1, iterations=2, epochs=1, batch_size=8)
    spec = replace(spec_of(models / "clip", **few), method="clip_labels")
    with pytest.raises(ValueError, match="the teacher calls none of the 20 unlabelled images .*take another rule or model"):
        run(spec, tmp_path, progress=False)


def test_the_cut_of_mcm_is_that_of_the_unlabelled_set(models):
    model, x = load(models / "clip"), pictures(40)
    a = ZeroShot(model, ("trouser", "bag"), x[:20])
    b = ZeroShot(model, ("trouser", "bag"), x[20:])
    assert a.threshold != b.threshold and torch.equal(a.predict(x)[0], b.predict(x)[0])


# a small CLIP of a generator's world

@pytest.fixture
def world(monkeypatch):
    "A training of seconds on the packaged images, in place of the generator's."
    images = load_dataset("fashion-mnist")
    monkeypatch.setitem(train_module.WORLDS, "fashion-mnist", lambda root: images)
    small = dict(width=16, layers=1, patch_size=16, text_width=16, text_layers=1, dim=8, batch=8)
    return SmallClipConfig(**small, steps=12), images


def test_only_the_generators_images(world, tmp_path):
    with pytest.raises(ValueError, match="these 8,000 images are not the 52,000 that the generator learnt from"):
        train_module.train(tmp_path, config=world[0])
    with pytest.raises(ValueError, match="prior must be one of fashion-mnist, cifar10, got 'sd'"): train_module.train(tmp_path, prior="sd")


def test_a_small_clip_from_training_to_run(world, tmp_path, monkeypatch):
    "Trained, killed and resumed, described, and asked by its folder: with the names that it was taught as negative words."
    config, images = world
    monkeypatch.setattr(train_module, "check_images", lambda *args: None)
    test = load_dataset("fashion-mnist", "test")[::100]
    whole = train_module.train(tmp_path / "whole", tmp_path, config=config) # tested by the packaged images
    assert json.loads((whole / "training.json").read_text(encoding="utf-8"))["n_test"] == 3000
    steps = []
    def loss(*args):
        if len(steps) == 7: raise KeyboardInterrupt
        steps.append(args)
        return batch_loss(*args)
    batch_loss = train_module._batch_loss
    monkeypatch.setattr(train_module, "_batch_loss", loss)
    monkeypatch.setattr(train_module, "Clock", lambda spent, minutes: Clock(spent, 0.))
    with pytest.raises(KeyboardInterrupt): train_module.train(tmp_path / "killed", config=config, test=test)
    monkeypatch.setattr(train_module, "_batch_loss", batch_loss)
    resumed = train_module.train(tmp_path / "killed", config=config, test=test)
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    record = json.loads((resumed / "training.json").read_text(encoding="utf-8"))
    assert record["n_images"] == len(images) - 512 and record["known"] == ["T-shirt", "trouser"]
    card = (resumed / "README.md").read_text(encoding="utf-8")
    assert f"{record['test_accuracy']:.1f} % of 30 test images" in card and record["command"] in card
    result = run(spec_of(resumed), tmp_path, progress=False)
    assert "running+neglabel" in result.protocols


@pytest.mark.parametrize("name", packaged_clips())
def test_the_packaged_models(name):
    "At most 3 MB, at least 85 % closed-set on the known classes, and told what the generator was told."
    folder = PACKAGED_CLIPS / name
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    told = json.loads((PACKAGED / name / "training.json").read_text(encoding="utf-8"))
    assert sum(f.stat().st_size for f in folder.iterdir()) < 3e6
    assert record["images_sha256"] == told["images_sha256"] and record["classes"] == told["classes"]
    assert record["known_accuracy"] >= 85
    if name == "cifar10" and not any(LOCAL_CIFAR.glob("*")):
        pytest.skip("no local CIFAR-10: set UCDM_DATA to a folder that holds cifar10/")
    images = load_dataset(name, "test", LOCAL_CIFAR) if name == "cifar10" else load_dataset(name, "test")
    found = train_module.accuracies(folder, images, tuple(record["known"]))
    assert found["known_accuracy"] >= 85 and abs(found["test_accuracy"] - record["test_accuracy"]) < 0.2


def test_texts_that_a_small_vocabulary_spells(tmp_path):
    "The tokeniser of the generator takes 16 tokens: \"something else\" and random words of the full length would be too long."
    tokenizer = CLIPTokenizer.from_pretrained(PACKAGED / "fashion-mnist" / "tokenizer")
    save_model(small_model(tokenizer), tokenizer, tmp_path)
    model, words = load(tmp_path), ["ankle boot", "sandal"]
    small = ZeroShot(model, ("trouser", "bag"), pictures(9), words=words)
    assert small.other_texts() == [""] and small.vectors["random_words"].shape == (2, model.dim)
    named = ZeroShot(model, ("trouser", "bag"), pictures(9), ZeroShotConfig(other_name="dress"), words)
    assert named.other_texts() == ["A photo of a dress"]
    with pytest.raises(ValueError, match="takes 16; shorten it"):
        ZeroShot(model, ("trouser", "bag"), pictures(9), ZeroShotConfig(other_name="something else"), words)


def test_a_tokeniser_whose_package_is_not_installed(models, tmp_path, monkeypatch):
    "SigLIP's own tokeniser needs sentencepiece, which this package does not."
    def fails(*args, **kwargs): raise ImportError("\nSiglipTokenizer requires the SentencePiece library")
    monkeypatch.setattr(model_module.AutoTokenizer, "from_pretrained", fails)
    with pytest.raises(ImportError, match="needs a package .for a SigLIP: pip install sentencepiece.*requires the SentencePiece library"):
        load(models / "siglip")
