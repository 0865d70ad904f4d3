"""The recipes for the tokenizer with the text tower, and for the rest of the small CLIP."""

import argparse
import json
from dataclasses import replace

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from ldm_lessons import cards, checkpoints, models, scenes
from ldm_lessons.clip import CLIP, VisionConfig
from ldm_lessons.judge import Judge
from ldm_lessons.machine import data_dir
from ldm_lessons.metrics import write_json
from ldm_lessons.recipes.common import (
    WORDINGS,
    batch_of,
    captions,
    drive,
    seen_by_judge,
    token_table,
    training_pictures,
    usual_and_spread,
    validation,
)
from ldm_lessons.scenes import words
from ldm_lessons.scenes.world import COLOURS, HELD_OUT_KIND, PLACES, TIMES, Dice
from ldm_lessons.text import TextConfig, tokenize
from ldm_lessons.training import Plan
from ldm_lessons.weights import save_changes, save_model


def train_tokenizer(captions: list[str], size: int = 400) -> PreTrainedTokenizerBase:
    """A `CLIPTokenizer` whose `size` merges were learnt on `captions` (byte-pair encoding, arXiv:1508.07909)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pattern = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[]).backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = pattern.normalizer, pattern.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size + 512, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *dict.fromkeys("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def altered(scene: scenes.Scene, dice: Dice) -> tuple[str, scenes.Scene]:
    """What was changed, and the scene with that one thing changed: a place, size, colour or count, or two swapped."""
    things, options = scene.objects, [("birds", 0)] * (scene.birds > 0)
    for i, o in enumerate(things):
        options += [("place", i)] + [("size", i)] * (o.size != "medium") + [("colour", i)] * (o.colour is not None)
    if len(things) == 2 and all(o.colour for o in things) and things[0].colour != things[1].colour:
        options.append(("colour", -1))
    what, i = dice.choice(options or [("time", 0)])

    def other(values: tuple, now: object) -> object:
        return dice.choice([v for v in values if v != now])

    if what == "birds":
        return what, replace(scene, birds=other((1, 2, 3), scene.birds))
    if what == "time":
        return what, replace(scene, time=other(TIMES, scene.time))
    if i < 0:
        a, b = things
        return what, replace(scene, objects=(replace(a, colour=b.colour), replace(b, colour=a.colour)))
    values = {"place": PLACES, "size": ("small", "large"), "colour": COLOURS}[what]
    changed = replace(things[i], **{what: other(values, getattr(things[i], what))})
    return what, replace(scene, objects=(*things[:i], changed, *things[i + 1 :]))


def wrong_caption(scene: scenes.Scene, wording: int, tries: int = 8) -> tuple[str, str]:
    """What was changed, and a caption with the same words but for that; ("", the right caption) where it tells nothing.

    Combinations that are held out of training are not among them: they would be learnt as never being right.
    """
    right, dice = scenes.caption(scene, wording), Dice("altered", scene.seed, wording)
    for _ in range(tries):
        what, changed = altered(scene, dice)
        if scenes.caption(changed, wording) != right and not scenes.held_out(changed):
            return what, scenes.caption(changed, wording)
    return "", right


class Taught(nn.Module):
    """CLIP's text half beside a head that reads what the judge's layers see, in the place of the picture half."""

    def __init__(self, clip: CLIP, seen: Tensor):
        super().__init__()
        self.text_model, self.text_projection = clip.text_model, clip.text_projection
        self.logit_scale = clip.logit_scale
        usual, spread = usual_and_spread(seen)
        self.register_buffer("usual", usual)
        self.register_buffer("spread", spread)
        inner, places = 64, seen[0, 0].numel()
        self.head = nn.Sequential(
            nn.Conv2d(seen.shape[1], inner, 1), nn.SiLU(), nn.Flatten(), nn.Linear(inner * places, 256), nn.SiLU(),
            nn.Linear(256, clip.text_projection.out_features),
        )  # fmt: skip

    def pictures(self, seen: Tensor) -> Tensor:
        """The judge's layers (B, C, 8, 8) -> unit vectors in the shared space (B, projection_dim)."""
        return F.normalize(self.head((seen.float() - self.usual) / self.spread).float(), dim=1)

    def forward(self, input_ids: Tensor, seen: Tensor) -> Tensor:
        """Cosine of every picture with every text, times the learnt scale: (B pictures, B texts)."""
        text = self.text_projection(self.text_model.pooled(self.text_model(input_ids), input_ids))
        return self.logit_scale.exp() * self.pictures(seen) @ F.normalize(text.float(), dim=1).T


class Captions:
    """Captions of the training scenes as tokens, and for each one with a single word changed (arXiv:2210.01936).

    Beside the other captions of the batch each picture has to tell its own from the changed one: the others alone can
    mostly be told from it without reading left and right.
    """

    def __init__(self, plan: Plan, tokenizer: PreTrainedTokenizerBase, texts: list[list[str]]):
        train = [scenes.sample_scene(s) for s in scenes.SPLITS["train"][: plan.rows]]
        self.right, self.end = token_table(tokenizer, texts), tokenizer.eos_token_id
        self.wrong = token_table(tokenizer, [[wrong_caption(s, w)[1] for w in range(WORDINGS)] for s in train])

    def draw(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        """One right caption of each row, then as many wrong ones: (2B, L), without the padding that all have."""
        wording = torch.randint(WORDINGS, (len(rows),), generator=rng)
        ids = torch.cat([self.right[rows, wording], self.wrong[rows, wording]]).long()
        return ids[:, : int((ids == self.end).int().argmax(1).max()) + 1]


def contrast(logits: Tensor, ids: Tensor) -> Tensor:
    """CLIP's loss (arXiv:2103.00020 figure 3) of logits (B, 2B) for `Captions.draw`'s texts `ids` (2B, L)."""
    n = len(logits)
    same = torch.arange(n, device=logits.device)
    no_change = F.pad(torch.diag((ids[:n] == ids[n:]).all(1)), (n, 0)).to(logits.device)
    of_pictures = F.cross_entropy(logits.float().masked_fill(no_change, -torch.inf), same)
    return (of_pictures + F.cross_entropy(logits[:, :n].float().T, same)) / 2


def train_text(plan: Plan, args: argparse.Namespace) -> None:
    """Tokenizer and text tower of the pocket model, the latter also in a CLIP whose picture tower is yet to be trained.

    The text tower learns beside what the judge's layers see (like arXiv:2111.07991, which locks the picture half).
    Trained together from nothing, the halves of so small a CLIP had not agreed on places and counts after 2,400 steps.
    """
    source, texts = training_pictures(plan, args.runs), captions(plan)
    pocket = data_dir() / "pocket"
    tokenizer = train_tokenizer([t for row in texts[:5000] for t in row])
    tokenizer.save_pretrained(pocket / "tokenizer")
    write_json(pocket / "tokenizer" / "known_words.json", {"words": scenes.known_words()})
    ends = dict(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    text = TextConfig.pocket(len(tokenizer), **ends)
    clip = CLIP(text, VisionConfig.pocket(), text.projection_dim)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with PartialState(cpu=device.type == "cpu").main_process_first():
        seen = seen_by_judge(source, args.runs / "unet", device)
    said, taught = Captions(plan, tokenizer, texts), Taught(clip, seen)

    def loss(model: nn.Module, rows: Tensor, rng: torch.Generator, done: float) -> Tensor:
        ids = said.draw(rows, rng).to(device)
        return contrast(model(ids, seen[rows].to(device)), ids)

    facts = drive("text", taught, loss, plan, args)
    taught.load_state_dict(checkpoints.ema_weights(args.runs / "text"))
    taught.eval()
    held_out, shown = validation(min(1000, plan.rows), args.runs)
    judge = Judge.load().float().eval()
    with torch.inference_mode():
        views = torch.cat([taught.pictures(judge.body(judge.stem(x * 2 - 1))) for x in shown.split(100)])
    facts["validation"] = look_up(clip, tokenizer, held_out, views)
    facts["parameters"] = sum(p.numel() for p in clip.text_model.parameters())
    save_model(clip.text_model, pocket / "text_encoder")
    save_changes(clip, data_dir() / "clip", text_of(clip))
    cards.record("text", facts)
    print(facts["validation"])


def text_of(clip: CLIP) -> dict[str, Tensor]:
    """The tensors of its text tower, which are kept with the pocket model and not a second time."""
    return {k: v for k, v in clip.state_dict().items() if k.startswith("text_model.")}


def train_clip(plan: Plan, args: argparse.Namespace) -> None:
    """The picture tower of the small CLIP, beside the text tower that is there (`train_text`), which stays as it is."""
    source, texts = training_pictures(plan, args.runs), captions(plan)
    tokenizer = CLIPTokenizer.from_pretrained(data_dir() / "pocket" / "tokenizer")
    there = models.load_clip()
    clip = CLIP.from_config(there.config).to(memory_format=torch.channels_last)
    clip.text_model, clip.text_projection = (p.requires_grad_(False) for p in (there.text_model, there.text_projection))
    said = Captions(plan, tokenizer, texts)

    def loss(model: nn.Module, rows: Tensor, rng: torch.Generator, done: float) -> Tensor:
        shown = F.avg_pool2d(batch_of(source, rows, clip), 2) * 2 - 1
        ids = said.draw(rows, rng).to(shown.device)
        return contrast(model(ids, shown), ids)

    facts = drive("clip", clip, loss, plan, args)
    clip.load_state_dict(checkpoints.ema_weights(args.runs / "clip"))
    clip.eval()
    held_out, shown = validation(min(1000, plan.rows), args.runs)
    with torch.inference_mode():
        views = torch.cat([clip.image_features(F.avg_pool2d(x, 2) * 2 - 1) for x in shown.split(100)])
    facts["validation"] = look_up(clip, tokenizer, held_out, F.normalize(views, dim=1))
    save_changes(clip, data_dir() / "clip", text_of(clip))
    cards.record("clip", facts)
    print(facts["validation"])


def look_up(clip: CLIP, tokenizer: PreTrainedTokenizerBase, held_out: list[scenes.Scene], images: Tensor) -> dict:
    """How well sentences find unseen pictures, other wordings of themselves, and the words for what a picture shows.

    `images` are the pictures of `held_out` as unit vectors in the shared space (N, projection_dim).

    "zero-shot" chooses among sentences that name one attribute and nothing else, each in all its wordings, as
    arXiv:2103.00020 section 3.1.4 does; "chance" is what guessing would give.
    """

    @torch.inference_mode()
    def texts(sentences: list[str]) -> Tensor:
        return F.normalize(clip.text_features(tokenize(tokenizer, sentences)), dim=1)

    one, other = (texts([scenes.caption(s, w) for s in held_out]) for w in (WORDINGS, WORDINGS + 1))  # neither was read
    same = torch.arange(len(held_out))[:, None]
    hit = (one @ images.T).topk(min(5, len(held_out)), 1).indices == same
    found = {"recall@1": hit[:, 0], "recall@5": hit.any(1)}
    found["paraphrase recall@1"] = (one @ other.T).argmax(1, keepdim=True) == same

    def choose(rows: list[int], right: list[str], options: dict[str, list[str]]) -> dict:
        said = torch.stack([F.normalize(texts(sentences).mean(0), dim=0) for sentences in options.values()])
        chosen = (images[rows] @ said.T).argmax(1).tolist()
        hits = sum(list(options)[k] == name for k, name in zip(chosen, right, strict=True))
        return {"accuracy": round(hits / max(len(rows), 1), 4), "asked": len(rows), "chance": round(1 / len(said), 3)}

    noticed: dict[str, list[bool]] = {}
    told = [wrong_caption(s, WORDINGS) for s in held_out]
    alike, unlike = (one * images).sum(1), (texts([t for _, t in told]) * images).sum(1)
    for (what, _), right in zip(told, (alike > unlike).tolist(), strict=True):
        noticed.setdefault(what, []).append(right)
    noticed.pop("", None)
    zero_shot = {}
    tables = {"time": words.TIME_WORDS, "weather": words.WEATHER_WORDS, "ground": words.GROUND_WORDS}
    for name, table in (tables | {"backdrop": words.BACKDROP_WORDS}).items():
        rows = [i for i, s in enumerate(held_out) if getattr(s, name) in table]
        options = {value: [f"a landscape {w}" for w in said] for value, said in table.items()}
        zero_shot[name] = choose(rows, [getattr(held_out[i], name) for i in rows], options)
    alone = [i for i, s in enumerate(held_out) if len(s.objects) == 1]
    kinds = {k: [f"a {w}" for w in said] for k, said in words.KIND_WORDS.items() if k != HELD_OUT_KIND}
    zero_shot["object"] = choose(alone, [held_out[i].objects[0].kind for i in alone], kinds)
    coloured = [i for i in alone if held_out[i].objects[0].colour in COLOURS]
    colours = {c: [f"a {c} {w}" for said in words.KIND_WORDS.values() for w in said] for c in COLOURS}
    zero_shot["colour"] = choose(coloured, [held_out[i].objects[0].colour for i in coloured], colours)
    return {k: round(v.float().mean().item(), 4) for k, v in found.items()} | {
        "scenes": len(held_out),
        "one word changed": {
            k: {"accuracy": round(sum(v) / len(v), 4), "asked": len(v), "chance": 0.5} for k, v in noticed.items()
        },
        "zero-shot": zero_shot,
    }
