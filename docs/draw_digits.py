"""Draws docs/digits.png: held-out clips of the default data, as the loader samples them, with both texts.

    python docs/draw_digits.py

Needs matplotlib (`pip install -e '.[dev]'`). Generates the default data where it is not there yet.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

from vidla import sampling
from vidla.digits import make_default
from vidla.loader import decode_clip
from vidla.shards import ShardSet

CLIPS, FRAMES = 4, 8


def main() -> None:
    shards = ShardSet(make_default()[1])
    figure, rows = plt.subplots(CLIPS, FRAMES, figsize=(9, 6.4))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.93, wspace=0.05, hspace=0.4)
    for index, row in enumerate(rows):
        meta = shards.meta(index)
        stored = {"stored": len(meta.times), "width": meta.width, "height": meta.height}
        view = sampling.choose_view(0, 0, index, **stored, frames=FRAMES, mode="eval")
        clip = decode_clip(shards, index, meta, view, meta.width)
        for axes, frame, k in zip(row, clip, view.frames, strict=True):
            axes.imshow(frame.permute(1, 2, 0))
            axes.set_axis_off()
            axes.text(2, 60, f"{meta.times[k]:.1f} s", color="white", fontsize=7)
        row[0].set_title(f'caption: "{meta.caption}"\nsubtitle: "{meta.subtitle}"', loc="left", fontsize=10)
    figure.savefig(Path(__file__).with_name("digits.png"), dpi=100)


if __name__ == "__main__":
    main()
