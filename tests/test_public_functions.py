"""Public functions that only other functions call, on their own: files, hashes, locks and command lines."""
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from ucdm.baselines.generators_labels import check_same_images, merge_others
from ucdm.baselines.semi_supervised import advice
from ucdm.batch.cli import committed_folder, show_list
from ucdm.batch.comparison import Difference, without_times
from ucdm.batch.kernels import first_lines, Outcome, shared_imports, tidy
from ucdm.batch.page import notebook_html, write_summary
from ucdm.batch.planning import own_evaluations
from ucdm.batch.profiles import find_experiments, plan, read_experiment
from ucdm.batch.runner import Batch
from ucdm.batch.toy_experiments import add_toy, add_toys, toy_notebook
from ucdm.core.files import CorruptResult
from ucdm.data.class_names import name_list
from ucdm.data.images import ImageSet
from ucdm.data.paper_classes import table_classes
from ucdm.data.splits import consecutive
from ucdm.dev.docs import broken_links
from ucdm.dev.pages import readme_text
from ucdm.evaluation.judge import load_judge
from ucdm.evaluation.metrics import evaluate, evaluate_with_curves
from ucdm.method.classifier import check_images
from ucdm.method.pair_store import PairStore
from ucdm.method.store_commands import app
from ucdm.report.claims import Check, conclude
from ucdm.report.comparisons import method_specs, rivals_of
from ucdm.report.settings_note import labels_behind
from ucdm.report.tables import best_two
from ucdm.runs.identity import is_packaged, Resolved, resolve, spec_hash, training_record
from ucdm.runs.pools import fill_pools, fill_with, pool_folder, pool_folders, read_pairs, run_data
from ucdm.runs.registry import PROBLEMS, register_problem
from ucdm.runs.result import read_result, RunResult, write_result
from ucdm.runs.run import run
from ucdm.runs.spec import describe, RunSpec

SPEC = RunSpec(n_seeds=12, n_test=10, mismatch=0.5, pairs=dict(steps=2))


@pytest.fixture
def batch(tmp_path):
    "A batch of three toy experiments that has not run."
    add_toys(tmp_path / "nbs" / "experiments")
    experiments = find_experiments(tmp_path / "nbs" / "experiments")
    jobs = plan(experiments, dict(notebooks={}), tmp_path / "out")
    return Batch("quick", jobs, tmp_path / "out", echo=lambda line: None, experiments=experiments)


def leave(batch, job, key):
    "The mark and the executed notebook of a job."
    for path in (mark := batch.out / "cache" / "done" / f"{job.name}.json", batch.notebook(job)):
        path.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(dict(key=key)), encoding="utf-8")
    nbformat.write(toy_notebook("seed = 0"), batch.notebook(job))
    return mark


def test_is_done(batch):
    "Only a whole mark with the job's own key, beside the executed notebook."
    job = batch.jobs[0]
    assert not batch.is_done(job)
    mark = leave(batch, job, job.key)
    assert batch.is_done(job) and not batch.is_done(batch.jobs[1])
    for wrong in ('{"key": "another"}', "", '{"key": "', "[]", "null"):
        mark.write_text(wrong, encoding="utf-8")
        assert not batch.is_done(job)
    leave(batch, job, job.key)
    batch.notebook(job).unlink()
    assert not batch.is_done(job)


def test_run_job_keeps_what_is_done(batch):
    "A job with its mark is not run; once the batch is stopped none is begun."
    leave(batch, batch.jobs[0], batch.jobs[0].key)
    assert batch.run_job(batch.jobs[0]).status == "kept"
    batch.stop.set()
    assert [batch.run_job(j).status for j in batch.jobs] == ["interrupted"] * 3 and len(batch.failed) == 3


def test_show_list(batch, capsys):
    leave(batch, batch.jobs[1], batch.jobs[1].key)
    show_list(batch)
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if any(j.name in line for j in batch.jobs)]
    assert [line.startswith("done") for line in heads] == [False, True, False]
    assert sum("run_seeds" in line for line in lines) == 1 and not any("out =" in line for line in lines)
    assert committed_folder(batch.experiments, "quick").parts[-3:] == ("outputs", "committed", "quick")


def test_write_summary(batch):
    "The page and its facts survive a damaged record; what is not there any more goes."
    job = batch.jobs[0]
    leave(batch, job, job.key)
    batch.outcomes[job.name] = Outcome(job, "done", 1.0)
    batch._make_folders()
    record = batch.out / "results" / "batch.json"
    record.write_text('{"jobs": {"gone"', encoding="utf-8")
    page = write_summary(batch)
    assert page == batch.out / "index.html" and job.name in page.read_text(encoding="utf-8")
    held = json.loads(record.read_text(encoding="utf-8"))
    assert list(held["jobs"]) == [job.name]
    record.write_text(json.dumps(held | dict(jobs=held["jobs"] | dict(gone=held["jobs"][job.name]))), encoding="utf-8")
    write_summary(batch)
    assert list(json.loads(record.read_text(encoding="utf-8"))["jobs"]) == [job.name]
    assert not list(batch.out.rglob("*.partial"))


def test_page_of_a_batch_that_was_killed(batch):
    "Killed after a notebook was done and before its page was made: the next call makes it, though it runs nothing."
    job = batch.jobs[0]
    leave(batch, job, job.key)
    batch._make_folders()
    assert batch.run_job(job).status == "kept"
    write_summary(batch)
    page = batch.notebook(job).with_suffix(".html")
    made = page.stat().st_mtime_ns
    write_summary(batch)
    assert page.stat().st_mtime_ns == made, "once"


def test_read_experiment(tmp_path):
    "The hash is that of the code; words and outputs do not change it. What is no experiment is refused by name."
    add_toy(tmp_path, "a", "seed = 0", "import numpy", "import numpy, pandas")
    add_toy(tmp_path, "b", "seed = 0", "import numpy")
    a, b = read_experiment(tmp_path / "a.ipynb"), read_experiment(tmp_path / "b.ipynb")
    assert (a.name, a.title, a.claim, list(a.parameters)) == ("a", "A toy", "It can be run.", ["seed"])
    assert {"numpy", "pandas"} <= a.imports and "pandas" not in b.imports
    assert "numpy" in shared_imports([a, b]) and "pandas" not in shared_imports([a, b])
    nb = nbformat.read(tmp_path / "a.ipynb", 4)
    nb.cells[0].source = "# Another title"
    nbformat.write(nb, tmp_path / "a.ipynb")
    assert read_experiment(tmp_path / "a.ipynb").source_hash == a.source_hash
    nb.cells[2].source += " "
    nbformat.write(nb, tmp_path / "a.ipynb")
    assert read_experiment(tmp_path / "a.ipynb").source_hash != a.source_hash
    nb.cells[1].metadata = {}
    nbformat.write(nb, tmp_path / "a.ipynb")
    with pytest.raises(ValueError, match="a.ipynb has 0 cells tagged `parameters`; it needs one"):
        read_experiment(tmp_path / "a.ipynb")
    for text in ("", "[]", "{}", "half {"):
        (tmp_path / "c.ipynb").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="c.ipynb is not a notebook"): read_experiment(tmp_path / "c.ipynb")


def test_tidy(tmp_path):
    "Warnings, progress bars, home folders and papermill's notes go; results stay, in any script."
    output = lambda text, name="stdout": nbformat.v4.new_output("stream", text=text, name=name)
    nb = toy_notebook("seed = 0", "1")
    nb.metadata["papermill"] = dict(duration=3)
    nb.cells[2].outputs = [output("a warning", "stderr"), output(" 50%|###  | 1/2 [00:01, 1.0it/s]"),
                           output(f"{Path.home()}/data: Grüße\n")]
    nb.cells[2].metadata = dict(tags=["x"], papermill=dict(duration=1))
    nbformat.write(nb, tmp_path / "a.ipynb")
    tidy(tmp_path / "a.ipynb", str(tmp_path / "a.ipynb"))
    after = nbformat.read(tmp_path / "a.ipynb", 4)
    assert [o.text for o in after.cells[2].outputs] == ["~/data: Grüße\n"]
    assert "papermill" not in after.metadata and dict(after.cells[2].metadata) == dict(tags=["x"])
    assert [p.name for p in tmp_path.iterdir()] == ["a.ipynb"]


def test_notebook_html(tmp_path):
    nbformat.write(toy_notebook("seed = 0", "print('<b>')"), tmp_path / "a.ipynb")
    notebook_html(tmp_path / "a.ipynb", "Title <of> it")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "Title &lt;of&gt; it" in page and "<b>" not in page


def test_first_lines():
    assert first_lines("a\n\nb\n") == ["a", "b"]
    assert first_lines("\n".join(map(str, range(20)))) == [*map(str, range(10)), "...", "19"]


def test_without_times():
    "Columns and rows of times go, and nothing else: a batch is equal although it took longer."
    table = pd.DataFrame({"metric": ["balance", "seconds", "images/s"], "value": [1, 2, 3], "train_s": [4, 5, 6]})
    assert without_times(table).to_dict("list") == dict(metric=["balance"], value=[1])
    names = pd.DataFrame({"classes": [1], "steps": [2], "sometimes": [3]})
    assert list(without_times(names)) == ["classes", "steps", "sometimes"]
    assert Difference("a", "equal").is_equal and not Difference("a", "not run").is_equal


def test_broken_links(tmp_path):
    "Files, folders and anchors that are not there, and what a page would load from the network."
    (tmp_path / "sub").mkdir()
    there = '<h1 id="top">x</h1><a href="../a%20b.html#here">ok</a>'
    (tmp_path / "sub" / "index.html").write_text(there, encoding="utf-8")
    (tmp_path / "a b.html").write_text(
        '<p id="here"></p><a href="sub">ok</a><a href="sub/index.html#top">ok</a><a href="https://x.org">ok</a>'
        '<a href="sub/none.html">no</a><a href="sub/index.html#none">no</a><img src="https://x.org/a.png">',
        encoding="utf-8",
    )
    (tmp_path / "a.css").write_text("@import url('https://x.org/a.css');", encoding="utf-8")
    broken, seen = broken_links(tmp_path)
    assert seen == 5 and sorted(broken) == [
        "a b.html: loads https://x.org/a.png from the network",
        "a b.html: sub/index.html#none (no such anchor)",
        "a b.html: sub/none.html",
        "a.css: loads https://x.org/a.css from the network",
    ]


def test_readme_text(tmp_path):
    nb = toy_notebook("#| echo: true\nseed = 0", "#| hide\nsecret = 1")
    (tmp_path / "nbs").mkdir()
    nbformat.write(nb, tmp_path / "nbs" / "index.ipynb")
    text = readme_text(tmp_path / "nbs" / "index.ipynb")
    assert "made from nbs/index.ipynb" in text.splitlines()[0] and "```python\nseed = 0\n```" in text
    assert "secret" not in text and "#|" not in text


# stores and pools

def test_store_commands_in_process(tmp_path):
    "Exit status 0, 1 or 2 for fine, something lacking or wrong, and a wrong call."
    call = lambda *words: CliRunner().invoke(app, [*map(str, words)])
    images = torch.arange(4 * 2 * 3 * 4 * 4).remainder(251).to(torch.uint8).view(4, 2, 3, 4, 4)
    store = PairStore(tmp_path / "p", dict(kind="positive", classes=["cat", "dog"]))
    store.append([0, 1], images[:2])
    store.append([5, 6], images[2:])
    assert call("verify", tmp_path).exit_code == call("status", tmp_path).exit_code == 0
    assert call("status", tmp_path, "--seeds", 2).exit_code == 0
    lacking = call("status", tmp_path, "--seeds", 6)
    assert lacking.exit_code == 1 and "3 of 6 seeds missing, the first is 2" in lacking.output
    (tmp_path / "ids").write_text("5\nfive\n", encoding="utf-8")
    assert call("status", tmp_path, "--ids", tmp_path / "ids").exit_code == 2
    assert call("status", tmp_path, "--ids", tmp_path / "no such file").exit_code == 2
    (store.folder / store.index()[0]["file"]).write_bytes(b"")
    assert call("verify", tmp_path).exit_code == 1 and call("repair", tmp_path).exit_code == 0
    assert call("verify", tmp_path).exit_code == 0 and store.held([0, 1, 5, 6]) == [5, 6]


class MadeUp:
    "A generator whose name is all that is asked for."
    fingerprint = "made up"


def make(stores, prior, seeds, ids, classes, config, progress):
    "Fill stores with images that tell their seed image."
    for store in stores.values():
        for group in store.missing(ids, 4):
            images = torch.tensor(group).remainder(251).to(torch.uint8).view(-1, 1, 1, 1, 1)
            store.append(group, images.expand(-1, len(classes), 3, 2, 2))


def test_pools_are_filled_once(tmp_path):
    "What a pool lacks is asked for, and only that; a run over fewer seed images finds all it needs."
    asked = []
    def fill(r, data, folders, bars):
        asked.append(len(data.split.seed_index))
        return fill_with(MadeUp(), make, r, data, folders, bars)
    r = resolve(SPEC)
    data = run_data(r)
    folders = pool_folders(r, data, tmp_path)
    assert folders == {kind: pool_folder(r, kind, data, tmp_path) for kind in folders} and len({*folders.values()}) == 2
    ids = data.split.seed_index.tolist()
    stores = fill_pools(r, data, tmp_path, fill=fill)
    assert asked == [12] and all(sorted(s.held(ids)) == sorted(ids) for s in stores.values())
    pairs = read_pairs(r, data, tmp_path, fill=fill)
    assert asked == [12] and pairs.positives[:, 0, 0, 0, 0].tolist() == [i % 251 for i in ids]
    shard = next(folders["negative"].glob("*.safetensors"))
    shard.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="truncated or altered"): again = read_pairs(r, data, tmp_path, fill=fill)
    assert asked == [12, 12] and torch.equal(again.negatives, pairs.negatives)


@pytest.mark.parametrize("change, kinds", [
    (dict(pairs=dict(steps=3)), {"positive", "negative"}),
    (dict(pairs=dict(steps=2, guidance=2.0)), {"positive"}),
    (dict(seed=1), {"positive", "negative"}),
    (dict(seed=1, split_seed=0), set()),
    (dict(seed=1, n_pool=600), set()),
    (dict(train=dict(rounds=1)), set()),
    (dict(prior="elsewhere"), {"positive", "negative"}),
])
def test_pool_folder(tmp_path, monkeypatch, change, kinds):
    "A pool's name changes with what decides its images, and with nothing else."
    other = replace(SPEC, **{k: v for k, v in change.items() if k != "prior"})
    r, there = resolve(SPEC), resolve(other)
    if "prior" in change: monkeypatch.setattr(Resolved, "prior", property(lambda self: str(self is there)))
    data = run_data(r)
    differs = {k for k in ("positive", "negative")
               if pool_folder(r, k, data, tmp_path) != pool_folder(there, k, data, tmp_path)}
    assert differs == kinds


# results

def result(spec=SPEC):
    where = dict(seconds=dict(fit=1.5, pairs=2.0), code="old", device="a CPU")
    return RunResult(spec, spec_hash(spec), dict(running=dict(balance=50.0, new=float("nan"))), [], [], dict(n=3), where)


def test_conclude(tmp_path, monkeypatch):
    "What a notebook found, copies of its runs, and the mark, which is there only within a batch."
    one = result()
    write_result(tmp_path / "cache" / "runs" / f"{one.hash}.json", one)
    checks = [Check("more is better", np.bool_(True), "2 against 1"), Check("always", None, "not tested")]
    conclude("table_02", "Table 2", checks, tmp_path, dict(gap=1.0), ["a.png"], ["a.csv"], [one, one])
    held = json.loads((tmp_path / "results" / "table_02.json").read_text(encoding="utf-8"))
    assert held["runs"] == [one.hash] and held["run_seconds"] == 3.5 and held["stale"] == 1
    assert [c["outcome"] for c in held["checks"]] == ["holds", None] and held["numbers"] == dict(gap=1.0)
    assert read_result(tmp_path / "results" / "runs" / f"{one.hash}.json", SPEC).protocols["running"]["balance"] == 50
    assert not (tmp_path / "cache" / "done").exists()
    monkeypatch.setenv("UCDM_NOTEBOOK_KEY", "k")
    conclude("table_02", "Table 2", [], tmp_path)
    assert json.loads((tmp_path / "cache" / "done" / "table_02.json").read_text(encoding="utf-8")) == dict(key="k")


def test_result_of_another_run(tmp_path):
    write_result(tmp_path / "a.json", result())
    with pytest.raises(CorruptResult, match="holds the result of another run"):
        read_result(tmp_path / "a.json", replace(SPEC, seed=1))
    altered = (tmp_path / "a.json").read_text(encoding="utf-8").replace("50.0", "90.0")
    (tmp_path / "a.json").write_text(altered, encoding="utf-8")
    with pytest.raises(CorruptResult, match="was altered since it was written"): read_result(tmp_path / "a.json")


def test_checkpoint_of_a_run_that_was_killed(tmp_path):
    "Killed after its result was written and before its checkpoint was removed: the next call removes it."
    write_result(tmp_path / "runs" / f"{spec_hash(SPEC)}.json", result())
    left = [tmp_path / "partial" / f"{spec_hash(SPEC)}{end}" for end in ("", ".1234abcd.partial")]
    left[0].parent.mkdir()
    for file in left: file.write_bytes(b"a checkpoint")
    assert run(SPEC, tmp_path, progress=False).provenance == result().provenance
    assert not any(file.exists() for file in left)


def test_describe():
    words = describe(replace(SPEC, seed=3))
    assert words.startswith("ucdm, fashion-mnist") and "50% mismatch, seed 3 (steps=2)" in words


def test_is_packaged(tmp_path):
    assert is_packaged("fashion-mnist") and not is_packaged(str(tmp_path)) and not is_packaged("owner/small")


def test_register_problem(monkeypatch):
    monkeypatch.setattr("ucdm.runs.registry.PROBLEMS", dict(PROBLEMS))
    from ucdm.runs import registry
    added = registry.Problem("mine", *[lambda *args: {}] * 4)
    assert register_problem(added) is added and registry.PROBLEMS["mine"] is added and "mine" not in PROBLEMS


# images, classes and numbers

@pytest.mark.parametrize("images, got", [
    (torch.zeros(2, 3, 4, 4), r"torch.float32 \(2, 3, 4, 4\)"),
    (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), r"torch.uint8 \(2, 1, 4, 4\)"),
    (torch.zeros(3, 4, 4, dtype=torch.uint8), r"torch.uint8 \(3, 4, 4\)"),
    (np.zeros((2, 3, 4, 4), "uint8"), "ndarray"),
])
def test_check_images(images, got):
    with pytest.raises(ValueError, match=rf"seeds must be a uint8 tensor \[N, 3, H, W\], got {got}"):
        check_images(images, "seeds")
    check_images(torch.zeros(0, 3, 4, 4, dtype=torch.uint8))


def test_classes():
    assert name_list("a cat, a dog,\nno bird ") == ("a cat", "a dog", "no bird")
    split = consecutive(2, 3, 1)
    assert [list(part) for part in (split.known, split.unknown, split.new)] == [[0, 1], [2, 3, 4], [5]]
    table = table_classes("cifar10")
    assert table["classes"].tolist() == [2, 6, 2] and len(", ".join(table["class name"]).split(", ")) == 10


def test_best_two():
    "Ties as printed share a place; a column with one number has no winner."
    assert best_two(pd.Series([1.0, 3.04, 2.0, 3.01])).tolist() == ["", "best", "second", "best"]
    assert best_two(pd.Series([1.0, float("nan")])).tolist() == ["", ""]


def test_evaluate_with_curves():
    "The metrics are those of `evaluate`; a group that is missing is named."
    g = torch.Generator().manual_seed(0)
    groups = {name: (torch.randint(0, 256, (6, 3, 4, 4), generator=g, dtype=torch.uint8), torch.tensor(labels))
              for name, labels in dict(known=[0, 1] * 3, unknown=[2] * 6, new=[2] * 6).items()}
    def predict(images, batch_norm="running"):
        logits = images.float().flatten(1)[:, :3] / 100
        return logits[:, :2].softmax(1), logits.softmax(1)
    metrics, curves = evaluate_with_curves(predict, groups)
    assert metrics == evaluate(predict, groups) and curves
    del groups["new"]
    with pytest.raises(ValueError, match="test groups lack new"): evaluate_with_curves(predict, groups)


def test_advice(tmp_path):
    learner = SimpleNamespace(config=SimpleNamespace(lr=0.03, precision="bfloat16"))
    assert advice(learner, None) == 'Start anew with a learning rate below 0.03 or precision="float32"'
    (tmp_path / "c").touch()
    assert advice(learner, tmp_path / "c").startswith(f"The checkpoint {tmp_path / 'c'} is from before that. ")
    assert not advice(learner, tmp_path / "none").startswith("The checkpoint")


def test_own_evaluations():
    assert own_evaluations(resolve(SPEC), 12, 10, 2) == {}
    asks = resolve(RunSpec(method="diffusion_classifier", n_seeds=12, n_test=10, train=dict(draws=3)))
    assert sum(own_evaluations(asks, 12, 10, 2).values()) == 90


def test_fingerprints_tell_images_apart():
    "One bit, the order or the number of the images changes a set's fingerprint."
    images = torch.arange(4 * 3 * 2 * 2).to(torch.uint8).view(4, 3, 2, 2)
    whole = ImageSet(images, torch.tensor([0, 1, 0, 1]), ("a", "b"), "x")
    changed = images.clone()
    changed[3, 2, 1, 1] ^= 1
    others = [ImageSet(i, whole.labels[:len(i)], ("a", "b"), "x") for i in (changed, images.flip(0), images[:3])]
    hashes = [s.unlabelled().fingerprint for s in (whole, *others)]
    assert len({*hashes}) == 4 and whole.unlabelled().fingerprint == whole.unlabelled().fingerprint


def test_labels_behind_a_generator(tmp_path):
    "A generator says how many labelled images it learnt from; the classifier of the same images must agree."
    assert training_record(str(tmp_path)) == {} and labels_behind(RunSpec(prior=str(tmp_path))) == ""
    (tmp_path / "training.json").write_text('{"n_images": 9, "classes": ["T-shirt", "bag"]}', encoding="utf-8")
    some = RunSpec(prior=str(tmp_path), class_split="2/4/2")
    assert labels_behind(some).startswith("9 labelled images of 2 classes, ")
    judge = SimpleNamespace(record=dict(n_images=9), classes=("T-shirt", "bag"))
    check_same_images(judge, str(tmp_path))
    judge.record["n_images"] = 10
    with pytest.raises(ValueError, match="its n_images are 10, the generator's 9"):
        check_same_images(judge, str(tmp_path))
    with pytest.raises(ValueError, match="no classifier of the labelled images"):
        resolve(RunSpec(method="generators_labels", prior="owner/model"))
    with pytest.raises(ValueError, match="no classifier of the labelled images"):
        resolve(RunSpec(method="generators_labels", train=dict(judge=str(tmp_path))))
    specs, left_out = method_specs(some, ["generators_labels"], {})
    assert not specs and "needs a classifier" in left_out["generators_labels"]


def test_generators_labels_are_no_rival():
    assert rivals_of(["ucdm", "supervised", "generators_labels"]) == ["supervised"]
    logits = torch.tensor([[0.0, 3.0, 0.0]])
    merged = merge_others(logits, [2])
    assert torch.allclose(merged[:, 0], logits.softmax(1)[:, 2]) and torch.allclose(merged.sum(1), torch.ones(1))


def test_a_run_of_the_generators_labels(tmp_path):
    "No pairs, no labels of the unlabelled set, no training; another classifier is another result."
    spec = RunSpec(method="generators_labels", n_seeds=30, n_test=12)
    result = run(spec, tmp_path, progress=False)
    assert set(result.protocols) == {"running", "running+msp", "running+energy"}
    assert not any((tmp_path / "pairs").iterdir())
    assert result.seeds["labelled"] == 0 and result.metrics["balance"] > 50
    folder = tmp_path / "judge"
    judge = load_judge("fashion-mnist")
    judge.save(folder)
    assert spec_hash(spec) != spec_hash(replace(spec, train=dict(judge=str(folder))))
    changed = spec_hash(replace(spec, train=dict(judge=str(folder))))
    with torch.no_grad(): judge.model.closed_head.bias += 1
    judge.save(folder)
    assert spec_hash(replace(spec, train=dict(judge=str(folder)))) != changed
    assert own_evaluations(resolve(spec), 12, 10, 2) == {}
