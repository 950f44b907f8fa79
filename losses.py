"""The mathematics of 1.x-Distill: tensors in, tensors out. Read this file first.

In the order of the method: re-noising, the guidance rule (Eq. 4), the importance curve, the losses
of Stage I, the losses of Stage II. No model, no settings, no device: this file imports torch alone.
The loops that put these functions together are train_stage1.py and train_stage2.py.

Conventions of the whole project (rectified flow):
    x_σ = (1 − σ)·x0 + σ·ε       σ in [0, 1]; σ = 1 is noise, σ = 0 is the picture's latent
    v   = ε − x0                 what the network predicts; it points from the picture to noise
    x0  = x_σ − σ·v              so one answer of the network is also a guess of the picture: x̂0
    score = −E[ε|x_σ]/σ          and E[ε|x_σ] = x_σ + (1 − σ)·v: a network that predicts v knows
                                 the score, too, hence "fake score"
    timestep = 1000·σ            what the network is told (model.velocity does it)
    σ = 3u/(1 + 2u)              u in [0, 1] is time before the shift (shift_sigma)
    p                            the student's sample at the end of a step: what the loss judges

Dimension key: B batch, C latent channels, H W latent size. Latents are [B, C, H, W] and fp32,
sigmas are [B] (or one number), fp32 and on the CPU; to_shape takes them to the latents' device.

We do not have the paper's body: only Eq. 4 can be cited by its number, the rest by part or figure.
With the paper in hand, find here what computes it, and the test in test_all.py that pins it
(`pytest test_all.py -k NAME`):

    paper, or official file      function                           NAME of the test
    Eq. 4                        guidance_weight, guide             guidance
    overview figure, Stage I     train_stage1.fake_score_turn       turn_of_stage_one
                                 train_stage1.student_turn          turn_of_stage_one
      "add noise to t"           renoise                            renoising
      "function-c"               importance_curve                   importance
                                 draw_sigma                         importance
      L_dmd                      dmd_loss                           score_difference
    overview figure, Stage II    train_stage2.discriminator_turn    discriminator_turn
                                 train_stage2.generator_turn        generator_turn
    cache figure, Δ0             cache.CachedSD3                    cached_step
      f                          cache.Compensation                 f_is_its_formula
      reuse error                tools/find_span.py                 (tools/test_tools.py)
    Table 1, NFE                 cache.nfe                          papers_numbers
    official processor.py        sampler.sigma_grid                 sigma_grid
                                 step_end, renoise_window           own_window
    official train_stage1.py     fake_score_loss                    fake_score_loss
                                 dmd_loss_official                  turn_of_stage_one
    official train_stage2.py     train_stage2.turn_of               turns_are
    official model/D.py          model.Discriminator                discriminator_is
    official losses of Stage II  discriminator_loss                 discriminator_turn
                                 generator_loss                     generator_turn

Constants carry their origin: [paper] ("second hand": quoted by others), [official] (the released
code's value) or [ours]. "Deviation n" is an entry of docs/DEVIATIONS.md.
"""

import torch
import torch.nn.functional as F

GRID = 1000         # [official] intervals of the training grid; index i is time u = 1 − i/1000
EPSILON = 1e-6      # [ours] keeps divisions finite; the official code divides without one


# ================================================================== the flow

def shift_sigma(u, shift=3.0):
    """Uniform time u in [0, 1] to σ = s·u / (1 + (s − 1)·u), a number or a tensor.

    SD3 samples with s = 3: more of its steps lie at high noise, where the layout begins.
    """
    return shift * u / (1 + (shift - 1) * u)


def to_shape(sigma, x):
    """sigma [B] or a number, ready to multiply x [B, ...]."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    if sigma.ndim == 0:
        return sigma
    return sigma.reshape(-1, *[1] * (x.ndim - 1))                         # B → B×1×1×1


def x0_from_velocity(x, sigma, v):
    """The network's guess of the picture, x̂0 = x_σ − σ·v, for x, v [B, ...]."""
    return x - to_shape(sigma, x) * v


def euler(x, v, sigma, sigma_next):
    """One straight step along the flow: x at sigma_next from x at sigma, x + (σ_next − σ)·v. No
    noise is added."""
    return x + (to_shape(sigma_next, x) - to_shape(sigma, x)) * v


def renoise(x, a, b, noise):
    """x at level a < 1 to level b ≥ a with fresh noise (Stage I; official: processor.py).

    x_b = shrink·x_a + √(b² − (a·shrink)²)·noise   with   shrink = (1 − b)/(1 − a)

    At b = a that is x itself.
    """
    assert x.shape == noise.shape, "one noise for each latent"
    a = to_shape(a, x)
    b = to_shape(b, x)
    # x_a holds (1 − a)·x0, level b wants (1 − b)·x0.
    shrink = (1 - b) / (1 - a)
    # The shrinking takes the old noise with it, from a down to a·shrink, which is less than b.
    # Variances of independent noises add, so b² − (a·shrink)² is missing. Draw exactly that much.
    # At b ≈ a float error can make the difference negative, and its root NaN: clamp it.
    variance = (b ** 2 - (a * shrink) ** 2).clamp(min=0)
    return shrink * x + variance.sqrt() * noise


# ================================================================== teacher guidance (Eq. 4)

def guidance_weight(sigma, w, alpha):
    """The weight of the teacher's guidance at sigma (paper, Eq. 4): w where σ ≤ α, 1 above.

    sigma [B] or a number; returns the same shape. Weight 1 is no guidance. This is the rule: Stage
    I, the references of Stage II and the teacher's rows of the evaluation all come here, so whoever
    wants another rule changes this function and nothing else. Two things to know. For w = 1 it must
    return 1: a student that makes references (train_stage2's `--reference RUN`) is called with
    w = 1. And evaluate.py uses the new rule for its teacher, whatever rule a run was trained with.
    """
    # At high noise the layout begins. Guidance there pulls every sample to the most likely layout,
    # mostly while the guess x̂0 is still a blur (docs/RESULTS.md). The student sees only the guided
    # teacher, so it never learns the other layouts. Off at high noise, on below: the layouts stay
    # varied and the details still get their guidance.
    # α is compared with the shifted σ, inclusive, as in the official code (deviation 1: the paper's
    # own t may be unshifted, and u = 0.94 is σ = 0.979).
    return torch.where(torch.as_tensor(sigma) <= alpha, w, 1.0)


def guide(v_cond, v_uncond, weight):
    """Classifier-free guidance: v_uncond + weight·(v_cond − v_uncond), all [B, C, H, W];
    weight [B] or a number."""
    weight = to_shape(weight, v_cond)
    guided = v_uncond + weight * (v_cond - v_uncond)
    # At weight 1 the formula gives v_cond up to rounding. Take v_cond itself, to the last bit.
    return torch.where(weight == 1, v_cond, guided)


# ================================================================== which level to re-noise to

def importance_curve(name):
    """Weights [1001] over the training grid's index (0 = noise) for drawing the student's re-noise
    level (Stage I; a small plot in the paper's overview figure, titled "function-c").

    official  a hump, highest at σ = 0.912: the official code's preset c, not the plotted curve
    paper     read off that plot; its axis is taken as the unshifted u [ours, deviation 5]
    uniform   every index alike; the fake score always uses this one [official]
    """
    i = torch.arange(GRID + 1, dtype=torch.float64)                       # from noise to picture
    if name == "uniform":
        return torch.ones(GRID + 1)
    if name == "paper":
        u = (0.0, 0.2, 0.4, 0.5, 0.75, 1.0)
        probability = (1e-6, 2e-4, 4e-4, 7e-4, 2.3e-3, 1.4e-3)            # [ours] read off the plot
        return _interpolate(1 - i / GRID, u, probability).float()
    assert name == "official", name
    # Straight lines through four points: most weight at high noise, where structure is decided.
    # (How often each step is drawn is another matter: evenly, in train_stage1.draw_batch.)
    line = _interpolate(i, (0, 300, 500, 1000), (0.6, 1.3, 0.05, 0.001))  # [official]
    # Then a Gaussian blur with a standard deviation of 100 indices, cut off at 300 [official]. It
    # acts on the logarithm: the weights span three orders of magnitude, and a plain blur would wash
    # the small ones away. The result is highest at index 224, which is u = 0.776, σ = 0.912.
    offset = torch.arange(-300, 301, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offset / 100) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(line.log()[None, None], (300, 300), mode="replicate")  # 1×1×1601
    smooth = F.conv1d(padded, kernel[None, None])[0, 0]                   # 1001
    return smooth.exp().clamp(min=1e-6).float()


def _interpolate(x, xs, ys):
    """Straight lines through the points (xs, ys), evaluated at x."""
    xs = torch.tensor(xs, dtype=x.dtype)
    ys = torch.tensor(ys, dtype=x.dtype)
    right = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
    left = right - 1
    t = (x - xs[left]) / (xs[right] - xs[left])
    return ys[left] + t * (ys[right] - ys[left])


# Step k of the student leads from σ_k to σ_{k+1}. Which of its samples is compared with the
# teacher's? There are two readings, and `form` chooses one of them (deviation 2):
#   "window"   the official code: the sample at σ_{k+1}, re-noised to a level between σ_{k+1} and
#              σ_k. These levels are the step's window
#   "x0"       the paper's figure: the guess x̂0, whose level is 0, re-noised to any level
# In the last step both compare the same sample: there σ_{k+1} = 0.

def step_end(k, sigmas, form="window"):
    """The level of p, the sample that is judged, [B]: σ_{k+1}, where step k [B] ends; 0 in the x0
    form. sigmas [N + 1] is the student's grid."""
    if form == "x0":
        return torch.zeros(len(k))
    return sigmas[k + 1]


def renoise_window(k, sigmas, form="window"):
    """(high, low), each [B]: to which levels the sample of step k [B] may be re-noised, low < σ ≤
    high."""
    if form == "x0":
        return torch.ones(len(k)), torch.zeros(len(k))
    # Levels below σ_{k+1} belong to the next step, which is drawn, and compared, on its own. In
    # step one's window, σ from 0.75 to 1, the official curve draws 36 % above α = 0.94: there the
    # teacher is not guided.
    return sigmas[k], sigmas[k + 1]


def draw_sigma(random, high, low, weights):
    """Sigmas [B] of the training grid with low < σ ≤ high, drawn with the weights [1001].

    random [B] are uniform numbers in [0, 1); high, low [B] come from renoise_window().
    """
    grid = shift_sigma(1 - torch.arange(GRID + 1) / GRID)                 # 1001, falling from 1
    # 1. Which grid points lie in each sample's window? high belongs to it, low does not, whatever
    #    float rounding does: hence 1e-6.
    below_high = grid <= high[:, None] + 1e-6                             # B×1001
    above_low = grid > low[:, None] + 1e-6                                # B×1001
    inside = below_high & above_low
    assert inside.any(1).all(), "a window without a grid point"
    # 2. Draw one of them by inverse CDF, row by row. Weights 1, 2, 1 sum up to 1, 3, 4. A random
    #    number in [0, 4) falls into [0, 1), [1, 3) or [3, 4), each as often as it is wide. Scaling
    #    by the last sum renormalises the weights inside the window [official]: they decide within a
    #    step, not between steps.
    running = (weights.double() * inside).cumsum(1)                       # B×1001
    mark = random[:, None].double() * running[:, -1:]                     # B×1
    # 3. The first grid point whose running sum exceeds the mark. There is one: random is below 1.
    index = torch.searchsorted(running, mark, right=True)[:, 0]
    return grid[index]                                                    # B


# ================================================================== Stage I: distribution matching

def dmd_loss(p, p_teacher, p_fake):
    """Distribution matching (Stage I): a scalar whose gradient with respect to p is
    (p_fake − p_teacher) / mean|p − p_teacher|, for each sample, times 1/(B·C·H·W).

    p [B, C, H, W] is the student's sample, with gradient. Both networks have seen the same
    re-noised copy of it. p_teacher is where one Euler step with the teacher's velocity brings this
    copy, back at the level of p; p_fake the same by the fake score. Neither has a gradient.
    """
    assert p.ndim == 4 and p.shape == p_teacher.shape == p_fake.shape
    # 1. The direction. Nobody can compute the divergence between the student's and the teacher's
    # distributions. But its gradient is, on average over the noise, the difference of their scores
    # (docs/TEACHING.md derives it; the fake score stands for the student's):
    #     score_fake − score_teacher = (1 − σ)/σ · (v_teacher − v_fake)
    #     p_fake − p_teacher         = (σ − σ_{k+1}) · (v_teacher − v_fake)
    # The same direction, another weight.
    # 2. A loss with the gradient p_fake − p_teacher: half the squared distance to a constant target
    # p − (p_fake − p_teacher); its gradient is p minus the target. A descent step moves p to where
    # the teacher points, and away from where the student already is. The loss's value means
    # nothing. Watch the gap |v_teacher − v_fake| instead, which train_stage1.py logs.
    with torch.no_grad():
        target = p + p_teacher - p_fake
        # 3. The scale, DMD's: it evens out the noise levels. The difference grows with σ − σ_{k+1},
        # in step one 24 times from σ = 0.76 to 0.99. The sample's mean |p − p_teacher| grows with
        # it (in the miniature four times), so divided by it levels differ less. It does not tell
        # how far the student has to go (docs/RESULTS.md). One mean for each sample (deviation 3:
        # official one for each image column).
        scale = (p - p_teacher).abs().mean((1, 2, 3), keepdim=True) + EPSILON     # B×1×1×1
    return (0.5 * (p - target) ** 2 / scale).mean()


def dmd_loss_official(p, p_teacher, p_fake):
    """The official code's loss, for --loss official: the same target, another normaliser and
    another distance (deviations 3 and 4)."""
    assert p.ndim == 4 and p.shape == p_teacher.shape == p_fake.shape
    with torch.no_grad():
        target = p + p_teacher - p_fake
        # The mean runs over dimensions 1 and 2 of B×C×H×W: one weight for each image column.
        scale = (p - p_teacher).abs().mean((1, 2), keepdim=True) + EPSILON        # B×1×1×W
    # Pseudo-Huber √(e² + c²) − c. Where |e| is much larger than c its gradient is the sign of e:
    # how far teacher and fake score disagree no longer matters, only in which direction.
    # c grows with the root of the number of latent values. The reference, a 4×64×64 latent, is the
    # official code's.
    c = 1e-3 * (p[0].numel() / (64 * 64 * 4)) ** 0.5                              # [official]
    error = p - target
    return (((error ** 2 + c ** 2).sqrt() - c) / scale).mean()


def fake_score_loss(v, x, x0, sigma):
    """Flow matching of the fake score on the student's samples (Stage I): the mean of
    (v − (x_σ − x̂0)/σ)², unweighted [official].

    v is the fake score's velocity at x [B, C, H, W], the re-noised sample at sigma [B]; x0 is the
    student's guess x̂0.
    """
    # The target is the velocity of the straight line through x̂0 (at level 0) and x_σ: an Euler
    # step with it from σ to 0 lands on x̂0. Were the latents bf16, the quotient would be 5 % off at
    # σ = 0.03 and 59 % at 0.003, the grid's lowest level. So they stay fp32.
    assert x.dtype == x0.dtype == torch.float32, "latents stay in fp32"
    target = (x - x0) / to_shape(sigma, x)
    return F.mse_loss(v, target)


# ================================================================== Stage II: adversarial losses

LABEL_REAL = 0.8    # [official] one-sided label smoothing: D never gets too sure of a reference
LABEL_FAKE = 0.0    # [official]


def discriminator_loss(reference_logits, picture_logits):
    """L_D = Σ_heads BCE(reference, 0.8) + BCE(picture, 0) [official]; mean over batch and places.

    Both arguments are lists of logits [B, places], one entry for each head; a place is a position
    of its feature map. A D that cannot tell them apart does best with p = 0.4, the mean of both
    labels, everywhere: 1.35 a head.
    """
    loss = 0.0
    for reference, picture in zip(reference_logits, picture_logits, strict=True):
        loss = loss + _cross_entropy(reference, LABEL_REAL)
        loss = loss + _cross_entropy(picture, LABEL_FAKE)
    return loss


def generator_loss(picture_logits):
    """L_G = Σ_heads BCE(picture, 0.8) [official]: the student wants its picture to be taken for a
    reference, so it has a reference's target."""
    loss = 0.0
    for picture in picture_logits:
        loss = loss + _cross_entropy(picture, LABEL_REAL)
    return loss


def _cross_entropy(logits, label):
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))
