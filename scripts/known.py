"""Checks that what pip has just installed is in a lock file: python scripts/known.py REPORT LOCK, with pip's --report.

For PyTorch, which pip cannot check itself: where a mirror or a disk offers a build that PyPI does not have, pip's own hash mode
would pass it over for PyPI's, which is gigabytes larger. Installing a wheel runs nothing of it, so this is early enough.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path


def unknown(report: str, lock: str) -> list[str]:
    """The files of a report whose hashes the lock does not hold."""
    known = set(re.findall(r"sha256:([0-9a-f]{64})", lock))
    taken = [entry["download_info"] for entry in json.loads(report)["install"]]
    return [t["url"] for t in taken if t.get("archive_info", {}).get("hashes", {}).get("sha256") not in known]


if __name__ == "__main__":
    if found := unknown(*(Path(name).read_text(encoding="utf-8") for name in sys.argv[1:])):
        sys.exit(f"not in {sys.argv[2]}: {', '.join(found)}")
