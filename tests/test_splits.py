"""Class splits, unlabelled sets and test groups: their counts, their randomness, and what cannot be done."""
import re

import pytest
import torch

from ucdm.data.class_names import CLASSES
from ucdm.data.images import ImageSet
from ucdm.data.datasets import load_dataset
from ucdm.data.paper_classes import PAPER_TABLE_14, PAPER_TABLE_15, table_11, table_12, table_13, table_14, table_15
from ucdm.data.splits import (
    CLASS_SPLITS,
    GROUPS,
    MISMATCHES,
    ClassSplit,
    cdm_split,
    class_split,
    labelled_subset,
    unknown_count,
    unlabelled_set_counts,
)


def toy(n, seed, classes=CLASSES["cifar10"], name="cifar10"):
    "`n` small images of each class, in random order; every image is another."
    labels = torch.arange(len(classes)).repeat(n)[
        torch.randperm(n * len(classes), generator=torch.Generator().manual_seed(seed))
    ]
    images = torch.arange(len(labels) * 12).remainder(251).to(torch.uint8).view(-1, 3, 2, 2)
    return ImageSet(images, labels, classes, name)


TRAIN, TEST = toy(100, 0), toy(30, 1)
DATA = TRAIN, TEST


@pytest.mark.parametrize("name", CLASS_SPLITS["cifar10"])
@pytest.mark.parametrize("mismatch", [0, 0.2, 0.25])
def test_composition(name, mismatch):
    """All known images are seeds, unknown ones make up the proportion, new ones appear in the test only; groups are
    disjoint and equally large.
    """
    split, classes = cdm_split(DATA, mismatch, class_split=name), class_split("cifar10", name)
    labels = TRAIN.labels[split.seed_index]
    kinds = {g: sum((labels == c).sum().item() for c in getattr(classes, g)) for g in GROUPS}
    known = 100 * len(classes.known)
    assert kinds == {"known": known, "unknown": unknown_count(known, mismatch), "new": 0}
    assert len(set(split.seed_index.tolist())) == len(split.seed_index)
    for g, (images, target) in split.test(TEST).items():
        ids = getattr(classes, g)
        assert set(TEST.labels[split.test_index[g]].tolist()) <= {*ids} and len(
            set(split.test_index[g].tolist())
        ) == len(target)
        assert len(target) == 30 * min(len(ids), len(classes.known))
        assert target.tolist() == [
            ids.index(c) if g == "known" else split.n_known for c in TEST.labels[split.test_index[g]].tolist()
        ]
        assert torch.equal(images, TEST.images[split.test_index[g]])
    truth = split.true_labels(TRAIN)
    assert truth.tolist() == [classes.known.index(c) if c in classes.known else split.n_known for c in labels.tolist()]


def test_known_classes_in_any_order():
    "Label k is the k-th known class, not the k-th smallest id."
    split = cdm_split(DATA, 0.5, class_split=ClassSplit((7, 2), (5, 6)))
    assert split.known_names == ("horse", "bird")
    labels, truth = TRAIN.labels[split.seed_index], split.true_labels(TRAIN)
    assert (
        set(labels[truth == 0].tolist()) == {7}
        and set(labels[truth == 1].tolist()) == {2}
        and set(labels[truth == 2].tolist()) == {5, 6}
    )
    assert len(split.test_index["new"]) == 0


def test_seeds_carry_no_labels():
    split = cdm_split(DATA)
    seeds = split.seeds(TRAIN)
    assert (
        (seeds.labels == -1).all()
        and seeds.classes == ("airplane", "automobile")
        and torch.equal(seeds.images, TRAIN.images[split.seed_index])
    )


def test_seeds_are_shuffled():
    "Neither kind nor class can be read off the position in the unlabelled set."
    truth = cdm_split(DATA).true_labels(TRAIN).float()
    assert (truth[:250].mean() - truth[250:].mean()).abs() < 0.3 and (truth.diff() != 0).float().mean() > 0.4


def test_embedded_split_is_fixed():
    "Published results are about this split: if it changes, they have to be made again."
    data = load_dataset("fashion-mnist"), load_dataset("fashion-mnist", "test")
    split = cdm_split(data, 0.6)
    assert (
        len(split.seed_index) == 4000
        and split.seed_index[:5].tolist() == [2639, 7082, 6985, 1794, 6363]
        and split.hash == "d422a5662f7d83b9"
    )
    assert len(cdm_split(data, 0.75).seed_index) == 6400


def test_hash_and_draw():
    "The same arguments, the same split; whatever differs shows in the hash."
    base = cdm_split(DATA)
    assert cdm_split(DATA).hash == base.hash and re.fullmatch("[0-9a-f]{16}", base.hash)
    images = TRAIN.images.clone()
    images[0, 0, 0, 0] += 1
    others = [
        cdm_split(DATA, 0.4),
        cdm_split(DATA, seed=1),
        cdm_split(DATA, n_seeds=100),
        cdm_split(DATA, n_test=20),
        cdm_split(DATA, class_split=ClassSplit((0, 1), (2, 3, 4, 5, 6, 8), (7, 9))),
        cdm_split((ImageSet(images, TRAIN.labels, TRAIN.classes, "cifar10"), TEST)),
        cdm_split((TRAIN, toy(30, 2))),
    ]
    assert len({s.hash for s in (base, *others)}) == 1 + len(others)
    assert not torch.equal(base.seed_index, others[1].seed_index)
    assert not torch.equal(base.test_index["unknown"], others[1].test_index["unknown"])


def test_nested():
    "A smaller mismatch and a capped unlabelled set take part of the same images, and the test images do not change."
    unlabelled_sets = [cdm_split(DATA, m, seed=3) for m in MISMATCHES]
    for small, large in zip(unlabelled_sets, unlabelled_sets[1:]):
        assert set(small.seed_index.tolist()) < set(large.seed_index.tolist())
        assert all(torch.equal(small.test_index[g], large.test_index[g]) for g in GROUPS)
    capped = cdm_split(DATA, 0.75, seed=3, n_seeds=60, n_test=10)
    assert set(capped.seed_index.tolist()) < set(unlabelled_sets[-1].seed_index.tolist())


@pytest.mark.parametrize("mismatch", MISMATCHES)
@pytest.mark.parametrize("n", [1, 2, 7, 50, 333, 10_000])
def test_caps_keep_the_proportion(mismatch, n):
    known, unknown = unlabelled_set_counts(200, 600, mismatch, n)
    whole = 200 + unknown_count(200, mismatch)
    assert known + unknown == min(n, whole) and known >= 1
    if n > 1: assert abs(unknown / (known + unknown) - mismatch) <= 0.5 / min(n, whole) + 1e-9 + (whole <= n) / whole
    split = cdm_split(DATA, mismatch, n_seeds=n, n_test=n)
    assert [(split.true_labels(TRAIN) < 2).sum(), (split.true_labels(TRAIN) == 2).sum()] == [known, unknown]
    assert [len(i) for i in split.test_index.values()] == [min(n, 60)] * 3


@pytest.mark.parametrize("known, unknown, n", [(200, 600, None), (1600, 4800, None), (200, 10, None), (200, 0, None), (1600, 100, 1000), (200, 50, 240), (200, 50, 5000), (333, 77, None)])
def test_largest_mismatch_is_possible(known, unknown, n):
    "What the message offers works, and hardly more does."
    with pytest.raises(ValueError, match="at most mismatch=") as e: unlabelled_set_counts(known, unknown, 0.95, n)
    largest = float(re.search(r"at most mismatch=([\d.]+) is", str(e.value))[1])
    assert unlabelled_set_counts(known, unknown, largest, n)[1] <= unknown
    with pytest.raises(ValueError, match="at most"): unlabelled_set_counts(known, unknown, largest + 0.01, n)


@pytest.mark.parametrize("mismatch", [1, 1.5, -0.01, 60, float("nan")])
def test_mismatch_outside(mismatch):
    with pytest.raises(ValueError, match="mismatch .* must be (less than 1|greater than or equal to 0|a finite number), got"):
        cdm_split(DATA, mismatch)


@pytest.mark.parametrize("arguments, message", [
    (dict(mismatch=0.8), "needs 800 unknown-class images beside 200 known ones, but the pool has 600: at most mismatch=0.75"),
    (dict(n_seeds=0), "n_seeds must be greater than or equal to 1, got 0"),
    (dict(n_test=0), "n_test must be greater than or equal to 1, got 0"),
    (dict(class_split="3/3/4"), "cifar10: unknown class split '3/3/4'.* The valid names are .*2/6/2"),
    (dict(class_split=ClassSplit((0,), (10,))), r"10 classes, 0 to 9; the class split asks for \[10\]")])
def test_what_cannot_be_done(arguments, message):
    with pytest.raises(ValueError, match=message): cdm_split(DATA, **arguments)


def test_data_that_does_not_fit():
    for data, message in (
        ((TRAIN, TRAIN), "are the same"),
        ((TRAIN, toy(3, 0, CLASSES["fashion-mnist"])), "different classes"),
        ((TRAIN[TRAIN.labels != 3], TEST), "no training images of the unknown class cat"),
        ((TRAIN, TEST[TEST.labels < 8]), "no test images of the new classes ship, truck"),
        ((toy(9, 0, name="pets"), toy(9, 1, name="pets")), "class splits: unknown data set 'pets'.*ClassSplit.from_names"),
    ):
        with pytest.raises(ValueError, match=message): cdm_split(data)


@pytest.mark.parametrize("groups, message", [
    (dict(known=("cat",), unknown=("dog", "cat")), r"\['cat'\] are both known and unknown"), (dict(known=("cat",), new=("cat",)), "both known and new"),
    (dict(known=("cat",), unknown=("dog",), new=("dog",)), "both unknown and new"), (dict(known=("kat",)), "unknown class 'kat': did you mean 'cat'"),
    (dict(known=()), "at least one known"), (dict(known=("cat", "cat")), "listed twice")])
def test_bad_class_splits(groups, message):
    with pytest.raises(ValueError, match=message): ClassSplit.from_names(CLASSES["cifar10"], **groups)


def test_labelled_subset():
    "So many of each known class, no unknown ones; nothing lost; smaller sets lie in larger ones."
    split = cdm_split(DATA)
    labelled, rest = labelled_subset(split, TRAIN, 25)
    assert TRAIN.labels[labelled].bincount(minlength=10).tolist() == [25, 25] + [0] * 8
    assert sorted([*labelled.tolist(), *rest.tolist()]) == sorted(split.seed_index.tolist())
    assert set(labelled_subset(split, TRAIN, 4)[0].tolist()) < set(labelled.tolist())
    assert set(labelled_subset(cdm_split(DATA, seed=1), TRAIN, 25)[0].tolist()) != set(labelled.tolist())
    with pytest.raises(ValueError, match=r"airplane \(100\), automobile \(100\): fewer seed images than per_class=101"):
        labelled_subset(split, TRAIN, 101)


def test_tables():
    "What the code makes agrees with what the paper prints, but for CIFAR-10's numbers of classes."
    assert table_14().drop(columns=("classes", "unknown")).equals(PAPER_TABLE_14.drop(columns=("classes", "unknown")))
    assert table_15()["images"].equals(PAPER_TABLE_15["images"])
    assert table_15()["classes"].drop("cifar10").equals(PAPER_TABLE_15["classes"].drop("cifar10"))
    assert (
        table_11()["classes"].tolist() == [2, 6, 2]
        and table_12()["classes"].tolist() == [20, 60, 20]
        and table_13()["classes"].tolist() == [20, 80, 100]
    )
    assert table_12().loc["known", "class name"].startswith(
        "bear, camel, cattle, chimpanzee, flatfish"
    ) and table_13().loc["new", "class name"].endswith("beach, acorn")
    assert table_14(("fashion-mnist",)).iloc[0].tolist() == [
        2,
        6,
        1600,
        0,
        1600,
        400,
        1600,
        1067,
        1600,
        2400,
        1600,
        4800,
    ]
