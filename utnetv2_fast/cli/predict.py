"""`utnetv2-fast predict`: label maps of scans, by a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from utnetv2_fast.cli.console import Json, console, print_json, track
from utnetv2_fast.errors import InputError
from utnetv2_fast.memory import keep_freed_memory
from utnetv2_fast.ranks import ranks_of_this_job


def predict(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="A run folder; several are averaged.", show_default=False),
    ],
    inputs: Annotated[
        list[Path],
        typer.Option(
            "--input", "-i", help="A folder of scans, files CASE_0000.nii.gz, or a DICOM series.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write CASE.nii.gz to.", show_default=False)],
    weights: Annotated[
        Literal["last", "best"], typer.Option(help="The network at the end of training, or at its best validation.")
    ] = "last",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    mirror: Annotated[
        bool, typer.Option("--mirror", help="Average over all flips too, 4 or 8 times the work.")
    ] = False,
    weighting: Annotated[
        Literal["gaussian", "uniform"], typer.Option(help="How overlapping windows are averaged.")
    ] = "gaussian",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Windows at once.", show_default="by their size")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make label maps that exist already anew.")] = False,
    json: Json = False,
) -> None:
    """Segment scans; each label map lies on its scan's own grid and appears when it is complete.

    Those that are there already, made from the same scans by the same weights, are kept.

    Started by torchrun or srun, the processes share the scans, and go on where earlier ones were stopped.

    Example: utnetv2-fast predict runs/acdc -i scans/ -o predictions/
    """
    from utnetv2_fast.data.dataset import list_scans
    from utnetv2_fast.data.nifti import ENDINGS
    from utnetv2_fast.devices import resolve_device
    from utnetv2_fast.inference.predict import Predictor, predict_files
    from utnetv2_fast.inference.together import predict_together

    ranks = ranks_of_this_job()
    if overwrite and ranks.count > 1:
        raise InputError("--overwrite is for a single process; delete the old label maps, or write to another folder.")
    # The shell writes `-i *.nii.gz` out, and all files but the first arrive as arguments.
    scans = [path for path in runs if path.name.endswith(ENDINGS)]
    keep_freed_memory()
    predictor = Predictor.load(
        [path for path in runs if path not in scans],
        weights=weights,
        device=str(resolve_device(device, ranks.local)),
        batch_size=batch_size,
        weighting=weighting,
        mirror=mirror,
    )
    cases = list_scans([*inputs, *scans], len(predictor.plan.channels))
    if ranks.count == 1:
        written, kept = predict_files(predictor, cases, out, track, overwrite=overwrite)
    else:
        written, kept = predict_together(predictor, cases, out, track, ranks)
    if not ranks.first:
        return
    if json:
        predictions = {file.name.removesuffix(".nii.gz"): file for file in sorted([*written, *kept])}
        print_json({"predictions": predictions, "kept": [file.name.removesuffix(".nii.gz") for file in kept]})
        return
    remark = f", {len(kept)} of them there already (--overwrite makes them anew)" if kept else ""
    message = f"{out}: {len(written) + len(kept)} label maps{remark}."
    console.print(message, markup=False, highlight=False, soft_wrap=True)
