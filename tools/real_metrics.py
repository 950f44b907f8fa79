"""Real models in evaluate.py: their metrics.

evaluate.py comes here for every --model but the miniature, whose exact reader needs none of this.
The networks are downloaded on first use, or given as folders: --clip, --pickscore, --dino.

    CLIP score   how well a picture fits its prompt: the cosine of their CLIP vectors
    PickScore    how well people would like it for that prompt: a CLIP trained on people's choices
    LPIPS        how far apart two pictures look to a network. Taken between the pictures of one
                 prompt: the larger, the more diverse (paper, Table 3)
    DINOv2       no score of its own: Fréchet distance and diversity are taken on its features

The paper's versions are not known (docs/DEVIATIONS.md, open question 8), so compare the rows of a
table with each other.

Dimension key: n pictures of one prompt, F features. Pictures [n, 3, H, W] lie in [0, 1].
"""

import itertools

from run import UserError

import torch
from transformers import BitImageProcessor, CLIPModel, CLIPProcessor, Dinov2Model

from model import CLIP, DINO, PICKSCORE, PICKSCORE_PROCESSOR, load_part, loading

LPIPS_SIDE = 256        # [ours] pixels


# ================================================================== the meter

class RealMeter(torch.nn.Module):
    """Looks at the pictures of one prompt. clip, pickscore and dino are folders or hub ids.

    resize tells how each network is shown the pictures; missing, why a column stays empty.
    """

    def __init__(self, clip=None, pickscore=None, dino=None):
        super().__init__()
        self.processors, self.resize, self.missing = {}, {}, {}
        for name, cls, source, processor, its_source in (
                ("clip", CLIPModel, clip or CLIP, CLIPProcessor, clip or CLIP),
                ("pickscore", CLIPModel, pickscore or PICKSCORE, CLIPProcessor,
                 pickscore or PICKSCORE_PROCESSOR),
                ("dino", Dinov2Model, dino or DINO, BitImageProcessor, dino or DINO)):
            try:
                network = load_part(cls, source, None, torch.float32)
            except UserError as error:
                raise UserError(f"{error}; or give a folder: --{name}") from error
            self.add_module(name, network.requires_grad_(False))
            # Each network was trained on pictures of its own size and colour scale; its processor
            # knows them. Scores change with the resizing, so the protocol in results.json names it.
            with loading(processor.__name__, its_source):
                self.processors[name] = processor.from_pretrained(its_source)
            one = getattr(self.processors[name], "image_processor", self.processors[name])
            self.resize[name] = f"{type(one).__name__} {dict(one.size)}, crop {dict(one.crop_size)}"
        self.lpips = None
        try:
            import lpips
        except ImportError:
            self.missing["lpips"] = "the package lpips is not installed (pip install lpips)"
            return
        # The package reads its own and torchvision's weights; ours would be a copy of them.
        self.lpips = lpips.LPIPS(net="alex", verbose=False).eval().requires_grad_(False)
        self.resize["lpips"] = f"bicubic, antialiased, {LPIPS_SIDE}"

    def forward(self, pictures, prompt):
        """({name: number}, features [n, F]) of pictures [n, 3, H, W] of one prompt."""
        device = self.dino.device
        # The processors take 8-bit images, as they lie in files.
        images = list((pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
        # A CLIP's logit is exp(logit_scale)·cosine. PickScore is that logit; the CLIP score is the
        # bare cosine, so the scale is divided out again.
        clip = self.logits("clip", images, prompt).mean() / self.clip.logit_scale.exp()
        values = {"clip_score": clip, "pick_score": self.logits("pickscore", images, prompt).mean()}
        if self.lpips:
            values["lpips"] = self.mean_distance(pictures.to(device))
        # The features: DINOv2's vector for the whole picture.
        inputs = self.processors["dino"](images=images, return_tensors="pt").to(device)
        return values, self.dino(**inputs).pooler_output.cpu()            # n×F

    def logits(self, name, images, prompt):
        """How well each image fits the prompt, [n, 1], by the CLIP of that name."""
        network = getattr(self, name)
        # truncation: a CLIP reads 77 tokens and fails on more.
        inputs = self.processors[name](images=images, text=[prompt], padding=True, truncation=True,
                                       return_tensors="pt")
        return network(**inputs.to(network.device)).logits_per_image

    def mean_distance(self, pictures):
        """LPIPS, mean over all pairs of the pictures [n, 3, H, W]."""
        small = torch.nn.functional.interpolate(pictures, (LPIPS_SIDE, LPIPS_SIDE), mode="bicubic",
                                                antialias=True)
        small = small * 2 - 1                                             # LPIPS wants [−1, 1]
        pairs = itertools.combinations(small.split(1), 2)                 # n(n − 1)/2 of 1×3×H×W
        return torch.cat([self.lpips(a, b) for a, b in pairs]).mean()
