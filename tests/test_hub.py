"""Fetching from a hub: a small server on this machine answers as the hub does, with a tiny model's files."""

import hashlib
import http.server
import json
import shutil
import threading
from dataclasses import replace

import pytest
import torch

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
