"""The networks against the libraries' own: names, shapes, numbers, and what they say to wrong input."""

import math
from dataclasses import replace

import pytest
import torch

from ldm_lessons.clip import CLIP, CLIPConfig, VisionConfig, VisionEncoder
from ldm_lessons.controlnet import ControlNet, ControlNetConfig
from ldm_lessons.layers import Attention, timestep_embedding
from ldm_lessons.text import TextConfig, TextEncoder, tokenize
from ldm_lessons.unet import UNet, UNetConfig
from ldm_lessons.vae import VAE, Gaussian, VAEConfig

ATTENDS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UNETS = {
    "two levels": UNetConfig(None, 4, 4, (ATTENDS, PLAIN), (16, 32), 1, 4, 4, 12),
    "nine channels, text at the ends": UNetConfig(
        8, 9, 4, (ATTENDS, PLAIN, ATTENDS), (16, 32, 48), 2, (2, 4, 3), 8, 12
    ),
    "no text on the way": UNetConfig(8, 3, 6, (PLAIN, PLAIN), (24, 16), 3, 2, 4, 8),
    "one level": UNetConfig(8, 4, 4, (ATTENDS,), (16,), 2, (4,), 4, 8),
}
CONTROLS = {  # the picture is 2 ** (widths - 1) times larger than the latent
    name: ControlNetConfig(UNETS[name], channels, widths)
    for name, channels, widths in [
        ("two levels", 3, (4, 8, 12)),
        ("one level", 2, (4,)),
        ("no text on the way", 1, (8, 4)),
    ]
}
CONTROL = ControlNetConfig(replace(UNetConfig.pocket(), sample_size=None))
VAES = {
    "f=4": VAEConfig(3, 3, 4, (8, 16, 24), 1, 4),
    "f=2, one channel": VAEConfig(1, 1, 2, (8, 8), 2, 2),
    "f=1": VAEConfig(3, 3, 3, (16,), 1, 4),
}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXTS = {
    "small": TextConfig(**SMALL, vocab_size=50, bos_token_id=39, eos_token_id=40),
    "old end of text, gelu": TextConfig(**SMALL, vocab_size=50, eos_token_id=2, hidden_act="gelu", layer_norm_eps=1e-3),
}
VISION = VisionConfig(**SMALL, image_size=24, patch_size=8)
CLIPS = {name: CLIPConfig(text, VISION, 20) for name, text in TEXTS.items()}


def build(config):
    """Our model of a configuration."""
    kinds = {
        UNetConfig: UNet,
        ControlNetConfig: ControlNet,
        VAEConfig: VAE,
        TextConfig: TextEncoder,
        VisionConfig: VisionEncoder,
    }
    return CLIP.from_config(config) if isinstance(config, CLIPConfig) else kinds[type(config)](config)


def library(config):
    """diffusers' or transformers' model of the same configuration."""
    import diffusers
    import transformers

    if isinstance(config, UNetConfig):
        return diffusers.UNet2DConditionModel.from_config(config.to_diffusers())
    if isinstance(config, ControlNetConfig):
        return diffusers.ControlNetModel.from_config(config.to_diffusers())
    if isinstance(config, VAEConfig):
        return diffusers.AutoencoderKL.from_config(config.to_diffusers())
    name = {TextConfig: "CLIPText", VisionConfig: "CLIPVision", CLIPConfig: "CLIP"}[type(config)]
    options = getattr(transformers, name + "Config").from_dict(config.to_transformers())
    return getattr(transformers, name + "Model")(options)


def randomise(model, seed=0):
    """Every parameter off its initial value, norms and biases too, so that no fault hides behind a 0 or a 1.

    Matrices change in proportion: large activations would hide a wrong eps in a norm.
    """
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += (0.5 * p.data.std() if p.ndim > 1 else 0.2) * torch.randn(p.shape, generator=generator)
    return model.double().eval()


def twins(config):
    theirs = randomise(library(config))
    ours = build(config).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def assert_same(ours, theirs, tolerance=1e-6):
    """Equal to within a fraction of the standard deviation."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() <= tolerance * theirs.std()


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Names and shapes


@pytest.mark.parametrize(
    ("config", "numbers", "tensors"),
    [
        (UNetConfig.sd15(), 859_520_964, 686),
        (UNetConfig(in_channels=9, cross_attention_dim=768), 859_535_364, 686),
        (VAEConfig.sd15(), 83_653_863, 248),
        (TextConfig.sd15(), 123_060_480, 196),
        (ControlNetConfig(), 361_279_120, 340),
    ],
    ids=["unet", "unet for inpainting", "vae", "text", "controlnet"],
)
def test_stable_diffusion_has_its_published_size(config, numbers, tensors):
    with torch.device("meta"):
        model = build(config)
    assert sum(p.numel() for p in model.parameters()) == numbers
    assert len(model.state_dict()) == tensors


@pytest.mark.parametrize(
    "config",
    [
        *(UNetConfig.sd15(), UNetConfig.pocket(), VAEConfig.sd15(), VAEConfig.pocket()),
        *(TextConfig.sd15(), TextConfig.pocket(1000), VisionConfig(), VisionConfig.pocket()),
        CLIPConfig(TextConfig.pocket(1000), VisionConfig.pocket(), 128),
        *(*UNETS.values(), *VAES.values(), *TEXTS.values(), VISION, *CONTROLS.values(), ControlNetConfig()),
    ],
    ids=lambda config: type(config).__name__,
)
def test_names_and_shapes_are_the_libraries(config):
    with torch.device("meta"):
        ours, theirs = build(config).state_dict(), library(config).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize(
    "config", [*UNETS.values(), *VAES.values(), UNetConfig.pocket(), CONTROL], ids=lambda config: type(config).__name__
)
def test_a_configuration_survives_diffusers(config):
    import json

    with torch.device("meta"):
        written = json.loads(library(config).to_json_string())  # with every option that diffusers knows
    assert type(config).from_diffusers(written) == config


@pytest.mark.parametrize("config", [*TEXTS.values(), VISION, *CLIPS.values()], ids=lambda config: type(config).__name__)
def test_a_configuration_survives_transformers(config):
    with torch.device("meta"):
        model = library(config)
    assert type(config).from_transformers(model.config.to_dict()) == config
    assert type(config).from_transformers(model.config.to_diff_dict()) == config  # what is left out is the default


def test_what_a_configuration_leaves_out_is_the_libraries_default():
    import diffusers
    import transformers

    for kind, theirs in ((TextConfig, transformers.CLIPTextConfig), (VisionConfig, transformers.CLIPVisionConfig)):
        assert kind.from_transformers(theirs().to_dict()) == kind() == kind.from_transformers({})
    clip = CLIPConfig(TextConfig(), VisionConfig())
    assert CLIPConfig.from_transformers(transformers.CLIPConfig().to_dict()) == clip == CLIPConfig.from_transformers({})
    with torch.device("meta"):
        unet, vae = diffusers.UNet2DConditionModel().config, diffusers.AutoencoderKL().config
    assert UNetConfig.from_diffusers(unet) == UNetConfig() == UNetConfig.from_diffusers({})
    assert VAEConfig.from_diffusers(vae) == VAEConfig() == VAEConfig.from_diffusers({})


def test_the_files_released_with_stable_diffusion_are_the_presets():
    # Written in 2022 by early versions of the libraries, which knew fewer options.
    up, down = ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3], [*[ATTENDS] * 3, PLAIN]
    unet = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "in_channels": 4}
    unet |= {"attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False}
    unet |= {"cross_attention_dim": 768, "down_block_types": down, "up_block_types": up, "layers_per_block": 2}
    unet |= {"downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_scale_factor": 1}
    unet |= {"norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64}
    assert UNetConfig.from_diffusers(unet) == UNetConfig.sd15()
    vae = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu", "layers_per_block": 2}
    vae |= {"block_out_channels": [128, 256, 512, 512], "in_channels": 3, "out_channels": 3, "latent_channels": 4}
    vae |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae |= {"norm_num_groups": 32, "sample_size": 512}
    assert VAEConfig.from_diffusers(vae) == VAEConfig.sd15()
    text = {"architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0}
    text |= {"eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0}
    text |= {"intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "pad_token_id": 1}
    text |= {"model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12}
    text |= {"projection_dim": 768, "torch_dtype": "float32", "vocab_size": 49408}
    assert replace(TextConfig.from_transformers(text), bos_token_id=49406, eos_token_id=49407) == TextConfig.sd15()


def test_the_pocket_presets_keep_four_channels_a_group():
    for config in (UNetConfig.pocket(), VAEConfig.pocket()):
        assert all(c % config.norm_num_groups == 0 for c in config.block_out_channels)
        assert min(config.block_out_channels) // config.norm_num_groups >= 4
    assert VAEConfig.pocket().downscale * UNetConfig.pocket().sample_size == VAEConfig.pocket().sample_size
    assert UNetConfig.pocket().cross_attention_dim == TextConfig.pocket(1000).hidden_size


# Numbers: the U-Net


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
def test_unet_equals_diffusers(name, size):
    config = UNETS[name]
    ours, theirs = twins(config)
    x, text = randn(3, config.in_channels, *size), randn(3, 5, config.cross_attention_dim, seed=2)
    with torch.no_grad():
        assert_same(ours(x, 0, text), theirs(x, 0, text).sample)
        t = torch.tensor([1, 500, 999])
        assert_same(ours(x, t, text), theirs(x, t, text).sample, 1e-4)  # their sinusoid is in float32
        assert_same(ours(x, torch.tensor(981), text)[1:2], ours(x[1:2], torch.tensor([981]), text[1:2]))
        assert_same(ours(x, 37, text), ours(x, torch.tensor([37] * 3), text))


@pytest.mark.parametrize("name", CONTROLS)
def test_controlnet_equals_diffusers(name):
    config = CONTROLS[name]
    ours, theirs = twins(config)
    unet, unet_theirs = twins(config.unet)
    f, width = 2 ** (len(config.conditioning_embedding_out_channels) - 1), config.unet.cross_attention_dim
    x, text = randn(2, config.unet.in_channels, 4, 6), randn(2, 5, width, seed=2)
    picture = randn(2, config.conditioning_channels, 4 * f, 6 * f, seed=3)
    with torch.no_grad():
        got, (down, middle) = ours(x, 0, text, picture, 0.7), theirs(x, 0, text, picture, 0.7, return_dict=False)
        for a, b in zip(got, [*down, middle], strict=True):
            assert_same(a, b)
        steered = unet(x, 0, text, got)
        options = dict(down_block_additional_residuals=down, mid_block_additional_residual=middle)
        assert_same(steered, unet_theirs(x, 0, text, **options).sample)
        assert (steered - unet(x, 0, text)).abs().max() > 0.1 * steered.std()


def test_a_new_controlnet_changes_nothing_yet():
    unet = UNet(UNetConfig.pocket()).eval()
    made = ControlNet.from_unet(unet, conditioning_channels=1)
    assert made.config == replace(CONTROL, conditioning_channels=1)
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 9, 128)
    with torch.no_grad():
        answers = made(x, 3, text, torch.rand(1, 1, 128, 128))
        assert torch.equal(unet(x, 3, text, answers), unet(x, 3, text))
        kept = unet.down_blocks[0].resnets[0].conv1.weight
        assert torch.equal(made.down_blocks[0].resnets[0].conv1.weight, kept)
    assert made.down_blocks[0].resnets[0].conv1.weight is not kept  # a copy, to be trained on its own
    with pytest.raises(ValueError, match=r"a picture of shape \(1, 1, 128, 128\), but got \(1, 1, 64, 64\)"):
        made(x, 3, text, torch.rand(1, 1, 64, 64))


def test_unet_listens_to_all_it_is_given():
    config = UNETS["two levels"]
    model = randomise(UNet(config))
    x, text = randn(1, 4, 8, 8), randn(1, 5, 12, seed=2)
    with torch.no_grad():
        base = model(x, 10, text)
        for other in (model(x + 0.1, 10, text), model(x, 11, text), model(x, 10, text + 0.1)):
            assert (other - base).abs().max() > 1e-3 * base.std()


def test_timestep_embedding_is_cosines_then_sines():
    t = torch.tensor([0, 1, 250, 999])
    got = timestep_embedding(t, 12)
    angle = t[:, None].double() * torch.tensor([10_000 ** (-i / 6) for i in range(6)], dtype=torch.float64)
    torch.testing.assert_close(got.double(), torch.cat([angle.cos(), angle.sin()], 1), atol=1e-4, rtol=0)
    assert got.dtype == torch.float32 and got[0].tolist() == [1.0] * 6 + [0.0] * 6


def test_attention_probabilities_are_those_of_the_forward_pass():
    layer = randomise(Attention(16, 12, heads=4))
    x, context = randn(2, 6, 16), randn(2, 5, 12, seed=2)
    p = layer.probabilities(x, context)
    torch.testing.assert_close(p.sum(-1), torch.ones_like(p[..., 0]))
    values = layer.to_v(context).view(2, 5, 4, 4)  # (B, L, heads, 4)
    mixed = torch.einsum("bhnl,blhc->bnhc", p, values).flatten(2)
    torch.testing.assert_close(layer.to_out[0](mixed), layer(x, context))
    assert p.shape == (2, 4, 6, 5)


def test_unet_can_be_tapped_and_compiled():
    config = UNETS["two levels"]
    model = UNet(config)
    x, text, seen = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12), {}
    for name in ("down_blocks.0", "mid_block", "up_blocks.1", "down_blocks.0.attentions.0"):
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
    model(x, 3, text)
    assert [tuple(t.shape) for t in seen["down_blocks.0"]] == [(1, 16, 8, 8), (1, 16, 4, 4)]
    assert seen["mid_block"].shape == (1, 32, 4, 4) and seen["up_blocks.1"].shape == (1, 16, 8, 8)
    whole = torch.compile(UNet(config), backend="eager", fullgraph=True)  # fails where Python depends on data
    assert whole(x, torch.tensor([3]), text).shape == x.shape


def test_channels_last_and_bf16_training_reach_every_parameter():
    config = UNETS["two levels"]
    torch.manual_seed(0)
    model = UNet(config).to(memory_format=torch.channels_last)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    with torch.no_grad():
        exact = model(x, 5, text)
        torch.testing.assert_close(model(x.to(memory_format=torch.channels_last), 5, text), exact)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x, torch.tensor([5, 5]), text)
    assert (rough - exact).abs().max() < 0.1
    rough.float().pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# Numbers: the VAE


@pytest.mark.parametrize("name", VAES)
def test_vae_equals_diffusers(name):
    config = VAES[name]
    ours, theirs = twins(config)
    x = randn(2, config.in_channels, 8, 12).clamp(-1, 1)
    with torch.no_grad():
        posterior, reference = ours.encode(x), theirs.encode(x).latent_dist
        assert posterior.mean.shape == (2, config.latent_channels, 8 // config.downscale, 12 // config.downscale)
        assert_same(posterior.mode(), reference.mode())
        assert_same(posterior.logvar, reference.logvar)
        assert_same(posterior.kl(), reference.kl())
        z = posterior.sample(torch.Generator().manual_seed(3))
        assert_same(z, reference.sample(torch.Generator().manual_seed(3)))
        assert_same(ours.decode(z), theirs.decode(z).sample)
        rebuilt, again = ours(x, torch.Generator().manual_seed(3))
        assert_same(rebuilt, ours.decode(z))
        assert_same(again.mean, posterior.mean)


def test_gaussian_has_the_moments_and_the_divergence_it_says():
    mean, logvar = torch.full((4000, 1, 2, 2), 1.5), torch.full((4000, 1, 2, 2), math.log(0.25))
    z = Gaussian(mean, logvar).sample(torch.Generator().manual_seed(0))
    assert abs(z.mean() - 1.5) < 0.02 and abs(z.std() - 0.5) < 0.02
    reference = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, 0.5), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(Gaussian(mean, logvar).kl(), reference.sum(dim=(1, 2, 3)))
    half = Gaussian(mean.bfloat16(), logvar.bfloat16()).kl()
    assert half.shape == (4000,) and half.dtype == torch.float32
    assert Gaussian(mean, torch.full_like(mean, 99.0)).logvar.max() == 20.0


# Numbers: CLIP


def token_rows(config, length=11):
    """Three rows of tokens that end early, late and at the last place, padded with the end token.

    The end token has the largest number only where it is found by that.
    """
    end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
    ids = torch.randint(3, 49, (3, length), generator=torch.Generator().manual_seed(0))
    ids[ids == end] = 48
    for row, stop in zip(ids, (2, 7, length - 1), strict=True):
        row[stop:] = end
    mask = torch.arange(length)[None] <= torch.tensor([2, 7, length - 1])[:, None]
    return ids, mask.long()


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("length", [11, 77])
def test_text_encoder_equals_transformers(name, length):
    ours, theirs = twins(TEXTS[name])
    ids, mask = token_rows(TEXTS[name], length)
    with torch.no_grad():
        for given in (None, mask):
            hidden, reference = ours(ids, given), theirs(ids, attention_mask=given)
            assert_same(hidden, reference.last_hidden_state)
            assert_same(ours.pooled(hidden, ids), reference.pooler_output)


def test_text_encoder_does_not_read_ahead():
    model = randomise(TextEncoder(TEXTS["small"]))
    ids, _ = token_rows(TEXTS["small"])
    changed = ids.clone()
    changed[:, 5:] = 4
    with torch.no_grad():
        a, b = model(ids), model(changed)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert (a[:, 5:] - b[:, 5:]).abs().max() > 0.01


@pytest.mark.parametrize("name", CLIPS)
def test_clip_equals_transformers(name):
    ours, theirs = twins(CLIPS[name])
    ids, mask = token_rows(TEXTS[name])
    pixels = randn(2, 3, 24, 24)
    with torch.no_grad():
        assert_same(ours.text_features(ids, mask), theirs.get_text_features(ids, attention_mask=mask).pooler_output)
        reference = theirs.vision_model(pixels)
        assert_same(ours.vision_model(pixels), reference.last_hidden_state)
        assert_same(ours.vision_model.pooled(ours.vision_model(pixels)), reference.pooler_output)
        assert_same(ours.image_features(pixels), theirs.get_image_features(pixels).pooler_output)
        assert_same(ours(ids, pixels), theirs(ids, pixels).logits_per_image)


def test_clip_starts_with_the_scales_of_its_paper():
    torch.manual_seed(0)
    config = TextConfig.pocket(1000)
    model = CLIP(config, VisionConfig.pocket(), 128)
    assert math.isclose(model.logit_scale.exp().item(), 1 / 0.07, rel_tol=1e-5)
    text = model.text_model
    assert abs(text.embeddings.token_embedding.weight.std() / 0.02 - 1) < 0.05
    layer = text.encoder.layers[0]
    expected = {"self_attn.q_proj": 128**-0.5, "self_attn.out_proj": 128**-0.5 / 6**0.5}
    expected |= {"mlp.fc1": 256**-0.5, "mlp.fc2": 128**-0.5 / 6**0.5}
    for name, std in expected.items():
        assert abs(layer.get_submodule(name).weight.std() / std - 1) < 0.05
        assert not layer.get_submodule(name).bias.any()


def small_tokenizer():
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def test_tokenize_pads_and_cuts_to_77():
    tokenizer = small_tokenizer()
    rows = tokenize(tokenizer, ["ab", "", "x" * 100])
    assert rows.shape == (3, 77) and rows.dtype == torch.int64
    start, end = 52, 53
    assert rows[0].tolist() == [start, 0, 27] + [end] * 74
    assert rows[1].tolist() == [start] + [end] * 76
    assert rows[2, 0] == start and rows[2, -1] == end and (rows[2, 1:-1] == 23).all()
    torch.testing.assert_close(tokenize(tokenizer, "ab"), rows[:1])


# Wrong input


def test_wrong_shapes_get_one_sentence():
    unet, vae = UNet(UNETS["nine channels, text at the ends"]), VAE(VAES["f=4"])
    text, clip = TextEncoder(TEXTS["small"]), VisionEncoder(VISION)
    ids = torch.zeros(1, 78, dtype=torch.int64)
    x, words = torch.zeros(1, 9, 8, 8), torch.zeros(1, 5, 12)
    cases = [
        (lambda: unet(x[:, :4], 0, words), r"latents of shape \(B, 9, H, W\), but got \(1, 4, 8, 8\)"),
        (lambda: unet(x[0], 0, words), r"latents of shape \(B, 9, H, W\), but got \(9, 8, 8\)"),
        (lambda: unet(x[..., :6], 0, words), "8x6, but height and width must be multiples of 4"),
        (lambda: unet(x, 0, words[..., :7]), r"text of shape \(1, L, 12\) with these latents, but got \(1, 5, 7\)"),
        (lambda: unet(x, 0, words.repeat(2, 1, 1)), r"text of shape \(1, L, 12\)"),
        (lambda: vae.encode(torch.zeros(1, 4, 8, 8)), r"pictures of shape \(B, 3, H, W\), but got \(1, 4, 8, 8\)"),
        (lambda: vae.encode(torch.zeros(1, 3, 8, 10)), "8x10 pixels, but height and width must be multiples of 4"),
        (lambda: vae.decode(torch.zeros(1, 3, 8, 8)), r"latents of shape \(B, 4, h, w\), but got \(1, 3, 8, 8\)"),
        (lambda: text(ids), r"L at most 77, but got \(1, 78\)"),
        (lambda: text(ids[0]), r"tokens of shape \(B, L\)"),
        (lambda: clip(torch.zeros(1, 3, 24, 32)), r"pictures of shape \(B, 3, 24, 24\), but got \(1, 3, 24, 32\)"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UNetConfig(block_out_channels=(32, 48, 64, 64)), "norm_num_groups, 32"),
        (lambda: UNetConfig(block_out_channels=(32, 64)), "one entry for each of the 2"),
        (lambda: UNetConfig(heads=(8, 8)), "one entry for each of the 4"),
        (lambda: UNetConfig(down_block_types=("AttnDownBlock2D",) * 4), "no AttnDownBlock2D"),
        (lambda: UNet(UNetConfig(heads=7)), "cannot be shared among 7 heads"),
        (lambda: VAEConfig(block_out_channels=(30,)), "norm_num_groups, 32"),
        (lambda: TextConfig(hidden_size=100, num_attention_heads=8), "cannot be shared among 8 heads"),
        (lambda: VisionConfig(hidden_act="relu"), "Unknown hidden_act 'relu'"),
        (lambda: UNetConfig.from_diffusers({"use_linear_projection": True}), "use_linear_projection = False"),
        (lambda: UNetConfig.from_diffusers({"_class_name": "UNet2DModel"}), "UNet2DConditionModel"),
        (lambda: UNetConfig.from_diffusers({"up_block_types": ["UpBlock2D"] * 4}), "up_block_types"),
        (lambda: VAEConfig.from_diffusers({"_class_name": "AutoencoderTiny"}), "AutoencoderKL"),
        (lambda: VAEConfig.from_diffusers({"use_quant_conv": False}), "use_quant_conv = True"),
        (lambda: TextConfig.from_transformers({"model_type": "t5"}), "clip_text_model, but .* t5"),
        (lambda: CLIPConfig.from_transformers({"model_type": "siglip"}), "clip, but .* siglip"),
    ],
)
def test_wrong_configurations_get_one_sentence(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


# At the real sizes


@pytest.mark.full_size
@pytest.mark.parametrize(
    "config",
    [UNetConfig.sd15(), UNetConfig(in_channels=9, cross_attention_dim=768), ControlNetConfig(), VAEConfig.sd15(),
     TextConfig.sd15()],
    ids=["unet", "unet for inpainting", "controlnet", "vae", "text"],
)  # fmt: skip
def test_stable_diffusion_at_its_real_size_equals_the_libraries(config):
    """Random weights, float32, 512 x 512: the largest difference, to be seen with -s."""
    torch.manual_seed(0)
    theirs = library(config).eval()
    with torch.device("meta"):
        ours = build(config).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)  # the same memory twice
    unet = getattr(config, "unet", config)
    x, text = torch.randn(1, getattr(unet, "in_channels", 4), 64, 64), torch.randn(1, 77, 768)
    with torch.no_grad():
        if isinstance(config, UNetConfig):
            pairs = [(ours(x, 981, text), theirs(x, 981, text).sample)]
        elif isinstance(config, ControlNetConfig):
            for p in [*ours.controlnet_down_blocks.parameters(), *ours.controlnet_mid_block.parameters()]:
                p.normal_(0, 0.02)
            picture = torch.rand(1, 3, 512, 512)
            down, middle = theirs(x, 981, text, picture, return_dict=False)
            pairs = zip(ours(x, 981, text, picture), [*down, middle], strict=True)
        elif isinstance(config, VAEConfig):
            picture = torch.rand(1, 3, 512, 512) * 2 - 1
            pairs = [(ours.encode(picture).mode(), theirs.encode(picture).latent_dist.mode())]
            z = torch.randn(1, 4, 64, 64)
            pairs += [(ours.decode(z), theirs.decode(z).sample)]
        else:
            ids = torch.randint(3, 49405, (2, 77))
            ids[:, 40:] = config.eos_token_id
            pairs = [(ours(ids), theirs(ids).last_hidden_state)]
    for a, b in pairs:
        print(f"{type(config).__name__}: {tuple(a.shape)}, largest difference {(a - b).abs().max():.1e}")
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
