"""The block cache and its learned compensation f (paper, cache figure): a second step at two thirds
of the cost.

In step one the residual of a span of blocks n..m is recorded, of the image and the text stream:
    Δ0 = O_m,0 − I_n,0           output of block m minus input of block n; the second index counts
                                 the steps from 0, as in the paper: 0 is step one
In step two the span is skipped, and a small MLP f for each stream makes from Δ0 what is added:
    O_m,1 = I_n,1 + f(Δ0)        f(x) = x + W2·GELU(W1·LayerNorm(x))
f is trained on the picture that comes out, by the adversarial loss alone. It is not regressed on
step two's own residual: in the miniature f(Δ0) is no nearer to that one than Δ0 is, and yet the
pictures are better (part 4 of docs/walkthrough.ipynb).

This file holds f, the transformer's forward written out with the span in it (CachedSD3), and an
adapter that takes the cached path inside a stock pipeline (BlockCache). It imports nothing of ours,
so it can be copied out. What trains f is train_stage2.py; what finds a span is tools/find_span.py.

Dimension key: B batch, C latent channels, H W latent size, T image tokens, L text tokens, D width
of a token, J and P widths of the two text embeddings, one for each token and one for the prompt.
"""

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn


def nfe(steps, span, blocks):
    """Network evaluations, counted in blocks: the first step in full, each later one without the
    span (n, m), or in full where span is None. SD3-Medium has 24 blocks: span 2-9 gives 1.667, span
    2-7 gives 1.75. f is not counted; of SD3-Medium it costs a quarter of a block, 0.01 of an
    evaluation."""
    skipped = span[1] - span[0] + 1 if span else 0
    return steps - (steps - 1) * skipped / blocks


# ================================================================== f, the learned compensation

class Compensation(nn.Module):
    """f of one stream: f(x) = x + W2·GELU(W1·LayerNorm(x)) for x [B, tokens, D].

    It works on each token alone and is told neither σ nor the prompt [official].
    """

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)             # W1; hidden width 2·D [official]
        self.down = nn.Linear(2 * width, width)           # W2
        # W2 starts at zero, so f(Δ0) = Δ0: training begins exactly at plain reuse, the known
        # baseline [official]. (In the miniature a random start gives no other result in the end:
        # docs/RESULTS.md.)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x):
        # Autocast may have recorded Δ0 in bf16; f's weights are fp32 while they learn.
        x = x.to(self.up.weight.dtype)
        hidden = self.up(self.norm(x))                                    # B×tokens×2D
        return x + self.down(nn.functional.gelu(hidden))                  # B×tokens×D


def make_compensation(width):
    """f of both streams, a module with "image" and "text". SD3-Medium (D = 1536): 18.9 M
    parameters."""
    return nn.ModuleDict({"image": Compensation(width), "text": Compensation(width)})


# f = 0, the baseline "skipped": the span is left out with nothing in its place.
NOTHING = {"image": torch.zeros_like, "text": torch.zeros_like}


# ================================================================== the transformer's forward

class CachedSD3(SD3Transformer2DModel):
    """Stable Diffusion 3's transformer (MMDiT) with its forward written out and the cache in it.

    Weights, sub-modules and config are the stock class's; only forward is ours, equal to the stock
    one bit for bit when span is None. All transformers that the scripts run are of this class;
    saved folders are stock folders (model.save_transformer).

    What an MMDiT is: two streams of tokens, image and text, with weights of their own, that meet in
    the attention of every block. A block takes (image, text, temb) and returns (text, image): each
    stream plus what the block added to it. temb is one vector for each sample, made of the timestep
    and the pooled prompt; it scales and shifts the streams inside every block. The last block
    returns no text, since nothing reads it. So a span must end before the last block:
    that one has no text residual, and no later block could correct what was reused.
    """

    def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep,
                span=None, delta=None, f=None, return_dict=False):
        """(velocity [B, C, H, W], Δ0 or None) at latents hidden_states [B, C, H, W].

        timestep [B] is 1000·σ. encoder_hidden_states [B, L, J] has one vector for each text
        token, pooled_projections [B, P] one for the whole prompt. The long names are
        diffusers'.

        span None            all blocks run; Δ0 is None
        span (n, m)          all blocks run; Δ0 (image [B, T, D], text [B, L, D]) is recorded
        span (n, m), delta   blocks n..m are skipped, f(delta) stands in for them (f None: plain
                             reuse, delta itself); the same delta is returned
        """
        assert not return_dict, "this forward returns a tuple"
        assert span or delta is None, "a residual belongs to a span"
        first, last = check_span(span, len(self.transformer_blocks)) if span else (None, None)
        reuse = delta is not None
        side = hidden_states.shape[-2:]

        # Both streams become tokens of width D. pos_embed is diffusers' name for two things: it
        # makes a token of each patch of 2×2 latents, and adds where the patch lies.
        # context_embedder is a linear layer, time_text_embed an MLP of the timestep plus one of the
        # pooled prompt. (contiguous: copied once here, or each layer norm would copy it again.)
        image = self.pos_embed(hidden_states).contiguous()                # B×C×H×W → B×T×D
        text = self.context_embedder(encoder_hidden_states)               # B×L×J → B×L×D
        temb = self.time_text_embed(timestep, pooled_projections)         # B×D

        for i, block in enumerate(self.transformer_blocks):
            if i == first:
                # I_n: what goes into the span. In step two it is up to date, because the blocks
                # before the span have run.
                image_in, text_in = image, text
                if reuse:
                    # O_m,1 = I_n,1 + f(Δ0): only the span's own contribution is borrowed from step
                    # one, and f corrects it for step two. (f may be fp32 where the
                    # streams are bf16.)
                    added = apply_compensation(f, delta)
                    image = image_in + added[0].to(image.dtype)           # B×T×D
                    text = text_in + added[1].to(text.dtype)              # B×L×D
            if reuse and first <= i <= last:
                continue
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                # torch.utils.checkpoint, switched on by diffusers' enable_gradient_checkpointing():
                # keeps the block's inputs only and runs it again in backward. Less memory, a third
                # more time.
                text, image = self._gradient_checkpointing_func(block, image, text, temb)
            else:
                text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb)
            if i == last and not reuse:
                # Δ0: what the span added, not what came out of it. Detached: step two must not
                # train through step one (official: step one runs without gradient).
                delta = (image - image_in).detach(), (text - text_in).detach()

        # The image's tokens become a velocity again: norm_out is a LayerNorm that temb scales and
        # shifts, proj_out a linear layer. The text stream has done its work.
        image = self.norm_out(image, temb)                                # B×T×D
        patches = self.proj_out(image)                                    # B×T×(2·2·C)
        return unpatchify(patches, *side, self.config.patch_size), delta


def unpatchify(patches, height, width, p):
    """Tokens [B, T, p·p·C] back to their places in [B, C, H, W]; p is the side of a patch."""
    x = patches.reshape(len(patches), height // p, width // p, p, p, -1)  # B×rows×columns×p×p×C
    x = torch.einsum("bhwpqc->bchpwq", x)                                 # B×C×rows×p×columns×p
    return x.reshape(len(patches), -1, height, width)                     # B×C×H×W


def check_span(span, blocks):
    """(n, m) of a span, both ends skipped; ValueError unless 0 ≤ n ≤ m ≤ blocks − 2."""
    if len(span) != 2:
        raise ValueError(f"a span is two numbers, its first and its last block, not {span}")
    first, last = span
    if not 0 <= first <= last <= blocks - 2:
        raise ValueError(f"span {first}-{last} does not fit: this model has blocks 0-{blocks - 1}, "
                         "and the last one cannot be cached, so a span ends at "
                         f"{blocks - 2} at most")
    return first, last


def apply_compensation(f, delta):
    """f(Δ0) of both streams, (image [B, T, D], text [B, L, D]). f None is plain reuse: Δ0
    itself."""
    if f is None:
        return delta
    return f["image"](delta[0]), f["text"](delta[1])


# ================================================================== in a stock pipeline
# From here on: the cache for users of diffusers. Skip it when you read beside the paper.

class BlockCache:
    """The cached path inside a stock StableDiffusion3Pipeline:

        cache = BlockCache(pipe.transformer, (1, 4), f)
        pipe("a red circle", sigmas=[1.0, 0.5], num_inference_steps=2, guidance_scale=1.0,
             max_sequence_length=0)
        cache.remove()

    A pipeline calls its transformer once for each step and knows nothing of Δ0, so it is kept here
    between the calls. The first call of a sample path records it, the steps − 1 calls after it
    reuse it. A call belongs to the path if it brings the same prompt tensor, the same shape and a
    smaller timestep than the one before; any other call begins a path of its own and runs in full.
    After a path that was cut short make a new cache. One cache for a transformer, one thread at a
    time; make it before the pipeline is offloaded, if it is. ValueError for a span that does not
    fit, and for an argument of the call that changes what happens inside the span.
    """

    def __init__(self, transformer, span, f=None, steps=2):
        self.span = check_span(span, len(transformer.transformer_blocks))
        self.transformer, self.f, self.steps = transformer, f, steps
        self.steps_left = 0                               # of the path
        self.delta = self.prompt = self.shape = self.timestep = None
        # An attribute of this one object: a module's call finds it before its class's forward.
        transformer.forward = self

    def remove(self):
        """Takes the cache off: the transformer is the stock one again."""
        del self.transformer.forward

    def __call__(self, hidden_states, encoder_hidden_states, pooled_projections, timestep, *,
                 return_dict=True, **others):
        # Guidance by skipped layers and ControlNet change what happens inside the span; with Δ0
        # from another call they would be lost, or counted twice, without a word.
        for name, value in others.items():
            if value:                                     # pipelines pass None or {}
                raise ValueError(f"{name} does not go together with a block cache; remove() the "
                                 "cache or leave it out")
        now = float(timestep.max())
        continues = (self.steps_left > 0 and encoder_hidden_states is self.prompt
                     and hidden_states.shape == self.shape and now < self.timestep)
        if not continues:
            self.delta, self.steps_left = None, self.steps
        self.steps_left -= 1
        # CachedSD3's forward needs nothing but the stock sub-modules, so it runs on a stock object.
        velocity, self.delta = CachedSD3.forward(
            self.transformer, hidden_states, encoder_hidden_states, pooled_projections, timestep,
            self.span, self.delta, self.f)
        self.prompt, self.shape, self.timestep = encoder_hidden_states, hidden_states.shape, now
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)
