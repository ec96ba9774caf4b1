"""Several processes on this machine, one of which is killed."""
import sys

import pytest

from ucdm.runs.engine import LocalEngine, ProcessDied
from ucdm.runs.many import RunsFailed, run_many
from ucdm.runs.spec import RunSpec, grid

MORTAL = '''
import os, signal, time, torch
from ucdm.runs.registry import METHODS, register_method

class Constant:
    def __init__(self, K): self.K = K
    def predict(self, images):
        return torch.full((len(images), self.K), 1 / self.K), torch.full((len(images), self.K + 1), 1 / (self.K + 1))

def fit(task):
    time.sleep(0.2)
    if task.spec.seed == 1: os.kill(os.getpid(), signal.SIGKILL) # as the kernel does when memory runs out
    return Constant(len(task.classes))

if "mortal" not in METHODS: register_method("mortal")(fit)
'''


@pytest.fixture
def register(tmp_path, monkeypatch):
    "Registers a method by a module's source, which other processes can import; it is forgotten afterwards."
    from ucdm.runs.registry import METHODS
    monkeypatch.syspath_prepend(tmp_path)
    names = []
    def of(name, source):
        (tmp_path / f"{name}_method.py").write_text(source, encoding="utf-8")
        names.append(name)
        __import__(f"{name}_method")
    yield of
    for name in names: METHODS.pop(name, None)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_process_costs_its_run_only(tmp_path, register):
    "One of five runs kills its process, as running out of memory would: it is named, the others are there."
    register("mortal", MORTAL)
    specs = grid(RunSpec(method="mortal", n_seeds=12, n_test=24), seed=[0, 1, 2, 3, 4])
    with pytest.raises(RunsFailed, match=r"1 of 5 runs failed.*\n.*seed 1: ProcessDied.*lack of memory") as e:
        run_many(specs, tmp_path / "cache", LocalEngine(jobs=2), progress=False)
    assert [type(error) for _, error in e.value.failures] == [ProcessDied]
    assert [r is not None for r in e.value.results] == [True, False, True, True, True]
    assert len(list((tmp_path / "cache" / "runs").glob("*.json"))) == 4


BROKEN = '''
from ucdm.runs.registry import METHODS, register_method

class TwoParts(Exception):
    def __init__(self, a, b): super().__init__(f"{a} and {b}")

def fit(task): raise TwoParts("the disk", "the data")

if "in_two_parts" not in METHODS: register_method("in_two_parts")(fit)
'''


def test_an_exception_that_cannot_be_sent_is_named(tmp_path, register):
    "What two arguments made cannot be built again from its message: the run failed by it, its process did not die."
    register("in_two_parts", BROKEN)
    with pytest.raises(RunsFailed, match="TwoParts: the disk and the data") as e:
        run_many([RunSpec(method="in_two_parts", n_seeds=12, n_test=24)], tmp_path / "cache", LocalEngine(jobs=2), progress=False)
    assert [type(error) for _, error in e.value.failures] == [RuntimeError]
