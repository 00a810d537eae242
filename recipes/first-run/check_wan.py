"""Checks wan.Vae, which codes whole clips at once, against the chunk-by-chunk feature cache of the official code.

    python check_wan.py

The reference below goes through the same modules one chunk at a time (encoder: frame 0, then four frames; decoder: one
latent frame) and remembers, for every convolution over time, the frames it may still look at.
"""

import torch
import torch.nn.functional as F
from torch import nn

import wan


def step(m, x, cache):
    """One chunk through module `m`; `cache` holds what each convolution over time saw last."""
    if isinstance(m, nn.Sequential):
        for child in m:
            x = step(child, x, cache)
        return x
    if isinstance(m, wan.ResidualBlock):
        return step(m.shortcut, x, cache) + step(m.residual, x, cache)
    if isinstance(m, wan.CausalConv3d) and m.history:
        past = cache.get(m, torch.zeros_like(x[:, :, :1]).expand(-1, -1, 2, -1, -1))
        cache[m] = (seen := torch.cat([past, x], 2))[:, :, -2:]
        return F.conv3d(seen, m.weight, m.bias, padding=m.padding)
    if isinstance(m, wan.Resample) and m.temporal:
        return (double if m.up else halve)(m, x, cache)
    return m(x)


def double(m, x, cache):
    if m not in cache:
        cache[m] = torch.zeros_like(x).expand(-1, -1, 2, -1, -1)  # the first frame is marked, but never seen
        return wan.per_frame(x, m.resample)
    cache[m], y = (seen := torch.cat([cache[m], x], 2))[:, :, -2:], m.time_conv(seen)
    b, c, t, h, w = y.shape
    y = y.view(b, 2, c // 2, t, h, w)
    y = torch.stack([y[:, 0], y[:, 1]], 3).reshape(b, c // 2, 2 * t, h, w)
    return wan.per_frame(y, m.resample)


def halve(m, x, cache):
    x = wan.per_frame(x, m.resample)
    past, cache[m] = cache.get(m), x[:, :, -1:]
    return x if past is None else m.time_conv(torch.cat([past, x], 2))


def chunked(coder, x, lengths):
    cache, out = {}, []
    for chunk in x.split(lengths, 2):
        for m in (coder.conv1, *((coder.downsamples, coder.middle) if isinstance(coder, wan.Encoder)
                                 else (coder.middle, coder.upsamples)), coder.head):
            chunk = step(m, chunk, cache)
        out.append(chunk)
    return torch.cat(out, 2)


@torch.no_grad()
def main():
    torch.manual_seed(0)
    vae = wan.Vae(8)
    for frames in (1, 5, 17):
        x = torch.rand(2, 3, frames, 32, 48) * 2 - 1
        z = vae.encode(x)
        y = vae.decode(z)
        z_off = (z - vae.conv1(chunked(vae.encoder, x, [1] + [4] * (frames // 4)))[:, :vae.z]).abs().max().item()
        y_off = (y - chunked(vae.decoder, vae.conv2(z), [1] * z.shape[2])).abs().max().item()
        print(f"{frames:2} frames: encoder off by {z_off:.1e}, decoder by {y_off:.1e}")
        assert max(z_off, y_off) < 1e-4


if __name__ == "__main__":
    main()
