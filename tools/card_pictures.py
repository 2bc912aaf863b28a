"""Draw what the built-in model answers on the shipped photos: the pictures of docs/lite0.md, good and bad alike.

    python tools/card_pictures.py [docs/lite0]

For each photo the masks of the demo's click and box, in PyTorch, and the line of the card's table that shows them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pocketsam
from pocketsam.images import load_rgb
from pocketsam.overlay import draw, save_image
from pocketsam.photos import BOXES, CLICKS, PHOTOS, photo_paths

SIDE = 320


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sam = pocketsam.load(runtime="pytorch")
    print("| photo | click, the mask it ranks first | box |\n|---|---|---|")
    for name, path in zip(PHOTOS, photo_paths(), strict=True):
        rgb = load_rgb(path)
        sam.set_image(rgb)
        clicked = sam.predict(points=[CLICKS[name]], labels=[1])
        best = clicked.best
        boxed = sam.predict(box=BOXES[name], multimask=False)
        pictures = {"click": (draw(rgb, clicked.masks[best:best + 1], [CLICKS[name]], [1]), clicked.scores[best]),
                    "box": (draw(rgb, boxed.masks, boxes=[BOXES[name]]), boxed.scores[0])}
        cells = []
        for prompt, (picture, score) in pictures.items():
            picture.thumbnail((SIDE, SIDE))
            save_image(picture, folder / f"{name}_{prompt}.jpg")
            cells.append(f"![{name}, {prompt}]({folder.name}/{name}_{prompt}.jpg) predicted IoU {score:.2f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/lite0"))
