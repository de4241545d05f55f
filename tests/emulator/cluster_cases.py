"""How the kernels of sm90/mbarriers.cu and sm90/clusters.cu are launched, right or wrong."""

from __future__ import annotations

from typing import Any

TILE = 256
RING: dict[str, Any] = {
    "a": 5 * TILE,
    "b": 5 * TILE,
    "n": 5,
    "threads": 96,
    "shared": 8 * TILE + 32,
}
STORES: dict[str, Any] = {"a": 128, "b": 128, "threads": 128, "shared": RING["shared"]}
ROLES: dict[str, Any] = {"b": 384, "threads": 384}
PAIR: dict[str, Any] = {"a": 128, "b": 128, "n": 2, "grid": (2, 1, 1), "cluster": 2, "threads": 64}
EXCHANGE: dict[str, Any] = {**PAIR, "shared": 512}
ARRIVAL: dict[str, Any] = {**PAIR, "shared": 256 + 8}
TURNS: dict[str, Any] = {"b": 5, "c": 2, "grid": (5, 1, 1)}
