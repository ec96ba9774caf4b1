"""The long-tailed methods that change or remember something on the way: killed in each stage and resumed, the result is the same."""
import json
from pathlib import Path

import pytest
import torch

from ucdm.baselines.semi_supervised import train
from ucdm.data.long_tailed import LongTail
from ucdm.longtail.small_problem import small_long_tail
from ucdm.runs.registry import get_method
from ucdm.runs.run import run
from ucdm.runs.spec import RunSpec

TINY = dict(depth=10, width=1, batch_size=8, ratio=1, epochs=6, image_passes=1200, ema=0.9)
METHODS = {  # method -> its settings
    "crest": dict(generations=3),
    "crest_plus": dict(generations=3),
    "mixmatch_crest_plus": dict(generations=3),
    "darp": dict(start=0.4, every=2),
    "darp_crt": dict(start=0.4, every=2, stage=0.5),
    "fixmatch_crt": dict(stage=0.5),
    "cossl": dict(stage=0.5, first_steps=20),
    "udal": {},
    "mixmatch_udal": {},
    "fixmatch_da": {},
    "adello": dict(warm_up=0.3, decay=0.9),
}
TAIL = LongTail(n_head=60, gamma=10.0, beta=0.4)
ESTIMATED = {"darp_bbse": ("darp", METHODS["darp"] | dict(counts="bbse"))}


class Killed(Exception):
    "Stands for a kill between two epochs; the checkpoint is on disk."


@pytest.fixture(scope="module")
def problem():
    return small_long_tail(TAIL)[0]


def new(problem, name):
    "An untrained learner of a method with tiny settings."
    from ucdm.longtail.adello import ADELLO
    from ucdm.longtail.alignment import AlignedFixMatch
    from ucdm.longtail.cossl import CoSSL
    from ucdm.longtail.crest import CReST, CReSTPlus, MixMatchCReSTPlus
    from ucdm.longtail.darp import DARP
    from ucdm.longtail.retraining import DARPCRT, FixMatchCRT
    from ucdm.longtail.udal import MixMatchUDAL, UDAL

    method, settings = ESTIMATED.get(name) or (name, METHODS[name])
    several = (CReST, CReSTPlus, MixMatchCReSTPlus, DARP, DARPCRT, FixMatchCRT, CoSSL)
    classes = {c.name: c for c in (*several, UDAL, MixMatchUDAL, AlignedFixMatch, ADELLO)}
    cls = classes[method]
    return cls(problem, cls.Config(**TINY | settings))


def state(learner):
    "All that a learner has come to."
    parts = {f"model/{k}": v for k, v in learner.model.state_dict().items()}
    parts |= {f"ema/{k}": v for k, v in learner.ema.state_dict().items()}
    parts |= {f"memory/{k}": v for k, v in learner.memory.items()}
    return parts | {f"kept/{i}/{k}": v for i, kept in enumerate(learner.kept) for k, v in kept.items()}


def epochs(learner):
    return [{k: v for k, v in h.items() if k != "seconds"} for h in learner.history]


@pytest.mark.parametrize("name", [*METHODS, *ESTIMATED])
def test_killed_after_any_epoch(tmp_path, problem, name):
    "Killed after every epoch, so before and after each generation and stage, the weights are those of an undisturbed run."
    whole = train(new(problem, name), progress=False)

    def kill(entry, learner):
        if learner.done < 1:
            raise Killed

    file = tmp_path / "checkpoint"
    for _ in range(TINY["epochs"] - 1):
        with pytest.raises(Killed):
            train(new(problem, name), file, kill, progress=False, checkpoint_every=0.0)
    resumed = train(new(problem, name), file, progress=False)
    assert (resumed.epoch, resumed.notes) == (TINY["epochs"], whole.notes)
    assert json.dumps(epochs(resumed)) == json.dumps(epochs(whole))
    a, b = state(whole), state(resumed)
    assert a.keys() == b.keys()
    assert not [k for k in a if not torch.equal(a[k], b[k])]
    assert torch.equal(whole.predict(problem.images[:20])[0], resumed.predict(problem.images[:20])[0])


def test_last_epochs_are_of_the_last_stage(problem):
    "The networks kept for the mean over the last epochs answer as the method does, not as an earlier stage."
    for name, n in dict(crest=2, fixmatch_crt=3, cossl=3).items():
        learner = train(new(problem, name), progress=False)
        past = list(learner.snapshots())
        assert len(past) == n and past[-1] is learner
        assert all(torch.isfinite(p.predict(problem.images[:8])[0]).all() for p in past)


@pytest.mark.parametrize("name", METHODS)
def test_as_a_run(tmp_path, name):
    "Every method runs from a specification that says nothing about labels a class."
    options = dict(n_head=60, gamma=10.0, beta=0.4)
    settings = TINY | METHODS[name] | dict(image_passes=400)
    spec = RunSpec(method=name, problem="long_tailed", mismatch=0.0, options=options, n_test=50, train=settings)
    result = run(spec, tmp_path, progress=False)
    assert get_method(name).config_type().labels_per_class is None
    assert [p for p in result.protocols if p != "running+rest"] == ["running", "running+la", "last_epochs"]
    assert 0 <= result.metrics["balanced"] <= 100


def test_settings_that_cannot_be(tmp_path):
    "One generation for CReST+, more generations than epochs, and a second stage without an epoch are refused by name."
    spec = lambda method, **train: RunSpec(method=method, problem="long_tailed", mismatch=0.0, train=TINY | train)
    for method in ("crest_plus", "mixmatch_crest_plus"):
        with pytest.raises(ValueError, match="at least 2 generations"):
            run(spec(method, generations=1), tmp_path, progress=False)
    with pytest.raises(ValueError, match="7 generations need as many epochs, got epochs=6"):
        run(spec("crest", generations=7), tmp_path, progress=False)
    for method in ("fixmatch_crt", "darp_crt", "cossl"):
        with pytest.raises(ValueError, match="leaves no epoch of 6 for the second stage"):
            run(spec(method, stage=0.9), tmp_path, progress=False)
    with pytest.raises(ValueError, match="ema must be above 0"):
        run(spec("cossl", ema=0.0), tmp_path, progress=False)
    with pytest.raises(ValueError, match="has only one"):
        run(spec("darp", counts="bbse"), tmp_path, progress=False)
    assert not list(Path(tmp_path).rglob("result.json"))


def test_mixed_class_order(problem):
    "Which images join depends on the ranks of the classes, not on their numbers."
    from ucdm.longtail.crest import joining

    pi = torch.tensor([50, 20, 8, 2], dtype=torch.double) / 80
    n, order = torch.tensor([300, 100, 40, 10]), torch.tensor([2, 0, 3, 1])
    assert torch.equal(joining(n[order], pi[order]), joining(n, pi)[order])
    assert joining(n, pi)[3] == 10 and joining(n, pi)[0] < 300


def test_crest_needs_no_other_order(problem):
    "With the classes renamed, generations choose the same images."
    from dataclasses import replace

    order = torch.tensor([7, 3, 9, 0, 1, 2, 5, 4, 8, 6])
    names = [problem.classes[k] for k in order.argsort().tolist()]
    renamed = replace(problem, labels=torch.where(problem.labels >= 0, order[problem.labels], -1), classes=tuple(names))
    a, b = new(problem, "crest"), new(renamed, "crest")
    for net in (b.model, b.ema):
        net.load_state_dict(a.model.state_dict())
        net.closed_head.weight.data = net.closed_head.weight.data[order.argsort()]
    a.ema.load_state_dict(a.model.state_dict())
    a.label_anew(), b.label_anew()
    expected = torch.where(a.labels >= 0, order[a.labels], -1)
    assert torch.equal(b.labels, expected) and (a.labels >= 0).sum() > (problem.labels >= 0).sum()
