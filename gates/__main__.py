"""The command line of the gates. gates/__init__.py says what they check."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from gates import table as tables
from gates.table import Key, Requirement, Resources, Table

ROOT = Path(__file__).resolve().parent.parent

# Other versions of Triton than the installed one are checked on this architecture only, with one
# configuration of each kernel and dtype. That takes an eighth of the time, and Hopper's tensor-core
# instructions are what differs most between versions.
ARCHITECTURE_ASIDE = 90


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 if all gates hold, 1 if one fails, 2 if they could not run."""
    parser = _parser()
    options = parser.parse_args(arguments)
    other = options.compiler not in (None, "triton")
    if other and (options.triton or options.triton_path):
        only = f"--compiler {options.compiler}"
        parser.error(f"--triton and --triton-path are for Triton, {only} leaves it out")
    if options.triton:
        return max(_run_aside(version, options) for version in options.triton)
    # Triton reads these variables when it is imported. Without them it compiles kernels, with its
    # own tools.
    for name in [name for name in os.environ if name.startswith("TRITON_")]:
        del os.environ[name]
    if options.triton_path:
        sys.path.insert(0, str(options.triton_path))
        options.compiler = "triton"
    runs = {"triton": _triton, "nvcc": _nvcc, "builds": _builds}
    wanted = [options.compiler] if options.compiler else list(runs)
    codes = [runs[name](options) for name in wanted]
    if all(code is None for code in codes):
        print(f"gates: no configuration's name contains {options.only!r}", file=sys.stderr)
        return 2
    return max(code or 0 for code in codes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m gates", description=__doc__)
    parser.add_argument("--compiler", choices=("triton", "nvcc", "builds"), help="default: all")
    parser.add_argument(
        "--triton",
        nargs="+",
        metavar="VERSION",
        help="check with these versions, installed under build/ where they are not there yet",
    )
    parser.add_argument(
        "--triton-path",
        type=Path,
        metavar="FOLDER",
        help="check with the Triton in this folder, where pip install --target put it",
    )
    parser.add_argument("--only", default="", help="configurations whose name contains this text")
    parser.add_argument(
        "--arch",
        nargs="+",
        type=int,
        choices=sorted(tables.SHARED_LIMITS),
        help="kernels for these compute capabilities alone",
    )
    parser.add_argument("--update", action="store_true", help="write what is found to the table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    return parser


def _run_aside(version: str, options: argparse.Namespace) -> int:
    folder = ROOT / "build" / f"triton-{version}"
    if not (folder / "triton" / "__init__.py").exists():
        print(f"Installing Triton {version} in {folder}", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
        pip += ["--no-deps", "--no-compile"]
        partial = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(partial, ignore_errors=True)  # a stopped run may have left it
        installed = subprocess.run([*pip, "--target", str(partial), f"triton=={version}"], cwd=ROOT)
        if installed.returncode:
            print(f"gates: Triton {version} could not be installed in {folder}", file=sys.stderr)
            return 2
        partial.rename(folder)
    command = [sys.executable, "-m", "gates", "--triton-path", str(folder)]
    command += ["--only", options.only, "--jobs", str(options.jobs)]
    command += ["--arch", *map(str, options.arch)] if options.arch else []
    command += ["--update"] if options.update else []
    return subprocess.run(command, cwd=ROOT).returncode


def _triton(options: argparse.Namespace) -> int | None:
    """Returns the exit code; None where --only and --arch leave no configuration."""
    try:
        import triton
    except ImportError:
        print("gates: Triton is not installed (pip install triton; Linux only)", file=sys.stderr)
        return 2
    from gates.compiling import configurations, measure_all, one_of_each_kernel

    if options.triton_path:
        keys = [(name, ARCHITECTURE_ASIDE) for name in one_of_each_kernel(ARCHITECTURE_ASIDE)]
    else:
        keys = [(name, a) for name, s in configurations().items() for a in s.architectures]
    wanted = options.arch or tables.SHARED_LIMITS
    keys = [key for key in keys if options.only in key[0] and key[1] in wanted]
    if (options.only or options.arch) and not keys:
        return None
    started = time.perf_counter()
    found: dict[Key, Resources] = {}
    for key, resources in measure_all(keys, options.jobs):
        found[key] = resources
        if sys.stderr.isatty():
            print(f"\r{len(found)}/{len(keys)} compiled", end="", file=sys.stderr, flush=True)
    found = {key: found[key] for key in keys}
    if sys.stderr.isatty():
        print(file=sys.stderr)
    table = tables.load(tables.TRITON)
    broken = _compare("Triton", triton.__version__, found, table, tables.TRITON, options)
    return _verdict(f"Triton {triton.__version__}", found, broken, started)


def _nvcc(options: argparse.Namespace) -> int | None:
    """Returns the exit code; None where --only and --arch leave no kernel, or might leave none but
    nvcc is missing."""
    from gates import native

    version = native.version()
    if version is None:
        print("nvcc: skipped, neither PATH nor CUDA_HOME leads to it")
        return None if options.only and not options.compiler else 0
    if not native.names(options.arch):
        return None
    started = time.perf_counter()
    try:
        found, notes = native.measure_all(options.jobs, options.arch)
    except subprocess.CalledProcessError:
        print("gates: the CUDA kernels do not compile (see above)", file=sys.stderr)
        return 1
    except native.extension.BuildError as error:
        print(f"gates: {error}", file=sys.stderr)
        return 2
    found = {key: resources for key, resources in found.items() if options.only in key[0]}
    if options.only and not found:
        return None
    table = tables.load(tables.NATIVE)
    broken = _compare("nvcc", version, found, table, tables.NATIVE, options, native.REQUIREMENTS)
    return _verdict(f"nvcc {version}", found, [*notes, *broken], started)


def _builds(options: argparse.Namespace) -> int | None:
    """Returns the exit code; None with --only, since builds are checked all together or not at
    all."""
    from gates import native

    if options.only:
        return None
    try:
        found = native.builds()
    except native.extension.BuildError as error:
        print(f"builds: skipped, {error}")
        return 0
    except subprocess.CalledProcessError:
        print("gates: the launchers do not compile for this CPU (see above)", file=sys.stderr)
        return 1
    table = tables.load(tables.NATIVE)
    if options.update:
        table.builds = found
        tables.save(table, tables.NATIVE)
    broken = tables.build_violations(found, table)
    for sentence in broken:
        print(f"FAILED {sentence}")
    most = max((launch.shared for launch in found.values()), default=0)
    verdict = f"{len(broken)} FAILED" if broken else "all hold"
    print(f"launchers: {len(found)} builds, at most {most / 1024:.1f} KiB each, {verdict}")
    return 1 if broken else 0


def _compare(
    compiler: str,
    version: str,
    found: Mapping[Key, Resources],
    table: Table,
    path: Path,
    options: argparse.Namespace,
    requirements: Sequence[Requirement] = (),
) -> list[str]:
    """Prints what was found, updates the table with --update, and returns what fails."""
    if not found:
        return [f"{compiler} {version}: no kernel was found, so nothing was checked"]
    _print(f"{compiler} {version}", found)
    if options.update:
        old = table.versions.get(version, {})
        kept = {k: v for k, v in old.items() if not _asked_for(k, compiler, options)}
        table.versions[version] = {**kept, **found}
        lines = tables.changes(old, table.versions[version])
        print("\n".join(lines) or "The table stays as it is")
        tables.save(table, path)
    return tables.violations(
        *(compiler, version, found, table, requirements),
        complete=not options.only,
        architectures=options.arch,
    )


def _asked_for(key: Key, compiler: str, options: argparse.Namespace) -> bool:
    """Whether this run covers a row of the table."""
    name, architecture = key
    return options.only in name and (not options.arch or architecture in options.arch)


def _verdict(name: str, found: Mapping[Key, Resources], broken: list[str], started: float) -> int:
    for sentence in broken:
        print(f"FAILED {sentence}")
    seconds = time.perf_counter() - started
    verdict = f"{len(broken)} FAILED" if broken else "all hold"
    print(f"{name}: {len(found)} compiled kernels, {verdict} ({seconds:.0f} s)")
    return 1 if broken else 0


def _print(name: str, found: Mapping[Key, Resources]) -> None:
    """Prints a table with one row for each configuration and one column for each architecture:
    registers / shared memory, spills."""
    architectures = sorted({architecture for _, architecture in found})
    header = [name, *(f"sm_{a}" for a in architectures)]
    rows = [
        [name, *(_cell(found.get((name, a))) for a in architectures)]
        for name in dict.fromkeys(name for name, _ in found)
    ]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
        return
    printed = Table(
        *header, caption="registers (by role) / KiB of shared memory, spill instructions"
    )
    for row in rows:
        printed.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(printed)


def _cell(resources: Resources | None) -> str:
    if resources is None:
        return "-"
    spilled = resources.spills or resources.stack
    spills = f" SPILLS {resources.spills}" if spilled else ""
    roles = f" ({resources.roles.replace(' ', '/')})" if resources.roles else ""
    return f"{resources.registers}{roles} / {resources.shared / 1024:.1f}{spills}"


if __name__ == "__main__":
    sys.exit(main())
