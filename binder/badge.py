"""The badge that opens the quickstart on Binder, into README.md: `make badge [REPO=owner/name]`.

Only a clone knows under which address its repository is public, so the badge is made there.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import inferkit as ik

_PLACE = re.compile(r"(?<=<!-- badge -->\n).*(?=<!-- end of badge -->)", re.DOTALL)


def main(repo: str | None) -> str:
    """Put the badge of a repository, or of "origin", in its place; what to know of it."""
    readme = Path("README.md")
    try:
        link = ik.binder_link(repo, "HEAD", "notebooks/01-quickstart.ipynb")
        text, places = _PLACE.subn(lambda _: f"{link.markdown}\n", readme.read_text("utf-8"))
        if not places:
            raise ik.OptionError("README.md has no <!-- badge --> and <!-- end of badge -->.")
    except (ik.InferkitError, OSError) as error:
        sys.exit(f"No badge was written (make badge REPO=owner/name names the repository): {error}")
    readme.write_text(text, "utf-8")
    return "\n".join(["README.md has the badge.", *link.warnings])


if __name__ == "__main__":
    print(main(sys.argv[1] if len(sys.argv) > 1 else None))
