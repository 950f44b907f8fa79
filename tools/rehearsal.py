"""A rehearsal: the turns of a training run on fake tensors, and what is alive while they run.

    tools/plan.py makes the plan of --dry-run from it; this file has no command

The training scripts' own functions are run once at the true sizes. Fake tensors have shapes and no
numbers, so that SD3.5-Large rehearses in half a minute on a laptop. After each operation the bytes
of all live tensors are known, by kind. So networks, gradients, optimisers and activations are
counted where they live, and what never lives at the same time is never added.

One process, one sample at a time. What a GPU library takes for itself is not seen: workspaces of
convolutions and matrix products, fragments of memory (plan.ROOM).
"""

import contextlib
import dataclasses
import gc
import sys
import weakref
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cache import CachedSD3, make_compensation
from model import (BACKBONE, BACKBONE_REVISION, Decoder, Discriminator, add_lora,
                   empty_transformer)
from sampler import guided_velocity, roll_out, sigma_grid
from tools import random_model

# ================================================================== counting bytes

# What fully_shard spreads over the GPUs; all other kinds are whole on each. Made of weights are the
# bf16 copies that autocast takes, and weights divided by their spectral norm.
SHARDED = ("teacher", "student", "fake score", "optimiser", "gradients")
KINDS = (*SHARDED, "f", "discriminator", "VAE", "reference maker", "position tables",
         "made of weights", "activations")


class Memory(TorchDispatchMode):
    """Sees every operation and keeps account of the bytes that are alive, by kind. A storage counts
    once, however many tensors look at it, from its making until Python drops it."""

    def __init__(self):
        super().__init__()
        self.live = dict.fromkeys(KINDS, 0)
        self.kind_of = {}                                 # of each live storage
        self.new = "activations"                          # the kind of what is made now
        self.moments = []                                 # bytes of all kinds whenever they grew

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            # .item(): a fake tensor has no number. The loops ask for norms and sigmas alone, and
            # any number leads them the same way.
            return 0.5
        answer = function(*args, **(kwargs or {}))
        new = [tensor for tensor in tree_leaves(answer)
               if isinstance(tensor, FakeTensor) and self.kind(tensor) is None]
        if new:
            kind = self.new
            used = {self.kind(tensor) for tensor in tree_leaves((args, kwargs))
                    if isinstance(tensor, FakeTensor)}
            if kind == "activations" and used and not used & {"activations", None}:
                kind = "made of weights"                  # it does not grow with the samples
            for tensor in new:
                self.add(tensor, kind)
            self.moments.append(tuple(self.live.values()))
        return answer

    def kind(self, tensor):
        """The kind of a tensor's storage, or None when it is new."""
        return self.kind_of.get(tensor.untyped_storage()._cdata)

    def add(self, tensor, kind):
        """Counts a tensor's storage until it is gone."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.kind_of:
            self.kind_of[key] = kind
            self.live[kind] += size
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.live[self.kind_of.pop(key)] -= size

    def move(self, tensor, kind):
        """Says what a tensor is that was made as something else."""
        storage = tensor.untyped_storage()
        self.live[self.kind(tensor)] -= storage.nbytes()
        self.live[kind] += storage.nbytes()
        self.kind_of[storage._cdata] = kind

    @contextlib.contextmanager
    def making(self, kind):
        """What is made inside is of that kind."""
        before, self.new = self.new, kind
        try:
            yield
        finally:
            self.new = before

    def fill(self, net, kind):
        """Gives a network of the meta device fake weights of that kind; their gradients are of the
        kind "gradients" where weights are sharded, else they belong to the network."""
        of_gradients = "gradients" if kind in SHARDED else kind
        for module in net.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    with self.making(kind):
                        data = torch.empty(p.shape, dtype=p.dtype)
                    module._parameters[name] = torch.nn.Parameter(data, p.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    with self.making("position tables" if kind in SHARDED else kind):
                        module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        for p in net.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(
                    lambda p: self.move(p.grad, of_gradients))


@contextlib.contextmanager
def like_cuda():
    """Lets transformers compute as on CUDA, where call_network turns autocast on. Fake CUDA tensors
    would need a CUDA build of PyTorch, so these are of the CPU, whose autocast differs in what
    matters here by one rule: CUDA's runs layer norms in fp32."""
    forward, layer_norm = CachedSD3.forward, torch.nn.functional.layer_norm

    def in_bf16(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs)

    def in_fp32(x, *args, **kwargs):
        return layer_norm(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

    with (mock.patch.object(CachedSD3, "forward", in_bf16),
          mock.patch.object(torch.nn.functional, "layer_norm", in_fp32)):
        yield


# ================================================================== networks without weights

def picture_networks(preset, stage):
    """(Decoder, Discriminator or None in Stage I) on the meta device. Nothing is downloaded for a
    preset whose architecture is known."""
    from diffusers import AutoencoderKL
    from transformers import AutoConfig, ConvNextV2Backbone, ConvNextV2Config
    if preset.architecture:
        vae, backbone = random_model.SD3_VAE, ConvNextV2Config(**random_model.CONVNEXT_BASE)
    else:
        vae = AutoencoderKL.load_config(preset.source, subfolder="vae")
    if stage == 2 and not preset.architecture:
        revision = BACKBONE_REVISION if preset.discriminator == BACKBONE else None
        backbone = AutoConfig.from_pretrained(preset.discriminator, revision=revision)
        backbone.out_features = backbone.stage_names[1:]
    with torch.device("meta"):
        decode = Decoder.__new__(Decoder)                 # its __init__ would read the weights
        decode.vae = AutoencoderKL.from_config(vae).eval().requires_grad_(False)
        if stage == 1:
            return decode, None
        with mock.patch("model.load_backbone", lambda source: ConvNextV2Backbone(backbone)):
            return decode, Discriminator(preset)


def networks(stage, settings, config, span, half, checkpointing, decode, discriminator):
    """{kind: network} of a stage on the meta device, as its script makes them. Sets dtype and
    checkpointing of the decoder, too."""
    frozen = torch.bfloat16 if half else torch.float32
    decode.vae.to(frozen)
    student = empty_transformer(config)
    nets = {"student": student}
    if stage == 1:
        nets["fake score"] = empty_transformer(config)
        nets["teacher"] = empty_transformer(config, frozen).requires_grad_(False)
    else:
        nets["reference maker"] = empty_transformer(config, frozen).requires_grad_(False)
        nets["discriminator"] = discriminator
    with torch.device("meta"):
        if span and not settings.no_compensation:
            nets["f"] = make_compensation(student.inner_dim)
        if stage == 2 and settings.lora_rank:
            add_lora(student, settings.lora_rank, seed=0)
    if checkpointing:
        student.enable_gradient_checkpointing()
        nets.get("fake score", student).enable_gradient_checkpointing()
        if stage == 2:
            decode.vae.enable_gradient_checkpointing()
    return nets


# ================================================================== the turns
# Each is what its script's loop does with one sample, and returns whose turn it was: the kinds of
# networks that take a step at its end.

def script_of(settings):
    """The training script whose settings these are. Not imported: the script imports this file."""
    return sys.modules[type(settings).__module__]


def stage1_turns(nets, settings, shape, prompt, sigmas):
    """{turn: function} of train_stage1.main."""
    student, fake_score, script = nets["student"], nets["fake score"], script_of(settings)
    part = script.draw_batch(0, settings, shape, sigmas, [""])
    part |= {"embeds": prompt[0], "pooled": prompt[1]}

    def of_fake_score():
        script.add_path(part, student, sigmas)            # kept for the student's turn
        script.fake_score_turn(fake_score, part, sigmas, settings.form).backward()
        return ["fake score"]

    def of_student():
        uncond = [tensor.clone() for tensor in prompt]
        loss, _ = script.student_turn(student, nets["teacher"], fake_score, part, uncond, sigmas,
                                      settings)
        loss.backward()
        return ["student"]
    return {"fake score's turn": of_fake_score, "student's turn": of_student}


def stage2_turns(nets, settings, decode, shape, prompt, sigmas, span):
    """{turn: function} of train_stage2.main."""
    student, f, discriminator = nets["student"], nets.get("f"), nets["discriminator"]
    script = script_of(settings)

    def sample():
        with torch.no_grad():
            latents, _, delta = roll_out(student, torch.randn(1, *shape), prompt, sigmas[:-1], span,
                                         f)
        return script.last_step(student, latents[-1], prompt, sigmas, span, delta, f)

    def d():
        with torch.no_grad():
            picture = decode(sample())
        reference = torch.zeros_like(picture)
        script.discriminator_turn(discriminator, picture, reference)[0].backward()
        return ["discriminator"]

    def g():
        script.generator_turn(discriminator, decode, sample()).backward()
        return ["student", "f"] if f is not None else ["student"]
    return {"D's turn": d, "G's turn": g}


def few_pictures(nets, decode, shape, prompt, sigmas, span, count):
    """The turns that take `count` samples whatever the batch size is, and decode one by one: the
    grid of samples that a run shows, and in Stage II the references."""
    prompt = [tensor.expand(count, *tensor.shape[1:]) for tensor in prompt]

    @torch.no_grad()
    def grid():
        latents, _, _ = roll_out(nets["student"], torch.randn(count, *shape), prompt, sigmas, span,
                                 nets.get("f"))
        decode(latents[-1][:1])
        return []

    @torch.no_grad()
    def references():
        maker = nets.pop("reference maker")               # gone after this turn
        x = torch.randn(count, *shape)
        decode(guided_velocity(maker, x, 0.5, prompt, prompt, 7.0, 1.0)[:1])
        return []
    return {"references": references, "sample grid": grid}


def rehearse(stage, preset, settings, shape, config, steps, span, checkpointing):
    """{turn: bytes [moments, kinds]} of a run that takes one sample at a time on one GPU."""
    half, tiny = settings.device != "cpu", preset.captions == "tiny"
    decode, discriminator = picture_networks(preset, stage)
    nets = networks(stage, settings, config, span, half, checkpointing, decode, discriminator)
    sigmas, memory, found, optimizers = sigma_grid(steps), Memory(), {}, []
    with (FakeTensorMode(allow_non_fake_inputs=True), memory,
          like_cuda() if half else contextlib.nullcontext()):
        memory.fill(decode.vae, "VAE")
        for kind, net in nets.items():
            memory.fill(net, kind)
        prompt = [torch.zeros(1, *size, dtype=torch.bfloat16 if half else torch.float32)
                  for size in prompt_sizes(preset, config)]
        turns = few_pictures(nets, decode, shape, prompt, sigmas, span, 8 if tiny else 4)
        grid = {"sample grid": turns.pop("sample grid")}
        if stage == 1:
            one = dataclasses.replace(settings, batch_size=1)
            turns = stage1_turns(nets, one, shape, prompt, sigmas)
        else:
            turns |= stage2_turns(nets, settings, decode, shape, prompt, sigmas, span)
        for name, turn in (turns | grid).items():
            memory.moments = []
            for kind in turn():                           # whose turn it was takes a step
                learning = [p for p in nets[kind].parameters() if p.requires_grad]
                optimizers.append(torch.optim.AdamW(learning, fused=True))
                with memory.making("optimiser" if kind in SHARDED else kind):
                    optimizers[-1].step()
            for net in nets.values():
                net.zero_grad(set_to_none=True)
            gc.collect()                                  # frees what refers to itself
            found[name] = memory.moments
    return {name: torch.tensor(moments, dtype=torch.float64) for name, moments in found.items()}


def prompt_sizes(preset, config):
    """The sizes of an encoded prompt: embeds [L, J] and pooled [P]."""
    return (preset.tokens, config["joint_attention_dim"]), (config["pooled_projection_dim"],)
