"""A real Ray cluster of several nodes on this machine: shards of pairs and runs, with a node killed in the middle."""
import importlib.util
import os
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace

import pytest
import torch
from test_reproduce import arguments, notebook, project  # noqa: F401 (a fixture)

from ucdm.data.datasets import load_dataset
from ucdm.method.batch_size import BATCH_LIMIT
from ucdm.method.generate import pair_stores
from ucdm.method.pairs import KINDS, PairConfig
from ucdm.runs.spec import RunSpec, grid
from ucdm.runs.identity import resolve
from ucdm.runs.pools import pool_folders, run_data
from ucdm.runs.ray_engine import RayEngine
from ucdm.runs.many import run_many
from ucdm.runs.workers import workers
from ucdm.method.pair_store import PairStore, inspect_store

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'ucdm[cluster]'"
)
pytestmark = pytest.mark.xdist_group("cluster")  # one cluster for all of them
SPEC = RunSpec(
    n_seeds=12,
    n_test=10,
    mismatch=0.5,
    pairs=dict(steps=2),
    train=dict(rounds=2, epochs_per_round=2, batch_size=4, depth=10, width=1, precision="float32"),
)
NODE = dict(include_dashboard=False, object_store_memory=100_000_000)


def start_cluster(attempts=4):
    """A head that computes nothing, and two nodes of one core each.

    Ray gives a node 30 seconds to appear, which a busy machine can miss: then once more.
    """
    from ray.cluster_utils import Cluster
    for left in reversed(range(attempts)):
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=0, **NODE)
            cluster.workers = [cluster.add_node(num_cpus=1, **NODE) for _ in range(2)]
            return cluster
        except (Exception, SystemExit):
            cluster.shutdown()
            if not left: raise


@pytest.fixture(scope="module")
def cluster():
    "Started for all tests of this file. Its workers have one thread each."
    before = dict(os.environ)
    threads, cluster = torch.get_num_threads(), None
    try:
        os.environ.update(RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")
        cluster = start_cluster()
        os.environ["RAY_ADDRESS"] = cluster.address
        torch.set_num_threads(1)
        yield cluster
    finally:
        import ray
        ray.shutdown()
        if cluster: cluster.shutdown()
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(before)


def kill_one_when(cluster, condition):
    "Kill a node, as a power cut would, as soon as something is true; none if that takes minutes."
    killed = []
    def wait():
        deadline = time.monotonic() + 240
        while not condition():
            if time.monotonic() > deadline: return
            time.sleep(0.02)
        cluster.remove_node(victim, allow_graceful=False)
        killed.append(victim)
    victim = cluster.workers.pop(0)
    thread = threading.Thread(target=wait)
    thread.start()
    return thread, killed


@needs_ray
def test_node_lost_while_generating(cluster, tmp_path):
    """One of two nodes is killed after the first shard has arrived.

    Every seed is there once, and every image is what one worker alone makes.
    """
    import ray

    from ucdm.runs import ray_engine as c
    from ucdm.runs.cluster import check_cluster
    line = check_cluster(tmp_path)
    assert line.startswith("2 machines with 2 cores")
    ids, classes, config = list(range(0, 7200, 300)), ("T-shirt", "trouser"), PairConfig(steps=2)
    seeds = load_dataset("fashion-mnist", "train")[torch.tensor(ids)].unlabelled()
    prior = c.remote_prior(SPEC)
    assert prior.batch_size == BATCH_LIMIT["cpu"]
    stores = pair_stores({kind: tmp_path / kind for kind in KINDS}, prior.fingerprint, "embedded", classes, config, ids)
    thread, killed = kill_one_when(
        cluster,
        lambda: len(PairStore(tmp_path / "negative").index()) >= 1 and ray.available_resources().get("CPU", 0) == 0,
    )
    c.fill_stores(stores, prior, seeds, ids, classes, config, shard_size=2)
    there = [len(s.index()) for s in stores.values()]
    thread.join()
    assert killed and there == [12, 12]
    where = {i: n for n, i in enumerate(ids)}
    for kind, store in stores.items():
        assert sorted(i for e in store.index() for i in e["ids"]) == ids and inspect_store(store).fine
        for e in store.index()[::3]:
            here = c.make_shard(
                SPEC,
                prior.fingerprint,
                seeds.images[[where[i] for i in e["ids"]]].numpy(),
                e["ids"],
                e["ids"],
                KINDS,
                classes,
                prior.batch_size,
                False,
            )
            assert torch.equal(torch.from_numpy(here[kind]), store.read(e))
    cluster.workers.append(cluster.add_node(num_cpus=1, **NODE))


@needs_ray
def test_node_lost_while_running(cluster, tmp_path):
    """Two runs share their pairs; a node is killed while both train.

    Both results arrive, and are those of a single machine.
    """
    specs = grid(replace(SPEC, split_seed=0, train=SPEC.train | dict(epochs_per_round=60)), seed=[0, 1])
    count = lambda pattern: len(list(tmp_path.glob(pattern)))
    thread, killed = kill_one_when(cluster, lambda: count("partial/*.lock") == 2 and not count("runs/*.json"))
    there = run_many(specs, tmp_path, RayEngine(), progress=False)
    thread.join()
    assert killed and [r.spec.seed for r in there] == [0, 1]
    # kept in the same cache
    assert [r.provenance["started"] for r in run_many(specs, tmp_path, progress=False)] == [
        r.provenance["started"] for r in there
    ]
    r = resolve(SPEC)
    data = run_data(r)
    for pool in pool_folders(r, data, tmp_path).values():
        index = PairStore(pool).index()
        assert sorted(i for e in index for i in e["ids"]) == sorted(data.split.seed_index.tolist())
    here = run_many(specs[:1], tmp_path, fresh=True, progress=False)
    assert here[0].protocols == there[0].protocols and here[0].epochs == there[0].epochs


@needs_ray
def test_warnings_of_workers(cluster):
    "What a worker warns of is said by the process that gave it the task."
    from ucdm.runs import ray_engine as c
    with pytest.warns(UserWarning, match="out of memory with 64 pairs in a batch"):
        assert list(
            c.run_tasks(
                warnings.warn, iter([("a task", ("out of memory with 64 pairs in a batch; going on with 32.",))])
            )
        ) == [("a task", None)]


@needs_ray
def test_a_failed_shard_stops_no_other(cluster, tmp_path, monkeypatch):
    "One of four shards cannot be made: the others are stored, the failed one is named, and tried again the next time."
    from ucdm.runs import ray_engine as c
    make = c.make_shard

    def broken(*args):
        if 600 in args[3]: raise ValueError("the shard is not finite")
        return make(*args)

    ids, classes, config = list(range(0, 2400, 300)), ("T-shirt", "trouser"), PairConfig(steps=2)
    seeds = load_dataset("fashion-mnist", "train")[torch.tensor(ids)].unlabelled()
    with workers(tmp_path):
        prior = c.remote_prior(SPEC)
        stores = pair_stores({k: tmp_path / k for k in KINDS}, prior.fingerprint, "embedded", classes, config, ids)
        fill = lambda: c.fill_stores(stores, prior, seeds, ids, classes, config, shard_size=2)
        with monkeypatch.context() as m:
            m.setattr(c, "make_shard", broken)
            with pytest.raises(c.ShardsFailed, match=r"1 of 4 shards failed.*\n  seed images 600 to 900: ValueError: .*"):
                fill()
        assert [sorted(i for e in s.index() for i in e["ids"]) for s in stores.values()] == [ids[:2] + ids[4:]] * 2
        fill()
    assert [sorted(i for e in s.index() for i in e["ids"]) for s in stores.values()] == [ids] * 2


@needs_ray
def test_no_token_travels(cluster, monkeypatch):
    "A worker learns where the hub's files are, not the token of this process."
    from ucdm.runs.workers import run_tasks
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "7")
    there = lambda: {k: v for k, v in __import__("os").environ.items() if k.startswith("HF_")}
    (_, told), = run_tasks(there, [("a task", ())])
    assert told.get("HF_HUB_ETAG_TIMEOUT") == "7" and "hf_secret" not in told.values()


@needs_ray
def test_batch_on_a_cluster(cluster, project):  # noqa: F811
    """`ucdm-reproduce --engine ray --address`: the runs of a notebook are computed by the cluster, and kept in the
    cache of the batch.
    """
    spec = replace(SPEC, n_seeds=4, train=SPEC.train | dict(rounds=1, epochs_per_round=1))
    body = (
        "import ray\nfrom ucdm.batch.engines import chosen_engine\nfrom ucdm.runs.many import run_many\n"
        f"from ucdm.runs.spec import RunSpec\nrun_many([{spec!r}], f'{{out}}/cache', chosen_engine(), progress=False)\n"
        "assert len(ray.nodes()) >= 3"
    )
    folder = project(table_01=notebook(body=body))
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "UCDM_ENGINE")}
    done = subprocess.run(
        [*arguments(folder), "--engine", "ray", "--address", cluster.address],
        capture_output=True,
        text=True,
        timeout=600,
        env=env,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a task takes 1 and 0" in done.stdout and "table_01  done" in done.stdout
    assert len(list((folder / "out" / "cache" / "runs").glob("*.json"))) == 1


@needs_ray
def test_errors_of_the_code_are_not_repeated(cluster, tmp_path):
    """A run that fails on a worker is named with its own error; a cluster that cannot be reached, or cannot run a
    task, is said at once.
    """
    from ucdm.runs.cluster import check_cluster
    with pytest.raises(
        RuntimeError,
        match=r"1 of 1 runs failed.*\n.*ValueError: .*UASD holds 2 labelled images of each class out of training",
    ):
        run_many(
            [RunSpec(method="uasd", n_seeds=12, n_test=10, train=dict(labels_per_class=2, held_out=2))],
            tmp_path,
            RayEngine(),
            progress=False,
        )
    with (
        pytest.raises(ValueError, match="no machine of the cluster has 1 cores and 8 GPUs"),
        pytest.MonkeyPatch.context() as m,
    ):
        m.setenv("UCDM_TASK_GPUS", "8")
        check_cluster(tmp_path)


def test_engine_without_a_cluster(tmp_path):
    "The command line says what is missing: Ray, or a cluster."
    env = os.environ | dict(RAY_ADDRESS="", UCDM_ENGINE="")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ucdm.batch.cli",
            "--profile",
            "smoke",
            "--only",
            "table_11",
            "--engine",
            "ray",
            "--address",
            "127.0.0.1:1",
            "--out",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert "no Ray cluster at '127.0.0.1:1'" in done.stderr or "Ray is not installed" in done.stderr
