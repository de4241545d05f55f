"""The demo: one run that shows what the package does, on real text, on whatever machine there is.

    1. train   a small GPT-2-shaped model for about `minutes` minutes, validation loss falling
    2. sample  from it
    3. twin    the same weights in plain PyTorch: logits, loss and gradients agree up to rounding
    4. parity  every op, implementation, dtype and direction, held to the truth in fp64
    5. speed   the ops and a whole training step against plain PyTorch

Everything is printed and written to a folder: report.html (self-contained), loss.png, parity.json,
speed.json, summary.json, and training/ as `gptkernels train` leaves it. Nothing is downloaded: the
default text is the reference manual that every Python carries, `pydoc_data.topics`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from gptkernels import bench
from gptkernels.bench import report, timing
from gptkernels.cli.demo.report import Row, heading, reasons, small, table, worst_rows, write
from gptkernels.core.choice import IMPLEMENTATIONS, unavailable
from gptkernels.core.device import choose_device
from gptkernels.core.figure import figure_class
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.model import GPT
from gptkernels.gpt.tokenizer import ByteTokenizer
from gptkernels.gpt.training import data
from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.progress import ProgressBar
from gptkernels.gpt.training.throughput import flops_per_token
from gptkernels.gpt.training.train import TrainResult, train
from gptkernels.gpt.weights import safetensors_package
from gptkernels.truth import parity, verify
from gptkernels.truth.plain_gpt import PlainGPT

# What two minutes can train on two CPU cores, and on a GPU. Bytes, because a vocabulary of 50,257
# would spend nearly all of that time in the head; a short context, because it learns sooner: after
# 1.2 million tokens the validation loss was 1.35 with 64 bytes of context and 1.56 with 128.
_CPU_MODEL = GPTConfig(vocab_size=256, block_size=64, n_layer=4, n_head=4, n_embd=128)
_GPU_MODEL = GPTConfig(vocab_size=256, block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.3)
_CPU_BATCH = 12
_PROMPT = "The "
_SAMPLE_TOKENS = 600
# Without a GPU, Triton's kernels run in its interpreter, in a process of their own (it reads the
# variable when it is imported) and for this long at most.
_INTERPRETER_SECONDS = 55.0
_INTERPRETER_ARGUMENTS = ("verify", "--impl", "triton", "--device", "cpu")
_INTERPRETER_COMMAND = "TRITON_INTERPRET=1 gptkernels verify --impl triton"


@dataclass(frozen=True)
class _Training:
    result: TrainResult
    config: TrainConfig
    file: Path
    text: str  # what to call the file

    @property
    def device(self) -> torch.device:
        return next(self.result.model.parameters()).device


def run(
    *,
    text: str | Path | None = None,
    out: str | Path = "demo-report",
    minutes: float = 2.0,
    device: str = "auto",
    seed: int = 1337,
    console: Console | None = None,
) -> int:
    """Run the demo and write the folder `out`; what an earlier demo left there is replaced.

    `text` is a UTF-8 file, None for Python's own manual; `minutes` is the time to train. Returns 0,
    or 1 when a parity check failed. Raises FileNotFoundError or ValueError for a text that cannot
    be trained on, ValueError for `minutes` that are not positive or an unknown device, ImportError
    when an extra is missing.
    """
    console = console or Console(highlight=False)
    out = Path(out)
    started = time.perf_counter()
    with _quiet(), _threads(choose_device(device)):
        trained = _train(text, out, minutes, device, seed, console)
        sample = _sample(trained.result.model, seed, console)
        twin = _twin(trained, console)
        parity_rows = _parity(trained.device, console)
        speed_rows = _speed(trained, console)
        environment = report.environment()
    right = all(row["status"] != "fail" for row in [*twin, *parity_rows])
    seconds = time.perf_counter() - started
    content = {
        "passed": right,
        "seconds": seconds,
        "environment": environment,
        "device": str(trained.device),
        "text": trained.text,
        "model": dataclasses.asdict(trained.result.model.config),
        "parameters": sum(p.numel() for p in trained.result.model.parameters()),
        "training": dataclasses.asdict(trained.config),
        "best_validation_loss": trained.result.best_validation_loss,
        "records": trained.result.records,
        "sample": sample,
        "twin": twin,
    }
    write(out, content, _PROMPT, parity_rows, speed_rows)
    style, verdict = ("green", "Every check passed") if right else ("red", "A check FAILED")
    console.print(f"\n[bold {style}]{verdict}[/] after {seconds:.0f} s.", end=" ")
    console.print(f"Report: {escape(str(out / 'report.html'))}", soft_wrap=True)
    return 0 if right else 1


def _train(
    text: str | Path | None, out: Path, minutes: float, device: str, seed: int, console: Console
) -> _Training:
    on_gpu = choose_device(device).type == "cuda"
    model = _GPU_MODEL if on_gpu else _CPU_MODEL
    config = TrainConfig(
        # On a CPU the clock ends the run; a GPU would read the text a hundred times by then.
        steps=2000 if on_gpu else 10**6,
        minutes=minutes,
        batch_size=64 if on_gpu else _CPU_BATCH,
        learning_rate=1e-3 if on_gpu else 3e-3,
        warmup_steps=50,
        beta2=0.99,
        dtype="bfloat16" if on_gpu else "float32",
        validation_interval=200 if on_gpu else 100,
        validation_batches=10,
        checkpoint_interval=10**6,
        device=device,
        seed=seed,
    )
    content = _manual() if text is None else data.read_text([text])
    # Whatever can be refused is, before anything of an earlier demo goes.
    tokens = data.tokenize(content, ByteTokenizer())
    data.split(tokens, config.validation_fraction, model.block_size)
    figure_class()
    safetensors_package()
    out.mkdir(parents=True, exist_ok=True)
    for old in (out / "report.html", out / "training" / "checkpoint.pt"):
        old.unlink(missing_ok=True)
    if text is None:
        file = out / "text.txt"
        file.write_text(content, encoding="utf-8", newline="\n")
        named = f"the reference manual that Python {platform.python_version()} carries"
    else:
        file, named = Path(text), str(text)
    where = "the GPU" if on_gpu else f"{torch.get_num_threads()} CPU threads"
    heading(
        console, "1. Training", f"on {named}, {len(tokens):,} bytes, {minutes:g} minutes, {where}"
    )
    with ProgressBar(console) as bar:
        result = train([file], out / "training", model=model, config=config, observer=bar)
    result.model.eval()
    return _Training(result, config, file, named)


def _manual() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FileNotFoundError(
            "text: this Python comes without its manual (pydoc_data.topics), name a text file"
        ) from None
    return "\n\n\n".join(topics.values())


@torch.no_grad()
def _sample(model: GPT, seed: int, console: Console) -> str:
    """A continuation of the prompt, longer than the context."""
    heading(console, "2. A sample", f"after {_PROMPT!r}, temperature 0.7")
    tokenizer = ByteTokenizer()
    prompt = torch.tensor([tokenizer.encode(_PROMPT)], device=next(model.parameters()).device)
    tokens = model.generate(
        prompt, _SAMPLE_TOKENS - prompt.shape[1], temperature=0.7, seed=seed, slots=1
    )
    text = tokenizer.decode(tokens[0].tolist())
    console.print(escape(text), style="italic", soft_wrap=True)
    return text


def _twin(trained: _Training, console: Console) -> list[Row]:
    """The trained weights in plain PyTorch, on a batch of held-out text, both held to fp64."""
    heading(console, "3. The same weights in plain PyTorch", "on held-out text")
    model, config = trained.result.model, trained.config
    size = model.config.block_size
    tokens = data.tokenize(data.read_text([trained.file]), ByteTokenizer())
    _, held_out = data.split(tokens, config.validation_fraction, size)
    x, y = (part.to(trained.device) for part in next(data.validation_batches(held_out, size, 4, 1)))

    def plain(dtype: torch.dtype) -> nn.Module:
        twin = PlainGPT(model.config).to(device=trained.device, dtype=dtype).eval()
        twin.load_state_dict(model.state_dict())
        return twin

    ours, theirs, truth = (
        _evaluate(network, x, y) for network in (model, plain(torch.float32), plain(torch.float64))
    )
    measured: dict[str, list[parity.Measurement]] = {}
    for name in truth:
        kind = name if name in ("logits", "loss") else "gradients"
        k = parity.K_GRADIENT if kind == "gradients" else parity.K_FORWARD
        measured.setdefault(kind, []).append(
            parity.compare(ours[name], theirs[name], truth[name], k=k, name=name)
        )
    rows = []
    for kind, measurements in measured.items():
        # The one that comes closest to its limit speaks for all of its kind.
        worst = max(measurements, key=lambda m: m.error / m.limit if m.limit else 0.0)
        passed = all(m.passed for m in measurements)
        rows.append(
            {
                "quantity": kind if kind != "gradients" else f"gradients ({len(measurements)})",
                "tensor": worst.name,
                "difference": (ours[worst.name] - theirs[worst.name]).abs().max().item(),
                "error": worst.error,
                "baseline_error": worst.baseline_error,
                "limit": worst.limit,
                "status": "pass" if passed else "fail",
            }
        )
    table(
        console,
        {
            "quantity": lambda r: r["quantity"],
            "difference": lambda r: small(r["difference"]),
            "error": lambda r: small(r["error"]),
            "PyTorch's": lambda r: small(r["baseline_error"]),
            "limit": lambda r: small(r["limit"]),
            "": lambda r: r["status"],
        },
        rows,
    )
    return rows


def _evaluate(network: nn.Module, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Logits, loss, and the gradient of every parameter by its name."""
    names, parameters = zip(*network.named_parameters(), strict=True)
    loss = network(tokens, targets)
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        logits = network(tokens)
    return {"logits": logits, "loss": loss.detach(), **dict(zip(names, gradients, strict=True))}


def _parity(device: torch.device, console: Console) -> list[Row]:
    heading(console, "4. Parity", "errors against the formulas in fp64, beside eager PyTorch's")
    interpret = (
        unavailable("triton", device.type, torch.float32) is not None
        and importlib.util.find_spec("triton") is not None
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(console.status("checking"))
        finish = stack.enter_context(_interpreter()) if interpret else None
        impls = [i for i in IMPLEMENTATIONS if i != "triton" or not interpret]
        rows = [row.as_dict() for row in verify.run(impls, device=device)]
        if finish is not None:
            rows += finish()
    table(
        console,
        {
            "op": lambda r: r["op"],
            "impl": lambda r: r["impl"],
            "dtype": lambda r: r["dtype"],
            "direction": lambda r: r["direction"],
            "error": lambda r: small(r["error"]),
            "PyTorch's": lambda r: small(r["baseline_error"]),
            "": lambda r: f"{r['status']} {r['passed']}/{r['cases']}",
        },
        worst_rows(rows),
    )
    for reason in reasons(row["reason"] for row in rows):
        console.print(f"  {escape(reason)}", style="yellow", soft_wrap=True)
    return rows


@contextlib.contextmanager
def _interpreter() -> Iterator[Callable[[], list[Row]]]:
    """Start Triton's kernels in the interpreter; yields a function that waits for their rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        process = subprocess.Popen(
            # -P: the package that runs here, not another that lies in the current folder
            [
                sys.executable,
                "-P",
                "-m",
                "gptkernels",
                *_INTERPRETER_ARGUMENTS,
                "--json",
                str(path),
            ],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + _INTERPRETER_SECONDS

        def finish() -> list[Row]:
            try:
                _, errors = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
                # What it did not reach although it had the time is as bad as a wrong result.
                status = "fail"
                ended = (errors.strip().splitlines() or ["no message"])[-1]
                reason = f"{_INTERPRETER_COMMAND} ended with {process.returncode}: {ended}"
            except subprocess.TimeoutExpired:
                status = "skipped"
                reason = (
                    f"not reached within {_INTERPRETER_SECONDS:.0f} s, "
                    f"run {_INTERPRETER_COMMAND} for all"
                )
            rows = json.loads(path.read_text())["rows"] if path.exists() else []
            return rows + _missing_rows(rows, status, reason)

        try:
            yield finish
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()


def _missing_rows(rows: list[Row], status: str, reason: str) -> list[Row]:
    """Rows for what the interpreter should have measured and did not."""
    names = ("op", "case", "dtype", "direction")
    there = {tuple(row[name] for name in names) for row in rows}
    return [
        verify.Row(case.op, case.name, "triton", dtype, direction, status, reason=reason).as_dict()
        for case in verify.CASES
        for dtype in map(verify.dtype_name, verify.DTYPES)
        for direction in case.directions
        if (case.op, case.name, dtype, direction) not in there
    ]


def _speed(trained: _Training, console: Console) -> list[Row]:
    heading(console, "5. Speed", "median times, alternating with eager PyTorch on the same inputs")
    rows: list[Row] = []
    with console.status("measuring"):
        for op in bench.OPERATORS:
            rows += bench.suite(op).rows(trained.device, IMPLEMENTATIONS, quick=True)
        rows += timing.rows([_training_step(trained)], device=trained.device, budget_s=3.0)
    rows = [row for row in rows if row["impl"] != timing.BASELINE or "skipped" in row]
    timed = [row for row in rows if row["time_s"] is not None]
    table(
        console,
        {
            "op": lambda r: r["op"],
            "shape": lambda r: r["shape"],
            "dtype": lambda r: r["dtype"],
            "direction": lambda r: r["direction"].replace("forward+backward", "both"),
            "impl": lambda r: r["impl"],
            "time": lambda r: report.seconds(r["time_s"]),
            "PyTorch's": lambda r: report.seconds(r["baseline_s"]),
            "speed-up": lambda r: "-" if r["ratio"] is None else f"{r['ratio']:.2f}x",
        },
        timed,
    )
    for reason in reasons(f"{r['impl']}: {r['skipped']}" for r in rows if "skipped" in r):
        console.print(f"  {escape(reason)}", style="yellow", soft_wrap=True)
    return rows


def _training_step(trained: _Training) -> timing.Case:
    """Forward and backward of a whole GPT: the demo's on a CPU, GPT-2's 124M shape on a GPU."""
    device = trained.device
    on_gpu = device.type == "cuda"
    config = GPTConfig.named("gpt2") if on_gpu else trained.result.model.config
    dtype = torch.bfloat16 if on_gpu else torch.float32
    batch = 8 if on_gpu else trained.config.batch_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (batch, config.block_size), generator=generator)
    tokens = tokens.to(device)
    model = GPT(config).to(device)
    twin = PlainGPT(config).to(device)
    twin.load_state_dict(model.state_dict())

    def step(network: nn.Module) -> Callable[[], None]:
        parameters = list(network.parameters())

        def call() -> None:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on_gpu):
                loss = network(tokens, tokens)
            torch.autograd.grad(loss, parameters)

        return call

    candidates = {timing.BASELINE: step(twin)}
    skipped = {}
    for impl in IMPLEMENTATIONS:
        reason = timing.untimeable(impl, device, dtype)
        if reason is None:
            candidates[impl] = step(copy.deepcopy(model).set_impl(impl))
        else:
            skipped[impl] = reason
    flops = flops_per_token(model, config.n_layer, config.n_embd, config.block_size)
    return timing.Case(
        op="gpt",
        shape=f"{config.n_layer} layers, B{batch} T{config.block_size} C{config.n_embd}",
        dtype=dtype,
        direction="forward+backward",
        candidates=candidates,
        flops=int(flops * tokens.numel()),
        skipped=skipped,
    )


@contextlib.contextmanager
def _threads(device: torch.device) -> Iterator[None]:
    """As many CPU threads as PyTorch has, or one where that is faster for a training step.

    Threads wait for each other at every op. Where other programs keep a core busy, two threads
    were measured twenty times slower than one.
    """
    threads = torch.get_num_threads()
    if device.type == "cuda" or threads == 1:
        yield
        return
    model = GPT(_CPU_MODEL)
    tokens = torch.zeros(_CPU_BATCH, _CPU_MODEL.block_size, dtype=torch.int64)
    parameters = list(model.parameters())

    def step(count: int) -> None:
        torch.set_num_threads(count)
        torch.autograd.grad(model(tokens, tokens), parameters)

    try:
        timings = timing.compare(
            {str(n): functools.partial(step, n) for n in (threads, 1)}, min_rounds=7
        )
        torch.set_num_threads(int(min(timings, key=lambda name: timings[name].median_s)))
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Other packages' warnings and chatter would bury what the demo has to say."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
