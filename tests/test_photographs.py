"""Folders as people have them: 24 reports about other tools, a test each, with small files that are made here."""
import errno
import io
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, features

from ucdm.core.files import printable
from ucdm.data import own_folder, photographs
from ucdm.data.class_names import check_class_names
from ucdm.data.duplicates import find_duplicates, near_pairs
from ucdm.data.folder import image_files, load_image_folder, load_unlabelled
from ucdm.data.images import content_ids, decode
from ucdm.data.own_folder import kept_reading, read_folder

# pictures


def picture(width=64, height=48):
    "Colours that differ from edge to edge, and a red square."
    y, x = np.mgrid[:height, :width]
    colours = np.stack([x * 200 // width, y * 200 // height, 60 + 0 * x], -1).astype(np.uint8)
    im = Image.fromarray(colours)
    im.paste("red", (width // 2, height // 3, width // 2 + width // 4, height // 3 + height // 4))
    return im


def encoded(im, kind="PNG", **settings):
    file = io.BytesIO()
    im.save(file, kind, **settings)
    return file.getvalue()


def ramp(low, high, dtype, side=32):
    return Image.fromarray(np.linspace(low, high, side * side).reshape(side, side).astype(dtype))


def with_chunk(png, kind, content): # after the header
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return png[:33] + chunk + png[33:]


def with_segment(jpeg, content): # of metadata
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


def write(folder, **files):
    "Files by name; __ in a name is a full stop."
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items(): (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def one(folder, data, name="a.png", **settings):
    "What is read of a folder with one file."
    write(folder, **{name: data})
    return read_folder(folder, **settings).images[0].int().numpy()


def apart(a, b): return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).mean()


PLAIN = encoded(picture())
SQUARE = decode(PLAIN).astype(int)


# 1 to 7: pixels as people see them

@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_01_upright(tmp_path, kind):
    exif = Image.Exif()
    exif[274] = 6
    photo = encoded(picture(), kind, exif=exif)
    assert apart(one(tmp_path, photo), decode(encoded(picture().rotate(-90, expand=True)))) < 3
    assert read_folder(tmp_path).sizes.tolist() == [[48, 64]]


@pytest.mark.parametrize("bad", [b"XX not t", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x01\x01\x12\xff\xff\0\0"])
def test_02_damaged_exif(tmp_path, bad):
    jpeg = with_segment(encoded(picture(), "JPEG"), b"Exif\0\0" + bad)
    assert apart(one(tmp_path, with_chunk(PLAIN, b"eXIf", bad)), SQUARE) == 0
    assert apart(one(tmp_path, jpeg), SQUARE) < 3


def test_03_metadata_that_are_no_text(tmp_path):
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta>\xff\xfe\xe9</x:xmpmeta>"
    assert apart(one(tmp_path, with_segment(encoded(picture(), "JPEG"), xmp)), SQUARE) < 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_04_sixteen_bits_are_scaled(tmp_path, kind):
    seen = one(tmp_path, encoded(ramp(0, 65535, np.uint16), kind))
    assert apart(seen[0], ramp(0, 255, np.uint8)) < 1


@pytest.mark.parametrize("low, high", [(0, 1), (-3, 9e4)])
def test_05_floats_are_scaled(tmp_path, low, high):
    seen = one(tmp_path, encoded(ramp(low, high, np.float32), "TIFF"), "a.tif")
    assert apart(seen[0], ramp(0, 255, np.uint8)) < 1


@pytest.mark.parametrize("alpha, level", [("white", 255), ("grey", 128), ("black", 0)])
def test_06_what_is_transparent_is_covered(tmp_path, alpha, level):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    noise[..., 3] = 0
    noise[8:24, 8:24] = 255, 0, 0, 255
    seen = one(tmp_path, encoded(Image.fromarray(noise)), alpha=alpha)
    assert (seen[:, 0] == level).all() and seen[:, 16, 16].tolist() == [255, 0, 0]


def test_07_cmyk(tmp_path):
    assert apart(one(tmp_path, encoded(picture().convert("CMYK"), "JPEG", quality=95)), SQUARE) < 6


# 8 to 12: which files are images

def test_08_every_kind_under_every_name(tmp_path):
    "By content, whatever the name; nothing is passed over without a word."
    kinds = {"a.gif": "GIF", "b.jp2": "JPEG2000", "c.jfif": "JPEG", "d.jpe": "JPEG", "e": "PNG", "f.webp": "WEBP",
             "g.bmp": "BMP", "h.dat": "TIFF", "i.ppm": "PPM"}
    if features.check("avif"): kinds["j.avif"] = "AVIF"
    write(tmp_path, **{name: encoded(picture(), kind) for name, kind in kinds.items()})
    found = read_folder(tmp_path)
    assert found.names == tuple(sorted(kinds))
    assert all(apart(x, SQUARE) < 12 for x in found.images)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"

def test_08_heic_is_named_where_its_library_lacks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    photographs.heif_ready.cache_clear()
    write(tmp_path, **{"a.png": PLAIN, "IMG_1.HEIC": HEIC, "other": HEIC})
    with pytest.raises(ValueError, match=r"2 of 3 .*IMG_1\.HEIC \(HEIC .*pip install 'ucdm\[heic\]'"): read_folder(tmp_path)
    assert [s.name for s in read_folder(tmp_path, on_error="skip").skipped] == ["IMG_1.HEIC", "other"]
    photographs.heif_ready.cache_clear()


def test_08_heic_is_read_where_its_library_is(tmp_path, monkeypatch):
    "It registers itself when the first such file comes."
    class Heif(ImageFile.ImageFile):
        format = "STANDIN"
        def _open(self):
            self._size, self._mode = (40, 30), "RGB"
            self.tile = []
        def load(self):
            self.im = Image.new("RGB", self._size, (9, 8, 7)).im
            return Image.Image.load(self)
    register = lambda: Image.register_open("STANDIN", Heif, lambda head: head[4:12] == b"ftypheic")
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    photographs.heif_ready.cache_clear()
    try:
        assert one(tmp_path, HEIC, "IMG_1.HEIC")[:, 5, 5].tolist() == [9, 8, 7]
        assert read_folder(tmp_path).sizes.tolist() == [[40, 30]]
    finally:
        photographs.heif_ready.cache_clear()
        Image.OPEN.pop("STANDIN", None)
        if "STANDIN" in Image.ID: Image.ID.remove("STANDIN")


def test_08_real_heic(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    photo = encoded(picture(), "HEIF", quality=90)
    Image.OPEN.pop("HEIF")
    Image.ID.remove("HEIF")
    photographs.heif_ready.cache_clear()
    assert apart(one(tmp_path, photo, "IMG_1.HEIC"), SQUARE) < 6


def test_09_capital_letters(tmp_path):
    write(tmp_path, **{"A.JPEG": encoded(picture(), "JPEG"), "B.Png": PLAIN})
    assert read_folder(tmp_path).names == ("A.JPEG", "B.Png")


def test_10_another_kind_under_a_common_name(tmp_path):
    assert apart(one(tmp_path, encoded(picture(), "WEBP", lossless=True), "a.jpg"), SQUARE) == 0


def test_11_other_files_are_counted(tmp_path):
    others = {"Thumbs.db": b"\xd0\xcf\x11\xe0", "desktop.ini": b"[x]", "notes.txt": b"P5 is a pixel format", "empty": b"",
              "film.mp4": b"\0\0\0\x18ftypisom\0\0\0\0isommp42", "BMW": b"BMW and Audi"}
    write(tmp_path, **{"a.png": PLAIN, ".DS_Store": b"x", "._a.png": b"x", "raw.NEF": b"II*\0"}, **others)
    found = read_folder(tmp_path)
    assert found.names == ("a.png",) and not found.skipped
    assert found.left_out["not images"] == tuple(sorted(others)) and found.left_out["hidden"] == (".DS_Store", "._a.png")
    assert ("raw.NEF",) in found.left_out.values() and "develop" in found.report() and "Thumbs.db" in found.report()


@pytest.mark.parametrize("hidden", [".thumbnails", ".ipynb_checkpoints", ".AppleDouble", "@eaDir", "__MACOSX"])
def test_12_hidden_folders(tmp_path, hidden):
    write(tmp_path, **{"a.png": PLAIN})
    write(tmp_path / "trip" / hidden / "deep", **{"a.png": PLAIN, "b.jpg": b"\0\5\x16\7"})
    assert load_unlabelled(tmp_path, ["cat"]).images.shape[0] == 1
    assert read_folder(tmp_path).left_out == {"hidden": (f"trip/{hidden}/",)}


# 13 to 15: what cannot be read

BROKEN = {"cut.jpg": encoded(picture(300, 300), "JPEG")[:900], "cut.png": PLAIN[:-40], "empty.jpg": b"",
          "header.gif": b"GIF89a", "page.jpg": b"<!doctype html>", "text.png": b"nothing"}

def test_13_broken_files_stop_or_are_listed(tmp_path):
    write(tmp_path, **BROKEN, **{"whole.png": PLAIN})
    for load in (read_folder, lambda folder: load_unlabelled(folder, ["cat"])):
        with pytest.raises(ValueError, match=r"6 of 7 .*cut\.jpg \(it is cut off\).*empty\.jpg \(the file is empty\)") as e:
            load(tmp_path)
        assert "whole" not in str(e.value) and "on_error='skip'" in str(e.value) and "\n" not in str(e.value)
    found = read_folder(tmp_path, on_error="skip")
    assert found.names == ("whole.png",) and [s.name for s in found.skipped] == sorted(BROKEN)
    assert dict(found.skipped)["page.jpg"] == "it holds a web page or other text"
    assert apart(found.images[0], SQUARE) == 0 and all(s.reason in found.report() for s in found.skipped)
    assert found.table()["skipped because"].tolist() == ["", *(s.reason for s in found.skipped)]
    assert len(load_unlabelled(tmp_path, ["cat"], on_error="skip")) == 1
    (tmp_path / "whole.png").unlink()
    with pytest.raises(ValueError, match="6 of 6 files"): read_folder(tmp_path, on_error="skip")


def test_13_images_stay_with_their_names(tmp_path):
    "Whatever is broken between them."
    for i in range(30):
        data = encoded(Image.new("RGB", (40, 40), (i, 0, 0)))
        write(tmp_path, **{f"{i:02}.png": data[:-30] if i % 4 == 1 else data})
    found = read_folder(tmp_path, on_error="skip")
    assert [int(n[:2]) for n in found.names] == found.images[:, 0, 0, 0].tolist() == [i for i in range(30) if i % 4 != 1]
    assert [p.name for p in found.paths] == list(found.names) and len(found.small) == len(found.sizes) == len(found)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_14_png_with_much_text(tmp_path, kind):
    packed = zlib.compress(bytes(70 * 2**20 if kind == b"iCCP" else 2**21))
    content = b"note\0\1\0\0\0" + packed if kind == b"iTXt" else b"note\0\0" + packed
    assert apart(one(tmp_path, with_chunk(PLAIN, kind, content)), SQUARE) == 0


def test_14_its_orientation_stays(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    turned = encoded(picture(), exif=exif)
    loud = with_chunk(turned, b"zTXt", b"note\0\0" + zlib.compress(bytes(2**21)))
    assert apart(one(tmp_path, loud), one(tmp_path, turned)) == 0


def test_15_large_images_are_named_and_can_be_allowed(tmp_path):
    write(tmp_path, **{"a.png": PLAIN, "large.png": encoded(picture(80, 60))})
    with pytest.raises(ValueError, match=r"large\.png \(80 x 60 pixels, the limit is 4,000.*max_pixels to 4800"):
        read_folder(tmp_path, max_pixels=4000)
    assert read_folder(tmp_path, max_pixels=4000, on_error="skip").names == ("a.png",)
    assert len(read_folder(tmp_path, max_pixels=4800)) == 2


# 16 and 17: links and names

def test_16_linked_folders_are_followed_once(tmp_path):
    "Loops and dangling links do no harm; what lies here keeps its own name."
    write(tmp_path / "far" / "deep", **{"1.png": PLAIN})
    photos = write(tmp_path / "photos", **{"z.png": PLAIN})
    write(photos / "real", **{"2.png": PLAIN})
    links = {"a": photos / "real", "b": tmp_path / "far", "c": tmp_path / "far" / "deep", "loop": photos, "up": tmp_path,
             "gone": tmp_path / "nowhere", "gone.png": tmp_path / "nowhere.png", "file.png": photos / "z.png"}
    for name, target in links.items(): (photos / name).symlink_to(target)
    (photos / "real" / "loop").symlink_to(photos / "real")
    found = read_folder(photos)
    assert found.names == ("b/deep/1.png", "file.png", "real/2.png", "z.png")
    assert sorted(sum(map(list, found.left_out.values()), [])) == [
        "a/", "c/", "gone", "gone.png", "loop/", "real/loop/", "up/"]


def test_17_any_name_works_and_can_be_printed(tmp_path):
    names = [b"caf\xe9.png", "写真 1.png".encode(), b"a,b;'\".png", b"two\nlines.png", b"-rf.png"]
    for name in names: Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(PLAIN)
    found = read_folder(tmp_path)
    assert set(found.names) == {"caf\\xe9.png", "写真 1.png", "a,b;'\".png", "two\\nlines.png", "-rf.png"}
    assert all(p.read_bytes() == PLAIN for p in found.paths)
    found.report().encode()
    for path in found.paths: path.write_bytes(PLAIN[:60])
    with pytest.raises(ValueError, match=r"caf\\xe9\.png") as e: load_unlabelled(tmp_path, ["cat"])
    str(e.value).encode()
    (tmp_path / "cat").mkdir()
    for path in found.paths: path.rename(tmp_path / "cat" / path.name)
    with pytest.raises(ValueError, match=r"caf\\xe9\.png") as e: load_image_folder(tmp_path)
    str(e.value).encode()


# 18 to 20: what an image shows

@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_18_first_picture_that_shows_something(tmp_path, kind):
    mode = "RGB" if kind == "TIFF" else "RGBA"
    blank, black, shown = (im.convert(mode) for im in (
        Image.new("RGBA", (64, 48)), Image.new("RGB", (64, 48)), picture()))
    lossless = dict(lossless=True) if kind == "WEBP" else {}
    save = lambda *frames: encoded(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    assert apart(one(tmp_path, save(black, blank, shown, black)), SQUARE) < 12
    assert apart(one(tmp_path, save(shown, black, shown.rotate(180))), SQUARE) < 12
    assert (one(tmp_path, save(black, black)) == 0).all()


def test_19_crop_pad_and_squash(tmp_path):
    "The choice is said, and padding and squashing keep what is at the edge."
    panorama = Image.new("RGB", (256, 32), (90, 90, 90))
    panorama.paste("red", (0, 8, 16, 24))
    write(tmp_path, **{"a.png": encoded(panorama)})
    red = lambda x: int(((x[0].int() > 150) & (x[1].int() < 80)).sum())
    found = {fit: read_folder(tmp_path, fit=fit) for fit in ("crop", "pad", "squash")}
    assert {fit: red(f.images[0]) > 0 for fit, f in found.items()} == dict(crop=False, pad=True, squash=True)
    assert all(f"fit='{fit}'" in f.report() for fit, f in found.items())
    assert read_folder(tmp_path, fit="pad", alpha="black").images[0, :, 0, 0].tolist() == [0, 0, 0]
    assert torch.equal(load_unlabelled(tmp_path, ["cat"], fit="pad").images, found["pad"].images)
    for fit in found: # the thinnest
        assert one(tmp_path, encoded(Image.new("RGB", (1, 3000), "red")), fit=fit)[:, 16].max() == 255


def test_20_copies_and_sizes_are_shown(tmp_path):
    photo = picture(400, 300)
    write(tmp_path, **{"a.png": encoded(photo), "b.png": encoded(photo), "c.jpg": encoded(photo.resize((200, 150)), "JPEG"),
                       "d.png": encoded(picture(300, 300).rotate(90)), "e.png": encoded(Image.new("RGB", (1, 1)))})
    write(tmp_path, **{"f.png": encoded(Image.new("RGB", (1, 3000))), "g.bmp": encoded(photo, "BMP")})
    found = read_folder(tmp_path)
    assert found.duplicates.exact == [("a.png", "b.png", "g.bmp")] # not the black ones, of two sizes
    assert found.duplicates.near == [("a.png", "c.jpg")]
    for said in ("exact copies: 2: a.png = b.png = g.bmp", "near copies: 1: a.png = c.jpg", "1 x 1 to 400 x 300",
                 "2 with a side below 32"):
        assert said in found.report()
    assert found.table()["copy of"].tolist() == ["", "a.png", "a.png", "", "", "", "a.png"]


def test_20_one_scene_all_day():
    "Every image is a copy of every other: one group, and no comparison of all with all."
    draw = np.random.default_rng(0)
    frames = (draw.integers(0, 200, (3, 32, 32)) + draw.integers(-3, 4, (400, 3, 32, 32))).clip(0, 255).astype(np.uint8)
    names = [f"{n}.jpg" for n in range(400)]
    assert find_duplicates(names, names, frames).near == [tuple(names)]
    assert 4000 < len(near_pairs(frames)) <= 400 * 32


# 21 to 24: what is not read into an image

def test_21_names_are_no_labels(tmp_path):
    write(tmp_path / "dog", **{"photo of a train.png": PLAIN})
    write(tmp_path / "train", **{"1.png": PLAIN})
    assert set(load_unlabelled(tmp_path, ["dog", "cat"]).labels.tolist()) == {-1}
    asked = read_folder(tmp_path).labelled()
    assert asked.classes == ("dog", "train") and asked.labels.tolist() == [0, 1]
    write(tmp_path, **{"2.png": PLAIN})
    with pytest.raises(ValueError, match=r"1 images lie in no class's folder: 2\.png"): read_folder(tmp_path).labelled()


def test_22_names_stay_with_images(tmp_path):
    "By full name; ids are those of the pixels, so that pairs are found again under another name."
    write(tmp_path, **{"1.png": PLAIN, "1.jpg": encoded(Image.new("RGB", (9, 9), "blue"), "JPEG")})
    write(tmp_path / "sub", **{"1.png": encoded(Image.new("RGB", (9, 9), "lime"))})
    found = read_folder(tmp_path)
    assert found.names == ("1.jpg", "1.png", "sub/1.png") and found.ids == content_ids(found.images)
    assert [found.folder / n for n in found.names] == list(found.paths) == image_files(tmp_path)
    assert torch.equal(load_unlabelled(tmp_path, ["cat"]).images, found.images)
    (tmp_path / "1.jpg").rename(tmp_path / "z.jpg")
    assert dict(zip(found.ids, found.images[:, 0, 0, 0].tolist())) == dict(
        zip((again := read_folder(tmp_path)).ids, again.images[:, 0, 0, 0].tolist()))


def test_23_no_frame_around_small_images(tmp_path):
    assert one(tmp_path, encoded(Image.new("RGB", (28, 28), (0, 200, 0))))[1].min() == 200
    assert (load_unlabelled(tmp_path, ["cat"]).images[:, 1] == 200).all()


@pytest.mark.parametrize("names, kind", [
    ([""], ValueError), ([3], TypeError), (["other"], ValueError), (["dog", " Other "], ValueError),
    ({"dog", "cat"}, ValueError), (frozenset({"dog"}), ValueError), (["dog", " dog"], ValueError)])
def test_24_class_names_are_checked(tmp_path, names, kind):
    write(tmp_path, **{"a.png": PLAIN})
    for door in (check_class_names, lambda n: load_unlabelled(tmp_path, n), read_folder(tmp_path).unlabelled):
        with pytest.raises(kind) as e: door(names)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("settings", [dict(size=0), dict(size=-1), dict(size="32"), dict(size=99999), dict(fit="stretch"),
                                      dict(alpha="red"), dict(on_error="ignore"), dict(max_pixels=0)])
def test_24_settings_are_checked(tmp_path, settings):
    write(tmp_path, **{"a.png": PLAIN[:50]})
    with pytest.raises((ValueError, TypeError), match=f"{next(iter(settings))} must be .*got"):
        read_folder(tmp_path, **settings)
    if "size" in settings:
        with pytest.raises((ValueError, TypeError), match="size must be .*got"): load_unlabelled(tmp_path, ["a"], **settings)


# speed and memory

def test_pixels_are_those_of_data_sets(tmp_path, monkeypatch):
    "Where both rules apply, so that pairs made of a folder before stay its pairs."
    monkeypatch.setattr("ucdm.data.images._LARGE", 2**18)
    files = {"a.png": PLAIN, "b.jpg": encoded(picture(1300, 900), "JPEG"), "c.png": encoded(picture(1300, 900)),
             "d.webp": encoded(picture(100, 300), "WEBP"), "e.png": encoded(picture(32, 32))}
    exif = Image.Exif()
    exif[274] = 8
    files["f.jpg"] = encoded(picture(1301, 901), "JPEG", exif=exif)
    files["g.png"] = encoded(picture(1301, 901), exif=exif)
    write(tmp_path, **files)
    for size in (32, 64):
        before = np.stack([decode(data, size) for data in files.values()])
        assert np.array_equal(load_unlabelled(tmp_path, ["cat"], size).images, before)
    assert torch.equal(read_folder(tmp_path).images, load_unlabelled(tmp_path, ["cat"]).images)


def test_large_jpegs_are_decoded_small(tmp_path, monkeypatch):
    "At every size that a classifier takes."
    seen = []
    monkeypatch.setattr(photographs, "first_visible", lambda im, options: seen.append(im.size) or im.convert("RGB"))
    write(tmp_path, **{"a.jpg": encoded(picture(2400, 1600), "JPEG")})
    for size in (32, 64, 128, 224): read_folder(tmp_path, size)
    assert seen == [(600, 400)] * 3 + [(1200, 800)]
    assert read_folder(tmp_path).sizes.tolist() == [[2400, 1600]]


def test_memory_of_threads_is_bounded(tmp_path, monkeypatch):
    "What is decoded at the same time needs no more than the limit; what needs more than half of it comes last, alone."
    at_once, most, busy = [], [], threading.Lock()
    def watched(im, options):
        need = 12 * im.width * im.height, threading.current_thread() is threading.main_thread()
        with busy:
            at_once.append(need)
            most.append(list(at_once))
        time.sleep(0.005)
        with busy: at_once.remove(need)
        return im.convert("RGB")
    monkeypatch.setattr(own_folder, "DECODING_MEMORY", 12 * 5000)
    monkeypatch.setattr(photographs, "first_visible", watched)
    for i in range(24):
        im = Image.new("RGB", ((i % 6 == 3) * 200 + 40, 40), (i, 0, 0))
        write(tmp_path, **{f"{i:02}.png": encoded(im)[:-30] if i == 9 else encoded(im)})
    found = read_folder(tmp_path, on_error="skip")
    assert found.images[:, 0, 0, 0].tolist() == [i for i in range(24) if i != 9] and found.skipped[0].name == "09.png"
    assert max(map(len, most)) > 1 and all(sum(need for need, _ in m) <= 12 * 5000 for m in most if len(m) > 1)
    alone = [m for m in most if m[0][1]] # the broken one twice: a PNG is tried again without its notes
    assert alone == most[-5:] == [[(12 * 240 * 40, True)]] * 5


def test_interrupted(tmp_path, monkeypatch):
    "Ctrl-C ends it, without the files that are still to come."
    read = []
    def stop(path, *_): read.append(path); time.sleep(0.01); raise KeyboardInterrupt
    monkeypatch.setattr(own_folder, "read_photograph", stop)
    for i in range(200): write(tmp_path, **{f"{i}.png": PLAIN})
    with pytest.raises(KeyboardInterrupt): read_folder(tmp_path)
    assert len(read) < 100


# stopped, and gone on with

@pytest.fixture
def many(tmp_path):
    return write(tmp_path / "photos", **{f"{i:02}.png": encoded(picture(40 + i, 40)) for i in range(40)})


@pytest.fixture
def read(monkeypatch):
    "The names of the files that are read; what was read is kept at once."
    names, real = [], own_folder.read_photograph
    monkeypatch.setattr(own_folder, "EVERY", 0.0)
    monkeypatch.setattr(own_folder, "read_photograph", lambda path, *more: names.append(path.name) or real(path, *more))
    return names


def same(a, b):
    for part in ("images", "small", "sizes"): assert torch.equal(getattr(a, part), getattr(b, part)), part
    assert (a.names, a.skipped, a.ids) == (b.names, b.skipped, b.ids)


SLOWLY = """
import sys, time
from ucdm.data import own_folder
real = own_folder.read_photograph
own_folder.EVERY, own_folder.read_photograph = 0.1, lambda *given: time.sleep(0.1) or real(*given)
own_folder.read_folder(sys.argv[1], kept=sys.argv[2])
"""


def test_killed_while_it_reads(many, tmp_path, read):
    "What blocks hold is not read again, and what comes of the folder is the same."
    kept = tmp_path / "kept"
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, many, kept])
    late = time.monotonic() + 120
    while len(list(kept.glob("*.block"))) < 2 and process.poll() is None and time.monotonic() < late: time.sleep(0.01)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    held = sum(len(own_folder._block(file)[0]) for file in kept.glob("*.block"))
    found = read_folder(many, kept=kept)
    assert len(set(read)) == len(read) == 40 - held < 40
    same(found, read_folder(many))


def test_only_what_fits_is_not_read_again(many, tmp_path, read, monkeypatch):
    "Changed and new files, those that could not be read, damaged blocks, and other settings."
    monkeypatch.setattr(own_folder, "BLOCK", 60_000) # of nine images
    def again(**settings):
        read.clear()
        found, now = read_folder(many, on_error="skip", kept=tmp_path / "kept", **settings), sorted(read)
        same(found, read_folder(many, on_error="skip", **settings))
        return now
    broken = many / "07.png"
    whole, state = broken.read_bytes(), broken.stat()
    broken.write_bytes(b"no image")
    everything = [f"{i:02}.png" for i in range(40)]
    assert again() == everything and again() == again() == ["07.png"]
    broken.write_bytes(whole)
    (many / "03.png").write_bytes(encoded(picture(50, 50)))
    (many / "04.png").rename(many / "x.png")
    assert again() == ["03.png", "07.png", "x.png"] and again() == []
    os.utime(many / "05.png", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert again() == ["05.png"]
    now = sorted(name for name in everything if name != "04.png") + ["x.png"]
    for other in (dict(size=16), dict(fit="pad"), dict(alpha="black"), dict(draft_side=64), dict(max_pixels=10**6)):
        assert again(**other) == now and again(**other) == []
    monkeypatch.setenv("UCDM_MAX_PIXELS", "3000")
    assert again() == now and again() == sorted(n for n in now if 40 * (40 + int(n[:2] if n[0] != "x" else 4)) > 3000)


def test_damaged_blocks_are_removed(many, tmp_path, read, monkeypatch):
    monkeypatch.setattr(own_folder, "EVERY", 0.0) # whatever was read is kept, however fast
    kept = tmp_path / "kept"
    whole = read_folder(many, kept=kept)
    first, *_ = blocks = sorted(kept.glob("*.block"))
    data = first.read_bytes()
    for spoilt in (data[:-10], data[:-10] + bytes(10), b"", b"no block"):
        first.write_bytes(spoilt)
        for again in {*kept.glob("*.block")} - {*blocks}: again.unlink() # what a slow machine kept in the last turn
        read.clear()
        same(read_folder(many, kept=kept), whole)
        assert read and not first.exists()
    assert set(blocks[1:]) < set(kept.iterdir())


@pytest.mark.parametrize("fails", ["mkdir", "disk_usage", "replace"])
def test_what_cannot_be_kept_is_one_line(many, tmp_path, read, capsys, monkeypatch, fails):
    "A folder that may not be written to, a disk that is nearly full, and one that is."
    def full(*_, **__): raise OSError(errno.ENOSPC, "No space left on device")
    if fails == "mkdir": (tmp_path / "kept").touch()
    if fails == "replace": monkeypatch.setattr("ucdm.core.files.os.replace", full)
    if fails == "disk_usage": monkeypatch.setattr(own_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    same(read_folder(many, kept=tmp_path / "kept"), read_folder(many))
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith("what is read cannot be kept in ") and ("exists" if fails == "mkdir" else "No space left") in line


def test_short_readings_are_not_kept(many, tmp_path, monkeypatch):
    "A folder of the cache goes when its work is done, stays after an error, and is not there for a week."
    monkeypatch.setenv("UCDM_CACHE", str(tmp_path / "cache"))
    with kept_reading(many, 32) as kept: read_folder(many, kept=kept)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(own_folder, "EVERY", 0.0)
    with pytest.raises(ValueError), kept_reading(many, 32) as kept: read_folder(many, kept=kept); raise ValueError
    assert kept.is_dir()
    with kept_reading(many, 64) as other: assert other != kept and kept.is_dir()
    os.utime(kept, (0, 0))
    with kept_reading(many, 64): assert not kept.exists()


def test_printable():
    assert printable("写真\u202f1.jpg") == "写真\u202f1.jpg" and printable("a\x1b[31m\u2028b") == "a\\x1b[31m\\u2028b"
    assert printable(Path(os.fsdecode(b"\xff/\xc3\xa9"))) == "\\xff/é"


def test_what_is_not_ours_stays_in_the_cache(tmp_path, monkeypatch):
    "Folders of other programs beside ours, and other files in one of ours."
    from ucdm.data import own_folder
    home = tmp_path / "reading"
    for name in ("books", "0123456789abcdef", "fedcba9876543210"): (home / name).mkdir(parents=True)
    for file in ("books/thesis.txt", "0123456789abcdef/a.block", "fedcba9876543210/b.block", "fedcba9876543210/mine.txt"):
        (home / file).write_text("x", encoding="utf-8")
    for place in home.iterdir(): os.utime(place, (0, 0))
    own_folder._forget_old(home)
    left = sorted(p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file())
    assert left == ["books/thesis.txt", "fedcba9876543210/mine.txt"] and not (home / "0123456789abcdef").exists()
    def locked_up(self, pattern): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "glob", locked_up)
    assert own_folder._blocks_in(home) == []
    own_folder._forget(home)
