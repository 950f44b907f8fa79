"""The mathematics of 1.x-Distill: tensors in, tensors out.

Re-noising, timestep-aware guidance (paper, Eq. 4), the importance curve of Stage I, the
distribution matching loss and the fake-score loss. No model, no settings, no device: import torch
and nothing of ours.

Conventions, for the whole project: x_σ = (1 − σ)·x0 + σ·ε, velocity v = ε − x0, so
x0 = x_σ − σ·v. Sigma lies in [0, 1] and 1 is noise; the network's timestep is 1000·σ.
Shifted grid σ = s·u / (1 + (s − 1)·u) with s = 3.
Dimension key: B batch, C latent channels, H W latent size. Sigmas are [B] (or a number) and fp32,
as are latents.

Only Eq. 4 has a known number in the paper; for the rest the part, figure or official function is
named. Constants carry their origin: [paper], [official] (the released code's value) or [ours].
"""

import torch
import torch.nn.functional as F

GRID = 1000         # [official] intervals of the teacher's grid:
                    # index i has u = 1 − i/1000, index 0 is noise
EPSILON = 1e-6      # [ours] the official normaliser divides without one (deviation 3)


def shift_sigma(u, shift=3.0):
    """σ = s·u / (1 + (s − 1)·u): uniform time u in [0, 1] to the shifted sigma.
    Works on numbers and tensors."""
    return shift * u / (1 + (shift - 1) * u)


def to_shape(sigma, x):
    """sigma [B] or a number, ready to multiply x [B, ...]."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    return sigma.reshape(-1, *[1] * (x.ndim - 1)) if sigma.ndim else sigma


def x0_from_velocity(x, sigma, v):
    """x0 = x_σ − σ·v for x, v [B, ...]."""
    return x - to_shape(sigma, x) * v


def euler(x, v, sigma, sigma_next):
    """One deterministic step along the flow: x at sigma_next from x at sigma (official η = 1)."""
    return x + (to_shape(sigma_next, x) - to_shape(sigma, x)) * v


def renoise(x, a, b, noise):
    """x at level a to level b ≥ a with fresh noise (official code, re-noising of the processor).

    x_b = k·x_a + √(b² − (a·k)²)·noise with k = (1 − b)/(1 − a), so that x_0's share becomes 1 − b
    and the total noise variance b². The variance is clamped at 0 (float error at b = a); from a = 1
    there is nothing left to add.
    """
    assert x.shape == noise.shape, "one noise for each latent"
    a, b = to_shape(a, x), to_shape(b, x)
    keep = torch.where(a < 1, (1 - b) / (1 - a).clamp(min=EPSILON), torch.ones_like(a))
    variance = (b ** 2 - (a * keep) ** 2).clamp(min=0)
    return keep * x + variance.sqrt() * noise


def guide(v_cond, v_uncond, sigma, w, alpha):
    """Timestep-aware teacher guidance (paper, Eq. 4):
    guidance w where σ ≤ α (inclusive), none above.

    v = v_uncond + w·(v_cond − v_uncond) where σ ≤ α, else v_cond. At high noise, where the layout
    is decided, guidance pulls every sample to the dominant mode; switching it off there keeps the
    student diverse. α is compared with the shifted σ (deviation 1; whether the paper's t is
    pre-shift is not known).
    """
    guided = v_uncond + w * (v_cond - v_uncond)
    return torch.where(to_shape(sigma, v_cond) <= alpha, guided, v_cond)


# ---------------------------------------------------------------- importance over the re-noise time

def importance_curve(name):
    """Weights [1001] over the teacher's grid index (0 = noise) for drawing the student's
    re-noise level.

    official  preset c of the released code: anchors joined by lines, smoothed in log space
    paper     read off the small plot "function-c" of the overview figure,
              its axis taken as the pre-shift u [ours, deviation 5]
    uniform   every index alike; the fake score always uses this one [official]
    """
    i = torch.arange(GRID + 1, dtype=torch.float64)
    if name == "uniform":
        return torch.ones(GRID + 1)
    if name == "official":
        line = _interpolate(i, (0, 300, 500, 1000), (0.6, 1.3, 0.05, 0.001))  # [official]
        x = torch.arange(-400, 401, dtype=torch.float64)
        kernel = torch.exp(-0.5 * (x / 100) ** 2)                             # [official] std 100
        padded = F.pad(line.log()[None, None], (400, 400), mode="replicate")
        smooth = F.conv1d(padded, (kernel / kernel.sum())[None, None])[0, 0]
        return smooth.exp().clamp(min=1e-6).float()
    assert name == "paper", name
    u, p = (0.0, 0.2, 0.4, 0.5, 0.75, 1.0), (1e-6, 2e-4, 4e-4, 7e-4, 2.3e-3, 1.4e-3)
    return _interpolate(1 - i / GRID, u, p).float()


def _interpolate(x, xs, ys):
    """Straight lines through the points (xs, ys), evaluated at x."""
    xs, ys = torch.tensor(xs, dtype=x.dtype), torch.tensor(ys, dtype=x.dtype)
    right = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
    t = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + t * (ys[right] - ys[right - 1])


def window(k, sigmas, form="window"):
    """(high, low) [B]: the levels between which step k [B] of the grid `sigmas` [N + 1] is matched.

    "window" (official, trajectory form): from σ_k down to σ_k+1, where the step ends. "x0" (the
    paper's figure, deviation 2): from 1 down to 0, so the step's x0-prediction is re-noised to any
    level. The last step of both ends at 0.
    """
    if form == "x0":
        return torch.ones(len(k)), torch.zeros(len(k))
    return sigmas[k], sigmas[k + 1]


def draw_sigma(uniform, high, low, weights, shift=3.0):
    """Sigmas [B] on the teacher's grid inside the window low < σ ≤ high, drawn by `weights` [1001].

    uniform [B] in [0, 1) are the random numbers, high and low [B] the ends of each sample's step.
    The weights are renormalised inside the window (official): with two steps each window still gets
    half of the draws.
    """
    sigmas = shift_sigma(1 - torch.arange(GRID + 1) / GRID, shift)                  # 1001, falling
    inside = (sigmas <= high[:, None] + 1e-6) & (sigmas > low[:, None] + 1e-6)      # B × 1001
    assert inside.any(1).all(), "a window without a grid point"
    cumulative = (weights.double() * inside).cumsum(1)
    index = torch.searchsorted(cumulative, uniform[:, None].double() * cumulative[:, -1:],
                               right=True)
    return sigmas[index[:, 0].clamp(max=GRID)]


# ----------------------------------------------------------------------------- Stage I losses

def dmd_loss(sample, real, fake, normaliser="sample", distance="mse"):
    """Distribution matching (Stage I; official target p + r − f):
    its gradient is the difference of the scores.

    sample [B, C, H, W] is the student's, with gradient; real and fake are where teacher and fake
    score, without gradient, take the same re-noised sample. With distance "mse" the gradient by
    sample is exactly (fake − real) / normaliser / numel, the DMD gradient; "huber" (deviation 4)
    is the official pseudo-Huber form, whose gradient is nearly the sign of it.
    normaliser "sample" averages |sample − real| over all non-batch dimensions (deviation 3);
    "column" over dims 1 and 2 only, the official behaviour: one weight for each image column.
    """
    assert sample.ndim == 4 and sample.shape == real.shape == fake.shape
    with torch.no_grad():
        dims = {"sample": (1, 2, 3), "column": (1, 2)}[normaliser]
        scale = (sample - real).abs().mean(dims, keepdim=True).float() + EPSILON    # B×1×1×(1 or W)
        target = sample + real - fake
    error = sample - target
    if distance == "mse":
        return (0.5 * error ** 2 / scale).mean()
    assert distance == "huber", distance
    c = 1e-3 * (sample[0].numel() / (64 * 64 * 4)) ** 0.5                           # [official]
    return (((error ** 2 + c ** 2).sqrt() - c) / scale).mean()


def fake_score_loss(v_fake, x, x0, sigma):
    """Flow matching of the fake score on the student's samples:
    mean (v − (x_σ − x̂0)/σ)², unweighted [official].

    x [B, C, H, W] is the re-noised sample at sigma [B], x0 the student's prediction. fp32 is
    needed: in bf16 the target is 5 % off at σ = 0.03.
    """
    assert x.dtype == x0.dtype == torch.float32, "latents stay in fp32"
    target = (x - x0) / to_shape(sigma, x)
    return F.mse_loss(v_fake.float(), target)


# ----------------------------------------------------------------------------- Stage II losses

def fit_loss(cached, full):
    """Relative squared error of the cached step's velocity against the full step's, both
    [B, C, H, W], mean over the batch.

    [ours, deviation 9: the official code names such a loss, at weight 0, against residuals that
    carry no gradient.]
    """
    dims = tuple(range(1, full.ndim))
    error = ((cached.float() - full.float()) ** 2).sum(dims)
    return (error / ((full.float() ** 2).sum(dims) + EPSILON)).mean()


REAL = 0.8          # [official] one-sided label smoothing; also the generator's target


def discriminator_loss(real_logits, fake_logits):
    """Σ over heads of BCE(real, 0.8) + BCE(fake, 0); mean over batch and places [official].
    Both are lists of logits [B, ...], one for each head."""
    return sum(_bce(real, REAL) + _bce(fake, 0.0)
               for real, fake in zip(real_logits, fake_logits, strict=True))


def generator_loss(fake_logits):
    """Σ over heads of BCE(fake, 0.8) [official]."""
    return sum(_bce(fake, REAL) for fake in fake_logits)


def _bce(logits, target):
    logits = logits.float()
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))
