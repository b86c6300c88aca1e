"""Measures this package on a GPU in about eight minutes: operators, whole networks, and a training if data are given.

Results are checked before they are timed, peers take turns with ours in the same process, and a file per section is
written as soon as the section ends. Runs from a checkout. The operators need torch and Triton alone; networks and a
training need what the package depends on (pydantic, nibabel and the like), and are noted as not measured without it.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import triton
from torch import Tensor

from bench.measure import machine, seconds, table
from bench.peers import CHECKED_CHANNELS, TOLERANCES, attend, attend_twice, convolve, convolve_separably, in_format
from bench.shapes import ATTENTION, BATCHES, DEPTHWISE, Attention, Depthwise
from utnetv2_fast.ops import bidirectional_attention, depthwise_conv, depthwise_separable_conv, explain
from utnetv2_fast.ops.self_check import EXAMPLES, check

GPU = torch.device("cuda", 0)
GIB = 2**30
SECONDS_PER_ROW = 0.6
NETWORKS = ("acdc-3d", "bcv-3d", "acdc-2d")

Results = Callable[[], tuple[Tensor, ...]]


class OutOfTimeError(Exception):
    """The budget is spent; what was measured stays."""


@dataclass
class Clock:
    ends: float

    def check(self) -> None:
        if time.monotonic() > self.ends:
            raise OutOfTimeError


@dataclass
class Row:
    """One line of the operator table: milliseconds of ours and of every peer, as replayed on the GPU."""

    operator: str
    shape: str
    layout: str
    dtype: str
    mode: str
    backend: str
    milliseconds: float
    bytes: float
    flops: float
    peers: dict[str, float] = field(default_factory=dict)


# ---- timing


def replayed(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a CUDA graph, so that only the GPU's time counts; `run` itself where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run
    return graph.replay


def median_milliseconds(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median time of each, taking turns, the caches swept before each."""
    sweep = torch.empty(256 << 20, dtype=torch.int8, device=GPU)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    ready = {name: replayed(run) for name, run in runs.items()}
    started = time.monotonic()
    while min(map(len, taken.values())) < 5 or (
        time.monotonic() - started < SECONDS_PER_ROW and min(map(len, taken.values())) < 100
    ):
        events = {}
        for name, run in ready.items():
            sweep.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            events[name] = (start, end)
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            taken[name].append(start.elapsed_time(end))
    return {name: statistics.median(times) for name, times in taken.items()}


def copy_bandwidth() -> float:
    """Bytes read and written per second by a device-to-device copy of 1 GiB: the roof."""
    source = torch.empty(GIB, dtype=torch.int8, device=GPU)
    target = torch.empty_like(source)
    return 2 * GIB / (1e-3 * median_milliseconds({"copy": lambda: target.copy_(source)})["copy"])


def product_speed(dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product."""
    a, b = (torch.randn(8192, 8192, device=GPU, dtype=dtype) for _ in range(2))
    return 2 * 8192**3 / (1e-3 * median_milliseconds({"product": lambda: a @ b})["product"])


def assert_right(name: str, results: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    for result, expected in zip(results, exact, strict=True):
        error = ((result.double() - expected).abs().max() / expected.abs().max()).item()
        assert error <= TOLERANCES[result.dtype], f"{name} is wrong by {error:.2g}, so not timed"


# ---- operators


def differentiated(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> Results:
    """Forward and backward in one run."""
    leaves = tuple(t.detach().requires_grad_() for t in inputs)

    def run() -> tuple[Tensor, ...]:
        outputs = function(*leaves)
        return torch.autograd.grad(outputs, leaves, grads if isinstance(outputs, tuple) else grads[0])

    return run


def attention_rows(name: str, level: Attention, dtype: torch.dtype, channels_last: bool) -> Iterator[Row]:
    (h, n, l, d), b = level, BATCHES[name]

    def halves(rows: int) -> tuple[Tensor, ...]:
        """As the network has them: two halves of one map."""
        if channels_last:
            joined = torch.randn(b, rows, 2 * h * d, device=GPU, dtype=dtype)
            return tuple(t.unflatten(2, (h, d)).transpose(1, 2) for t in joined.chunk(2, 2))
        joined = torch.randn(b, 2 * h * d, rows, device=GPU, dtype=dtype)
        return tuple(t.unflatten(1, (h, d)).mT for t in joined.chunk(2, 1))

    inputs = (*halves(n), *halves(l))
    grads = (torch.randn_like(inputs[0]), torch.randn_like(inputs[2]))
    tokens, maps, size = inputs[0].numel(), inputs[2].numel(), inputs[0].element_size()
    shape = f"{name} n{n} l{l} B{b} H{h} d{d}"
    layout, kind = "channels-last" if channels_last else "channels-first", str(dtype).removeprefix("torch.")
    backend = explain(bidirectional_attention, *inputs).backend

    exact_inputs = tuple(t.double().requires_grad_() for t in inputs)
    exact = attend(*exact_inputs)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, tuple(g.double() for g in grads))
    ours = bidirectional_attention(*inputs)
    assert_right("bidirectional_attention", [t for t in ours if t is not None], exact)
    assert_right("its gradient", differentiated(bidirectional_attention, inputs, grads)(), exact_gradients)
    del exact, exact_gradients, exact_inputs, ours
    compiled = torch.compile(attend, dynamic=False)

    forward = median_milliseconds(
        {
            "ours": lambda: bidirectional_attention(*inputs),
            "eager": lambda: attend(*inputs),
            "compile": lambda: compiled(*inputs),
            "2 SDPA": lambda: attend_twice(*inputs),
        }
    )
    both = median_milliseconds(
        {
            "ours": differentiated(bidirectional_attention, inputs, grads),
            "eager": differentiated(attend, inputs, grads),
            "compile": differentiated(compiled, inputs, grads),
            "2 SDPA": differentiated(attend_twice, inputs, grads),
        }
    )
    ops, scale = torch.ops.utnetv2_fast, d**-0.5
    _, map_out, lse = ops.bidirectional_attention(*inputs, scale, backend)
    backward = median_milliseconds(
        {"ours": lambda: ops.bidirectional_attention_backward(*grads, *inputs, map_out, lse, scale, backend)}
    )
    products = 2 * b * h * n * l * d
    for mode, times, passes, count in (
        ("forward", forward, 3, 3),
        ("backward", backward, 5, 7),
        ("forward+backward", both, 8, 10),
    ):
        moved = passes * (tokens + maps) * size
        peers = {peer: t for peer, t in times.items() if peer != "ours"}
        operator = "bidirectional_attention"
        yield Row(operator, shape, layout, kind, mode, backend, times["ours"], moved, count * products, peers)


def convolution_rows(name: str, case: Depthwise, dtype: torch.dtype, channels_last: bool) -> Iterator[Row]:
    b, c, axes = BATCHES[name], case.C, len(case.kernel)
    weight = torch.randn(c, 1, *case.kernel, device=GPU, dtype=dtype)
    pointwise = torch.randn(case.C_out, c, *[1] * axes, device=GPU, dtype=dtype) / math.sqrt(c)
    maps = [torch.randn(b, channels, *case.spatial, device=GPU, dtype=dtype) for channels in (c, c, case.C_out)]
    formats = {last: [in_format(t, last) for t in maps] for last in (True, False)}
    x, grad, grad_wide = formats[channels_last]

    part = slice(c - CHECKED_CHANNELS, None)
    exact_inputs = tuple(t.double().requires_grad_() for t in (x[:, part], weight[part]))
    exact = convolve(*exact_inputs)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, grad[:, part].double())
    assert_right("depthwise_conv", [depthwise_conv(x, weight)[:, part]], [exact])
    grad_x, grad_weight = differentiated(depthwise_conv, (x, weight), (grad,))()
    assert_right("its gradient", [grad_x[:, part], grad_weight[part]], exact_gradients)
    plain = convolve_separably(x, weight, pointwise).double()
    assert_right("depthwise_separable_conv", [depthwise_separable_conv(x, weight, pointwise)], [plain])
    del exact, exact_gradients, exact_inputs, grad_x, grad_weight, plain

    narrow, wide, taps = x.nbytes, grad_wide.nbytes, 2 * x.numel() * math.prod(case.kernel)
    shape = f"{name} {'x'.join(map(str, x.shape))} to {case.C_out}, {'x'.join(map(str, case.kernel))}"
    where = (shape, "channels-last" if channels_last else "channels-first", str(dtype).removeprefix("torch."))

    def rows(
        ours: Callable[..., Tensor],
        torchs: Callable[..., Tensor],
        weights: tuple[Tensor, ...],
        incoming: int,  # which of `maps` is the gradient of the result
        moved: Mapping[str, int],
        flops: int,
    ) -> Iterator[Row]:
        operator, backend = ours.__name__, explain(ours, x, *weights).backend

        def peers(of: Callable[[list[Tensor]], Callable[[], object]]) -> dict[str, Callable[[], object]]:
            return {f"torch {'last' if last else 'first'}": of(tensors) for last, tensors in formats.items()}

        runs = {
            "forward": {
                "ours": lambda: ours(x, *weights),
                "clone": lambda: x.clone(),
                **peers(lambda tensors: lambda: torchs(tensors[0], *weights)),
            },
            "forward+backward": {
                "ours": differentiated(ours, (x, *weights), formats[channels_last][incoming : incoming + 1]),
                **peers(lambda t: differentiated(torchs, (t[0], *weights), t[incoming : incoming + 1])),
            },
        }
        for mode, compared in runs.items():
            times = median_milliseconds(compared)
            count = flops if mode == "forward" else 3 * flops
            yield Row(operator, *where, mode, backend, times.pop("ours"), moved[mode], count, times)

    yield from rows(
        depthwise_conv, convolve, (weight,), 1, {"forward": 2 * narrow, "forward+backward": 7 * narrow}, taps
    )
    moved = {"forward": narrow + wide, "forward+backward": 4 * narrow + 3 * wide}
    flops = taps + 2 * x.numel() * case.C_out
    yield from rows(depthwise_separable_conv, convolve_separably, (weight, pointwise), 2, moved, flops)


def operator_cases() -> Iterator[tuple[str, Callable[[], Iterator[Row]]]]:
    """Names and rows: the largest level of every network first, in its own dtype and layout; then the rest."""
    for dtype, channels_last in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)):
        way = (dtype, channels_last)
        for index in range(5 if dtype == torch.bfloat16 else 1):
            for name in BATCHES:
                label = f"{name} {index} {str(dtype).removeprefix('torch.')} {'last' if channels_last else 'first'}"
                if index < len(ATTENTION.get(name, [])):
                    case = functools.partial(attention_rows, name, ATTENTION[name][index], *way)
                    yield f"attention of {label}", case
                if index < len(DEPTHWISE.get(name, [])):
                    case = functools.partial(convolution_rows, name, DEPTHWISE[name][index], *way)
                    yield f"convolutions of {label}", case


@contextmanager
def noted(failures: list[str], what: str) -> Iterator[None]:
    """What cannot be measured is noted and the rest goes on: there may not be another hour on this GPU."""
    try:
        yield
    except OutOfTimeError:
        failures.append(f"{what}: out of time")
    except Exception as error:  # a wrong result, too little memory, whatever a compiler makes of a kernel
        failures.append(f"{what}: {type(error).__name__}: {error}".splitlines()[0])
        print(failures[-1], flush=True)


# ---- networks


@dataclass
class NetworkRow:
    network: str
    variant: str
    milliseconds: float
    peak_gib: float
    loss_error: float  # beside plain PyTorch in float32, relative


def network_rows(preset: str, clock: Clock) -> Iterator[NetworkRow]:
    """One training step in bfloat16 autocast: fused and plain, eager and compiled."""
    exact = Training(preset, "reference").loss(autocast=False).item()
    for impl, compiles in itertools.product(("auto", "reference"), (False, True)):
        clock.check()
        training = Training(preset, impl)
        if compiles:
            training.forward = torch.compile(training.model, dynamic=False)
        variant = f"{'fused' if impl == 'auto' else 'plain'}, {'compiled' if compiles else 'eager'}"
        error = abs(training.loss().item() - exact) / abs(exact)
        assert error < 0.05, f"{preset}, {variant}: the loss is wrong by {error:.2g}, so not timed"
        for _ in range(3):
            training.step()
        torch.cuda.reset_peak_memory_stats()
        taken = [1e3 * seconds(training.step, GPU) for _ in range(10)]
        peak = torch.cuda.max_memory_allocated() / GIB
        yield NetworkRow(preset, variant, statistics.median(taken), peak, error)
        del training
        forget()


class Training:
    """A network with its batch, loss and optimiser."""

    def __init__(self, preset: str, impl: str) -> None:
        from utnetv2_fast.models import PRESETS, UTNetV2
        from utnetv2_fast.training import default_training
        from utnetv2_fast.training.losses import supervised_loss

        torch.manual_seed(0)
        classes, settings = {"bcv-3d": 14, "lits-3d": 3}.get(preset, 4), default_training(preset)
        size = PRESETS[preset].input_size
        self.model = UTNetV2.from_preset(preset, in_channels=1, num_classes=classes, impl=impl).to(GPU).train()
        self.forward: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]] = self.model
        self.image = torch.randn(BATCHES[preset], 1, *size, device=GPU)
        self.label = torch.randint(classes, (BATCHES[preset], *size), device=GPU)
        self.class_weights = torch.ones(classes, device=GPU)
        self.auxiliary_weight, self.clip_norm = settings.auxiliary_weight, settings.clip_norm
        self.supervised_loss = supervised_loss
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def loss(self, *, autocast: bool = True) -> Tensor:
        with torch.autocast(GPU.type, torch.bfloat16, enabled=autocast):
            outputs = self.forward(self.image)
        return self.supervised_loss(outputs, self.label, self.class_weights, self.auxiliary_weight)

    def step(self) -> None:
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def forget() -> None:
    """Give back what compiled functions and deleted tensors hold."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


# ---- the whole


def self_check() -> list[dict[str, object]]:
    """Every operator on a small example against float64, as `utnetv2-fast doctor` does."""
    return [
        {
            "operator": operator.__name__,
            "dtype": str(dtype).removeprefix("torch."),
            **asdict(check(operator, GPU, dtype)),
        }
        for operator in EXAMPLES
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ]


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def train(data: Path, preset: str, minutes: float, out: Path) -> str:
    """A training of about that many minutes by the command line; what it printed at the end."""
    command = [sys.executable, "-m", "utnetv2_fast", "train", "--data", str(data.resolve()), "--preset", preset]
    command += ["--device", "cuda", "--fold", "0", "--out", str((out / "run").resolve())]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=60 * minutes, check=False, cwd=Path(__file__).parents[1]
        )
        said = result.stdout + result.stderr
    except subprocess.TimeoutExpired as expired:
        said = f"stopped after {minutes:.1f} minutes\n" + (expired.stdout or b"").decode(errors="replace")
    return said[-4000:]


def operator_table(rows: Sequence[Row], roof_bytes: float, roof_flops: Mapping[str, float]) -> str:
    peers = list(dict.fromkeys(peer for row in rows for peer in row.peers))
    header = [
        "shape",
        "layout",
        "dtype",
        "mode",
        "backend",
        "ms",
        "GB/s",
        "% copy",
        "% product",
        *(f"x {p}" for p in peers),
    ]
    lines = [
        [
            row.shape,
            row.layout,
            row.dtype,
            row.mode,
            row.backend,
            f"{row.milliseconds:.4f}",
            f"{row.bytes / row.milliseconds / 1e6:.0f}",
            f"{100 * row.bytes / (1e-3 * row.milliseconds) / roof_bytes:.0f}",
            f"{100 * row.flops / (1e-3 * row.milliseconds) / roof_flops[row.dtype]:.0f}",
            *(f"{row.peers[p] / row.milliseconds:.2f}" if p in row.peers else "-" for p in peers),
        ]
        for row in rows
    ]
    return table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        epilog="Example: PYTHONPATH=. python -m bench.gpu --out results --data nnUNet_raw/Dataset027_ACDC",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gpu.json and gpu.md go here")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop measuring after this long (default: 8)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="also train on this dataset, with a third of the time")
    parser.add_argument("--preset", default="acdc-2d", metavar="NAME", help="the network to train (default: acdc-2d)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU here")
    options.out.mkdir(parents=True, exist_ok=True)
    minutes = options.minutes * (2 / 3 if options.data else 1)
    clock = Clock(time.monotonic() + 60 * minutes)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # peers in float32 are checked too

    facts = machine() | {"driver": driver(), "triton": triton.__version__}
    facts |= {"command": shlex.join(["python", "-m", "bench.gpu", *sys.argv[1:]])}
    checked = self_check()
    report: dict[str, object] = {"machine": facts, "self_check": checked}
    texts = ["\n".join(f"* {key}: {value}" for key, value in facts.items())]
    wrong = [f"{found['operator']} in {found['dtype']}: {found['problem']}" for found in checked if found["problem"]]
    texts.append("Operators whose results are wrong: " + ("; ".join(wrong) or "none") + ".")
    roof_bytes = copy_bandwidth()
    roof_flops = {str(d).removeprefix("torch."): product_speed(d) for d in (torch.bfloat16, torch.float32)}
    report |= {"copy_bytes_per_second": roof_bytes, "product_flops": roof_flops}
    texts.append(
        f"Roof: copy {roof_bytes / 1e12:.2f} TB/s; product "
        + ", ".join(f"{flops / 1e12:.0f} TFLOP/s in {name}" for name, flops in roof_flops.items())
        + ". Median times of the GPU alone (CUDA graphs), caches swept, peers in turn; x PEER: how many times as long."
    )

    def write() -> None:
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "gpu.md").write_text("# Measured on a GPU\n\n" + "\n\n".join(texts) + "\n")

    write()
    networks: list[NetworkRow] = []
    failures: list[str] = []
    for preset in NETWORKS:
        with noted(failures, preset):
            for network_row in network_rows(preset, clock):
                networks.append(network_row)
                print(network_row, flush=True)
    report["networks"] = [asdict(row) for row in networks]
    header = ["network", "variant", "ms per step", "peak GiB", "error of the loss"]
    texts.append(
        table(
            header,
            [
                [r.network, r.variant, f"{r.milliseconds:.1f}", f"{r.peak_gib:.2f}", f"{r.loss_error:.1e}"]
                for r in networks
            ],
        )
    )
    write()
    rows: list[Row] = []
    for name, case in operator_cases():
        with noted(failures, name):
            clock.check()
            for row in case():
                rows.append(row)
                print(row, flush=True)
        forget()
    report |= {"operators": [asdict(row) for row in rows], "failures": failures}
    texts.append("Not measured: " + ("; ".join(failures) or "nothing") + ".")
    for operator in dict.fromkeys(row.operator for row in rows):
        of_operator = [row for row in rows if row.operator == operator]
        texts.append(f"{operator}:\n\n" + operator_table(of_operator, roof_bytes, roof_flops))
    write()
    if options.data is not None:
        said = train(options.data, options.preset, options.minutes / 3, options.out)
        report["training"] = said
        texts.append(f"Training on {options.data.name}:\n\n```\n{said}\n```")
        write()


if __name__ == "__main__":
    main()
