"""The trained weights in plain PyTorch, beside the demo's model."""

from __future__ import annotations

import torch
from rich.console import Console
from torch import Tensor, nn

from gptkernels.cli.console import STYLES
from gptkernels.cli.demo.terminal import Row, heading, of_limit, small
from gptkernels.cli.demo.training import Training
from gptkernels.cli.table import Column, print_table
from gptkernels.gpt.training import data
from gptkernels.truth import parity
from gptkernels.truth.plain_gpt import PlainGPT

_COLUMNS = (
    Column("quantity"),
    Column("|ours - PyTorch|", right=True, lost=1),
    Column("our error", right=True, lost=3),
    Column("PyTorch's", right=True, lost=2),
    Column("of limit", right=True),
    Column("status"),
)


def twin_table(trained: Training, console: Console) -> list[Row]:
    """The trained weights in plain PyTorch, on a batch of held-out text, both held to fp64."""
    heading(
        console,
        "5. The same weights in plain PyTorch",
        "The trained weights in both models, on held-out text, against the same in fp64.",
    )
    model, device = trained.model, trained.task.device
    _, held_out = trained.task.parts
    batch = next(data.validation_batches(held_out, model.config.block_size, 4, 1))
    x, y = (part.to(device) for part in batch)

    def plain(dtype: torch.dtype) -> nn.Module:
        network = PlainGPT(model.config).to(device=device, dtype=dtype).eval()
        network.load_state_dict(model.state_dict())
        return network

    ours, theirs, truth = (
        _evaluate(network, x, y) for network in (model, plain(torch.float32), plain(torch.float64))
    )
    gradients = [name for name in truth if name not in ("logits", "loss")]
    kinds = {"logits": ["logits"], "loss": ["loss"], f"gradients ({len(gradients)})": gradients}
    rows: list[Row] = []
    for kind, names in kinds.items():
        k = parity.K_GRADIENT if names is gradients else parity.K_FORWARD
        measurements = [
            parity.compare(ours[name], theirs[name], truth[name], k=k, name=name) for name in names
        ]
        # Of each kind the tensor that is nearest to its limit is shown.
        worst = max(measurements, key=lambda m: m.error / m.limit if m.limit else 0.0)
        passed = all(m.passed for m in measurements)
        rows.append(
            {
                "quantity": kind,
                "tensor": worst.name,
                "difference": (ours[worst.name] - theirs[worst.name]).abs().max().item(),
                "error": worst.error,
                "baseline_error": worst.baseline_error,
                "limit": worst.limit,
                "status": "pass" if passed else "fail",
            }
        )
    print_table(
        console,
        _COLUMNS,
        [
            (
                row["quantity"],
                small(row["difference"]),
                small(row["error"]),
                small(row["baseline_error"]),
                of_limit(row),
                row["status"],
            )
            for row in rows
        ],
        [STYLES[row["status"]] for row in rows],
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
