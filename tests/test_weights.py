"""Weight files: round trips through the libraries, old names, damaged and unsafe files, and a disk that refuses."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm_lessons.clip import CLIP, CLIPConfig, VisionConfig, VisionEncoder
from ldm_lessons.text import TextConfig, TextEncoder
from ldm_lessons.unet import UNet, UNetConfig
from ldm_lessons.vae import VAE, VAEConfig
from ldm_lessons.weights import (
    load_changes,
    load_model,
    load_state_dict_strict,
    read_safetensors,
    save_changes,
    save_model,
)

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
UNET = UNetConfig(8, 4, 4, ("CrossAttnDownBlock2D", "DownBlock2D"), (16, 32), 1, (2, 4), 4, 32)
VAE_ = VAEConfig(3, 3, 4, (8, 16), 1, 4, 16)
TEXT = TextConfig(**SMALL, vocab_size=54, bos_token_id=52, eos_token_id=53, pad_token_id=53)
VISION = VisionConfig(**SMALL, image_size=24, patch_size=8)
IDS = torch.tensor([[52, 7, 30, 53, 53], [52, 1, 2, 3, 53]])
MODELS = {
    "unet": (UNet, UNET, "UNet2DConditionModel"),
    "vae": (VAE, VAE_, "AutoencoderKL"),
    "text": (TextEncoder, TEXT, "CLIPTextModel"),
    "vision": (VisionEncoder, VISION, "CLIPVisionModel"),
    "clip": (CLIP, CLIPConfig(TEXT, VISION, 20), "CLIPModel"),
}


def make(name):
    """A small model whose parameters are all off their initial values."""
    torch.manual_seed(0)
    cls, config, _ = MODELS[name]
    model = CLIP.from_config(config) if cls is CLIP else cls(config)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def library_class(name):
    import diffusers
    import transformers

    return getattr(diffusers if name in ("unet", "vae") else transformers, MODELS[name][2])


def output(name, model):
    """What a model of ours or of the libraries makes of fixed input."""
    ours = type(model).__module__.startswith("ldm_lessons")
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    words = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        if name == "unet":
            return model(x, 7, words) if ours else model(x, 7, words).sample
        if name == "vae":
            return model.decode(x) if ours else model.decode(x).sample
        if name == "text":
            return model(IDS) if ours else model(IDS).last_hidden_state
        if name == "vision":
            return model(pixels) if ours else model(pixels).last_hidden_state
        return model(IDS, pixels) if ours else model(IDS, pixels).logits_per_image


def one_sentence(error, *parts):
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    assert all(part in text for part in parts), text


# Round trips


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_saved_here_loads_in_the_libraries(name, dtype, tmp_path):
    model = make(name)
    file = save_model(model, tmp_path / "model", dtype)
    assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}
    with safe_open(file, framework="pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}  # releases of both libraries have refused files without it
    theirs = library_class(name).from_pretrained(tmp_path / "model").eval()
    assert {p.dtype for p in theirs.parameters()} == {torch.float32}  # also where the file is in half precision
    again = load_model(type(model), None, tmp_path / "model")
    assert again.config == model.config and not again.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in again.parameters())
    exact = output(name, model)
    torch.testing.assert_close(output(name, again), output(name, theirs), rtol=1e-4, atol=1e-4 * float(exact.std()))
    allowed = 1e-5 if dtype == torch.float32 else 0.02
    assert (output(name, again) - exact).abs().max() <= allowed * exact.std()


@pytest.mark.parametrize("name", MODELS)
def test_what_the_libraries_save_loads_here(name, tmp_path):
    cls, config, _ = MODELS[name]
    save_model(make(name), tmp_path / "ours", None)
    theirs = library_class(name).from_pretrained(tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(cls, None, tmp_path / "theirs")
    assert ours.config == config
    exact = output(name, theirs)
    torch.testing.assert_close(output(name, ours), exact, rtol=1e-4, atol=1e-4 * float(exact.std()))


def test_dtype_device_and_single_files(tmp_path):
    file = save_model(make("unet"), tmp_path)
    assert file == tmp_path / "diffusion_pytorch_model.safetensors"
    assert load_model(UNet, UNET, file, dtype=None).conv_in.weight.dtype == torch.float16
    assert load_model(UNet, UNET, str(file), dtype=torch.bfloat16).conv_in.weight.dtype == torch.bfloat16
    assert load_model(UNet, None, file, device="meta").conv_in.weight.device.type == "meta"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "UNet2DConditionModel" and config["attention_head_dim"] == [2, 4]
    config = json.loads((save_model(make("text"), tmp_path / "text").parent / "config.json").read_text())
    assert config["architectures"] == ["CLIPTextModel"] and config["model_type"] == "clip_text_model"


def test_layout_and_compilation_do_not_matter(tmp_path):
    model = make("unet")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compiled = torch.compile(model.to(memory_format=torch.channels_last), backend="eager")
    again = load_model(UNet, None, save_model(compiled, tmp_path, None).parent)
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_a_whole_pipeline_runs_on_saved_folders(tmp_path):
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
    parts = {"unet": "unet", "vae": "vae", "text": "text_encoder"}
    for name, folder in parts.items():
        save_model(make(name), tmp_path / folder)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    DDIMScheduler(clip_sample=False, steps_offset=1).save_pretrained(tmp_path / "scheduler")
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"scheduler": ["diffusers", "DDIMScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red house", num_inference_steps=2).images[0].size == (16, 16)


def test_loading_draws_no_random_numbers_and_stays_quick(tmp_path):
    for name, (cls, _, _) in MODELS.items():
        save_model(make(name), tmp_path / name)
        before = torch.get_rng_state()
        load_model(cls, None, tmp_path / name)
        assert torch.equal(torch.get_rng_state(), before)
    code = "import sys; from ldm_lessons.weights import load_model; from ldm_lessons.clip import CLIP; "
    code += f"load_model(CLIP, None, {str(tmp_path / 'clip')!r}); print('sympy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"  # it takes a second to import, and the meta device draws it in for nothing


# Old names


def test_text_encoders_with_the_old_prefix(tmp_path):
    for name in ("text", "vision"):
        model = make(name)
        old = {f"{name}_model.{key}": tensor for key, tensor in model.state_dict().items()}
        old[f"{name}_model.embeddings.position_ids"] = torch.arange(77)[None]
        save_file(old, tmp_path / "old.safetensors")
        again = load_model(type(model), model.config, tmp_path / "old.safetensors")
        torch.testing.assert_close(output(name, again), output(name, model))


@pytest.mark.parametrize("as_convolutions", [False, True])
def test_vaes_with_the_old_names_of_attention(as_convolutions, tmp_path):
    model, old = make("vae"), {}
    for key, tensor in model.state_dict().items():
        for new, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f".{new}.weight" in key and as_convolutions:
                tensor = tensor[:, :, None, None]
            key = key.replace(f".{new}.", f".{name}.")
        old[key] = tensor.contiguous()
    assert any(".proj_attn." in key for key in old)
    save_file(old, tmp_path / "old.safetensors")
    again = load_model(VAE, VAE_, tmp_path / "old.safetensors")
    torch.testing.assert_close(output("vae", again), output("vae", model))


def test_renaming_does_not_hide_a_second_copy():
    model = make("text")
    state = model.state_dict()
    state["text_model.final_layer_norm.weight"] = state["final_layer_norm.weight"]
    with pytest.raises(ValueError, match=r"1 unexpected \(text_model.final_layer_norm.weight\)"):
        load_state_dict_strict(model, state)


# What does not fit


def test_missing_unexpected_and_misshapen_are_listed_and_nothing_is_changed():
    model = make("unet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    del state["conv_in.weight"], state["conv_in.bias"]
    state["conv_on.weight"] = torch.zeros(1)
    state["conv_out.bias"] = torch.zeros(3)
    with pytest.raises(ValueError) as error:
        load_state_dict_strict(model, state)
    one_sentence(error, "2 missing (conv_in.weight, conv_in.bias)", "1 unexpected (conv_on.weight)")
    one_sentence(error, "1 of another shape (conv_out.bias (3,) instead of (4,))", "UNet")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_long_list_is_cut_and_the_file_named(tmp_path):
    save_model(make("vae"), tmp_path)
    with pytest.raises(ValueError) as error:
        load_model(UNet, UNET, tmp_path)
    one_sentence(error, str(tmp_path), "missing (conv_in.weight", "more)")


# Files that are damaged, unsafe or not there


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_file_cut_short_is_refused(keep, tmp_path):
    file = save_model(make("unet"), tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep) if 0 < keep < 1 else keep])
    with pytest.raises(ValueError) as error:
        load_model(UNet, None, tmp_path)
    one_sentence(error, str(file), "damaged or cut short")


def test_a_file_of_other_content_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text("<html>404: Not Found</html>" * 100)
    with pytest.raises(ValueError) as error:
        load_model(TextEncoder, TEXT, file)
    one_sentence(error, "damaged or cut short")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "v1-5.ckpt", "weights.pt"])
def test_pickles_are_refused_unopened(name, tmp_path):
    (tmp_path / name).write_bytes(b"not even a pickle")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError) as error:
            load_model(UNet, UNET, path)
        one_sentence(error, name, "is a pickle")


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path / "no.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            load_model(VAE, VAE_, path)
        one_sentence(error, str(path), "There is no weight file")
    file = save_model(make("vae"), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_model(VAE, None, file)
    one_sentence(error, "config.json is missing")


@pytest.mark.parametrize(
    "content",
    [
        "{ not json",
        "[1, 2]",
        '{"_class_name": "AutoencoderTiny"}',
        '{"block_out_channels": 3}',
        '{"norm_num_groups": 0}',
        '{"layers_per_block": "two"}',
        '{"block_out_channels": [8, 12], "norm_num_groups": 8}',
    ],
)
def test_wrong_configurations(content, tmp_path):
    save_model(make("vae"), tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError) as error:
        load_model(VAE, None, tmp_path)
    one_sentence(error, "VAE")


# A disk that refuses


def folder_state(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_keeps_the_old_files_whole(tmp_path):
    resource = pytest.importorskip("resource", reason="Windows has no limit on a file's size")
    save_model(make("unet"), tmp_path)
    before = folder_state(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # no file may grow past this: writing fails midway
    try:
        with pytest.raises(OSError) as error:
            save_model(make("unet"), tmp_path, torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    one_sentence(error, "Cannot write to", str(tmp_path))
    assert folder_state(tmp_path) == before


def test_a_failing_rename_keeps_the_old_files_whole(tmp_path, monkeypatch):
    save_model(make("unet"), tmp_path)
    before = folder_state(tmp_path)

    def refuse(_source, _target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError) as error:
        save_model(make("unet"), tmp_path, torch.float32)
    one_sentence(error, "Permission denied")
    assert folder_state(tmp_path) == before


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "taken").write_text("a file")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(OSError) as error:
            save_model(make("vae"), folder)
        one_sentence(error, "Cannot write to", str(folder))
    assert (tmp_path / "taken").read_text() == "a file"


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    model = make("vae")
    file = save_model(model, tmp_path)
    before = file.read_bytes()
    model.decoder.conv_out.bias.data[0] = 1e6  # too large for half precision
    with pytest.raises(ValueError) as error:
        save_model(model, tmp_path)
    one_sentence(error, "not finite in torch.float16", "decoder.conv_out.bias")
    assert file.read_bytes() == before
    save_model(model, tmp_path, torch.float32)


def test_only_what_differs_is_kept_and_the_rest_is_filled_in(tmp_path):
    base, model = (TextEncoder(TEXT) for _ in range(2))
    model.load_state_dict(base.state_dict())
    with torch.no_grad():
        model.final_layer_norm.weight.add_(0.5)
    file = save_changes(model, tmp_path, base.state_dict())
    assert set(read_safetensors(file)) == {"final_layer_norm.weight"}
    back = load_changes(TextEncoder, base.state_dict(), tmp_path)
    for name, wanted in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], wanted)
    other = {k: v for k, v in base.state_dict().items() if k != "final_layer_norm.bias"}
    with pytest.raises(ValueError, match=r"changes.safetensors: .*missing \(final_layer_norm.bias\)"):
        load_changes(TextEncoder, other, tmp_path)
    model.final_layer_norm.weight.data.fill_(1e6)
    with pytest.raises(ValueError, match="1 tensors are not finite in torch.float16"):
        save_changes(model, tmp_path, base.state_dict())
    file.unlink()
    with pytest.raises(FileNotFoundError, match="changes.safetensors"):
        load_changes(TextEncoder, base.state_dict(), tmp_path)
