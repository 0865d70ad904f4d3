"""A small illustrated world, drawn by code: `Scene`, `sample_scene`, `draw`, `caption`, `semantic_map`."""

from ldm_lessons.scenes.paint import LABELS, draw, semantic_map
from ldm_lessons.scenes.words import Caption, caption, caption_with_mentions, known_words
from ldm_lessons.scenes.world import SPLITS, STYLES, Object, Scene, held_out, sample_scene

__all__ = [
    "LABELS",
    "SPLITS",
    "STYLES",
    "Caption",
    "Object",
    "Scene",
    "caption",
    "caption_with_mentions",
    "draw",
    "held_out",
    "known_words",
    "sample_scene",
    "semantic_map",
]
