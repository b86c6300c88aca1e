"""Whole networks: forward pass and training step, fused operators beside plain PyTorch and the authors' way."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.measure import in_a_process, largest_size, machine, seconds, table
from utnetv2_fast import ops
from utnetv2_fast.memory import keep_freed_memory
from utnetv2_fast.models import PRESETS, UTNetV2
from utnetv2_fast.training import default_training
from utnetv2_fast.training.losses import expand_class_weights, supervised_loss

CPU = torch.device("cpu")
GIB = 2**30
CLASSES = {"bcv-3d": 14, "lits-3d": 3}  # 4 for the others
BATCHES = {"acdc-2d": 2, "cardiac-2d": 2, "tiny-2d": 8, "tiny-3d": 2}  # 1 for the others
VARIANTS = ("auto", "reference", "authors")
MODES = ("forward", "training step")
TURNS = 4
SECONDS_PER_TURN = 3.0

# How far results may be from those of the reference in float32, as a share of their norm. Where an input of a ReLU
# changes sign its gradient jumps (tests/models/test_golden.py); and see `errors_of`.
TOLERANCES = {"logits": 1e-4, "gradients": 1e-2}


@contextlib.contextmanager
def as_the_authors() -> Iterator[None]:
    """Depthwise convolution is torch's grouped one and the attention two softmaxes, differentiated by autograd."""

    def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
        convolution = F.conv2d if x.ndim == 4 else F.conv3d
        return convolution(x, weight, bias, padding=[k // 2 for k in weight.shape[2:]], groups=x.shape[1])

    def bidirectional_attention(
        q: Tensor, v: Tensor, map_q: Tensor, map_v: Tensor, *, need_map: bool = True, impl: str = "auto"
    ) -> tuple[Tensor, Tensor | None]:
        scores = q @ map_q.mT * q.shape[-1] ** -0.5
        return scores.softmax(-1) @ map_v, scores.softmax(-2).mT @ v if need_map else None

    separable = importlib.import_module("utnetv2_fast.ops.depthwise_separable_conv")
    patches: list[tuple[Any, str, Callable[..., Any]]] = [
        (ops, "depthwise_conv", depthwise_conv),
        (separable, "depthwise_conv", depthwise_conv),
        (ops, "bidirectional_attention", bidirectional_attention),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, function in patches:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


class Work:
    """One network with its batch: what is timed, checked and profiled."""

    def __init__(self, preset: str, dtype: torch.dtype, variant: str) -> None:
        torch.manual_seed(0)
        classes, batch, size = CLASSES.get(preset, 4), BATCHES.get(preset, 1), PRESETS[preset].input_size
        self.variant, self.dtype = variant, dtype
        impl = "reference" if variant == "authors" else variant
        self.model = UTNetV2.from_preset(preset, in_channels=1, num_classes=classes, impl=impl)
        self.image = torch.randn(batch, 1, *size)
        self.label = torch.randint(classes, (batch, *size))
        settings = default_training(preset)
        self.class_weights = expand_class_weights(settings.class_weights, classes)
        self.auxiliary_weight, self.clip_norm = settings.auxiliary_weight, settings.clip_norm
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            eps=1e-5,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def _variant(self) -> contextlib.AbstractContextManager[None]:
        return as_the_authors() if self.variant == "authors" else contextlib.nullcontext()

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def forward(self) -> Tensor:
        self.model.eval()
        with torch.no_grad(), self._variant(), self._autocast():
            return self.model(self.image)

    def loss(self) -> Tensor:
        self.model.train()
        with self._variant(), self._autocast():
            outputs = self.model(self.image)
        return supervised_loss(outputs, self.label, self.class_weights, self.auxiliary_weight)

    def training_step(self) -> None:
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, mode: str) -> Callable[[], object]:
        return self.forward if mode == "forward" else self.training_step

    def results(self) -> dict[str, Tensor]:
        """Logits in eval mode, and all gradients of the training loss in one vector."""
        logits = self.forward().float()
        gradients = torch.autograd.grad(self.loss(), list(self.model.parameters()))
        return {"logits": logits, "gradients": torch.cat([g.float().flatten() for g in gradients])}

    def saved_bytes(self) -> int:
        """Bytes that a forward pass keeps for backward, parameters excluded; shared storage counts once."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, Tensor] = {}

        def pack(t: Tensor) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = self.loss()
        del loss
        return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


@dataclass
class Row:
    preset: str
    dtype: str
    mode: str
    seconds: dict[str, float]
    peak_bytes: dict[str, int]  # beyond a process that has built the network
    saved_bytes: dict[str, int]  # for backward; empty for a forward pass
    errors: dict[str, dict[str, float]]  # of logits and gradients, beside the reference in float32


def errors_of(variants: dict[str, dict[str, Tensor]], exact: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Errors of every variant's results; AssertionError where they are not those of the reference.

    In bfloat16 the fused operators may be as far from float32 as twice plain PyTorch in bfloat16 is.
    """
    errors = {
        variant: {key: ((results[key] - e).norm() / e.norm()).item() for key, e in exact.items()}
        for variant, results in variants.items()
    }
    for variant, found in errors.items():
        for key, error in found.items():
            allowed = TOLERANCES[key] + 2 * errors["reference"][key]
            assert error <= allowed, f"{variant}: {key} are wrong by {error:.2g}, more than {allowed:.2g}; not timed"
    return errors


def measure(preset: str, dtype: str, say: Callable[[str], None]) -> list[Row]:
    """Every variant in processes of its own, which take turns: the memory that one keeps is not in another's way."""
    with tempfile.TemporaryDirectory() as folder:

        def results(dtype: str, variant: str) -> tuple[dict[str, Tensor], int]:
            say(f"{preset} {dtype}: results of {variant}")
            file = str(Path(folder) / "results.pt")
            saved_bytes = in_a_process("bench.model", "save_results", preset, dtype, variant, file)
            return torch.load(file, weights_only=True), saved_bytes

        found = {variant: results(dtype, variant) for variant in VARIANTS}
        exact = found["reference"][0] if dtype == "float32" else results("float32", "reference")[0]
    errors = errors_of({variant: result for variant, (result, _) in found.items()}, exact)
    saved = {variant: saved_bytes for variant, (_, saved_bytes) in found.items()}
    del found, exact
    rows = []
    for mode in MODES:
        row = Row(preset, dtype, mode, {}, {}, saved if mode != "forward" else {}, errors)
        for turn in range(TURNS):
            for variant in VARIANTS:
                say(f"{preset} {dtype}, {mode}, turn {turn + 1} of {TURNS}: {variant}")
                took, peak_bytes = in_a_process("bench.model", "time_and_peak", preset, dtype, variant, mode)
                row.seconds[variant] = min(took, row.seconds.get(variant, math.inf))
                row.peak_bytes[variant] = max(peak_bytes, row.peak_bytes.get(variant, 0))
        rows.append(row)
    return rows


def save_results(preset: str, dtype: str, variant: str, file: str) -> int:
    """Write the results of the work to `file`; the bytes that it saves for backward."""
    work = Work(preset, getattr(torch, dtype), variant)
    torch.save(work.results(), file)
    return work.saved_bytes()


def time_and_peak(preset: str, dtype: str, variant: str, mode: str) -> tuple[float, int]:
    """Shortest time of the work, and the growth of this process's largest size by it; for a fresh process."""
    keep_freed_memory()
    work = Work(preset, getattr(torch, dtype), variant)
    before = largest_size()
    run = work.run(mode)
    run()
    took = seconds(run, CPU)
    more = min(math.ceil(SECONDS_PER_TURN / took), 30)
    return min([took, *(seconds(run, CPU) for _ in range(more))]), largest_size() - before


def markdown(rows: Sequence[Row], facts: dict[str, str]) -> str:
    header = [
        "network",
        "dtype",
        "work",
        *(f"{variant} ms" for variant in VARIANTS),
        *(f"x {variant}" for variant in VARIANTS[1:]),
        *(f"peak GiB {variant}" for variant in VARIANTS),
        *(f"saved GiB {variant}" for variant in VARIANTS),
        "error of logits",
        "of gradients",
    ]
    lines = []
    for row in rows:
        auto = row.seconds["auto"]
        lines.append(
            [
                f"{row.preset}, batch {BATCHES.get(row.preset, 1)}",
                row.dtype,
                row.mode,
                *(f"{1000 * row.seconds[variant]:.0f}" for variant in VARIANTS),
                *(f"{row.seconds[variant] / auto:.2f}" for variant in VARIANTS[1:]),
                *(f"{row.peak_bytes[variant] / GIB:.2f}" for variant in VARIANTS),
                *(f"{row.saved_bytes[variant] / GIB:.2f}" if row.saved_bytes else "" for variant in VARIANTS),
                f"{row.errors['auto']['logits']:.1e}",
                f"{row.errors['auto']['gradients']:.1e}",
            ]
        )
    notes = [f"{key}: {value}" for key, value in facts.items()]
    notes.append(
        "Shortest times, the variants taking turns in processes of their own. reference: plain PyTorch with this "
        "package's backward formulas; "
        "authors: torch's grouped convolutions and two softmaxes under autograd. Peak: growth of a process that has "
        "built the network. Saved: for backward, parameters excluded. Errors of auto beside the reference in float32, "
        "as a share of the norm."
    )
    return table(header, lines) + "\n\n" + "\n".join(f"* {note}" for note in notes) + "\n"


def write_profiles(preset: str, dtype: torch.dtype, write: Callable[[str], object]) -> None:
    """The 25 operators that take longest in a training step of each variant."""
    for variant in VARIANTS:
        work = Work(preset, dtype, variant)
        for _ in range(3):  # until the process has the memory of a step
            work.training_step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            work.training_step()
        top = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60)
        write(f"\n{preset} {str(dtype).removeprefix('torch.')}, training step, {variant}:\n\n{top}\n")


def main() -> None:
    fast_bfloat16 = torch.cpu._is_avx512_bf16_supported()
    parser = argparse.ArgumentParser(
        prog="python -m bench.model",
        description=__doc__,
        epilog="Example: python -m bench.model --preset acdc-3d --dtype float32 --out bench/results/model.md",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--preset", nargs="+", choices=list(PRESETS), default=["acdc-2d", "acdc-3d"], metavar="NAME", help="networks"
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=["float32", "bfloat16"],
        default=["float32", "bfloat16"] if fast_bfloat16 else ["float32"],
        help="bfloat16 is autocast, and by default only where the processor has its instructions",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the table here and the figures to .json")
    parser.add_argument("--profile", action="store_true", help="print the longest operators instead of timing")
    arguments = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    facts = machine() | {"command": shlex.join(["python", "-m", "bench.model", *sys.argv[1:]])}
    work = [(preset, dtype) for preset in arguments.preset for dtype in arguments.dtype]
    if arguments.profile:
        for preset, dtype in work:
            write_profiles(preset, getattr(torch, dtype), print)
        return
    rows = [row for preset, dtype in work for row in measure(preset, dtype, say)]
    text = markdown(rows, facts)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)
        figures = {"machine": facts, "rows": [asdict(row) for row in rows]}
        arguments.out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
