"""Asks every address outside that README and the documentation link to: `make links`. It needs the
network, so CI does not run it; `make docs` checks the links inside.
"""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"https?://[^\s)>\"'`]+")
SECONDS = 20


def trouble(address: str) -> str | None:
    """Why an address cannot be read; None where it can."""
    request = urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS):
            return None
    except OSError as error:
        return str(error)


def main() -> int:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks/README.md"]
    found = sorted({link for page in pages for link in LINK.findall(page.read_text())})
    broken = {link: why for link in found if (why := trouble(link))}
    for link, why in broken.items():
        print(f"{link}: {why}")
    print(f"{len(found)} addresses outside, {len(broken)} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
