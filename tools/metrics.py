"""Measuring pictures: what the rows of evaluate.py's table are worth, and how sure that is.

A meter looks at the n pictures of one prompt and returns numbers for them and their features:
  TinyMeter   the miniature's exact reader: prompt accuracy, usual scene, scene entropy
  RealMeter   CLIP score, PickScore and, where the package is installed, LPIPS between the pictures
Fréchet distance and diversity (mean pairwise distance within a prompt) are taken on the features,
which come from another network than the discriminator's, or they would flatter Stage II.
Intervals are 95 % percentile bootstraps over prompts. Not here: sampling and the table.
Dimension key: P prompts, n pictures for each, F features; pictures lie in [0, 1].
"""

import hashlib
from pathlib import Path

import torch

from run import UserError, rng

CLIP = "openai/clip-vit-large-patch14"
PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"     # its model card's
DINO = "facebook/dinov2-base"
LPIPS_SIDE = 256        # [ours] pixels; the paper does not name a protocol


# ----------------------------------------------------------------------------- statistics

def bootstrap(statistic, prompts, rounds=1000):
    """95 % interval [low, high] of statistic(indices of prompts), resampling prompts. A resample
    has fewer distinct ones, which makes a Fréchet distance larger: its interval leans upwards."""
    drawn = torch.randint(prompts, (rounds, prompts), generator=rng(0, "bootstrap"))
    values = torch.tensor([float(statistic(index)) for index in drawn])
    return torch.quantile(values, torch.tensor([0.025, 0.975])).tolist()


def frechet(a, b):
    """Fréchet distance of the Gaussians that fit features a and b [..., F]:
    ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2·(Σ_a·Σ_b)^½)."""
    a, b = a.flatten(0, -2), b.flatten(0, -2)
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * middle


class Measured:
    """What one row's pictures are worth: by_prompt {name: [P]} and features [P, n, F].

    groups yields the pictures [n, 3, H, W] of each prompt in turn, so they need not fit in memory.
    """

    def __init__(self, groups, prompts, meter):
        with torch.inference_mode():
            found = [meter(group, text) for group, text in zip(groups, prompts, strict=True)]
        self.features = torch.stack([features for _, features in found]).double()
        self.by_prompt = {name: torch.tensor([float(values[name]) for values, _ in found])
                          for name in found[0][0]}
        n = self.features.shape[1]
        self.by_prompt["diversity"] = torch.stack(
            [torch.cdist(f, f).sum() / (n * (n - 1)) for f in self.features])

    def row(self, teacher, data):
        """The measured columns with their intervals; teacher and data are Measured or None."""
        row, prompts = {}, len(self.features)
        for name, values in self.by_prompt.items():
            row[name] = values.mean().item()
            row[f"{name}_interval"] = bootstrap(lambda i, v=values: v[i].mean(), prompts)
        for name, other in (("frechet_to_teacher", teacher), ("frechet_to_data", data)):
            if other not in (None, self):
                def distance(i, other=other):
                    return frechet(self.features[i], other.features[i])
                row[name] = float(distance(torch.arange(prompts)))
                row[f"{name}_interval"] = bootstrap(distance, prompts, rounds=200)
        return row


def compare(run, base, teacher):
    """What changed from base, a run's Stage I, to the run, both Measured on the same prompts and
    noises, so the intervals resample prompts of both alike.

    Returns accuracy in points, the ratio of scene entropies (both None for real models) and the
    change of the Fréchet distance to the teacher (None without one), each with its interval.
    """
    a, b, exact = run.by_prompt, base.by_prompt, "prompt_accuracy" in run.by_prompt
    statistics = {
        "accuracy_points": exact and (
            lambda i: 100 * (a["prompt_accuracy"] - b["prompt_accuracy"])[i].mean()),
        "entropy_ratio": exact and (
            lambda i: a["scene_entropy"][i].mean() / b["scene_entropy"][i].mean()),
        "frechet_change": teacher and (
            lambda i: (frechet(run.features[i], teacher.features[i])
                       - frechet(base.features[i], teacher.features[i])))}
    result, prompts = {}, len(run.features)
    for name, statistic in statistics.items():
        rounds = 200 if name == "frechet_change" else 1000
        result[name] = float(statistic(torch.arange(prompts))) if statistic else None
        result[f"{name}_interval"] = bootstrap(statistic, prompts, rounds) if statistic else None
    return result


# ----------------------------------------------------------------------------- networks

def load(cls, source, **options):
    """cls.from_pretrained(source, ...), a network or a processor; UserError in one line if not.
    Only safetensors are read, and a file that leaves weights to chance is refused."""
    from transformers.utils import logging
    logging.disable_progress_bar()
    network, missing = issubclass(cls, torch.nn.Module), ()
    try:
        loaded = cls.from_pretrained(source, **options, **(dict(
            dtype=torch.float32, use_safetensors=True, output_loading_info=True)
            if network else {}))
        if network:
            loaded, missing = loaded[0].eval().requires_grad_(False), loaded[1]["missing_keys"]
    except Exception as error:  # a foreign folder fails in as many ways as there are classes
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"cannot load a {cls.__name__} from {source} ({first}); it must be a "
                        "folder or a hub id with .safetensors weights: pickles are never "
                        "opened") from error
    if missing:
        raise UserError(f"cannot load a {cls.__name__} from {source}: {len(missing)} of its "
                        f"weights are not there, {sorted(missing)[0]} for one")
    return loaded


def weights_hash(*modules):
    """The first 16 digits of the sha256 of all weights: which network it was, wherever it lay."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class TinyMeter(torch.nn.Module):
    """The exact reader, and as features the pooled last map of the metric backbone, which has
    another seed, depth and width than the discriminator's."""
    resize, missing = None, {}

    def __init__(self, preset):
        super().__init__()
        from transformers import ConvNextV2Backbone
        self.metric_backbone = load(ConvNextV2Backbone, Path(preset.source) / "metric_backbone")

    def forward(self, pictures, prompt):
        """(values, features [n, F]) of pictures [n, 3, 32, 32] of one of the 24 captions."""
        import tiny
        found = tiny.measure(pictures, torch.full((len(pictures),), tiny.CAPTIONS.index(prompt)))
        device = next(self.parameters()).device
        maps = self.metric_backbone(pictures.to(device) * 2 - 1).feature_maps
        return {"prompt_accuracy": found["correct"].mean(), "usual_scene": found["usual"].mean(),
                "scene_entropy": found["scene_entropy"]}, maps[-1].mean((2, 3)).cpu()


class RealMeter(torch.nn.Module):
    """CLIP score (cosine, as the paper's), PickScore, DINOv2 features (pooled class token), and
    LPIPS as mean over all pairs of a prompt: the larger, the more diverse (paper, Table 3).

    Pictures are resized by each network's own processor. missing says why a column stays empty.
    """

    def __init__(self, clip=None, pickscore=None, dino=None):
        super().__init__()
        from transformers import AutoImageProcessor, CLIPModel, CLIPProcessor, Dinov2Model
        self.clip = load(CLIPModel, clip or CLIP)
        self.pickscore = load(CLIPModel, pickscore or PICKSCORE)
        self.dino = load(Dinov2Model, dino or DINO)
        self.processors = {
            "clip": load(CLIPProcessor, clip or CLIP),
            "pickscore": load(CLIPProcessor, pickscore or PICKSCORE_PROCESSOR),
            "dino": load(AutoImageProcessor, dino or DINO)}
        self.resize, self.missing = {}, {}
        for name, processor in self.processors.items():
            one = getattr(processor, "image_processor", processor)
            self.resize[name] = f"{type(one).__name__} {dict(one.size)}, crop {dict(one.crop_size)}"
        try:
            import lpips
            # the package reads its own and torchvision's weights; ours would be a copy of them
            self.lpips = lpips.LPIPS(net="alex", verbose=False).eval().requires_grad_(False)
            self.resize["lpips"] = f"bicubic, antialiased, {LPIPS_SIDE}"
        except ImportError:
            self.lpips = None
            self.missing["lpips"] = "the package lpips is not installed (pip install lpips)"

    def forward(self, pictures, prompt):
        """(values, features [n, F]) of pictures [n, 3, H, W] of one prompt."""
        device = next(self.parameters()).device
        images = list((pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
        text, values = dict(text=[prompt], padding=True, truncation=True), {}
        for name, score, net in (("clip", "clip_score", self.clip),
                                 ("pickscore", "pick_score", self.pickscore)):
            inputs = self.processors[name](images=images, **text, return_tensors="pt").to(device)
            values[score] = net(**inputs).logits_per_image.mean()      # exp(logit_scale)·cosine
        values["clip_score"] = values["clip_score"] / self.clip.logit_scale.exp()
        inputs = self.processors["dino"](images=images, return_tensors="pt").to(device)
        if self.lpips:
            small = torch.nn.functional.interpolate(pictures.to(device), (LPIPS_SIDE, LPIPS_SIDE),
                                                    mode="bicubic", antialias=True) * 2 - 1
            pairs = torch.triu_indices(len(small), len(small), 1).T.split(32)      # n·(n − 1)/2 × 2
            values["lpips"] = torch.cat([self.lpips(*small[pair].unbind(1)).flatten()
                                         for pair in pairs]).mean()
        return values, self.dino(**inputs).pooler_output.cpu()
