"""Pictures for the notebooks: the course's colours, rows and grids of images, film strips, the map of latent diffusion.

    images   PIL images, figures, arrays (H,W,3) or (H,W), tensors (3,H,W) or (1,H,W); in [0,1], or 0..255 if uint8
    latents  tensors (4,h,w) or (1,4,h,w), about unit variance

Functions return a matplotlib figure that is already closed: end a cell with the call and it is shown once.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import HTML
from IPython.display import Image as Photo
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from PIL import Image

PIXEL, LATENT, CONDITIONING = "#E07B39", "#3B75AF", "#4E9F5B"  # the same colour for the same thing, all course long
INK, GREY = "#2B2F36", "#7A808A"


LABEL_COLOURS = (  # of the entries of `scenes.LABELS`, where a semantic map is shown or painted
    (135, 190, 240), (235, 240, 248), (255, 225, 90), (130, 130, 150), (90, 150, 90), (180, 90, 60), (90, 90, 110),
    (110, 190, 70), (235, 210, 140), (250, 250, 255), (40, 90, 190),
    (220, 40, 40), (150, 80, 20), (240, 60, 200), (20, 90, 50), (60, 160, 130), (250, 130, 20), (150, 40, 160),
    (110, 60, 90), (255, 150, 160), (20, 20, 30),
)  # fmt: skip


def use_style() -> None:
    """Readable defaults for every figure of a lesson; small files (sharp pixels compress better than smoothed ones)."""
    plt.rcParams.update(
        {
            "figure.dpi": 80,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "image.interpolation": "nearest",
            "image.cmap": "gray",
            "font.size": 11,
            "axes.titlesize": 12,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "axes.prop_cycle": plt.cycler(color=[LATENT, PIXEL, CONDITIONING, "#8C5FA8", GREY, "#C4473F"]),
        }
    )


def as_array(image: Any) -> np.ndarray:
    """Any picture as uint8 (H,W,3). Raises ValueError for what is not a picture."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if isinstance(image, Figure):
        canvas = FigureCanvasAgg(image)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3]
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().float().numpy()
        if image.ndim == 3 and image.shape[0] in (1, 3):
            image = image.transpose(1, 2, 0)
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(
            f"A picture has shape (H,W), (H,W,3) or, as a tensor, (3,H,W); this one has {tuple(image.shape)}. "
            "Pick one picture of a batch with batch[0]."
        )
    if image.dtype != np.uint8:
        image = (255 * np.clip(np.nan_to_num(image.astype(np.float64)), 0, 1)).round().astype(np.uint8)
    return np.broadcast_to(image, (*image.shape[:2], 3))


def png_bytes(image: Any, scale: int = 1) -> bytes:
    """A picture as the bytes of a PNG file, each pixel drawn as a `scale` x `scale` square."""
    picture = Image.fromarray(np.ascontiguousarray(as_array(image)))
    if scale > 1:
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def as_jpeg(picture: Any, quality: int = 80) -> Photo:
    """A picture or figure to end a cell with, stored as a JPEG: what has grain takes a fraction of a PNG's bytes."""
    buffer = io.BytesIO()
    array = np.ascontiguousarray(as_array(picture))
    Image.fromarray(array).save(buffer, format="JPEG", quality=quality, subsampling=0, optimize=True)
    return Photo(data=buffer.getvalue(), format="jpeg")


def image_row(
    images: Sequence[Any], captions: Sequence[str] | None = None, title: str | None = None, width: float = 1.6
) -> Figure:
    """Images side by side, each `width` inches wide with its caption below."""
    return image_grid(images, captions, columns=max(1, len(images)), title=title, width=width)


def image_grid(
    images: Sequence[Any],
    captions: Sequence[str] | None = None,
    columns: int = 6,
    title: str | None = None,
    width: float = 1.6,
) -> Figure:
    """Images in rows of `columns`, each with its caption (wrapped to its width) below."""
    if not len(images):
        raise ValueError("There is no image to show: the list is empty.")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"There are {len(images)} images but {len(captions)} captions: give each image one.")
    arrays = [as_array(image) for image in images]
    columns = min(columns, len(arrays))
    rows = -(-len(arrays) // columns)
    wrapped = [_wrap(c, int(width * 12.5)) for c in captions] if captions is not None else [""] * len(arrays)
    tall = width * max(a.shape[0] / a.shape[1] for a in arrays)
    text = _snap(0.155 * max(w.count("\n") + 1 if w else 0 for w in wrapped) + 0.1)  # inches for the captions
    head, gap = 0.35 if title else 0.0, 0.1
    size = (columns * (width + gap), rows * (tall + text) + head)
    fig = plt.figure(figsize=size)
    for i, (array, caption) in enumerate(zip(arrays, wrapped, strict=True)):
        row, column = divmod(i, columns)
        left, bottom = column * (width + gap) + gap / 2, size[1] - head - row * (tall + text) - tall
        ax = fig.add_axes((left / size[0], bottom / size[1], width / size[0], tall / size[1]))
        ax.imshow(_at_most(array, width))
        ax.axis("off")
        ax.text(0.5, -0.05 / tall, caption, transform=ax.transAxes, ha="center", va="top", fontsize=9, color=INK)
    if title:
        fig.text(0.5, 1 - 0.06 / size[1], title, ha="center", va="top", fontsize=12, color=INK)
    return _done(fig)


def film_strip(
    frames: Sequence[Any] | Sequence[Sequence[Any]],
    captions: Sequence[str],
    labels: Sequence[str] | None = None,
    width: float = 1.2,
) -> Figure:
    """Frames as a strip of film, in the order of time; several strips above each other if `frames` is a list of lists.

    `captions` stand under the frames, `labels` (one a strip) at their left.
    """
    strips = [list(f) for f in frames] if isinstance(frames[0], list | tuple) else [list(frames)]
    n = len(strips[0])
    if any(len(s) != n for s in strips) or len(captions) != n:
        raise ValueError(f"Every strip needs as many frames as there are captions ({len(captions)}).")
    gap, edge, left = 0.075, 0.1625, 0.95 if labels else 0.075
    strip = width + 2 * edge
    w, h = left + n * (width + gap) + gap, len(strips) * (strip + 0.08) + 0.25
    fig = plt.figure(figsize=(w, h))
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, w), ylim=(h, 0))
    ax.axis("off")
    for k, row in enumerate(strips):
        top = k * (strip + 0.08)
        ax.add_patch(Rectangle((left, top), w - left, strip, color="#30343B", lw=0))
        for x in np.arange(left + 0.08, w - 0.08, 0.2):  # the holes for the projector's teeth
            for y in (top + 0.04, top + strip - 0.12):
                ax.add_patch(
                    FancyBboxPatch((x, y), 0.09, 0.08, boxstyle="round,pad=0,rounding_size=0.02", fc="white", lw=0)
                )
        for i, frame in enumerate(row):
            x = left + gap + i * (width + gap)
            ax.imshow(
                _at_most(as_array(frame), width),
                extent=(x, x + width, top + edge + width, top + edge),
                aspect="auto",
                zorder=3,
            )
        if labels:
            ax.text(left - 0.1, top + strip / 2, _wrap(labels[k], 12), ha="right", va="center", fontsize=9, color=INK)
    for i, caption in enumerate(captions):
        ax.text(
            left + gap + i * (width + gap) + width / 2, h - 0.21, caption, ha="center", va="top", fontsize=9, color=INK
        )
    ax.set(xlim=(0, w), ylim=(h, 0))
    return _done(fig)


def latent_picture(latents: torch.Tensor, panels: bool = False) -> np.ndarray | list[np.ndarray]:
    """Latents made visible: one RGB picture uint8 (h,w,3), or with `panels` one grey picture (h,w) for each channel.

    The colours have no meaning of their own: channels 0 to 2 are shown as red, green and blue, and channel 3 as
    lightness. The scale is fixed (-3 black, 3 white), so that pictures of different latents can be compared.
    """
    z = latents.detach().cpu().float()
    z = z[0] if z.ndim == 4 and len(z) == 1 else z
    if z.ndim != 3:
        raise ValueError(f"Latents of one picture have shape (4,h,w); these have {tuple(latents.shape)}.")
    if panels:
        return [(255 * ((c + 3) / 6).clamp(0, 1)).byte().numpy() for c in z]
    rgb = z[:3] if len(z) >= 3 else z[:1].expand(3, -1, -1)
    if len(z) > 3:
        rgb = 0.8 * rgb + 0.4 * z[3:4]
    return (255 * ((rgb + 3) / 6).clamp(0, 1)).byte().permute(1, 2, 0).numpy()


# ---- the course's lessons, as far as they exist

LESSONS = (  # name, title, and what the learner does there
    ("00_start_here", "Start here", "make a picture from a sentence, and see the map"),
    ("01_noise_and_denoising", "Noise and denoising", "meet noise, and the ideal denoiser, which only memorises"),
    ("02_pixel_diffusion", "Pixel diffusion", "build a U-Net and train it on small pictures"),
    ("03_the_price_of_pixels", "The price of pixels", "measure what resolution costs"),
    ("04_vae", "The VAE", "train the encoder and the decoder between pictures and latents"),
    ("05_latent_diffusion", "Latent diffusion", "compare pixels with latents at an equal budget"),
    ("06_text_encoder", "The text encoder", "train a small CLIP, which turns words into vectors"),
    ("07_training_data", "Training data", "score, filter and search a collection of pictures"),
    ("08_cross_attention", "Cross-attention", "see how words steer the picture; guidance"),
    ("09_schedulers", "Schedulers", "build eight schedulers from one idea"),
    ("10_beyond_text", "Beyond text", "paint a map and get the picture"),
    ("11_inside_the_unet", "Inside the U-Net", "read and reuse what the U-Net knows"),
    ("12_text_to_image", "Text to image", "put Stable Diffusion together, and run the real one on a GPU"),
    ("13_inpainting", "Inpainting", "fill in a part of a picture"),
    ("14_latent_interpolation", "Latent interpolation", "walk from one picture to another; the whole story once more"),
)


def lesson_table(folder: str | Path = ".") -> HTML:
    """The lessons with the measured minutes and memory in the headers of those that exist in `folder`."""
    rows = []
    for name, title, about in LESSONS:
        path = Path(folder) / f"{name}.ipynb"
        title, cost = f"{name[:2]} {title}", "planned"
        if path.exists():
            header = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
            found = re.search(r"<!-- measured -->(.+?)<!-- /measured -->", header)
            cost = found[1] if found else "not measured yet"
            title = f'<a href="{name}.ipynb">{title}</a>'
        rows.append(
            f"<tr><td style='text-align:left'>{title}</td><td style='text-align:left'>{about}</td>"
            f"<td style='text-align:left'>{cost}</td></tr>"
        )
    head = "".join(f"<th style='text-align:left'>{h}</th>" for h in ("lesson", "in it you", "Run All takes"))
    return HTML(f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>")


# ---- the map of latent diffusion

_MAP_PARTS = {  # what `highlight` can name, and the parts it lights up
    "pixel": {"pixel", "given", "encoder", "decoder", "result"},
    "latent": {"latent", "encoder", "decoder", "unet", "scheduler", "noise", "training"},
    "conditioning": {"conditioning", "text_encoder", "cross_attention"},
    "vae": {"given", "encoder", "decoder", "result"},
    "loop": {"unet", "scheduler", "noise"},
    **{
        name: {name}
        for name in ("encoder", "decoder", "unet", "scheduler", "noise", "training", "text_encoder", "cross_attention")
    },
}
_MAP_TENSORS = ("picture", "encoded", "noise", "noisy", "prediction", "denoised", "decoded", "tokens", "condition")


def ldm_map(
    shapes: Mapping[str, Sequence[int]] | None = None,
    highlight: str | Sequence[str] | None = None,
    pictures: Mapping[str, Any] | None = None,
    prompt: str = "a sentence",
    steps: int | None = None,
) -> Figure:
    """The map of latent diffusion: pixel space, latent space, conditioning, and what crosses their borders.

    shapes     real tensors' shapes by name: picture -> (encoder) -> encoded -> noise; noisy -> (U-Net) -> prediction;
               denoised -> (decoder) -> decoded; tokens -> (text encoder) -> condition. Missing ones are left out.
    highlight  a part or several, the rest fades: pixel, latent, conditioning, vae, loop, or one box by its name
    pictures   what to draw in place of the boxes "picture", "encoded", "noise", "denoised", "decoded"
    """
    shapes, pictures = dict(shapes or {}), dict(pictures or {})
    for name in [*shapes, *pictures]:
        if name not in _MAP_TENSORS:
            raise ValueError(f"The map has no tensor called {name!r}. It knows {', '.join(_MAP_TENSORS)}.")
    names = [highlight] if isinstance(highlight, str) else list(highlight or [])
    for name in names:
        if name not in _MAP_PARTS:
            raise ValueError(f"The map has no part called {name!r}. It knows {', '.join(_MAP_PARTS)}.")
    lit = set().union(*(_MAP_PARTS[name] for name in names))
    m = _Map(shapes, pictures, lit)
    m.region("pixel", 1, 31, "pixel space", PIXEL)
    m.region("latent", 35, 101, "latent space", LATENT)
    m.region("conditioning", 105, 137, "conditioning", CONDITIONING)

    # top row, only for training and for changing a given picture: picture -> E -> latents -> noise
    m.tile("given", "picture", 4, 43, 13, PIXEL, "$x$")
    m.arrow("encoder", [(17.6, 49.5), (21.6, 49.5)], PIXEL)
    m.trapezoid("encoder", 22, 39, 49.5, "E", "encoder")
    m.arrow("encoder", [(39.6, 49.5), (46.9, 49.5)], LATENT)
    m.tile("training", "encoded", 47.5, 45.5, 8, LATENT, "$z$")
    m.arrow("training", [(56.2, 49.5), (84.4, 49.5)], LATENT, dashed=True)
    m.text("training", 70.5, 51.2, "add noise", va="bottom")
    m.text("training", 70.5, 48.2, "(in training a random amount,\nor to change a given picture)", va="top", size=7.5)
    m.tile("noise", "noise", 85, 45.5, 8, LATENT, "$z_T$", shape_right=False)

    # bottom row: noise -> U-Net and scheduler, again and again -> latents -> D -> picture
    m.arrow("noise", [(89, 39.4), (89, 22), (86.7, 22)], LATENT)
    m.unet("unet", 70, 86, 7.5, 27.5)
    m.arrow("unet", [(69.5, 19), (66.2, 19)], LATENT)
    m.box("scheduler", 54.6, 66, 14.5, 23.5, "scheduler\nstep", LATENT)
    m.arrow("scheduler", [(60.3, 24), (60.3, 32), (88.6, 32)], LATENT)
    m.text("scheduler", 75, 33, "again" if steps is None else f"{steps} times, less noise each time", va="bottom")
    m.arrow("scheduler", [(54.1, 19), (50.9, 19)], LATENT)
    m.tile("scheduler", "denoised", 42.4, 15, 8, LATENT, "$z_0$")
    m.arrow("decoder", [(42, 19), (39.6, 19)], LATENT)
    m.trapezoid("decoder", 22, 39, 19, "D", "decoder")
    m.arrow("decoder", [(21.6, 19), (17.6, 19)], PIXEL)
    m.tile("result", "decoded", 4, 12.5, 13, PIXEL, "$\\hat{x}$")
    m.shape("unet", "prediction", 68, 9.2, "U-Net's answer", ha="right")
    m.shape("noise", "noisy", 90.2, 27, "$z_t$", ha="left", stacked=True)

    # right: sentence -> tokens -> text encoder -> vectors -> cross-attention
    m.quote("text_encoder", 121, 53, prompt)
    m.arrow("text_encoder", [(121, 48.2), (121, 43.7)], CONDITIONING)
    m.text("text_encoder", 122.2, 46, "tokeniser", ha="left", size=8)
    m.shape("text_encoder", "tokens", 121, 41, "token ids", under=True)
    m.arrow("text_encoder", [(121, 38.2), (121, 33.6)], CONDITIONING)
    m.box("text_encoder", 110, 132, 24.5, 33, "text encoder", CONDITIONING)
    m.arrow("text_encoder", [(121, 24), (121, 19.6)], CONDITIONING)
    m.shape("text_encoder", "condition", 121, 17, "a vector for each token", under=True)
    m.arrow("cross_attention", [(121, 14), (121, 10.5), (86.7, 10.5)], CONDITIONING)
    m.text("cross_attention", 95.5, 11.4, "cross-\nattention", va="bottom", size=8, color=CONDITIONING)
    return _done(m.fig)


class _Map:
    """Drawing with the map's own pens; a part that is not lit is drawn pale."""

    def __init__(self, shapes: Mapping, pictures: Mapping, lit: set[str]):
        self.shapes, self.pictures, self.lit = shapes, pictures, lit
        self.fig = plt.figure(figsize=(11.04, 5.04))
        self.ax = self.fig.add_axes((0, 0, 1, 1))
        self.ax.set(xlim=(0, 138), ylim=(0, 63))
        self.ax.axis("off")

    def alpha(self, part: str) -> float:
        return 1.0 if not self.lit or part in self.lit else 0.28

    def text(self, part, x, y, words, ha="center", va="center", size=9.0, color=INK, **kwargs):
        self.ax.text(x, y, words, ha=ha, va=va, fontsize=size, color=color, alpha=self.alpha(part), zorder=6, **kwargs)

    def region(self, part, left, right, title, color):
        strong = part in self.lit
        box = FancyBboxPatch((left, 1.5), right - left, 60, boxstyle="round,pad=0,rounding_size=2", zorder=0)
        box.set(facecolor=(color, 0.2 if strong else 0.09), edgecolor=(color, 1 if not self.lit or strong else 0.3))
        box.set_linewidth(2.2 if strong else 1.2)
        self.ax.add_patch(box)
        weight = "bold" if strong or not self.lit else "normal"
        self.ax.text(left + 1.6, 60.2, title, ha="left", va="top", fontsize=11.5, color=color, weight=weight)

    def box(self, part, left, right, bottom, top, words, color):
        patch = FancyBboxPatch((left, bottom), right - left, top - bottom, boxstyle="round,pad=0,rounding_size=1")
        patch.set(facecolor="white", edgecolor=color, linewidth=1.6, alpha=self.alpha(part), zorder=3)
        self.ax.add_patch(patch)
        self.text(part, (left + right) / 2, (bottom + top) / 2, words)

    def trapezoid(self, part, left, right, y, letter, name):
        corners = [(left, y - 8), (left, y + 8), (right, y + 4), (right, y - 4)]
        self.ax.add_patch(
            Polygon(corners, facecolor="white", edgecolor=INK, linewidth=1.6, alpha=self.alpha(part), zorder=3)
        )
        self.text(part, (left + right) / 2 - 0.5, y + 1.3, letter, size=15, weight="bold")
        self.text(part, (left + right) / 2 - 0.5, y - 2.7, name, size=8)

    def unet(self, part, left, right, bottom, top):
        patch = FancyBboxPatch((left, bottom), right - left, top - bottom, boxstyle="round,pad=0,rounding_size=1")
        patch.set(facecolor="white", edgecolor=LATENT, linewidth=1.6, alpha=self.alpha(part), zorder=3)
        self.ax.add_patch(patch)
        self.text(part, (left + right) / 2, top - 2.6, "U-Net", size=11, weight="bold")
        middle = (bottom + top) / 2 - 0.6
        for k, tall in enumerate((10, 7.5, 5, 3.4, 5, 7.5, 10)):  # narrower and deeper, then back: the U
            x = left + 1.6 + 1.97 * k
            bar = Rectangle((x, middle - tall / 2), 1.1, tall, lw=0, fc=LATENT, alpha=0.75 * self.alpha(part), zorder=4)
            self.ax.add_patch(bar)
            dot = Circle((x + 0.55, 10.5), 0.42, lw=0, fc=CONDITIONING, alpha=self.alpha("cross_attention"), zorder=5)
            self.ax.add_patch(dot)
        y = [10.5, 10.5]
        self.ax.plot([left + 2, right], y, color=CONDITIONING, lw=1.4, alpha=self.alpha("cross_attention"), zorder=5)

    def arrow(self, part, points, color, dashed=False):
        xs, ys = zip(*points[:-1], strict=True)
        style = {"color": color, "linewidth": 1.8, "alpha": self.alpha(part), "linestyle": "--" if dashed else "-"}
        if len(points) > 2:
            self.ax.plot(xs, ys, solid_joinstyle="round", zorder=2, **style)
        head = FancyArrowPatch(
            points[-2], points[-1], arrowstyle="-|>", mutation_scale=11, shrinkA=0, shrinkB=0, **style
        )
        self.ax.add_patch(head)

    def tile(self, part, name, left, bottom, side, color, symbol, shape_right=False):
        """A picture (or an empty box) with its symbol and its tensor's shape below."""
        if name in self.pictures:
            self.ax.imshow(
                _at_most(as_array(self.pictures[name]), side * 0.08),
                extent=(left, left + side, bottom, bottom + side),
                aspect="auto",
                zorder=4,
                alpha=self.alpha(part),
            )
        frame = Rectangle((left, bottom), side, side, facecolor="white", edgecolor=color, linewidth=1.6)
        frame.set(alpha=self.alpha(part), zorder=3)
        self.ax.add_patch(frame)
        self.shape(part, name, left + side / 2, bottom - 1.2, symbol, va="top")
        self.ax.set(xlim=(0, 138), ylim=(0, 63))

    def shape(self, part, name, x, y, symbol, ha="center", va="center", stacked=False, under=False):
        """A tensor's symbol and shape, on one line or two."""
        size = ", ".join(str(int(n)) for n in self.shapes[name]) if name in self.shapes else ""
        words = f"{symbol}\n({size})" if size else symbol
        self.text(part, x, y, words, ha=ha, va=va, size=8.5, linespacing=1.25)

    def quote(self, part, x, y, prompt):
        short = prompt if len(prompt) <= 66 else prompt[:63].rsplit(" ", 1)[0] + " ..."
        self.text(part, x, y, "\u201c" + _wrap(short, 24) + "\u201d", size=8.5, style="italic", linespacing=1.2)


def _snap(inches: float) -> float:
    """Rounded up to whole pixels, so that a picture's pixels fall on the figure's."""
    dpi = plt.rcParams["figure.dpi"]
    return float(np.ceil(inches * dpi) / dpi)


def _at_most(array: np.ndarray, width: float) -> np.ndarray:
    """The picture, smoothly shrunk if it has more pixels than the figure has in `width` inches."""
    pixels = round(width * plt.rcParams["figure.dpi"])
    if array.shape[1] <= pixels:
        return array
    size = (pixels, round(pixels * array.shape[0] / array.shape[1]))
    return np.asarray(Image.fromarray(np.ascontiguousarray(array)).resize(size, Image.Resampling.LANCZOS))


def _wrap(text: str, columns: int) -> str:
    """Breaks text at spaces, keeping the breaks it has."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            if line and len(line) + 1 + len(word) > columns:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}" if line else word
        lines.append(line)
    return "\n".join(lines)


def _done(fig: Figure) -> Figure:
    plt.close(fig)  # so that the notebook shows it once, as the cell's value
    return fig
