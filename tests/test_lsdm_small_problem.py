"""The curve of LSDM's experiments and its small generator: what a page would not show."""
import math

import pytest
import torch

from ucdm.core.randomness import generator
from ucdm.lsdm.small_problem import Curve, distance_to, energy_loss, fit_small, joint_loss, SmallGenerator

RING = Curve(length=2 * math.pi)


def test_distances_of_points_off_the_curve():
    "Against a search in t from many starts; points of the curve are at distance 0."
    y = torch.randn(20, 10, generator=generator(0))
    t = torch.linspace(0, RING.length, 30).requires_grad_()
    found = []
    for point in y:
        with torch.no_grad(): t.copy_(torch.linspace(0, RING.length, 30))
        optimiser = torch.optim.Adam([t], 0.02)
        for _ in range(60):
            optimiser.zero_grad()
            (RING.at(t) - point).norm(dim=1).sum().backward()
            optimiser.step()
        found.append((RING.at(t) - point).norm(dim=1).min().item())
    assert torch.allclose(distance_to(RING, y), torch.tensor(found), atol=2e-3)
    assert distance_to(RING, RING.points(50, "data")[1]).max() < 2e-3


def test_points_belong_to_their_purpose():
    "The first points of a larger draw are those of a smaller one; classes lie where they should."
    x, y = RING.points(300, "pairs")
    assert all(a.equal(b[:10]) for a, b in zip(RING.points(10, "pairs"), (x, y)))
    assert not RING.points(10, "other")[1].equal(y[:10]) and not Curve(seed=1).points(10, "pairs")[1].equal(y[:10])
    flat = y @ RING.rotation.T
    angle = torch.atan2(flat[:, 1], flat[:, 0]) % (2 * math.pi)
    assert (3 * angle / (2 * math.pi)).long().equal(x)


def test_a_fit_repeats_itself():
    "Whatever the global generator does, and without moving it."
    x, z = RING.points(60, "pairs")
    def fitted(seed):
        torch.manual_seed(seed)
        net = SmallGenerator(3, 10)
        fit_small(net, energy_loss(net, x, z, 8), 3)
        assert torch.rand(1).equal(torch.rand(1, generator=torch.Generator().manual_seed(seed)))
        return net.draw(x, "test")
    assert fitted(0).equal(fitted(1))


@pytest.mark.parametrize("kappa, learns", [(0.05, False), (math.inf, True)])
def test_a_cheap_label_is_ignored(kappa, learns):
    "From a generator that ignores labels: two classes far apart, learnt only if labels have a price."
    x = torch.arange(400) % 2
    z = torch.randn(400, 1, generator=generator(0)) + 6 * x[:, None]
    net = SmallGenerator(2, 1)
    fit_small(net, joint_loss(net, x[torch.randperm(400, generator=generator(1))], z, math.inf), 150, 1e-2)
    fit_small(net, joint_loss(net, x, z, kappa), 150, 1e-2)
    right = ((net.draw(x, "test")[:, 0] > 3).long() == x).float().mean()
    assert (right > 0.95) == learns and right > 0.3
