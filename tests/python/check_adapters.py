"""Do diffusers and PEFT themselves load the adapter files that Tandem writes, and do these do there what they should?

Run:  python tests/python/check_adapters.py [path of the tandem binary]     (needs torch, diffusers, peft, safetensors)

A trained adapter of the fixtures (rank 4, alpha 8) is converted by `tandem convert` into every format. Each file is loaded
into the tiny transformer of the fixtures by the loader of the program it is for, and the output is compared with that
of the same model with the golden merged weights in it.
"""
import json
import os
import subprocess
import sys
import tempfile

import diffusers
import peft
import torch
from diffusers import WanTransformer3DModel
from peft import PeftModel
from safetensors.torch import load_file

HERE = os.path.dirname(os.path.abspath(__file__))
FIXTURES = os.path.join(HERE, "..", "fixtures")
TANDEM = sys.argv[1] if len(sys.argv) > 1 else os.path.join(HERE, "..", "..", "target", "release", "tandem")
# An independent forward in f32: the fixtures' tolerance for outputs.
TOLERANCE = 1.5e-4


def model(kind):
    folder = os.path.join(FIXTURES, "dit", kind)
    with open(os.path.join(folder, "config_diffusers.json")) as file:
        config = {k: v for k, v in json.load(file).items() if not k.startswith("_")}
    net = WanTransformer3DModel(**config)
    net.load_state_dict(load_file(os.path.join(folder, "weights_diffusers.safetensors")))
    return net.eval()


def output(net, kind):
    io = load_file(os.path.join(FIXTURES, "dit", kind, "io.safetensors"))
    image = io.get("clip_fea", io.get("image_embeds"))
    with torch.no_grad():
        return net(io["input"], io["timestep"], io["context"], encoder_hidden_states_image=image, return_dict=False)[0]


def convert(source, target, style):
    command = [TANDEM, "convert", source, target, "--format", style, "--precision", "f32"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def through_diffusers(net, path):
    """As WanPipeline.load_lora_weights does for its transformer, its key converters included."""
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    state, metadata = WanLoraLoaderMixin.lora_state_dict(path, return_lora_metadata=True)
    WanLoraLoaderMixin.load_lora_into_transformer(state, net, adapter_name="a", metadata=metadata)
    return net


def through_peft(net, folder):
    return PeftModel.from_pretrained(net, folder)


class Layer(torch.nn.Module):
    """One linear layer under the name that it has in a Wan transformer."""

    def __init__(self, weight, bias):
        super().__init__()
        attention = torch.nn.Module()
        attention.to_q = torch.nn.Linear(weight.shape[1], weight.shape[0])
        attention.to_q.weight.data, attention.to_q.bias.data = weight, bias
        block = torch.nn.Module()
        block.attn1 = attention
        self.blocks = torch.nn.ModuleList([block])

    def forward(self, x):
        return self.blocks[0].attn1.to_q(x)


def dora():
    """A DoRA of PEFT's through Tandem and back into PEFT."""
    golden = load_file(os.path.join(FIXTURES, "dora", "peft_layer.safetensors"))
    with tempfile.TemporaryDirectory() as folder:
        target = os.path.join(folder, "adapter")
        convert(os.path.join(FIXTURES, "dora"), target, "peft")
        net = through_peft(Layer(golden["weight"], golden["bias"]), target)
        with torch.no_grad():
            return float((net(golden["x"]) - golden["y"]).abs().max())


def main():
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, peft {peft.__version__}")
    failures = 0
    for kind in ["t2v", "i2v21"]:
        golden = model(kind)
        merged = load_file(os.path.join(FIXTURES, "lora", kind, "merged_weights_diffusers.safetensors"))
        base = output(golden, kind)
        state = golden.state_dict()
        state.update(merged)
        golden.load_state_dict(state)
        expected = output(golden, kind)
        print(f"{kind}: the adapter moves the output by {float((expected - base).abs().max()):.2e}")
        source = os.path.join(FIXTURES, "lora", kind, "kohya.safetensors")
        loaders = [
            ("comfy", through_diffusers),
            ("comfy-alpha", through_diffusers),
            ("diffusers", through_diffusers),
            ("kohya", through_diffusers),
            ("peft", through_peft),
        ]
        for style, load in loaders:
            with tempfile.TemporaryDirectory() as folder:
                target = os.path.join(folder, "adapter" if style == "peft" else "adapter.safetensors")
                convert(source, target, style)
                try:
                    error = float((output(load(model(kind), target), kind) - expected).abs().max())
                except Exception as problem:  # whatever a loader throws is the result of this check
                    error = float("nan")
                    print(f"  {style}: {type(problem).__name__}: {problem}")
            fine = error <= TOLERANCE
            failures += not fine
            print(f"  {style:12} by {load.__name__:18} off by {error:.2e}  {'ok' if fine else 'FAILED'}")
    error = dora()
    failures += not error <= TOLERANCE
    print(f"DoRA of one layer by through_peft, off by {error:.2e}  {'ok' if error <= TOLERANCE else 'FAILED'}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
