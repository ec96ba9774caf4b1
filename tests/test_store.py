"""Stores of pairs from outside: two processes, commands, and training from images that stay on disk."""
import json
import os
import subprocess
import sys

import pytest
import torch
from processes import finish, read_until

from ucdm.method.mapped_images import MappedImages
from ucdm.method.pair_store import PairStore
from ucdm.runs import pools
from ucdm.runs.pools import pair_set
from ucdm.runs.run import run
from ucdm.runs.spec import RunSpec

SPEC = dict(kind="positive", classes=["cat", "dog"])
IMAGES = torch.arange(8 * 2 * 3 * 4 * 4).remainder(251).to(torch.uint8).view(8, 2, 3, 4, 4)

HOLDER = """
import sys, time
from ucdm.method.pair_store import PairStore
with PairStore(sys.argv[1]).lock():
    print("locked", flush=True)
    time.sleep(600)
"""


def command(*words):
    call = [sys.executable, "-m", "ucdm.method.store_commands", *map(str, words)]
    done = subprocess.run(call, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_second_writer(tmp_path):
    """While a process holds a store, others can read it, and learn which process holds it when they want to write.

    When it is killed the store is free.
    """
    store = PairStore(tmp_path, SPEC)
    store.append([0, 1, 2, 3], IMAGES[:4])
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        read_until(holder, lambda line: line == "locked\n")
        assert torch.equal(store.load([3, 0]), IMAGES[[3, 0]])
        status, printed = command("repair", tmp_path)
        assert status == 1 and f"process {holder.pid} on" in printed and "another process is writing" in printed
    finally:
        holder.kill()
        holder.wait()
    store.append([4, 5, 6, 7], IMAGES[4:])
    assert torch.equal(store.open(range(8))[:], IMAGES)


def test_commands(tmp_path):
    "verify finds a damaged shard and half a file, repair drops them, and what is missing is known."
    store = PairStore(tmp_path / "pairs" / "p", SPEC)
    for a in (0, 2, 4, 6): store.append([a, a + 1], IMAGES[a:a + 2])
    assert command("verify", tmp_path)[0] == 0
    bad = store.folder / store.index()[1]["file"]
    bad.write_bytes(bad.read_bytes()[:-1])
    (store.folder / "pairs-0000009-00000000.safetensors.partial").write_bytes(b"half")
    status, printed = command("verify", tmp_path)
    assert status == 1 and bad.name in printed and "does not name: 1" in printed
    assert command("repair", tmp_path)[0] == 0
    status, printed = command("status", tmp_path, "--seeds", "8")
    assert status == 1 and "2 of 8 seeds missing, the first is 2" in printed
    (tmp_path / "ids").write_text("7\n3\n6\n", encoding="utf-8")
    status, printed = command("status", tmp_path, "--ids", tmp_path / "ids")
    assert status == 1 and "1 of 3 seeds missing, the first is 3" in printed
    assert command("verify", tmp_path)[0] == 0 and not bad.exists()
    assert command("verify", tmp_path / "nothing")[0] == 2


def test_training_from_disk(tmp_path, monkeypatch, one_thread):
    """Pairs that are too large for memory are read batch by batch, and give the same classifier; a damaged shard among
    them is made again.
    """
    spec = RunSpec(
        n_seeds=12,
        n_test=10,
        mismatch=0.5,
        pairs=dict(steps=2),
        train=dict(rounds=2, epochs_per_round=2, batch_size=4, depth=10, width=1, precision="float32"),
    )
    in_memory = run(spec, tmp_path, progress=False)
    monkeypatch.setattr(pools, "LOAD_UP_TO", 0)
    shard = next((tmp_path / "pairs").rglob("*.safetensors"))
    shard.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="truncated or altered"): pairs = pair_set(spec, tmp_path)
    assert isinstance(pairs.positives, MappedImages) and isinstance(pairs.negatives, MappedImages)
    from_disk = run(spec, tmp_path, fresh=True, progress=False)
    assert from_disk.protocols == in_memory.protocols and from_disk.epochs == in_memory.epochs


def test_opened_at_the_same_time(tmp_path):
    "Several processes begin the same store at once."
    code = (
        "import sys, time, json; from ucdm.method.pair_store import PairStore\nfor i in range(200):\n    while time.time() "
        "% 0.05 > 0.01: pass\n    PairStore(f'{sys.argv[1]}/{i}', dict(kind='positive'))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for _ in range(3)
    ]
    printed = [finish(p)[1] for p in processes]
    assert not any(p.returncode for p in processes), printed
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["spec.json"] * 200


def test_begun_with_different_specifications(tmp_path):
    "Of two processes that begin a store at once for different pairs, one goes on and the other gets an error."
    code = (
        "import sys, time, json; from ucdm.method.pair_store import PairStore\nfor i in range(100):\n    while time.time() "
        "% 0.05 > 0.01: pass\n    try: PairStore(f'{sys.argv[1]}/{i}', dict(kind=sys.argv[2])); print(i)\n    "
        "except ValueError as e: assert 'another specification' in str(e), e"
    )
    processes = {
        kind: subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), kind],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for kind in ("positive", "negative")
    }
    for kind, p in processes.items():
        won = finish(p)[0].split()
        assert p.returncode == 0
        assert [i for i in won if json.loads((tmp_path / i / "spec.json").read_bytes()) != dict(kind=kind)] == []
    assert len(list(tmp_path.iterdir())) == 100
