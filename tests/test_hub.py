"""Fetching from a hub: a small server on this machine answers as the hub does, with a tiny model's files."""

import hashlib
import http.server
import json
import re
import shutil
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from ldm_lessons import hub, models
from ldm_lessons.unet import UNet
from ldm_lessons.weights import load_model

REVISION = "a" * 40


class StandIn(http.server.BaseHTTPRequestHandler):
    """Of the hub: `repos` are folders by name; `asked` collects (method, path, range)."""

    repos: dict = {}
    asked: list = []
    breaks: list = []  # paths that break off once after 1,000 bytes
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", most=None, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:most])

    def do_GET(self):  # noqa: N802 (the library's name)
        self.asked.append((self.command, self.path, self.headers.get("Range")))
        parts = self.path.partition("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if name not in self.repos:
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        folder = self.repos[name]
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        if parts[0] == "api":
            found = [{"rfilename": f, "type": "file", "path": f, "size": 1, "oid": "0"} for f in files]
            body = found if "tree" in parts else {"id": name, "sha": REVISION, "siblings": found}
            return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
        path = "/".join(parts[4:])
        body = (folder / path).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Repo_Commit": REVISION}
        if (asked := self.headers.get("Range")) and self.command == "GET":
            first = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content_Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
            return self.answer(206, body[first:], **headers)
        if self.command == "GET" and path in self.breaks:
            self.breaks.remove(path)
            self.close_connection = True
            return self.answer(200, body, most=1000, Accept_Ranges="bytes", **headers)
        return self.answer(200, body, Accept_Ranges="bytes", **headers)

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def stand_in(monkeypatch, tmp_path, tiny_folder):
    """A hub with the tiny model in half precision under "second/copy" and nothing else; its cache is empty."""
    from huggingface_hub import constants

    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    for part in hub.WEIGHTS:
        (folder / f"{part}.safetensors").rename(folder / f"{part}.fp16.safetensors")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    monkeypatch.setattr(StandIn, "repos", {"second/copy": folder})
    monkeypatch.setattr(StandIn, "asked", [])
    monkeypatch.setattr(StandIn, "breaks", [])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub._snapshot_download.HfApi.endpoint", constants.ENDPOINT, raising=False)
    count = sum(
        p.numel()
        for part in (models.load(tiny_folder, "cpu"),)
        for m in (part.unet, part.vae, part.text_encoder)
        for p in m.parameters()
    )
    source = hub.Source((("first/gone", REVISION), ("second/copy", REVISION)), count, 0.001, "free")
    monkeypatch.setitem(hub.SOURCES, "tiny", source)
    yield StandIn
    server.shutdown()


def test_the_second_mirror_is_taken_and_only_safe_files(stand_in, tiny_folder):
    model = models.load("tiny", "cpu")
    assert model.name == "tiny" and model.image_size == 32
    kept = load_model(UNet, None, tiny_folder / "unet").state_dict()
    for name, value in model.unet.state_dict().items():
        torch.testing.assert_close(value, kept[name], atol=0, rtol=0)
    fetched = [path for method, path, _ in stand_in.asked if "/resolve/" in path]
    assert fetched and all(path.rsplit(".", 1)[-1] in ("json", "txt", "safetensors") for path in fetched)
    assert all(f"/resolve/{REVISION}/" in path for path in fetched)
    stand_in.asked.clear()
    stand_in.repos.clear()  # nothing can be fetched any more, and nothing has to be
    assert models.load("tiny", "cpu").name == "tiny"
    assert not [path for method, path, _ in stand_in.asked if method == "GET" and "/resolve/" in path]


def test_a_fetching_that_broke_off_goes_on(stand_in, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)
    unet = "unet/diffusion_pytorch_model.fp16.safetensors"
    stand_in.breaks.append(unet)
    models.load("tiny", "cpu")  # the line broke after 1,000 bytes, and the rest was asked for
    assert [r for method, path, r in stand_in.asked if method == "GET" and path.endswith(unet)] == [None, "bytes=1000-"]
    link = next((tmp_path / "cache").rglob(unet))
    whole = link.read_bytes()
    link.resolve().unlink()
    link.unlink()
    stand_in.asked.clear()
    models.load("tiny", "cpu")  # only what is missing is fetched again
    again = [path for method, path, _ in stand_in.asked if method == "GET" and "/resolve/" in path]
    assert len(again) == 1 and again[0].endswith(unet) and link.read_bytes() == whole


def test_another_model_under_the_name_is_refused(stand_in, monkeypatch):
    source = hub.SOURCES["tiny"]
    monkeypatch.setitem(hub.SOURCES, "tiny", replace(source, parameters=source.parameters + 1))
    with pytest.raises(RuntimeError, match="fetched as tiny has .* parameters instead of"):
        models.load("tiny", "cpu")


def test_what_cannot_be_fetched_is_one_sentence(stand_in, monkeypatch, capsys):
    stand_in.repos.clear()
    with pytest.raises(RuntimeError, match=r"tiny cannot be fetched from first/gone or second/copy \(RepositoryNot"):
        hub.fetch("tiny")
    with pytest.raises(SystemExit, match="hub: tiny cannot be fetched"):
        hub.main(["tiny"])
    monkeypatch.setitem(hub.SOURCES, "tiny", replace(hub.SOURCES["tiny"], gigabytes=1e9))
    with pytest.raises(OSError, match="GB of disk, but .* GB left: free some space"):
        hub.fetch("tiny")


def test_the_command_fetches_before_a_class(stand_in, capsys):
    hub.main(["tiny"])
    assert "tiny: 0.001 GB; licence free" in capsys.readouterr().out
    stand_in.repos.clear()
    assert models.load("tiny", "cpu").name == "tiny"


def test_whole_precision_where_there_is_no_half(stand_in, tiny_folder):
    stand_in.repos["org/old"] = tiny_folder
    assert models.load("org/old", "cpu").name == "org/old"


def test_the_pocket_model_stands_in(stand_in, monkeypatch, capsys):
    assert models.load_or_pocket("pocket", "cpu").name == "pocket" and not capsys.readouterr().out
    assert models.load_or_pocket("sd15", "cpu").name == "pocket"
    said = capsys.readouterr().out
    assert "sd15 wants a GPU with 5.8 GB" in said and "The pocket model stands in for sd15" in said
    stand_in.repos.clear()
    monkeypatch.setattr(models, "_too_much", lambda name, device: None)
    assert models.load_or_pocket("tiny", "cpu").name == "pocket"
    assert "tiny cannot be fetched" in capsys.readouterr().out
    with pytest.raises(ValueError, match="unknown model"):
        models.load_or_pocket("sd 15", "cpu")


@pytest.mark.parametrize("name", ["sd15", "sd15-inpaint"])
def test_the_registry_counts_right(name):
    """The parameters that a source promises are those of the configuration of that size."""
    from ldm_lessons.text import TextConfig, TextEncoder
    from ldm_lessons.unet import UNetConfig
    from ldm_lessons.vae import VAE, VAEConfig

    unet = replace(UNetConfig.sd15(), in_channels=9 if "inpaint" in name else 4)
    with torch.device("meta"):
        parts = UNet(unet), VAE(VAEConfig.sd15()), TextEncoder(TextConfig.sd15())
    assert sum(p.numel() for part in parts for p in part.parameters()) == hub.SOURCES[name].parameters


def test_the_table_of_sources_is_pinned():
    for source in hub.SOURCES.values():
        assert all(len(revision) == 40 and set(revision) <= set("0123456789abcdef") for _, revision in source.mirrors)


def first_names(unet: dict, vae: dict, text: dict, layers: int, ups: int) -> dict:
    """State dicts of diffusers' names under those of Stable Diffusion's first publication."""

    def renamed(name: str, changes: dict) -> str:
        for old, new in changes.items():
            name = re.sub(old, new, name)
        return name

    n = layers + 1
    res = {r"norm1": "in_layers.0", r"conv1": "in_layers.2", r"norm2": "out_layers.0", r"conv2": "out_layers.3"}
    res |= {r"time_emb_proj": "emb_layers.1", r"conv_shortcut": "skip_connection"}
    ends = {r"^conv_in": "input_blocks.0.0", r"^time_embedding.linear_1": "time_embed.0"}
    ends |= {r"^time_embedding.linear_2": "time_embed.2", r"^conv_norm_out": "out.0", r"^conv_out": "out.2"}
    middle = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}
    found = {}
    for old, value in unet.items():
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", old):
            way, kind, rest = match[1], match[3], match[5]
            i, j = int(match[2]), int(match[4])
            side = "input_blocks" if way == "down" else "output_blocks"
            if kind.endswith("samplers"):
                attends = any(f"{way}_blocks.{i}.attentions" in name for name in unet)
                where = (n * (i + 1), 0) if way == "down" else (n * i + layers, 1 + attends)
                rest = rest.replace("conv.", "op.") if way == "down" else rest
            else:
                where = (n * i + j + (way == "down"), int(kind == "attentions"))
                rest = renamed(rest, res) if kind == "resnets" else rest
            new = f"{side}.{where[0]}.{where[1]}.{rest}"
        elif match := re.match(r"mid_block\.(\w+\.\d)\.(.*)", old):
            rest = renamed(match[2], res) if "resnets" in old else match[2]
            new = f"middle_block.{middle[match[1]]}.{rest}"
        else:
            new = renamed(old, ends)
        found[f"model.diffusion_model.{new}"] = value
    attention = {"to_q": "q", "to_k": "k", "to_v": "v", r"to_out\.0": "proj_out", "group_norm": "norm"}
    for old, value in vae.items():
        new = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", old)
        new = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{ups - 1 - int(m[1])}.block", new)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{ups - 1 - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "mid_block.attentions.0" in new:
            new = renamed(new.replace("mid_block.attentions.0", "mid.attn_1"), attention)
            value = value[..., None, None] if value.ndim == 2 else value
        found[f"first_stage_model.{new}"] = value
    found |= {f"cond_stage_model.transformer.text_model.{k}": v for k, v in text.items()}
    found["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return found


def test_one_file_as_it_was_first_published(stand_in, monkeypatch, tiny_folder, tmp_path):
    """The weights of a folder, put under their first names in one file, come back as the same model."""
    model = models.load(tiny_folder, "cpu")
    parts = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoder}
    monkeypatch.setattr(models, "SD15", {name: part.config for name, part in parts.items()})
    monkeypatch.setitem(hub.SOURCES, "sd15", hub.SOURCES["tiny"])
    states = [part.state_dict() for part in parts.values()]
    config = model.unet.config
    named = first_names(*states, config.layers_per_block, len(model.vae.config.block_out_channels))
    file = tmp_path / "old.safetensors"
    save_file({name: value.contiguous() for name, value in named.items()}, file)
    again = models.load(file, "cpu")
    assert again.name == str(file) and again.scheduler_config == model.scheduler_config
    for part, state in zip((again.unet, again.vae, again.text_encoder), states, strict=True):
        torch.testing.assert_close(part.state_dict(), state, atol=0, rtol=0)
    assert models.load(file, "cpu", "bfloat16").dtype == torch.bfloat16
    fetched = [path for _, path, _ in stand_in.asked if "/resolve/" in path]
    assert fetched and not any(path.endswith(".safetensors") for path in fetched)  # words alone

    del named["model.diffusion_model.out.2.weight"]
    save_file({name: value.contiguous() for name, value in named.items()}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match="less.safetensors: its unet is not .* or not whole"):
        models.load(tmp_path / "less.safetensors", "cpu")
    save_file({"weight": torch.zeros(1)}, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="none.safetensors is no whole Stable Diffusion 1.x"):
        models.load(tmp_path / "none.safetensors", "cpu")
