"""Link the mapped folders into ``.typing/pocketsam/``, where mypy can see the package as it is installed."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Make one symbolic link for each core file and each mapped folder."""
    target = ROOT / ".typing" / "pocketsam"
    target.mkdir(parents=True, exist_ok=True)
    for old in target.iterdir():
        old.unlink()
    mapping = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-dir"]
    for package, folder in mapping.items():
        if package == "pocketsam":
            for file in (ROOT / folder).iterdir():
                if file.name != "__pycache__":
                    (target / file.name).symlink_to(file)
        elif package.count(".") == 1 and not folder.startswith(mapping["pocketsam"]):
            # Nested packages, and those inside the core, come with their parent's link.
            (target / package.removeprefix("pocketsam.")).symlink_to(ROOT / folder)


if __name__ == "__main__":
    main()
