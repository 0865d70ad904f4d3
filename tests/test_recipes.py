"""The recipes, whole but tiny: from nothing to a folder that diffusers runs."""

import json
import subprocess
import sys
from collections import Counter

import pytest
import torch

from ldm_lessons import checkpoints, models, scenes
from ldm_lessons.recipes import __main__ as recipes
from ldm_lessons.recipes import clip, common, conditions, small, unet
from ldm_lessons.scenes.world import Dice
from ldm_lessons.schedules import NoiseSchedule
from ldm_lessons.training import generator as recipes_generator
from ldm_lessons.unet import UNet

NAMES = ["judge", "vae", "text", "clip", "unet", "inpaint", "controlnet", "vae-f4", "vae-f8", "vae-f16", "pixels"]
TINY = ["--rows", "48", "--steps", "3", "--batch", "4", "--precision", "no"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All trained for three steps, in the order that the README gives."""
    home = tmp_path_factory.mktemp("recipes")
    patch = pytest.MonkeyPatch()
    patch.setenv("LDM_LESSONS_DATA", str(home / "data"))
    patch.setattr(models, "POCKET", home / "data" / "pocket")
    patch.setitem(models.MODELS, "pocket", home / "data" / "pocket")
    patch.setitem(models.MODELS, "pocket-inpaint", home / "data" / "inpaint")
    for name in NAMES:
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
    assert set(cards) == set(NAMES)
    for name, card in cards.items():
        assert card["command"].startswith(f"python -m ldm_lessons.recipes {name}")
        assert card["samples"] == 12 and card["plan"]["seed"] == 0 and card["parameters"] > 1e5
        assert [row["step"] for row in card["curve"]] == [1, 2, 3]
        assert set(card["versions"]) == {"torch", "diffusers", "transformers", "accelerate"}
    for name in ("text", "clip"):
        found = cards[name]["validation"]
        assert {"time", "object", "colour"} <= set(found["zero-shot"]) and "place" in found["one word changed"]


def test_an_inpainting_unet_differs_from_the_pocket_one_in_what_was_trained(made) -> None:
    plain, painting = models.load("pocket"), models.load("pocket-inpaint")
    theirs, ours = plain.unet.state_dict(), painting.unet.state_dict()
    assert ours["conv_in.weight"].shape[1] == 9
    same = {k for k in theirs if theirs[k].shape == ours[k].shape and torch.equal(theirs[k], ours[k])}
    assert same >= {k for k in theirs if not k.startswith(conditions.TRAINED)}
    assert "up_blocks.2.resnets.0.conv1.weight" not in same
    size = (made / "data" / "inpaint" / "changes.safetensors").stat().st_size
    assert size < 0.15 * (made / "data" / "pocket" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size


def test_clip_and_controlnet_share_what_they_can(made) -> None:
    pocket, clip = models.load("pocket", dtype="float32"), models.load_clip()
    for name, wanted in pocket.text_encoder.state_dict().items():
        assert torch.equal(clip.text_model.state_dict()[name], wanted)
    net = models.load_controlnet(pocket.unet)
    assert torch.equal(net.mid_block.attentions[0].proj_in.weight, pocket.unet.mid_block.attentions[0].proj_in.weight)
    assert net.controlnet_mid_block.weight.abs().sum() > 0  # it has learnt
    whole = 2 * sum(p.numel() for p in net.parameters())
    assert (made / "data" / "controlnet" / "changes.safetensors").stat().st_size < 0.6 * whole


def test_holes_leave_something_and_take_something() -> None:
    shares = [conditions.hole(recipes_generator(i)).float().mean().item() for i in range(200)]
    assert 0.005 < min(shares) and max(shares) < 0.99 and 0.1 < sum(shares) / 200 < 0.5


def test_the_race_counts_every_racer_alike(made, monkeypatch) -> None:
    monkeypatch.setattr(small, "DRAWS", 8)
    monkeypatch.setattr(small, "_pictures", lambda unet, vae, count: torch.rand(count, 3, 64, 64))
    recipes.main(
        ["race", "--rows", "48", "--batch", "4", "--minutes", "0.03", "--precision", "no", "--runs", str(made / "runs")]
    )
    found = json.loads((made / "data" / "small" / "race.json").read_text())
    assert set(found["racers"]) == set(small.RACERS)
    for f, racer in found["racers"].items():
        assert len(racer["points"]) == 6 and racer["latent"][1] == 64 // int(f)
        assert 0.03 <= racer["points"][-1]["minutes"] < 0.3
        assert (racer["ceiling"] == found["floor"]) == (f == "1")
        assert all((point["own"] == point["fid"]) == (f == "1") for point in racer["points"])


def test_lesson_02_has_its_recordings(made, monkeypatch) -> None:
    monkeypatch.setattr(small, "DRAWS", 13)
    monkeypatch.setattr(small, "PIXEL_STAGES", (1, 2, 9))
    for name in ("predictions", "band", "kl"):
        recipes.main([name, *TINY, "--runs", str(made / "runs")])
    folder = made / "data" / "small"
    assert set(json.loads((folder / "predictions.json").read_text())) == {"epsilon", "sample", "v_prediction"}
    band = json.loads((folder / "band.json").read_text())
    assert len(band["low"]) == 3 and all(a <= b for a, b in zip(band["low"], band["high"], strict=True))
    assert len(json.loads((folder / "kl.json").read_text())) == 4
    assert len(list(folder.glob("*.webp"))) >= 3 + 8
    found = models.load_model(UNet, None, folder / "pixels")
    assert found.config.in_channels == 3 and found.config.sample_size == 32


def test_a_variant_leaves_the_pocket_model_alone(made) -> None:
    before = (made / "data" / "pocket" / "scheduler" / "scheduler_config.json").read_text()
    recipes.main(["unet", "--variant", "epsilon", *TINY, "--runs", str(made / "runs")])
    model = models.load(made / "runs" / "unet-epsilon" / "model")
    assert model.scheduler_config["prediction_type"] == "epsilon"
    assert (made / "data" / "pocket" / "scheduler" / "scheduler_config.json").read_text() == before


def test_variants_are_compared_by_one_budget(made, monkeypatch) -> None:
    some = {name: unet.VARIANTS[name] for name in ("shipped", "AdamW alone")}
    monkeypatch.setattr(unet, "VARIANTS", some)
    command = ["compare", *TINY, "--count", "2", "--runs", str(made / "runs")]
    recipes.main(command)
    path = made / "data" / "comparison.json"
    found, written = json.loads(path.read_text()), path.stat().st_mtime_ns
    assert list(found) == list(some) and found["AdamW alone"]["choices"]["muon"] == 0
    assert found["shipped"]["budget"] == {"steps": 3, "batch": 4, "rows": 48, "count": 2}
    recipes.main(command)
    assert path.stat().st_mtime_ns == written  # nothing is made twice


def test_the_same_loss_whatever_is_predicted() -> None:
    """min-SNR weights make errors of eps, x0 and v from one and the same guess of x0 count alike."""
    schedule = NoiseSchedule.from_config(unet.SCHEDULER)
    rng = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 6, 4, 8, 8, generator=rng)
    t, guess = torch.tensor([5, 100, 300, 500, 800, 999]), x0 + 0.1
    x_t, losses = schedule.add_noise(x0, noise, t), []
    a, s = (
        v.view(-1, 1, 1, 1) for v in (schedule.alpha_bar[t].sqrt().float(), (1 - schedule.alpha_bar[t]).sqrt().float())
    )
    eps = (x_t - a * guess) / s
    answers = {"sample": guess, "epsilon": eps, "v_prediction": a * eps - s * guess}
    for kind, answer in answers.items():
        error = (answer - unet.target(schedule, kind, x0, noise, t)).square().mean((1, 2, 3))
        losses.append(error * unet.min_snr_weight(schedule, unet.Choices(prediction=kind, min_snr=5), t))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-3, atol=1e-6)


def test_minutes_go_on_when_the_clock_starts_anew() -> None:
    curve = [{"step": k, "seconds": s} for k, s in enumerate((60, 120, 30, 90))]
    assert common.minutes_of(curve) == [1, 2, 2.5, 3.5]


def test_latents_have_unit_variance_after_scaling(made) -> None:
    from ldm_lessons.vae import VAE
    from ldm_lessons.weights import load_model

    vae = load_model(VAE, None, made / "data" / "pocket" / "vae")
    source = common.training_pictures(recipes.replace(recipes.PLANS["unet"], rows=48), made / "runs")
    stored = common.latents(vae, source, made / "runs" / "unet")
    assert stored[0].shape == (48, 4, 16, 16)
    assert stored[0].float().std().item() == pytest.approx(1, abs=0.02)


def test_what_one_net_made_is_not_taken_for_anothers(tmp_path) -> None:
    asked = []

    def made_by(net, count):
        each = lambda rows: asked.append(rows) or {"x": rows + net.bias.item()}  # noqa: E731
        return common.made_once("sums", tmp_path, net, count, each)["x"].tolist()

    net = torch.nn.Linear(1, 1).requires_grad_(False)
    net.bias.fill_(1)
    assert made_by(net, 70) == list(range(1, 71)) and len(asked) == 2
    assert made_by(net, 3) == [1, 2, 3] and len(asked) == 2  # read
    net.bias.fill_(2)
    assert made_by(net, 3) == [2, 3, 4] and len(asked) == 3
    assert made_by(net, 4) == [2, 3, 4, 5] and len(asked) == 4  # too few were kept
    assert not list(tmp_path.glob("*.part"))


def test_a_finished_run_is_not_trained_again(made, capsys) -> None:
    before = checkpoints.read(made / "runs" / "judge")[0]
    recipes.main(["judge", *TINY, "--runs", str(made / "runs")])
    after = checkpoints.read(made / "runs" / "judge")[0]
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_the_same_command_makes_the_same_weights(made, tmp_path) -> None:
    recipes.main(["judge", *TINY, "--runs", str(tmp_path)])
    once, again = (checkpoints.read(runs / "judge")[0] for runs in (made / "runs", tmp_path))
    assert all(torch.equal(v, again[k]) for k, v in once.items())


def test_the_tokenizer_keeps_every_word_and_never_fails() -> None:
    texts = ["a red house on the left, snowy mountains at sunset", "two birds by moonlight"] * 50
    tokenizer = clip.train_tokenizer(texts, 60)
    assert tokenizer.model_max_length == 77
    ids = tokenizer("a red house on the left, snowy mountains at sunset").input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == texts[0].replace(" ", "")
    assert len(ids) < len(tokenizer("qzx wvkj zzyx house").input_ids) * 3
    assert tokenizer.unk_token_id not in tokenizer("Ünïcode — 日本!").input_ids[1:-1]


def test_a_wrong_caption_is_wrong_in_one_thing() -> None:
    seen = set()
    for seed in range(300):
        scene = scenes.sample_scene(seed)
        right = scenes.caption(scene, 1).split()
        what, text = clip.wrong_caption(scene, 1)
        seen.add(what)
        if not what:
            assert text == " ".join(right)
            continue
        kept = (Counter(right) & Counter(text.split())).total()
        assert text.split() != right and kept >= len(right) - 4, (right, text)
        for _ in range(3):
            what, changed = clip.altered(scene, Dice("test", seed))
            ours, theirs = scene.to_dict(), changed.to_dict()
            differing = [k for k in ours if ours[k] != theirs[k]]
            assert differing == [what if what in ("birds", "time") else "objects"]
    assert seen >= {"place", "size", "colour", "birds"}


def test_bad_commands_end_in_one_sentence(tmp_path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "ldm_lessons.recipes", *words], capture_output=True, text=True)

    assert "invalid choice: 'vea'" in run("vea").stderr
    (tmp_path / "runs").write_text("in the way")
    done = run("vae", "--rows", "4", "--steps", "1", "--runs", str(tmp_path / "runs"))
    assert done.returncode == 1 and "Traceback" not in done.stderr and "recipes: " in done.stderr
