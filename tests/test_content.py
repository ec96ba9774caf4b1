"""Content that nobody has looked at: images that are huge, rare or hollow, and pages that show what notebooks write."""
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ucdm.data import images
from ucdm.data.folder import load_image_folder, load_unlabelled
from ucdm.data.images import decode, decode_images, pixel_limit, UnusableImage

# images


def encoded(im, kind="PNG", **settings):
    file = io.BytesIO()
    im.save(file, kind, **settings)
    return file.getvalue()


def claims(width, height):
    "A PNG that says how large it is, and holds no pixels."
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def ramp(low, high, dtype, side=64):
    return np.linspace(low, high, side * side).reshape(side, side).astype(dtype)


@pytest.mark.parametrize("width, height", [(13000, 13000), (60000, 60000)])
def test_huge_images_are_refused_by_name(tmp_path, monkeypatch, width, height):
    "Before a pixel is decoded, whether or not Pillow would have let it pass; the message says how to raise the limit."
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "bomb.png").write_bytes(claims(width, height))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    for load in (load_image_folder, lambda folder: load_unlabelled(folder, ("cat",))):
        with pytest.raises(ValueError, match=rf"bomb\.png \({width:,} x {height:,} pixels.*UCDM_MAX_PIXELS"):
            load(tmp_path)


def test_limit_can_be_raised_and_lowered(tmp_path, monkeypatch):
    "By an argument of every loader, or in the environment; what Pillow refuses by itself is read, too."
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (80, 50), (9, 9, 9)).save(tmp_path / "cat" / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000) # Pillow refuses twice that
    loaders = (load_image_folder, lambda folder, **limit: load_unlabelled(folder, ("cat",), **limit))
    for load in loaders:
        assert load(tmp_path).images.unique().tolist() == [9]
        with pytest.raises(ValueError, match="80 x 50 pixels, the limit is 3,999"): load(tmp_path, max_pixels=3999)
        assert len(load(tmp_path, max_pixels=4000)) == 1
    assert Image.MAX_IMAGE_PIXELS == 1000
    monkeypatch.setenv("UCDM_MAX_PIXELS", "3999")
    with pytest.raises(ValueError, match=r"a\.png .*3,999"): load_image_folder(tmp_path)
    for wrong in ("0", "-1", "many", "1e9"):
        monkeypatch.setenv("UCDM_MAX_PIXELS", wrong)
        with pytest.raises(ValueError, match=f"UCDM_MAX_PIXELS must be .* above 0, got '{wrong}'"): pixel_limit()


def test_large_photographs_are_decoded_small(monkeypatch):
    "A JPEG much larger than wanted is decoded at part of its size, and looks the same; one a little larger is not."
    y, x = np.mgrid[:1500, :2100] / 400
    waves = np.stack([np.sin(x + y), np.cos(x * y), np.sin(x - 2 * y)], -1) * 100 + 128
    photo, sizes = Image.fromarray(waves.astype(np.uint8)), []
    shrunk = images._shrunk
    monkeypatch.setattr(images, "_shrunk", lambda im, size: sizes.append(im.size) or shrunk(im, size))
    seen = decode(encoded(photo, "JPEG", quality=95)), decode(encoded(photo)), decode(encoded(photo, "JPEG"), 64)
    assert sizes == [(525, 375), (2100, 1500), (1050, 750)]
    assert np.abs(seen[0].astype(int) - seen[1]).max() <= 2
    monkeypatch.setattr(images, "_LARGE", 2**20)
    assert np.abs(decode(encoded(photo)).astype(int) - seen[1]).max() <= 1 # averaged first, for its memory
    for size in ((511, 700), (64, 64), (32, 32)): decode(encoded(photo.resize(size), "JPEG"))
    assert sizes[-3:] == [(511, 700), (64, 64), (32, 32)]


def test_large_images_are_decoded_one_by_one(monkeypatch):
    "In their places, among small ones and broken ones."
    monkeypatch.setattr(images, "_LARGE", 100)
    at_once, most, finish = [], [], images._finish
    def watched(im, size):
        if images._is_large(im): at_once.append(1), most.append(len(at_once))
        held = images._is_large(im), finish(im, size)
        if held[0]: at_once.pop()
        return held[1]
    monkeypatch.setattr(images, "_finish", watched)
    files = [encoded(Image.new("L", (side, side), i)) for i, side in enumerate([40, 5, 40, 40, 5, 40] * 4)]
    assert decode_images(files, [str(i) for i in range(24)])[:, 0, 0, 0].tolist() == list(range(24))
    assert most == [1] * 16
    files[2:4] = [encoded(Image.new("L", (40, 40)))[:-20], b""]
    with pytest.raises(ValueError, match=r"2 of 24 files .*2 \(\w+\); 3 \("): decode_images(files, list(map(str, range(24))))


@pytest.mark.parametrize("kind, low, high, dtype", [
    ("PNG", 0, 65535, np.uint16), ("PNG", 300, 4095, np.uint16), ("TIFF", 300, 60000, np.uint16),
    ("TIFF", -70000, 70000, np.int32), ("TIFF", 0, 1, np.float32), ("TIFF", -3e4, 9e9, np.float32)])
def test_deep_images_keep_their_levels(kind, low, high, dtype):
    "From the lowest value of the image to its highest, whatever they are."
    file = encoded(Image.fromarray(ramp(low, high, dtype)), kind)
    expected = decode(encoded(Image.fromarray(ramp(0, 255, np.float32).round().astype(np.uint8))))
    assert np.abs(decode(file).astype(int) - expected).max() <= 1


def test_deep_images_with_nothing_in_them(tmp_path):
    "One value only is black; not a number counts as the lowest; no number at all is refused by name."
    level = np.full((32, 32), 7.5, np.float32)
    assert not decode(encoded(Image.fromarray(level), "TIFF")).any()
    level[0] = np.nan, *[np.inf] * 31
    level[1] = 8.5
    assert decode(encoded(Image.fromarray(level), "TIFF"))[0, :3, :2].tolist() == [[0, 255], [255, 255], [0, 0]]
    (tmp_path / "void.tiff").write_bytes(encoded(Image.fromarray(np.full((32, 32), np.nan, np.float32)), "TIFF"))
    with pytest.raises(ValueError, match=r"void\.tiff \(none of its values is a finite number\)"):
        load_unlabelled(tmp_path, ("cat",))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "palette with alpha"])
def test_transparency_shows_white(mode):
    "A shape that exists in alpha alone is seen, whichever way the file says what is transparent."
    shape = np.tri(32, dtype=bool)
    if mode in ("RGBA", "LA"):
        im = Image.new(mode, (32, 32))
        im.putalpha(Image.fromarray(shape.astype(np.uint8) * 255))
        file = encoded(im)
    else:
        im = Image.fromarray(shape.astype(np.uint8)).convert("P")
        im.putpalette([0] * 6)
        file = encoded(im, transparency=0 if mode == "P" else b"\0\xff")
    assert np.array_equal(decode(file), np.where(shape, 0, 255)[None].repeat(3, 0))


def test_opaque_images_stay_as_they_are():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    opaque = Image.fromarray(noise).convert("RGBA")
    assert np.array_equal(decode(encoded(opaque)), noise.transpose(2, 0, 1))


def test_animations_give_their_first_picture():
    frames = [Image.new("RGB", (40, 40), c) for c in ("red", "blue", "lime")]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        held = dict(lossless=True) if kind == "WEBP" else {}
        file = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **held)
        assert decode(file)[:, 9, 9].tolist() == [255, 0, 0], kind


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("side", [60, 900])
def test_photographs_are_turned_upright(kind, side):
    "By any of the eight orientations, those that are decoded at part of their size too."
    stored = np.zeros((side, side, 3), np.uint8)
    stored[: side // 2, : side // 2] = 250 # one bright corner: where it ends up
    corners = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}
    for orientation, (row, column) in corners.items():
        exif = Image.Exif()
        exif[274] = orientation
        seen = decode(encoded(Image.fromarray(stored), kind, exif=exif))[0, 4::24, 4::24] > 128
        assert np.argwhere(seen).tolist() == [[row, column]], orientation


@pytest.mark.parametrize("mode, kind", [
    ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("P", "PNG"), ("P", "GIF"), ("YCbCr", "JPEG"), ("1", "PNG")])
def test_other_colour_spaces(mode, kind):
    seen = decode(encoded(Image.new("RGB", (32, 32), (255, 0, 0)).convert(mode), kind)).astype(int)
    assert len(set(seen[:, 16, 16])) == 1 if mode == "1" else np.abs(seen[:, 16, 16] - (255, 0, 0)).max() <= 3
