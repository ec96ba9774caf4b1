"""A real Ray cluster with simulated GPUs: two nodes of two cards each, on this machine."""
import importlib.util
import os
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_cluster import NODE

import ucdm

pytestmark = [
    pytest.mark.xdist_group("cluster"),
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'ucdm[cluster]'"
    ),
]
CARDS = dict(num_cpus=2, num_gpus=2, **NODE)
HERE = str(Path(ucdm.__file__).parent.parent)


def path_with(*folders):
    "A PYTHONPATH that begins with these folders."
    return os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])


@contextmanager
def gpu_cluster(folder, attempts=4):
    """A head that computes nothing, and two nodes of two cards.

    Ray adds the folder in which a driver stands to the paths of all workers, so this one stands elsewhere.
    """
    import ray
    from ray.cluster_utils import Cluster
    before, stood, cluster = dict(os.environ), os.getcwd(), None
    try:
        os.chdir(folder)
        os.environ.update(RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1", RAY_raylet_start_wait_time_s="120")
        os.environ["PYTHONPATH"] = path_with(HERE)
        for left in reversed(range(attempts)):
            cluster = Cluster()
            try:
                cluster.add_node(num_cpus=0, **NODE)
                for _ in range(2): cluster.add_node(**CARDS)
                break
            except (Exception, SystemExit):
                cluster.shutdown()
                if not left: raise
        os.environ["RAY_ADDRESS"] = cluster.address
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not see this file
        yield cluster
    finally:
        ray.shutdown()
        if cluster: cluster.shutdown()
        os.chdir(stood)
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with gpu_cluster(tmp_path_factory.mktemp("elsewhere")) as cluster: yield cluster


def on_card(seconds):
    """A task that says where it ran, and when: node, process, the card that CUDA would compute on (the one that the
    process saw when it first asked), the card that it was given.
    """
    import os
    import time

    import ray
    first = os.environ.setdefault("FIRST_CARD", os.environ["CUDA_VISIBLE_DEVICES"])
    began = time.time()
    time.sleep(seconds)
    return ray.get_runtime_context().get_node_id(), os.getpid(), first, str(ray.get_gpu_ids()[0]), began, time.time()


def test_a_process_keeps_its_card(cluster):
    """Shards and runs in turn, a few at a time: all are computed on the card that they were given, and no card has two
    processes.
    """
    from ucdm.runs.workers import run_tasks, workers
    kinds, there = ((lambda s: on_card(s)), (lambda s: on_card(s))), []
    began, rounds = time.monotonic(), 0
    cards_seen = lambda: len({(node, card) for node, _, card, *_ in there})
    with workers():
        while rounds < 8 or cards_seen() < 4 and time.monotonic() - began < 240: # a busy machine starts processes late
            tasks = [(i, (0.1 + 0.2 * ((i + rounds) % 3),)) for i in range(4)]
            there += [r for _, r in run_tasks(kinds[rounds % 2], tasks)]
            rounds += 1
    assert len(there) == 4 * rounds
    assert [first for _, _, first, _, _, _ in there] == [given for _, _, _, given, _, _ in there]
    cards = {}
    for node, process, card, *_ in there: cards.setdefault((node, card), set()).add(process)
    assert all(len(processes) == 1 for processes in cards.values()) and len(cards) == 4


def test_work_of_a_killed_worker(cluster, tmp_path):
    "A worker that is killed does not come back; another one does what it was doing, and what waited there."
    from ucdm.runs.workers import run_tasks

    def once(n):
        import os
        import signal
        if n == 3 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").write_text(str(os.getpid()), encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)
        return on_card(0.05)

    there = dict(run_tasks(once, [(n, (n,)) for n in range(12)], tmp_path, ahead=1))
    assert sorted(there) == list(range(12)) and all(t[2] == t[3] for t in there.values())
    assert there[3][1] != int((tmp_path / "killed").read_text(encoding="utf-8"))
    assert not list(tmp_path.glob(".seen-*"))


def test_what_is_tried_again(cluster, tmp_path):
    """A full disk: done on the other machine. No memory anywhere: tried three times, each time in another process. An
    error of the code: once. Everything else is done.
    """
    from ucdm.runs.workers import TRIES, run_tasks

    def task(kind):
        import os

        import ray
        node = ray.get_runtime_context().get_node_id()
        seen = list((tmp_path).glob(f"{kind} *"))
        (tmp_path / f"{kind} {os.getpid()} {len(seen)}").write_text(node, encoding="utf-8")
        if kind == "disk" and not seen: raise OSError(28, "No space left on device")
        if kind == "memory": raise MemoryError("no pair fits")
        if kind == "code": raise ValueError("the loss is not finite")
        return kind

    kinds = ["disk", "memory", "code", "a", "b", "c"]
    with pytest.warns(UserWarning, match="input or output failed .OSError: .*No space left.*; trying elsewhere"):
        there = dict(run_tasks(task, [(k, (k,)) for k in kinds], tmp_path))
    assert {k: there[k] for k in ("disk", "a", "b", "c")} == dict(disk="disk", a="a", b="b", c="c")
    assert isinstance(there["memory"], MemoryError) and isinstance(there["code"], ValueError)
    tried = {k: sorted(tmp_path.glob(f"{k} *")) for k in kinds}
    assert [len(tried[k]) for k in kinds] == [2, 1 + TRIES, 1, 1, 1, 1]
    assert len({f.read_text(encoding="utf-8") for f in tried["disk"]}) == 2 and len({f.name.split()[1] for f in tried["memory"]}) == 3


def test_machines_that_join(cluster, tmp_path):
    """While work goes on three machines of one card join: one as it should be, one with other code, one that does not
    see the folder. Only the first gets work; the others are named.
    """
    from ucdm.runs.workers import run_tasks, workers
    changed, blind = tmp_path / "changed", tmp_path / "blind"
    shutil.copytree(Path(ucdm.__file__).parent, changed / "ucdm", ignore=shutil.ignore_patterns("__pycache__"))
    with open(changed / "ucdm" / "core" / "files.py", "a", encoding="utf-8") as f: f.write("\nOTHER = 1\n")
    blind.mkdir()
    (blind / "sitecustomize.py").write_text(
        "import pathlib\nreal = pathlib.Path.exists\n"
        "pathlib.Path.exists = lambda self, **k: not self.name.startswith('.seen-') and real(self, **k)\n",
        encoding="utf-8",
    )
    added = []
    with workers(tmp_path) as crew, pytest.warns(UserWarning) as caught:
        before = {n["NodeID"] for n in crew.ray.nodes()}
        for first in ([changed], [blind, HERE], [HERE]):
            added.append(cluster.add_node(**CARDS | dict(num_gpus=1), env_vars=dict(PYTHONPATH=path_with(*first))))
        try:
            began, late = time.monotonic(), set()
            while time.monotonic() - began < 240 and not (late and len(crew.refused) == 2):
                late |= {r[0] for _, r in run_tasks(on_card, [(n, (0.3,)) for n in range(20)])} - before
            assert len(late) == 1 and len(crew.refused) == 2 and not late & crew.refused.keys()
        finally:
            for node in added: cluster.remove_node(node)
    said = " ".join(str(w.message) for w in caught)
    assert "has other code of ucdm than" in said and f"does not see {tmp_path}" in said
    assert said.count("This machine gets no work.") == 2
