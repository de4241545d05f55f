"""What others offer for the same ops, found at run time: what our kernels are compared with.

One module an op: `attention`, `attention_varlen`, `attention_decode`, `layer_norm`, `gelu_mlp`,
`linear_cross_entropy`.
Each offers

    peers(device, dtype, ...the problem..., backward) -> name -> maker

A maker returns a function of the same tensors as the op takes, in the op's layout, which autograd
differentiates where `backward` asks for that; its first call may compile. Some packages let go of
what they saved, so attention and LayerNorm are told too whether the backward pass is `repeated`
behind one call. The maker makes what is no part of the timing, such as masks. It raises
NotImplementedError, with one sentence, where the peer cannot take the problem, and ImportError
where its package is installed but does not import. A peer whose package is not installed is not
there at all. `packages` lists them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]
Maker = Callable[[], Function]
Peers = dict[str, Maker]
Shape = tuple[int, ...]
