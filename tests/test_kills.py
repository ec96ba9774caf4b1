"""SIGKILL at random moments, again and again: what is there in the end is what an undisturbed run leaves.

Half of the kills come at a random moment, half at a random change of a file (or a moment after), where there is most
to lose. UCDM_KILLS=20 kills each of the jobs so often.
"""
import faulthandler
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
import yaml
from processes import CONTEXT, kill_tree
from test_reproduce import notebook
from test_runs import same_to_rounding
from test_training import same_result, train

from ucdm.core.tensor_files import read_tensors
from ucdm.method.pair_store import inspect_store, PairStore
from ucdm.runs.spec import RunSpec

KILLS = int(os.environ.get("UCDM_KILLS", 3))
LIMIT = 240  # seconds for what takes ten
pytestmark = pytest.mark.timeout(600 + 60 * KILLS)
CHANGES = {"open", "os.rename", "os.link", "os.remove", "os.truncate", "os.mkdir", "os.rmdir"}
SEEDS = 24
SPEC = RunSpec(
    n_seeds=12,
    n_test=10,
    mismatch=0.5,
    pairs=dict(steps=1),
    train=dict(rounds=2, epochs_per_round=2, batch_size=4, depth=10, width=1, precision="float32"),
)


@pytest.fixture(scope="module", autouse=True)
def warm():
    "The imports, before anything is timed."
    process = CONTEXT.Process(target=time.time)
    process.start()
    process.join()


# what is killed: each works on a folder, whatever is there already

def generates(folder):
    "Twelve shards, as `python -m ucdm.method.generate` makes them."
    from ucdm.method import generate
    generate.images_per_shard = lambda batch_size, n_classes: 4
    words = ["fashion-mnist", "T-shirt", "trouser", "--store", folder, "--steps", "1", "--first", str(SEEDS)]
    generate.app([*words, "--batch-size", "8"], standalone_mode=False)


def trains(folder): train(Path(folder) / "run.ckpt")


def runs(folder):
    "Pairs, training and evaluation, with a checkpoint after each epoch and five shards."
    from ucdm.method import fit, generate
    from ucdm.runs.run import run
    generate.images_per_shard = lambda batch_size, n_classes: 3
    often, fit.train_ucdm = fit.train_ucdm, lambda *args, **kwargs: often(*args, **kwargs, checkpoint_every=0.0)
    run(SPEC, folder, progress=False)


def reproduces(folder):
    "`ucdm-reproduce` on the notebooks beside the folder."
    from ucdm.batch.cli import app
    home = Path(folder).parent / "nbs" / "experiments"
    sys.exit(app(["--notebooks", str(home), "--out", folder, "--jobs", "2"], standalone_mode=False))


# how

def die_at_change(folder, number, delay):
    "Kill this process before its change number `number` of files below a folder, or `delay` seconds after that."
    seen = count(1)
    def hook(event, args):
        if event not in CHANGES or not str(args[0]).startswith(folder): return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR): return
        now = next(seen)
        changes[0] = now
        if now != number: return
        if not delay: os.kill(os.getpid(), signal.SIGKILL)
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    changes = [0]
    sys.addaudithook(hook)
    return changes


def live(job, folder, number, delay):
    "The process that is killed: alone in its session, its output in a file."
    os.setsid()
    sink = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2): os.dup2(sink, stream)
    faulthandler.dump_traceback_later(LIMIT - 10, file=sink)  # where it hangs, if it does
    os.environ.update(OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    changes = die_at_change(folder, number, delay)
    status = 0
    try: job(folder)
    except SystemExit as e: status = e.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    Path(f"{folder}.changes").write_text(str(changes[0]), encoding="utf-8")
    sys.exit(status)


def start(job, folder, number=0, delay=0.0):
    process = CONTEXT.Process(target=live, args=(job, str(folder), number, delay))
    process.start()
    return process


def text(path): return Path(path).read_text(encoding="utf-8")
def log(folder): return text(f"{folder}.log")


def ends(process, folder):
    "Wait for a process; its exit status."
    process.join(LIMIT)
    if process.exitcode is None:
        kill_tree(process.pid)
        pytest.fail(f"it did not end within {LIMIT} s: {log(folder)}")
    return process.exitcode


def undisturbed(job, folder):
    "A folder, the seconds that it took and the changes of files."
    began = time.monotonic()
    assert ends(start(job, folder), folder) == 0, log(folder)
    seconds, changes = time.monotonic() - began, int(text(f"{folder}.changes"))
    return SimpleNamespace(folder=folder, seconds=seconds, changes=changes)


def disturbed(job, whole, seed, looks=lambda folder: None):
    """Folders in which a job was killed and started again until it ended; in all it was killed KILLS times.

    `looks(folder)` after each kill says what it is to see.
    """
    rng, killed, folder = random.Random(seed), [], None
    for n in count():
        if folder is None: folder = whole.folder.with_name(f"{whole.folder.name}-{n}")
        by_change = rng.random() < 0.5
        number, delay = rng.randint(1, whole.changes), rng.choice([0, 0, rng.expovariate(1000)])
        moment = rng.uniform(0, whole.seconds)
        by_change = by_change and len(killed) < KILLS
        process = start(job, folder, number if by_change else 0, delay)
        if not by_change and len(killed) < KILLS:
            process.join(moment)
            if process.exitcode is None: os.kill(process.pid, signal.SIGKILL)
        status = ends(process, folder)
        if status == -signal.SIGKILL:
            killed.append(f"change {number}, {delay:.4f} s" if by_change else f"{moment:.2f} s")
            looks(folder)
        else:
            assert status == 0, f"after kills at {killed}: {log(folder)}"
            yield folder
            if len(killed) == KILLS: break
            folder = None
    print(f"{job.__name__}: killed {len(killed)} times: {'; '.join(killed)}")


def files(folder):
    "The files below a folder but for what a killed writer may leave, locks, and notes of what was compared."
    found = (p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file())
    return [name for name in found if not name.endswith((".partial", "lock", ".wait", ".holder", "verified.json"))]


def same_pairs(here, there, alone):
    """Two stores hold the same shards, byte for byte; those that were made without the other kind to rounding, as the
    network saw other batches.
    """
    assert here.spec == there.spec and inspect_store(here).bad == []
    entries, others = ({tuple(e["ids"]): e for e in store.index()} for store in (here, there))
    assert entries.keys() == others.keys() and len(here.index()) == len(entries), "nothing is lost or there twice"
    for ids, e in entries.items():
        if e["sha256"] != others[ids]["sha256"]:
            assert ids in alone and same_to_rounding(here.read(e), there.read(others[ids])), ids


def shards_of(folder):
    "The stores below a folder, and what their indices name."
    stores = [PairStore(p.parent) for p in sorted(folder.rglob("spec.json"))]
    return {s.folder.relative_to(folder).as_posix(): [tuple(e["ids"]) for e in s.index()] for s in stores}


class Watched:
    "Looks at the stores of a folder after each kill: nothing that was there goes, no shard is bad."
    def __init__(self): self.seen, self.alone = {}, {}

    def __call__(self, folder):
        now, before = shards_of(folder), self.seen.get(folder, {})
        for name, ids in before.items(): assert now[name][:len(ids)] == ids, "what was written stays"
        for name in now: assert inspect_store(PairStore(folder / name)).bad == []
        self.seen[folder] = now
        indexed = [set(ids) for ids in now.values()] if len(now) == 2 else [set(), *map(set, now.values())]
        self.alone.setdefault(folder, set()).update(*([indexed[0] ^ indexed[1]] if now else []))


def test_generation(tmp_path):
    whole, watched = undisturbed(generates, tmp_path / "whole"), Watched()
    assert len(files(whole.folder)) == 2 * (2 + SEEDS // 4)
    for folder in disturbed(generates, whole, 1, watched):
        for kind in ("positive", "negative"):
            here, there = PairStore(folder / kind), PairStore(whole.folder / kind)
            same_pairs(here, there, watched.alone.get(folder, ()))
            assert here.index() == there.index() or watched.alone[folder]
            strays = {p.name for p in inspect_store(here).strays if p.suffix != ".partial"}
            assert not strays or watched.alone[folder], strays


def test_training(tmp_path):
    whole, steps = undisturbed(trains, tmp_path / "whole"), {}
    def looks(folder):
        path = folder / "run.ckpt"
        step = read_tensors(path)[1]["step"] if path.exists() else 0
        assert step >= steps.get(folder, 0), "what was kept stays"
        steps[folder] = step
    for folder in disturbed(trains, whole, 2, looks):
        same_result(folder / "run.ckpt", whole.folder / "run.ckpt")
        assert files(folder) == ["run.ckpt"]


def test_runs(tmp_path):
    whole, watched = undisturbed(runs, tmp_path / "whole"), Watched()
    def result(folder):
        path, = (folder / "runs").glob("*.json")
        return {k: v for k, v in json.loads(text(path)).items() if k not in ("provenance", "checksum")}
    for folder in disturbed(runs, whole, 3, watched):
        assert result(folder) == result(whole.folder)
        for name in shards_of(whole.folder):
            same_pairs(PairStore(folder / name), PairStore(whole.folder / name), watched.alone.get(folder, ()))
        assert [p.name for p in (folder / "partial").iterdir() if p.suffix != ".lock"] == [], "its checkpoint is removed"
        if not watched.alone.get(folder): assert files(folder) == files(whole.folder)


def test_batch(tmp_path):
    home = tmp_path / "nbs" / "experiments"
    (home / "profiles").mkdir(parents=True)
    (home / "profiles" / "quick.yml").write_text(yaml.safe_dump({}), encoding="utf-8")
    names = ["table_01", "table_02", "figure_03"]
    for name in names:
        nb = notebook(body=f"with open(f'{{out}}/tables/{name}.txt', 'w') as f: print(size ** 2, file=f)\nsize")
        nb.cells[-1].source = nb.cells[-1].source.replace("NAME", repr(name))
        nbformat.write(nb, home / f"{name}.ipynb")
    whole = undisturbed(reproduces, tmp_path / "whole")
    def outputs(folder, name):
        nb = nbformat.read(folder / "notebooks" / f"{name}.ipynb", 4)
        return [(c.source.replace(f"/{folder.name}\"", "/OUT\""), c.get("outputs")) for c in nb.cells]
    for folder in disturbed(reproduces, whole, 4):
        for name in names:
            assert outputs(folder, name) == outputs(whole.folder, name)
            for file in (f"results/{name}.json", f"tables/{name}.txt", f"cache/done/{name}.json"):
                assert text(folder / file) == text(whole.folder / file)
        jobs = [json.loads(text(f / "results" / "batch.json"))["jobs"] for f in (folder, whole.folder)]
        assert [{n: j["status"] for n, j in each.items()} for each in jobs] == [dict.fromkeys(names, "done")] * 2
        assert files(folder) == files(whole.folder)
