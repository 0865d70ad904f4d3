"""The figure helpers: pictures of every kind come through unchanged, and the map's words never touch each other."""

import io
import json

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from ldm_lessons import show

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (8, 12, 3), dtype=np.uint8)
SHAPES = {
    "picture": (1, 3, 128, 128),
    "encoded": (1, 4, 16, 16),
    "noise": (1, 4, 16, 16),
    "noisy": (2, 4, 16, 16),
    "prediction": (2, 4, 16, 16),
    "denoised": (1, 4, 16, 16),
    "decoded": (1, 3, 128, 128),
    "tokens": (1, 77),
    "condition": (2, 77, 128),
}


@pytest.mark.parametrize(
    "same",
    [
        PICTURE,
        Image.fromarray(PICTURE),
        PICTURE / 255,
        torch.tensor(PICTURE / 255).permute(2, 0, 1),
        torch.tensor(PICTURE).permute(2, 0, 1).float() / 255,
    ],
)
def test_every_kind_of_picture_is_the_same_picture(same):
    assert np.array_equal(show.as_array(same), PICTURE)


def test_a_jpeg_is_nearly_the_picture_and_smaller_than_a_png():
    noise = 0.5 + 0.1 * torch.randn(3, 96, 96, generator=torch.Generator().manual_seed(0))
    grain = torch.nn.functional.avg_pool2d(noise, 3, stride=1)
    stored = show.as_jpeg(grain)
    read = np.asarray(Image.open(io.BytesIO(stored.data))).astype(float)
    assert stored.format == "jpeg" and np.abs(read - show.as_array(grain)).mean() < 5
    assert len(stored.data) < 0.4 * len(show.png_bytes(grain))
    assert show.as_jpeg(show.image_row([grain])).data[:2] == b"\xff\xd8"


def test_grey_pictures_and_values_out_of_range():
    grey = show.as_array(np.array([[-1.0, 0.5], [2.0, np.nan]]))
    assert grey.shape == (2, 2, 3) and grey[..., 0].tolist() == [[0, 128], [255, 0]]
    assert show.as_array(torch.zeros(1, 4, 4)).shape == (4, 4, 3)


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 8, 8), np.zeros((4, 4, 5)), np.zeros(7)])
def test_what_is_not_a_picture_is_one_sentence(bad):
    with pytest.raises(ValueError, match="A picture has shape"):
        show.as_array(bad)


def test_png_bytes_can_be_read_back():
    again = np.asarray(Image.open(io.BytesIO(show.png_bytes(PICTURE, scale=3))))
    assert again.shape == (24, 36, 3) and np.array_equal(again[::3, ::3], PICTURE)


def test_rows_grids_and_strips_draw_every_image_and_caption():
    figures = [
        (show.image_row([PICTURE] * 3, ["one", "two", "three"], title="Three"), 3),
        (show.image_grid([PICTURE] * 7, [f"a caption of some length, number {i}" for i in range(7)], columns=3), 7),
        (show.film_strip([PICTURE] * 5, list("abcde")), 5),
        (show.film_strip([[PICTURE] * 4, [PICTURE] * 4], list("abcd"), labels=["latents", "decoded"]), 8),
    ]
    for figure, count in figures:
        assert isinstance(figure, Figure)
        assert sum(len(ax.images) for ax in figure.axes) == count
        _words_stay_apart(figure)


def test_wrong_numbers_of_captions_are_one_sentence():
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        show.image_row([PICTURE] * 2, ["one"])
    with pytest.raises(ValueError, match="as many frames"):
        show.film_strip([PICTURE] * 2, ["one"])
    with pytest.raises(ValueError, match="empty"):
        show.image_row([])


def test_latents_have_one_fixed_scale():
    z = torch.zeros(4, 2, 2)
    assert (show.latent_picture(z) == 127).all()
    z[0, 0, 0] = 3
    assert show.latent_picture(z[None])[0, 0].tolist() == [229, 127, 127]
    panels = show.latent_picture(z, panels=True)
    assert len(panels) == 4 and panels[0][0, 0] == 255 and panels[1].shape == (2, 2)
    with pytest.raises(ValueError, match="Latents of one picture"):
        show.latent_picture(torch.zeros(2, 4, 2, 2))


def _words_stay_apart(figure: Figure) -> None:
    """No two texts overlap, and none leaves the figure."""
    renderer = figure.canvas.get_renderer() if hasattr(figure.canvas, "get_renderer") else None
    texts = [t for t in [*figure.texts, *(t for ax in figure.axes for t in ax.texts)] if t.get_text().strip()]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
    frame = figure.bbox
    for i, (words, box) in enumerate(boxes):
        assert frame.x0 - 1 <= box.x0 and box.x1 <= frame.x1 + 1, f"{words!r} leaves the figure"
        assert frame.y0 - 1 <= box.y0 and box.y1 <= frame.y1 + 1, f"{words!r} leaves the figure"
        for others, other in boxes[i + 1 :]:
            assert not box.overlaps(other), f"{words!r} overlaps {others!r}"


@pytest.mark.parametrize("highlight", [None, "pixel", "latent", "conditioning", "vae", ["unet", "cross_attention"]])
def test_the_maps_words_stay_apart(highlight):
    prompt = "a red house on the left, snowy mountains, a green meadow at sunset, and rather more words than fit"
    figure = show.ldm_map(SHAPES, highlight, pictures={"decoded": PICTURE}, prompt=prompt, steps=20)
    _words_stay_apart(figure)


def test_the_map_prints_the_shapes_it_is_given():
    words = " ".join(t.get_text() for t in show.ldm_map({"denoised": torch.zeros(1, 4, 16, 16).shape}).axes[0].texts)
    assert "(1, 4, 16, 16)" in words and "(1, 77)" not in words


def test_a_highlight_fades_the_rest():
    def alpha(figure: Figure, word: str) -> float:
        return next(t.get_alpha() for t in figure.axes[0].texts if t.get_text().startswith(word))

    figure = show.ldm_map(highlight="latent")
    assert alpha(figure, "U-Net") == 1 and alpha(figure, "text encoder") < 0.5
    assert alpha(show.ldm_map(), "text encoder") == 1


def test_unknown_names_on_the_map_are_one_sentence():
    with pytest.raises(ValueError, match="no tensor called 'latent'"):
        show.ldm_map({"latent": (1,)})
    with pytest.raises(ValueError, match="no part called 'sky'"):
        show.ldm_map(highlight="sky")


def test_style_keeps_files_small():
    with matplotlib.rc_context():
        show.use_style()
        assert matplotlib.rcParams["image.interpolation"] == "nearest" and matplotlib.rcParams["figure.dpi"] <= 100


def test_the_lesson_table_reads_what_is_measured_and_says_what_is_planned(tmp_path):
    header = "# 04 · The VAE\n\nRun All takes <!-- measured -->about 2 minutes, 1.1 GB<!-- /measured -->."
    (tmp_path / "04_vae.ipynb").write_text(json.dumps({"cells": [{"source": header.splitlines(keepends=True)}]}))
    (tmp_path / "05_latent_diffusion.ipynb").write_text(json.dumps({"cells": [{"source": ["# No line"]}]}))
    rows = {row[:200].split("</td>")[0]: row for row in show.lesson_table(tmp_path).data.split("<tr>")[2:]}
    assert len(rows) == len(show.LESSONS) == 15
    vae = next(row for row in rows.values() if "04_vae.ipynb" in row)
    assert "about 2 minutes, 1.1 GB" in vae and 'href="04_vae.ipynb"' in vae
    assert "not measured yet" in next(row for row in rows.values() if "05_latent" in row)
    assert sum("planned" in row and "href" not in row for row in rows.values()) == 13


def test_every_label_has_a_colour_that_can_be_told_from_the_others() -> None:
    from itertools import combinations

    from ldm_lessons import scenes

    assert len(show.LABEL_COLOURS) == len(scenes.LABELS)
    apart = [np.abs(np.subtract(a, b)).max() for a, b in combinations(show.LABEL_COLOURS, 2)]
    assert min(apart) >= 15, "a painted map could be misread"


def test_a_figure_is_a_picture_too() -> None:
    figure = Figure(figsize=(2, 1), dpi=50, facecolor=(1, 0, 0))
    shown = show.as_array(figure)
    assert shown.shape == (50, 100, 3) and (shown == [255, 0, 0]).all()
    plot = figure.add_axes((0, 0, 1, 1))
    plot.imshow(np.zeros((2, 2, 3)), aspect="auto")
    assert (show.as_array(figure) == 0).mean() > 0.5
