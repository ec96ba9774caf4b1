import re
from functools import lru_cache

import psutil
import pytest
import torch
from processes import STARTED, kill_tree


@pytest.fixture
def one_thread():
    "Results that are compared bit by bit need the same number of threads; afterwards it is what it was."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    "Let fixtures know how a test went."
    report = yield
    item.went_wrong = getattr(item, "went_wrong", False) or report.failed
    return report


@pytest.fixture(autouse=True)
def nothing_runs_on(request):
    "Processes of a test that failed, or was stopped at its time limit, end with it."
    before = {p.pid for p in psutil.Process().children()}
    yield
    if getattr(request.node, "went_wrong", False):
        for process in psutil.Process().children():
            if process.pid not in before: kill_tree(process.pid)
        for child in STARTED:
            if child.poll() is None: kill_tree(child.pid)


@lru_cache
def group(file):
    "What a test file says that its tests share, if it does."
    found = re.search(r"""xdist_group\(["'](\w+)["']\)""", file.read_text(encoding="utf-8"))
    return found and found[1]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests of a group go to one process.

    pytest-xdist 3.8 does so by names that pytest 9.2 does not let it change: without a word it runs them anywhere, and
    each process starts what they were to share.
    """
    from xdist.scheduler import LoadScopeScheduling
    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group(config.rootpath / nodeid.split("::")[0]) or nodeid
    return Groups(config, log)
