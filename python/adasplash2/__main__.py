"""The command ``adasplash2``, also as ``python -m adasplash2``: starts :mod:`adasplash2.cli`."""

import sys


def main() -> None:
    try:
        from adasplash2 import cli
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("click", "rich"):
            raise
        sys.exit(f"the command adasplash2 needs {package}: pip install {package}")
    cli.main(prog_name="adasplash2")


if __name__ == "__main__":
    main()
