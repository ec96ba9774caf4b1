import pytest
import torch


@pytest.fixture
def one_thread():
    "Results that are compared bit by bit need the same number of threads; afterwards it is what it was."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
