"""Draws the README's figure, assets/method.svg: the whole method on one page. Needs matplotlib.

    python -m tools.method_figure

Panel A is Stage I with Eq. 4, B the cached step, C Stage II. The page is 900 wide, y points down,
and a font of size 13 is 13 units high: every number is a pixel of the figure shown 900 pixels wide.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

OUT = Path(__file__).parent.parent / "assets" / "method.svg"
WIDTH, HEIGHT = 900, 1030
INK, GREY, STUDENT, TEACHER = "#24292f", "#6e7781", "#1f5fbf", "#2e7d32"
FAKE, CRITIC, F = "#c25700", "#6a3fa0", "#c62828"           # CRITIC: the discriminator
# One grammar in all panels. A filled box learns, a pale one does not. A thin grey arrow carries no
# gradient; along a thick one it flows back; from the start of a dashed one the fake score or the
# discriminator learns, each in its own turn.
THICK, RED = {"color": STUDENT, "width": 4}, {"color": F, "width": 4}
DASHED = {"width": 2.2, "style": (0, (3, 1.6))}


def pale(color):
    """The colour "#rrggbb" mixed with much white."""
    return [1 - 0.14 * (1 - int(color[i:i + 2], 16) / 255) for i in (1, 3, 5)]


def noisy(sigma):
    """x_σ = (1 − σ)·x0 + σ·ε as pixels [22, 22, 3]; x0 is a yellow disc on a dark ground."""
    y, x = np.mgrid[:22, :22]
    disc = (x - 11) ** 2 + (y - 10) ** 2 < 36
    x0 = np.where(disc[..., None], (0.98, 0.80, 0.20), (0.20, 0.28, 0.38))
    noise = 0.5 + 0.2 * np.random.default_rng(0).standard_normal((22, 22, 3))
    return ((1 - sigma) * x0 + sigma * noise).clip(0, 1)


class Page:
    """What is drawn on. A box is given by its centre (x, y) and size, and returns the middles of
    its four sides, so that arrows begin and end at boxes."""

    def __init__(self, pyplot):
        self.figure = pyplot.figure(figsize=(WIDTH / 72, HEIGHT / 72), facecolor="white")
        self.ax = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        self.ax.axis("off")
        self.patches = pyplot.matplotlib.patches

    def text(self, x, y, text, color=INK, size=13, ha="center", bold=False):
        self.ax.text(x, y, text, color=color, size=size, ha=ha, va="center", zorder=4,
                     linespacing=1.3, weight="bold" if bold else "normal")

    def left(self, x, y, text, color=INK, **how):
        self.text(x, y, text, color, ha="left", **how)

    def frame(self, x, y, w, h, face="none", edge="none", style="solid", zorder=2):
        self.ax.add_patch(self.patches.FancyBboxPatch(
            (x - w / 2 + 4, y - h / 2 + 4), w - 8, h - 8, "round,pad=4", facecolor=face,
            edgecolor=edge, linestyle=style, linewidth=1.4, zorder=zorder))
        return SimpleNamespace(left=(x - w / 2, y), right=(x + w / 2, y),
                               top=(x, y - h / 2), bottom=(x, y + h / 2))

    def box(self, x, y, w, h, text, color, learns=False):
        self.text(x, y, text, "white" if learns else color, bold=True)
        return self.frame(x, y, w, h, color if learns else pale(color), color)

    def thumb(self, x, y, sigma, label="", label_y=-36):
        """A small picture at noise level sigma, its label above or below."""
        self.text(x, y + label_y, label)
        self.ax.imshow(noisy(sigma), extent=(x - 22, x + 22, y + 22, y - 22), aspect="auto",
                       interpolation="none", zorder=2)
        return self.frame(x, y, 46, 46, edge=GREY)

    def arrow(self, *points, color=GREY, width=1.6, style="solid", head=True, zorder=1.5):
        """A line through the points, under the boxes, with a head at the last point."""
        path = np.array(points, float)
        tip, way = path[-1].copy(), np.sign(path[-1] - path[-2])          # right, left, up or down
        long, half = 7 + 1.5 * width, (3 + width) * way[::-1]
        if head:
            path[-1] -= way * long                            # the line ends where the head begins
            corners = [tip, path[-1] + half, path[-1] - half]
            self.ax.add_patch(self.patches.Polygon(corners, color=color, lw=0, zorder=zorder))
        self.ax.plot(*path.T, color=color, lw=width, linestyle=style, zorder=zorder,
                     solid_capstyle="butt", solid_joinstyle="miter", dash_capstyle="butt")

    def chain(self, *boxes, **how):
        """Arrows from each box to the next one on its right."""
        for a, b in zip(boxes, boxes[1:], strict=False):
            self.arrow(a.right, b.left, **how)

    def panel(self, top, bottom, letter, title):
        self.ax.add_patch(self.patches.Rectangle((8, top), WIDTH - 16, bottom - top, zorder=0,
                                                 facecolor="#f6f8fa", edgecolor="#d0d7de"))
        self.left(22, top + 23, letter, size=19, bold=True)
        self.left(46, top + 23, title, size=15.5, bold=True)


def legend(page):
    """What boxes and arrows mean, on top of the page."""
    page.box(35, 23, 34, 18, "", GREY, learns=True)
    page.box(133, 23, 34, 18, "", GREY)
    page.arrow((266, 23), (302, 23))
    page.arrow((402, 23), (438, 23), **THICK)
    page.arrow((592, 23), (628, 23), **DASHED)
    for x, text in ((58, "learns"), (156, "does not learn"), (309, "no gradient"),
                    (445, "gradient flows back"), (635, "fake score, discriminator learn")):
        page.left(x, 23, text)


def stage1(page):
    """Panel A: roll out, fake score, student."""
    page.panel(46, 424, "A", "Stage I: match the teacher's distribution, step by step")
    # 1. The roll-out, in a row on top.
    strip = page.frame(318, 128, 592, 88, "white", "#d0d7de", zorder=1)
    page.chain(page.thumb(58, 116, 1, "σ = 1", 37),
               page.box(185, 116, 96, 42, "student", STUDENT),
               page.thumb(312, 116, 0.75, "σ = 0.75", 37),
               page.box(439, 116, 96, 42, "student", STUDENT),
               page.thumb(566, 116, 0, "σ = 0", 37))
    page.left(632, 98, "1  Roll out", bold=True)
    page.left(632, 130, "the student's own path,\nno gradient")

    # 2. The fake score learns what the student makes.
    fake = page.box(596, 226, 196, 44, "fake score", FAKE, learns=True)
    page.arrow((536, strip.bottom[1]), (536, fake.top[1]), color=FAKE, **DASHED)
    page.left(550, 188, "2  Fake score learns the student's samples", FAKE, bold=True)

    # 3. The student repeats a step; its sample p is re-noised and judged by two networks.
    start = page.thumb(58, 272, 1, r"at $\sigma_k$", 37)
    student = page.box(163, 272, 96, 42, "student", STUDENT, learns=True)
    p = page.thumb(268, 272, 0.75, r"$p$  at $\sigma_{k+1}$")
    noised = page.thumb(424, 272, 0.88, r"up to $\sigma$")
    page.left(74, 194, "3  Student repeats a step, with gradient", bold=True)
    page.left(74, 216, "any step $k$ of its path")
    page.arrow((58, strip.bottom[1]), start.top)
    page.chain(start, student)
    page.chain(student, p, **THICK)
    page.chain(p, noised)
    page.text(342, 259, "re-noise", GREY)
    teacher = page.frame(596, 334, 196, 108, pale(TEACHER), TEACHER)
    page.text(596, 264, r"each steps back to $\sigma_{k+1}$", GREY)
    for judge, y, name, color in ((fake, 226, "fake", FAKE), (teacher, 334, "teacher", TEACHER)):
        page.arrow(noised.right, (472, 272), (472, y), judge.left)
        page.chain(judge, page.box(756, y, 76, 36, rf"$p_\mathrm{{{name}}}$", color))
    page.box(838, 280, 72, 40, "loss", STUDENT)
    page.arrow((794, 226), (838, 226), (838, 260))
    page.arrow((794, 334), (822, 334), (822, 300))
    page.arrow(p.bottom, (268, 404), (856, 404), (856, 300), **THICK)
    page.left(284, 361, "the loss moves $p$ along", STUDENT)
    page.left(284, 381, r"$p_\mathrm{teacher} - p_\mathrm{fake}$", STUDENT)
    guidance_rule(page)


def guidance_rule(page):
    """Eq. 4, inside the teacher's box: its guidance over σ = 3u / (1 + 2u). The axis is u, along
    which the teacher's own steps are even."""
    page.text(596, 296, "teacher, guided by Eq. 4", TEACHER, bold=True)
    alpha = 520 + 156 * (1 - 0.94 / (3 - 2 * 0.94))           # α = 0.94 is u = 0.839
    page.arrow((516, 364), (680, 364), width=1, head=False, zorder=3)
    page.arrow((520, 360), (alpha, 360), (alpha, 320), (676, 320), color=TEACHER, width=2.5,
               head=False, zorder=3)
    page.text(532, 345, "off", TEACHER)
    page.text(616, 342, "guidance $w$", TEACHER)
    page.text(520, 376, "1", GREY)
    page.left(534, 376, r"$\alpha$ = 0.94", GREY)
    page.text(662, 376, r"$\sigma$ = 0", GREY)


def cached_step(page):
    """Panel B: step two without the span."""
    page.panel(434, 694, "B", "The cached step: step two borrows blocks 1–4 from step one")
    for row, y, name, sigma in ((0, 500, "step one", "σ = 1"), (1, 630, "step two", "σ = 0.75")):
        page.left(22, y - 9, name, STUDENT, bold=True)
        page.left(22, y + 10, sigma)
        page.text(800, y, f"{12 - 4 * row} of 12 blocks")
        page.frame(275, y, 164, 46, "#d8dee4", zorder=1)      # the span n..m
        page.text(176, y - 22, f"$I_{{n,{row}}}$")
        page.text(380 + 26 * row, y - 22 - 5 * row, f"$O_{{m,{row}}}$")
        for i in range(12):
            x = 140 + 38 * i + 40 * (i > 0) + 66 * (i > 4)
            if row == 1 and 1 <= i <= 4:
                page.frame(x, y, 30, 32, edge=GREY, style=(0, (2, 2)))
                page.text(x, y, str(i), GREY)
            else:
                page.box(x, y, 30, 32, str(i), STUDENT, learns=row == 1)
    # Step one keeps Δ0. Step two goes round the span; f(Δ0) is added where the span would end.
    delta = page.box(279, 548, 152, 30, r"$\Delta_0 = O_{m,0} - I_{n,0}$", INK)
    f = page.box(279, 589, 56, 28, "$f$", F, learns=True)
    plus = page.box(380, 630, 20, 20, "+", INK)
    page.arrow((102, 500), (716, 500))
    page.arrow((178, 500), (178, 548), delta.left)
    page.arrow((380, 500), (380, 548), delta.right)
    page.arrow(delta.bottom, f.top)
    page.arrow((102, 630), (125, 630))                        # x at σ = 0.75 comes without gradient
    page.arrow((155, 630), (178, 630), (178, 664), (380, 664), plus.bottom, **THICK)
    page.arrow(f.right, (380, 589), plus.top, **RED)
    page.arrow(plus.right, (716, 630), **THICK)
    page.left(424, 553, r"$O_{m,1} = I_{n,1} + f\,(\Delta_0)$", F, size=16)
    page.left(424, 580, "$f$: a small MLP, one for the image and one for the text", F)
    page.text(878, 672, "1 + 8/12 = 1.67 network evaluations", size=16, ha="right", bold=True)


def stage2(page):
    """Panel C: the cached path against a reference."""
    page.panel(704, 1022, "C", "Stage II: sharpen details on exactly the path of inference")
    noise = page.thumb(68, 790, 1, "prompt, noise")
    one = page.box(169, 790, 100, 44, "step one\nin full", STUDENT)
    two = page.box(376, 790, 112, 44, "step two\ncached", STUDENT, learns=True)
    picture, reference = page.thumb(562, 790, 0, "picture"), page.thumb(562, 900, 0, "reference")
    page.chain(noise, one, page.thumb(268, 790, 0.75, "σ = 0.75"), two)
    page.chain(two, page.box(484, 790, 54, 36, "VAE", GREY), picture, **THICK)
    f = page.box(268, 848, 56, 28, "$f$", F, learns=True)
    page.arrow(one.bottom, (169, 848), f.left)
    page.text(206, 835, r"$\Delta_0$")
    page.arrow(f.right, (376, 848), two.bottom, **RED)
    teacher = page.box(376, 900, 112, 44, "teacher\nguided, Eq. 4", TEACHER)
    page.chain(teacher, page.box(484, 900, 54, 36, "VAE", GREY), reference)
    page.arrow(noise.bottom, (68, 900), teacher.left)
    page.text(194, 887, "the same prompt and noise", GREY)
    page.text(194, 913, "once, before the training", GREY)

    # The discriminator D sees the picture in both turns, the reference in its own alone.
    critic = page.frame(710, 843, 176, 200, "white", CRITIC, zorder=1)
    page.text(710, 759, "discriminator D", CRITIC, bold=True)
    backbone = page.box(669, 856, 78, 160, "backbone\n(frozen)", CRITIC)
    heads = page.box(761, 856, 58, 160, "heads", CRITIC, learns=True)
    for y, name, color, how in ((790, "$L_G$", STUDENT, THICK),
                                (900, "$L_D$", CRITIC, {"color": CRITIC} | DASHED)):
        page.arrow((picture.right[0], y), (critic.left[0], y), **how)
        page.arrow((backbone.right[0], y), (heads.left[0], y), **how)
        page.arrow((heads.right[0], y), page.box(846, y, 56, 36, name, color).left, **how)
    page.arrow((picture.right[0], 806), (critic.left[0], 806), color=CRITIC, **DASHED)

    # Whose turn it is, by the rule of train_stage2.turn_of: G's number is divisible by 3.
    page.box(66, 982, 84, 26, "50 × D", CRITIC, learns=True)
    for i in range(50, 58):
        turn, color = ("G", STUDENT) if i % 3 == 0 else ("D", CRITIC)
        page.box(129 + 30 * (i - 50), 982, 26, 26, turn, color, learns=True)
    page.text(368, 982, "…")
    page.left(392, 971, "D's turn, dashed: the heads tell reference from picture", CRITIC)
    page.left(392, 993, "G's turn, thick: student and $f$ learn together, $f$ alone at first",
              STUDENT)


def main():
    try:
        from matplotlib import pyplot
    except ImportError:
        raise SystemExit("error: the figure needs matplotlib: pip install matplotlib") from None
    # Letters become paths, so the figure needs no font. With a salt and no date, drawing it again
    # gives the same file.
    pyplot.switch_backend("Agg")
    pyplot.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "1.x", "font.family":
                            "DejaVu Sans", "mathtext.fontset": "dejavusans"})
    page = Page(pyplot)
    for draw in (legend, stage1, cached_step, stage2):
        draw(page)
    page.figure.savefig(OUT, metadata={"Date": None, "Creator": None})
    print(OUT)


if __name__ == "__main__":
    main()
