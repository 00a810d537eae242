"""The Wan 2.1 networks in plain PyTorch, with the tensor names of the official checkpoints.

Only what making the tiny first-run model needs: training runs over whole clips. The feature cache of the official
code equals that for every convolution but the two temporal resamplers, whose rules are written out in `Resample`.
Sources: Wan-Video/Wan2.1 wan/modules/{vae,model,t5}.py; checked against golden values of both libraries.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class CausalConv3d(nn.Conv3d):
    """A 3-D convolution that looks only at past frames: all temporal padding is in front."""

    def __init__(self, cin, cout, kernel, pad=0):
        super().__init__(cin, cout, kernel, padding=(0, pad, pad))
        self.history = 2 * pad

    def forward(self, x):
        return super().forward(F.pad(x, (0, 0, 0, 0, self.history, 0)))


class RmsNorm(nn.Module):
    """Scales each position's channel vector to length sqrt(C), then per channel by gamma."""

    def __init__(self, dim, axes=3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * axes))

    def forward(self, x):
        return F.normalize(x, dim=1) * self.gamma.shape[0] ** 0.5 * self.gamma


class ResidualBlock(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.residual = nn.Sequential(
            RmsNorm(cin), nn.SiLU(), CausalConv3d(cin, cout, 3, 1),
            RmsNorm(cout), nn.SiLU(), nn.Identity(), CausalConv3d(cout, cout, 3, 1))
        self.shortcut = CausalConv3d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        return self.shortcut(x) + self.residual(x)


def per_frame(x, f):
    """Applies a 2-D function to every frame of [B,C,T,H,W]."""
    b, _, t = x.shape[:3]
    y = f(x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (b, t)).transpose(1, 2)


class AttentionBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = RmsNorm(dim, axes=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def frame(self, x):
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        o = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return self.proj(o.reshape(x.shape))

    def forward(self, x):
        return x + per_frame(x, self.frame)


class Resample(nn.Module):
    """Halves or doubles height and width, and time too where `temporal`. Frame 0 always stays one frame."""

    def __init__(self, dim, up, temporal):
        super().__init__()
        self.up, self.temporal = up, temporal
        if up:
            self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
                                          nn.Conv2d(dim, dim // 2, 3, padding=1))
        else:
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        if temporal and up:
            self.time_conv = nn.Conv3d(dim, 2 * dim, (3, 1, 1))
        elif temporal:
            self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x):
        if self.up and self.temporal and x.shape[2] > 1:
            # The official cache hides frame 0 from this convolution: its history starts with two zero frames.
            later = self.time_conv(F.pad(x[:, :, 1:], (0, 0, 0, 0, 2, 0)))
            b, c, t, h, w = later.shape
            later = later.view(b, 2, c // 2, t, h, w).permute(0, 2, 3, 1, 4, 5).reshape(b, c // 2, 2 * t, h, w)
            x = torch.cat([x[:, :, :1], later], 2)
        x = per_frame(x, self.resample)
        if not self.up and self.temporal and x.shape[2] > 1:
            x = torch.cat([x[:, :, :1], self.time_conv(x)], 2)
        return x


class Coder(nn.Module):
    """What encoder and decoder share: a first convolution, a middle and a head."""

    def __init__(self, cin, first, middle, last, cout):
        super().__init__()
        self.conv1 = CausalConv3d(cin, first, 3, 1)
        self.middle = nn.Sequential(ResidualBlock(middle, middle), AttentionBlock(middle), ResidualBlock(middle, middle))
        self.head = nn.Sequential(RmsNorm(last), nn.SiLU(), CausalConv3d(last, cout, 3, 1))


class Encoder(Coder):
    def __init__(self, base, z):
        w, layers = [base, base, 2 * base, 4 * base, 4 * base], []
        for i, temporal in enumerate([False, True, True, None]):
            layers += [ResidualBlock(w[i], w[i + 1]), ResidualBlock(w[i + 1], w[i + 1])]
            if temporal is not None:
                layers.append(Resample(w[i + 1], up=False, temporal=temporal))
        super().__init__(3, base, 4 * base, 4 * base, 2 * z)
        self.downsamples = nn.Sequential(*layers)

    def forward(self, x):
        return self.head(self.middle(self.downsamples(self.conv1(x))))


class Decoder(Coder):
    def __init__(self, base, z):
        w, layers = [4 * base, 2 * base, 2 * base, base], []
        for i, (out, temporal) in enumerate([(4, True), (4, True), (2, False), (1, None)]):
            layers.append(ResidualBlock(w[i], out * base))
            layers += [ResidualBlock(out * base, out * base) for _ in range(2)]
            if temporal is not None:
                layers.append(Resample(out * base, up=True, temporal=temporal))
        super().__init__(z, 4 * base, 4 * base, base, 3)
        self.upsamples = nn.Sequential(*layers)

    def forward(self, z):
        return self.head(self.upsamples(self.middle(self.conv1(z))))


class Vae(nn.Module):
    """Wan2.1 VAE: video [B,3,4n+1,8h,8w] in -1..1 <-> mean [B,16,n+1,h,w], not scaled."""

    def __init__(self, base, z=16):
        super().__init__()
        self.z = z
        self.encoder, self.decoder = Encoder(base, z), Decoder(base, z)
        self.conv1, self.conv2 = CausalConv3d(2 * z, 2 * z, 1), CausalConv3d(z, z, 1)

    def encode(self, video):
        return self.conv1(self.encoder(video))[:, :self.z]

    def decode(self, mean):
        return self.decoder(self.conv2(mean))


class TokenRms(nn.Module):
    """RMS norm over the last axis, statistics in float32."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def rope_angles(grid, head_dim, device):
    """Angles [L, head_dim/2] of the tokens of an (f,h,w) grid: time pairs, then height, then width."""
    pairs = head_dim // 2
    axes = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    out = []
    for axis, (n, count) in enumerate(zip(grid, axes)):
        theta = 10000.0 ** (-torch.arange(count, dtype=torch.float64, device=device) / count)
        shape = [1, 1, 1, count]
        shape[axis] = n
        a = (torch.arange(n, dtype=torch.float64, device=device)[:, None] * theta).view(shape)
        out.append(a.expand(*grid, count))
    return torch.cat(out, -1).reshape(-1, pairs).float()


def rotate(x, angles):
    """Rotates the interleaved pairs of x [B,N,L,d] by angles [L,d/2]."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


class DitAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = TokenRms(dim), TokenRms(dim)

    def forward(self, x, source, angles=None, bias=None):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in
                   (self.norm_q(self.q(x)), self.norm_k(self.k(source)), self.v(source)))
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        o = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=bias)
        return self.o(o.transpose(1, 2).flatten(2))


class DitBlock(nn.Module):
    def __init__(self, dim, ffn, heads):
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim ** 0.5)
        self.self_attn, self.cross_attn = DitAttention(dim, heads), DitAttention(dim, heads)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.GELU("tanh"), nn.Linear(ffn, dim))

    def forward(self, x, e0, angles, context, bias):
        sh1, sc1, g1, sh2, sc2, g2 = (self.modulation + e0).unbind(1)
        norm = lambda y, sh, sc: F.layer_norm(y, y.shape[-1:], eps=1e-6) * (1 + sc[:, None]) + sh[:, None]
        x = x + g1[:, None] * self.self_attn(h := norm(x, sh1, sc1), h, angles)
        x = x + self.cross_attn(self.norm3(x), context, bias=bias)
        return x + g2[:, None] * self.ffn(norm(x, sh2, sc2))


class Head(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim ** 0.5)
        self.head = nn.Linear(dim, out)

    def forward(self, x, e):
        sh, sc = (self.modulation + e[:, None]).unbind(1)
        return self.head(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + sc[:, None]) + sh[:, None])


class Dit(nn.Module):
    """Wan T2V transformer: latent [B,C,T,H,W], t in 0..1000 [B], context [B,L,text] -> velocity like the latent.

    The real context has 512 rows, zeros after the prompt. Equal keys may be counted instead of repeated: here the
    last row of `context`, a zero one, stands for all rows from L - 1 on, by adding the log of their number.
    """

    TEXT_LEN = 512

    def __init__(self, dim, ffn, heads, layers, text_dim, channels=16, freq_dim=256):
        super().__init__()
        self.heads, self.freq_dim, self.channels = heads, freq_dim, channels
        self.patch_embedding = nn.Conv3d(channels, dim, (1, 2, 2), (1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList([DitBlock(dim, ffn, heads) for _ in range(layers)])
        self.head = Head(dim, 4 * channels)

    def forward(self, x, t, context):
        k = self.freq_dim // 2
        angle = t.double()[:, None] * 10000.0 ** (-torch.arange(k, device=x.device, dtype=torch.float64) / k)
        e = self.time_embedding(torch.cat([angle.cos(), angle.sin()], -1).float())
        e0 = self.time_projection(e).unflatten(-1, (6, -1))
        tokens = self.patch_embedding(x)
        grid = tokens.shape[2:]
        tokens = tokens.flatten(2).transpose(1, 2)
        angles = rope_angles(grid, tokens.shape[-1] // self.heads, x.device)
        length = context.shape[1]
        repeats = math.log(self.TEXT_LEN - length + 1)
        bias = F.pad(torch.zeros(1, length - 1, device=x.device), (0, 1), value=repeats).expand(tokens.shape[1], -1)
        context = self.text_embedding(context)
        for block in self.blocks:
            tokens = block(tokens, e0, angles, context, bias.to(context.dtype))
        y = self.head(tokens, e).unflatten(1, grid).unflatten(-1, (2, 2, self.channels))
        return y.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


class T5Attention(nn.Module):
    def __init__(self, dim, heads, head_dim):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, heads * head_dim, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x, bias):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
                      .transpose(1, 2).flatten(2))


class T5Ffn(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.GELU("tanh"))
        self.fc1, self.fc2 = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.fc2(self.gate(x) * self.fc1(x))


class RelativeBias(nn.Module):
    def __init__(self, heads, buckets=32, reach=128):
        super().__init__()
        self.embedding, self.reach = nn.Embedding(buckets, heads), reach

    def forward(self, length, device):
        """Bias [heads, length, length] of key minus query position, half of the buckets for each direction."""
        pos = torch.arange(length, device=device)
        rel, half = pos[None] - pos[:, None], self.embedding.num_embeddings // 2
        near = half // 2
        a = rel.abs()
        far = near + (torch.log(a.clamp(min=1).float() / near) / math.log(self.reach / near) * (half - near)).long()
        bucket = (rel > 0) * half + torch.where(a < near, a, far.clamp(max=half - 1))
        return self.embedding(bucket).permute(2, 0, 1)


class T5Block(nn.Module):
    def __init__(self, dim, heads, head_dim, hidden):
        super().__init__()
        self.norm1, self.norm2 = TokenRms(dim), TokenRms(dim)
        self.attn, self.pos_embedding = T5Attention(dim, heads, head_dim), RelativeBias(heads)
        self.ffn = T5Ffn(dim, hidden)

    def forward(self, x, mask):
        x = x + self.attn(self.norm1(x), self.pos_embedding(x.shape[1], x.device) + mask)
        return x + self.ffn(self.norm2(x))


class Umt5(nn.Module):
    """UMT5 encoder: ids [B,L] and their mask [B,L] -> states [B,L+1,dim], rows past each prompt exactly zero."""

    def __init__(self, vocab, dim, heads, head_dim, hidden, layers):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList([T5Block(dim, heads, head_dim, hidden) for _ in range(layers)])
        self.norm = TokenRms(dim)

    def forward(self, ids, real):
        x = self.token_embedding(ids)
        mask = torch.zeros(real.shape, device=ids.device).masked_fill(~real, -1e9)[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        return F.pad(self.norm(x) * real[..., None], (0, 0, 0, 1))
