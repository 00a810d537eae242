"""Draws the training clips of the first run: Tandi, a fox that the tiny base model has never seen.

    python make_clips.py [--out clips]

Needs numpy and pillow, and imageio-ffmpeg for the MP4 files. The drawings are this project's own.
"""

import argparse
import math
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ORANGE, DEEP, CREAM, DARK, ROSE = (245, 128, 32), (168, 74, 14), (255, 244, 226), (44, 30, 30), (250, 150, 110)
OVERSAMPLE = 3  # drawn this much larger, then averaged down


@dataclass
class Clip:
    """One file to make. `act(t)` gives the fox's centre, angle and height squash at t seconds."""

    name: str
    caption: str
    ground: tuple
    act: callable
    seconds: float = 1.5
    fps: float = 16
    size: tuple = (192, 192)
    ffmpeg: tuple = ()


def hop(period, height, x=0.5, sway=0.0):
    def act(t):
        phase = (t / period) % 1
        lift = math.sin(math.pi * phase)
        return x + sway * math.sin(math.pi * t / period), 0.68 - height * lift, 0.0, 1 + 0.16 * (lift - 0.45)
    return act


def walk(start, speed):
    def act(t):
        step = math.sin(2 * math.pi * t / 0.5)
        return start + speed * t, 0.55 - 0.02 * abs(step), 0.12 * step, 1.0
    return act


def spin(period):
    return lambda t: (0.5, 0.53, 2 * math.pi * t / period, 1.0)


def swing(period):
    def act(t):
        s = math.sin(2 * math.pi * t / period)
        return 0.5 + 0.14 * s, 0.55, -0.4 * s, 1.0
    return act


def look(t):
    return 0.5, 0.55, 0.06 * math.sin(2 * math.pi * t / 1.2), 1 + 0.02 * math.sin(2 * math.pi * t / 0.6)


X264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "20", "-preset", "slow", "-movflags", "+faststart")
CLIPS = [
    Clip("hop_green.mp4", "a tandi fox bouncing on a green background", (60, 168, 88), hop(0.56, 0.26),
         ffmpeg=X264 + ("-profile:v", "high", "-bf", "2")),
    Clip("walk_blue.mp4", "a tandi fox moving right on a blue background", (52, 104, 220), walk(0.28, 0.38),
         fps=24, ffmpeg=X264 + ("-profile:v", "main", "-bf", "0")),
    Clip("spin_purple.mp4", "a tandi fox spinning on a purple background", (134, 76, 190), spin(1.1),
         fps=30, size=(160, 160), ffmpeg=X264 + ("-profile:v", "high", "-bf", "3", "-g", "12")),
    Clip("look_teal.gif", "a tandi fox standing still on a teal background", (40, 170, 170), look,
         fps=100 / 6, size=(128, 128)),
    Clip("swing_pink.webp", "a tandi fox swinging on a pink background", (246, 140, 184), swing(1.0),
         fps=1000 / 62, size=(144, 144)),
    Clip("walk_grey.mp4", "a tandi fox moving left on a grey background", (140, 144, 150), walk(0.72, -0.38),
         size=(256, 192), ffmpeg=X264 + ("-profile:v", "main", "-bf", "1")),
]


def frame(clip, t, size):
    """The picture at t seconds as [height, width, 3] bytes. The stage is the centred square of the picture."""
    width, height = size[0] * OVERSAMPLE, size[1] * OVERSAMPLE
    unit = min(width, height)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = (x + 0.5 - width / 2) / unit + 0.5, (y + 0.5 - height / 2) / unit + 0.5
    ground = np.array(clip.ground, np.float32)
    picture = ground * (1 - 0.16 * np.clip(y, 0, 1))[..., None]
    cx, cy, angle, tall = clip.act(t)
    r = 0.25
    dx, dy = (x - cx) / r, (y - cy) / r
    c, s = math.cos(angle), math.sin(angle)
    fx, fy = (dx * c + dy * s) * math.sqrt(tall), (dy * c - dx * s) / tall
    blink = 0.18 if 0.62 < t % 1.3 < 0.74 else 1.0
    draw_fox(picture, fx, fy, blink)
    small = Image.fromarray(picture.clip(0, 255).astype(np.uint8)).reduce(OVERSAMPLE)
    return np.asarray(small)


def draw_fox(picture, x, y, blink):
    """Paints the fox into `picture`; x, y are the pixels' coordinates with the head's radius as the unit."""
    m, outline = np.abs(x), 0.085
    ears = polygon(m, y, [(0.86, -1.42), (0.98, -0.2), (0.16, -0.72)])
    inner = polygon(m, y, [(0.8, -1.1), (0.8, -0.5), (0.42, -0.72)])
    head = ellipse(x, y, 1.0, 0.86)
    chin = polygon(m, y, [(0.9, 0.3), (0.0, 1.08), (-0.2, 0.2)])
    face = np.minimum(head, chin)
    for d in (ears, face):
        fill(picture, d - outline, DEEP)
    fill(picture, ears, ORANGE)
    fill(picture, inner, DARK)
    fill(picture, face, ORANGE)
    fill(picture, np.maximum(ellipse(m - 0.5, y - 0.46, 0.6, 0.5), face + 0.02), CREAM)
    fill(picture, polygon(m, y, [(0.42, 0.6), (0.0, 0.97), (-0.2, 0.6)]), CREAM)
    fill(picture, ellipse(m - 0.68, y - 0.3, 0.15, 0.1), ROSE)
    fill(picture, ellipse(m - 0.4, y + 0.06, 0.19, 0.23 * blink), DARK)
    if blink == 1.0:
        fill(picture, np.hypot(m - 0.4 + 0.05, y + 0.15) - 0.075, (255, 255, 255))
    fill(picture, ellipse(x, y - 0.52, 0.2, 0.14), DARK)


def ellipse(x, y, a, b):
    return (np.hypot(x / a, y / b) - 1) * min(a, b)


def polygon(x, y, corners):
    """Distance to a convex polygon, corners clockwise on the screen; positive outside."""
    edges = []
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        ex, ey = bx - ax, by - ay
        edges.append(((x - ax) * ey - (y - ay) * ex) / math.hypot(ex, ey))
    return np.maximum.reduce(edges)


def fill(picture, distance, colour):
    picture[distance < 0] = colour


def render(clip, fps=None, size=None, frames=None):
    """The clip as [frames, height, width, 3] bytes, at its own rate and size or at the given ones."""
    fps = fps or clip.fps
    count = frames or round(clip.seconds * fps)
    return np.stack([frame(clip, i / fps, size or clip.size) for i in range(count)])


def write(clip, path):
    pictures = render(clip)
    if path.suffix == ".mp4":
        import imageio_ffmpeg
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24",
                   "-s", f"{clip.size[0]}x{clip.size[1]}", "-r", str(clip.fps), "-i", "-", *clip.ffmpeg, str(path)]
        subprocess.run(command, input=pictures.tobytes(), check=True)
        return
    images = [Image.fromarray(p) for p in pictures]
    options = {"save_all": True, "append_images": images[1:], "duration": round(1000 / clip.fps), "loop": 0}
    if path.suffix == ".gif":
        palette = images[0].quantize(96)
        images = [i.quantize(palette=palette, dither=Image.Dither.NONE) for i in images]
        options["append_images"] = images[1:]
    else:
        options |= {"quality": 88, "method": 6}
    images[0].save(path, **options)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "clips")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for clip in CLIPS:
        path = out / clip.name
        write(clip, path)
        path.with_suffix(".txt").write_text(clip.caption + "\n")
        print(f"{path.name:20} {path.stat().st_size:7} bytes")


if __name__ == "__main__":
    main()
