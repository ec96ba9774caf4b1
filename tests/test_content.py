"""Content that nobody has looked at: images that are huge, rare or hollow, and pages that show what notebooks write."""
import base64
import hashlib
import io
import json
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from ucdm.batch.page import notebook_html, write_summary
from ucdm.batch.profiles import _Yaml
from ucdm.data import images
from ucdm.data.folder import load_image_folder, load_unlabelled
from ucdm.data.images import decode, decode_images, pixel_limit
from ucdm.report.tables import Table

ROOT = Path(__file__).parent.parent

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
    with pytest.raises(ValueError, match=r"2 of 24 files .*2 \(\w+\); 3 \("):
        decode_images(files, list(map(str, range(24))))


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


# pages

HOSTILE = [
    '<script>document.title = "PWNED"</script>',
    '<SCRIPT SRC=https://evil.example/x.js></SCRIPT>',
    '<scr<script>ipt>document.title = "PWNED"</scr</script>ipt>',
    '<img src=x onerror="document.title=\'PWNED\'">',
    '<img src="data:image/png;base64,AAAA" onload=document.title="PWNED">',
    '<img src="javascript:document.title=1"><img src="data:text/html,<script>x()</script>">',
    '<a href="javascript:document.title=1">a</a> <a href=" java&#x0a;script:x()">b</a> <a href="JaVaScRiPt:x()">c</a>',
    '[d](javascript:x()) <a href="data:text/html,<script>x()</script>">e</a> <a href="d&#97;ta:text/html,x">f</a>',
    '<a href="vbscript:x()">g</a> <a xlink:href="javascript:x()">h</a> <a href="https://a.example" onclick="x()">i</a>',
    '<svg onload="document.title=\'PWNED\'"><script>document.title="PWNED"</script>'
    '<a xlink:href="javascript:x()">j</a></svg>',
    '<math><mtext><table><mglyph><style><!--</style><img src=x onerror=document.title="PWNED">',
    '<iframe src="javascript:parent.document.title=1"></iframe><iframe srcdoc="<script>x()</script>"></iframe>',
    '<object data="x.swf"></object><embed src="x.swf"><base href="https://evil.example/">',
    '<form action="javascript:x()"><input autofocus onfocus="document.title=\'PWNED\'">'
    '<button formaction="javascript:x()">k',
    '<meta http-equiv="refresh" content="0;url=javascript:x()"><link rel="stylesheet" href="javascript:x()">',
    '<style>body { background: url(javascript:x()) } </style><style>@import "https://evil.example/x.css";</style>',
    '<style>#T_1 td { color: "</style><script>document.title=\'PWNED\'</script>" }</style>',
    '<style>.dataframe td { color: \\3c /style\\3e } #T_2 { position: fixed; color: red }</style>',
    '<p style="background: url(javascript:x()); position: fixed; color: blue">l</p>',
    '--><!--[if IE]><script>x()</script><![endif]--><noscript><p title="</noscript><img src=x onerror=x()>">',
    '</div></body></html><script>document.title = "PWNED"</script>',
    '$\\href{javascript:document.title=1}{x}$ and $a < b$',
    '\x1b[31m<script>document.title = "PWNED"</script>\x1b[0m',
    '```\n<script>document.title = "PWNED"</script>\n```',
]
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20" onload="x()"><script>x()</script>'
    '<rect width="9" height="9"/></svg>'
)


def hostile_notebook(path):
    "Every piece in every place: Markdown, source, and each kind of output; widgets with state; an isolated frame."
    cell = lambda kind, source, **more: dict(cell_type=kind, metadata={}, source=source, **more)
    shown = lambda data, **more: dict(output_type="display_data", data=data, metadata=more)
    cells = [cell("raw", HOSTILE[0]), cell("markdown", "# Good\n\n| a | b |\n|---|---|\n| 1 | **2** |")]
    for bad in HOSTILE:
        outputs = [
            shown({"text/html": bad}), shown({"text/markdown": bad}), shown({"text/latex": bad}),
            shown({"image/svg+xml": SVG}), shown({"application/javascript": "document.title = 'PWNED'"}),
            shown({"text/html": bad}, **{"text/html": {"isolated": True}}), shown({"text/plain": bad}),
            shown({"image/png": '"><script>document.title = "PWNED"</script>'}),
            shown({"application/vnd.jupyter.widget-view+json": {"model_id": "</script><script>x()</script>"}}),
            dict(output_type="stream", name="stdout", text=bad), dict(output_type="stream", name="stderr", text=bad),
            dict(output_type="error", ename=bad, evalue=bad, traceback=[bad]),
        ]
        cells += [cell("markdown", bad), cell("code", bad, execution_count=None, outputs=outputs)]
    state = {"x": {"model_name": "HTMLModel", "state": {"value": "</script><script>document.title = 'PWNED'</script>"}}}
    widgets = {"application/vnd.jupyter.widget-state+json": {"version_major": 2, "state": state}}
    nb = dict(cells=cells, metadata={"widgets": widgets, "title": HOSTILE[0]}, nbformat=4, nbformat_minor=4)
    path.write_text(json.dumps(nb), encoding="utf-8")
    return path


class Live(HTMLParser):
    "What a browser would run or follow in a page."
    def __init__(self, text):
        super().__init__()
        self.found, self.tags, self.text = [], set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag in ("script", "iframe", "object", "embed", "base", "form", "input", "svg", "math", "link"):
            self.found.append((tag, attributes))
        for name, value in attributes:
            address = re.sub(r"[\x00-\x20]", "", value or "").lower()
            program = address.startswith(("javascript:", "vbscript:", "data:"))
            program = program and not address.startswith("data:image/") and name != "title"
            if name.startswith("on") or program or "url(" in address: self.found.append((tag, name, value))

    def handle_data(self, data): self.text += data


def test_a_hostile_notebook_is_shown_and_does_nothing(tmp_path):
    "Its characters can be read, and nothing of it is run: by what stands in the page, and by what the browser is told."
    notebook_html(hostile_notebook(tmp_path / "a.ipynb"), HOSTILE[0])
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    ours = re.findall(r"<script.*?</script>", page)
    assert len(ours) == 2 and '["ui/safe"]' in ours[0] and "cdn.jsdelivr.net/npm/mathjax@3/" in ours[1]
    digest = base64.b64encode(hashlib.sha256(ours[0][8:-9].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}' https://cdn.jsdelivr.net/npm/mathjax@3/;" in page
    for script in ours: page = page.replace(script, "")
    live = Live(page)
    assert not live.found
    assert {"table", "td", "strong", "img"} <= live.tags
    assert 'document.title = "PWNED"' in live.text and "$a < b$" in live.text
    style = re.findall(r"<style>(.*?)</style>", page, re.S)[1:]
    assert len(style) == 1 and not re.search(r"position|@import|evil", style[0])


def test_pages_of_our_own_look_as_before(tmp_path):
    "Tables with their marks, pictures, formulas, coloured code, links and anchors."
    frame = pd.DataFrame({"a < b": ["66.2", "75.3"]}, index=["UCDM", "MTCF"])
    marks = pd.DataFrame({"a < b": ["second", "best"]}, index=frame.index)
    table = Table(frame, frame, "Table 1: so & so", marks=marks)
    png = base64.b64encode(encoded(Image.new("RGB", (4, 4)))).decode()
    shown = ({"text/html": table._repr_html_()}, {"text/html": frame._repr_html_()}, {"image/png": png},
             {"image/svg+xml": SVG})
    outputs = [dict(output_type="display_data", metadata={}, data=data) for data in shown]
    code = dict(cell_type="code", metadata={}, source="x = 1 < 2 # yes", execution_count=None, outputs=outputs)
    text = dict(cell_type="markdown", metadata={}, source="## A part\n\n$x < y$, [see](b.html#A-part), ![](c.png) *so*")
    nb = dict(cells=[text, code], metadata={}, nbformat=4, nbformat_minor=4)
    (tmp_path / "a.ipynb").write_text(json.dumps(nb), encoding="utf-8")
    notebook_html(tmp_path / "a.ipynb", "A & B")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    uuid = re.search(r'<table id="(T_\w+)"', page)[1]
    for part in (f"#{uuid}_row1_col0 {{ font-weight: bold; }}", f"#{uuid}_row0_col0 {{ text-decoration: underline; }}",
                 f"#{uuid} caption", ".dataframe tbody tr th", f'src="data:image/png;base64,{png}"',
                 'src="data:image/svg+xml;base64,', '<h2 id="A-part">', "$x &lt; y$", 'href="b.html#A-part"',
                 'src="c.png"', "<em>so</em>", '<span class="mi">1</span>', "<title>A &amp; B</title>"):
        assert part in page, part


def test_summary_shows_what_anyone_wrote(tmp_path):
    "Titles, claims, errors, logs, parameters, numbers, evidence and file names, as their characters."
    bad, figure = HOSTILE[0] + HOSTILE[3], "javascript:x()#.png"
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "results").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / figure)
    (tmp_path / "broken.png").write_bytes(encoded(Image.new("RGB", (90, 90)))[:60])
    (tmp_path / "huge.png").write_bytes(claims(60000, 60000))
    entry = dict(status="done", seconds=1, title=bad, claim=bad, error=bad, traceback=bad, parameters={bad: bad})
    (tmp_path / "results" / "batch.json").write_text(
        json.dumps(dict(jobs={name: entry for name in (bad[:40].replace("/", ""), "b", "c")})), encoding="utf-8"
    )
    checks = [dict(claim=bad, evidence=bad, holds=True)]
    def result(name):
        figures = {"b": "broken.png", "c": "huge.png"}.get(name, figure)
        return dict(verdict=bad, numbers={bad: bad}, checks=checks, runs=[bad], figures=[figures], tables=[figure])
    where = dict(commit=None, dirty=None, device=bad, packages=dict(torch=bad), started=bad)
    batch = SimpleNamespace(out=tmp_path, jobs=[], experiments=None, outcomes={}, result=result, facts=where,
                            profile=bad, description=bad, invocation=bad, began=0, workers=1)
    page = write_summary(batch).read_text(encoding="utf-8")
    live = Live(page)
    assert not live.found and "script" not in live.tags
    assert live.text.count('document.title = "PWNED"') > 10 and 'href="javascript%3Ax%28%29%23.png"' in page
    assert "default-src 'none'" in page and page.count("data:image/webp") == 1


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(not CHROMIUM, reason="no browser: install chromium")
def test_nothing_runs_in_a_browser(tmp_path):
    "A script that runs would name the page anew. First a page that is not cleaned: the browser does run it."
    def title(page):
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
                   "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
        seen = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        return re.search(r"<title>(.*?)</title>", seen)[1]
    (tmp_path / "raw.html").write_text(f"<title>calm</title>{HOSTILE[3]}", encoding="utf-8")
    assert title(tmp_path / "raw.html") == "PWNED"
    notebook_html(hostile_notebook(tmp_path / "a.ipynb"), "calm")
    assert title(tmp_path / "a.html") == "calm"


def test_documentation_shows_what_notebooks_wrote(tmp_path):
    "The page of an experiment on the site, with hostile Markdown, outputs, title and results."
    pytest.importorskip("smalldocs")
    from ucdm.dev.docs import NotebookSite
    from ucdm.dev.pages import results_section
    bad = HOSTILE[3]
    (tmp_path / "results").mkdir()
    found = dict(verdict=bad, checks=[dict(claim=bad, evidence=HOSTILE[0], holds=True)], figures=[], tables=["a.md"])
    (tmp_path / "results" / "a.json").write_text(json.dumps(found), encoding="utf-8")
    (tmp_path / "a.md").write_text(HOSTILE[6], encoding="utf-8")
    home = tmp_path / "proc" / "experiments" / "paper"
    home.mkdir(parents=True)
    for name in ("_quarto.yml", "nbdev.yml", "sidebar.yml", "styles.css"):
        if (ROOT / "nbs" / name).exists(): shutil.copy(ROOT / "nbs" / name, tmp_path / "proc" / name)
    nb = json.loads(hostile_notebook(home / "a.ipynb").read_text(encoding="utf-8"))
    title = dict(cell_type="raw", metadata={}, source=f"---\ntitle: '*T* {HOSTILE[4]}'\n---")
    results = dict(cell_type="markdown", metadata={}, source=results_section(tmp_path, "a", "../.."))
    nb["cells"] = [title, *nb["cells"][1:], results, dict(results, source="## Last\n\n| a |\n|---|\n| **9** |")]
    (home / "a.ipynb").write_text(json.dumps(nb), encoding="utf-8")
    site = NotebookSite(ROOT, tmp_path / "proc", tmp_path / "out")
    for src in site.discover(): site.pages[src] = site.read(src)
    for page in site.pages.values():
        site.render_page(page)
        live = Live(page.html + page.env["title_html"])
        assert not live.found
        assert {"table", "strong", "img", "h2"} <= live.tags and 'document.title = "PWNED"' in live.text
        assert 'data-anchor-id="last"' in page.html


# files of strangers

def test_nothing_unpickles():
    """torchvision's loader of CIFAR does, once the MD5 sums are right (test_data); our own code nowhere. YAML is read by
    a kind of SafeLoader.
    """
    assert issubclass(_Yaml, yaml.SafeLoader)
    modules = r"\b(pickle|joblib|dill|shelve|marshal)\b"
    unpickles = re.compile(modules + r"|allow_pickle|read_pickle|trust_remote_code(?!=False)|yaml\.(load\((?!text, _Yaml\))|unsafe)")
    for file in sorted((ROOT / "ucdm").rglob("*.py")):
        code = file.read_text(encoding="utf-8")
        assert not unpickles.search(code), file
        assert code.count("torch.load(") == code.count("weights_only=True"), file
        assert code.count("use_safetensors=True") >= code.count("kind.from_pretrained("), file
