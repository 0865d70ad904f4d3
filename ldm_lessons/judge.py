"""The judge: a small classifier of scenes that turns "does the picture obey its prompt" into a number.

Every attribute of the world is one head. For each kind of object there are three: its place (or "absent"), its colour
and its size; the last two only count where the object is there. Pictures are (B, 3, 128, 128) in [0, 1].
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_lessons.scenes.world import (
    BACKDROPS,
    COLOURED,
    COLOURS,
    GROUNDS,
    KINDS,
    PLACES,
    SIZES,
    STYLES,
    TIMES,
    WEATHERS,
    Scene,
)

HEADS: dict[str, tuple] = {
    "time": TIMES,
    "weather": WEATHERS,
    "ground": GROUNDS,
    "backdrop": BACKDROPS,
    "birds": (0, 1, 2, 3),
    "style": STYLES,
    **{kind: ("absent", *PLACES) for kind in KINDS},
    **{f"{kind}.colour": COLOURS for kind in KINDS if kind in COLOURED},
    **{f"{kind}.size": SIZES for kind in KINDS},
}
NOT_THERE = -100  # the label of a colour or size that has no object; cross_entropy skips it


def labels(scene: Scene) -> list[int]:
    """The right class of each head, in the order of `HEADS`; `NOT_THERE` where there is nothing to tell."""
    truth: dict[str, object] = {
        k: getattr(scene, k) for k in ("time", "weather", "ground", "backdrop", "birds", "style")
    }
    truth |= {kind: "absent" for kind in KINDS}
    for o in scene.objects:
        truth |= {o.kind: o.place, f"{o.kind}.colour": o.colour, f"{o.kind}.size": o.size}
    return [options.index(truth[n]) if truth.get(n) in options else NOT_THERE for n, options in HEADS.items()]


@dataclass(frozen=True)
class JudgeConfig:
    """How wide the judge is; read and written like a transformers configuration."""

    width: int = 32

    @classmethod
    def from_transformers(cls, config: Mapping[str, int]) -> "JudgeConfig":
        return cls(config["width"])

    def to_transformers(self) -> dict:
        return {"model_type": "scene_judge", "width": self.width}


class Judge(nn.Module):
    """A convolutional classifier: pictures (B, 3, 128, 128) in [0, 1] -> logits of all heads (B, sum of options)."""

    config_class = JudgeConfig

    def __init__(self, config: JudgeConfig | None = None):
        super().__init__()
        self.config = config or JudgeConfig()
        w = self.config.width
        self.stem = nn.Sequential(nn.Conv2d(3, w, 4, 4), nn.GroupNorm(4, w), nn.SiLU(), *_layer(w, w))  # 32 x 32
        self.body = nn.Sequential(
            _Residual(w), nn.Conv2d(w, 2 * w, 2, 2), _Residual(2 * w), _Residual(2 * w),  # 16 x 16
            nn.Conv2d(2 * w, 4 * w, 2, 2), _Residual(4 * w), _Residual(4 * w),  # 8 x 8
        )  # fmt: skip
        self.pool = nn.Sequential(nn.Conv2d(4 * w, 96, 1), nn.GroupNorm(4, 96), nn.SiLU())
        self.features_out = nn.Sequential(nn.Linear(96 * 64, 256), nn.SiLU())  # where a thing is matters: no averaging
        self.heads = nn.Linear(256 + 4 * w, sum(map(len, HEADS.values())))

    def features(self, pictures: Tensor) -> Tensor:
        """(B, 256 + 4 width): what the heads read, and what the FID compares."""
        if pictures.ndim != 4 or pictures.shape[1:] != (3, 128, 128):
            raise ValueError(f"the judge looks at pictures of shape (B, 3, 128, 128), not {tuple(pictures.shape)}")
        h = self.body(self.stem(pictures * 2 - 1))
        return torch.cat([self.features_out(self.pool(h).flatten(1)), h.mean((2, 3))], 1)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.heads(self.features(pictures))

    def loss(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Mean over the heads of cross-entropy, birds (small, and one head of many) five times; `truth` (B, heads)."""
        parts = logits.float().split([len(o) for o in HEADS.values()], 1)
        losses = [
            (5 if name == "birds" else 1) * F.cross_entropy(p, truth[:, i], ignore_index=NOT_THERE)
            for i, (name, p) in enumerate(zip(HEADS, parts, strict=True))
            if (truth[:, i] >= 0).any()
        ]
        return torch.stack(losses).mean()

    @torch.inference_mode()
    def look(self, pictures: Tensor, batch: int = 64) -> dict[str, Tensor]:
        """Probabilities of every head's options, each (N, options)."""
        where = next(self.parameters())
        logits = torch.cat([self(p.to(where.device, where.dtype)).float().cpu() for p in pictures.split(batch)])
        parts = logits.split([len(o) for o in HEADS.values()], 1)
        return {name: part.softmax(1) for name, part in zip(HEADS, parts, strict=True)}

    @classmethod
    def load(cls, folder: Path | None = None) -> "Judge":
        """The trained judge from `folder` (by default the one that comes with the course)."""
        from ldm_lessons.machine import data_dir
        from ldm_lessons.weights import load_model

        return load_model(cls, None, folder or data_dir() / "judge")


def _layer(c_in: int, c_out: int) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, 3, padding=1), nn.GroupNorm(8, c_out), nn.SiLU()]


class _Residual(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.layers = nn.Sequential(*_layer(c, c), nn.Conv2d(c, c, 3, padding=1), nn.GroupNorm(8, c))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.layers(x))


def calibrate(judge: Judge, pictures: Tensor, scenes: Sequence[Scene]) -> float:
    """Divide the logits by the one temperature that makes the probabilities of `scenes` likeliest (arXiv:1706.04599).

    No answer changes, only how sure it is. Returns the temperature, which is from then on part of the weights.
    """
    truth = torch.tensor([labels(s) for s in scenes])
    with torch.no_grad():
        logits = torch.cat([judge(p).float() for p in pictures.split(64)]).split([len(o) for o in HEADS.values()], 1)

    def surprise(temperature: float) -> float:
        parts = [F.cross_entropy(x / temperature, truth[:, i], ignore_index=NOT_THERE) for i, x in enumerate(logits)]
        return torch.stack([p for p in parts if p.isfinite()]).mean().item()

    best = min((2 ** (k / 16) for k in range(-48, 49)), key=surprise)
    with torch.no_grad():
        judge.heads.weight /= best
        judge.heads.bias /= best
    return best


def calibration_error(judge: Judge, pictures: Tensor, scenes: Sequence[Scene], bins: int = 15) -> float:
    """Expected calibration error over all heads: how far sureness is from being right (arXiv:1706.04599 eq. (3))."""
    truth = torch.tensor([labels(s) for s in scenes])
    sure, right = [], []
    for i, p in enumerate(judge.look(pictures).values()):
        told = truth[:, i] >= 0
        sure.append(p.max(1).values[told])
        right.append((p.argmax(1) == truth[:, i])[told].float())
    s, r = torch.cat(sure), torch.cat(right)
    where = (s * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins).index_add(0, where, r - s)
    return (gaps.abs().sum() / len(s)).item()


def pictures_to_tensor(pictures: Iterable) -> Tensor:
    """PIL pictures or uint8 arrays (H, W, 3) -> (N, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 255


@dataclass
class Score:
    """How often pictures showed what was asked: `counts[name]` is (right, asked)."""

    counts: dict[str, tuple[int, int]]
    all_right: tuple[int, int]

    def accuracy(self, name: str) -> float:
        right, asked = self.counts[name]
        return right / asked if asked else float("nan")

    def to_dict(self) -> dict:
        rows = {n: {"right": r, "asked": a, "accuracy": round(r / a, 4)} for n, (r, a) in self.counts.items() if a}
        right, asked = self.all_right
        return {"attributes": rows, "all_right": {"right": right, "asked": asked, "accuracy": round(right / asked, 4)}}


GROUPS = ("time", "weather", "ground", "backdrop", "birds", "style", "object", "place", "colour", "size")


def score(
    judge: Judge, pictures: Tensor, scenes: Sequence[Scene], mentions: Sequence[Iterable[str]] | None = None
) -> Score:
    """Hold each picture to its scene, in what its caption mentions (everything, where `mentions` is None).

    An object asked for counts as right when the judge sees its kind anywhere; place, colour and size have their own
    counts.
    """
    seen = {name: p.argmax(1) for name, p in judge.look(pictures).items()}
    counts = {group: [0, 0] for group in GROUPS}
    whole = 0
    for i, scene in enumerate(scenes):
        truth = dict(zip(HEADS, labels(scene), strict=True))
        asked = set(mentions[i]) if mentions is not None else {n for n, label in truth.items() if label >= 0}
        fine = True
        for name in asked:
            kind, _, part = name.partition(".")
            if kind in KINDS and not part:
                checks = [("object", (int(seen[kind][i]) > 0) == (truth[kind] > 0))]
                if mentions is None:
                    checks += [("place", int(seen[kind][i]) == truth[kind])] * (truth[kind] > 0)
            elif part == "place":
                checks = [("place", int(seen[kind][i]) == truth[kind])]
            else:
                checks = [(part or name, int(seen[name][i]) == truth[name])]
            for group, right in checks:
                counts[group][0] += right
                counts[group][1] += 1
                fine &= right
        whole += fine
    return Score({k: (r, a) for k, (r, a) in counts.items()}, (whole, len(scenes)))
