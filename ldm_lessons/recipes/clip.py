"""The recipe for the tokenizer and the small CLIP."""

import argparse
import json
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ldm_lessons import cards, checkpoints, scenes
from ldm_lessons.clip import CLIP, VisionConfig
from ldm_lessons.machine import data_dir
from ldm_lessons.metrics import write_json
from ldm_lessons.recipes.common import WORDINGS, batch_of, captions, drive, token_table, training_pictures, validation
from ldm_lessons.scenes import words
from ldm_lessons.scenes.world import COLOURS, HELD_OUT_KIND, PLACES, TIMES, Dice
from ldm_lessons.text import TextConfig, tokenize
from ldm_lessons.training import Plan
from ldm_lessons.weights import save_model


def train_tokenizer(captions: list[str], size: int = 400) -> PreTrainedTokenizerBase:
    """A `CLIPTokenizer` whose `size` merges were learnt on `captions` (byte-pair encoding, arXiv:1508.07909)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

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


def train_clip(plan: Plan, args: argparse.Namespace) -> None:
    """Tokenizer and small CLIP; its text tower becomes the pocket model's.

    Beside the other captions of the batch each picture has to tell its own from one with a single word changed
    (arXiv:2210.01936): by the others alone, a text tower never learns left from right.
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
    clip = CLIP(text, VisionConfig.pocket(), text.projection_dim).to(memory_format=torch.channels_last)
    table = token_table(tokenizer, texts)
    train = [scenes.sample_scene(s) for s in scenes.SPLITS["train"][: plan.rows]]
    wrong = token_table(tokenizer, [[wrong_caption(s, w)[1] for w in range(WORDINGS)] for s in train])

    def loss(model: nn.Module, rows: Tensor, rng: torch.Generator, done: float) -> Tensor:
        shown = F.avg_pool2d(batch_of(source, rows, clip), 2) * 2 - 1
        wording, n = torch.randint(WORDINGS, (len(rows),), generator=rng), len(rows)
        ids = torch.cat([table[rows, wording], wrong[rows, wording]]).long().to(shown.device)
        ids = ids[:, : int((ids == tokenizer.eos_token_id).int().argmax(1).max()) + 1]  # the rest is padding
        logits = model(ids, shown).float()  # (B, 2B): each picture has one right caption, and one that is nearly right
        told_nothing = F.pad(torch.diag((ids[:n] == ids[n:]).all(1)), (n, 0))
        same = torch.arange(n, device=shown.device)
        of_pictures = F.cross_entropy(logits.masked_fill(told_nothing, -torch.inf), same)
        return (of_pictures + F.cross_entropy(logits[:, :n].T, same)) / 2

    facts = drive("clip", clip, loss, plan, args)
    clip.load_state_dict(checkpoints.ema_weights(args.runs / "clip"))
    clip.eval()
    held_out, shown = validation(min(1000, plan.rows), args.runs)
    facts["validation"] = look_up(clip, tokenizer, held_out, shown)
    save_model(clip, data_dir() / "clip")
    save_model(clip.text_model, pocket / "text_encoder")
    cards.record("clip", facts)
    print(facts["validation"])


def look_up(clip: nn.Module, tokenizer: PreTrainedTokenizerBase, held_out: list[scenes.Scene], shown: Tensor) -> dict:
    """How well sentences find unseen pictures, other wordings of themselves, and the words for what a picture shows.

    "zero-shot" chooses among sentences that name one attribute and nothing else, each in all its wordings, as
    arXiv:2103.00020 section 3.1.4 does; "chance" is what guessing would give.
    """

    @torch.inference_mode()
    def texts(sentences: list[str]) -> Tensor:
        return F.normalize(clip.text_features(tokenize(tokenizer, sentences)), dim=1)

    with torch.inference_mode():
        images = F.normalize(
            torch.cat([clip.image_features(F.avg_pool2d(x, 2) * 2 - 1) for x in shown.split(100)]), dim=1
        )
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
