"""Makes the tiny pretrained Wan T2V model of the first run, in the official checkpoint layout.

    python make_model.py --seconds-vae 700 --seconds-dit 360 --device cuda --out model

Trains a reduced-width Wan2.1 VAE and, together, a tiny UMT5 encoder and a tiny Wan transformer on endlessly drawn
shapes (shapes.py), folds the latent statistics into the VAE so that the constants of the real model hold, and writes
config.json, diffusion_pytorch_model.safetensors, Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth and a tokenizer.
Then it rehearses the first run itself: a LoRA on the fox clips, with clips before and after. Pictures land in
OUT/report. Needs torch, tokenizers, safetensors, numpy and pillow; downloads nothing.

The model kept beside this file came of three runs on one H100, each going on from the one before by --start: 290, 395
and 175 s for the autoencoder (the first with batches of 16, the first two with a quarter of the latent noise) and 200,
145 and 365 s for the transformer. One longer run is the simpler way to the same; it will not give the same bytes.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn

import make_clips
import shapes
import wan

FRAMES, SIZE = 17, 96
VAE_BASE = 8
DIT = {"dim": 128, "ffn_dim": 208, "num_heads": 4, "num_layers": 4, "freq_dim": 256}
T5 = {"dim": 64, "heads": 4, "head_dim": 16, "hidden": 64, "layers": 2}
SHIFT, GUIDANCE, STEPS = 3.0, 2.0, 16

# The latent statistics of the real Wan2.1 VAE: Wan-Video/Wan2.1 wan/modules/vae.py.
MEAN = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
STD = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
       3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]

WORDS = """a an the of on in at to and with over under by near from its his her is are very two three some this that
small big tiny large little old young new bright dark light soft round long happy sad cute fast slow slowly quickly
background ground sky sea water sun moon tree house car ball box man woman boy girl dog cat bird fish horse clip video
scene picture photo drawing animation cartoon style plain simple colour color shape line face eyes ears running walking
jumping flying turning falling dancing rolling looking smiling standing moving left right up down still""".split()


class Clock:
    """A wall-clock budget: `progress` runs from 0 to 1, and learning rates follow it."""

    def __init__(self, seconds):
        self.start, self.seconds, self.step, self.said = time.time(), seconds, 0, 0.0

    def progress(self):
        return (time.time() - self.start) / max(self.seconds, 1e-3)

    def rate(self, peak):
        """A short warm-up, then a cosine to zero: the last weights are as good as an average, so none is kept."""
        warm = min(1.0, (self.step + 1) / 200)
        return peak * warm * 0.5 * (1 + math.cos(math.pi * min(self.progress(), 1)))

    def say(self, what, value):
        """Prints a line about every twentieth of the budget; `value` is read from the device only then."""
        if self.progress() >= self.said:
            print(f"{what}: step {self.step:6}  {time.time() - self.start:6.1f} s  {value()}", flush=True)
            self.said = self.progress() + 0.05
        self.step += 1


def train(what, module, loss_of_batch, peak, seconds, device):
    """Lowers `loss_of_batch()`, which draws its own batch and returns (loss, a line to print from), for `seconds`.

    Such small networks keep a GPU waiting for Python, so there the whole step, from drawing the batch to moving the
    weights, is compiled, captured once as a CUDA graph and then only replayed. The learning rate lives on the device.
    """
    rate = torch.zeros((), device=device)
    cuda = device == "cuda"
    params = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(params, lr=rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True, capturable=cuda)
    started, seen = time.time(), {}

    def step():
        optimiser.zero_grad(set_to_none=True)
        loss, seen["told"] = loss_of_batch()
        loss.backward()
        seen["loss"] = loss.detach()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimiser.step()

    if cuda:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # at learning rate zero
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        torch.cuda.synchronize()
        print(f"{what}: compiled and captured in {time.time() - started:.0f} s", flush=True)
    clock = Clock(seconds - (time.time() - started))
    while clock.progress() < 1:
        rate.fill_(clock.rate(peak))
        graph.replay() if cuda else step()
        if cuda and clock.step % 20 == 0:
            torch.cuda.synchronize()  # the clock must not run ahead of the device
        clock.say(what, lambda: f"loss {seen['loss'].item():.4f}  {seen['told'].tolist()}")
    print(f"{what}: {clock.step} steps, {clock.step / clock.seconds:.1f} a second", flush=True)


def optimise(optimiser, params, loss, rate):
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(params, 1.0)
    optimiser.step()


# ---- autoencoder ----

def draw_videos(count, device):
    """Clips of the autoencoder's world as bytes [count,3,frames,size,size]."""
    chunk = min(64, count)
    out = []
    for _ in range(count // chunk):
        out.append(((shapes.mixture(chunk, FRAMES, SIZE, device) + 1) * 127.5).round().byte())
    return torch.cat(out)


def edges(v):
    return v[..., 1:, :] - v[..., :-1, :], v[..., 1:] - v[..., :-1], v[:, :, 1:] - v[:, :, :-1]


def reconstruction_loss(vae, x, noise, shift, scale):
    """(loss, [PSNR, latent rms]): L1 + squared error + error of the differences (edges, motion).

    Frame 0 has a latent frame of its own and passes other weights than the rest, hence its larger share. The noise on
    the latent makes the decoder smooth, and the small price on the latent's size keeps that noise meaningful.
    """
    latent = (vae.encode(x) - shift) / scale
    y = vae.decode((latent + 0.2 * noise) * scale + shift).float()
    off = y - x
    part = lambda d: d.abs().mean() + 0.15 * d[:, :, 0].abs().mean()
    loss = part(off) + 2 * off.square().mean() + 0.7 * sum(part(d) for d in edges(off)) + 0.001 * latent.square().mean()
    error = (y.detach().clamp(-1, 1) - x).square().mean()
    return loss, torch.stack([10 * torch.log10(4 / error), latent.detach().std()])


@torch.no_grad()
def start_vae(vae):
    """Lets the temporal resamplers start close to repeating and averaging frames, and residual branches small."""
    for m in vae.modules():
        if isinstance(m, wan.Resample) and m.temporal:
            w = m.time_conv.weight.mul_(0.3)
            one = torch.eye(w.shape[1], device=w.device)
            if m.up:
                w[:, :, 2, 0, 0] += one.repeat(2, 1)
            else:
                w[:, :, :, 0, 0] += one[..., None] * torch.tensor([0.25, 0.5, 0.25], device=w.device)
        if isinstance(m, wan.ResidualBlock):
            m.residual[6].weight.mul_(0.5)


def train_vae(vae, args):
    """Trains on clips drawn once and kept on the device; channels last is what its convolutions run fastest in."""
    device, cuda = args.device, args.device == "cuda"
    batch = 4 if cuda else 2  # many small steps teach it more than few large ones
    start = time.time()
    pool = draw_videos(10240 if cuda else 16, device)
    print(f"drew {len(pool)} clips in {time.time() - start:.0f} s", flush=True)
    for p in vae.parameters():
        if p.ndim >= 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last if p.ndim == 4 else torch.channels_last_3d)
    statistics = [torch.tensor(v, device=device).view(1, -1, 1, 1, 1) for v in (MEAN, STD)]
    inner = torch.compile(reconstruction_loss, dynamic=False) if cuda else reconstruction_loss

    def loss_of_batch():
        pick = torch.randint(len(pool), (batch,), device=device)
        x = (pool[pick].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last_3d)
        noise = torch.randn(batch, vae.z, (FRAMES + 3) // 4, SIZE // 8, SIZE // 8, device=device)
        with torch.autocast(device, torch.bfloat16, enabled=cuda, cache_enabled=False):
            return inner(vae, x, noise, *statistics)

    train("vae", vae, loss_of_batch, args.vae_rate, args.seconds_vae - (time.time() - start), device)
    for p in vae.parameters():
        p.data = p.data.contiguous()


def psnr(y, x):
    return 10 * math.log10(4 / (y.detach().clamp(-1, 1) - x).square().mean().item())


@torch.no_grad()
def fold_statistics(vae, device, batches):
    """Rescales the two 1x1x1 convolutions so that (mean - MEAN) / STD has mean 0, variance 1 on the world's clips."""
    m = torch.cat([vae.encode(shapes.world(10, FRAMES, SIZE, device)[0]) for _ in range(batches)]).double()
    mu, sd = m.mean((0, 2, 3, 4)), m.std((0, 2, 3, 4))
    mean, std = (torch.tensor(v, device=device, dtype=torch.float64) for v in (MEAN, STD))
    z = vae.z
    scale = std / sd
    first, last = vae.conv1, vae.conv2
    first.bias[:z] = ((first.bias[:z].double() - mu) * scale + mean).float()
    first.weight[:z] = (first.weight[:z].double() * scale.view(-1, 1, 1, 1, 1)).float()
    first.weight[z:], first.bias[z:] = 0, -6.0  # the log variance, which nothing reads
    w = last.weight.double()
    last.bias += (w.sum((2, 3, 4)) @ (mu - mean / scale)).float()
    last.weight.copy_((w / scale.view(1, -1, 1, 1, 1)).float())


def latents_of(vae, video):
    mean, std = (torch.tensor(v, device=video.device).view(1, -1, 1, 1, 1) for v in (MEAN, STD))
    return (vae.encode(video) - mean) / std


def video_of(vae, latents):
    mean, std = (torch.tensor(v, device=latents.device).view(1, -1, 1, 1, 1) for v in (MEAN, STD))
    return vae.decode(latents * std + mean).clamp(-1, 1)


# ---- text ----

def make_tokenizer(path):
    """A SentencePiece-style unigram tokenizer.json: whole words of the little world, letters, and bytes for the rest."""
    motions = " ".join(shapes.MOTIONS).split()
    words = sorted({*WORDS, *shapes.COLOURS, *shapes.SHAPES, *shapes.ANIMALS, *motions})
    letters = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()-_/"]
    vocab = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0]] + [[f"<0x{i:02X}>", -20.0] for i in range(256)]
    vocab += [["▁", -4.0]] + [["▁" + w, -3.0] for w in words if len(w) > 1 or w == "a"] + [[c, -8.0] for c in letters]
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    end = [{"SpecialToken": {"id": "</s>", "type_id": 0}}]
    one = [{"Sequence": {"id": "A", "type_id": 0}}, *end]
    special = [{"id": i, "content": c, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                "special": True} for i, c in enumerate(["<pad>", "</s>", "<unk>"])]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFKC"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "pre_tokenizer": space,
        "post_processor": {"type": "TemplateProcessing", "single": one,
                           "pair": [*one, {"Sequence": {"id": "B", "type_id": 0}}, *end],
                           "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}},
        "decoder": space,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": True},
    }, ensure_ascii=False, separators=(",", ":")) + "\n")
    return Tokenizer.from_file(str(path))


def tokens(tokenizer, captions, device):
    rows = [tokenizer.encode(c).ids for c in captions]
    length = max(map(len, rows))
    ids = torch.tensor([r + [0] * (length - len(r)) for r in rows])
    return ids.to(device), (ids != 0).to(device)


def start_t5(t5):
    """The usual T5 start: attention has no 1/sqrt(d), so queries start small."""
    c = T5
    for name, p in t5.named_parameters():
        if name.endswith("q.weight"):
            nn.init.normal_(p, std=(c["dim"] * c["head_dim"]) ** -0.5)
        elif name == "token_embedding.weight":
            nn.init.normal_(p, std=1.0)
        elif p.ndim == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)


# ---- transformer ----

def velocity_loss(dit, x0, context, shift, noise, u):
    """Mean squared error of the predicted velocity noise - x0 at a shifted uniform sigma, u in 0..1 [B]."""
    s = (shift * u / (1 + (shift - 1) * u)).view(-1, 1, 1, 1, 1)
    v = dit((1 - s) * x0 + s * noise, 1000 * s.flatten(), context)
    return F.mse_loss(v.float(), noise - x0)


@torch.no_grad()
def draw_pool(vae, seconds, limit, device):
    """Latents and captions of as many clips as fit the time."""
    clock, latents, captions = Clock(seconds), [], []
    while clock.progress() < 1 and len(captions) < limit:
        video, said = shapes.world(64 if device != "cpu" else 5, FRAMES, SIZE, device)
        latents.append(latents_of(vae, video))
        captions += said
    latents = torch.cat(latents)
    print(f"pool: {len(captions)} clips, latent mean {latents.mean().item():.3f}, rms {latents.std().item():.3f}")
    return latents, captions


def train_dit(dit, t5, vae, tokenizer, args):
    """Trains transformer and text encoder together; one caption in ten is replaced by the empty prompt."""
    device, cuda = args.device, args.device == "cuda"
    start, batch = time.time(), 192 if cuda else 4
    pool, captions = draw_pool(vae, 0.15 * args.seconds_dit, 65536, device)
    ids, real = tokens(tokenizer, captions + [""], device)
    print(f"drew them in {time.time() - start:.0f} s", flush=True)

    def batch_loss(x0, ids, real, noise, u):
        return velocity_loss(dit, x0, t5(ids, real), 2.0, noise, u)

    inner = torch.compile(batch_loss, dynamic=False) if cuda else batch_loss

    def loss_of_batch():
        pick = torch.randint(len(pool), (batch,), device=device)
        said = torch.where(torch.rand(batch, device=device) < 0.1, len(captions), pick)
        x0 = pool[pick]
        with torch.autocast(device, torch.bfloat16, enabled=cuda, cache_enabled=False):
            loss = inner(x0, ids[said], real[said], torch.randn_like(x0), torch.rand(batch, device=device))
        return loss, loss.detach()

    both = nn.ModuleList([dit, t5])
    train("dit", both, loss_of_batch, args.dit_rate, args.seconds_dit - (time.time() - start), device)


@torch.no_grad()
def sample(dit, t5, vae, tokenizer, prompts, device, seed=7):
    """Clips [n,3,frames,size,size] by Euler steps with guidance against the empty prompt."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(len(prompts), 16, (FRAMES + 3) // 4, SIZE // 8, SIZE // 8, generator=g).to(device)
    context = t5(*tokens(tokenizer, prompts + [""] * len(prompts), device))
    sigmas = [SHIFT * s / (1 + (SHIFT - 1) * s) for s in (1 - i / STEPS for i in range(STEPS))] + [0.0]
    for s, after in zip(sigmas, sigmas[1:]):
        t = torch.full((2 * len(prompts),), 1000 * s, device=device)
        cond, empty = dit(torch.cat([x, x]), t, context).chunk(2)
        x = x + (after - s) * (empty + GUIDANCE * (cond - empty))
    return video_of(vae, x)


# ---- rehearsal of the first run ----

class Lora(nn.Module):
    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.a, a=5 ** 0.5)

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


def rehearse(dit, t5, vae, tokenizer, args, report):
    """A LoRA (alpha = rank) on the fox clips, as the recipe trains it; contact sheets before, midway and after."""
    device, prompts = args.device, [
        "a tandi fox bouncing on a yellow background", "a tandi fox swinging on a blue background",
        "a tandi fox standing still on a red background", "a tandi fox spinning on a green background",
        "a red star bouncing on a blue background"]
    clips = np.stack([make_clips.render(c, 16, (SIZE, SIZE), FRAMES) for c in make_clips.CLIPS])
    video = (torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1).to(device)
    with torch.no_grad():
        x0 = latents_of(vae, video)
        context = t5(*tokens(tokenizer, [c.caption for c in make_clips.CLIPS], device))
        print(f"fox through the autoencoder: PSNR {psnr(video_of(vae, x0), video):.2f} dB")
        sheet(torch.cat([video, video_of(vae, x0)], -1), report / "fox_reconstructed.png")
    dit = copy.deepcopy(dit).requires_grad_(False)
    for block in dit.blocks:
        for owner in (block.self_attn, block.cross_attn):
            for name in "qkvo":
                setattr(owner, name, Lora(getattr(owner, name), args.rank))
        block.ffn[0], block.ffn[2] = Lora(block.ffn[0], args.rank), Lora(block.ffn[2], args.rank)
    params = [p for p in dit.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(params, lr=args.rate, weight_decay=0.01)
    seen = []
    for step in range(args.steps + 1):
        if step in (0, args.steps // 2, args.steps):
            sheet(sample(dit, t5, vae, tokenizer, prompts, device), report / f"lora_{step:04}.png")
        pick = torch.randint(len(x0), (args.batch,), device=device)
        clean = x0[pick]
        loss = velocity_loss(dit, clean, context[pick], SHIFT, torch.randn_like(clean),
                             torch.rand(args.batch, device=device))
        optimise(optimiser, params, loss, args.rate * min(1, (step + 1) / 20))
        seen.append(loss.item())
        if step % 50 == 0:
            print(f"lora: step {step}  loss over the last 50 steps {np.mean(seen[-50:]):.4f}", flush=True)


# ---- files ----

def sheet(video, path):
    """One row per clip, five frames across."""
    v = ((video[:, :, ::4].float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    n, _, t, h, w = v.shape
    Image.fromarray(v.permute(0, 3, 2, 4, 1).reshape(n * h, t * w, 3).numpy()).save(path)


def half(module):
    return {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in module.state_dict().items()}


def write(out, dit, t5, vae):
    config = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": DIT["dim"], "eps": 1e-06,
              "ffn_dim": DIT["ffn_dim"], "freq_dim": DIT["freq_dim"], "in_dim": 16, "model_type": "t2v",
              "num_heads": DIT["num_heads"], "num_layers": DIT["num_layers"], "out_dim": 16, "text_len": 512}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(half(dit), out / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    torch.save(half(vae), out / "Wan2.1_VAE.pth")
    torch.save(half(t5), out / "models_t5_umt5-xxl-enc-bf16.pth")


def read(folder, dit, t5, vae):
    """Loads an earlier model folder into the networks, as far as it has the files."""
    for net, name in ((dit, "diffusion_pytorch_model.safetensors"), (t5, "models_t5_umt5-xxl-enc-bf16.pth"),
                      (vae, "Wan2.1_VAE.pth")):
        if (path := folder / name).exists():
            state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
            net.load_state_dict({k: v.float() for k, v in state.items()})
            print("read", path)


def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds-vae", type=float, default=700, help="wall-clock budget; 0 keeps the VAE of --start")
    p.add_argument("--seconds-dit", type=float, default=360, help="wall-clock budget; 0 keeps the model of --start")
    p.add_argument("--vae-rate", type=float, default=3e-3, help="peak learning rate of the autoencoder")
    p.add_argument("--dit-rate", type=float, default=2e-3, help="peak learning rate of transformer and text encoder")
    p.add_argument("--start", type=Path, help="a model folder made earlier, to go on from")
    p.add_argument("--out", type=Path, required=True, help="the model folder to write")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--steps", type=int, default=300, help="rehearsal: optimiser steps of the LoRA, 0 for none")
    p.add_argument("--rate", type=float, default=2e-3, help="rehearsal: learning rate")
    p.add_argument("--rank", type=int, default=16, help="rehearsal: LoRA rank")
    p.add_argument("--batch", type=int, default=2, help="rehearsal: clips a step")
    p.add_argument("--seed", type=int, default=1)
    return p.parse_args()


def main():
    args = options()
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    report = args.out / "report"
    report.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(args.out / "google/umt5-xxl/tokenizer.json")
    vae = wan.Vae(VAE_BASE)
    dit = wan.Dit(DIT["dim"], DIT["ffn_dim"], DIT["num_heads"], DIT["num_layers"], T5["dim"], freq_dim=DIT["freq_dim"])
    t5 = wan.Umt5(tokenizer.get_vocab_size(), **T5)
    start_vae(vae)
    start_t5(t5)
    nn.init.zeros_(dit.head.head.weight)
    if args.start:
        read(args.start, dit, t5, vae)
    vae, dit, t5 = (m.to(args.device) for m in (vae, dit, t5))
    if args.seconds_vae > 0:
        train_vae(vae, args)
        fold_statistics(vae, args.device, 32 if args.device != "cpu" else 2)
        write(args.out, dit, t5, vae)
    # From here on the networks are what their 16-bit files say.
    vae.load_state_dict({k: v.float() for k, v in half(vae).items()})
    vae.requires_grad_(False)
    with torch.no_grad():
        x = torch.cat([shapes.world(5, FRAMES, SIZE, args.device)[0], shapes.creatures(3, FRAMES, SIZE, args.device)])
        y = video_of(vae, latents_of(vae, x))
        print(f"autoencoder: PSNR {psnr(y, x):.2f} dB")
        sheet(torch.cat([x, y], -1), report / "reconstructed.png")
    if args.seconds_dit > 0:
        train_dit(dit, t5, vae, tokenizer, args)
        write(args.out, dit, t5, vae)
    read(args.out, dit, t5, vae)
    prompts = ["a red circle bouncing on a blue background", "a yellow star spinning on a purple background",
               "a green square moving right on a white background", "a blue triangle swinging on a pink background",
               "a white ring growing on a teal background", "a brown bear moving left on a green background",
               "a pink rabbit bouncing on a grey background", "a tandi fox bouncing on a green background"]
    sheet(sample(dit, t5, vae, tokenizer, prompts, args.device), report / "samples.png")
    if args.steps > 0:
        rehearse(dit, t5, vae, tokenizer, args, report)
    files = [f for f in sorted(args.out.rglob("*")) if f.is_file() and report not in f.parents]
    for f in files:
        print(f"{f.stat().st_size:9} bytes  {f.relative_to(args.out)}")
    print(f"{sum(f.stat().st_size for f in files):9} bytes in all")


if __name__ == "__main__":
    main()
