"""Models on the Hugging Face hub: where real Stable Diffusion's weights lie, and how they are fetched.

python -m ldm_lessons.hub sd15 sd15-inpaint    fetches them into the hub's own cache, before a class, say

Fetched are safetensors, JSON and the tokenizer's text files: nothing that can run code. What broke off goes on.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A model on the hub: its mirrors, each with a pinned revision, in the order in which they are asked."""

    mirrors: tuple[tuple[str, str], ...]
    parameters: int  # of U-Net, VAE and text encoder together
    gigabytes: float  # to fetch, in half precision
    licence: str


_RAIL = "CreativeML Open RAIL-M: free to use and pass on, also for profit, but not for the harmful ends that it lists"
SOURCES = {  # copies: the organisation that published them deleted its own in 2024
    "sd15": Source(
        (
            ("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"),
            ("sd-legacy/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"),
        ),
        1_066_235_307,
        2.13,
        _RAIL,
    ),
    "sd15-inpaint": Source(
        (
            ("stable-diffusion-v1-5/stable-diffusion-inpainting", "8a4288a76071f7280aedbdb3253bdb9e9d5d84bb"),
            ("benjamin-paine/stable-diffusion-v1-5-inpainting", "705090e310335d0cf1586d032130fa9f09a6fa00"),
        ),
        1_066_249_707,
        2.13,
        _RAIL,
    ),
}
WORDS = (
    "model_index.json", "scheduler/scheduler_config.json", "tokenizer/*.json", "tokenizer/*.txt", "known_words.json",
    "unet/config.json", "vae/config.json", "text_encoder/config.json",
)  # fmt: skip
WEIGHTS = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
_INSTEAD = "or take the pocket model, load('pocket'), which needs no network."


def fetch(name: str, revision: str | None = None) -> Path:
    """The folder of a model of `SOURCES`, or of the hub's "org/name", fetched unless it is in the hub's cache already.

    Half-precision weights are taken where there are any. Raises RuntimeError, in one sentence, where it cannot be had,
    and OSError for a disk that is too full.
    """
    if name not in SOURCES:
        return _fetched(name, revision)
    _enough_disk(name, SOURCES[name])
    return _from_mirrors(name, revision)


def words(name: str) -> Path:
    """A folder with the tokenizer and all settings of a model of `SOURCES`, a megabyte or two; errors as `fetch`."""
    return _from_mirrors(name, None, weights=False)


def _from_mirrors(name: str, revision: str | None, weights: bool = True) -> Path:
    source, problems = SOURCES[name], {}
    for mirror, pinned in source.mirrors:
        try:
            return _fetched(mirror, revision or pinned, weights)
        except _NotFetchedError as error:
            problems[mirror] = error.kind
    raise RuntimeError(
        f"{name} cannot be fetched from {' or '.join(problems)} ({', '.join(dict.fromkeys(problems.values()))}): check "
        f"the network, or run `python -m ldm_lessons.hub {name}` ({source.gigabytes} GB) where there is one, {_INSTEAD}"
    )


class _NotFetchedError(RuntimeError):
    kind: str


def _fetched(name: str, revision: str | None, weights: bool = True) -> Path:
    from huggingface_hub import errors, snapshot_download

    none = f"there is no folder {name!r} here, and"
    try:
        for suffix in (".fp16.safetensors", ".safetensors"):
            files = [*WORDS, *(part + suffix for part in WEIGHTS if weights)]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=files))
            if not weights or all(any(folder.glob(f"{part}*.safetensors")) for part in WEIGHTS):
                break  # else it has none in half precision
        return folder
    except errors.GatedRepoError as error:
        problem, kind = f"the model {name} asks for your consent: give it on its page, log in,", type(error).__name__
    except errors.RepositoryNotFoundError as error:
        problem, kind = f"{none} the hub has no public model of that name: check its spelling,", type(error).__name__
    except errors.RevisionNotFoundError as error:
        problem, kind = f"the model {name} has no revision {revision!r}: leave `revision` out,", type(error).__name__
    except Exception as error:  # many libraries lie below: a reader needs one sentence, not their tracebacks
        problem, kind = (
            f"{none} the hub does not answer ({type(error).__name__}): check the network,",
            type(error).__name__,
        )
    found = _NotFetchedError(f"{problem} {_INSTEAD}")
    found.kind = kind
    raise found


def _enough_disk(name: str, source: Source) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    there = next(p for p in (cache, *cache.parents) if p.is_dir())
    here = any((cache / f"models--{mirror.replace('/', '--')}").is_dir() for mirror, _ in source.mirrors)
    free = shutil.disk_usage(there).free / 1e9
    if not here and free < source.gigabytes:
        raise OSError(
            f"{name} needs {source.gigabytes} GB of disk, but {there} has {free:.1f} GB left: free some space, or set "
            "HF_HOME to a folder on a larger disk."
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ldm_lessons.hub", description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="+", choices=SOURCES, help="what to fetch")
    for name in parser.parse_args(arguments).names:
        print(f"{name}: {SOURCES[name].gigabytes} GB; licence {SOURCES[name].licence}")
        try:
            print(f"{name} is in {fetch(name)}")
        except (OSError, RuntimeError) as error:
            raise SystemExit(f"hub: {error}") from error


if __name__ == "__main__":
    main()
