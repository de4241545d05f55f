"""`attention` as a registered op, and the PyTorch ops that impl="torch" calls. test_every_op.py, in
the folder above, tests what all ops have in common."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_cases import MASKED, noting
from harness import BF16, DEVICE, each
from op_inputs import attention_inputs as inputs
from op_inputs import int32 as lengths
from right import assert_same, check_op, run
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gptkernels import attention
from gptkernels.core import philox
from gptkernels.ops.attention import dense as public
from gptkernels.ops.attention import torch as implementation
from gptkernels.ops.attention.options import AttentionOptions
from gptkernels.ops.attention.torch import backend, blocks, dense, formula, fused
from gptkernels.ops.attention.torch.named import usable


class TestTorchImplementation:
    @pytest.mark.parametrize(
        ("options", "by_fused_ops"),
        [
            (dict(), True),
            (dict(causal=False), True),
            (dict(Tq=1), True),
            (dict(Tq=4), MASKED),
            (dict(Tq=4, causal=False), True),
            (dict(window=(100, 100)), True),
            (dict(window=(3, 0)), MASKED),
            (dict(attn_mask=torch.ones(9, 9, dtype=torch.bool, device=DEVICE)), MASKED),
            (dict(attn_mask=torch.ones(9, 9, dtype=BF16, device=DEVICE)), False),
            (dict(alibi_slopes=[1.0, 1.0, 1.0, 1.0]), False),
            (dict(softcap=1.0), False),
            (dict(dropout_p=0.1), False),
            (dict(key_lengths=(9,)), MASKED),
        ],
        ids=str,
    )
    def test_it_is_fused_where_the_options_allow(
        self, options: dict[str, Any], by_fused_ops: bool
    ) -> None:
        options = dict(options)
        tensors = inputs(1, options.pop("Tq", 9), 9, H=4, Hk=2, D=16, dtype=BF16)
        if "key_lengths" in options:
            options["key_lengths"] = lengths(*options["key_lengths"])
        seen: list[str] = []

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                seen.append(str(func))
                return func(*args, **(kwargs or {}))

        def call(**leaves: Any) -> Tensor:
            with Recorder():
                return attention(**leaves, **options, impl="torch")

        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        with Recorder():
            call(**leaves).sum().backward()
        assert any("gptkernels.attention_fwd" in name for name in seen)
        assert any("gptkernels.attention_bwd" in name for name in seen)
        parts: list[str] = []
        monitored = [
            fused.attention_fwd,
            fused.attention_bwd,
            fused.masked_attention_fwd,
            fused.masked_attention_bwd,
        ]
        with pytest.MonkeyPatch.context() as patch:
            for function in monitored:
                patch.setattr(fused, function.__name__, noting(function, parts))
            run(functools.partial(attention, **options, impl="torch"), tensors)
        assert bool(parts) == by_fused_ops
        assert len(parts) in (0, 2)

    def test_memory_stays_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No tensor of the formula has more scores than the bound."""
        monkeypatch.setattr(blocks, "_SCORES_HELD", 2000)
        largest = 0

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                nonlocal largest
                result = func(*args, **(kwargs or {}))
                if isinstance(result, Tensor):
                    largest = max(largest, result.numel())
                return result

        tensors = inputs(1, 300, H=1, D=4)
        with Watch():
            options = AttentionOptions(0.5, left=100, right=0, softcap=2.0)
            out, lse = dense.attention_fwd(*tensors.values(), options)
            mask = [True, True, True, False, False]
            dense.attention_bwd(out, lse, *tensors.values(), out, lse, options, mask, True)
        assert largest <= 2000


def on_a_gpu(B: int, Tq: int, H: int, D: int) -> Any:
    """What stands for a tensor (B, H, Tq, D) on a GPU."""
    return SimpleNamespace(device=torch.device("cuda"), shape=(B, H, Tq, D))


class TestBackend:
    """Which of SDPA's fused CUDA ops runs, by a PyTorch that picks cuDNN."""

    @pytest.fixture(autouse=True)
    def cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.capability, self.taken = (9, 0), {"flash", "efficient"}
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *given, **options: backend.CUDNN)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: self.capability)
        monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *given: None)
        for name in ("flash", "efficient"):
            takes = functools.partial(lambda name, call: name in self.taken, name)
            monkeypatch.setattr(torch.backends.cuda, f"can_use_{name}_attention", takes)

    def picked(self, Tq: int = 5, D: int = 64, B: int = 2, H: int = 4, Hk: int = 4) -> int:
        q, k = on_a_gpu(B, Tq, H, D), on_a_gpu(B, 7, Hk, D)
        return backend.pick(q, k, k, False, 1.0)

    def test_grids_have_limits(self) -> None:
        assert self.picked() == backend.CUDNN
        assert self.picked(B=65536) == self.picked(H=65536) == backend.NONE

    def test_a_single_query_is_not_for_cudnn_from_capability_10_on(self) -> None:
        assert self.picked(Tq=1) == backend.CUDNN
        for self.capability in ((10, 0), (10, 3), (12, 0)):
            assert self.picked(Tq=2) == backend.CUDNN
            self.taken = {"flash", "efficient"}
            assert self.picked(Tq=1) == backend.FLASH
            self.taken = {"efficient"}
            assert self.picked(Tq=1) == backend.EFFICIENT
            assert self.picked(Tq=1, Hk=2) == backend.NONE

    def test_only_what_has_a_backward_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *given, **options: backend.FLASH)
        for self.capability, fits in (((8, 0), 1), ((8, 6), 0), ((9, 0), 1), ((12, 0), 0)):
            for D, flash in ((192, 1), (200, fits), (224, fits), (232, 1)):
                assert self.picked(D=D) == (backend.FLASH if flash else backend.EFFICIENT)

    def test_no_backend_at_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*given: Any, **options: Any) -> int:
            raise RuntimeError("No viable backend for scaled_dot_product_attention was found.")

        monkeypatch.setattr(torch, "_fused_sdp_choice", refuse)
        assert self.picked() == backend.NONE

    def test_values_of_another_width_are_asked_about_as_they_run(self) -> None:
        """That is padded to the width of q."""
        asked: list[torch.Size] = []

        def ask(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> Any:
            asked.extend(x.shape for x in (q, k, v))

        self.monkeypatch.setattr(torch.backends.cuda, "SDPAParams", ask)
        with FakeTensorMode():
            q, k, v = (torch.empty(1, 7, 2, D, device="cuda") for D in (16, 16, 8))
            usable(q, k, v, AttentionOptions(0.3, right=0))
        assert set(asked) == {(1, 2, 7, 16)}

    def test_the_backward_pass_runs_the_backend_of_the_forward_pass(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = iter([backend.EFFICIENT])
        monkeypatch.setattr(public, "fused_backend", lambda q, k, v, options: next(asked))
        ran = []
        for name in ("attention_fwd", "attention_bwd"):
            function = getattr(implementation, name)

            def note(*given: Any, function: Any = function) -> Any:
                ran.extend(x.backend for x in given if isinstance(x, AttentionOptions))
                return function(*given)

            monkeypatch.setattr(implementation, name, note)
        run(functools.partial(attention, impl="torch"), inputs())
        assert ran == [backend.EFFICIENT, backend.EFFICIENT]

    @pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)], ids=["BTHD", "BHTD"])
    def test_cudnn_gets_out_and_dout_laid_out_like_q(self, order: tuple[int, ...]) -> None:
        """Its graphs, which PyTorch caches by the layouts of q, k and v, have those of the first
        call for out and dout."""
        B, T, H, D = 2, 6, 3, 16
        sizes = [(B, T, H, D)[i] for i in order]
        q, k, v = (torch.empty(sizes, dtype=BF16, device="meta").permute(order) for _ in range(3))
        out = torch.empty((B, T, H, D), dtype=BF16, device="meta")
        dout = torch.empty((H, T, B, D), dtype=BF16, device="meta").permute(2, 1, 0, 3)
        lse = torch.empty((B, H, T), device="meta")
        given: list[Any] = []

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                if "cudnn_attention_backward" in str(func):
                    given.extend(args)
                return func(*args, **(kwargs or {}))

        options = AttentionOptions(0.5, right=0, backend=backend.CUDNN)
        with Recorder():
            fused.attention_bwd(dout, q, k, v, out, lse, True, options, False)
        assert len({x.stride() for x in given[:5]}) == 1
        assert given[0].stride() == q.transpose(1, 2).stride()


class TestRegistration:
    @each
    @pytest.mark.parametrize("everything", [False, True])
    def test_opcheck(self, impl: str, everything: bool) -> None:
        q, k, v = inputs(2, 6, 9, 4, 2, 16).values()
        slopes = torch.ones(4, device=DEVICE) if everything else None
        rng = philox.draw(DEVICE) if everything else None
        mask = (
            torch.randn(2, 1, 6, 9, device=DEVICE)
            if everything and impl in ("torch", "cpu")
            else None
        )
        options = AttentionOptions(0.3)
        alone = everything and impl == "torch"  # which has every option
        if everything:
            options = AttentionOptions(
                0.3, left=4, right=0, softcap=2.0, dropout_p=0.1, alibi_slopes=slopes,
                sinks=slopes if alone else None, key_lengths=lengths(3, 9), attn_mask=mask, rng=rng,
            )  # fmt: skip
        ops = torch.ops.gptkernels
        check_op(ops.attention_fwd.default, (q, k, v, *options, impl))
        out, lse = ops.attention_fwd(q, k, v, *options, impl)
        check_op(
            ops.attention_bwd.default,
            (
                torch.randn_like(out),
                torch.randn_like(lse) if everything else None,
                *(q, k, v, out, lse),
                *options,
                [True, not everything, True, mask is not None, alone],
                False,
                impl,
            ),
        )

    @pytest.mark.parametrize("impl", ["torch", "cpu"])
    @pytest.mark.parametrize("Tk", [3, 0])
    def test_what_nobody_wants_has_the_dtype_that_compilers_are_told(
        self, impl: str, Tk: int
    ) -> None:
        def dtypes() -> list[torch.dtype]:
            q, k = (torch.zeros(1, T, 2, 16, dtype=BF16) for T in (3, Tk))
            return [x.dtype for x in torch.ops.gptkernels.attention_bwd(
                q, None, q, k, k, q, torch.zeros(1, 2, 3), *AttentionOptions(0.3),
                [True, False, False, False, False], True, impl,
            )]  # fmt: skip

        found = dtypes()
        with FakeTensorMode():
            assert dtypes() == found

    def test_compile_keeps_the_fused_backward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(formula, "attention_bwd", None)  # a gradient of lse would call it
        torch._dynamo.reset()
        call = functools.partial(attention, impl="torch")
        compiled = torch.compile(lambda q, k, v: call(q, k, v), fullgraph=True, backend="aot_eager")
        assert_same(run(compiled, inputs()), run(call, inputs()))
