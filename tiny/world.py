"""The miniature world: pictures drawn by code, their captions, and an exact reader.

A picture shows one shape in one colour on one of four scenes. The caption names shape and colour,
never the scene; but the scene depends on the shape: its usual scene comes with probability 0.55,
the three others with 0.15 each. Guidance amplifies the usual scene, as it does for real models, and
so the mode collapse that the paper cures becomes a number: the share of the usual scene and the
entropy over scenes.

The teacher that was trained on this world lies in tiny/sd3: a genuine Stable Diffusion 3 pipeline,
only small. tiny/make_teacher.py makes it again.

Dimension key: B batch, T shape templates; pictures [B, 3, 32, 32] in [0, 1].
"""

import functools

import torch
import torch.nn.functional as F

SIZE = 32
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (0.90, 0.12, 0.12), "green": (0.10, 0.62, 0.20), "blue": (0.12, 0.25, 0.90),
           "yellow": (1.00, 0.88, 0.10), "purple": (0.60, 0.15, 0.75), "white": (1.00, 1.00, 1.00)}
PAINTS = torch.tensor(list(COLOURS.values()))                          # 6 × 3
SCENES = ("day", "beach", "night", "dusk")
RADII = (6, 7, 8)                     # of the shapes, in pixels
P_USUAL = 0.55                        # of a shape's usual scene; each of the three others 0.15
SPECKLED = 0.02                       # error_inside above which the eye sees specks
CAPTIONS = [f"a {colour} {shape}" for shape in SHAPES for colour in COLOURS]  # 24: shape·6 + colour
WORDS = {word for caption in CAPTIONS for word in caption.split()}


# ================================================================== drawing

def scenes():
    """The four backgrounds, [4, 3, 32, 32]: a sky that fades towards the horizon, and a ground."""
    sky_top, sky_low, ground = (torch.tensor(rows) for rows in zip(
        ((0.30, 0.60, 0.95), (0.62, 0.82, 0.97), (0.50, 0.70, 0.40)),      # day
        ((0.45, 0.85, 0.85), (0.70, 0.90, 0.80), (0.88, 0.75, 0.52)),      # beach
        ((0.02, 0.02, 0.10), (0.12, 0.14, 0.30), (0.20, 0.22, 0.25)),      # night
        ((0.40, 0.25, 0.45), (0.98, 0.60, 0.40), (0.30, 0.20, 0.18)),      # dusk
        strict=True))
    y = torch.linspace(0, 1, SIZE)
    fade = (y / 0.7).clamp(max=1)[None, None, :, None]                     # 1 at the horizon
    sky = sky_top[:, :, None, None] * (1 - fade) + sky_low[:, :, None, None] * fade
    below = (y > 0.7).float()[None, None, :, None]
    return (sky * (1 - below)
            + ground[:, :, None, None] * below).expand(-1, -1, -1, SIZE).contiguous()


@functools.cache
def templates():
    """(masks [T, 32, 32] in [0, 1], shape index [T])
    for every shape, radius and position that fits the picture."""
    # 4×4 samples a pixel against jagged edges
    fine = (torch.arange(SIZE * 4) + 0.5) / 4
    masks, shapes = [], []
    for shape in range(len(SHAPES)):
        for r in RADII:
            centre = torch.arange(r + 1, SIZE - r, dtype=torch.float32)  # n positions along an axis
            d = fine[None] - centre[:, None]                             # n × 128
            x, y = d[None, :, None, :], d[:, None, :, None]              # to n × n × 128 × 128
            if shape == 0:
                inside = x ** 2 + y ** 2 <= r ** 2
            elif shape == 1:
                inside = (x.abs() <= 0.85 * r) & (y.abs() <= 0.85 * r)
            elif shape == 2:
                inside = (y <= 0.8 * r) & (x.abs() <= 0.55 * (y + r))
            else:
                arm = 0.33 * r
                inside = ((x.abs() <= arm) & (y.abs() <= r)) | ((y.abs() <= arm) & (x.abs() <= r))
            mask = F.avg_pool2d(inside.float().flatten(0, 1)[:, None], 4)[:, 0]   # n² × 32 × 32
            masks.append(mask)
            shapes.append(torch.full((len(mask),), shape))
    return torch.cat(masks), torch.cat(shapes)


def draw(template, colour, scene):
    """Pictures [B, 3, 32, 32] in [0, 1] from three index tensors [B]."""
    mask = templates()[0][template][:, None]
    paint = PAINTS[colour][:, :, None, None]
    return scenes()[scene] * (1 - mask) + paint * mask


def sample_labels(n, generator, captions=None):
    """Index tensors [n] (template, colour, scene) drawn from the world;
    captions [n] fixes shape and colour."""
    if captions is None:
        captions = torch.randint(len(CAPTIONS), (n,), generator=generator)
    shape, colour = captions // len(COLOURS), captions % len(COLOURS)
    per_shape = len(templates()[1]) // len(SHAPES)                    # templates grouped by shape
    template = shape * per_shape + torch.randint(per_shape, (n,), generator=generator)
    other = torch.randint(1, len(SCENES), (n,), generator=generator)
    unusual = torch.rand(n, generator=generator) >= P_USUAL
    return template, colour, (shape + other * unusual) % len(SCENES)  # scene i is usual for shape i


# ================================================================== reading

@functools.cache
def _template_norms():
    """‖mask·(colour − scene)‖² for each scene, colour and template, [4, 6, T]."""
    masks = templates()[0].flatten(1)                                           # T × 1024
    contrast = PAINTS[None, :, :, None] - scenes().flatten(2)[:, None]          # 4 × 6 × 3 × 1024
    return (contrast ** 2).sum(2) @ (masks ** 2).T


def read(pictures):
    """Reads pictures [B, 3, 32, 32] in [0, 1]: dict of shape, colour, scene (indices [B]), error
    and error_inside (RMS [B]).

    The exact reader: the rendering with the least squared error among every template × colour ×
    scene. No network is involved, so none can fool it. error says how far the picture is from any
    true one; error_inside leaves out the pixels within two of the shape's outline, where an edge
    that is a little soft or moved counts most.
    """
    masks, shapes = templates()
    flat, backgrounds = masks.flatten(1), scenes().flatten(2)                   # T × 1024, 4×3×1024
    masked_scenes = backgrounds @ flat.T                                        # 4 × 3 × T
    result = {key: [] for key in ("shape", "colour", "scene", "error", "error_inside")}
    for chunk in pictures.float().cpu().split(64):
        # With rest = picture − scene and contrast = colour − scene,
        # ‖rest − mask·contrast‖² = ‖rest‖² − 2⟨mask, rest·contrast⟩ + ‖mask·contrast‖².
        rest = chunk.flatten(2)[:, None] - backgrounds                          # B × 4 × 3 × 1024
        # ⟨mask, rest·contrast⟩ = colour·⟨mask, rest⟩ − ⟨mask, rest·scene⟩: each mask meets seven
        # maps a picture and not one for each scene and colour.
        masked = (chunk.flatten(2) @ flat.T)[:, None] - masked_scenes           # B × 4 × 3 × T
        inner = PAINTS @ masked - ((rest * backgrounds).sum(2) @ flat.T)[:, :, None]
        error = (rest ** 2).sum((2, 3))[:, :, None, None] - 2 * inner + _template_norms()
        least, index = error.flatten(1).min(1)
        scene, colour, template = torch.unravel_index(index, error.shape[1:])
        difference = (chunk - draw(template, colour, scene)).square().mean(1)   # B × 32 × 32
        # Away from the outline the mask does not change within two pixels.
        mask = masks[template][:, None]
        largest = F.max_pool2d(mask, 5, stride=1, padding=2)
        smallest = -F.max_pool2d(-mask, 5, stride=1, padding=2)
        inside = (largest == smallest)[:, 0]
        error_inside = (difference * inside).sum((1, 2)) / inside.sum((1, 2))
        for key, value in zip(result, (shapes[template], colour, scene,
                                       (least.clamp(min=0) / chunk[0].numel()).sqrt(),
                                       error_inside.sqrt()), strict=True):
            result[key].append(value)
    return {key: torch.cat(values) for key, values in result.items()}


def scene_entropy(scene):
    """Plug-in entropy in nats of scene indices [..., n] over the last axis:
    0 = always the same, 1.386 = uniform."""
    share = F.one_hot(scene, len(SCENES)).float().mean(-2)
    return -(share * share.clamp(min=1e-12).log()).sum(-1)


def measure(pictures, captions):
    """What the reader finds, for pictures [B, 3, 32, 32] and caption indices [B]
    with n pictures for each caption.

    Returns per-picture tensors right, usual_scene, speckled (0/1) and read_error, [B] each, and
    per-caption scene_entropy [B/n].
    """
    seen, shape = read(pictures), captions // len(COLOURS)
    right = (seen["shape"] == shape) & (seen["colour"] == captions % len(COLOURS))
    by_caption = torch.stack([seen["scene"][captions == c] for c in captions.unique()])
    return {"right": right.float(), "usual_scene": (seen["scene"] == shape).float(),
            "scene_entropy": scene_entropy(by_caption), "read_error": seen["error"],
            "speckled": (seen["error_inside"] > SPECKLED).float()}
