"""Captioned pictures as `datasets.Dataset`: the course's own scenes, or any data set with pictures and texts.

Columns everywhere: `image` (a `datasets.Image`), `text`. Scenes add `seed`, `mentions` (what the text says),
`scene` (the attributes) and, when asked for, `map` (the semantic map as a picture of label indices).
"""

import functools
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ldm_lessons import scenes

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image


@functools.cache
def drawing_code() -> str:
    """A short name for the code that makes the scenes, as it is now: caches bear it, so they never outlive the code."""
    files = sorted(Path(scenes.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def scene_rows(
    seeds: Sequence[int], size: int, wording: int = 0, maps: bool = False, code: str | None = None
) -> Iterator[dict]:
    """One row a scene; `wording` picks among its captions. `code` only tells one cache from another."""
    from PIL import Image

    for seed in seeds:
        scene = scenes.sample_scene(seed)
        words = scenes.caption_with_mentions(scene, wording)
        row = {"image": scenes.draw(scene, size), "text": words.text, "mentions": sorted(words.mentions)}
        row |= {"seed": seed, "scene": json.dumps(scene.to_dict())}
        if maps:
            row["map"] = Image.fromarray(scenes.semantic_map(scene, size))
        yield row


def scene_dataset(
    split: str = "train",
    count: int = 1000,
    size: int = 128,
    *,
    wording: int = 0,
    maps: bool = False,
    processes: int = 1,
) -> "Dataset":
    """The first `count` scenes of `split`, `size` × `size`; drawn once, then read from the `datasets` cache.

    `processes` draw side by side. ValueError for an unknown split or more scenes than it has.
    """
    import datasets

    if split not in scenes.SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(scenes.SPLITS)}")
    if not 1 <= count <= len(scenes.SPLITS[split]):
        raise ValueError(f"split {split!r} has 1 to {len(scenes.SPLITS[split])} scenes to give; {count} were asked for")
    columns = {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "mentions": datasets.List(datasets.Value("string")),
        "seed": datasets.Value("int64"),
        "scene": datasets.Value("string"),
    } | ({"map": datasets.Image()} if maps else {})
    return datasets.Dataset.from_generator(
        scene_rows,
        features=datasets.Features(columns),
        gen_kwargs={
            "seeds": list(scenes.SPLITS[split][:count]),
            "size": size,
            "wording": wording,
            "maps": maps,
            "code": drawing_code(),
        },
        num_proc=processes if processes > 1 else None,
    )


def captioned_dataset(source: str, split: str = "train", *, image: str = "image", text: str = "text") -> "Dataset":
    """Any captioned data set: a hub name, a local folder that `datasets` reads, or a .parquet file.

    The columns called `image` and `text` there are renamed to those names. One clear sentence when the source can't be
    reached (ConnectionError), isn't there (FileNotFoundError), or lacks a column (ValueError).
    """
    import datasets
    from huggingface_hub.errors import OfflineModeIsEnabled

    path = Path(source)
    try:
        if path.suffix == ".parquet" and path.exists():
            found = datasets.load_dataset("parquet", data_files=str(path), split="train")
        elif path.is_dir():
            found = datasets.load_dataset(str(path), split=split)
        elif path.suffix or source.startswith(("/", ".")):
            raise FileNotFoundError(f"there is no data set at {source!r}; give a folder, a .parquet file or a hub name")
        else:
            found = datasets.load_dataset(source, split=split)
    except (ConnectionError, OfflineModeIsEnabled, datasets.exceptions.DatasetNotFoundError) as error:
        raise ConnectionError(
            f"the data set {source!r} could not be fetched from the hub: connect to the network and check the name, or "
            "work offline with scene_dataset()"
        ) from error
    for wanted, name in (("image", image), ("text", text)):
        if name not in found.column_names:
            raise ValueError(f"{source!r} has no column {name!r}; it has {', '.join(found.column_names)}")
        if name != wanted:
            found = found.rename_column(name, wanted)
    return found


def preview() -> "Dataset":
    """The 256 pictures that come with the course, from `data/scenes/preview.parquet`: no drawing, no network."""
    from ldm_lessons.machine import data_dir

    return captioned_dataset(str(data_dir() / "scenes" / "preview.parquet"))


def write_preview(folder: Path, count: int = 256) -> Path:
    """Make `preview.parquet` in `folder`: the first `count` validation scenes at 128 × 128 with their maps."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "preview.parquet"
    rows = scene_dataset("validation", count, maps=True)
    rows.map(lambda row: {"image": _smaller(row["image"])}, features=rows.features).to_parquet(target)
    return target


def _smaller(picture: "Image.Image") -> dict:
    """The same pixels in a third less bytes than PNG has, as an `Image` feature takes them."""
    file = io.BytesIO()
    picture.save(file, "webp", lossless=True, quality=100, method=6)
    return {"bytes": file.getvalue(), "path": None}


def pictures(seeds: Sequence[int], size: int, folder: Path, processes: int | None = None) -> np.ndarray:
    """The scenes of `seeds` as one uint8 array (N, 3, size, size), kept in `folder` and mapped from there.

    Training reads pictures many times over in random order; an array on disk is the fastest way to do that.
    """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from tqdm.auto import tqdm

    target = folder / f"pictures-{drawing_code()}-{seeds[0]}-{len(seeds)}-{size}.npy"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f"{target.stem}.{os.getpid()}.part")
        out = np.lib.format.open_memmap(aside, "w+", np.uint8, (len(seeds), 3, size, size))
        parts = [(seeds[i : i + 256], size) for i in range(0, len(seeds), 256)]
        processes = processes or os.cpu_count()
        with (
            ProcessPoolExecutor(processes, get_context("spawn")) as pool,
            tqdm(total=len(seeds), desc="drawing") as bar,
        ):
            done = 0
            for part in pool.map(_draw_part, parts):
                out[done : done + len(part)] = part
                done += len(part)
                bar.update(len(part))
        out.flush()
        os.replace(aside, target)
    return np.load(target, mmap_mode="c")  # copy on write: torch wants arrays it may write to


def _draw_part(job: tuple[Sequence[int], int]) -> np.ndarray:
    seeds, size = job
    drawn = (scenes.draw(scenes.sample_scene(s), size) for s in seeds)
    return np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in drawn])
