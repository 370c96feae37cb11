"""Pictures: names in them, whatever they are, and the way they are saved."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST = 40
"""Letters of a name; of a longer one the end is cut off."""


def label(name: str) -> str:
    """Make a name fit for matplotlib: short, without formulas between dollar signs, and never left out of a legend."""
    short = name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."
    return (" " if short.startswith("_") else "") + short.replace("$", r"\$")


def save_figure(figure: "Figure", path: Path, *, dpi: int = 150) -> None:
    """Save as PNG; letters that the font lacks become boxes, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(path, dpi=dpi, format="png")
