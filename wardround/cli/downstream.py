"""Commands of a downstream team: measure a backbone, export it, make it smaller."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from wardround.cli.options import Tracking, Trust, check_file, check_folder, default_tracking, say_next
from wardround.errors import ConfigError

Source = Annotated[str, typer.Argument(help="A run folder, a pulled backbone's folder, or NAME@alias.")]
Label = Annotated[str, typer.Option(help="The column of labels.csv to predict.")]
MultiLabel = Annotated[bool, typer.Option("--multi-label", help="A cell holds any number of labels, with ';' between.")]
ForceSplits = Annotated[
    bool, typer.Option("--force-splits", help="Measure though patients are in two splits; the result says so.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Json = Annotated[Path | None, typer.Option(help="Also write the result here, as JSON.")]
OF_SITES = ("source", "federated", "kit", "host", "out")  # options of `evaluate --federated`


def export(
    source: Source,
    format: Annotated[str, typer.Option(help="onnx, onnx-int8, pt2 (torch.export) or monai (a bundle).")],
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    data: Annotated[
        Path | None,
        typer.Option(help="A labelled folder to compare on, and to calibrate int8 on; default: procedural images."),
    ] = None,
    trust: Trust = None,
    tracking: Tracking = None,
) -> None:
    """Write a backbone for another runtime, its normalisation included, and measure it against torch."""
    check_folder("--to", to)
    from wardround.downstream.export import export as write
    from wardround.report.exported import exported_table

    found = write(source, format, to, data, tracking or default_tracking(), trust)
    Console().print(exported_table(asdict(found)))
    if format == "monai":
        where = f'"{to.name}", bundle_dir="{to.parent}", workflow_type="inference"'
        say_next(f"python -c 'import monai.bundle; monai.bundle.load({where})'")
    else:
        typer.echo(f"{to / found.file} takes images in [0, 1], [B, C, S, S] float32, and gives features [B, D].")


def compress(
    source: Source,
    by: Annotated[str, typer.Option(help="prune, low-rank or distil.")],
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    images: Annotated[
        Path, typer.Option(help="Images without labels: a folder, or a labelled folder, whose training split is taken.")
    ],
    keep: Annotated[
        float | None,
        typer.Option(help="prune: share of each block's units; low-rank: of each layer's weights. Default: 0.5."),
    ] = None,
    into: Annotated[str | None, typer.Option(help="distil: the smaller network of timm, such as resnet10t.")] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Steps of distillation from the original; default: 1000 by distil, else none."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A labelled folder with patient-disjoint splits, to probe both on.")
    ] = None,
    label: Label = "label",
    multi_label: MultiLabel = False,
    seed: Annotated[int, typer.Option(help="What is drawn.", min=0)] = 0,
    device: Device = "cpu",
    trust: Trust = None,
    tracking: Tracking = None,
) -> None:
    """Make a backbone smaller, as a release of its own, and say what it lost and won."""
    check_folder("--to", to)
    from wardround.downstream.compress import Request
    from wardround.downstream.compress import compress as write
    from wardround.report.compressed import compressed_table
    from wardround.ssl.devices import checked_device

    request = Request(
        source=source,
        by=by,
        to=to,
        images=images,
        keep=keep,
        into=into,
        steps=steps,
        data=data,
        label=label,
        multi_label=multi_label,
        seed=seed,
        device=checked_device(device),
        tracking=tracking or default_tracking(),
        trust=trust,
    )
    Console().print(compressed_table(asdict(write(request))))
    say_next(f"python -c 'import wardround; wardround.load_backbone(\"{to}\")'")


def evaluate(
    context: typer.Context,
    source: Source,
    data: Annotated[Path | None, typer.Option(help="A labelled folder with patient-disjoint splits.")] = None,
    federated: Annotated[
        bool,
        typer.Option(
            "--federated",
            help="SOURCE is a run folder: ask its sites for scores on their own labels, and nothing else.",
        ),
    ] = False,
    kit: Annotated[
        Path | None,
        typer.Option(help="--federated: the coordinator's folder, to wait for the sites; not after `simulate`."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="--federated: the address to listen on, as `coordinate` has it.")
    ] = "127.0.0.1",
    label: Label = "label",
    multi_label: MultiLabel = False,
    finetune: Annotated[
        str,
        typer.Option(help="Also train on: some of frozen,full,decay,lora, with commas between. Takes its time."),
    ] = "",
    against: Annotated[
        list[str] | None,
        typer.Option(help="Another backbone to compare: a source, or NAME=SOURCE. May be repeated."),
    ] = None,
    imagenet: Annotated[
        Path | None, typer.Option(help="timm's ImageNet weights of this architecture (safetensors) to compare.")
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(help="Also score each group that this column of labels.csv makes, such as site. May be repeated."),
    ] = None,
    fraction: Annotated[
        list[float] | None,
        typer.Option(help="A share of the training labels; default: 0.01, 0.1 and 1. May be repeated."),
    ] = None,
    draws: Annotated[int, typer.Option(help="Draws of labelled patients and of new weights.", min=1, max=50)] = 5,
    force_splits: ForceSplits = False,
    device: Device = "cpu",
    out: Json = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            help="Also draw calibration, confusion, nearest images and explanations into this folder, as PNG."
        ),
    ] = None,
    trust: Trust = None,
    tracking: Tracking = None,
) -> None:
    """Compare a backbone with its random initialisation, raw pixels and others: probed frozen, and trained on."""
    _refuse_idle(context, federated)
    check_file("--out", out)
    check_folder("--pictures", pictures)
    if federated:
        _ask_sites(Path(source), kit, host, out)
        return
    if data is None:
        raise ConfigError("--data is missing: give a labelled folder, or --federated to ask the sites of a run.")
    from wardround.downstream.evaluate import FRACTIONS, Evaluation, Request, evaluate_backbone
    from wardround.downstream.finetune import Tuning
    from wardround.report.measured import tables
    from wardround.ssl.devices import checked_device

    request = Request(
        source=source,
        data=data,
        label=label,
        multi_label=multi_label,
        by=tuple(by or ()),
        against=tuple(against or ()),
        imagenet=imagenet,
        tuning=Tuning(ways=tuple(way for way in finetune.split(",") if way)),
        fractions=tuple(fraction or FRACTIONS),
        draws=draws,
        force_splits=force_splits,
        device=checked_device(device),
        pictures=pictures,
        tracking=tracking or default_tracking(),
        trust=trust,
    )

    def tell(found: Evaluation) -> None:
        console = Console()
        for table in tables(found):
            console.print(table)
        if out is not None:
            out.write_text(found.to_json())

    evaluate_backbone(request, tell)
    if out is not None and (Path(source) / "protocol.json").is_file():  # a run folder
        say_next(f"wardround register {source} --scores {out}")


def segment(
    source: Source,
    data: Annotated[Path, typer.Option(help="A labelled folder whose column `mask` names a mask for each image.")],
    decoder: Annotated[
        str | None,
        typer.Option(help="flexible_unet (convolutional backbones); unetr, the default, or transunet (ViTs)."),
    ] = None,
    fraction: Annotated[
        list[float] | None,
        typer.Option(help="A share of the training images to train on; default: 0.1 and 1. May be repeated."),
    ] = None,
    draws: Annotated[int, typer.Option(help="Draws of images and of new weights.", min=1, max=50)] = 3,
    steps: Annotated[int, typer.Option(help="Steps that each network is trained for.", min=1)] = 300,
    force_splits: ForceSplits = False,
    device: Device = "cpu",
    out: Json = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Also draw images, masks and answers into this folder, as segmentation.png.")
    ] = None,
    trust: Trust = None,
    tracking: Tracking = None,
) -> None:
    """Train a segmentation network on a backbone and on its random initialisation, and compare their Dice."""
    check_file("--out", out)
    check_folder("--pictures", pictures)
    from wardround.downstream.segment import Request
    from wardround.downstream.segment import segment as measure
    from wardround.downstream.train_segmenter import Training
    from wardround.probe.segmentation import Segmentation
    from wardround.report.segmented import segmented_table
    from wardround.ssl.devices import checked_device

    request = Request(
        source=source,
        data=data,
        decoder=decoder,
        fractions=tuple(fraction or (0.1, 1.0)),
        draws=draws,
        training=Training(steps=steps),
        force_splits=force_splits,
        device=checked_device(device),
        pictures=pictures,
        tracking=tracking or default_tracking(),
        trust=trust,
    )

    def tell(found: Segmentation) -> None:
        Console().print(segmented_table(found))
        if out is not None:
            out.write_text(found.to_json())

    measure(request, tell)


def _refuse_idle(context: typer.Context, federated: bool) -> None:
    """Raise ConfigError for an option that was typed and would do nothing, with --federated or without."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is None or source.name != "COMMANDLINE":
            continue
        if federated and parameter.name not in OF_SITES:
            raise ConfigError(f"{parameter.opts[0]}: is not for --federated, where each site measures by itself.")
        if not federated and parameter.name in ("kit", "host"):
            raise ConfigError(f"{parameter.opts[0]}: is for --federated alone.")


def _ask_sites(folder: Path, kit: Path | None, host: str, out: Path | None) -> None:
    """Ask the sites of a run for scores: those that connect, or with no kit those of this process."""
    from wardround.report.asked import asked_table
    from wardround.server.membership import read_membership
    from wardround.server.run_folder import open_run
    from wardround.server.scoring import read_asked, refuse_unfit
    from wardround.server.superlink import evaluate as ask_over_network
    from wardround.simulate import ask_sites

    run = open_run(folder)
    refuse_unfit(run)
    if kit is None:
        asked = ask_sites(run)
    else:
        ask_over_network(folder, kit, int(read_membership(kit).address.rpartition(":")[2]), host)
        asked = read_asked(run)
    Console().print(asked_table(asked))
    if out is not None:
        out.write_text(asked.to_json())
