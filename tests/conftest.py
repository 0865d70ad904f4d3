"""Shared fixtures: a tiny Stable Diffusion with random weights, as diffusers' pipeline, as a folder, and as ours."""

import os
import string

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks the network is wrong

import pytest
import torch

WORDS = "a red blue house boat tree on the left right snowy mountains green meadow lake at sunset night".split()


def tiny_tokenizer():
    """A CLIPTokenizer of 77 tokens for lower-case words: each of WORDS is one token, others are spelled."""
    from transformers import CLIPTokenizer

    letters = [*string.ascii_lowercase, *",.'"]
    vocab, merges = letters + [letter + "</w>" for letter in letters], []
    for word in WORDS:
        left = word[0]
        for i, letter in enumerate(word[1:], 2):
            right = letter + ("</w>" if i == len(word) else "")
            merges.append((left, right))
            left += right
            vocab.append(left)
    vocab = list(dict.fromkeys(vocab)) + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocab)}, merges=list(dict.fromkeys(merges)), model_max_length=77
    )


@pytest.fixture(scope="session")
def tiny_pipe():
    """diffusers' StableDiffusionPipeline with random weights: 32x32 pictures, 4x4 latents, v-prediction."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=24,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), norm_num_groups=4, sample_size=32, scaling_factor=0.7, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    for module in (unet, vae, text_encoder):  # random, but far from the zeros and ones of a fresh network
        with torch.no_grad():
            for p in module.parameters():
                p += 0.05 * torch.randn_like(p)
            if module is text_encoder:  # so that one word makes a difference
                module.get_input_embeddings().weight.mul_(40)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False,
        clip_sample=False, prediction_type="v_prediction", timestep_spacing="leading",
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae.eval(), text_encoder.eval(), tokenizer, unet.eval(), scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny_folder(tiny_pipe, tmp_path_factory):
    """The same, saved in diffusers' format. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_folder):
    """The same as our LatentDiffusion, in float32 on the CPU."""
    from ldm_lessons.models import load

    return load(tiny_folder, device="cpu", dtype="float32")
