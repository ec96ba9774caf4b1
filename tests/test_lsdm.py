"""Transport and the bound of the wing lsdm, where a page would be too long: another solver, other shapes, bad input."""
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from ucdm.core.randomness import generator
from ucdm.lsdm.bound import chain, local_lipschitz
from ucdm.lsdm.transport import (conditional_w1, debiased_conditional_w1, distances, energy_score, joint_penalty, joint_w1,
                                 optimal_coupling, penalty_in_z, product_cost, w1)

SIZES = [(1, 1), (6, 6), (4, 12), (12, 4), (5, 7), (9, 6), (1, 5), (30, 20)]


def cost_of(n, m, kappa=1.5):
    "Costs of labelled points, every label in both samples."
    z, z2 = (torch.randn(k, 3, generator=generator(0, n, m, side), dtype=torch.float64) for side, k in enumerate((n, m)))
    return product_cost(torch.arange(n) % 2, z, torch.arange(m) % 2, z2, kappa)


@pytest.mark.parametrize("n, m", SIZES)
def test_coupling_against_its_dual(n, m):
    "Potentials u, v with u + v <= cost prove that nothing is cheaper; both sides lose and gain equal masses."
    cost = cost_of(n, m)
    coupling = optimal_coupling(cost)
    rows, columns = np.indices((n, m)).reshape(2, -1)
    potentials = np.zeros((n * m, n + m))
    potentials[np.arange(n * m), rows] = potentials[np.arange(n * m), n + columns] = 1
    weights = np.r_[np.full(n, 1 / n), np.full(m, 1 / m)]
    dual = linprog(-weights, A_ub=potentials, b_ub=cost.flatten().numpy(), bounds=(None, None))
    assert coupling.mean(cost).item() == pytest.approx(-dual.fun, abs=1e-10)
    for index, count in ((coupling.i, n), (coupling.j, m)):
        mass = torch.zeros(count, dtype=torch.float64).index_add(0, index, coupling.mass)
        assert torch.allclose(mass, torch.full_like(mass, 1 / count), atol=1e-12)


def test_coupling_against_pot():
    "Python Optimal Transport says the same."
    import ot # slow to import
    for cost in (cost_of(*sizes) for sizes in SIZES):
        assert optimal_coupling(cost).mean(cost).item() == pytest.approx(ot.emd2([], [], cost.numpy()), abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_and_gradients(dtype):
    "Results have the dtype of the points, and a step against the gradient comes closer."
    z, g = (torch.randn(10, 2, 4, 4, generator=generator(0, k)).to(dtype) for k in "zg")
    x, g = torch.arange(10) % 2, g.requires_grad_()
    losses = (w1(z, g), joint_w1(x, z, x, g, 2.0), joint_w1(x, z, x, g, math.inf), conditional_w1(x, z, x, g))
    for loss in losses:
        assert loss.dtype == dtype and loss.dim() == 0
        step, = torch.autograd.grad(loss, g)
        assert step.isfinite().all() and step.abs().max() > 0
        assert w1(z, (g - step).detach()) < w1(z, g)


def test_a_wrong_label_costs_at_most_kappa():
    "The joint distance grows with kappa, from that of the outputs alone to the conditional one."
    x = torch.arange(60) % 3
    z = torch.randn(60, 2, generator=generator(0), dtype=torch.float64) + 4 * x[:, None]
    g = z[torch.randperm(60, generator=generator(1))]
    values = [joint_w1(x, z, x, g, kappa).item() for kappa in (1e-6, 0.1, 1, 10, distances(z, g).max().item(), math.inf)]
    assert values == sorted(values) and values[0] == pytest.approx(0, abs=1e-5)
    assert values[-2] == pytest.approx(values[-1]) == pytest.approx(conditional_w1(x, z, x, g).item())


def test_losses_are_unbiased_where_they_should_be():
    "Debiased transport is 0 on average for one distribution; an odd row is left out; more draws, the same score."
    x = torch.arange(15) % 3 # five a label
    draws = [torch.randn(2, 15, 4, generator=generator(k)) for k in range(200)]
    values = np.array([debiased_conditional_w1(x, *pair).item() for pair in draws])
    assert abs(values.mean()) < 4 * values.std() / len(values)**0.5
    z, many = torch.randn(5000, 2, generator=generator(1)), torch.randn(6, 5000, 2, generator=generator(2))
    assert energy_score(z, many).item() == pytest.approx(energy_score(z, many[:2]).item(), abs=0.05)


def test_penalties_depend_on_their_generator_alone():
    "And train the critic: their gradient reaches its weights, also where its slope is 0."
    net = torch.nn.Linear(4, 1)
    torch.nn.init.zeros_(net.weight)
    x, z, g = torch.randn(3, 8, 2, generator=generator(0))
    def f(x, z): return net(torch.cat([x, z], 1))[:, 0] ** 2
    for penalty in (lambda seed: penalty_in_z(f, x, z, g, generator(seed)),
                    lambda seed: joint_penalty(f, x, z, x.flip(0), g, 2.0, generator(seed))):
        with torch.no_grad(): net.weight.normal_(generator=generator(3))
        assert penalty(0) == penalty(0) != penalty(1)
        with torch.no_grad(): net.weight.zero_()
        loss = penalty(0)
        loss.backward()
        assert loss.item() == pytest.approx(1.0) and net.weight.grad.isfinite().all()


def test_slope_of_decoders_of_images():
    "Each latent has its own slope, whatever the shapes; a constant decoder has none."
    decode = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3, padding=1), torch.nn.SiLU(), torch.nn.Upsample(scale_factor=2))
    z = torch.randn(4, 2, 3, 3, generator=generator(0))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: decode(one[None])[0]))(z).reshape(4, -1, 18)
    slopes = local_lipschitz(decode, z, 300, generator(1))
    assert torch.allclose(slopes, torch.linalg.matrix_norm(jacobian, 2), rtol=2e-2)
    assert local_lipschitz(lambda z: 0 * z, z).eq(0).all()


@pytest.mark.parametrize("kappa", [0.3, 3.0, math.inf])
def test_chain_holds_in_single_precision(kappa):
    "As in a training, up to its rounding, with images as they are."
    decode = torch.nn.Sequential(torch.nn.Linear(3, 48), torch.nn.Tanh(), torch.nn.Unflatten(1, (3, 4, 4)))
    x, y = torch.arange(24) % 4, torch.randn(24, 3, 4, 4, generator=generator(0))
    z, g = torch.randn(2, 24, 3, generator=generator(1))
    assert chain(x, y, z, g, decode, kappa).holds(1e-5)
