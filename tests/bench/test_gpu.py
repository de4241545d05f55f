"""The kernels, Triton's and the CUDA C++ ones, natively on an NVIDIA GPU: every test marked `gpu`.

Stands apart from the rest of the suite (no conftest, no hypothesis), so that it also runs where
only PyTorch, Triton, pytest and numpy are installed. The most telling tests come first. Inputs are
new on every run; a failure names the seed that gives them again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import gptkernels
from gptkernels import GPT, GPTConfig
from gptkernels.core.choice import unavailable
from gptkernels.gpt.training.activations import measured
from gptkernels.truth import baseline, parity, reference, verify
from gptkernels.truth.plain_gpt import PlainGPT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REPEATS = 250
Draw = Callable[[verify.Randn], dict[str, Tensor]]


@dataclass(frozen=True)
class Call:
    """One call of an operator: how to draw its inputs, and its options."""

    op: str
    draw: Draw
    options: dict[str, Any] = field(default_factory=dict)
    op_options: dict[str, Any] = field(default_factory=dict)  # change how, not what
    name: str = ""

    def inputs(self, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return self.draw(
            lambda *sizes: torch.randn(sizes, generator=generator).to(device="cuda", dtype=dtype)
        )

    def __call__(self, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
        """Outputs, then the gradients of all inputs that have one for cotangents of ones."""
        leaves = {
            name: value.detach().requires_grad_(value.is_floating_point())
            for name, value in inputs.items()
        }
        op = getattr(gptkernels, self.op)
        given = {**self.options, **self.op_options, **options}
        returned = op(**leaves, **given)
        outputs = returned if isinstance(returned, tuple) else (returned,)
        gradients = torch.autograd.grad(
            outputs,
            [leaf for leaf in leaves.values() if leaf.requires_grad],
            [torch.ones_like(output) for output in outputs],
        )
        return (*(output.detach() for output in outputs), *gradients)

    def __str__(self) -> str:
        return f"{self.op} {self.name}".strip()


def norm(rows: int, width: int, *more: str) -> Draw:
    """layer_norm's x and weight, and of bias and residual those that are named."""
    sizes = {"bias": (width,), "residual": (rows, width)}
    return lambda randn: {
        "x": randn(rows, width),
        "weight": randn(width),
        **{name: randn(*sizes[name]) for name in more},
    }


def heads(q: tuple[int, ...], kv: tuple[int, ...] | None = None) -> Draw:
    """attention's q, k and v; without another shape all three have q's."""
    return lambda randn: {"q": randn(*q), "k": randn(*(kv or q)), "v": randn(*(kv or q))}


def mlp(rows: int, width: int, inner: int) -> Draw:
    """gelu_mlp's inputs, weights such that what they give is about as large as x."""
    return lambda randn: {
        "x": randn(rows, width),
        "w1": randn(inner, width) / width**0.5,
        "b1": randn(inner),
        "w2": randn(width, inner) / inner**0.5,
        "b2": randn(width),
    }


def packed(randn: verify.Randn) -> dict[str, Tensor]:
    """attention_varlen's inputs. Its lengths stay on the GPU: reading them would break the capture
    of a graph."""
    return {
        **heads((300, 6, 64), (310, 2, 64))(randn),
        "cu_seqlens_q": torch.tensor([0, 40, 40, 300], dtype=torch.int32, device="cuda"),
        "cu_seqlens_k": torch.tensor([0, 45, 50, 310], dtype=torch.int32, device="cuda"),
    }


CALLS = (
    Call("layer_norm", norm(500, 768, "bias", "residual"), {"prenorm": True}),
    Call(
        "attention",
        heads((2, 300, 6, 64), (2, 300, 2, 64)),
        {"causal": True},
        {"deterministic": True},
    ),
    Call(
        "attention_varlen",
        packed,
        {"max_seqlen_q": 260, "max_seqlen_k": 260},
        {"deterministic": True},
    ),
    Call("gelu_mlp", mlp(300, 256, 1000)),
)

# More than 108 of gelu_mlp's large tiles, 128 x 128, the last ones cut.
large_tiles = mlp(1500, 256, 1200)
REPEATED = (*CALLS, Call("gelu_mlp", large_tiles, name="large tiles"))

# Shapes of real models, and sizes past what a 16-bit grid dimension holds.
LARGE = (
    Call("layer_norm", norm(4096, 1600, "bias"), name="GPT-2 XL"),
    Call("attention", heads((2, 1024, 12, 64)), name="GPT-2"),
    Call("attention", heads((1, 777, 8, 128), (1, 777, 2, 128)), name="D 128, grouped heads"),
    Call("gelu_mlp", mlp(2048, 768, 3072), name="GPT-2"),
    Call(
        "gelu_mlp",
        large_tiles,
        {"approximate": "none"},
        {"recompute": True},
        name="large tiles, erf, recompute",
    ),
    Call("layer_norm", norm(70_001, 64, "residual"), name="70001 rows"),
    Call("attention", heads((5500, 17, 12, 16)), name="66000 heads x batch"),
    Call(
        "attention",
        heads((1, 70_001, 1, 16), (1, 33, 1, 16)),
        {"causal": False},
        name="70001 queries",
    ),
    Call("gelu_mlp", mlp(70_001, 40, 72), name="70001 rows"),
)


kernels = pytest.mark.parametrize("impl", ["triton", "cuda"])


@pytest.fixture(autouse=True)
def usable(request: pytest.FixtureRequest) -> None:
    """Skips what is not installed, and says so."""
    if "impl" in request.fixturenames:
        reason = unavailable(request.getfixturevalue("impl"), "cuda", torch.float32)
        if reason is not None:
            pytest.skip(reason)


@pytest.fixture
def seed() -> int:
    """Of a test's inputs; GPTKERNELS_TEST_SEED gives them again."""
    return int(os.environ.get("GPTKERNELS_TEST_SEED", "0")) or verify.fresh_seed()


def replay(seed: int) -> str:
    return f"GPTKERNELS_TEST_SEED={seed} replays this test's inputs"


def assert_parity(
    candidate: parity.Op, plain: parity.Op, truth: parity.Op, inputs: dict[str, Tensor], seed: int
) -> None:
    measurements = parity.measure(candidate, plain, truth, inputs, seed=seed)
    assert [str(m) for m in measurements if not m.passed] == [], replay(seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", verify.CASES, ids=lambda case: f"{case.op} {case.name}")
@kernels
def test_parity(impl: str, case: verify.Case, dtype: torch.dtype, seed: int) -> None:
    """Every row of the parity table, into outputs poisoned with NaN."""
    for row in verify.check(case, impl, dtype, torch.device("cuda"), seed):
        assert row.status == "pass", row  # which has the seed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["triton", "cuda", "torch"])
def test_gpt(impl: str, dtype: torch.dtype, seed: int) -> None:
    """A whole model, and every parameter's gradient, against its twin in plain PyTorch."""
    torch.manual_seed(seed)
    config = GPTConfig(vocab_size=61, block_size=100, n_layer=2, n_head=3, n_embd=96)
    tokens = torch.randint(config.vocab_size, (2, config.block_size), device="cuda")
    model = GPT(config).set_impl(impl)
    parameters = {  # large enough that each one matters
        name.replace(".", "__"): (p.detach() + 0.2 * torch.randn(p.shape)).to("cuda", dtype)
        for name, p in model.named_parameters()
    }

    def of_parameters(network: nn.Module) -> parity.Op:
        def function(**named: Tensor) -> Tensor:
            state = {name.replace("__", "."): value for name, value in named.items()}
            return functional_call(network, state, (tokens,), tie_weights=True)

        return function

    twin = of_parameters(PlainGPT(config))
    assert_parity(of_parameters(model), twin, twin, parameters, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", REPEATED, ids=str)
@kernels
def test_repeated_runs_give_the_same_bits(
    impl: str, call: Call, dtype: torch.dtype, seed: int
) -> None:
    inputs = call.inputs(dtype, seed)
    first = call(inputs, impl=impl)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(REPEATS):
        for again, expected in zip(call(inputs, impl=impl), first, strict=True):
            different += (again != expected).sum()
    assert different.item() == 0, replay(seed)


def captured(
    call: Call, inputs: dict[str, Tensor], **options: Any
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A graph of the call, warm before, and what its replays write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(inputs, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call(inputs, **options)
    return graph, outputs


@pytest.mark.parametrize("call", CALLS, ids=str)
@kernels
def test_cuda_graph_replays_with_new_inputs(impl: str, call: Call, seed: int) -> None:
    inputs = call.inputs(torch.float16, seed)
    graph, outputs = captured(call, inputs, impl=impl)
    fresh = call.inputs(torch.float16, seed + 1)
    for name, value in fresh.items():
        inputs[name].copy_(value)
    graph.replay()
    for replayed, expected in zip(outputs, call(fresh, impl=impl), strict=True):
        assert torch.equal(replayed, expected), replay(seed)


@pytest.mark.parametrize("op", ["layer_norm", "attention"])
@kernels
def test_cuda_graph_draws_a_new_dropout_mask_at_each_replay(impl: str, op: str, seed: int) -> None:
    call = next(call for call in CALLS if call.op == op)
    inputs = call.inputs(torch.float16, seed)
    graph, outputs = captured(call, inputs, impl=impl, dropout_p=0.5)
    graph.replay()
    first = outputs[0].clone()
    graph.replay()
    assert not torch.equal(outputs[0], first), replay(seed)


@pytest.mark.parametrize("call", CALLS, ids=str)
@kernels
def test_side_stream(impl: str, call: Call, seed: int) -> None:
    """Kernels run on the current stream: elsewhere they would read inputs before they are there."""
    fresh = call.inputs(torch.float16, seed)
    expected = call(fresh, impl=impl)
    inputs = {
        name: torch.full_like(value, float("nan")) if value.is_floating_point() else value.clone()
        for name, value in fresh.items()
    }
    call(inputs, impl=impl)  # compiled and warm
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds
        for name, value in fresh.items():
            inputs[name].copy_(value)
        results = call(inputs, impl=impl)
    side.synchronize()
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted), replay(seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", LARGE, ids=str)
@kernels
def test_large(impl: str, call: Call, dtype: torch.dtype, seed: int) -> None:
    op = getattr(gptkernels, call.op)
    with parity.poisoned_outputs():  # of the backward pass too
        assert_parity(
            lambda **leaves: op(**leaves, **call.options, **call.op_options, impl=impl),
            lambda **leaves: getattr(baseline, call.op)(**leaves, **call.options),
            lambda **leaves: getattr(reference, call.op)(**leaves, **call.options),
            call.inputs(dtype, seed),
            seed,
        )


def test_activations_take_at_least_what_blocks_keep() -> None:
    config = GPTConfig(61, block_size=512, n_layer=2, n_head=4, n_embd=256)
    model = GPT(config).cuda()
    tokens = torch.randint(config.vocab_size, (8, 512), device="cuda")
    with measured(model) as activations:
        loss = model(tokens, tokens)
    least = 2 * 8 * 512 * (7 * 256 + 1024) * 4
    assert least < activations.bytes < 4 * least
    loss.backward()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("call", CALLS, ids=str)
@kernels
def test_second_device(impl: str, call: Call, seed: int) -> None:
    """Tensors of a device that is not the current one."""
    inputs = call.inputs(torch.float16, seed)
    elsewhere = {name: value.to("cuda:1") for name, value in inputs.items()}
    for result, expected in zip(call(elsewhere, impl=impl), call(inputs, impl=impl), strict=True):
        assert result.device == torch.device("cuda:1")
        assert torch.equal(result.cpu(), expected.cpu()), replay(seed)


@pytest.mark.parametrize("call", CALLS, ids=str)
@kernels
def test_new_thread(impl: str, call: Call, seed: int) -> None:
    """A thread that no CUDA call has given a context yet."""
    inputs = call.inputs(torch.float16, seed)
    expected = call(inputs, impl=impl)
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as thread:
        results = thread.submit(call, inputs, impl=impl).result()
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted), replay(seed)


BACKWARD_FIRST = """
import torch
from gptkernels import gelu_mlp
x, w1, w2 = (torch.randn(256, 256, device="cuda", dtype=torch.float16) for _ in range(3))
x.requires_grad_()
def gradient(impl):
    return torch.autograd.grad(gelu_mlp(x, w1 / 16, None, w2 / 16, None, impl=impl).sum(), x)[0]
torch.testing.assert_close(gradient("cuda"), gradient("torch"), rtol=0.02, atol=0.02)
"""


def test_autograds_thread_begins_with_a_tensor_map() -> None:
    """Without b2, gelu_mlp's backward pass launches a product first. The process is new, so that
    nothing has given autograd's thread a context before."""
    if unavailable("cuda", "cuda", torch.float16) is not None:
        pytest.skip("needs the CUDA C++ kernels")
    subprocess.run([sys.executable, "-c", BACKWARD_FIRST], check=True)


BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("Tq", [1, 130])
def test_torch_keeps_the_backend_of_the_forward_pass(
    Tq: int, backend: SDPBackend, seed: int
) -> None:
    """Also with a gradient of out in two layouts, of which cuDNN's cached graphs know one."""
    call = Call("attention", heads((2, Tq, 4, 64), (2, 130, 4, 64)))
    options = {"causal": Tq == 130}
    for turned in (False, True):

        def turn(x: Tensor, turned: bool = turned) -> Tensor:
            return x.transpose(1, 2).contiguous() if turned else x

        def ours(turn: Any = turn, **leaves: Tensor) -> Tensor:
            with sdpa_kernel([backend, SDPBackend.MATH]):
                return turn(gptkernels.attention(**leaves, **options, impl="torch"))

        def of(module: Any, turn: Any = turn) -> parity.Op:
            return lambda **leaves: turn(module.attention(**leaves, **options))

        inputs = call.inputs(torch.bfloat16, seed)
        assert_parity(ours, of(baseline), of(reference), inputs, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [case for case in verify.CASES if case.op == "attention_varlen"],
    ids=lambda case: case.name,
)
def test_torch_packed_sequences(case: verify.Case, dtype: torch.dtype, seed: int) -> None:
    test_parity("torch", case, dtype, seed)


def test_torch_reads_no_lengths(seed: int) -> None:
    """A read would break the capture of a graph."""
    call = next(call for call in CALLS if call.op == "attention_varlen")
    test_cuda_graph_replays_with_new_inputs("torch", call, seed)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@kernels
def test_not_a_number_takes_hardly_longer(impl: str, name: str, seed: int) -> None:
    """Rows that see it, here all of them, need no care."""

    def seconds() -> float:
        start = time.perf_counter()
        gptkernels.attention(**inputs, impl=impl)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    inputs = Call("attention", heads((1, 8192, 8, 128))).inputs(torch.bfloat16, seed)
    usual = min(seconds() for _ in range(5))
    inputs[name][:, 0] = torch.nan
    assert min(seconds() for _ in range(3)) < 20 * usual + 1e-3, replay(seed)
