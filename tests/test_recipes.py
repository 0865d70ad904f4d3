"""The recipes, whole but tiny: from nothing to a folder that diffusers runs."""

import json
import subprocess
import sys

import pytest
import torch

from ldm_lessons import checkpoints, models
from ldm_lessons.recipes import __main__ as recipes
from ldm_lessons.recipes import clip, unet

TINY = ["--rows", "48", "--steps", "3", "--batch", "4", "--precision", "no"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All four trained for three steps, in the order that the README gives."""
    home = tmp_path_factory.mktemp("recipes")
    patch = pytest.MonkeyPatch()
    patch.setenv("LDM_LESSONS_DATA", str(home / "data"))
    for name in ("judge", "clip", "vae", "unet"):
        recipes.main([name, *TINY, "--runs", str(home / "runs")])
    yield home
    patch.undo()


def test_the_result_runs_in_diffusers_and_here(made) -> None:
    from diffusers import StableDiffusionPipeline

    pocket = made / "data" / "pocket"
    pipe = StableDiffusionPipeline.from_pretrained(pocket)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    theirs = pipe("a red house", num_inference_steps=2, latents=noise, output_type="pt").images
    from ldm_lessons import generate

    model = models.load(pocket)
    ours = generate.text_to_image(
        model, "a red house", num_inference_steps=2, guidance_scale=7.5, latents=noise, progress=False
    )
    assert theirs.shape == (1, 3, 128, 128)
    import numpy as np

    apart = np.abs(np.asarray(ours[0], int) - (theirs[0].permute(1, 2, 0).numpy() * 255).round().astype(int))
    assert apart.max() <= 2
    assert "house" in model.known_words


def test_cards_say_how(made) -> None:
    cards = json.loads((made / "data" / "cards.json").read_text())
    assert set(cards) == {"judge", "clip", "vae", "unet"}
    for name, card in cards.items():
        assert card["command"].startswith(f"python -m ldm_lessons.recipes {name}")
        assert card["samples"] == 12 and card["plan"]["seed"] == 0 and card["parameters"] > 1e5
        assert [row["step"] for row in card["curve"]] == [1, 2, 3]
        assert set(card["versions"]) == {"torch", "diffusers", "transformers", "accelerate"}


def test_latents_have_unit_variance_after_scaling(made) -> None:
    from ldm_lessons.vae import VAE
    from ldm_lessons.weights import load_model

    vae = load_model(VAE, None, made / "data" / "pocket" / "vae")
    stored = unet.latents(vae, None, made / "runs" / "unet", torch.device("cpu"))
    assert stored[0].shape == (48, 4, 16, 16)
    assert stored[0].float().std().item() == pytest.approx(1, abs=0.02)


def test_a_finished_run_is_not_trained_again(made, capsys) -> None:
    before = checkpoints.read(made / "runs" / "judge")[0]
    recipes.main(["judge", *TINY, "--runs", str(made / "runs")])
    after = checkpoints.read(made / "runs" / "judge")[0]
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_the_tokenizer_keeps_every_word_and_never_fails() -> None:
    texts = ["a red house on the left, snowy mountains at sunset", "two birds by moonlight"] * 50
    tokenizer = clip.train_tokenizer(texts, 60)
    assert tokenizer.model_max_length == 77
    ids = tokenizer("a red house on the left, snowy mountains at sunset").input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == texts[0].replace(" ", "")
    assert len(ids) < len(tokenizer("qzx wvkj zzyx house").input_ids) * 3
    assert tokenizer.unk_token_id not in tokenizer("Ünïcode — 日本!").input_ids[1:-1]


def test_bad_commands_end_in_one_sentence(tmp_path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "ldm_lessons.recipes", *words], capture_output=True, text=True)

    assert "invalid choice: 'vea'" in run("vea").stderr
    (tmp_path / "runs").write_text("in the way")
    done = run("vae", "--rows", "4", "--steps", "1", "--runs", str(tmp_path / "runs"))
    assert done.returncode == 1 and "Traceback" not in done.stderr and "recipes: " in done.stderr
