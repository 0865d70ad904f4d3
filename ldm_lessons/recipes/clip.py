"""The recipe for the tokenizer and the small CLIP."""

import argparse
import json

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
from ldm_lessons.scenes.world import COLOURS, HELD_OUT_KIND
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


def train_clip(plan: Plan, args: argparse.Namespace) -> None:
    """Tokenizer and small CLIP; its text tower becomes the pocket model's."""

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

    def loss(model: nn.Module, rows: Tensor, rng: torch.Generator, done: float) -> Tensor:
        shown = F.avg_pool2d(batch_of(source, rows, clip), 2) * 2 - 1
        ids = table[rows, torch.randint(WORDINGS, (len(rows),), generator=rng)].long().to(shown.device)
        ids = ids[:, : int((ids == tokenizer.eos_token_id).int().argmax(1).max()) + 1]  # the rest is padding
        logits = model(ids, shown)
        same = torch.arange(len(rows), device=shown.device)
        return (F.cross_entropy(logits.float(), same) + F.cross_entropy(logits.float().T, same)) / 2

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
        "zero-shot": zero_shot,
    }
