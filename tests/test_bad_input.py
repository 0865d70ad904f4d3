"""What people get wrong, and the one sentence that each mistake is answered with."""

import json
import re
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_lessons import machine, models
from ldm_lessons.generate import decode, denoise, encode_prompt, image_to_image, inpaint, interpolate, text_to_image
from ldm_lessons.samplers import DDIM, make_sampler

PHOTO = Image.fromarray(np.full((32, 32, 3), 99, dtype=np.uint8))
MASK = Image.new("L", (32, 32), 255)


def one_sentence(error):
    """The message, if it is what we promise: short, on one line, ending with a full stop, and no other error's."""
    text = str(error)
    assert "\n" not in text and text.endswith(".") and len(text) < 700, text
    assert error.__context__ is None or error.__suppress_context__, "another library's traceback stands above it"
    return text


def refused(error, words, call, *args, **kwargs):
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert words in one_sentence(caught.value), str(caught.value)


# Prompts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (None, "the prompt is None: give a sentence in quotes"),
        (7, "the prompt is 7: give a sentence in quotes"),
        ([], "the prompt is []: give a sentence in quotes"),
        (["a house", None], "give a sentence in quotes, or a list of them"),
        ("  \n", "nothing but spaces"),
        (["a house", " "], "nothing but spaces"),
    ],
)
def test_no_prompt(tiny_model, prompt, words):
    refused(ValueError, words, text_to_image, tiny_model, prompt)
    refused(ValueError, words, encode_prompt, tiny_model, prompt)
    refused(ValueError, words, image_to_image, tiny_model, PHOTO, prompt)
    refused(ValueError, words, inpaint, tiny_model, PHOTO, MASK, prompt)
    refused(ValueError, words, text_to_image, tiny_model, "a house", negative_prompt=prompt, num_inference_steps=1)


def test_the_empty_prompt_is_the_unconditional_picture(tiny_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = dict(num_inference_steps=3, progress=False)
        a = text_to_image(tiny_model, "", guidance_scale=5.0, **options)[0]
        b = text_to_image(tiny_model, "", guidance_scale=1.0, **options)[0]  # nothing to guide towards
    assert abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1


def test_a_long_prompt_is_cut_and_says_what_is_lost(tiny_model):
    long = "a red house " * 25 + "a boat at sunset"  # 1 + 75 + 4 + 1 tokens
    with pytest.warns(UserWarning, match="too long") as caught:
        text = encode_prompt(tiny_model, long)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message == "the prompt is too long (over 77 tokens): not read is 'a boat at sunset'."
    assert text.equal(encode_prompt(tiny_model, "a red house " * 25))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_prompt(tiny_model, "a red house " * 25)


def test_words_the_model_never_saw_are_named(tiny_model):
    knowing = replace(tiny_model, known_words=frozenset("a red house on the left".split()))
    with pytest.warns(UserWarning) as caught:
        encode_prompt(knowing, "A red dragon's house, on the Moon! a dragon's house")
    assert [str(w.message) for w in caught] == ["the model never saw \"dragon's\", 'moon': use other words."]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_prompt(knowing, ["A red house, on the left.", ""])
        encode_prompt(tiny_model, "a dragon")  # it is not known what this one knows


def test_warnings_point_to_the_reader_s_line(tiny_model):
    for call, args in ((encode_prompt, ()), (image_to_image, (PHOTO,)), (text_to_image, ())):
        with pytest.warns(UserWarning, match="too long") as caught:
            call(tiny_model, *args, "a house " * 50, **({} if call is encode_prompt else {"num_inference_steps": 1}))
        assert caught[0].filename == __file__


def test_a_sampler_for_another_kind_of_network(tiny_model):
    words = "the sampler takes the network's output for epsilon, but it is v_prediction: set prediction_type."
    with pytest.warns(UserWarning, match=words):
        text_to_image(tiny_model, "a house", num_inference_steps=1, sampler=DDIM(), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = DDIM(prediction_type="v_prediction")
        text_to_image(tiny_model, "a house", num_inference_steps=1, sampler=sampler, progress=False)


@pytest.mark.parametrize("where", ["known_words.json", "tokenizer/known_words.json"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_known_words_are_read_from_the_model_folder(tiny_folder, tmp_path, where, wrapped):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    words = ["Red", "house"]
    (folder / where).write_text(json.dumps({"words": words} if wrapped else words))
    assert models.load(folder, "cpu").known_words == {"red", "house"}


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"height": 100}, "height is 100, but must be a multiple of 16 pixels, such as 32."),
        ({"width": 20.0}, "width is 20.0, but must be a multiple of 16"),
        ({"width": "32"}, "width is '32', but must be a multiple of 16"),
        ({"height": 0}, "height is 0, but must be a multiple of 16"),
        ({"height": -16}, "height is -16, but must be a multiple of 16"),
        ({"height": True}, "height is True, but must be a multiple of 16"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0, but must be a whole number from 1 to 1000."),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001, but must be a whole number from 1 to 1000."),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5, but must be a whole number"),
        ({"sampler": "dpm"}, "unknown sampler 'dpm': choose one of ddpm, ddim, pndm, lms"),
        ({"sampler": 3}, "the sampler is a int: give a name such as 'ddim', or a sampler object."),
        ({"sampler": DDIM}, "the sampler is a type: give a name such as 'ddim', or a sampler object."),
        ({"seed": 1.5}, "the seed is 1.5, but must be a whole number"),
        ({"generator": [torch.Generator()] * 3}, "there are 3 generators for 1 pictures"),
        ({"negative_prompt": ["a", "b"]}, "there are 2 negative prompts for 1 pictures"),
    ],
)
def test_settings_that_cannot_be(tiny_model, settings, words):
    refused(ValueError, words, text_to_image, tiny_model, "a house", **settings)
    if not {"height", "width"} & settings.keys():
        refused(ValueError, words, image_to_image, tiny_model, PHOTO, "a house", **settings)
        refused(ValueError, words, inpaint, tiny_model, PHOTO, MASK, "a house", **settings)


def test_latents_of_another_shape(tiny_model):
    words = "latents have the shape (1, 4, 8, 8), but these pictures begin with (1, 4, 4, 4)."
    refused(ValueError, words, text_to_image, tiny_model, "a house", latents=torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("strength", [-0.1, 1.01, "0.5", None])
def test_strength(tiny_model, strength):
    words = f"strength is {strength!r}, but must be from 0 (keep the image) to 1 (forget it)."
    refused(ValueError, words, image_to_image, tiny_model, PHOTO, "a house", strength)
    refused(ValueError, words, inpaint, tiny_model, PHOTO, MASK, "a house", strength)


def test_a_misspelt_setting(tiny_model):
    for call, args in ((text_to_image, ()), (image_to_image, (PHOTO,)), (inpaint, (PHOTO, MASK))):
        with pytest.raises(TypeError, match="gidance_scale"):
            call(tiny_model, *args, "a house", gidance_scale=3)
    with pytest.raises(TypeError, match="gidance_scale"):
        interpolate(tiny_model, ("a house", "a boat"), gidance_scale=3)


# Pictures and masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (PHOTO.resize((32, 40)), "the image's height is 40, but must be a multiple of 16 pixels, such as 32."),
        (PHOTO.resize((9, 32)), "the image's width is 9, but must be a multiple of 16"),
        (PHOTO.convert("RGBA"), "the image has the mode RGBA, not RGB: convert it with image.convert('RGB')."),
        (PHOTO.convert("L"), "the image has the mode L, not RGB"),
        (np.zeros((32, 32, 3)), "the image is a ndarray: give a PIL image, or a float tensor in [0, 1]."),
        ("photo.png", "the image is a str: give a PIL image"),
        (None, "the image is a NoneType: give a PIL image"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), "give a PIL image, or a float tensor in [0, 1]."),
        (torch.zeros(4, 32, 32), "the image has the shape (1, 4, 32, 32), but must be (3, H, W) or (B, 3, H, W)."),
        (torch.zeros(32, 32), "the image has the shape (32, 32), but must be"),
        (torch.full((3, 32, 32), -0.5), "the image has values outside [0, 1]"),
        (torch.full((3, 32, 32), float("nan")), "the image has values outside [0, 1]"),
        (torch.zeros(2, 3, 32, 32), "there are 2 images for 1 pictures: give one, or one for each."),
    ],
)
def test_pictures_that_cannot_be(tiny_model, image, words):
    refused(ValueError, words, image_to_image, tiny_model, image, "a house")
    refused(ValueError, words, inpaint, tiny_model, image, MASK, "a house")


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (MASK.resize((16, 32)), "the mask is 16x32 pixels, but the image is 32x32: make them the same size."),
        (torch.zeros(32, 48), "the mask is 48x32 pixels, but the image is 32x32"),
        (torch.zeros(3, 32, 32), "the mask must be a PIL image, or a tensor (H, W)"),
        (torch.zeros(32), "the mask must be a PIL image, or a tensor (H, W)"),
        (None, "the mask must be a PIL image, or a tensor (H, W)"),
    ],
)
def test_masks_that_cannot_be(tiny_model, mask, words):
    refused(ValueError, words, inpaint, tiny_model, PHOTO, mask, "a house")


# The machine ---------------------------------------------------------------------------------------------------------


def test_devices(tiny_folder, monkeypatch):
    monkeypatch.setattr(machine, "_has_cuda", lambda: False)
    monkeypatch.setattr(machine, "_has_mps", lambda: False)
    assert machine.pick_device() == machine.pick_device("cpu") == torch.device("cpu")
    for call in (machine.pick_device, lambda name: models.load(tiny_folder, name)):
        refused(ValueError, "unknown device 'gpu': choose cpu, or None for the best one.", call, "gpu")
        refused(ValueError, "unknown device 'cuda:x'", call, "cuda:x")
        refused(ValueError, "this machine has no cuda device: choose cpu, or None", call, "cuda")
        refused(ValueError, "this machine has no mps device: choose cpu, or None", call, torch.device("mps"))
    monkeypatch.setattr(machine, "_has_mps", lambda: True)
    assert machine.pick_device() == torch.device("mps")
    monkeypatch.setattr(machine, "_has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert machine.pick_device() == torch.device("cuda") and machine.pick_device("cuda:1") == torch.device("cuda:1")
    refused(ValueError, "this machine has no cuda:2 device: its last is cuda:1.", machine.pick_device, "cuda:2")
    assert machine.pick_dtype(None, "cuda") == torch.float16 and machine.pick_dtype(None, "cpu") == torch.float32


def test_precisions(monkeypatch):
    monkeypatch.setattr(machine, "_has_cuda", lambda: False)
    monkeypatch.setattr(machine, "_has_mps", lambda: True)
    for has, precision in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr(machine, "_cpu_has_bf16", lambda has=has: has)
        assert machine.pick_precision("cpu") == precision and machine.pick_precision() == "no"
    monkeypatch.setattr(machine, "_has_cuda", lambda: True)
    for capability, precision in (((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert machine.pick_precision() == precision


def test_dtypes(tiny_folder):
    assert machine.pick_dtype("bf16") == machine.pick_dtype(torch.bfloat16) == torch.bfloat16
    for call in (machine.pick_dtype, lambda name: models.load(tiny_folder, "cpu", name)):
        for wrong in ("int4", torch.int64, 16):
            words = f"unknown dtype {str(wrong)!r}: choose float32, float16 or bfloat16, or None for the best one."
            refused(ValueError, words, call, wrong)


def test_the_machine_in_plain_words(monkeypatch):
    found = machine.describe()
    assert len(found.lines) == 3 and all(line.endswith(".") for line in found.lines) and str(found).count("\n") == 2
    assert "/" not in str(found) and found.cores >= 1 and found.memory_gb > 0
    assert f"torch {torch.__version__}" in found.lines[1]
    assert found == machine.describe()  # nothing in it is measured
    small = replace(found, device="cpu", cores=1, memory_gb=2.0, gpu_memory_gb=None)
    assert "1 core and 2 GB" in small.lines[0] and "close other programs" in small.lines[2]
    assert "Stable Diffusion" in replace(small, memory_gb=16.0).lines[2]
    big = replace(found, device="cuda", device_name="NVIDIA H100", gpu_memory_gb=79.6)
    assert "NVIDIA H100 with 80 GB" in big.lines[0] and "seconds" in big.lines[2]
    assert 0.05 < machine.peak_memory_gb() < found.memory_gb
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    assert not machine.on_colab()
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    assert machine.on_colab()


def test_where_the_data_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("LDM_LESSONS_DATA", str(tmp_path))
    assert machine.data_dir() == tmp_path
    monkeypatch.delenv("LDM_LESSONS_DATA")
    assert machine.data_dir().name == "data" and (machine.data_dir().parent / "ldm_lessons").is_dir()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
        MemoryError(),
    ],
)
def test_out_of_memory(tiny_model, error):
    class Full(torch.nn.Module):
        config, conv_in = tiny_model.unet.config, tiny_model.unet.conv_in

        def forward(self, *args):
            raise error

    full, words = replace(tiny_model, unet=Full()), "make fewer pictures at once, or smaller ones"
    refused(RuntimeError, words, text_to_image, full, "a house", progress=False)
    refused(RuntimeError, words, image_to_image, full, PHOTO, "a house", progress=False)
    refused(RuntimeError, words, inpaint, full, PHOTO, MASK, "a house", progress=False)
    refused(RuntimeError, words, interpolate, full, ("a house", "a boat"), progress=False)
    sampler = make_sampler("ddim")
    sampler.set_timesteps(2)
    steps = denoise(full, torch.zeros(1, 4, 4, 4), torch.zeros(1, 77, 24), sampler=sampler)
    refused(RuntimeError, words, next, steps)


def test_a_picture_too_big_for_any_memory(tiny_model):
    words = "make fewer pictures at once, or smaller ones"
    refused(RuntimeError, words, text_to_image, tiny_model, "a house", height=16 * 10**6, width=16 * 10**6)


def test_other_errors_stay_what_they_are(tiny_model):
    with pytest.raises(ValueError, match="latents of shape"):
        decode(tiny_model, torch.zeros(1, 3, 4, 4))
    sampler = make_sampler("ddim")
    sampler.set_timesteps(2)
    with pytest.raises(ValueError, match="text of shape"):
        next(denoise(tiny_model, torch.zeros(1, 4, 4, 4), torch.zeros(1, 77, 3), sampler=sampler))


# Model folders and the hub -------------------------------------------------------------------------------------------

UNET = "unet/diffusion_pytorch_model.safetensors"


def cut(file):
    file.write_bytes(file.read_bytes()[:-1000])


def overwrite(file):
    file.write_bytes(b"<html>not found</html>")


def remove(file):
    shutil.rmtree(file) if file.is_dir() else file.unlink()


def another_shape(file):
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"cross_attention_dim": 32}))


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        (UNET, cut, "damaged or cut short"),
        (UNET, overwrite, "damaged or cut short"),
        (UNET, remove, "no weight file"),
        ("vae/diffusion_pytorch_model.safetensors", cut, "damaged or cut short"),
        ("text_encoder/model.safetensors", remove, "no weight file"),
        ("unet", remove, "unet"),
        ("unet/config.json", remove, "config.json is missing"),
        ("unet/config.json", overwrite, "does not describe a UNet"),
        ("unet/config.json", another_shape, "do not fit this UNet"),
        ("tokenizer", remove, "has no tokenizer folder"),
        ("tokenizer/tokenizer.json", overwrite, "cannot be read"),
        ("scheduler/scheduler_config.json", remove, "has no scheduler/scheduler_config.json"),
        ("scheduler/scheduler_config.json", overwrite, "is damaged"),
    ],
)
def test_damaged_model_folders(tiny_folder, tmp_path, file, damage, words):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    damage(folder / file)
    refused((FileNotFoundError, ValueError, RuntimeError), words, models.load, folder, "cpu")


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    refused(ValueError, "sd15, sd15-inpaint, a folder in diffusers' format, or a name on the hub", models.load, "poket")
    refused(ValueError, "unknown model 'a/b/c'", models.load, "a/b/c")
    refused(ValueError, "unknown model ''", models.load, "")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "none", str(tmp_path / "none"), "./none", "~/none", "here/none"):
        refused(FileNotFoundError, "there is no model folder", models.load, name)
    refused(FileNotFoundError, "holds no model in diffusers' format", models.load, tmp_path)
    monkeypatch.setitem(models.MODELS, "pocket", tmp_path / "data" / "pocket")
    refused(FileNotFoundError, "the pocket model is not in", models.load)


def test_the_hub_without_a_network(monkeypatch):
    from huggingface_hub import constants

    for offline, endpoint in ((True, "https://huggingface.co"), (False, "http://127.0.0.1:9")):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        words = "there is no folder 'nobody/nothing' here, and the hub does not answer"
        refused(RuntimeError, words, models.load, "nobody/nothing", "cpu")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("RepositoryNotFoundError", "the hub has no public model of that name: check its spelling"),
        ("GatedRepoError", "the model org/name asks for your consent"),
        ("RevisionNotFoundError", "the model org/name has no revision 'v9': leave `revision` out"),
        ("HfHubHTTPError", "the hub does not answer (HfHubHTTPError): check the network"),
    ],
)
def test_what_the_hub_answers(monkeypatch, error, words):
    import httpx
    import huggingface_hub

    def fail(name, **options):
        response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))
        raise getattr(huggingface_hub.errors, error)("a long story\nin lines", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused(RuntimeError, words, models.load, "org/name", "cpu", revision="v9")


def test_what_is_asked_of_the_hub(monkeypatch, tiny_folder):
    import huggingface_hub

    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tiny_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert models.load("org/name", "cpu", revision="abc").image_size == 32
    assert asked["name"] == "org/name" and asked["revision"] == "abc"
    assert all(re.search(r"\.(safetensors|json|txt)$", pattern) for pattern in asked["allow_patterns"])
