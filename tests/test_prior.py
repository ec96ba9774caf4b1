"""Generators from the hub and from folders: a download that is killed, a hub that is down, files that arrive damaged, layouts of older versions.
Generating with them: in several processes, and with too little memory."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import torch
from processes import finish, python, read_until
from safetensors.torch import load_file, save_file

import ucdm.diffusion.prior as prior_module
from ucdm.data.images import ImageSet
from ucdm.data.datasets import load_dataset
from ucdm.method.pairs import PairConfig
from ucdm.method.generate import generate_pairs
from ucdm.core.device import compiled
from ucdm.diffusion.prior import load_prior
from ucdm.diffusion.stable_diffusion_2 import SD2_BASE, clip_tokenizer, random_pipeline, shrunk

UNET = "unet/diffusion_pytorch_model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A small copy of Stable Diffusion 2."
    path = tmp_path_factory.mktemp("sd2")
    random_pipeline(shrunk(SD2_BASE), clip_tokenizer(["A photo of a cat", "A photo of a dog"])).save_pretrained(path)
    return path


def load(name, **kwargs): return load_prior(name, device="cpu", dtype=torch.float32, **kwargs)


# what is asked of the hub

@pytest.mark.parametrize("name, revision, expected", [("owner/model", None, None), ("owner/model", "v1", "v1"), ("owner/model@v1", None, "v1"), ("owner/model@refs/pr/3", None, "refs/pr/3")])
def test_revision_reaches_the_hub(folder, monkeypatch, name, revision, expected):
    asked = []
    def download(hub_id, **kwargs):
        asked.append((hub_id, kwargs))
        return folder
    monkeypatch.setattr(prior_module.StableDiffusionPipeline, "download", download)
    load(name, revision=revision)
    (hub_id, kwargs), = asked
    assert (
        hub_id == "owner/model"
        and kwargs["revision"] == expected
        and kwargs["use_safetensors"]
        and kwargs["safety_checker"] is None
    )


def test_a_folder_has_no_revision(folder):
    with pytest.raises(ValueError, match="revision='v1' is for a hub id"): load(folder, revision="v1")


# layouts

def test_layout_of_the_published_weights(folder, tmp_path):
    """Stable Diffusion 2 was saved by versions of 2022: other names of tensors, less in the configurations, a
    tokenizer in four files.
    """
    shutil.copytree(folder, old := tmp_path / "old")
    text = load_file(folder / "text_encoder/model.safetensors")
    save_file(
        {f"text_model.{k.removeprefix('text_model.')}": v for k, v in text.items()}
        | {"text_model.embeddings.position_ids": torch.arange(77)[None]},
        old / "text_encoder/model.safetensors",
        metadata={"format": "pt"},
    )
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    def renamed(key):
        for new, old in names.items() if "attentions" in key else (): key = key.replace(new, old)
        return key
    save_file(
        {renamed(k): v for k, v in load_file(folder / "vae/diffusion_pytorch_model.safetensors").items()},
        old / "vae/diffusion_pytorch_model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((old / "vae/config.json").read_text(encoding="utf-8"))
    kept = (
        "_class_name",
        "act_fn",
        "block_out_channels",
        "down_block_types",
        "in_channels",
        "latent_channels",
        "layers_per_block",
        "norm_num_groups",
        "out_channels",
        "sample_size",
        "up_block_types",
    )
    config = {k: config[k] for k in kept} | {"_diffusers_version": "0.8.0"}
    (old / "vae/config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = json.loads((folder / "tokenizer/tokenizer.json").read_text(encoding="utf-8"))["model"]
    shutil.rmtree(old / "tokenizer")
    (old / "tokenizer").mkdir()
    special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    (old / "tokenizer/vocab.json").write_text(json.dumps(tokenizer["vocab"]), encoding="utf-8")
    (old / "tokenizer/merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{m if isinstance(m, str) else ' '.join(m)}\n" for m in tokenizer["merges"]),
        encoding="utf-8",
    )
    (old / "tokenizer/special_tokens_map.json").write_text(json.dumps(special | {"pad_token": "!"}), encoding="utf-8")
    (old / "tokenizer/tokenizer_config.json").write_text(
        json.dumps(special | {"pad_token": "<|endoftext|>", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}),
        encoding="utf-8",
    )
    index = json.loads((old / "model_index.json").read_text(encoding="utf-8"))
    # a class that is gone; it belongs to the safety checker
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    (old / "model_index.json").write_text(json.dumps(index), encoding="utf-8")

    new, old = load(folder), load(old)
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert new.fingerprint == old.fingerprint and old.pipe.tokenizer.pad_token == "!"
    assert torch.equal(new.embed(["", "A photo of a cat"]), old.embed(["", "A photo of a cat"])) and torch.equal(
        new.encode(images), old.encode(images)
    )


def test_weights_in_shards(folder, tmp_path):
    shutil.copytree(folder, sharded := tmp_path / "sharded")
    (sharded / UNET).unlink()
    pipe = load(folder).pipe
    pipe.unet.save_pretrained(sharded / "unet", max_shard_size="15MB")
    first = sorted((sharded / "unet").glob("*-00001-*"))[0]
    assert load(sharded).fingerprint == load(folder).fingerprint
    first.unlink()
    with pytest.raises(ValueError, match=f"{first.name} is missing"): load(sharded)


@pytest.mark.parametrize("part, changes, message", [
    ("unet", dict(sample_size=[8, 16]), "sample_size"), ("vae", dict(latent_channels=8), "cannot be read"), ("text_encoder", dict(num_hidden_layers=24), "tensors of text_encoder")])
def test_configuration_of_another_model(folder, tmp_path, part, changes, message):
    shutil.copytree(folder, other := tmp_path / "other")
    file = other / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    with pytest.raises(ValueError, match=message): load(other)


def test_unet_of_an_inpainting_model():
    config = shrunk(SD2_BASE)
    pipe = random_pipeline(
        {**config, "unet": {**config["unet"], "in_channels": 9}}, clip_tokenizer(["A photo of a cat"])
    )
    with pytest.raises(ValueError, match="takes 9 channels"): prior_module.Prior(pipe, "inpainting", "cpu")


# a hub of our own

class Hub(ThreadingHTTPServer):
    "As much of the hub as a download asks for. `state`: 'up', 'down', or 'stalling' in the middle of the UNet."
    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Request)
        self.daemon_threads = True
        self.state, self.asked, self.served, self.stalled = "up", [], set(), threading.Event()
        self.files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.released = threading.Event()


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for k, v in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(k, v)
        self.end_headers()
        if self.command == "GET": self.wfile.write(body)

    def do_HEAD(self): self.do_GET()

    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        hub.asked.append((path, self.headers.get("Range")))
        if hub.state == "down": return self.answer(503)
        if not path.removeprefix("/api/models").startswith("/owner/small"):
            return self.answer(404, **{"X-Error-Code": "RepoNotFound"})
        if "/tree/" in path:
            return self.answer(
                200,
                json.dumps(
                    [
                        dict(type="file", path=p, size=len(c), oid=hashlib.sha1(c).hexdigest())
                        for p, c in hub.files.items()
                    ]
                ).encode(),
                **{"Content-Type": "application/json"},
            )
        if path.startswith("/api/"):
            if path.rsplit("/", 1)[1] not in ("v1", COMMIT):
                return self.answer(404, **{"X-Error-Code": "RevisionNotFound"})
            return self.answer(
                200,
                json.dumps(
                    dict(id="owner/small", sha=COMMIT, siblings=[dict(rfilename=p) for p in hub.files])
                ).encode(),
                **{"Content-Type": "application/json"},
            )
        name = path.split("/resolve/")[1].split("/", 1)[1]
        if name not in hub.files: return self.answer(404, **{"X-Error-Code": "EntryNotFound"})
        content, etag = hub.files[name], hashlib.sha256(hub.files[name]).hexdigest()
        start = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"} | (
            {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if self.headers.get("Range") else {}
        )
        if hub.state == "stalling" and name == UNET and self.command == "GET":
            self.send_response(200)
            for k, v in {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(k, v)
            self.end_headers()
            self.wfile.write(content[:len(content) // 2])
            self.wfile.flush()
            hub.stalled.set()
            return hub.released.wait(120)
        self.answer(206 if self.headers.get("Range") else 200, content[start:], **headers)
        if self.command == "GET": hub.served.add(name)


LOADS = """
import sys, torch
from ucdm.data.images import ImageSet
from ucdm.data.datasets import load_dataset
from ucdm.method.pairs import PairConfig
from ucdm.method.generate import generate_pairs
from ucdm.core.device import compiled
from ucdm.diffusion.prior import load_prior
for line in sys.stdin:
    try: print("loaded", load_prior(line.strip(), device="cpu", dtype=torch.float32).fingerprint, flush=True)
    except ValueError as e: print("ValueError", " ".join(str(e).split()), flush=True)
"""


@pytest.fixture
def hub(folder, tmp_path):
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    environment = {
        k: v for k, v in environment.items() if k not in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    }
    processes = []
    def start():
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", LOADS],
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=open(tmp_path / "stderr", "a", encoding="utf-8"),
            )
        )
        return processes[-1]
    server.start_loading, server.cache = start, tmp_path / "home" / "hub" / "models--owner--small"
    yield server
    for process in processes: process.kill(); process.wait()
    server.released.set()
    server.shutdown()


def ask(process, name):
    process.stdin.write(f"{name}\n")
    process.stdin.flush()
    return read_until(process, lambda line: True)[-1].strip()


def test_interrupted_download(hub, folder):
    "Killed in the middle of the UNet, tried without the hub, gone on with, damaged, mended."
    hub.state = "stalling"
    first = hub.start_loading()
    first.stdin.write("owner/small@v1\n")
    first.stdin.flush()
    assert hub.stalled.wait(240)
    others = set(hub.files) - {UNET}
    for _ in range(600):
        if hub.served >= others: break
        first.poll() is None and threading.Event().wait(0.1)
    assert hub.served >= others
    threading.Event().wait(1) # what was sent last gets written
    first.kill()
    first.wait()
    hub.released.set()
    assert any(path == "/api/models/owner/small/revision/v1" for path, _ in hub.asked)

    hub.state = "down"
    second = hub.start_loading()
    said = ask(second, "owner/small@v1")
    assert (
        said.startswith("ValueError")
        and f"{UNET} is missing" in said
        and "Load it again" in said
        and "could not be asked" in said
    )

    hub.state, hub.asked = "up", []
    loaded = f"loaded {load(folder).fingerprint}"
    assert ask(second, "owner/small@v1") == loaded
    assert {path.split(COMMIT + "/")[-1] for path, _ in hub.asked if "/resolve/" in path} == {UNET} # the rest was there

    hub.state, hub.asked = "down", []
    assert ask(second, "owner/small@v1") == loaded # whole: the hub is not needed

    blob = (hub.cache / "snapshots" / COMMIT / UNET).resolve()
    blob.write_bytes(blob.read_bytes()[:-1000])
    said = ask(second, "owner/small@v1")
    assert f"{UNET} is truncated" in said and f"Delete {blob} and load it again" in said
    blob.unlink()
    hub.state = "up"
    assert ask(second, "owner/small@v1") == loaded

    assert "revision are right" in ask(second, "owner/small@v2")
    assert "see that the id" in ask(second, "owner/large")
    assert "sd2-community" in ask(second, "stabilityai/stable-diffusion-2-base")


# several processes

def pairs_command(store, processes=1, seeds=160):
    """Generate pairs into a folder; several processes by torchrun, which is what `accelerate launch` calls where there
    are several GPUs.
    """
    module = [
        "ucdm.method.generate",
        "fashion-mnist",
        "T-shirt",
        "trouser",
        "--store",
        str(store),
        "--steps",
        "2",
        "--first",
        str(seeds),
        "--batch-size",
        "64",
    ]
    launcher = [
        "torch.distributed.run",
        "--standalone",
        "--local_addr",
        "127.0.0.1",
        "--nproc_per_node",
        str(processes),
        "-m",
    ]
    alone = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")} | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    if processes == 1: return python("-m", *module, env=alone, merged=True)
    command = [sys.executable, "-m", *launcher, *module]
    return subprocess.Popen(command, env=alone, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def files(store):
    return {p.relative_to(store): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file() and p.name != ".lock"}


def test_two_processes_one_dies(tmp_path):
    """Two processes share the work, one is killed, both are started again: the store of a single process, to the last
    byte.
    """
    together, alone = tmp_path / "together", tmp_path / "alone"
    launched = pairs_command(together, 2)
    index = together / "positive" / "index.jsonl"
    deadline = time.monotonic() + 240
    while not index.exists() and launched.poll() is None and time.monotonic() < deadline: time.sleep(0.1)
    assert launched.poll() is None and index.exists(), f"no shard was written: {finish(launched, 1)[0]}"
    workers = [p for p in psutil.Process(launched.pid).children(recursive=True) if "ucdm.method.generate" in p.cmdline()]
    assert len(workers) == 2, finish(launched)[0]
    max(workers, key=lambda p: int(p.environ()["RANK"])).kill()
    assert launched.wait(240) != 0 and not [
        p for p in workers if p.is_running() and p.status() != psutil.STATUS_ZOMBIE
    ], "the other one is ended too"
    made = len(index.read_text(encoding="utf-8").splitlines())
    assert 1 <= made < 5

    launched = pairs_command(together, 2)
    said = finish(launched)[0]
    assert launched.returncode == 0, said
    single = pairs_command(alone)
    said = finish(single)[0]
    assert single.returncode == 0, said
    assert files(together) == files(alone)
    assert len(index.read_text(encoding="utf-8").splitlines()) == 5


# memory

class Small:
    "A UNet on a machine that holds only so many samples."
    def __init__(self, unet, limit, error): self.unet, self.limit, self.error, self.seen = unet, limit, error, []

    def __call__(self, x, *args):
        self.seen.append(len(x))
        if len(x) > self.limit: raise self.error
        return self.unet(x, *args)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
        "to allocate 9663676416 bytes. Error code 12 (Cannot allocate memory)"
    ),
]


@pytest.mark.parametrize("error", ERRORS, ids=["GPU", "CPU"])
def test_out_of_memory(error):
    "The batch is halved until it fits, the user is told, and the pairs are those of an undisturbed run."
    prior, seeds = load("fashion-mnist"), load_dataset("fashion-mnist", "test")[[1, 200, 500, 900, 1500]]
    make = lambda: generate_pairs(
        prior, seeds, ("T-shirt", "trouser"), PairConfig(steps=2), batch_size=8, progress=False
    )
    whole = make()
    prior.unet = unet = Small(prior.pipe.unet, 9, error)
    with pytest.warns(UserWarning, match="out of memory with") as said: pairs = make()
    assert [str(w.message) for w in said] == [
        "out of memory with 8 pairs in a batch; going on with 4.",
        "out of memory with 4 pairs in a batch; going on with 2.",
    ]
    assert max(unet.seen) == 24 and set(unet.seen[unet.seen.index(6):]) == {2, 6}
    for ours, theirs in ((pairs.positives, whole.positives), (pairs.negatives, whole.negatives)):
        assert (ours.int() - theirs.int()).abs().max() <= 1

    prior.unet = Small(prior.pipe.unet, 2, error)
    with pytest.warns(UserWarning), pytest.raises(MemoryError, match="not enough memory for one of the pairs"): make()


def test_out_of_memory_while_decoding(monkeypatch):
    prior, seeds = load("fashion-mnist"), load_dataset("fashion-mnist", "test")[[1, 200, 500]]
    make = lambda: generate_pairs(prior, seeds, ("T-shirt", "trouser"), PairConfig(steps=1), progress=False)
    whole, decode = make(), prior.pipe.vae.decode
    def limited(z):
        if len(z) > 2: raise ERRORS[0]
        return decode(z)
    monkeypatch.setattr(prior.pipe.vae, "decode", limited)
    with pytest.warns(UserWarning, match="6 latents in a batch; going on with 3"): pairs = make()
    assert (pairs.negatives.int() - whole.negatives.int()).abs().max() <= 1


def test_out_of_memory_is_no_reason_not_to_compile():
    "Compiled code that runs out of memory says so; only compiling that fails is passed over in silence."
    network = compiled(torch.nn.Identity(), backend="eager")
    network.fast = lambda x: (_ for _ in ()).throw(ERRORS[0])
    with pytest.raises(torch.OutOfMemoryError): network(torch.zeros(1))
    assert network.fast is not None


def test_compile_without_a_compiler(folder, tmp_path):
    "Asked to compile where there is no C++ compiler, the prior goes on without, and without a word."
    code = "import torch\nfrom ucdm.diffusion.prior import load_prior\n" \
        f"prior = load_prior({str(folder)!r}, device='cpu', dtype=torch.float32)\nx, text = torch.zeros(2, *prior.latent_shape), prior.embed(['', ''])\nplain = prior.predict(x, 1, text)\n" \
        "prior.compile()\nassert torch.allclose(prior.predict(x, 1, text), plain, atol=1e-4) and not prior.fixed_shapes"
    (broken := tmp_path / "broken").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    for compiler in (tmp_path / "none", broken):
        env = os.environ | {
            "CXX": str(compiler),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if compiler != broken: assert not done.stderr


# pictures that are not square

def test_stored_size_is_that_of_the_seeds(folder):
    seeds = ImageSet(
        torch.randint(0, 256, (2, 3, 24, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        torch.full((2,), -1),
        ("cat",),
        "wide",
    )
    assert generate_pairs(load(folder), seeds, ("cat",), PairConfig(steps=1), progress=False).positives.shape == (
        2,
        1,
        3,
        24,
        40,
    )
