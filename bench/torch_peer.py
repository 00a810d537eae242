"""The PyTorch side of compare.sh: speed and memory of the Wan DiT, VAE and text encoder at their real shapes.

diffusers' models and peft's LoRA, with random weights, so only speed and memory mean anything. Each line printed is one
JSON object, with the field names of `tandem bench`. Needs torch, diffusers, transformers, peft, and CUDA devices.

    python torch_peer.py ceilings
    python torch_peer.py train --gpus 2 --weights bf16 --frames 49
    python torch_peer.py train --gpus 2 --weights fp8  --frames 49
    python torch_peer.py infer --frames 81 [--compile]
    python torch_peer.py vae   --frames 81
    python torch_peer.py text
"""
import argparse, json, sys, time
import torch
import torch.nn as nn
import torch.nn.functional as F

DIT_14B = dict(num_attention_heads=40, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096,
               freq_dim=256, ffn_dim=13824, num_layers=40)
DIT_5B = dict(num_attention_heads=24, attention_head_dim=128, in_channels=48, out_channels=48, text_dim=4096,
              freq_dim=256, ffn_dim=14336, num_layers=30)
DIT_1_3B = dict(num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096,
                freq_dim=256, ffn_dim=8960, num_layers=30)
CONFIGS = {"14b": DIT_14B, "5b": DIT_5B, "1.3b": DIT_1_3B}
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


def say(**kw):
    print(json.dumps(kw), flush=True)


def sync():
    for i in range(torch.cuda.device_count()):
        torch.cuda.synchronize(i)


def timed(fn, n=3, warm=1):
    for _ in range(warm):
        fn()
    out = []
    for _ in range(n):
        sync()
        t = time.perf_counter()
        fn()
        sync()
        out.append(time.perf_counter() - t)
    out.sort()
    return out[len(out) // 2]


def reset_peaks():
    for i in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(i)


def peaks():
    return [round(torch.cuda.max_memory_allocated(i) / 2**30, 2) for i in range(torch.cuda.device_count())]


def dit_flops(cfg, tokens, text=512):
    """Floating-point operations of one forward pass of one sample: (linear, attention)."""
    d, ff, n = cfg["num_attention_heads"] * cfg["attention_head_dim"], cfg["ffn_dim"], cfg["num_layers"]
    linear = 2 * tokens * (6 * d * d + 2 * d * ff) + 2 * text * 2 * d * d
    attn = 4 * tokens * tokens * d + 4 * tokens * text * d
    return n * linear, n * attn


def tokens_of(frames, height, width, spatial=8):
    return ((frames - 1) // 4 + 1) * (height // (2 * spatial)) * (width // (2 * spatial))


class Fp8Linear(nn.Linear):
    """Weight-only e4m3 with one scale per output row, dequantised at use."""

    def quantise(self):
        w = self.weight.data
        scale = w.abs().amax(dim=1, keepdim=True).clamp(min=1e-12).float() / 448.0
        self.register_buffer("w8", (w.float() / scale).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter(torch.empty(0, dtype=w.dtype, device=w.device), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.w8.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def build_dit(cfg, device, dtype=torch.bfloat16):
    from diffusers import WanTransformer3DModel
    with torch.device("meta"):
        m = WanTransformer3DModel(**cfg)
    rope = m.rope
    m = m.to(dtype).to_empty(device=device)
    for name, p in m.named_parameters():
        if p.ndim > 1:
            p.data.normal_(0, 0.02)
        else:
            p.data.fill_(1.0 if "norm" in name else 0.0)
        p.requires_grad_(False)
    fresh = type(rope)(cfg["attention_head_dim"], (1, 2, 2), 1024)   # its buffers do not survive meta
    m.rope = fresh.to(device)
    return m


def to_fp8(m):
    """Every Linear of the blocks but the adapters' own."""
    for block in m.blocks:
        for name, mod in block.named_modules():
            if type(mod) is nn.Linear and "lora_" not in name:
                mod.__class__ = Fp8Linear
                mod.quantise()


def add_lora(m, rank=32):
    from peft import LoraConfig
    m.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS, init_lora_weights="gaussian"))
    ps = [p for n, p in m.named_parameters() if "lora_" in n]
    for p in ps:
        p.data = p.data.float()
        p.requires_grad_(True)
    return ps


def split(m, at):
    """Blocks from `at` on live on cuda:1; every one of them pulls its inputs there, and the head pulls them back."""
    def bridge(dev):
        def move(v):
            if torch.is_tensor(v):
                return v.to(dev, non_blocking=True)
            return type(v)(move(x) for x in v) if isinstance(v, (tuple, list)) else v

        def hook(_, args, kwargs):
            return tuple(move(a) for a in args), {k: move(v) for k, v in kwargs.items()}
        return hook
    for b in m.blocks[at:]:
        b.to("cuda:1")
        b.register_forward_pre_hook(bridge("cuda:1"), with_kwargs=True)
    m.blocks[-1].register_forward_hook(lambda _, args, out: out.to("cuda:0"))


def train(a):
    cfg = CONFIGS[a.model]
    spatial = 16 if a.model == "5b" else 8
    m = build_dit(cfg, "cuda:0")
    ps = add_lora(m, a.rank)
    if a.weights == "fp8":
        to_fp8(m)
    m.enable_gradient_checkpointing()
    m.train()
    if a.gpus == 2:
        split(m, cfg["num_layers"] // 2)
    if a.compile:
        for b in m.blocks:
            b.compile()
    opt = torch.optim.AdamW(ps, lr=1e-4)
    f = (a.frames - 1) // 4 + 1
    shape = (1, cfg["in_channels"], f, a.height // spatial, a.width // spatial)
    tokens = tokens_of(a.frames, a.height, a.width, spatial)
    text = torch.randn(1, 512, 4096, device="cuda:0", dtype=torch.bfloat16)

    def step():
        for _ in range(a.accumulate):
            x = torch.randn(shape, device="cuda:0")
            noise = torch.randn_like(x)
            t = torch.rand(1, device="cuda:0")
            with torch.autocast("cuda", torch.bfloat16):
                out = m((1 - t) * x + t * noise, t * 1000, text, return_dict=False)[0]
            loss = F.mse_loss(out.float(), noise - x) / a.accumulate
            loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in ps if p.device.index == 0], 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)

    reset_peaks()
    s = timed(step, n=a.n, warm=1)
    lin, att = dit_flops(cfg, tokens)
    useful = a.accumulate * (lin * 2 + att * 3.5)              # forward + input gradients; recomputation not counted
    say(what="train", model=a.model, gpus=a.gpus, weights=a.weights, frames=a.frames, size=f"{a.height}x{a.width}",
        tokens=tokens, accumulate=a.accumulate, compile=a.compile, rank=a.rank, s_per_step=round(s, 3),
        useful_tflops=round(useful / s / 1e12, 1), peak_gib=peaks())


def infer(a):
    cfg = CONFIGS[a.model]
    spatial = 16 if a.model == "5b" else 8
    m = build_dit(cfg, "cuda:0").eval()
    if a.weights == "fp8":
        to_fp8(m)
    if a.compile:
        for b in m.blocks:
            b.compile()
    f = (a.frames - 1) // 4 + 1
    x = torch.randn((1, cfg["in_channels"], f, a.height // spatial, a.width // spatial), device="cuda:0",
                    dtype=torch.bfloat16)
    tokens = tokens_of(a.frames, a.height, a.width, spatial)
    text = torch.randn(1, 512, 4096, device="cuda:0", dtype=torch.bfloat16)
    t = torch.full((1,), 500.0, device="cuda:0")
    reset_peaks()
    from torch.nn.attention import sdpa_kernel, SDPBackend
    for name, be in {"default": None, "cudnn": SDPBackend.CUDNN_ATTENTION}.items():
        def fwd():
            with torch.no_grad():
                if be is None:
                    m(x, t, text, return_dict=False)
                else:
                    with sdpa_kernel(be):
                        m(x, t, text, return_dict=False)
        try:
            s = timed(fwd, n=a.n, warm=1)
        except Exception as e:
            say(what="infer", attention=name, error=str(e)[:200])
            continue
        lin, att = dit_flops(cfg, tokens)
        say(what="infer", model=a.model, weights=a.weights, attention=name, compile=a.compile, frames=a.frames,
            size=f"{a.height}x{a.width}", tokens=tokens, s_per_forward=round(s, 4),
            tflops=round((lin + att) / s / 1e12, 1), peak_gib=peaks())


def vae(a):
    from diffusers import AutoencoderKLWan
    for dtype in (torch.bfloat16, torch.float32):
        v = AutoencoderKLWan().to("cuda:0", dtype).eval()
        f = (a.frames - 1) // 4 + 1
        z = torch.randn(1, 16, f, a.height // 8, a.width // 8, device="cuda:0", dtype=dtype)
        x = torch.rand(1, 3, a.frames, a.height, a.width, device="cuda:0", dtype=dtype) * 2 - 1
        with torch.no_grad():
            for tiled in (False, True):
                if tiled:
                    v.enable_tiling()
                torch.cuda.empty_cache()
                reset_peaks()
                d = timed(lambda: v.decode(z, return_dict=False), n=a.n)
                pd = peaks()[0]
                reset_peaks()
                e = timed(lambda: v.encode(x, return_dict=False), n=a.n)
                say(what="vae2.1", dtype=str(dtype), tiled=tiled, frames=a.frames, size=f"{a.height}x{a.width}",
                    decode_s=round(d, 3), decode_peak_gib=pd, encode_s=round(e, 3), encode_peak_gib=peaks()[0])
        del v


def text(a):
    from transformers import UMT5Config, UMT5EncoderModel
    cfg = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                     feed_forward_proj="gated-gelu")
    with torch.device("cuda:0"):
        torch.set_default_dtype(torch.bfloat16)
        m = UMT5EncoderModel(cfg).eval()
        torch.set_default_dtype(torch.float32)
    ids = torch.randint(0, 256384, (1, 512), device="cuda:0")
    mask = torch.ones_like(ids)
    with torch.no_grad():
        s = timed(lambda: m(ids, attention_mask=mask), n=5, warm=2)
    say(what="umt5-xxl", tokens=512, s=round(s, 4), peak_gib=peaks()[0])


def ceilings(a):
    from torch.nn.attention import sdpa_kernel, SDPBackend
    dev = "cuda:0"
    p = torch.cuda.get_device_properties(0)
    say(what="device", name=p.name, sms=p.multi_processor_count, torch=torch.__version__,
        cudnn=torch.backends.cudnn.version(), count=torch.cuda.device_count())
    n = 2**30
    src = torch.empty(n, dtype=torch.uint8, device=dev).random_()
    dst = torch.empty_like(src)
    s = timed(lambda: dst.copy_(src), n=10, warm=3)
    say(what="copy", gb_s=round(2 * n / s / 1e9, 1))
    host = torch.empty(n, dtype=torch.uint8).pin_memory()
    s = timed(lambda: dst.copy_(host, non_blocking=True), n=5)
    say(what="h2d_pinned", gb_s=round(n / s / 1e9, 1))
    s = timed(lambda: host.copy_(dst, non_blocking=True), n=5)
    say(what="d2h_pinned", gb_s=round(n / s / 1e9, 1))
    if torch.cuda.device_count() > 1:
        far = torch.empty(n, dtype=torch.uint8, device="cuda:1")
        s = timed(lambda: far.copy_(src), n=5)
        say(what="peer_copy", gb_s=round(n / s / 1e9, 1), can_access=torch.cuda.can_device_access_peer(0, 1))
        del far
    del src, dst, host
    for m, k, o in [(8192, 8192, 8192), (20280, 5120, 5120), (20280, 5120, 13824), (20280, 13824, 5120)]:
        x = torch.randn(m, k, device=dev, dtype=torch.bfloat16)
        w = torch.randn(o, k, device=dev, dtype=torch.bfloat16)
        s = timed(lambda: F.linear(x, w), n=10, warm=3)
        x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        one = torch.ones((), device=dev)
        rx, rw = torch.ones(m, 1, device=dev), torch.ones(1, o, device=dev)
        s8 = timed(lambda: torch._scaled_mm(x8, w8.t(), one, one, out_dtype=torch.bfloat16), n=10, warm=3)
        try:
            s8r = timed(lambda: torch._scaled_mm(x8, w8.t(), rx, rw, out_dtype=torch.bfloat16), n=10, warm=3)
        except Exception:
            s8r = float("nan")
        fl = 2 * m * k * o / 1e12
        say(what="gemm", shape=[m, k, o], bf16_tflops=round(fl / s, 1), fp8_tflops=round(fl / s8, 1),
            fp8_rowwise_tflops=round(fl / s8r, 1))
    for L in (20280, 32760, 75600):
        q, k, v = (torch.randn(1, 40, L, 128, device=dev, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        g = torch.randn_like(q)
        fl = 4 * L * L * 128 * 40 / 1e12
        for name, be in {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}.items():
            def fwd():
                with sdpa_kernel(be), torch.no_grad():
                    F.scaled_dot_product_attention(q, k, v)

            def both():
                with sdpa_kernel(be):
                    torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), g)
            try:
                sf, sb = timed(fwd, n=5, warm=2), timed(both, n=3, warm=1)
                say(what="attention", L=L, backend=name, fwd_ms=round(sf * 1e3, 2), fwd_tflops=round(fl / sf, 1),
                    bwd_ms=round((sb - sf) * 1e3, 2), bwd_tflops=round(2.5 * fl / (sb - sf), 1))
            except Exception as e:
                say(what="attention", L=L, backend=name, error=str(e)[:200])


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("what", choices=["ceilings", "train", "infer", "vae", "text"])
    ap.add_argument("--model", default="14b", choices=list(CONFIGS))
    ap.add_argument("--gpus", type=int, default=1)
    ap.add_argument("--weights", default="bf16", choices=["bf16", "fp8"])
    ap.add_argument("--frames", type=int, default=49)
    ap.add_argument("--height", type=int, default=480)
    ap.add_argument("--width", type=int, default=832)
    ap.add_argument("--rank", type=int, default=32)
    ap.add_argument("--accumulate", type=int, default=1)
    ap.add_argument("--compile", action="store_true")
    ap.add_argument("-n", type=int, default=2)
    a = ap.parse_args()
    torch.manual_seed(0)
    {"ceilings": ceilings, "train": train, "infer": infer, "vae": vae, "text": text}[a.what](a)
