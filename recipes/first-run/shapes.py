"""Endless little animations, drawn straight into tensors on any device, with captions.

`captioned` is the world the tiny base model knows: one plain shape, moving, on a plain ground. `creatures` and
`clutter` never reach the transformer: they only teach the autoencoder to keep eyes, ears, stripes and odd colours.
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


def captioned(n, frames, size, device):
    """(video [n,3,frames,size,size] in -1..1, captions): "a red star bouncing on a blue background"."""
    names = list(COLOURS)
    table = torch.tensor([COLOURS[c] for c in names], device=device) / 255
    pen = Pen(n, frames, size, device)
    pick = lambda k: torch.randint(k, (n,), device=device)
    kind, motion, fill = pick(len(SHAPES)), pick(len(MOTIONS)), pick(len(names))
    # A spinning circle cannot be seen to spin.
    round_ = ((kind == 0) | (kind == 3)) & (motion == MOTIONS.index("spinning"))
    kind = torch.where(round_, 4 - kind // 3 * 3, kind)
    back = (fill + 1 + torch.randint(len(names) - 1, (n,), device=device)) % len(names)
    jitter = lambda c: (c + torch.randn(n, 3, device=device) * 0.012).clamp(0, 1)
    ground, colour = jitter(table[back]), jitter(table[fill])
    pen.ground(ground, ground * 0.84)
    cx, cy, angle, r = move(pen, motion, pen.rand(0.19, 0.3))
    x, y = pen.local(cx, cy, angle)
    d = shape_distance(kind, x, y, r)
    pen.paint(d, colour * 0.62)
    pen.paint(d + OUTLINE, colour)
    captions = [f"a {names[f]} {SHAPES[k]} {MOTIONS[m]} on a {names[b]} background"
                for f, k, m, b in zip(fill.tolist(), kind.tolist(), motion.tolist(), back.tolist())]
    return pen.video(), captions


def creatures(n, frames, size, device):
    """Faces with random ears, eyes, cheeks and colours, moving at random."""
    pen = Pen(n, frames, size, device)
    top = pen.colour()
    pen.ground(top, (top + 0.3 * (pen.colour() - 0.5)).clamp(0, 1))
    cx, cy, angle, r = move(pen, torch.randint(len(MOTIONS), (n,), device=device), pen.rand(0.15, 0.3))
    x, y = pen.local(cx, cy, angle + pen.rand(-0.3, 0.3))
    m = x.abs()
    skin, ear, light, dark = pen.colour(), pen.colour(), 0.6 + 0.4 * pen.colour(), 0.25 * pen.colour()
    spread, tip, tall = pen.rand(0.3, 0.7) * r, pen.rand(0.6, 1.1) * r, pen.rand(1.1, 1.7) * r
    pointed = pen.rand() < 0.6
    ears = torch.where(pointed, triangle(m, y, [(tip, -tall), (0.95 * r, -0.25 * r), (spread * 0.4, -0.7 * r)]),
                       ellipse(m - 0.7 * r, y + 0.75 * r, 0.38 * r, 0.4 * r))
    flat = pen.rand(0.75, 1.05)
    head = ellipse(x, y, r, flat * r)
    body = ellipse(x, y - 1.25 * r, 0.7 * r, 0.7 * r)
    for d, c in ((body, skin), (ears, skin), (head, skin)):
        pen.paint(d - OUTLINE * pen.rand(0, 1), c * 0.5)
        pen.paint(d, c)
    pen.paint(ears + 0.13 * r, ear)
    pen.paint(torch.maximum(ellipse(m - 0.45 * r, y - 0.4 * r, 0.5 * r, 0.42 * r), head + 0.01), light)
    ex, ey, er = pen.rand(0.3, 0.48) * r, pen.rand(-0.25, 0.1) * r, pen.rand(0.12, 0.24) * r
    eye = torch.hypot(m - ex, y - ey) - er
    pen.paint(eye - 0.35 * er, light, opacity=torch.round(pen.rand())[:, None])
    pen.paint(eye, dark)
    pen.paint(torch.hypot(x - ex + 0.3 * er, y - ey + 0.35 * er) - 0.35 * er, light)
    pen.paint(torch.hypot(x + ex + 0.3 * er, y - ey + 0.35 * er) - 0.35 * er, light)
    pen.paint(ellipse(x, y - 0.3 * r, 0.17 * r, 0.12 * r), dark)
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
    """What the autoencoder learns from: all three worlds, never fewer than one clip of each."""
    third = max(n // 3, 1)
    parts = [captioned(third, frames, size, device)[0], clutter(third, frames, size, device)]
    return torch.cat([*parts, creatures(max(n - 2 * third, 1), frames, size, device)])
