"""Loading images: every layout a local copy may have, and everything that may be wrong with it."""
import gzip
import json
import pickle
import shutil
import struct
import threading
import time
import urllib.error
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image

from ucdm.data import datasets, embedded
from ucdm.data.class_names import CLASSES
from ucdm.data.datasets import MEDIAN_HASHES, TINY_MD5, TINY_URL, halve, load_dataset, pixel_hash
from ucdm.data.folder import image_files, load_image_folder, load_unlabelled
from ucdm.data.images import ImageSet, class_id
from ucdm.data.parquet import load_parquet
from ucdm.data.splits import MISMATCHES, cdm_split


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    "An empty data folder; a test that tries to download fails."
    monkeypatch.setenv("UCDM_DATA", str(tmp_path / "data"))
    def refuse(*args, **kwargs): raise AssertionError(f"tried to download: {args} {kwargs}")
    for module in (torchvision.datasets.utils, torchvision.datasets.cifar, torchvision.datasets.mnist):
        monkeypatch.setattr(module, "download_and_extract_archive", refuse)


def colour(
    i, size=(32, 32)
): # an image that tells its number: flat, so that neither resizing nor JPEG changes it by more than a little
    return Image.new("RGB", size, (i * 20, 255 - i * 20, 100))


def numbers(images): # the inverse of `colour`
    return (images[:, 0].float().mean((1, 2)) / 20).round().int().tolist()


def save(path, i, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    colour(i, size).save(path, "JPEG" if path.suffix == ".JPEG" else None)
    return path


def encoded(tmp_path, i):
    return save(tmp_path / "encoded" / f"{i}.png", i).read_bytes()


def parquet(path, images, labels, names=None, columns=("image", "label")):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({columns[0]: pa.array(images), columns[1]: labels})
    if names:
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": {columns[1]: {"names": names, "_type": "ClassLabel"}}}})}
        )
    pq.write_table(table, path)


# the embedded data set

def test_embedded():
    "The vendored files are the ones that every published number was made with."
    train, test = load_dataset("fashion-mnist"), load_dataset("fashion-mnist", "test")
    assert train.fingerprint[:12] == "56a7a165b2b9"
    assert test.fingerprint[:12] == "d8027d3f7021"
    assert set(train.counts().values()) == {800} and set(test.counts().values()) == {300}
    assert not train.images[:, :, :2].any() and torch.equal(train.images[:, 0], train.images[:, 2])
    for split, images in (("train", train), ("test", test)):
        rows = embedded.embedded_indices(split)
        assert len(rows) == len(images) and (rows.diff() > 0).all()


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_build_embedded(tmp_path, monkeypatch):
    """From official files, here small ones of noise, to parquet files that load as what they were, with rows of the
    rule.
    """
    rng, source, official = np.random.default_rng(0), tmp_path / "official", {}
    source.mkdir()
    for file, n in (("train", 60), ("t10k", 30)):
        official[file] = (
            rng.integers(0, 256, (n, 28, 28), dtype=np.uint8),
            rng.permutation(np.arange(n) % 10).astype(np.uint8),
        )
        for kind, array in zip(("images-idx3", "labels-idx1"), official[file]):
            write_idx(source / f"{file}-{kind}-ubyte.gz", array)
    monkeypatch.setattr(embedded, "EMBEDDED", {"train": ("train", 4, 0), "test": ("t10k", 2, 1)})
    embedded.build_embedded(source, tmp_path / "out")
    for split, file, each in (("train", "train", 4), ("test", "t10k", 2)):
        rebuilt, (images, labels) = load_dataset("fashion-mnist", split, tmp_path / "out"), official[file]
        rows = pq.read_table(tmp_path / "out" / f"{split}.parquet")["index"].to_numpy()
        assert rebuilt.counts() == dict.fromkeys(CLASSES["fashion-mnist"], each)
        assert (
            torch.equal(rebuilt.images[:, 1, 2:-2, 2:-2], torch.from_numpy(images[rows]))
            and rebuilt.labels.tolist() == labels[rows].tolist()
        )
        for c in range(10):
            expected = np.random.default_rng([split == "test", c]).permutation(np.flatnonzero(labels == c))[:each]
            assert sorted(expected) == [r for r in rows if labels[r] == c]
    (source / "t10k-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8bnot gzip")
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte.gz.*Download it again"):
        embedded.fashion_mnist_source(source)
    with pytest.raises(FileNotFoundError, match="four official files"): embedded.fashion_mnist_source(tmp_path)


# parquet

@pytest.mark.parametrize("files, columns", [
    (("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"), ("image", "label")),
    (("data/train-00000-of-00001.parquet",), ("img", "label")),
    (("plain_text/train-00000-of-00001.parquet",), ("img", "fine_label")),
    (("default/train/0000.parquet",), ("image", "labels"))])
def test_parquet_layouts(tmp_path, files, columns):
    "Shards in order, columns under their usual names, class names from the schema; other splits do not mix in."
    names = ["truck", "automobile"]
    for k, file in enumerate(files):
        rows = [{"bytes": encoded(tmp_path, i), "path": None} for i in range(3 * k, 3 * k + 3)]
        parquet(tmp_path / "set" / file, rows, [0, 1, 1], names, columns)
        parquet(
            tmp_path / "set" / file.replace("train", "test"), [{"bytes": encoded(tmp_path, 11)}], [0], names, columns
        )
    parquet(tmp_path / "set" / "training.parquet", [b"?"], [0], names)
    images = load_dataset("cifar10", "train", tmp_path / "set")
    assert numbers(images.images) == list(range(3 * len(files)))
    assert images.labels.tolist() == [9, 1, 1] * len(files) and images.classes == CLASSES["cifar10"]
    assert numbers(load_dataset("cifar10", "test", tmp_path / "set").images) == [11] * len(files)


def test_parquet_without_names_or_structs(tmp_path):
    parquet(tmp_path / "train.parquet", [encoded(tmp_path, 3), encoded(tmp_path, 4)], [2, None])
    images = load_parquet(tmp_path / "train.parquet")
    assert images.labels.tolist() == [2, -1] and images.classes == ("0", "1", "2") and numbers(images.images) == [3, 4]
    assert load_dataset("cifar10", root=tmp_path).labels.tolist() == [2, -1]


def test_parquet_damaged(tmp_path):
    good = tmp_path / "a" / "train.parquet"
    parquet(
        good,
        [{"bytes": encoded(tmp_path, 1), "path": "one.png"}, {"bytes": b"garbage", "path": "two.png"}],
        [0, 0],
        ["cat"],
    )
    with pytest.raises(ValueError, match=r"1 of 2 files.*train\.parquet, two\.png"): load_parquet(good)
    parquet(good, [{"bytes": None, "path": "elsewhere/one.png"}], [0], ["cat"])
    with pytest.raises(ValueError, match="elsewhere/one.png"): load_parquet(good)
    (tmp_path / "cut.parquet").write_bytes(good.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"cut\.parquet is damaged.*Download it again"):
        load_parquet(tmp_path / "cut.parquet")
    parquet(good, [encoded(tmp_path, 1)], ["a cat"])
    with pytest.raises(ValueError, match="columns image, label; expected .* labels as integers"): load_parquet(good)
    with pytest.raises(FileNotFoundError, match="no parquet file of split 'test'"): load_parquet(good.parent, "test")


# folders

@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_image_folder(tmp_path, name):
    """Folders are sorted by name, labels follow the official list all the same; a folder for one split works as root,
    too.
    """
    for i, (split, c) in enumerate((s, c) for s in ("train", name) for c in ("truck", "airplane", "frog")):
        save(tmp_path / split / c / "x.png", i)
    for split, folder, expected in (("train", "train", {0: 1, 6: 2, 9: 0}), ("test", name, {0: 4, 6: 5, 9: 3})):
        for root in (tmp_path, tmp_path / folder):
            images = load_dataset("cifar10", split, root)
            assert dict(zip(images.labels.tolist(), numbers(images.images))) == expected
    assert load_image_folder(tmp_path / "train").classes == ("airplane", "frog", "truck")


def test_class_that_does_not_belong(tmp_path):
    for c in ("cat", "doge"): save(tmp_path / "train" / c / "x.png", 1)
    with pytest.raises(ValueError, match="cifar10: unknown class 'doge': did you mean 'dog'.*airplane, automobile"):
        load_dataset("cifar10", root=tmp_path)
    with pytest.raises(ValueError, match="did you mean 'lawn mower'"):
        class_id("lawnmower", CLASSES["cifar100"], "cifar100")


def test_unlabelled(tmp_path):
    "Any mode, size and depth; sorted; hidden and other files are left out; photos are turned upright."
    for i, path in enumerate(("b.png", "a/2.jpg", "a/1.webp")): save(tmp_path / path, i, (48, 36))
    for mode in ("L", "RGBA", "P", "CMYK"): colour(5).convert(mode).save(tmp_path / f"mode_{mode}.tiff")
    sideways = Image.fromarray(np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[:, None], 64, 1)) # dark above
    exif = Image.Exif()
    exif[274] = 3 # turned by half
    sideways.save(tmp_path / "z.png", exif=exif)
    (tmp_path / "._b.png").write_bytes(b"\0")
    (tmp_path / "notes.txt").write_text("not an image, and not called one", encoding="utf-8")
    images = load_unlabelled(tmp_path, ["dog", "bicycle"])
    assert [p.relative_to(tmp_path).as_posix() for p in image_files(tmp_path)] == [
        "a/1.webp",
        "a/2.jpg",
        "b.png",
        "mode_CMYK.tiff",
        "mode_L.tiff",
        "mode_P.tiff",
        "mode_RGBA.tiff",
        "z.png",
    ]
    assert images.images.shape == (8, 3, 32, 32) and numbers(images.images)[:3] == [2, 1, 0]
    assert images.images[7, 0, 0].float().mean() > 200 > 50 > images.images[7, 0, -1].float().mean()
    assert set(images.labels.tolist()) == {-1} and images.classes == ("dog", "bicycle")


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"): load_unlabelled(tmp_path / "nowhere", ("dog",))
    with pytest.raises(FileNotFoundError, match="holds no images; looked for .jpg"): load_unlabelled(tmp_path, ("dog",))
    for classes in ("dog", (), ("dog", "dog")):
        with pytest.raises(ValueError, match="classes must be a list"): load_unlabelled(tmp_path, classes)
    with pytest.raises(FileNotFoundError, match="not in ImageFolder layout"): load_image_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"): load_image_folder(tmp_path / "nowhere")
    whole = save(tmp_path / "cat" / "whole.png", 1).read_bytes()
    for i in range(7): (tmp_path / "cat" / f"cut {i}.png").write_bytes(whole[:60])
    (tmp_path / "cat" / "empty.jpg").touch()
    for load in (load_image_folder, lambda folder: load_unlabelled(folder, ("cat",))):
        with pytest.raises(
            ValueError, match=r"8 of 9 files .*cut 0\.png.*cut 4\.png.*; \.\.\..*Remove or replace"
        ) as e:
            load(tmp_path)
        assert "whole" not in str(e.value)


# CIFAR and Tiny-ImageNet as torchvision and their archive have them

def write_cifar(root, labels):
    "What torchvision unpickles, without the checksums that it asks for."
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    pixels = np.stack([np.asarray(colour(i)).transpose(2, 0, 1) for i in range(len(labels))])
    pixels[:, 2, 4, 9] = 7 # one pixel, to see rows and columns
    pixels = pixels.reshape(len(labels), -1)
    for file in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (base / file).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CLASSES["cifar10"])}))
    return base


def test_torchvision_layout(tmp_path, monkeypatch):
    base = write_cifar(tmp_path, [3, 9])
    with pytest.raises(ValueError, match="cifar-10-batches-py is incomplete or damaged"):
        load_dataset("cifar10", root=tmp_path)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    for root in (tmp_path, base):
        assert load_dataset("cifar10", "train", root).labels.tolist() == [3, 9] * 5
        test = load_dataset("cifar10", "test", root)
        assert (
            numbers(test.images) == [0, 1]
            and test.images[1, :, 4, 9].tolist() == [20, 235, 7]
            and test.images[1, :, 9, 4].tolist() == [20, 235, 100]
        )


def write_tiny(base, size=(64, 64)):
    wnids = ["n02123045", "n01443537"] # tabby cat, goldfish: not in order
    for i, w in enumerate(wnids): save(base / "train" / w / "images" / f"{w}_0.JPEG", i, size)
    for i in range(4): save(base / "val" / "images" / f"val_{i}.JPEG", i, size)
    save(base / "test" / "images" / "test_0.JPEG", 9, size)
    (base / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{i}.JPEG\t{wnids[i % 2]}\t0\t0\t62\t62\n" for i in range(4)), encoding="utf-8"
    )
    (base / "wnids.txt").write_text("\n".join(wnids), encoding="utf-8")


def check_tiny(train, test):
    assert train.classes == test.classes == CLASSES["tiny-imagenet"] and train.images.shape[-2:] == (32, 32)
    assert {train.classes[c]: n for c, n in zip(train.labels.tolist(), numbers(train.images))} == {
        "tabby cat": 0,
        "goldfish": 1,
    }
    assert [(test.classes[c], n) for c, n in zip(test.labels.tolist(), numbers(test.images))] == [
        ("tabby cat", 0),
        ("goldfish", 1),
        ("tabby cat", 2),
        ("goldfish", 3),
    ]


@pytest.mark.parametrize("below", ["", "tiny-imagenet-200"])
def test_tiny_layout(tmp_path, below):
    write_tiny(tmp_path / below)
    check_tiny(*(load_dataset("tiny-imagenet", s, tmp_path) for s in ("train", "test")))
    (tmp_path / below / "val" / "images" / "val_2.JPEG").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 4 files .*val_2\.JPEG"): load_dataset("tiny-imagenet", "test", tmp_path)


def test_tiny_download(tmp_path, monkeypatch):
    "Unpacked beside its place and moved there; after an interruption nothing is left, and the next try succeeds."
    write_tiny(tmp_path / "source" / "tiny-imagenet-200")
    calls = []
    def fetch(url, root, md5):
        calls.append((url, md5))
        if len(calls) == 1:
            (Path(root) / "tiny-imagenet-200" / "train").mkdir(parents=True)
            raise urllib.error.URLError("network is down")
        with zipfile.ZipFile(Path(root) / "a.zip", "w") as z:
            for p in (tmp_path / "source").rglob("*.*"): z.write(p, p.relative_to(tmp_path / "source"))
        with zipfile.ZipFile(Path(root) / "a.zip") as z: z.extractall(root)
    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", fetch)
    with pytest.raises(FileNotFoundError, match="tiny-imagenet could not be downloaded.*network is down.*UCDM_DATA"):
        load_dataset("tiny-imagenet")
    assert not (tmp_path / "data" / "tiny-imagenet").exists()
    check_tiny(load_dataset("tiny-imagenet"), load_dataset("tiny-imagenet", "test"))
    assert calls == [(TINY_URL, TINY_MD5)] * 2


def test_cifar_download_fails(tmp_path, monkeypatch):
    def refuse(*args, **kwargs): raise urllib.error.URLError("no route to host")
    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", refuse)
    with pytest.raises(
        FileNotFoundError, match="cifar100 could not be downloaded.*no route to host.*Give a local copy as root"
    ):
        load_dataset("cifar100")
    assert not (tmp_path / "data" / "cifar100").exists()


def test_two_processes_download(tmp_path, monkeypatch):
    "One downloads, the other waits for it: it never sees what is half unpacked. A copy that is there needs no lock."
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    write_cifar(tmp_path / "source", [3, 9])
    begun, calls = threading.Event(), []
    def fetch(url, root, unpack_to, filename, md5):
        calls.append((url, filename, md5))
        half = Path(unpack_to) / "cifar-10-batches-py"
        half.mkdir()
        (half / "data_batch_1").write_bytes(b"half")
        begun.set()
        time.sleep(0.5) # the other one looks for images
        shutil.copytree(tmp_path / "source", unpack_to, dirs_exist_ok=True)
    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", fetch)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(load_dataset, "cifar10", "train")
        begun.wait(10)
        second = pool.submit(load_dataset, "cifar10", "test")
        assert first.result().labels.tolist() == [3, 9] * 5 and second.result().labels.tolist() == [3, 9]
    kind = torchvision.datasets.CIFAR10
    assert calls == [(kind.url, kind.filename, kind.tgz_md5)]
    assert [p.name for p in (tmp_path / "data" / "cifar10").iterdir()] == ["cifar-10-batches-py"]
    def refuse(*args): raise AssertionError("took a lock to read")
    monkeypatch.setattr(datasets, "locked", refuse)
    assert len(load_dataset("cifar10")) == 10


# names, splits, roots

def test_nothing_there(tmp_path):
    "A root is only read from; the message says what was looked for."
    (tmp_path / "empty").mkdir()
    for wanted in ("cifar10", "cifar100", "tiny-imagenet"):
        with pytest.raises(
            FileNotFoundError,
            match="(?s)empty holds no test images.*torchvision.*val_annotations.*parquet.*a folder for each class",
        ):
            load_dataset(wanted, "test", tmp_path / "empty")
        with pytest.raises(FileNotFoundError, match="UCDM_DATA"): load_dataset(wanted, download=False)
    assert list((tmp_path / "empty").iterdir()) == [] and not (tmp_path / "data").exists()
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        load_dataset("cifar10", root=tmp_path / "nowhere")


def test_unknown_names():
    with pytest.raises(ValueError, match="did you mean 'tiny-imagenet'"): load_dataset("tinyimagenet")
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'val'"): load_dataset("cifar10", "val")


def test_image_set_checks():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="uint8"): ImageSet(images.float(), torch.zeros(2), ("a",))
    with pytest.raises(ValueError, match="3, H, W"): ImageSet(images[:, :1], torch.zeros(2), ("a",))
    with pytest.raises(ValueError, match="2 images but 3 labels"):
        ImageSet(images, torch.zeros(3, dtype=torch.int64), ("a",))
    with pytest.raises(ValueError, match="labels run from 0 to 1, but 1 classes"):
        ImageSet(images, torch.arange(2), ("a",))


def test_fingerprint():
    "Everything that matters changes it; how the tensors lie in memory does not."
    images = torch.arange(96, dtype=torch.uint8).view(2, 3, 4, 4)
    base = ImageSet(images, torch.tensor([0, 1]), ("a", "b"))
    other = images.clone()
    other[1, 2, 3, 3] += 1
    changed = [
        ImageSet(other, base.labels, base.classes),
        ImageSet(images, torch.tensor([1, 0]), base.classes),
        ImageSet(images, base.labels, ("a", "c")),
        ImageSet(images.view(2, 3, 2, 8), base.labels, base.classes),
    ]
    assert len({s.fingerprint for s in (base, *changed)}) == 5
    assert (
        ImageSet(images.to(memory_format=torch.channels_last), base.labels, base.classes, "other name").fingerprint
        == base.fingerprint
    )


def test_half_does_not_depend_on_layout(tmp_path):
    """The same images as parquet and as folders, in different orders, give the same half; the other half is its
    complement; the test images are the whole set's.
    """
    labels = [9, 1, 1, 3, 6, 0, 2, 4, 5, 7, 8, 9]
    rows = [{"bytes": encoded(tmp_path, i), "path": None} for i in range(12)]
    parquet(tmp_path / "a" / "train.parquet", rows, labels, list(CLASSES["cifar10"]))
    parquet(tmp_path / "a" / "test.parquet", rows[:3], labels[:3], list(CLASSES["cifar10"]))
    for i, c in enumerate(labels): save(tmp_path / "b" / "train" / CLASSES["cifar10"][c] / f"{i}.png", i)
    seeds = load_dataset("cifar10-half", "train", tmp_path / "a")
    assert (
        seeds.name == "cifar10-half"
        and load_dataset("cifar10-half", "train", tmp_path / "b").fingerprint == seeds.fingerprint
    )
    below, others = halve(load_dataset("cifar10", "train", tmp_path / "a"), MEDIAN_HASHES["cifar10"])
    assert below.fingerprint == seeds.fingerprint and 0 < len(seeds) < 12
    assert sorted(numbers(below.images) + numbers(others.images)) == list(range(12))
    test = load_dataset("cifar10-half", "test", tmp_path / "a")
    assert test.name == "cifar10-half" and numbers(test.images) == [0, 1, 2]
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'val'"):
        load_dataset("cifar10-half", "val", tmp_path / "a")
    with pytest.raises(ValueError, match="1 images of cifar10 have no label"):
        halve(
            ImageSet(below.images[:1], torch.tensor([-1]), below.classes, "cifar10"), MEDIAN_HASHES["cifar10"]
        )


LOCAL_CIFAR = embedded.data_root() / "cifar10" # before the fixture sets UCDM_DATA
with_local_cifar = pytest.mark.skipif(
    not any(LOCAL_CIFAR.glob("*")), reason="no local CIFAR-10: set UCDM_DATA to a folder that holds cifar10/"
)


@with_local_cifar
def test_real_cifar10():
    images = load_dataset("cifar10", "test", LOCAL_CIFAR)
    assert images.counts() == dict.fromkeys(CLASSES["cifar10"], 1000)
    ships, frogs = (images.images[images.labels == c].float().mean((0, 2, 3)) for c in (8, 6))
    assert ships[2] > ships[0] and frogs[2] < frogs[0] # the sea is blue, frogs are not


@with_local_cifar
def test_real_cifar10_half():
    "The medians written down are the medians; every mismatch proportion of the paper is possible."
    whole, test = load_dataset("cifar10", "train", LOCAL_CIFAR), load_dataset("cifar10-half", "test", LOCAL_CIFAR)
    for c, median in enumerate(MEDIAN_HASHES["cifar10"]):
        assert sorted(map(pixel_hash, whole.images[whole.labels == c]))[2500][:6] == median
    seeds, others = halve(whole, MEDIAN_HASHES["cifar10"])
    assert seeds.counts() == others.counts() == dict.fromkeys(CLASSES["cifar10"], 2500)
    half = ImageSet(seeds.images, seeds.labels, seeds.classes, "cifar10-half")
    for mismatch in MISMATCHES: assert (cdm_split((half, test), mismatch).true_labels(half) < 2).sum() == 5000
