"""Stores of pairs from outside: two processes, commands, and training from images that stay on disk."""
import errno
import hashlib
import json
import os
from unittest.mock import patch

import pytest
import torch
from processes import finish, python, ran, read_until
from safetensors.torch import save
from typer.testing import CliRunner

from ucdm.method.mapped_images import MappedImages
from ucdm.method.pair_store import PairStore
from ucdm.method.store_commands import app
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
    done = ran("-m", "ucdm.method.store_commands", *words)
    return done.returncode, done.stdout + done.stderr


def test_second_writer(tmp_path):
    """While a process holds a store, others can read it, and learn which process holds it when they want to write.

    When it is killed the store is free.
    """
    store = PairStore(tmp_path, SPEC)
    store.append([0, 1, 2, 3], IMAGES[:4])
    holder = python("-c", HOLDER, tmp_path)
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
    assert inside("repair", tmp_path)[0] == 0
    status, printed = inside("status", tmp_path, "--seeds", "8")
    assert status == 1 and "2 of 8 seeds missing, the first is 2" in printed
    (tmp_path / "ids").write_text("7\n3\n6\n", encoding="utf-8")
    status, printed = inside("status", tmp_path, "--ids", tmp_path / "ids")
    assert status == 1 and "1 of 3 seeds missing, the first is 3" in printed
    assert inside("verify", tmp_path)[0] == 0 and not bad.exists()
    assert inside("verify", tmp_path / "nothing")[0] == 2


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
    processes = [python("-c", code, tmp_path) for _ in range(3)]
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
        kind: python("-c", code, tmp_path, kind) for kind in ("positive", "negative")
    }
    for kind, p in processes.items():
        won = finish(p)[0].split()
        assert p.returncode == 0
        assert [i for i in won if json.loads((tmp_path / i / "spec.json").read_bytes()) != dict(kind=kind)] == []
    assert len(list(tmp_path.iterdir())) == 100


def inside(*words):
    "A command, without the time that a new process takes."
    done = CliRunner().invoke(app, list(map(str, words)))
    return done.exit_code, done.output


def filled(folder, size=2):
    "A store with eight seed images."
    store = PairStore(folder, SPEC)
    for a in range(0, 8, size): store.append(range(a, a + size), IMAGES[a:a + size])
    return store


def aged(store):
    "Shards that were written long ago."
    for p in store.folder.rglob("pairs-*"): os.utime(p, (1e9, 1e9))


@pytest.mark.parametrize("name", ["../precious.txt", "{here}/precious.txt", "notes/precious.txt", "link/precious.txt",
                                  "../pairs-0000008-01234567.safetensors", "link/pairs-0000008-01234567.safetensors",
                                  "spec.json", "writers/../../precious.txt"])
def test_index_names_foreign_file(tmp_path, name):
    "A line that names a file of somebody else is a damaged line; no repair touches the file."
    store = filled(tmp_path / "store")
    (store.folder / "notes").mkdir()
    (store.folder / "link").symlink_to(tmp_path)
    files = [tmp_path / "precious.txt", tmp_path / "pairs-0000008-01234567.safetensors", store.folder / "notes/precious.txt"]
    for f in files: f.write_bytes(b"mine")
    line = dict(ids=[8], file=name.format(here=tmp_path), sha256="0" * 64, bytes=4)
    with open(store.index_file, "a", encoding="utf-8") as f: f.write(json.dumps(line) + "\n")
    status, printed = inside("verify", tmp_path / "store")
    assert status == 1 and "damaged lines in the index: 1" in printed
    assert PairStore(store.folder).repair() == [] and inside("repair", tmp_path / "store")[0] == 0
    assert [f.read_bytes() for f in files] == [b"mine"] * 3 and (store.folder / "spec.json").exists()
    assert inside("verify", tmp_path / "store")[0] == 0
    assert torch.equal(PairStore(store.folder).load(range(8)), IMAGES)


def test_shard_behind_a_link(tmp_path):
    "A numbered folder that is a link to somewhere else does not belong to the store."
    store = filled(tmp_path / "store")
    (tmp_path / "elsewhere").mkdir()
    (store.folder / "0001").symlink_to(tmp_path / "elsewhere")
    mine = tmp_path / "elsewhere" / "pairs-0000008-01234567.safetensors"
    mine.write_bytes(b"mine")
    line = dict(ids=[8], file=f"0001/{mine.name}", sha256="0" * 64)
    with open(store.index_file, "a", encoding="utf-8") as f: f.write(json.dumps(line) + "\n")
    assert inside("repair", store.folder)[0] == 0 and mine.read_bytes() == b"mine"


def test_repair_by_itself_deletes_nothing(tmp_path):
    "What runs without being asked drops a bad shard from the index; only the command deletes."
    store = filled(tmp_path)
    bad = store.folder / store.index()[1]["file"]
    bad.write_bytes(b"damaged")
    (tmp_path / "pairs-0000009-00000000.safetensors.01234567.partial").write_bytes(b"half")
    before = sorted(tmp_path.rglob("pairs-*"))
    assert [e["ids"] for e in store.repair()] == [[2, 3]] and sorted(tmp_path.rglob("pairs-*")) == before
    store.append([2, 3], IMAGES[2:4])
    assert torch.equal(store.load(range(8)), IMAGES) and inside("repair", tmp_path)[0] == 0
    assert len(list(tmp_path.rglob("pairs-*"))) == 4 and torch.equal(store.load(range(8)), IMAGES)


@pytest.mark.parametrize("spec", ["", "{\"kind\": ", "[]", None, b"\xe9\0"])
@pytest.mark.parametrize("index", ["garbage\n", "", "\0" * 100 + "\n", '{"ids": [0, 1]}\n', b"\xe9\n", "[" * 9999 + "\n"])
def test_index_and_specification_from_shards(tmp_path, spec, index):
    "A damaged or lost index, and a damaged or lost specification, are made again from the shards."
    store = filled(tmp_path)
    for file, content in ((store.index_file, index), (tmp_path / "spec.json", spec)):
        if content is None: file.unlink()
        else: file.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, printed = inside("verify", tmp_path)
    assert status == 1 and "spec.json lost or damaged" in printed, printed
    assert inside("repair", tmp_path)[0] == 0
    assert PairStore(tmp_path).spec == SPEC and torch.equal(PairStore(tmp_path).load(range(8)), IMAGES)
    assert inside("verify", tmp_path)[0] == 0


def test_lost_index_file(tmp_path):
    "Without an index, the specification still tells that this is a store."
    store = filled(tmp_path)
    store.index_file.unlink()
    assert inside("verify", tmp_path)[0] == 1 and inside("repair", tmp_path)[0] == 0
    assert torch.equal(PairStore(tmp_path).load(range(8)), IMAGES)


def test_damaged_index_costs_nothing(tmp_path):
    "A process that goes on generating enters what is there again, without being asked to repair."
    store = filled(tmp_path)
    lines = store.index_file.read_text(encoding="utf-8").splitlines(keepends=True)
    store.index_file.write_text(lines[0] + "x" + lines[1][5:] + lines[2], encoding="utf-8")
    (tmp_path / "spec.json").write_text("", encoding="utf-8")
    again = PairStore(tmp_path, SPEC)
    with pytest.warns(UserWarning, match="2 shards were entered again"), again.lock():
        assert again.missing(range(8), 2) == []
    assert torch.equal(PairStore(tmp_path, SPEC).load(range(8)), IMAGES)


def test_store_of_an_older_version(tmp_path):
    "Shards without a specification, and lines without sizes."
    for a in range(0, 8, 4):
        content = save({"images": IMAGES[a:a + 4]}, {"ids": json.dumps(list(range(a, a + 4)))})
        sha256 = hashlib.sha256(content).hexdigest()
        name = f"pairs-{a:07d}-{sha256[:8]}.safetensors"
        (tmp_path / name).write_bytes(content)
        with open(tmp_path / "index.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(dict(ids=list(range(a, a + 4)), file=name, sha256=sha256)) + "\n")
    (tmp_path / "spec.json").write_text(json.dumps(SPEC), encoding="utf-8")
    store, before = PairStore(tmp_path, SPEC), (tmp_path / "index.jsonl").read_bytes()
    assert torch.equal(store.load(range(8)), IMAGES) and inside("verify", tmp_path)[0] == 0
    with store.lock(): store.append([8], IMAGES[:1])
    assert (tmp_path / "index.jsonl").read_bytes().startswith(before)
    (tmp_path / "index.jsonl").unlink()
    assert inside("repair", tmp_path)[0] == 0 and torch.equal(PairStore(tmp_path, SPEC).load(range(8)), IMAGES)


NO_LOCKS = OSError(errno.ENOLCK, "No locks available")


def test_no_locks(tmp_path, monkeypatch):
    "A file system without locks is not taken for another process; one writer may say that it is alone."
    store = filled(tmp_path)
    with patch("fcntl.flock", side_effect=NO_LOCKS):
        with pytest.raises(OSError, match="this file system has no locks .*UCDM_ONE_WRITER=1.*a part of its own"):
            store.append([8], IMAGES[:1])
        assert torch.equal(store.load(range(8)), IMAGES) # reading needs none
        monkeypatch.setenv("UCDM_ONE_WRITER", "1")
        store.append([8], IMAGES[:1])
    assert store.held([8]) == [8]


WRITER = """
import errno, sys, torch
from unittest.mock import patch
from ucdm.method.pair_store import PairStore
first, last = map(int, sys.argv[2:])
with patch("fcntl.flock", side_effect=OSError(errno.ENOLCK, "No locks available")):
    part = PairStore(sys.argv[1]).writer()
    with part.lock():
        for i in range(first, last): part.append([i], torch.full((1, 2, 3, 4, 4), i, dtype=torch.uint8))
"""


def test_several_writers_without_locks(tmp_path):
    "Each process writes to a part of its own; together they are one store."
    store = PairStore(tmp_path, SPEC)
    writers = [python("-c", WRITER, tmp_path, a, a + 20) for a in (0, 20, 40)]
    for w in writers: finish(w)
    assert [w.returncode for w in writers] == [0] * 3
    assert store.load(range(60))[:, 0, 0, 0, 0].tolist() == list(range(60))
    status, printed = inside("verify", tmp_path)
    assert status == 0 and "60 shards checked" in printed
    assert inside("repair", tmp_path)[0] == 0 and inside("merge", tmp_path)[0] == 0
    assert len(list((tmp_path / "writers").iterdir())) == 3


def test_merging(tmp_path, monkeypatch):
    "In the end of filling, small shards become large ones; the images and who reads them do not notice."
    from ucdm.method import pair_store
    monkeypatch.setattr(pair_store, "A_FOLDER", 3)
    store = filled(tmp_path, size=1)
    assert (tmp_path / "0002").is_dir() and max(len(list(d.glob("pairs-*"))) for d in (tmp_path, tmp_path / "0001")) <= 3
    reader, other = store.open(range(8)), PairStore(tmp_path).open([5, 1])
    size = store.index()[0]["bytes"]
    monkeypatch.setattr(PairStore.merge, "__defaults__", (2 * size, 2))
    with store.lock(): pass
    assert [e["ids"] for e in store.index()] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert torch.equal(reader[:], IMAGES) and torch.equal(other[:], IMAGES[[5, 1]])
    assert torch.equal(PairStore(tmp_path).load(range(8)), IMAGES) and inside("verify", tmp_path)[0] == 0
    assert len(list(tmp_path.rglob("pairs-*"))) == 4


@pytest.mark.parametrize("at", ["remove_file", "Index.rewrite"])
def test_killed_while_merging(tmp_path, at):
    "Whether the index names the old shards or the new ones: nothing is lost, and the others are taken away."
    from ucdm.method import pair_index, pair_store
    store = filled(tmp_path, size=1)
    owner, name = (pair_index.Index, "rewrite") if at == "Index.rewrite" else (pair_store, at)
    with patch.object(owner, name, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt): store.merge(2000)
    again = PairStore(tmp_path)
    assert torch.equal(again.load(range(8)), IMAGES) and again.missing(range(8), 4) == []
    assert inside("repair", tmp_path)[0] == 0 and inside("verify", tmp_path)[0] == 0
    assert torch.equal(PairStore(tmp_path).load(range(8)), IMAGES)
    assert len(list(tmp_path.rglob("pairs-*"))) == len(PairStore(tmp_path).index())


def test_compared_once(tmp_path):
    "A process that opens a store after another one does not hash it again, unless a file was changed."
    store = filled(tmp_path)
    aged(store)
    store.open(range(8)).check()
    with patch.object(PairStore, "_checked", side_effect=AssertionError("compared again")):
        assert torch.equal(PairStore(tmp_path).open(range(8)).check()[:], IMAGES)
    shard = store.folder / store.index()[2]["file"]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0") # as long as before
    with pytest.raises(ValueError, match="truncated or altered"): PairStore(tmp_path).open(range(8)).check()


def test_few_maps(tmp_path, monkeypatch):
    "However many shards are touched, only the last few stay open."
    from ucdm.method import mapped_images
    monkeypatch.setattr(mapped_images, "OPEN_MAPS", 2)
    mapped = filled(tmp_path, size=1).open(range(8))
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        items = torch.randint(8, (5,), generator=g)
        assert torch.equal(mapped[items], IMAGES[items]) and len(mapped._open) <= 2


def test_a_million_ids(tmp_path):
    "Ids of 63 bits; the second process reads arrays instead of lines, and what was added since."
    from ucdm.method import pair_index
    ids = torch.randint(2**62, 2**63 - 1, (1_000_000,), generator=torch.Generator().manual_seed(0)).tolist()
    line = lambda g: json.dumps(dict(ids=g, file=f"pairs-{g[0]:07d}-01234567.safetensors", sha256="0" * 64)) + "\n"
    file = tmp_path / "index.jsonl"
    file.write_text("".join(line(ids[a:a + 1000]) for a in range(0, len(ids), 1000)), encoding="utf-8")
    pair_index.Index(file).refresh().keep()
    with open(file, "a", encoding="utf-8") as f: f.write(line([7, 8]))
    with patch.object(pair_index, "read_entry", wraps=pair_index.read_entry) as read:
        index = pair_index.Index(file).refresh()
    assert read.call_count == 1 and len(index.place) == len({*ids}) + 2
    assert index.place[ids[123_456]] == (123, 456) and index.place[8] == (1000, 1)
    store = PairStore(tmp_path / "store", SPEC)
    store.append(ids[:8], IMAGES)
    assert torch.equal(store.load(ids[7::-1]), IMAGES.flip(0)) and torch.equal(store.open(ids[:8])[:], IMAGES)


def test_pairs_that_do_not_fit(tmp_path):
    "Where a device has too little memory, batches are copied there as they are drawn."
    from ucdm.method import mapped_images
    mapped = filled(tmp_path).open(range(8))
    free = lambda n: patch.object(mapped_images, "free_memory", return_value=n)
    with free(4 * IMAGES.numel()): assert isinstance(mapped.to("meta"), torch.Tensor)
    with free(3 * IMAGES.numel()): streamed = mapped.to("meta")
    assert isinstance(streamed, MappedImages) and streamed[[3, 1]].device.type == "meta"
    assert torch.equal(mapped.to("cpu", most=IMAGES.numel()), IMAGES)
    assert torch.equal(mapped.to("cpu", most=0)[torch.tensor([3, 1])], IMAGES[[3, 1]])
