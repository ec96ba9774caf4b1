"""The compared methods as runs: killed and resumed, few images, wrong settings."""
import os
import signal

import pytest
from processes import finish, python, read_until

from ucdm.runs.registry import METHODS, get_method
from ucdm.runs.spec import RunSpec
from ucdm.runs.run import run

SMALL = dict(depth=10, width=1, batch_size=8, labels_per_class=4, iterations=12, epochs=4)
SPEC = RunSpec(method="fixmatch", n_seeds=40, n_test=12, train=SMALL | dict(ratio=2, threshold=0.4))

CHILD = """
import sys, time, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
import test_baselines as t
import ucdm.baselines.semi_supervised as ssl
train_epoch, train, n = ssl.train_epoch, ssl.train, [0]
def slow(*args, **kwargs):
    if n[0] == {stop}:
        print("waiting", flush=True)
        time.sleep(600)
    n[0] += 1
    return train_epoch(*args, **kwargs)
ssl.train_epoch = slow
ssl.train = lambda *args, **kwargs: train(*args, **kwargs, checkpoint_every=0.0)
print("protocols", n, t.run(t.SPEC, {cache!r}, progress=False).protocols)
"""


def child(cache, stop=-1):
    return python("-c", CHILD.format(tests=os.path.dirname(__file__), cache=str(cache), stop=stop))


def test_killed_and_resumed(tmp_path):
    "Killed after two of four epochs: only the other two are trained, and the numbers are those of an undisturbed run."
    killed = child(tmp_path / "killed", stop=2)
    read_until(killed, lambda line: line.strip() == "waiting")
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -9
    (resumed, e1), (whole, e2) = finish(child(tmp_path / "killed")), finish(child(tmp_path / "whole"))
    assert resumed and whole, e1 + e2
    assert resumed.replace("[2]", "[4]") == whole
    assert not list((tmp_path / "killed" / "partial").glob("*[!k]")), "the checkpoint is removed after the run"


@pytest.mark.parametrize("method", ["supervised", "supervised_all", "mixmatch"])
def test_other_methods_run(tmp_path, method):
    "Every method gives the three batch norm protocols, the two rules for \"other\", and the mean over the last epochs."
    settings = SMALL | dict(labels_per_class=None) if method == "supervised_all" else SMALL
    result = run(RunSpec(method=method, n_seeds=40, n_test=12, train=settings), tmp_path, progress=False)
    assert list(result.protocols) == ["running", "group_pure", "mixed", "running+msp", "running+energy", "last_epochs", "held_out"]
    assert result.metrics["unknown"] == result.metrics["new"] == 0
    assert result.seeds["labelled"] == (16 if method == "supervised_all" else 8)
    assert result.provenance["prior"] is None and len(result.epochs) == 4


def test_what_cannot_be(tmp_path):
    "Too few images for the labels asked for, and a misspelt setting, end in one clear error each."
    with pytest.raises(ValueError, match="Take fewer labels, or more seed images"):
        run(RunSpec(method="fixmatch", n_seeds=40, n_test=12), tmp_path, progress=False)
    with pytest.raises(ValueError, match="did you mean 'threshold'"):
        run(RunSpec(method="fixmatch", train=dict(treshold=0.9)), tmp_path)
    with pytest.raises(ValueError, match="settings of fixmatch: threshold must be less than or equal to 1, got 95"):
        run(RunSpec(method="fixmatch", train=dict(threshold=95)), tmp_path)
    assert get_method("fixmatch") is METHODS["fixmatch"]
