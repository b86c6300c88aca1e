"""The files of an inspection: figures, and the numbers behind them as JSON and CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from utnetv2_fast.attention_figures import draw_block, draw_overview, draw_similarity, last_blocks
from utnetv2_fast.evaluation.figures import png, write_png
from utnetv2_fast.files import atomic_write, write_text_atomically
from utnetv2_fast.inspection import Inspection, summarise


def write_inspection(inspection: Inspection, folder: Path, stages: Collection[str] = ()) -> None:
    """Write the figures of every block of `stages`, of the last block of each stage where there are none; the numbers.

    A figure's file is called after its block; `overview.png`, `similarity.png`, `attention.json` and `attention.csv`
    are about all of them.
    """
    chosen = [block for block in inspection.blocks if block.stage in stages] if stages else last_blocks(inspection)
    write_png(folder / "overview.png", png(draw_overview(inspection)))
    write_png(folder / "similarity.png", png(draw_similarity(inspection)))
    for block in chosen:
        write_png(folder / f"{block.stage}-block{block.block}.png", png(draw_block(inspection, block)))
    summary = summarise(inspection)
    write_text_atomically(folder / "attention.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    _write_tokens(summary, folder / "attention.csv")


def _write_tokens(summary: dict[str, Any], file: Path) -> None:
    """One line per token: the class with most of its weight, and its share on each."""
    with atomic_write(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["stage", "block", "head", "token", "class", *summary["area"]])
        for block in summary["blocks"]:
            for token in block["tokens"]:
                shares = [f"{share:.6g}" for share in token["shares"].values()]
                writer.writerow(
                    [block["stage"], block["block"], token["head"], token["token"], token["class"], *shares]
                )
