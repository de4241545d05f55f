"""The committed table of what each compiled kernel uses, and the rules that kernels must keep."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

TRITON = Path(__file__).with_name("triton.json")
NATIVE = Path(__file__).with_name("native.json")

# Bytes of shared memory that one thread block may use.
SHARED_LIMITS = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

Key = tuple[str, int]  # (configuration, compute capability)


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses: registers of a thread, bytes of stack and of shared memory.

    `spills` counts the instructions that move registers to local memory and back. `instructions`
    names the instructions of `sass.OF_NOTE` that the kernel has, such as "HMMA LDG.128"; it is
    empty for Triton's kernels. Where warps give registers to other warps (setmaxnreg), `roles` has
    the registers of a thread in each role, such as "24 240", and `registers` those at the start.
    """

    registers: int
    spills: int
    stack: int
    shared: int
    instructions: str = ""
    roles: str = ""

    def __str__(self) -> str:
        spilled = f", {self.spills} spills" if self.spills else ""
        stack = f", {self.stack} B stack" if self.stack else ""
        of_note = f", {self.instructions}" if self.instructions else ""
        roles = f" (by role {self.roles})" if self.roles else ""
        return f"{self.registers} registers{roles}{spilled}{stack}, {self.shared} B shared{of_note}"


@dataclass(frozen=True)
class Exemption:
    """A configuration that may spill on these compute capabilities, and the reason why it may."""

    configuration: str
    architectures: tuple[int, ...]
    reason: str

    def allows(self, key: Key) -> bool:
        """Whether the exemption covers this compiled kernel."""
        return key[0] == self.configuration and key[1] in self.architectures


@dataclass(frozen=True)
class Requirement:
    """An instruction that every kernel with a matching name must have."""

    kernels: str  # a regular expression that matches the beginning of the name
    instruction: str


@dataclass(frozen=True)
class Launch:
    """How one build of an op is launched; see gk::Build in csrc/runtime/build.h."""

    threads: int
    shared: int  # bytes of dynamic shared memory
    stages: int
    consumers: int
    cluster: int

    def __str__(self) -> str:
        return (
            f"{self.threads} threads, {self.shared} B of dynamic shared memory, {self.stages} "
            f"stages, {self.consumers} consumers, clusters of {self.cluster}"
        )


@dataclass
class Table:
    """A committed table. `versions` maps a compiler's version to the resources of its compiled
    kernels, `exemptions` hold for all versions, and `builds` has the builds that launchers choose
    among, by op and name."""

    versions: dict[str, dict[Key, Resources]] = field(default_factory=dict)
    exemptions: list[Exemption] = field(default_factory=list)
    builds: dict[str, Launch] = field(default_factory=dict)


def load(path: Path) -> Table:
    """Reads the table. Raises ValueError for a file that is not a table."""
    try:
        raw = json.loads(path.read_text())
        versions = {
            version: {
                (name, int(architecture.removeprefix("sm_"))): Resources(*numbers)
                for name, row in rows.items()
                for architecture, numbers in row.items()
            }
            for version, rows in raw["versions"].items()
        }
        exemptions = [
            Exemption(e["configuration"], tuple(e["architectures"]), e["reason"])
            for e in raw["exemptions"]
        ]
        builds = {name: Launch(*row) for name, row in raw.get("builds", {}).items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a table of the gates: {error!r}") from error
    return Table(versions, exemptions, builds)


def save(table: Table, path: Path) -> None:
    """Writes the table with one configuration on each line, so that a diff reads as a table."""
    rows = [_row(r) for kernels in table.versions.values() for r in kernels.values()]
    names = [f.name for f in fields(Resources)][: max(map(len, rows), default=0)]
    versions = [
        f'    "{version}": {{\n{_rows(kernels)}\n    }}'
        for version, kernels in sorted(table.versions.items())
    ]
    exemptions = [f"    {json.dumps(asdict(e))}" for e in table.exemptions]
    builds = [
        f"    {json.dumps(name)}: {json.dumps(astuple(launch))}"
        for name, launch in table.builds.items()
    ]
    text = f'{{\n  "columns": {json.dumps(names)},\n  "exemptions": [\n{_lines(exemptions)}  ],\n'
    if builds:
        columns = json.dumps([f.name for f in fields(Launch)])
        text += f'  "build_columns": {columns},\n  "builds": {{\n{_lines(builds)}  }},\n'
    text += f'  "versions": {{\n{_lines(versions)}  }}\n}}\n'
    path.write_text(text)


def violations(
    compiler: str,
    version: str,
    found: Mapping[Key, Resources],
    table: Table,
    requirements: Iterable[Requirement] = (),
    *,
    complete: bool = True,
    architectures: Collection[int] | None = None,
) -> list[str]:
    """Returns one sentence for each rule that the kernels compiled by this compiler and version
    break.

    `complete` means that `found` has every shipped kernel, of these architectures or of all. Then a
    kernel that only the table has is stale, which breaks a rule too. Where only some architectures
    were compiled, a register or two may differ.
    """
    committed = table.versions.get(version)
    if committed is None:
        known = ", ".join(sorted(table.versions)) or "none"
        return [
            f"the table has no {compiler} {version} (it has {known}): "
            "run python -m gates --update with it, and commit the result"
        ]
    broken = list(_beyond_limits(found, table.exemptions))
    broken += _without_instructions(found, requirements, complete and architectures is None)
    for key, resources in found.items():
        if key not in committed:
            broken.append(f"{_label(key)}: not in the table ({resources})")
        elif not _as_committed(resources, committed[key], architectures is not None):
            broken.append(f"{_label(key)}: {resources}, the table has {committed[key]}")
    if complete:
        stale = [key for key in committed if key not in found]
        if architectures is not None:
            stale = [key for key in stale if key[1] in architectures]
        broken += [f"{_label(key)}: in the table, but not shipped" for key in stale]
        broken += stale_exemptions(table)
    return broken


# nvcc names what is local to a file after all that it compiles it for, and with other names ptxas
# may take other registers: two were seen.
_REGISTERS_BY_NAMES = 2


def _as_committed(found: Resources, committed: Resources, partial: bool) -> bool:
    """Whether a kernel uses what the table says. `partial`: it was compiled for some of the
    architectures that the table's kernels were compiled for together."""
    apart = abs(found.registers - committed.registers)
    if partial and apart <= _REGISTERS_BY_NAMES:
        found = replace(found, registers=committed.registers)
    return found == committed


def build_violations(found: Mapping[str, Launch], table: Table) -> list[str]:
    """Returns one sentence for each build that no GPU could launch, or that differs from the
    table."""
    limit = SHARED_LIMITS[90]
    broken = [
        f"{name}: {launch.shared} B of dynamic shared memory, {limit} B is the limit"
        for name, launch in found.items()
        if launch.shared > limit
    ]
    for name, launch in found.items():
        if name not in table.builds:
            broken.append(f"{name}: not among the table's builds ({launch})")
        elif launch != table.builds[name]:
            broken.append(f"{name}: {launch}, the table has {table.builds[name]}")
    stale = [name for name in table.builds if name not in found]
    return broken + [f"{name}: a build of the table that is none" for name in stale]


def stale_exemptions(table: Table) -> list[str]:
    """Returns one sentence for each exemption that gives no reason, or that no kernel of any
    version needs."""
    spilled = {
        key
        for rows in table.versions.values()
        for key, resources in rows.items()
        if resources.spills or resources.stack
    }
    broken = []
    for exemption in table.exemptions:
        if not exemption.reason.strip():
            broken.append(f"{exemption.configuration}: its exemption gives no reason")
        if not any(exemption.allows(key) for key in spilled):
            broken.append(f"{exemption.configuration}: its exemption allows nothing, remove it")
    return broken


def changes(old: Mapping[Key, Resources], new: Mapping[Key, Resources]) -> list[str]:
    """Returns one line for each kernel that was added or removed, or whose resources changed."""
    lines = [f"- {_label(key)}: {old[key]}" for key in old if key not in new]
    lines += [f"+ {_label(key)}: {new[key]}" for key in new if key not in old]
    lines += [
        f"~ {_label(key)}: {old[key]} -> {new[key]}"
        for key in new
        if key in old and old[key] != new[key]
    ]
    return lines


def _beyond_limits(
    found: Mapping[Key, Resources], exemptions: Iterable[Exemption]
) -> Iterable[str]:
    exemptions = tuple(exemptions)
    for key, resources in found.items():
        limit = SHARED_LIMITS[key[1]]
        if resources.shared > limit:
            yield f"{_label(key)}: {resources.shared} B of shared memory, {limit} B is the limit"
        spills = resources.spills or resources.stack
        if spills and not any(exemption.allows(key) for exemption in exemptions):
            yield f"{_label(key)}: spills registers without an exemption ({resources})"


def _without_instructions(
    found: Mapping[Key, Resources], requirements: Iterable[Requirement], complete: bool
) -> Iterable[str]:
    for requirement in requirements:
        matching = {k: r for k, r in found.items() if re.match(requirement.kernels, k[0])}
        if complete and not matching:
            yield f"no kernel is named like {requirement.kernels!r}, which a requirement is for"
        for key, resources in matching.items():
            if requirement.instruction not in resources.instructions.split():
                yield f"{_label(key)}: has no {requirement.instruction} ({resources})"


def _rows(rows: Mapping[Key, Resources]) -> str:
    grouped: dict[str, dict[str, Any]] = {}
    for (name, architecture), resources in sorted(rows.items()):
        grouped.setdefault(name, {})[f"sm_{architecture}"] = _row(resources)
    return ",\n".join(f"      {json.dumps(n)}: {json.dumps(row)}" for n, row in grouped.items())


def _row(resources: Resources) -> list[int | str]:
    """Returns the fields as a list, without the empty strings at its end."""
    row = list(astuple(resources))
    while row and row[-1] == "":
        row.pop()
    return row


def _lines(entries: list[str]) -> str:
    return ",\n".join(entries) + "\n" if entries else ""


def _label(key: Key) -> str:
    return f"{key[0]} sm_{key[1]}"
