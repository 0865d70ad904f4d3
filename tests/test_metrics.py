"""The judge's bookkeeping, PSNR and the Fréchet distance, against answers known beforehand."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm_lessons import generate, metrics, models, samplers, scenes
from ldm_lessons import judge as judging
from ldm_lessons.machine import data_dir


class Oracle:
    """A judge that always sees the scenes it was made with."""

    def __init__(self, seen: list[scenes.Scene]):
        self.truth = torch.tensor([judging.labels(s) for s in seen])

    def look(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            name: torch.nn.functional.one_hot(self.truth[:, i].clamp_min(0), len(options)).float()
            for i, (name, options) in enumerate(judging.HEADS.items())
        }


SOME = [scenes.sample_scene(i) for i in range(120)]
MENTIONS = [scenes.caption_with_mentions(s, 1).mentions for s in SOME]
BLANK = torch.zeros(len(SOME), 3, 128, 128)


def test_who_sees_the_truth_finds_all_right() -> None:
    found = judging.score(Oracle(SOME), BLANK, SOME, MENTIONS)
    assert found.all_right == (120, 120)
    assert all(right == asked for right, asked in found.counts.values())
    assert found.counts["object"][1] == sum(len(s.objects) for s in SOME)
    assert judging.score(Oracle(SOME), BLANK, SOME).all_right == (120, 120)


def test_each_mistake_is_counted_where_it_was_made() -> None:
    wrong = [replace(s, time="night" if s.time == "day" else "day") for s in SOME]
    found = judging.score(Oracle(wrong), BLANK, SOME, MENTIONS)
    assert found.counts["time"][0] == 0 and found.accuracy("ground") == 1 == found.accuracy("place")
    told = sum("time" in m for m in MENTIONS)
    assert found.counts["time"] == (0, told) and found.all_right[0] == 120 - told
    bare = [replace(s, objects=()) for s in SOME]
    missed = judging.score(Oracle(bare), BLANK, SOME, MENTIONS)
    assert missed.counts["object"][0] == 0 and missed.counts["place"][0] == 0


def test_another_place_is_still_the_object() -> None:
    elsewhere = {"left": "right", "right": "left", "middle": "left"}
    one = [s for s in SOME if len(s.objects) == 1]
    moved = [replace(s, objects=(replace(s.objects[0], place=elsewhere[s.objects[0].place]),)) for s in one]
    found = judging.score(Oracle(moved), BLANK[: len(one)], one)
    assert found.accuracy("place") == 0 and found.accuracy("object") == 1 == found.accuracy("colour")


def test_labels_name_what_is_drawn() -> None:
    for scene in SOME:
        truth = dict(zip(judging.HEADS, judging.labels(scene), strict=True))
        assert judging.HEADS["time"][truth["time"]] == scene.time
        for kind in scenes.world.KINDS:
            here = [o for o in scene.objects if o.kind == kind]
            assert judging.HEADS[kind][truth[kind]] == (here[0].place if here else "absent")
            assert (truth[f"{kind}.size"] == judging.NOT_THERE) == (not here)


def test_psnr_of_a_known_error() -> None:
    a = torch.zeros(2, 3, 8, 8)
    torch.testing.assert_close(metrics.psnr(a, a + 0.1), torch.full((2,), 20.0))


def test_frechet_distance_of_known_gaussians() -> None:
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(20_000, 4, generator=rng, dtype=torch.float64)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert metrics.frechet_distance(a, a + 2) == pytest.approx(16, rel=1e-9)  # the means differ: 4 dimensions of 2²
    assert metrics.frechet_distance(a, 3 * a) == pytest.approx(4 * 4, rel=0.05)  # the deviations differ: 4 of (3 - 1)²


def test_the_shipped_judge_sees_drawn_scenes() -> None:
    judge = judging.Judge.load()
    some = [scenes.sample_scene(i, "test") for i in range(64)]
    shown = judging.pictures_to_tensor(scenes.draw(s) for s in some)
    found = judging.score(judge, shown, some)
    for name in ("time", "ground", "backdrop", "object", "place", "colour"):
        assert found.accuracy(name) > 0.9, (name, found.counts[name])
    with pytest.raises(ValueError, match="pictures of shape"):
        judge(shown[:, :, :64, :64])


def test_the_recorded_scores_are_whole() -> None:
    recorded = json.loads((data_dir() / "pocket" / "scores.json").read_text())
    rows = recorded["prompts"]["attributes"]
    assert all(np.isclose(r["right"] / r["asked"], r["accuracy"], atol=1e-3) for r in rows.values())
    assert recorded["prompts"]["all_right"]["asked"] == recorded["count"]


def test_the_nearest_is_found_and_how_far_it_is() -> None:
    rng = torch.Generator().manual_seed(0)
    among = torch.rand(50, 3, 4, 4, generator=rng)
    shown = among[[7, 31]] + torch.tensor([0.01, -0.02]).view(2, 1, 1, 1)
    apart, index = metrics.nearest(shown, among, batch=16)
    assert index.tolist() == [7, 31]
    torch.testing.assert_close(apart, torch.tensor([0.01, 0.02]), atol=1e-5, rtol=0)
    apart, index = metrics.nearest(among[:3], (among * 255).round().to(torch.uint8))
    assert index.tolist() == [0, 1, 2] and apart.max() < 1 / 255


def test_calibration_makes_a_boaster_modest() -> None:
    """Answers right four times in five, said with certainty: one temperature mends it and changes no answer."""
    rng = torch.Generator().manual_seed(0)
    judge = judging.Judge(judging.JudgeConfig(8)).eval()
    held_out = [scenes.sample_scene(i, "validation") for i in range(200)]
    truth = torch.tensor([judging.labels(s) for s in held_out])
    said = []
    for i, options in enumerate(judging.HEADS.values()):
        wrong = torch.rand(200, generator=rng) < 0.2
        off = torch.randint(1, len(options), (200,), generator=rng)
        answer = torch.where(wrong, (truth[:, i].clamp_min(0) + off) % len(options), truth[:, i].clamp_min(0))
        said.append(8.0 * torch.nn.functional.one_hot(answer, len(options)))
    fixed = torch.cat(said, 1)
    judge.features = lambda pictures: pictures.flatten(1)[:, : fixed.shape[1]]
    judge.heads = torch.nn.Linear(fixed.shape[1], fixed.shape[1])
    torch.nn.init.eye_(judge.heads.weight)
    torch.nn.init.zeros_(judge.heads.bias)
    pictures = torch.nn.functional.pad(fixed, (0, 3 * 64 * 64 - fixed.shape[1])).view(200, 3, 64, 64)
    before, said_before = judging.calibration_error(judge, pictures, held_out), judge.look(pictures)
    temperature = judging.calibrate(judge, pictures, held_out)
    assert before > 0.15 and temperature > 2
    assert judging.calibration_error(judge, pictures, held_out) < 0.06
    assert all(torch.equal(said_before[k].argmax(1), p.argmax(1)) for k, p in judge.look(pictures).items())


def test_the_whole_measurement_in_small(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(metrics, "DRAWN", 32)
    monkeypatch.setattr(metrics, "STEPS", (2, 3))
    found = metrics.judge_model("pocket", 6, steps=2, runs=tmp_path)
    assert found["prompts"]["all_right"]["asked"] == found["paraphrases"]["all_right"]["asked"] == 6
    assert found["composition"]["all_right"]["asked"] == 2
    assert set(found["fid"]) == {"drawn", "vae", "made"} and 0 <= found["nearest"]["made"]["least"] < 1


def test_the_grid_is_put_beside_the_scores(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(metrics, "STEPS", (2, 3))
    monkeypatch.setenv("LDM_LESSONS_DATA", str(tmp_path))
    (tmp_path / "judge").symlink_to(models.POCKET.parent / "judge")
    metrics.write_json(tmp_path / "pocket" / "scores.json", {"count": 7})
    metrics.main(["--grid", "2"])
    found = json.loads((tmp_path / "pocket" / "scores.json").read_text())
    assert found["count"] == 7 and len(found["grid"]) == 2 * (len(metrics.GUIDANCE) + len(samplers.SAMPLERS) - 1)
    assert {row["sampler"] for row in found["grid"]} == set(samplers.SAMPLERS)


def test_picture_k_has_seed_k() -> None:
    model = models.load("pocket")
    texts = ["a red house", "a lake at night", "a beach"]
    together, _ = metrics.make(model, texts, "test", steps=2, batch=2)
    alone = generate.text_to_image(model, texts[2], num_inference_steps=2, seed=2, progress=False)
    apart = (together[2:] - judging.pictures_to_tensor(alone)).abs().max()
    assert apart <= 1.01 / 255


def test_the_shipped_clip_finds_pictures_by_their_sentences() -> None:
    from ldm_lessons import data
    from ldm_lessons.text import tokenize

    clip, rows = models.load_clip(), data.preview().select(range(48))
    tokenizer = models.load("pocket").tokenizer
    shown = torch.nn.functional.avg_pool2d(judging.pictures_to_tensor(rows["image"]), 2) * 2 - 1
    with torch.inference_mode():
        logits = clip(tokenize(tokenizer, list(rows["text"])), shown)
    found = logits.argmax(0) == torch.arange(48)
    assert found.float().mean() > 0.9
