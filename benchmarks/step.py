"""How fast a training step is: ours beside the peers', at equal weights, batch, precision and mask.

    python benchmarks/step.py [--mae CHECKOUT] [--repeats 5] [--quick] [--device cuda] [--out FILE.json]

Arms take turns in one process, on one thread; a CPU's time is process time, a GPU's is wall time. A step
is forward, backward and the optimiser's step. Ratios are taken within a repeat: median and range.

    mae        ours · lightly's documented example · facebookresearch/mae's own modules, where CHECKOUT is a
               clone of that repository (their `qk_scale` argument, which timm has dropped, is left out)
    simclr     ours with group and with batch normalisation · lightly's documented example (ResNet-18), in float32
               and in bfloat16; and the same from bytes in memory, views included
    bfloat16   ours in bfloat16 beside ours in float32

Ours has freed memory kept (ssl/devices.py), which in one process the peers then have too.

MAE's losses are compared at equal weights and mask before anything is timed. The share of the ceiling is the
step's floating-point operations over its time, divided by the rate of a large matrix product in the same run.
"""

import argparse
import json
import statistics
import time
import types
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from lightly.loss import NTXentLoss
from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM, SimCLRProjectionHead
from lightly.models.utils import get_at_index, patchify
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from views import cell, machine, one_by_one, spread

from wardround import ssl as methods
from wardround.config import FederationConfig, parse
from wardround.data.procedural import procedural_set
from wardround.ssl.devices import Machine, open_fabric
from wardround.ssl.engine import Plain
from wardround.ssl.method import Method
from wardround.ssl.optimiser import adamw

Step = Callable[[], float]  # one step; returns the loss

# Architecture: width, blocks, heads, and the decoder's (He et al. 2022 for ViT-B; ours for ViT-Ti).
MAES = {"vit_tiny_patch16_224": (192, 12, 3, 96, 2, 3), "vit_base_patch16_224": (768, 12, 12, 512, 8, 16)}

DECODER = ("decoder_dim", "decoder_depth", "decoder_heads")


def main() -> None:
    """Print tables and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mae", type=Path, help="a clone of facebookresearch/mae")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small sizes only, to see that it runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.device == "cpu" else torch.get_num_threads())
    cases = [
        case
        for make in (mae_cases, simclr_cases, bfloat16_cases)
        for case in make(arguments.mae, arguments.repeats, arguments.quick, arguments.device)
    ]
    report = {"date": str(date.today()), "machine": machine(), "device": device_name(arguments.device), "cases": cases}
    show(report)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def mae_cases(checkout: Path | None, repeats: int, quick: bool, device: str) -> list[dict[str, Any]]:
    """Return MAE's cases: ViT-Ti and ViT-B."""
    cases = []
    sizes = [("vit_tiny_patch16_224", 8, 64, 32)] if quick else [("vit_tiny_patch16_224", 16, 224, 16)]
    if not quick:
        sizes.append(("vit_base_patch16_224", 16, 224, 4 if device == "cpu" else 256))
    for name, patch, size, batch in sizes:
        config = recipe(
            {
                "name": "mae",
                **dict(zip(("decoder_dim", "decoder_depth", "decoder_heads"), MAES[name][3:], strict=True)),
            },
            {"name": name, "patch_size": patch},
            size,
            batch,
            "float32" if device == "cpu" else "bfloat16",
        )
        views = torch.randn(batch, 3, size, size, device=device)
        order = torch.rand(batch, (size // patch) ** 2, device=device).argsort(1)
        ours = methods.build(config).to(device)
        arms = {"wardround": our_step(ours, config, (views, order), device)}
        peers: dict[str, nn.Module] = {"lightly": LightlyMAE(name, patch, size)}
        if checkout is not None:
            peers["facebookresearch/mae"] = facebook_mae(checkout, name, patch, size)
        for peer, module in peers.items():
            take_weights(module, ours)
            arms[peer] = peer_step(module.to(device), partial(module, views, order), config.training.precision, device)
        losses = {arm: step() for arm, step in arms.items()}
        assert max(losses.values()) - min(losses.values()) < (1e-5 if device == "cpu" else 1e-2), losses
        cases.append(
            {
                "case": f"mae, {name}, {size} px, batch {batch}, {config.training.precision}",
                "losses": losses,
                **measured(arms, repeats, device),
                "ceiling_share": ceiling_share(ours, (views, order), arms["wardround"], config, device),
            }
        )
    return cases


def simclr_cases(_: Path | None, repeats: int, quick: bool, device: str) -> list[dict[str, Any]]:
    """Return SimCLR's cases in each precision: the step alone, and from bytes."""
    network = "resnet18" if device == "cpu" else "resnet50"
    size, batch = (32, 16) if quick else (64, 64) if device == "cpu" else (224, 256)
    cases = []
    for precision in ("float32", "bfloat16"):
        arms: dict[str, Step] = {}
        whole: dict[str, Step] = {}
        for norm in ("group", "batch"):
            config = recipe({"name": "simclr"}, {"name": network, "norm": norm}, size, batch, precision)
            images = procedural_set(batch, 1, config.data).images
            built = methods.build(config).to(device)
            pair = tuple(torch.randn(batch, 3, size, size, device=device) for _ in range(2))
            arms[f"wardround, {norm}"] = our_step(built, config, pair, device)
            whole[f"wardround, {norm}"] = our_step(built, config, None, device, images)
        peer = LightlySimCLR(network).to(device)
        transform = one_by_one(images, config.data)
        arms["lightly"] = peer_step(peer, partial(peer, *pair), precision, device, sgd=True)
        whole["lightly"] = peer_step(peer, partial(_transformed, peer, transform, device), precision, device, sgd=True)
        title = f"simclr, {network}, {size} px, batch {batch}, {precision}"
        cases.append({"case": title, **measured(arms, repeats, device)})
        cases.append({"case": f"{title}, from bytes", "batch": batch, **measured(whole, repeats, device)})
    return cases


def _transformed(peer: nn.Module, transform: Callable[[], list[Tensor]], device: str) -> Tensor:
    loss: Tensor = peer(*(views.to(device) for views in transform()))
    return loss


def bfloat16_cases(_: Path | None, repeats: int, quick: bool, device: str) -> list[dict[str, Any]]:
    """Return ours in bfloat16 beside ours in float32."""
    cases = []
    for method, network, size, batch in (
        ("mae", {"name": "vit_tiny_patch16_224", "patch_size": 8}, 64, 64),
        ("simclr", {"name": "resnet18"}, 32 if quick else 64, 64),
    ):
        arms = {}
        for precision in ("bfloat16", "float32"):
            config = recipe({"name": method}, network, size, batch, precision)
            built = methods.build(config).to(device)
            images = torch.rand(batch, 3, size, size, device=device)
            arms[precision] = our_step(built, config, built.prepare(images, torch.Generator().manual_seed(1)), device)
        cases.append(
            {"case": f"{method}, {network['name']}, {size} px, batch {batch}", **measured(arms, repeats, device)}
        )
    return cases


def recipe(method: dict[str, Any], backbone: dict[str, Any], size: int, batch: int, precision: str) -> FederationConfig:
    """Return a config for colour images."""
    training = {"rounds": 1, "local_steps": 1, "batch_size": batch, "precision": precision, "clip_norm": 1.0}
    views = {"blur": 0.009, "saturation": 0.4, "hue": 0.1} if method["name"] == "simclr" else {}
    tree = {
        "format": 1,
        "name": "step",
        "method": method,
        "backbone": backbone,
        "views": views,
        "data": {"image_size": size, "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3},
        "training": training,
    }
    return parse(tree, FederationConfig, "benchmark")


def our_step(
    built: Method, config: FederationConfig, inputs: tuple[Tensor, ...] | None, device: str, images: Any = None
) -> Step:
    """Return a step as a site takes it: by the engine, clipping included; from images where they are given."""
    fabric = open_fabric(Machine(device), config.training.precision)
    rows = np.zeros((config.training.batch_size, *config.data.shape), np.uint8) if images is None else images
    engine = Plain(built, rows, config, "benchmark", fabric)
    optimiser = adamw(built, config.training)

    def step() -> float:
        optimiser.zero_grad(set_to_none=True)
        loss = engine.gradients(engine.batch(0) if inputs is None else inputs)
        optimiser.step()
        return loss.item()

    return step


def peer_step(
    module: nn.Module, forward: Callable[[], Tensor], precision: str, device: str, *, sgd: bool = False
) -> Step:
    """Return a peer's step, with the optimiser that its example or script makes."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser: torch.optim.Optimizer = (
        torch.optim.SGD(parameters, lr=0.06) if sgd else torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95))
    )

    def step() -> float:
        optimiser.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = forward()
        loss.backward()
        optimiser.step()
        return loss.item()

    return step


class LightlyMAE(nn.Module):
    """lightly's documented MAE (examples/pytorch/mae.py, from its modules), with the mask given."""

    def __init__(self, name: str, patch: int, size: int) -> None:
        super().__init__()
        dim, depth, heads, *decoder = MAES[name]
        norm = partial(nn.LayerNorm, eps=1e-6)
        shape = {"img_size": size, "patch_size": patch, "embed_dim": dim, "depth": depth, "num_heads": heads}
        vit = timm.models.vision_transformer.VisionTransformer(**shape, num_classes=0, norm_layer=norm)
        self.patch, self.tokens = patch, (size // patch) ** 2
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder = MAEDecoderTIMM(
            num_patches=self.tokens,
            patch_size=patch,
            embed_dim=dim,
            decoder_embed_dim=decoder[0],
            decoder_depth=decoder[1],
            decoder_num_heads=decoder[2],
            norm_layer=norm,
        )

    def forward(self, images: Tensor, order: Tensor) -> Tensor:
        """Return the mean error over the hidden patches, normalised patch by patch, as their example does."""
        visible = max(1, int(self.tokens * 0.25))
        places = order + 1  # place 0 is the class token
        keep = torch.cat([places.new_zeros(len(places), 1), places[:, :visible]], 1)
        hidden = places[:, visible:]
        encoded = self.decoder.embed(self.backbone.encode(images=images, idx_keep=keep))
        masked = self.decoder.mask_token.repeat(len(images), self.tokens + 1, 1)
        masked = torch.scatter(masked, 1, keep[..., None].expand(-1, -1, encoded.shape[-1]), encoded.to(masked.dtype))
        predicted = self.decoder.predict(get_at_index(self.decoder.decode(masked), hidden))
        target = get_at_index(patchify(images, self.patch), hidden - 1)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return nn.functional.mse_loss(predicted.float(), target)


class LightlySimCLR(nn.Module):
    """lightly's documented SimCLR (examples/pytorch/simclr.py, from its modules): two forwards, NT-Xent."""

    def __init__(self, network: str) -> None:
        super().__init__()
        resnet = getattr(torchvision.models, network)()
        width = resnet.fc.in_features
        self.backbone = nn.Sequential(*list(resnet.children())[:-1])
        self.head = SimCLRProjectionHead(width, 512, 128)
        self.criterion = NTXentLoss(temperature=0.2)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the loss of a batch of pairs."""
        embedded = [self.head(self.backbone(views).flatten(start_dim=1)) for views in (first, second)]
        loss: Tensor = self.criterion(*embedded)
        return loss


def facebook_mae(checkout: Path, name: str, patch: int, size: int) -> nn.Module:
    """Return facebookresearch/mae's own model, whose mask is given instead of drawn."""
    source = (checkout / "models_mae.py").read_text().replace("qk_scale=None, ", "")
    sines = (checkout / "util" / "pos_embed.py").read_text().replace("np.float)", "float)")
    names: dict[str, Any] = {}
    exec(compile(sines, "pos_embed.py", "exec"), names)
    module = types.ModuleType("models_mae")
    module.__dict__["get_2d_sincos_pos_embed"] = names["get_2d_sincos_pos_embed"]
    exec(compile(source.replace("from util.pos_embed import", "# "), "models_mae.py", "exec"), module.__dict__)
    dim, depth, heads, *decoder = MAES[name]

    class Given(module.MaskedAutoencoderViT):  # type: ignore[name-defined, misc]
        def forward(self, images: Tensor, order: Tensor) -> Tensor:
            self.order = order
            return super().forward(images, 0.75)[0]

        def random_masking(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
            visible = int(x.shape[1] * (1 - mask_ratio))
            restore = self.order.argsort(1)
            kept = torch.gather(x, 1, self.order[:, :visible, None].expand(-1, -1, x.shape[2]))
            mask = torch.ones(x.shape[:2], device=x.device)
            mask[:, :visible] = 0
            return kept, torch.gather(mask, 1, restore), restore

    return Given(
        img_size=size,
        patch_size=patch,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        decoder_embed_dim=decoder[0],
        decoder_depth=decoder[1],
        decoder_num_heads=decoder[2],
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        norm_pix_loss=True,
    )


@torch.no_grad()
def take_weights(peer: nn.Module, ours: Method) -> None:
    """Give a peer our weights and positions, under its names."""
    state = ours.state_dict()
    lightly = isinstance(peer, LightlyMAE)
    encoder, decoder = ("backbone.vit.", "decoder.decoder_") if lightly else ("", "decoder_")
    names = {
        "backbone.class_token.weight": f"{encoder}cls_token",
        "head.mask_token.weight": "decoder.mask_token" if lightly else "mask_token",
        "head.embed.": f"{decoder}embed.",
        "head.blocks.": f"{decoder}blocks.",
        "head.norm.": f"{decoder}norm.",
        "head.pixels.": f"{decoder}pred.",
        "backbone.": encoder,
    }
    theirs = peer.state_dict()
    taken = set()
    for name, tensor in state.items():
        start = next(prefix for prefix in names if name.startswith(prefix))
        target = names[start] + name.removeprefix(start)
        theirs[target].copy_(tensor.reshape(theirs[target].shape))
        taken.add(target)
    for target, positions in (
        (f"{encoder}pos_embed", ours.backbone.positions),
        (f"{decoder}pos_embed", ours.head.positions),
    ):
        theirs[target].zero_()[0, 1:] = positions
        taken.add(target)
    assert set(theirs) - taken <= {"backbone.mask_token"}, set(theirs) - taken  # which lightly's example leaves unused


def measured(arms: dict[str, Step], repeats: int, device: str) -> dict[str, Any]:
    """Return seconds a step of each arm, and the ratios of the others to the first."""
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for repeat in range(repeats + 1):
        for arm, step in arms.items():
            started = clock(device)
            step()
            if repeat:  # the first turn warms up
                seconds[arm].append(clock(device) - started)
    first = next(iter(arms))
    ratios = {
        arm: spread([b / a for a, b in zip(seconds[first], values, strict=True)])
        for arm, values in seconds.items()
        if arm != first
    }
    return {"seconds": {arm: spread(values) for arm, values in seconds.items()}, "ratios": ratios}


def clock(device: str) -> float:
    """Return the time in seconds: of this process on a CPU, which others share; of the wall on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def ceiling_share(
    built: Method, inputs: tuple[Tensor, ...], step: Step, config: FederationConfig, device: str
) -> float:
    """Return the step's rate of operations over that of a large matrix product of the same precision."""
    with FlopCounterMode(display=False) as counter:
        built(*inputs).mean().backward()
    built.zero_grad()
    step()
    started = clock(device)
    step()
    rate = counter.get_total_flops() / (clock(device) - started)
    kind = torch.bfloat16 if config.training.precision == "bfloat16" else torch.float32
    edge = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(edge, edge, device=device, dtype=kind) for _ in range(2))
    times = []
    for _ in range(5):
        started = clock(device)
        torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "") if device == "cpu" else a @ b
        times.append(clock(device) - started)
    return float(rate / (2 * edge**3 / statistics.median(times)))


def device_name(device: str) -> str:
    """Return what the steps ran on."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu, one thread"


def show(report: dict[str, Any]) -> None:
    """Print the table that a person reads."""
    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in report["machine"].items()), highlight=False)
    table = Table("case", "arm", "ms a step (range)", "times the first arm's (range)", title="Training steps")
    for case in report["cases"]:
        share = case.get("ceiling_share")
        for place, (arm, seconds) in enumerate(case["seconds"].items()):
            ratio = case["ratios"].get(arm)
            milliseconds = {key: 1000 * value for key, value in seconds.items()}
            mark = f"{share:.0%} of the ceiling" if share is not None and not place else ""
            table.add_row(
                "" if place else case["case"], arm, cell(milliseconds, ",.0f"), cell(ratio, ".2f") if ratio else mark
            )
    console.print(table)


if __name__ == "__main__":
    main()
