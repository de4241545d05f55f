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
from right import assert_same, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptkernels import attention
from gptkernels.core import philox
from gptkernels.ops.attention.options import AttentionOptions
from gptkernels.ops.attention.torch import dense


class TestTorchImplementation:
    @pytest.mark.parametrize(
        ("options", "fused"),
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
        self, options: dict[str, Any], fused: bool
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
            dense._fused_attention_fwd,
            dense._fused_attention_bwd,
            dense._masked_attention_fwd,
            dense._masked_attention_bwd,
        ]
        with pytest.MonkeyPatch.context() as patch:
            for function in monitored:
                patch.setattr(dense, function.__name__, noting(function, parts))
            run(functools.partial(attention, **options, impl="torch"), tensors)
        assert bool(parts) == fused
        assert len(parts) in (0, 2)

    def test_fused_cuda_ops_take_only_what_their_grids_can(self) -> None:
        for shape in ((65536, 1, 1, 16), (1, 65536, 1, 16)):
            q = SimpleNamespace(device=torch.device("cuda"), shape=shape)
            assert dense._fused_choice(q, q, q, True, 1.0) is None

    def test_widths_that_flash_backward_refuses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for capability, fits in (((8, 0), True), ((8, 6), False), ((9, 0), True), ((12, 0), False)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
            for D, accepted in ((192, True), (200, fits), (224, fits), (232, True)):
                q = SimpleNamespace(device=torch.device("cuda"), shape=(1, 1, 1, D))
                assert dense._flash_backward_takes(q) == accepted

    def test_memory_stays_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No tensor of the formula has more scores than the bound."""
        monkeypatch.setattr(dense, "_SCORES_HELD", 2000)
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
            mask = [True, True, True, False]
            dense.attention_bwd(out, lse, *tensors.values(), out, lse, options, mask, True)
        assert largest <= 2000


class TestRegistration:
    @each
    @pytest.mark.parametrize("everything", [False, True])
    def test_opcheck(self, impl: str, everything: bool) -> None:
        q, k, v = inputs(2, 6, 9, 4, 2, 16).values()
        slopes = torch.ones(4, device=DEVICE) if everything else None
        rng = philox.draw(DEVICE) if everything else None
        mask = torch.randn(2, 1, 6, 9, device=DEVICE) if everything and impl == "torch" else None
        options = AttentionOptions(0.3)
        if everything:
            options = AttentionOptions(
                0.3, left=4, right=0, softcap=2.0, dropout_p=0.1, alibi_slopes=slopes,
                key_lengths=lengths(3, 9), attn_mask=mask, rng=rng,
            )  # fmt: skip
        ops = torch.ops.gptkernels
        torch.library.opcheck(ops.attention_fwd.default, (q, k, v, *options, impl))
        out, lse = ops.attention_fwd(q, k, v, *options, impl)
        torch.library.opcheck(
            ops.attention_bwd.default,
            (
                torch.randn_like(out),
                torch.randn_like(lse) if everything else None,
                *(q, k, v, out, lse),
                *options,
                [True, not everything, True, mask is not None],
                False,
                impl,
            ),
        )

    def test_compile_keeps_the_fused_backward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dense, "_attention_rows_bwd", None)  # a gradient of lse would call it
        torch._dynamo.reset()
        call = functools.partial(attention, impl="torch")
        compiled = torch.compile(lambda q, k, v: call(q, k, v), fullgraph=True, backend="aot_eager")
        assert_same(run(compiled, inputs()), run(call, inputs()))
