"""The command `gptkernels`, also as `python -m gptkernels`.

`info` needs the standard library alone; the other commands need the extra "cli".
"""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line and exits: 0, 1 where a check failed, 2 for bad input."""
    try:
        import click  # noqa: F401
        import rich  # noqa: F401
    except ImportError as error:
        if sys.argv[1:] == ["info"]:
            from gptkernels.cli.installed import lines

            print("\n".join(lines()))
            sys.exit(0)
        print(
            f"gptkernels: the command line needs {error.name}, which is missing: "
            "pip install 'gptkernels[cli]' (gptkernels info works without it)",
            file=sys.stderr,
        )
        sys.exit(2)
    from gptkernels.cli.main import run

    run()


if __name__ == "__main__":
    main()
