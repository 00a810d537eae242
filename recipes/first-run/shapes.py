"""Endless little animations, drawn straight into tensors on any device, with captions.

`world` is what the tiny base model knows: one plain shape, or the plain head of a cat, bear, rabbit or mouse, moving
on a plain ground. It holds no fox. `creatures` and `clutter` never reach the transformer: they only teach the
autoencoder to keep eyes, ears, masks, stripes and odd colours.
Everything is a signed distance (positive outside) turned into antialiased coverage, so a batch costs milliseconds.
"""

import math

import torch

COLOURS = {
    "red": (222, 52, 52), "orange": (245, 140, 40), "yellow": (250, 214, 60), "green": (60, 168, 88),
    "teal": (40, 170, 170), "blue": (52, 104, 220), "purple": (134, 76, 190), "pink": (246, 140, 184),
    "brown": (130, 86, 56), "white": (244, 244, 240), "grey": (140, 144, 150), "black": (38, 38, 44),
}
SHAPES = ["circle", "square", "triangle", "ring", "star"]
ANIMALS = ["cat", "bear", "rabbit", "mouse"]
MOTIONS = ["standing still", "moving right", "moving left", "moving up", "moving down", "bouncing", "spinning",
           "growing", "shrinking", "swinging"]
OUTLINE = 0.022  # width of the dark outline, in frame sizes


class Pen:
    """A batch of clips [n,3,frames,size,size] in 0..1 being painted; lengths are in frame sizes, y grows downwards."""

    def __init__(self, n, frames, size, device):
        self.n, self.frames, self.size, self.device = n, frames, size, device
        axis = (torch.arange(size, device=device) + 0.5) / size
        self.y, self.x = axis.view(1, 1, -1, 1), axis.view(1, 1, 1, -1)
        self.image = torch.zeros(n, 3, frames, size, size, device=device)

    def rand(self, low=0.0, high=1.0):
        """One random number per clip, shaped to broadcast over frames and pixels."""
        return torch.rand(self.n, 1, 1, 1, device=self.device) * (high - low) + low

    def colour(self):
        return torch.rand(self.n, 3, device=self.device)

    def ground(self, top, bottom):
        ramp = self.y[:, None]
        self.image = (top.view(-1, 3, 1, 1, 1) * (1 - ramp) + bottom.view(-1, 3, 1, 1, 1) * ramp) \
            .expand(-1, 3, self.frames, self.size, self.size)

    def local(self, cx, cy, angle):
        """Pixel coordinates seen from a centre and an angle, each [n,frames,1,1]."""
        dx, dy, c, s = self.x - cx, self.y - cy, torch.cos(angle), torch.sin(angle)
        return dx * c + dy * s, dy * c - dx * s

    def paint(self, distance, colour, opacity=1.0):
        cover = (0.5 - distance * self.size).clamp(0, 1)[:, None] * opacity
        self.image = self.image + cover * (colour.view(-1, 3, 1, 1, 1) - self.image)

    def video(self):
        return (self.image * 2 - 1).clamp(-1, 1)


def ellipse(x, y, a, b):
    return (torch.hypot(x / a, y / b) - 1) * b


def box(x, y, a, b):
    return torch.maximum(x.abs() - a, y.abs() - b)


def triangle(x, y, corners):
    """Corners [(x,y) x 3] clockwise on the screen; numbers or per-clip tensors."""
    out = None
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        ex, ey = bx - ax, by - ay
        edge = ((x - ax) * ey - (y - ay) * ex) / (ex * ex + ey * ey) ** 0.5
        out = edge if out is None else torch.maximum(out, edge)
    return out


def star(x, y, r):
    """Five points: the plane is folded into one tenth of a turn, where the outline is one straight line."""
    turn = 2 * math.pi / 5
    a = torch.atan2(x, -y)
    a = (torch.remainder(a + turn / 2, turn) - turn / 2).abs()
    rho = torch.hypot(x, y)
    px, py, inner = rho * torch.cos(a), rho * torch.sin(a), 0.46
    ix, iy = inner * math.cos(turn / 2), inner * math.sin(turn / 2)
    length = math.hypot(ix - 1, iy)
    return ((px - r) * iy - py * (ix - 1)) / length


def shape_distance(kind, x, y, r):
    """The distance to shape number `kind` [n] of radius r."""
    q = 1.05 * r
    every = [
        torch.hypot(x, y) - r,
        box(x, y, 0.84 * r, 0.84 * r),
        triangle(x, y, [(0 * r, -q), (q * 0.94, q * 0.66), (-q * 0.94, q * 0.66)]),
        (torch.hypot(x, y) - 0.76 * r).abs() - 0.26 * r,
        star(x, y, 1.12 * r),
    ]
    out = every[0]
    for i, d in enumerate(every[1:], 1):
        out = torch.where((kind == i).view(-1, 1, 1, 1), d, out)
    return out


def move(pen, motion, r):
    """Centre, angle and radius over time of motion number `motion` [n]."""
    u = torch.linspace(0, 1, max(pen.frames, 2), device=pen.device)[:pen.frames].view(1, -1, 1, 1)
    zero = torch.zeros(pen.n, pen.frames, 1, 1, device=pen.device)
    on = lambda name: (motion == MOTIONS.index(name)).view(-1, 1, 1, 1)
    cx, cy = pen.rand(0.42, 0.58) + zero, pen.rand(0.42, 0.58) + zero
    slide, start = pen.rand(0.36, 0.5), pen.rand(-0.06, 0.06)
    path = start + slide * (u - 0.5)
    cx = torch.where(on("moving right"), 0.5 + path, torch.where(on("moving left"), 0.5 - path, cx))
    cy = torch.where(on("moving down"), 0.5 + path, torch.where(on("moving up"), 0.5 - path, cy))
    hop = torch.sin(math.pi * (pen.rand(1.6, 2.2) * u + pen.rand())).abs()
    cy = torch.where(on("bouncing"), 0.66 - pen.rand(0.26, 0.34) * hop, cy)
    swing = torch.sin(2 * math.pi * (pen.rand(0.9, 1.2) * u + pen.rand()))
    cx = torch.where(on("swinging"), 0.5 + 0.16 * swing, cx)
    turn = torch.where(pen.rand() < 0.5, -1.0, 1.0) * pen.rand(0.8, 1.2)
    angle = torch.where(on("spinning"), 2 * math.pi * (turn * u + pen.rand()),
                        torch.where(on("swinging"), -0.45 * swing, zero))
    r = r + zero
    r = torch.where(on("growing"), r * (0.55 + 0.75 * u), torch.where(on("shrinking"), r * (1.3 - 0.75 * u), r))
    return cx, cy, angle, r


def subject(pen, names):
    """What every caption tells: a subject, a motion, two different colours; and the stage with its ground painted.

    Returns the subject and motion numbers [n], the subject's colour [n,3] and the captions' makings.
    """
    pick = lambda k: torch.randint(k, (pen.n,), device=pen.device)
    colours = list(COLOURS)
    table = torch.tensor([COLOURS[c] for c in colours], device=pen.device) / 255
    kind, motion, fill = pick(len(names)), pick(len(MOTIONS)), pick(len(colours))
    if names is SHAPES:  # A spinning circle cannot be seen to spin.
        round_ = ((kind == 0) | (kind == 3)) & (motion == MOTIONS.index("spinning"))
        kind = torch.where(round_, 4 - kind // 3 * 3, kind)
    back = (fill + 1 + torch.randint(len(colours) - 1, (pen.n,), device=pen.device)) % len(colours)
    jitter = lambda c: (c + torch.randn(pen.n, 3, device=pen.device) * 0.012).clamp(0, 1)
    ground, colour = jitter(table[back]), jitter(table[fill])
    pen.ground(ground, ground * 0.84)

    def captions():
        return [f"a {colours[f]} {names[k]} {MOTIONS[m]} on a {colours[b]} background"
                for f, k, m, b in zip(fill.tolist(), kind.tolist(), motion.tolist(), back.tolist())]
    return kind, motion, colour, captions


def plain_shapes(n, frames, size, device):
    """(video [n,3,frames,size,size] in -1..1, captions): "a red star bouncing on a blue background"."""
    pen = Pen(n, frames, size, device)
    kind, motion, colour, captions = subject(pen, SHAPES)
    cx, cy, angle, r = move(pen, motion, pen.rand(0.19, 0.3))
    x, y = pen.local(cx, cy, angle)
    d = shape_distance(kind, x, y, r)
    pen.paint(d, colour * 0.62)
    pen.paint(d + OUTLINE, colour)
    return pen.video(), captions()


def animals(n, frames, size, device):
    """(video, captions) of one-coloured heads with a paler muzzle: "a blue cat spinning on a white background"."""
    pen = Pen(n, frames, size, device)
    kind, motion, skin, captions = subject(pen, ANIMALS)
    cx, cy, angle, r = move(pen, motion, pen.rand(0.19, 0.26))
    x, y = pen.local(cx, cy, angle)
    m = x.abs()
    is_ = lambda name: (kind == ANIMALS.index(name)).view(-1, 1, 1, 1)
    ears = torch.where(is_("cat"), triangle(m, y, [(0.78 * r, -1.25 * r), (0.95 * r, -0.2 * r), (0.1 * r, -0.6 * r)]),
           torch.where(is_("bear"), torch.hypot(m - 0.68 * r, y + 0.66 * r) - 0.34 * r,
           torch.where(is_("rabbit"), ellipse(m - 0.4 * r, y + 1.15 * r, 0.24 * r, 0.6 * r),
                       torch.hypot(m - 0.85 * r, y + 0.62 * r) - 0.55 * r)))
    head = ellipse(x, y, r, 0.86 * r)
    pale, dark = skin * 0.4 + 0.6, torch.full_like(skin, 0.14)
    for d in (ears, head):
        pen.paint(d - OUTLINE, skin * 0.55)
    pen.paint(ears, skin)
    pen.paint(ears + 0.14 * r, pale)
    pen.paint(head, skin)
    pen.paint(ellipse(x, y - 0.42 * r, 0.46 * r, 0.34 * r), pale)
    pen.paint(ellipse(x, y - 0.26 * r, 0.17 * r, 0.12 * r), dark)
    pen.paint(torch.hypot(m - 0.42 * r, y + 0.1 * r) - 0.17 * r, dark)
    pen.paint(torch.hypot(m - 0.38 * r, y + 0.17 * r) - 0.06 * r, torch.ones_like(skin))
    return pen.video(), captions()


def world(n, frames, size, device):
    """(video, captions): three plain shapes for every two animals."""
    some = n * 2 // 5
    (a, said), (b, also) = plain_shapes(n - some, frames, size, device), animals(some, frames, size, device)
    return torch.cat([a, b]), said + also


def creatures(n, frames, size, device):
    """Faces with random ears, chins, masks, eyes, cheeks and colours (one in three in warm ones), moving at random."""
    pen = Pen(n, frames, size, device)
    top = pen.colour()
    pen.ground(top, (top + 0.3 * (pen.colour() - 0.5)).clamp(0, 1))
    cx, cy, angle, r = move(pen, torch.randint(len(MOTIONS), (n,), device=device), pen.rand(0.17, 0.32))
    x, y = pen.local(cx, cy, angle + pen.rand(-0.3, 0.3))
    m = x.abs()
    chance = lambda p: pen.rand() < p
    warm = torch.rand(n, 1, device=device) < 0.35
    near = lambda *c: (torch.tensor(c, device=device) + 0.15 * torch.randn(n, 3, device=device)).clamp(0, 1)
    skin = torch.where(warm, near(0.95, 0.5, 0.15), pen.colour())
    ear = torch.where(chance(0.5)[:, :, 0, 0], 0.25 * pen.colour(), pen.colour())
    light, dark = 0.6 + 0.4 * pen.colour(), 0.25 * pen.colour()
    light = torch.where(warm, near(1.0, 0.95, 0.88), light)
    spread, tip, tall = pen.rand(0.3, 0.7) * r, pen.rand(0.6, 1.1) * r, pen.rand(1.1, 1.7) * r
    ears = torch.where(chance(0.65),
                       triangle(m, y, [(tip, -tall), (0.95 * r, -0.25 * r), (spread * 0.4, -0.7 * r)]),
                       ellipse(m - 0.7 * r, y + 0.75 * r, 0.38 * r, 0.4 * r))
    flat = pen.rand(0.75, 1.05)
    head, chin = ellipse(x, y, r, flat * r), pen.rand(0.85, 1.25) * r
    pointed = triangle(m, y, [(0.92 * r, 0.25 * r), (0 * r, chin), (-0.2 * r, 0.2 * r)])
    head = torch.where(chance(0.5), torch.minimum(head, pointed), head)
    body = torch.where(chance(0.4), ellipse(x, y - 1.25 * r, 0.7 * r, 0.7 * r), 1.0)
    line = OUTLINE * pen.rand(0, 1.2)
    for d in (body, ears, head):
        pen.paint(d - line, skin * 0.6)
        pen.paint(d, skin)
    pen.paint(ears + pen.rand(0.08, 0.18) * r, ear)
    pen.paint(head, skin)
    mask, low = pen.rand(0.3, 0.6) * r, pen.rand(0.3, 0.5) * r
    pen.paint(torch.maximum(ellipse(m - mask, y - low, pen.rand(0.4, 0.65) * r, 0.46 * r), head + 0.01), light)
    blush = ellipse(m - 0.66 * r, y - 0.3 * r, 0.16 * r, 0.1 * r)
    pen.paint(torch.where(chance(0.5), blush, 1.0), near(0.98, 0.6, 0.5))
    ex, ey, er = pen.rand(0.3, 0.48) * r, pen.rand(-0.25, 0.1) * r, pen.rand(0.12, 0.24) * r
    eye = torch.hypot(m - ex, (y - ey) * pen.rand(0.75, 1.0)) - er
    pen.paint(eye - 0.35 * er, light, opacity=torch.round(pen.rand(0, 0.8))[:, None])
    pen.paint(eye, dark)
    pen.paint(torch.hypot(x - ex + 0.3 * er, y - ey + 0.35 * er) - 0.38 * er, light)
    pen.paint(torch.hypot(x + ex + 0.3 * er, y - ey + 0.35 * er) - 0.38 * er, light)
    pen.paint(ellipse(x, y - pen.rand(0.25, 0.55) * r, 0.19 * r, 0.13 * r), dark)
    return pen.video()


def clutter(n, frames, size, device):
    """Stripes or checks under a few overlapping shapes."""
    pen = Pen(n, frames, size, device)
    pen.ground(pen.colour(), pen.colour())
    a, f, speed = pen.rand(0, 6.3), pen.rand(2, 9), pen.rand(-1, 1)
    u = torch.linspace(0, 1, max(frames, 2), device=device)[:frames].view(1, -1, 1, 1)
    wave = torch.sin(6.283 * (f * (pen.x * torch.cos(a) + pen.y * torch.sin(a)) + speed * u))
    other = torch.sin(6.283 * f * (pen.y * torch.cos(a) - pen.x * torch.sin(a)))
    pattern = torch.where(pen.rand() < 0.5, wave, wave * other)
    pen.paint(pattern / (6.283 * f), pen.colour(), opacity=pen.rand(0, 0.8)[:, None])
    for _ in range(4):
        kind, motion = (torch.randint(k, (n,), device=device) for k in (len(SHAPES), len(MOTIONS)))
        cx, cy, angle, r = move(pen, motion, pen.rand(0.04, 0.25))
        x, y = pen.local(cx + pen.rand(-0.35, 0.35), cy + pen.rand(-0.35, 0.35), angle + pen.rand(0, 6.3))
        pen.paint(shape_distance(kind, x, y, r), pen.colour())
    return pen.video()


def mixture(n, frames, size, device):
    """What the autoencoder learns from: all three worlds, half of it creatures, never fewer than one clip of each."""
    quarter = max(n // 4, 1)
    parts = [world(quarter, frames, size, device)[0], clutter(quarter, frames, size, device)]
    return torch.cat([*parts, creatures(max(n - 2 * quarter, 1), frames, size, device)])
