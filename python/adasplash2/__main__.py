"""``python -m adasplash2``: the command line of :mod:`adasplash2.cli`."""

from adasplash2.cli import main

if __name__ == "__main__":
    main(prog_name="adasplash2")
