"""How fast this course's code is beside diffusers' and transformers', in one process:

    python -m ldm_lessons.bench                     # the pocket model
    python -m ldm_lessons.bench --size sd15         # Stable Diffusion 1.5's sizes, weights random, 512 x 512
    python -m ldm_lessons.bench --device cuda --dtype bfloat16 --compile

The two take turns, so that whatever else the machine does meets both; times are medians, and the ratio is the median of
the turns' own ratios (below 1: ours is faster). `of peak` is the share of the device's own rate of matrix products,
measured first, at which our network computes. Run it on a quiet machine.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldm_lessons import generate, models
from ldm_lessons.machine import peak_memory_gb, pick_device, pick_dtype
from ldm_lessons.pipeline import LatentDiffusion
from ldm_lessons.samplers import SAMPLERS
from ldm_lessons.text import TextConfig, TextEncoder
from ldm_lessons.unet import UNet, UNetConfig
from ldm_lessons.vae import VAE, VAEConfig

PROMPT = "a red house on the left, snowy mountains, a green meadow at sunset"
THEIRS = {
    "ddim": "DDIMScheduler", "pndm": "PNDMScheduler", "lms": "LMSDiscreteScheduler", "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler",
}  # fmt: skip
Call = Callable[[], Any]


def our_model(size: str, device: torch.device, dtype: torch.dtype) -> LatentDiffusion:
    """The pocket model, or one with random weights of sd15's sizes."""
    model = models.load("pocket", device, dtype)
    if size == "sd15":
        torch.manual_seed(0)
        model.unet, model.vae = UNet(UNetConfig.sd15()), VAE(VAEConfig.sd15())
        model.text_encoder = TextEncoder(TextConfig.sd15())
        for part in (model.unet, model.vae, model.text_encoder):
            part.eval().requires_grad_(False)
    return model.to(device, dtype)


def their_pipe(size: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The same in diffusers' pipeline."""
    import diffusers.utils.logging
    import transformers.utils.logging
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    for talk in (diffusers.utils.logging, transformers.utils.logging):  # the table is what this command says
        talk.set_verbosity_error()
        talk.disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(models.POCKET)
    if size == "sd15":
        torch.manual_seed(0)
        pipe.unet = UNet2DConditionModel.from_config(UNetConfig.sd15().to_diffusers()).eval()
        pipe.vae = AutoencoderKL.from_config(VAEConfig.sd15().to_diffusers()).eval()
        pipe.text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(TextConfig.sd15().to_transformers())).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype)


def parts(ours: LatentDiffusion, pipe: Any) -> Iterator[tuple[str, Call, Call]]:
    """One network's call at a time: its name, ours and theirs."""
    n, device, dtype = ours.unet.config.sample_size, ours.device, ours.dtype
    width, side = ours.unet.config.cross_attention_dim, ours.image_size
    with torch.inference_mode():
        for batch in (1, 2, 8):
            x, text = (torch.randn(batch, *s, device=device, dtype=dtype) for s in ((4, n, n), (77, width)))
            yield (
                f"U-Net, batch {batch}",
                lambda x=x, text=text: ours.unet(x, 500, text),
                lambda x=x, text=text: pipe.unet(x, 500, text, return_dict=False),
            )
        picture = torch.rand(1, 3, side, side, device=device, dtype=dtype) * 2 - 1
        z = torch.randn(1, 4, n, n, device=device, dtype=dtype)
        yield "VAE encode", lambda: ours.vae.encode(picture), lambda: pipe.vae.encode(picture)
        yield "VAE decode", lambda: ours.vae.decode(z), lambda: pipe.vae.decode(z, return_dict=False)
        ids = torch.randint(3, 500, (1, 77), device=device)
        yield "text encoder", lambda: ours.text_encoder(ids), lambda: pipe.text_encoder(ids)


def trajectories(ours: LatentDiffusion) -> Iterator[tuple[str, Call, Call]]:
    """20 steps of each sampler alone, with a network that costs nothing."""
    import diffusers

    n = ours.unet.config.sample_size
    start = torch.randn(1, 4, n, n, device=ours.device, dtype=ours.dtype)
    for name, other in THEIRS.items():
        config = {**ours.scheduler_config, "prediction_type": "epsilon"}
        pair = SAMPLERS[name].from_config(config), getattr(diffusers, other).from_config(config)

        def run(sampler: Any) -> Tensor:
            sampler.set_timesteps(20)
            x = start * sampler.init_noise_sigma
            for t in sampler.timesteps:
                x = sampler.step(sampler.scale_model_input(x, t), t, x, return_dict=False)[0]
            return x

        yield f"{name}, 20 steps alone", lambda s=pair[0]: run(s), lambda s=pair[1]: run(s)


def whole_pictures(ours: LatentDiffusion, pipe: Any) -> Iterator[tuple[str, Call, Call]]:
    """A whole guided picture in 20 steps."""
    import diffusers

    options = dict(num_inference_steps=20, guidance_scale=5.0)
    for name in ("dpmpp_2m", "ddim"):
        pipe.scheduler = getattr(diffusers, THEIRS[name]).from_config(pipe.scheduler.config)
        theirs = copy.copy(pipe)
        yield (
            f"picture, {name}",
            lambda name=name: generate.text_to_image(ours, PROMPT, sampler=name, progress=False, **options),
            lambda theirs=theirs: theirs(PROMPT, generator=torch.Generator().manual_seed(0), **options),
        )


def matrix_rate(device: torch.device, dtype: torch.dtype, wait: Call) -> float:
    """Floating-point operations per second of a large matrix product, the best of ten: what the device can do."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(10):
        wait()
        began = time.perf_counter()
        torch.mm(a, b)
        wait()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def operations(call: Call) -> int:
    """Floating-point operations of the products and convolutions of a call; a multiplication and its addition are two.

    The call runs once, with plain attention: the fused kernels do the same products but not all are counted.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        call()
    return counter.get_total_flops()


def take_turns(mine: Call, theirs: Call, repeats: int, wait: Call) -> dict[str, float]:
    """Median milliseconds of both, and the median of the turns' ratios; the first turn warms up."""
    times: list[tuple[float, float]] = []
    for turn in range(repeats + 1):
        taken = {}
        for call in (mine, theirs) if turn % 2 else (theirs, mine):
            wait()
            began = time.perf_counter()
            with torch.inference_mode():
                call()
            wait()
            taken[call] = 1000 * (time.perf_counter() - began)
        times.append((taken[mine], taken[theirs]))
    a, b = zip(*times[1:], strict=True)
    ratio = statistics.median(x / y for x, y in times[1:])
    return {"ours_ms": statistics.median(a), "theirs_ms": statistics.median(b), "ratio": ratio}


def memory(size: str, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Peak megabytes (of the GPU's memory, if there is one) to make one picture in a process of its own, each side."""
    found = {}
    where = ["--device", device.type, "--dtype", str(dtype).removeprefix("torch.")]
    for side in ("ours", "theirs"):
        command = [sys.executable, "-m", "ldm_lessons.bench", "--size", size, "--alone", side, *where]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[f"{side}_mb"] = float(done.stdout.split()[-1])
    return found | {"ratio": found["ours_mb"] / found["theirs_mb"]}


def alone(size: str, side: str, device: torch.device, dtype: torch.dtype) -> None:
    """Make one picture with one side's code, and print its peak memory in megabytes."""
    if side == "ours":
        generate.text_to_image(our_model(size, device, dtype), PROMPT, num_inference_steps=2, progress=False)
    else:
        their_pipe(size, device, dtype)(PROMPT, num_inference_steps=2)
    print(torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 1024 * peak_memory_gb())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ldm_lessons.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=("pocket", "sd15"), default="pocket", help="which networks")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each pair")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16 (default: what suits the device)")
    parser.add_argument("--compile", action="store_true", help="torch.compile both U-Nets and VAEs")
    parser.add_argument("--only", default="", help="only lines whose name holds this word")
    parser.add_argument("--json", type=Path, help="write the table there too")
    parser.add_argument("--alone", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.alone:
        return alone(args.size, args.alone, device, dtype)
    ours, pipe = our_model(args.size, device, dtype), their_pipe(args.size, device, dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else contextlib.nullcontext
    rate = matrix_rate(device, dtype, wait)
    work = {what: operations(mine) for what, mine, _ in parts(ours, pipe) if args.only in what}
    if args.compile:
        for model in (ours, pipe):
            model.unet, model.vae.decoder = torch.compile(model.unet), torch.compile(model.vae.decoder)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    print(f"{args.size}, {name}, {str(dtype).removeprefix('torch.')}{', compiled' * args.compile}", end="")
    print(f"; {rate / 1e12:.2f} Tflop/s in matrix products; milliseconds:")
    print(f"{'':26}{'ours':>10}{'theirs':>10}{'ratio':>8}{'of peak':>9}")
    rows: dict[str, dict] = {"matrix products": {"flops_per_second": rate}}
    for group in (parts(ours, pipe), trajectories(ours), whole_pictures(ours, pipe)):
        for what, mine, theirs in group:
            if args.only not in what:
                continue
            rows[what] = row = take_turns(mine, theirs, args.repeats, wait)
            line = f"{what:26}{row['ours_ms']:10.2f}{row['theirs_ms']:10.2f}{row['ratio']:8.2f}"
            if what in work:
                row["of_peak"] = work[what] / (row["ours_ms"] / 1000) / rate
                line += f"{row['of_peak']:9.2f}"
            if what.startswith("picture"):
                row["per_second"] = 1000 / row["ours_ms"]
                line += f"{row['per_second']:9.2f} a second"
            print(line, flush=True)
    if args.only in "memory":
        rows["memory"] = row = memory(args.size, device, dtype)
        print(f"{'memory, MB':26}{row['ours_mb']:10.0f}{row['theirs_mb']:10.0f}{row['ratio']:8.2f}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
