"""Stage 1 of LSDM, where a page would be too long: other shapes, bad input, choices of the best step, files."""
import json
from dataclasses import replace

import pytest
import torch

from ucdm.core.randomness import generator
from ucdm.lsdm.latent_space import AutoencoderConfig, fit_autoencoder, fit_pca, LatentSpace

TINY = AutoencoderConfig(d=16, channels=(8, 8), hidden=(8,), steps=8, batch=4, measurements=4)
VECTORS = replace(TINY, d=2, steps=40, lr=1e-2, batch=16)
IMAGES = torch.randint(256, (24, 3, 4, 4), generator=generator(0, "images"), dtype=torch.uint8)
pytestmark = pytest.mark.filterwarnings("ignore:after .* the mean image") # trainings are a few steps long
POINTS = torch.randn(40, 5, generator=generator(0, "points"))


def fit(paired, unpaired=None, config=TINY, **more):
    return fit_autoencoder(paired, unpaired, config, progress=False, **more)


@pytest.mark.parametrize("height, width, d", [(4, 4, 16), (8, 4, 8), (4, 8, 24)])
def test_shapes_of_images(height, width, d, one_thread):
    "Latents are flat, images come back as bytes of the same shape, and a latent does not depend on its batch."
    y = torch.randint(256, (12, 3, height, width), generator=generator(0), dtype=torch.uint8)
    for space in (fit(y, config=replace(TINY, d=d)), fit_pca(y, 4)):
        z = space.encode(y)
        assert z.shape == (12, space.d) and z.dtype == torch.float32
        assert space.decode(z).shape == y.shape and space.decode(z).dtype == torch.uint8
        assert torch.allclose(space.posterior(y, batch=5)[0], z, atol=1e-4)
        assert torch.allclose(space.reconstruction(y, batch=5), space.reconstruction(y), atol=1e-4)
        assert (space.decode(1e6 * z).unique() == torch.tensor([0, 255])).all() if space.kind == "PCA" else True


def test_both_arms_make_as_many_steps():
    "Only what they see differs; the tenth that is kept apart is theirs."
    alone, both = fit(IMAGES[:10]), fit(IMAGES[:10], IMAGES[10:])
    assert [s for s, _ in alone.record["curve"]] == [s for s, _ in both.record["curve"]] == [2, 4, 6, 8]
    assert (alone.record["n_unpaired"], both.record["n_unpaired"]) == (0, 14)


def test_the_best_step_is_kept():
    "Where the error on images kept apart rises again, the weights before that are taken."
    space = fit(POINTS[:6], config=replace(VECTORS, hidden=(64,), steps=400, measurements=20, lr=3e-2, held_out=0.4))
    errors = dict(space.record["curve"])
    assert space.record["best_step"] == min(errors, key=errors.get) < 400
    assert space.record["held_out_error"] == min(errors.values()) < errors[400]


def test_nothing_else_draws_from_the_same_random_numbers():
    "A fit neither reads nor moves the global generator."
    def fits(seed):
        torch.manual_seed(seed)
        spaces = fit(IMAGES), fit(POINTS, config=VECTORS), fit_pca(IMAGES, 3)
        assert torch.rand(1).equal(torch.manual_seed(seed) and torch.rand(1))
        return spaces
    for a, b in zip(fits(0), fits(1)):
        for name, value in a.network.state_dict().items(): assert value.equal(b.network.state_dict()[name])
        assert a.scale == b.scale


def test_samples_belong_to_images():
    "Other batches, other order: the same latent for the same id; another seed or purpose, another one."
    space = fit(IMAGES)
    whole = space.sample(IMAGES, range(24))
    order = torch.randperm(24, generator=generator(0))
    assert torch.allclose(space.sample(IMAGES[order], order), whole[order], atol=1e-5)
    for other in (dict(seed=1), dict(purpose="other")):
        assert not torch.allclose(space.sample(IMAGES, range(24), **other), whole)
    assert space.sample(IMAGES[:0], []).shape == (0, 16)


def test_vectors_in_double_precision():
    "For the exact checks of the bound: decoded in the network's precision."
    space = fit(POINTS.double(), config=VECTORS).to(torch.float64)
    z = space.encode(POINTS.double())
    assert z.dtype == torch.float32 and space.decode_float(z).dtype == torch.float64
    slope, = torch.autograd.grad(space.decode_float(z.requires_grad_()).sum(), z)
    assert slope.isfinite().all() and slope.abs().max() > 0


def test_a_training_that_fails_says_why():
    with pytest.raises(FloatingPointError, match="lower `lr`"):
        fit(1e30 * POINTS, config=VECTORS)
    with pytest.raises(ValueError, match="nothing is encoded"):
        fit(POINTS[:1].expand(20, 5) * 0, config=replace(VECTORS, lr=1e-9))
    with pytest.warns(UserWarning, match="the mean image"):
        fit(IMAGES, config=replace(TINY, lr=1e-9))


@pytest.mark.parametrize("make, error, words", [
    (lambda: fit(IMAGES.float()), TypeError, "`to_uint8`"),
    (lambda: fit(IMAGES[:, :, :3]), ValueError, "3x4 cannot be halved 1 times"),
    (lambda: fit(IMAGES, config=replace(TINY, d=10)), ValueError, "d=10 must be a multiple of 4"),
    (lambda: fit(IMAGES[:1]), ValueError, "needs two or more"),
    (lambda: fit(POINTS[0]), ValueError, r"\[N, p\]"),
    (lambda: fit_pca(POINTS, 0), ValueError, "d must be greater than or equal to 1"),
    (lambda: fit_pca(POINTS, 6), ValueError, "d=6 must be at most 5"),
    (lambda: fit_pca(IMAGES, 3).encode(IMAGES[:, :2]), ValueError, r"needs \[N, 3, 4, 4\]"),
    (lambda: fit_pca(IMAGES, 3).decode(torch.zeros(2, 4)), ValueError, r"needs \[N, 3\]"),
    (lambda: fit_pca(IMAGES, 3).sample(IMAGES, [0]), ValueError, "1 ids do not fit 24 images"),
    (lambda: AutoencoderConfig(channels=()), ValueError, "channels"),
    (lambda: AutoencoderConfig(lr=0.0), ValueError, "lr"),
])
def test_bad_input_is_named(make, error, words):
    with pytest.raises(error, match=words): make()


def test_files_that_do_not_belong_together(tmp_path):
    "Altered settings, other weights, half a file."
    space = fit(POINTS, config=VECTORS)
    space.save(tmp_path)
    settings = tmp_path / "config.json"
    text = settings.read_text(encoding="utf-8")
    settings.write_text(json.dumps(json.loads(text) | dict(scale=2.0)), encoding="utf-8")
    with pytest.raises(ValueError, match="altered"): LatentSpace.load(tmp_path)
    settings.write_text(text, encoding="utf-8")
    assert LatentSpace.load(tmp_path).encode(POINTS).equal(space.encode(POINTS))
    weights = tmp_path / "latent_space.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="truncated"): LatentSpace.load(tmp_path)


def test_a_finished_training_is_not_repeated(tmp_path):
    "Its checkpoint gives the same latent space at once; a checkpoint of other images is refused."
    first = fit(IMAGES, checkpoint=tmp_path / "a.ckpt")
    again = fit(IMAGES, checkpoint=tmp_path / "a.ckpt")
    assert again.encode(IMAGES).equal(first.encode(IMAGES)) and again.record["curve"] == first.record["curve"]
    with pytest.raises(ValueError, match="on other images"): fit(IMAGES.flip(0), checkpoint=tmp_path / "a.ckpt")


@pytest.mark.parametrize("steps", [1, 2, 20, 41])
def test_any_number_of_steps(steps):
    "Also fewer than measurements, and where a twentieth of them is one step."
    space = fit(POINTS, config=replace(VECTORS, steps=steps))
    assert space.record["curve"][-1][0] == steps and all(e < 1e3 for _, e in space.record["curve"])
