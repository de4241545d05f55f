"""The trained weights in plain PyTorch, beside the demo's model."""

from __future__ import annotations

import torch
from rich.console import Console
from torch import Tensor, nn

from gptkernels.cli.demo.terminal import Row, heading, small, table
from gptkernels.cli.demo.training import Training
from gptkernels.gpt.tokenizer import ByteTokenizer
from gptkernels.gpt.training import data
from gptkernels.truth import parity
from gptkernels.truth.plain_gpt import PlainGPT


def twin_table(trained: Training, console: Console) -> list[Row]:
    """The trained weights in plain PyTorch, on a batch of held-out text, both held to fp64."""
    heading(console, "4. The same weights in plain PyTorch", "on held-out text")
    model, config = trained.result.model, trained.config
    size = model.config.block_size
    tokens = data.tokenize(data.read_text([trained.file]), ByteTokenizer())
    _, held_out = data.split(tokens, config.validation_fraction, size)
    x, y = (part.to(trained.device) for part in next(data.validation_batches(held_out, size, 4, 1)))

    def plain(dtype: torch.dtype) -> nn.Module:
        network = PlainGPT(model.config).to(device=trained.device, dtype=dtype).eval()
        network.load_state_dict(model.state_dict())
        return network

    ours, theirs, truth = (
        _evaluate(network, x, y) for network in (model, plain(torch.float32), plain(torch.float64))
    )
    gradients = [name for name in truth if name not in ("logits", "loss")]
    kinds = {"logits": ["logits"], "loss": ["loss"], f"gradients ({len(gradients)})": gradients}
    rows = []
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
