"""Data sets: the world's, a local one, and what is said when one cannot be had."""

import json

import numpy as np
import pytest
from PIL import Image

from ldm_lessons import data, scenes


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_scenes_as_a_dataset() -> None:
    found = data.scene_dataset("validation", 6, 64, maps=True)
    assert set(found.column_names) == {"image", "text", "mentions", "seed", "scene", "map"}
    for i, row in enumerate(found):
        scene = scenes.sample_scene(i, "validation")
        assert scenes.Scene.from_dict(json.loads(row["scene"])) == scene
        assert row["text"] == scenes.caption(scene) and row["seed"] == scene.seed
        assert np.array_equal(np.asarray(row["image"]), np.asarray(scenes.draw(scene, 64)))
        assert np.array_equal(np.asarray(row["map"]), scenes.semantic_map(scene, 64))


def test_drawing_is_cached_and_parallel_drawing_is_the_same() -> None:
    first, again = data.scene_dataset("test", 8, 32), data.scene_dataset("test", 8, 32)
    assert first.cache_files == again.cache_files
    beside = data.scene_dataset("test", 8, 32, processes=2)
    assert beside["text"][:] == first["text"][:] and beside["seed"][:] == first["seed"][:]


def test_no_cache_outlives_the_code_that_drew_it(tmp_path, monkeypatch) -> None:
    before = data.scene_dataset("test", 2, 32), data.pictures(range(2), 32, tmp_path, processes=1)
    monkeypatch.setattr(data, "drawing_code", lambda: "another")
    assert data.scene_dataset("test", 2, 32).cache_files != before[0].cache_files
    data.pictures(range(2), 32, tmp_path, processes=1)
    assert len(list(tmp_path.glob("pictures-*.npy"))) == 2


def test_a_local_folder_takes_the_same_call(tmp_path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 0, 0)).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "words": f"picture {i}"}) for i in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    found = data.captioned_dataset(str(folder), text="words")
    assert sorted(found["text"]) == ["picture 0", "picture 1", "picture 2"]
    assert found[0]["image"].size == (16, 16)
    with pytest.raises(ValueError, match="has no column 'caption'; it has"):
        data.captioned_dataset(str(folder), text="caption")


def test_the_preview_is_there_and_fits_the_generator() -> None:
    found = data.preview()
    assert len(found) == 256
    for i in (0, 100, 255):
        scene = scenes.sample_scene(i, "validation")
        assert scenes.Scene.from_dict(json.loads(found[i]["scene"])) == scene
        shown, drawn = (np.asarray(p, float) for p in (found[i]["image"], scenes.draw(scene)))
        assert np.abs(shown - drawn).mean() < 2


def test_what_cannot_be_had_is_said_in_a_sentence(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="unknown split 'valid'"):
        data.scene_dataset("valid")
    with pytest.raises(ValueError, match="0 were asked for"):
        data.scene_dataset("test", 0)
    with pytest.raises(FileNotFoundError, match="there is no data set at './nowhere'"):
        data.captioned_dataset("./nowhere")
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="could not be fetched from the hub"):
        data.captioned_dataset("somebody/pictures")


def test_pictures_for_training_are_drawn_once(tmp_path) -> None:
    seeds = scenes.SPLITS["test"][:5]
    first = data.pictures(seeds, 32, tmp_path, processes=1)
    assert first.shape == (5, 3, 32, 32) and first.dtype == np.uint8
    assert np.array_equal(first[3], np.asarray(scenes.draw(scenes.sample_scene(seeds[3]), 32)).transpose(2, 0, 1))
    stamp = [p.stat().st_mtime_ns for p in tmp_path.iterdir()]
    data.pictures(seeds, 32, tmp_path)
    assert [p.stat().st_mtime_ns for p in tmp_path.iterdir()] == stamp
