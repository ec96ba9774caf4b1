"""Photographs of one's own, as a person uses them: the command `ucdm`, the model's folder, the cut and the page."""
import csv
import errno
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from itertools import count
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torchvision.models import resnet18
from typer.testing import CliRunner

import ucdm.app.checking
import ucdm.app.fitting
from ucdm.app.answer_table import Answers, table
from ucdm.app.cli import app
from ucdm.app.cut import answers, threshold_for_precision, threshold_for_rate
from ucdm.app.demo_photos import demo
from ucdm.app.evaluating import evaluate, group_metrics
from ucdm.app.fit_settings import FitSettings, PROFILES, train_config
from ucdm.app.fitting import fit
from ucdm.app.gallery import write_page
from ucdm.app.model import Model
from ucdm.app.network import SizedUCDM
from ucdm.app.predicting import predict
from ucdm.app.reviewing import begin_review, label, note
from ucdm.core.tensor_files import read_tensors, write_tensors
from ucdm.data import own_folder
from ucdm.data.own_folder import read_folder
from ucdm.diffusion.prior import Prior
from ucdm.evaluation.metrics import evaluate as evaluate_groups
from ucdm.method.classifier import UCDM
from ucdm.method.pairs import PairConfig

CLASSES = ("T-shirt", "trouser")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("app")]


def ucdm(*words):
    "The command in this process: exit status, standard output, standard error."
    done = CliRunner().invoke(app, list(map(str, words)))
    if done.exception and not isinstance(done.exception, SystemExit): raise done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture(scope="module", autouse=True)
def small():
    "Two rounds of an epoch, and pairs of two steps."
    with pytest.MonkeyPatch.context() as m:
        m.setitem(PROFILES, "quick", dict(rounds=2, epochs_per_round=1, depth=10, width=1))
        for room in (ucdm_app.fitting, ucdm_app.checking):
            m.setattr(room, "pair_config", lambda s: PairConfig(steps=2, seed=s.seed))
        yield


ucdm_app = sys.modules["ucdm.app"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "24 unlabelled photographs, 4 to predict of each group, labels of those."
    return demo(tmp_path_factory.mktemp("app") / "photos", photos=24, new=4)


@pytest.fixture(scope="module")
def model(photos):
    "A model fitted by the command, beside the photographs."
    status, said, wrong = ucdm("fit", photos, *CLASSES, "--out", photos.parent / "model", "--device", "cpu")
    assert status == 0, wrong
    assert "not learnt from: 12 that .ucdmignore names" in said and "T-shirt" in said
    return photos.parent / "model"


def weights(folder): return Model.load(folder, "cpu").state_dict()


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


# Fit

def test_photographs_to_predict_are_not_learnt_from(model):
    about = Model.load(model).about
    assert about["photos"] == 24 and about["labelled"] == 0 and about["prior_learnt"][0] == "T-shirt"
    assert {"started", "packages", "device", "commit", "duration", "seed", "specification"} <= about.keys()


def test_the_same_call_computes_nothing(photos, model, monkeypatch):
    monkeypatch.setattr(ucdm_app.fitting, "_model", None) # what computes
    before = (model / "model.safetensors").stat().st_mtime_ns
    assert fit(photos, CLASSES, model, device="cpu", progress=False).classes == CLASSES
    assert (model / "model.safetensors").stat().st_mtime_ns == before


def test_another_model_is_not_overwritten(photos, model):
    before = (model / "config.json").read_bytes()
    status, _, wrong = ucdm("fit", photos, *CLASSES, "--out", model, "--seed", 1, "--work", model.parent / "elsewhere")
    assert status == 2 and "holds a model of other photographs or settings; give another name" in wrong
    assert (model / "config.json").read_bytes() == before and not (model.parent / "elsewhere").exists()


def test_a_model_of_other_pairs_says_which(photos, model):
    status, _, wrong = ucdm("fit", photos, *CLASSES, "--out", model, "--preset", "paper")
    assert status == 2 and "holds a model made with --preset varied; give that, or another name" in wrong


def test_stopped_in_the_middle_it_goes_on(photos, model, tmp_path, monkeypatch):
    "Stopped after an epoch, the next call ends with the weights of a fit that nothing stopped."
    run = ucdm_app.fitting._run
    def stopped(state, data, checkpoint, fingerprint, callback, *more):
        def note(entry, u):
            if entry["kind"] == "epoch" and entry["round"] == 1: raise KeyboardInterrupt
        run(state, data, checkpoint, fingerprint, note, *more)
    again = dict(work=f"{model}.work", device="cpu", progress=False)
    for file in Path(again["work"]).glob("training-*.ckpt"): file.unlink() # pairs stay
    with monkeypatch.context() as m:
        m.setattr(ucdm_app.fitting, "_run", stopped)
        with pytest.raises(KeyboardInterrupt): fit(photos, CLASSES, tmp_path / "m", **again)
    assert not (tmp_path / "m").exists()
    fit(photos, CLASSES, tmp_path / "m", **again)
    assert same(weights(tmp_path / "m"), weights(model))


def test_labels_are_learnt_from(photos, model, tmp_path):
    "Corrections of other photographs join; what they say stays, and the model is another one."
    lines = ["file,label", f"{photos / 'new' / 'photo_0001.jpg'},trouser", f"{photos / 'photo_0001.jpg'},other"]
    (tmp_path / "c.csv").write_text("\n".join(lines), encoding="utf-8")
    seen = []
    keep = ucdm_app.fitting.train_sized
    def spied(u, seeds, pairs, labels, *more, **options):
        keep(u, seeds, pairs, labels, *more, **options)
        seen.append((labels, u.pseudo_labels))
        return u
    with pytest.MonkeyPatch.context() as m:
        m.setattr(ucdm_app.fitting, "train_sized", spied)
        made = fit(photos, CLASSES, tmp_path / "m", labels=tmp_path / "c.csv", work=f"{model}.work", device="cpu", progress=False)
    (given, found), = seen
    assert sorted(given[given >= 0].tolist()) == [1, 2] and torch.equal(found[given >= 0], given[given >= 0])
    assert made.about["photos"] == 25 and made.about["labelled"] == 2 and not same(made.state_dict(), weights(model))


def test_from_64_pixels_on_it_is_a_resnet(photos, tmp_path):
    made = fit(photos, ["T-shirt"], tmp_path / "m", size=64, weights="none", device="cpu", progress=False)
    assert made.about["weights"] == "scratch" and "resnet18" in repr(made)
    assert made.predict(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 2)
    assert torch.equal(Model.load(tmp_path / "m", "cpu").predict(x := torch.full((2, 3, 64, 64), 90, dtype=torch.uint8)), made.predict(x))


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    "Six photographs, and a function that fits a ResNet-18 to them, with its pairs in one folder."
    home, calls = tmp_path_factory.mktemp("few"), count()
    demo(home / "photos", photos=6, new=1)
    def fit_few(weights, stopped=False): # what is to be had: a function
        train, out = ucdm_app.fitting._run, home / f"model {next(calls)}"
        def stop(state, data, checkpoint, fingerprint, callback, *more):
            def note(entry, u):
                if entry["kind"] == "epoch" and entry["round"] == 1: raise KeyboardInterrupt
            train(state, data, checkpoint, fingerprint, note, *more)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(ucdm_app.fitting, "starting_weights", weights)
            if stopped: m.setattr(ucdm_app.fitting, "_run", stop)
            try: return fit(home / "photos", ["T-shirt"], out, size=64, work=home / "work", device="cpu", progress=False)
            except KeyboardInterrupt: return next((home / "work").glob("training-*.ckpt"))
    return fit_few


def never(*_): raise AssertionError("nobody is to ask for weights")


@pytest.mark.parametrize("there, card", [(True, "ImageNet's weights"), (False, "scratch")])
def test_what_a_stopped_training_started_from(few, there, card):
    "The card says what the network started from, whatever can be had when it goes on; nothing is loaded then."
    checkpoint = few(lambda *_: resnet18().state_dict() if there else None, stopped=True)
    assert (made := few(never)).about["weights"] == card and f"| network starts from | {card} |" in str(made.generate_model_card())
    checkpoint.unlink()


def test_what_a_training_of_an_earlier_version_started_from(few):
    checkpoint = few(lambda *_: None, stopped=True)
    tensors, meta = read_tensors(checkpoint)
    write_tensors(checkpoint, tensors, meta | dict(history=[h for h in meta["history"] if h["kind"] != "start"]))
    assert few(never).about["weights"].startswith("not known")
    checkpoint.unlink()


# What will not do

@pytest.mark.parametrize("words, remedy", [
    ("fit {photos} T-shirt --out {out} --size 16", "size must be greater than or equal to 32, got 16"),
    ("fit {photos} T-shirt --out {out} --profile fast", "profile must be 'quick', 'standard' or 'paper'"),
    ("fit {photos} T-shirt bicycle --out {out}", "no word for 'bicycle'; it has learnt T-shirt"),
    ("fit {photos} T-shirt T-shirt --out {out}", "give each once"),
    ("fit {photos}/none T-shirt --out {out}", "there is no folder"),
    ("fit {photos} T-shirt --out {photos}", "holds something else; give the name of a new folder"),
    ("fit {photos} T-shirt --out {out} --labels {photos}/none.csv", "labels: there is no file"),
    ("fit {photos} T-shirt --out {out} --prior {photos}", "is not a diffusers pipeline"),
    ("predict {photos} {photos}", "is no model, it has no config.json; give the folder that `ucdm fit` wrote"),
    ("predict {photos}/none {photos}", "there is no"),
    ("predict {model} {photos} --threshold 2", "threshold must be less than or equal to 1"),
    ("predict {model} {photos} --threshold 0.5 --reject-rate 0.5 --csv {out}", "two ways to set the cut"),
    ("predict {model} {photos} --target-precision 0.9 --csv {out}", "target_precision needs labelled photographs"),
    ("predict {model} {photos}/new --sort-into {photos}/new/sorted", "choose another folder"),
    ("evaluate {model} {photos}/new", "lies in no sub-folder"),
    ("demo {model}", "holds something else"),
])
def test_bad_input_is_one_line_and_status_2(words, remedy, photos, model, tmp_path):
    before = sorted(photos.rglob("*"))
    status, said, wrong = ucdm(*(w.format(photos=photos, model=model, out=tmp_path / "out") for w in words.split()))
    assert status == 2 and wrong.count("\n") == 1 and remedy in wrong, (said, wrong)
    assert wrong.startswith(f"ucdm {words.split()[0]}: ") and not list(tmp_path.iterdir()) and sorted(photos.rglob("*")) == before


def test_a_full_disk_is_one_line_and_status_1(photos, model, tmp_path, monkeypatch):
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("ucdm.core.files.os.replace", full)
    status, _, wrong = ucdm("predict", model, photos / "new", "--csv", tmp_path / "a.csv")
    assert status == 1 and wrong.count("\n") == 1 and "No space left on device" in wrong and "Make room" in wrong
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_one_line(model, tmp_path, monkeypatch):
    for module in ("onnxruntime", "gradio"): monkeypatch.setitem(sys.modules, module, None)
    status, _, wrong = ucdm("export", model, "--onnx", tmp_path / "m.onnx")
    assert (status, wrong.count("\n")) == (2, 1) and "pip install 'ucdm[export]'" in wrong
    status, _, wrong = ucdm("review", model, tmp_path)
    assert (status, wrong.count("\n")) == (2, 1) and "review needs gradio: pip install gradio" in wrong


# Models that travel

def test_folder_of_a_model(model):
    assert {p.name for p in model.iterdir()} == {"model.safetensors", "config.json", "README.md", "pairs.webp"}
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    assert config["classes"] == [*CLASSES] and (config["size"], config["fit"], config["threshold"]) == (32, "crop", None)
    header, text = (model / "README.md").read_text(encoding="utf-8").split("---\n")[1:3]
    assert yaml.safe_load(header)["pipeline_tag"] == "image-classification"
    assert "trained on *labelled* images of T-shirt, trouser" in " ".join(text.split())
    again = Model.from_pretrained(str(model))
    assert again.sheet and same(again.state_dict(), weights(model)) and again.temperature == config["temperature"]


def test_pushing_uploads_the_folder(model, monkeypatch):
    "`push_to_hub` hands the hub the files of a model's folder, but no photographs."
    found = {}
    class Hub:
        def __init__(self, token=None): pass
        def create_repo(self, repo_id, **_): return type("Repo", (), dict(repo_id=repo_id))
        def upload_folder(self, *, folder_path, **_): found.update({p.name: p.read_bytes() for p in Path(folder_path).iterdir()})
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    Model.load(model).push_to_hub("me/shirts")
    assert found.keys() == {p.name for p in model.iterdir()} - {"pairs.webp"} and found["config.json"] == (model / "config.json").read_bytes()


def test_old_files_still_load(photos, tmp_path):
    old = UCDM(CLASSES, train_config(FitSettings()), device="cpu")
    old.save(tmp_path / "old.safetensors")
    images = read_folder(photos / "new").images
    assert torch.equal(UCDM.load(tmp_path / "old.safetensors", "cpu").predict(images)[1], old.predict(images)[1])
    assert torch.equal(Model.load(tmp_path / "old.safetensors", "cpu").predict(images), old.predict(images)[1])
    assert predict(tmp_path / "old.safetensors", photos / "new", device="cpu", progress=False).counts.keys() == {*CLASSES, "other"}


def test_images_of_another_size(model):
    m = Model.load(model, "cpu")
    assert m.predict(torch.zeros(2, 3, 48, 48, dtype=torch.uint8)).shape == (2, 3)
    with pytest.raises(ValueError, match="images are 48x32, the model takes squares of 32: cut them first"):
        m.predict(torch.zeros(2, 3, 32, 48, dtype=torch.uint8))


def test_a_damaged_model_is_named(model, tmp_path):
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or of another network"): Model.load(tmp_path, "cpu")


def test_onnx_agrees(model, tmp_path):
    for extra in ("onnx", "onnxruntime", "onnxscript"): pytest.importorskip(extra)
    status, said, wrong = ucdm("export", model, "--onnx", tmp_path / "model.onnx")
    assert status == 0, wrong
    assert float(said.split("by ")[1].split()[0]) < 1e-4


# Answers and the cut

def test_answers_of_a_folder(photos, model, tmp_path):
    status, said, wrong = ucdm("predict", model, photos / "new", "--csv", tmp_path / "a.csv", "--sort-into", tmp_path / "s",
                               "--reject-rate", 0.25)
    assert status == 0 and "12 photographs" in said, wrong
    with open(tmp_path / "a.csv", encoding="utf-8") as f: rows = list(csv.DictReader(f))
    assert [*rows[0]] == ["file", "answer", "confidence", "certainty", "p(T-shirt)", "p(trouser)", "p(other)"]
    assert sorted(r["file"] for r in rows) == sorted(p.name for p in (photos / "new").iterdir())
    assert sum(r["answer"] == "other" for r in rows) == 3
    near = [float(r["certainty"]) for r in rows]
    assert near == sorted(near) and all(abs(sum(float(r[f"p({k})"]) for k in (*CLASSES, "other")) - 1) < 1e-5 for r in rows)
    for r in rows: assert (tmp_path / "s" / r["answer"] / r["file"]).read_bytes() == (photos / "new" / r["file"]).read_bytes()


def test_stopped_while_it_reads_it_goes_on(photos, model, tmp_path, monkeypatch):
    "`predict`, `evaluate` and `fit` read what the stopped call did not, and leave nothing in the cache."
    monkeypatch.setenv("UCDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(own_folder, "EVERY", 0.0)
    monkeypatch.setattr(own_folder, "ThreadPoolExecutor", lambda: ThreadPoolExecutor(1))
    real, read = own_folder.read_photograph, []
    def counted(path, *more):
        if len(read) == most: raise KeyboardInterrupt
        read.append(path)
        return real(path, *more)
    monkeypatch.setattr(own_folder, "read_photograph", counted)
    for name in ("T-shirt", "bag"):
        (tmp_path / "sorted" / name).mkdir(parents=True)
        for n in range(4): Image.new("RGB", (40 + n, 30), "red").save(tmp_path / "sorted" / name / f"{n}.png")
    calls = [
        (12, ["predict", model, photos / "new", "--csv", tmp_path / "a.csv"]),
        (8, ["evaluate", model, tmp_path / "sorted"]),
        (24, ["fit", photos, *CLASSES, "--out", model, "--device", "cpu"]), # which is there; the others are ignored
    ]
    for files, words in calls:
        read.clear()
        most = 5
        status, _, wrong = ucdm(*words)
        assert status == 1 and wrong.endswith("stopped; the same command goes on from here.\n") and len(read) == 5
        most = files
        assert ucdm(*words)[0] == 0 and len(set(read)) == len(read) == files
        assert list((tmp_path / "cache" / "reading").iterdir()) == []


def test_own_rule_is_ucdms(photos, model):
    "Without a cut the answers are those of the largest probability, whatever the temperature."
    m, images = Model.load(model, "cpu"), read_folder(photos / "new").images
    warm = m.predict(images)
    m.temperature = 1.0
    assert torch.equal(answers(warm), answers(m.predict(images)))


def test_own_rule_in_place_of_a_kept_cut(photos, model, tmp_path):
    "The commands answer by the rule where they are asked to, and the model keeps its cut."
    shutil.copytree(model, tmp_path / "m")
    new = photos / "new"
    assert ucdm("predict", tmp_path / "m", new, "--threshold", 0.9, "--keep-cut", "--device", "cpu")[0] == 0
    for own, cut in (([], "threshold 0.9"), (["--own-rule"], "own rule")):
        for words in (("predict", tmp_path / "m", new), ("evaluate", tmp_path / "m", photos / "new_labels.csv")):
            status, said, wrong = ucdm(*words, *own, "--device", "cpu")
            assert status == 0 and cut in said, wrong
    assert Model.load(tmp_path / "m", "cpu").threshold == 0.9
    for also in (["--threshold", 0.5], ["--reject-rate", 0.3]):
        status, _, wrong = ucdm("predict", tmp_path / "m", new, "--own-rule", *also)
        assert status == 2 and "two ways to set the cut" in wrong


def test_thresholds_at_equal_scores():
    "Images with equal scores share a fate, and rates at the ends reject none and all."
    probs = torch.tensor([[.5, .5], [.5, .5], [.5, .5], [.9, .1]])
    for rate in (0.0, 0.25, 0.5, 0.75, 1.0):
        rejected = (answers(probs, threshold_for_rate(probs, rate)) == 1).sum().item()
        assert rejected in ({0: {0}, 1: {4}}.get(rate) or {0, 3})
    point = threshold_for_precision(probs, torch.tensor([0, 1, 0, 0]), 0.9)
    assert (point.accepted, point.right) == (1, 1)


def test_precision_with_labels(photos, model, tmp_path):
    labels = photos / "new_labels.csv"
    status, said, wrong = ucdm("predict", model, photos / "new", "--target-precision", 0.3, "--labels", labels)
    assert (status == 0 and "95 % interval" in said) or (status == 2 and "the best is" in wrong)


def test_metrics_are_those_of_the_paper(photos, model):
    m, found = Model.load(model, "cpu"), evaluate(model, photos / "new_labels.csv", device="cpu")
    with open(photos / "new_labels.csv", encoding="utf-8") as f: rows = list(csv.DictReader(f))
    images = {p: x for p, x in zip(read_folder(photos / "new").names, read_folder(photos / "new").images)}
    groups = {}
    for g in ("known", "unknown", "new"):
        of = [r for r in rows if r["group"] == g]
        number = [CLASSES.index(r["label"]) if r["label"] in CLASSES else 2 for r in of]
        groups[g] = torch.stack([images[r["file"].removeprefix("new/")] for r in of]), torch.tensor(number)
    def both(x): p = m.predict(x); return p[:, :2] / p[:, :2].sum(1, keepdim=True), p
    wanted = evaluate_groups(both, groups)
    # other batches, other sums: probabilities differ by 1e-8
    assert {k: found.metrics[k] for k in found.metrics} == pytest.approx({k: wanted[k] for k in found.metrics}, abs=1e-4)
    assert "dress" in found.counted_as_other or "coat" in found.counted_as_other or "bag" in found.counted_as_other


def test_a_folder_a_class_is_measured_too(photos, model, tmp_path):
    for name in ("T-shirt", "ankle_boot"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 30), "red").save(tmp_path / name / "a.png")
    found = evaluate(model, tmp_path, device="cpu")
    assert len(found) == 2 and found.counted_as_other == ["ankle boot"]


def test_one_class_is_enough():
    probs = torch.tensor([[.9, .1], [.2, .8]], dtype=torch.double)
    assert group_metrics(probs, torch.tensor([0, 1]), ["", ""])["balance"] == 100
    assert SizedUCDM(("dog",), train_config(FitSettings()), device="cpu").n_known == 1


# Page and review

class Page(HTMLParser):
    "Tags with their attributes, and the text of the data."
    def __init__(self, text):
        super().__init__()
        self.tags, self.data, self.inside = [], "", False
        self.feed(text)
    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs))); self.inside = dict(attrs).get("id") == "data"
    def handle_data(self, data): self.data += data if self.inside else ""


def test_page_shows_any_name_as_text(tmp_path):
    names = ["a, b.png", "<img src=x onerror=alert(1)>.png", "</script><b>.png".replace("/", "∕"), "naïve \"q\" #1?.png"]
    (tmp_path / "photos").mkdir()
    for n, name in enumerate(names): Image.new("RGB", (40 + n, 32), (60 * n, 90, 120)).save(tmp_path / "photos" / name)
    m = Model(["<b>cat</b>", "</script>"], depth=10, width=1, about=dict(prior="<i>", device="a & b"))
    a = predict(m, tmp_path / "photos", page=tmp_path / "page", csv=tmp_path / "a.csv", progress=False)
    text = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    data = json.loads(page.data)
    assert sorted(data["names"]) == sorted(names) and data["answers"] == ["<b>cat</b>", "</script>", "other"]
    assert not any("onerror" in attrs for _, attrs in page.tags) and sum(tag == "script" for tag, _ in page.tags) == 2
    policy, = (attrs["content"] for tag, attrs in page.tags if tag == "meta" and "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy and "http" not in policy
    for thumb in data["thumbs"]: assert (tmp_path / "page" / "thumbs" / thumb).is_file()
    from urllib.parse import unquote
    for link in data["links"]: assert (tmp_path / "page" / unquote(link)).is_file()
    assert set(table(a)["file"]) == set(names)
    with open(tmp_path / "a.csv", encoding="utf-8") as f: assert {r["file"] for r in csv.DictReader(f)} == set(names)


def test_a_second_page_makes_no_thumbnail_anew(photos, model, tmp_path):
    a = predict(model, photos / "new", page=tmp_path, device="cpu", progress=False)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.webp")}
    write_page(a, tmp_path)
    assert len(before) >= 12 and all(p.stat().st_mtime_ns == t for p, t in before.items() if p.parent != tmp_path)


def test_review_goes_on_and_is_learnt_from(photos, model, tmp_path):
    found = read_folder(photos / "new")
    m = Model.load(model, "cpu")
    a = Answers(m, found, m.predict(found.images), None, "own rule")
    r = begin_review(a, tmp_path / "c.csv")
    assert [found.names[n] for n in r.order] == table(a)["file"].tolist()
    for name in ("trouser", None, "other"): label(r, name)
    again = begin_review(a, tmp_path / "c.csv")
    assert len(again.order) == 10 and [*again.labels.values()] == ["trouser", "other"]
    from ucdm.app.label_files import read_labels
    assert [k.label for k in read_labels(tmp_path / "c.csv")] == ["trouser", "other"]


NOTES = """
import sys
from pathlib import Path
from types import SimpleNamespace
from ucdm.app.reviewing import note, Review

file, which = Path(sys.argv[1]), int(sys.argv[2])
paths = [file.parent / f"{n}.jpg" for n in range(60)]
r = Review(SimpleNamespace(found=SimpleNamespace(paths=paths, folder=file.parent)), file, order=list(range(60)))
print("ready", flush=True)
input()
for n in range(which, 60, 3): note(r, n, f"by {which}")
"""


def test_processes_that_review_into_one_csv(tmp_path):
    "Three at once lose no label, and leave nothing beside the CSV."
    file = tmp_path / "c.csv"
    started = [
        subprocess.Popen([sys.executable, "-c", NOTES, file, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    try:
        for process in started: assert process.stdout.readline() == "ready\n"
        for process in started: print(file=process.stdin, flush=True)
        assert [process.wait(120) for process in started] == [0, 0, 0]
    finally:
        for process in started: process.kill()
    with open(file, encoding="utf-8") as f: rows = {Path(r["file"]).stem: r["label"] for r in csv.DictReader(f)}
    assert rows == {str(n): f"by {n % 3}" for n in range(60)} and [p.name for p in tmp_path.iterdir()] == ["c.csv"]


def test_a_review_and_an_editor(photos, model, tmp_path):
    "What a person wrote into the CSV stays, and what cannot be read is not written over."
    found, m, file = read_folder(photos / "new"), Model.load(model, "cpu"), tmp_path / "c.csv"
    r = begin_review(Answers(m, found, m.predict(found.images), None, "own rule"), file)
    label(r, "trouser")
    with open(file, "a", encoding="utf-8") as f: f.write(f"{r.path(1)},other\ngone.jpg,T-shirt\n")
    label(r, "T-shirt")
    with open(file, encoding="utf-8") as f: rows = {Path(row["file"]).name: row["label"] for row in csv.DictReader(f)}
    wanted = {r.path(0).name: "trouser", r.path(1).name: "T-shirt", "gone.jpg": "T-shirt"}
    assert rows == wanted and r.at == 2
    for spoilt in (b"", b"PK\x03\x04 a table of another program", file.read_bytes() + b"a.jpg\n"):
        file.write_bytes(spoilt)
        with pytest.raises(ValueError, match=r"labels: .*c\.csv"): label(r, "other")
        assert file.read_bytes() == spoilt and r.at == 2 and len(r.labels) == 3
    file.write_text(f"file;label;group;remark\n{r.path(0)};other;known;dark\n", encoding="utf-8") # columns of one's own
    note(r, 0, "trouser")
    with open(file, encoding="utf-8") as f: assert list(csv.DictReader(f)) == [dict(file=str(r.path(0)), label="trouser", group="", remark="dark")]
    (tmp_path / "l.jpg").symlink_to(r.path(0)) # two rows of one photograph, and columns of one name
    file.write_text(f"file,label,,\n{r.path(0)},trouser,dark,blurry\nl.jpg,trouser,b,c\n", encoding="utf-8")
    label(r, "other")
    with open(file, encoding="utf-8") as f: assert [row[2:] for row in csv.reader(f)][1:] == [["dark", "blurry"], ["b", "c"], ["", ""]]
    (tmp_path / "l.jpg").unlink()
    file.write_text(f"file,label,group,remark\n{r.path(0)},trouser,known,dark\n", encoding="utf-8")
    r.at = 2
    label(r, "other")
    with open(file, encoding="utf-8") as f: assert list(csv.DictReader(f))[1] == dict(file=str(r.path(2)), label="other", group="", remark="")
    file.unlink()
    label(r, "other")
    assert len(file.read_text(encoding="utf-8").splitlines()) == 4 and [p.name for p in tmp_path.iterdir()] == ["c.csv"]


# The command

def test_check_warns_with_status_1(photos, tmp_path, monkeypatch):
    known = ucdm_app.checking.recognised
    monkeypatch.setattr(ucdm_app.checking, "recognised", lambda *a: known(*a, n=1, draws=2, steps=2))
    status, said, wrong = ucdm("check", photos, *CLASSES, "--pairs", 2, "--out", tmp_path / "check", "--device", "cpu")
    assert status == 1 and "pairs at" in said and "warning: 24 photographs are few" in said, wrong
    report = json.loads((tmp_path / "check" / "report.json").read_text(encoding="utf-8"))
    assert report["photographs"] == 24 and (tmp_path / "check" / "pairs.webp").is_file()


def test_photographs_of_other_things_need_a_folder_of_their_own_and_no_other_preset(photos, tmp_path):
    given = "fit", photos, *CLASSES, "--out", tmp_path / "m", "--others"
    for words, told in (((photos / "new", "--preset", "paper"), "leave the preset out"),
                        ((photos / "new",), "give a folder of its own"), ((tmp_path / "nobody",), "nobody")):
        status, _, wrong = ucdm(*given, *words)
        assert status == 2 and told in wrong and not (tmp_path / "m").exists()


def test_help_is_quick_and_teaches():
    "Help of every command comes with an example, and without torch."
    code = "import sys, ucdm.app, ucdm.app.cli; assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    for command in ("demo", "check", "fit", "predict", "evaluate", "export", "review"):
        status, said, _ = ucdm(command, "--help")
        assert status == 0 and f"ucdm {command}" in said.split("Example", 1)[1], command


def test_other_commands_hang_below(tmp_path):
    assert "no pair store" in (found := ucdm("store", "status", tmp_path))[2] and found[0] == 2
    assert ucdm("pairs", "--help")[0] == 0 and "--store" in ucdm("pairs", "--help")[1]
    assert "--profile" in ucdm("reproduce", "--help")[1]


def test_pairs_by_a_generator_of_larger_images(tmp_path):
    """Photographs are encoded from their files where the generator's images are larger than the classifier's, and what
    measures its memory, which has no file, is encoded as it is.
    """
    from ucdm.app.photographs import pixels_of, SharpPrior
    from ucdm.data.datasets import load_dataset
    from ucdm.data.images import ImageSet
    from ucdm.data.photographs import PhotoOptions
    from ucdm.diffusion.prior import load_prior
    from ucdm.method.generate import generate_pairs
    from ucdm.method.pairs import PairConfig

    paths, options = [tmp_path / f"{i}.png" for i in range(3)], PhotoOptions(16)
    for path, image in zip(paths, load_dataset("fashion-mnist", "train").images[:3]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((64, 64)).save(path)
    small = torch.stack([torch.as_tensor(pixels_of(path, options)) for path in paths])
    photographs = ImageSet(small, torch.full((3,), -1), ("bag",))
    prior = SharpPrior(load_prior("fashion-mnist"), small, paths, options)
    pairs = generate_pairs(prior, photographs, ("bag",), PairConfig(steps=1), tmp_path / "store", progress=False)
    assert len(pairs) == 3


class Larger(Prior):
    "A generator that says that it works at 64 pixels."
    def __init__(self, prior):
        self.__dict__.update(prior.__dict__)
        self.real, self.image_size = prior, 64

    def encode(self, images, noise=None): return self.real.encode(images, noise)


def test_a_generator_of_larger_images_is_asked_about_the_files(tmp_path, monkeypatch):
    """Asked together with its network, a generator that works at a higher resolution sees the photographs' files, those
    with labels, too.
    """
    from ucdm.app import likelihood_training, photographs
    from ucdm.app.asking import asking
    from ucdm.app.demo_photos import demo, DEMO_CLASSES
    from ucdm.app.evaluating import evaluate
    from ucdm.app.fitting import fit
    from ucdm.app.label_files import read_labels
    from ucdm.data.own_folder import read_folder

    for name, few in dict(LEAST_PASSES=320, DRAWN=(24, 24)).items(): monkeypatch.setattr(likelihood_training, name, few)
    photos = demo(tmp_path / "photos", photos=30, new=2)
    model = fit(photos, DEMO_CLASSES, tmp_path / "model", preset="likelihood", progress=False)
    found, both = read_folder(photos / "new", model.size), asking(model)
    as_it_is = both.predict(found.images)
    measured = evaluate(model, photos / "new_labels.csv", ask_generator=True)
    assert measured.cut == "UCDM's own rule; generator asked too" and len(found) == measured.confusion.values.sum()

    both.prior = Larger(both.prior)
    read, before = [], photographs.pixels_of
    def counted(path, options):
        read.append((path, options.size))
        return before(path, options)
    both.of_files(found.images, found.paths, found.options)
    both.of_labelled(read_labels(photos / "new_labels.csv", photos), found.options)
    monkeypatch.setattr(photographs, "pixels_of", counted)
    larger = both.predict(found.images)
    assert {p.name for p, _ in read} == {p.name for p in found.paths} and {s for _, s in read} == {64}
    assert (larger - as_it_is).abs().max() < 0.2 # the files hold no more than the small images do
    assert (larger.argmax(1) == as_it_is.argmax(1)).all()


def test_the_cut_of_both_with_a_generator_of_larger_images(tmp_path, monkeypatch):
    "Where a generator works at a higher resolution it is shown the files of other things, too, and answers by the cut of both."
    from ucdm.app import asking, likelihood_training, photographs
    from ucdm.app.demo_photos import DEMO_CLASSES
    from ucdm.data.photographs import PhotoOptions
    from ucdm.diffusion.prior import load_prior

    for module in (ucdm_app.fitting, asking): monkeypatch.setattr(module, "load_prior", lambda *given: Larger(load_prior(*given)))
    for name, few in dict(LEAST_PASSES=320, STEADY=10).items(): monkeypatch.setattr(likelihood_training, name, few)
    read, before = [], photographs.pixels_of
    def counted(path, options):
        read.append((Path(path), options.size))
        return before(path, options)
    monkeypatch.setattr(photographs, "pixels_of", counted)
    photos, beside = demo(tmp_path / "photos", photos=60, new=2), demo(tmp_path / "beside", photos=24, new=180, seed=1) / "new"
    with open(tmp_path / "beside" / "new_labels.csv", encoding="utf-8") as f:
        for row in csv.DictReader(f): # other things only
            if row["group"] == "known": (tmp_path / "beside" / row["file"]).unlink()
    taken, real = [], likelihood_training.other_photographs
    def keeping(*given):
        taken.append(real(*given))
        return taken[-1]
    monkeypatch.setattr(likelihood_training, "other_photographs", keeping)
    model = fit(photos, DEMO_CLASSES, tmp_path / "model", others=beside, held_out=0.4, progress=False)
    for file, image in zip(taken[0].files, taken[0].aside, strict=True): # each the file of its image
        assert torch.equal(torch.as_tensor(before(file, PhotoOptions(32))), image)
    asked = {path for path, size in read if size == 64 and path.parent == beside}
    hardest = round(0.2 * 0.4 * model.about["others"])
    assert len(asked) == round(0.4 * 60) < hardest # of them it is asked about as many as there are photographs aside
    cut = model.about["reading"]["cut"]
    measured = evaluate(Model.load(tmp_path / "model"), photos / "new_labels.csv", ask_generator=True)
    assert model.threshold is not None and measured.cut == f"threshold {cut:.3f}; generator asked too"
