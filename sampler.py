"""Sampling: the sigma grids, the 1.67-step sampler, the teacher's guided sampler.

    python sampler.py --prompt "a red circle" --num-images 16      # at once, without training
    python sampler.py --checkpoint runs/tiny-stage2 --prompts FILE

The grid and the roll-out here are the ones that training uses and that the stock pipeline
reproduces when it is called with `sigmas=[1.0, 0.5]`. NFE is the number of network
evaluations; guidance doubles an evaluation where it is on.

Dimension key: B batch, C latent channels, H W latent size, N student steps, L text tokens, J and P
widths of the text embeddings (model.py).
"""

import dataclasses
import itertools
import math
import time
from pathlib import Path

from run import (UserError, command, is_main, option, parse_settings, read_settings, rng,
                 save_whole)

import torch
from PIL import Image

from cache import nfe
from losses import euler, guidance_weight, guide, shift_sigma
from model import (Decoder, Prompts, choose_prompts, download, find_preset, load_scheduler,
                   load_student, pick_device, velocity)
from tiny.world import CAPTIONS, measure

TEACHER_STEPS = 28      # [paper] the teacher runs 28 × 2
COMMITTED = str(Path(__file__).resolve().parent / "tiny" / "student")    # the default runs' result


# ================================================================== grids and noise

def sigma_grid(steps):
    """The student's sigmas, fp32 [N + 1], from 1 (noise) to 0: two steps are 1, 0.75, 0; four are
    1, 0.9, 0.75, 0.5, 0 [official, shift 3]."""
    # Equal steps in u, then the base model's shift. The first step is short in σ and decides what
    # the paper calls structure; the last one is long and fills in the details. (The stock scheduler
    # shifts by itself: give a pipeline u without its 0, sigmas=[1.0, 0.5], and not σ.)
    u = 1 - torch.arange(steps + 1) / steps                               # N+1: 1, 0.5, 0
    return shift_sigma(u)                                                 # N+1: 1, 0.75, 0


def teacher_sigmas(preset, steps=TEACHER_STEPS):
    """The base model's stock scheduler's own sigmas, fp32 [steps + 1], from 1 to 0."""
    # Not sigma_grid(28): the teacher must sample exactly as its makers let it sample. Of these 28
    # steps five begin above α = 0.94.
    scheduler = load_scheduler(preset)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.cpu()


def image_noise(seed, indices, shape, purpose="image"):
    """Noise [B, C, H, W], each image's from (seed, purpose, its index) alone: the batch size
    changes no picture. Both trainings have purposes of their own: no sample grid and no evaluation
    starts from a noise that was trained on."""
    # One generator for each image, on the CPU: one for the whole batch would give an image another
    # noise whenever its neighbours or the device change.
    noises = [torch.randn(shape, generator=rng(seed, purpose, int(i))) for i in indices]
    return torch.stack(noises)                                            # B×C×H×W


# ================================================================== the student: 1.67 evaluations

def roll_out(student, x, prompt, sigmas, span=None, f=None):
    """The student's path from noise x [B, C, H, W] along sigmas [N + 1]: (latents, velocities, Δ0).

    There are N + 1 latents and N velocities, all [B, C, H, W]. The last latent is the sample, if
    sigmas end at 0. With a span this is the 1.67-step sampler of the paper; without one every step
    is a full one.
    """
    # Training and inference both come here: Stage II learns on exactly the path that is used later
    # (paper: "inference-consistent"). It passes sigmas[:-1] and takes the last step itself, with
    # gradient (train_stage2.last_step).
    latents, velocities = [x], []
    # Step one has no Δ0 yet: it runs every block and records one, for each picture anew. From step
    # two on the span is skipped, and the same Δ0 is passed on unchanged. So two steps of SD3-Medium
    # cost 1 + 16/24 evaluations.
    delta = None
    for sigma, sigma_next in itertools.pairwise(sigmas.tolist()):
        v, delta = velocity(student, x, sigma, prompt, span, delta, f)
        # Towards x̂0, but only as far as σ_next.
        x = euler(x, v, sigma, sigma_next)
        velocities.append(v)
        latents.append(x)
    return latents, velocities, delta


# ================================================================== the teacher: 28 guided steps

def guided_velocity(teacher, x, sigma, prompt, uncond, w, alpha):
    """The teacher's velocity [B, C, H, W] by Eq. 4; sigma [B] or a number, prompt and uncond
    (embeds, pooled)."""
    # Conditional and unconditional pass go through the network as one batch of 2·B. Always both,
    # although above α only the first counts: with several processes a pass that only some of them
    # run would hang the others (deviation 6).
    embeds = torch.cat([prompt[0], uncond[0]])                            # 2B×L×J
    pooled = torch.cat([prompt[1], uncond[1]])                            # 2B×P
    # In Stage I each sample has a level of its own; in sampling one number holds for all.
    twice = torch.cat([sigma, sigma]) if torch.is_tensor(sigma) else sigma
    v, _ = velocity(teacher, torch.cat([x, x]), twice, (embeds, pooled))  # 2B×C×H×W
    # The first half was told the prompt, the second nothing. How much their difference counts is
    # each sample's own matter: w where its σ ≤ α, else 1, which leaves the first half as it is.
    v_cond, v_uncond = v.chunk(2)
    return guide(v_cond, v_uncond, guidance_weight(sigma, w, alpha))      # B×C×H×W


def sample_guided(teacher, x, prompt, uncond, sigmas, w, alpha):
    """(latents [B, C, H, W], passes): Euler along sigmas with the guidance rule of Eq. 4; α = 1 is
    guidance everywhere.

    Where the rule gives weight 1 only the conditional pass is run. So 28 steps cost 56 passes at
    α = 1, 51 at α = 0.94, and 28 at w = 1.
    """
    # Counted, since "28×2" is a claim, and with α some of the 56 passes are never run.
    passes = 0
    for sigma, sigma_next in itertools.pairwise(sigmas.tolist()):
        # Above α nothing is guided, so that layouts stay varied. One σ holds for all samples here,
        # so the unconditional pass can be saved.
        if guidance_weight(sigma, w, alpha) == 1:
            v, _ = velocity(teacher, x, sigma, prompt)
            passes += 1
        else:
            # At α and below guidance is on: two passes.
            v = guided_velocity(teacher, x, sigma, prompt, uncond, w, alpha)
            passes += 2
        x = euler(x, v, sigma, sigma_next)
    return x, passes


# ================================================================== pictures

class Gallery:
    """The sample grid of a training run: a row for each of some prompts, always from the same
    noises."""

    def __init__(self, preset, prompts):
        # The same rows in every run and at every step: two grids differ only in the student.
        self.prompts = prompts
        self.tiny = preset.is_tiny
        self.size = 8 if self.tiny else 4
        self.rows = torch.randperm(len(prompts), generator=rng(0, "gallery"))[:self.size]

    def save(self, path, student, decode, shape, sigmas, span=None, f=None):
        """Samples the grid and writes it to path. All processes call it; the first one writes.
        Returns what the miniature's exact reader finds in it, {} for real models: the share of
        pictures with the right shape and colour, and the scene entropy of a caption's 8."""
        pictures = []
        with torch.no_grad():
            for i, row in enumerate(self.rows.tolist()):
                noise = image_noise(42, range(i * self.size, (i + 1) * self.size), shape)
                prompt = self.prompts.take([row] * self.size)
                latents, _, _ = roll_out(student, noise.to(self.prompts.device), prompt, sigmas,
                                         span, f)
                pictures += [decode(one).cpu() for one in latents[-1].split(1)]
        pictures = torch.cat(pictures)
        if is_main():
            save_pictures(pictures, path, self.size)
        texts = [self.prompts.texts[row] for row in self.rows.tolist()]
        if not self.tiny or set(texts) - set(CAPTIONS) or len({*texts}) < len(texts):
            return {}                                     # the reader needs distinct captions
        captions = torch.tensor([CAPTIONS.index(text) for text in texts])
        found = measure(pictures, captions.repeat_interleave(self.size))
        return {"right": found["right"].mean(),
                f"scene_entropy_{self.size}": found["scene_entropy"].mean()}


def save_pictures(pictures, path, columns):
    """Saves pictures [B, 3, H, W] in [0, 1] as one PNG grid, whole or not at all; small ones are
    shown enlarged to about 96 pixels."""
    h, w = pictures.shape[2:]
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (w + 2), rows * (h + 2)), "white")
    pixels = (pictures.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    for i, picture in enumerate(pixels.cpu().numpy()):
        place = i % columns * (w + 2), i // columns * (h + 2)
        sheet.paste(Image.fromarray(picture), place)
    # Enlarged without smoothing: what is blurred in the result is blurred by the model.
    scale = max(1, 96 // h)
    sheet = sheet.resize((sheet.width * scale, sheet.height * scale), Image.NEAREST)
    save_whole(path, lambda temporary: sheet.save(temporary, format="PNG"))


# ================================================================== command

@dataclasses.dataclass
class Settings:
    checkpoint: str = option(
        None, "run folder of train_stage1.py or train_stage2.py, finished or not (default: "
              "runs/tiny-stage2 or, before it is finished, the committed tiny/student)")
    prompt: str = option(None, "one prompt")
    prompts: str = option(None, "file of prompts: one a line, or JSON lines with \"prompt\"")
    num_images: int = option(4, "images for each prompt", low=1, high=100_000)
    seed: int = option(42, "noise of image i is drawn from (seed, i)", low=0, high=2**31 - 1)
    batch_size: int = option(16, "images at a time; changes no picture", low=1, high=10_000)
    no_cache: bool = option(False, "run every block in every step, though the run has a cache")
    out: str = option("grid.png", "the picture, one row a prompt")
    device: str = option(None, "where to run", choices=("cpu", "cuda", "mps"))


@command
def main(argv):
    settings = parse_settings(Settings, argv, "sampler.py", __doc__.split("\n\n")[0])
    folder = settings.checkpoint or "runs/tiny-stage2"
    if not settings.checkpoint and not Path(folder, "student").exists():
        folder = COMMITTED                                # a result to start from
    if Path(settings.out).suffix != ".png" or Path(settings.out).is_dir():
        raise UserError(f"--out {settings.out}: give a file name that ends in .png")
    if settings.prompt and settings.prompts:
        raise UserError("give --prompt or --prompts, not both")
    # Everything comes from the run folder: which base model, how many steps, which span, f. Only
    # the prompts and the noises are the caller's.
    trained = read_settings(folder)
    preset = find_preset(trained["model"])
    device = pick_device(preset, settings.device)
    texts = choose_prompts(preset, settings.prompts, settings.prompt)
    if not settings.prompt and not settings.prompts and not preset.is_tiny:
        texts = texts[:4]                                 # of default_prompts' 80,000

    preset = download(preset)                             # now a folder on this disk
    prompts = Prompts(preset, texts, device)
    student, span, f = load_student(folder, trained, preset, device)
    if settings.no_cache:
        span = None                                       # every step in full
    decode, sigmas = Decoder(preset, device), sigma_grid(trained["steps"])
    total, pictures, start = len(texts) * settings.num_images, [], time.perf_counter()
    with torch.inference_mode():
        for images in torch.arange(total).split(settings.batch_size):
            noise = image_noise(settings.seed, images, trained["latent_shape"]).to(device)
            prompt = prompts.take(images // settings.num_images)          # so many of each
            latents, _, _ = roll_out(student, noise, prompt, sigmas, span, f)
            # The VAE takes them one by one: 1024² pictures need much memory, and the last bits of a
            # picture must not depend on its neighbours.
            pictures += [decode(one).cpu() for one in latents[-1].split(1)]
    # The text encoders are not in these seconds: a prompt is encoded once, whatever the steps.
    seconds = time.perf_counter() - start
    # Several prompts: a row for each. One prompt: as square as it goes.
    columns = settings.num_images if len(texts) > 1 else max(1, round(total ** 0.5))
    save_pictures(torch.cat(pictures), settings.out, columns)
    blocks = len(student.transformer_blocks)
    evaluations = nfe(trained["steps"], span, blocks)
    print(f"{settings.out}: {total} images of {folder}, {evaluations:.4g} network evaluations "
          f"each, {seconds:.1f} s")


if __name__ == "__main__":
    main()
