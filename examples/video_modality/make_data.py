"""Writes a small data folder: in which direction does a square move, of which colour is it, how long is the tone?

python make_data.py my_data
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hpcmm.workloads.omni.data.sounds import write_sound

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230)}
DIRECTIONS = {"left": (-4, 0), "right": (4, 0), "up": (0, -4), "down": (0, 4)}
FRAMES, SIDE, SQUARE = 5, 32, 8


def main(root: Path, train: int = 300, test: int = 60) -> None:
    """Write conversations to train on and to be scored on, and the files that they name."""
    draw = random.Random(0)  # noqa: S311 -- nothing secret
    for part, number in (("train", train), ("test", test)):
        lines = [json.dumps({"turns": conversation(root, f"{part}_{each}", draw)}) for each in range(number)]
        (root / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    chances = {"direction": ("video", 1 / 4), "colour": ("image", 1 / 3), "length": ("sound", 1 / 2)}
    kinds = {name: {"modality": modality, "chance": chance} for name, (modality, chance) in chances.items()}
    (root / "kinds.json").write_text(json.dumps(kinds))


def conversation(root: Path, name: str, draw: random.Random) -> list[dict[str, Any]]:
    """One to three questions, each on a video, an image or a sound of its own."""
    asked = draw.sample([ask_direction, ask_colour, ask_length], draw.randint(1, 3))
    return [turn for question in asked for turn in question(root, name, draw)]


def ask_direction(root: Path, name: str, draw: random.Random) -> list[dict[str, Any]]:
    """On a folder of frames, or an animated GIF."""
    direction, colour = draw.choice(sorted(DIRECTIONS)), draw.choice(sorted(COLOURS))
    step = DIRECTIONS[direction]
    frames = [picture(colour, (step[0] * (at - 2), step[1] * (at - 2))) for at in range(FRAMES)]
    if draw.random() < 0.5:
        path = f"videos/{name}.gif"
        (root / "videos").mkdir(parents=True, exist_ok=True)
        frames[0].save(root / path, save_all=True, append_images=frames[1:], duration=100)
    else:
        path = f"videos/{name}"
        (root / path).mkdir(parents=True, exist_ok=True)
        for number, frame in enumerate(frames):
            frame.save(root / path / f"{number}.png")
    return turns({"type": "video", "path": path}, "Where does it move?", direction, "direction")


def ask_colour(root: Path, name: str, draw: random.Random) -> list[dict[str, Any]]:
    """On an image."""
    colour, path = draw.choice(sorted(COLOURS)), f"images/{name}.png"
    (root / "images").mkdir(parents=True, exist_ok=True)
    picture(colour, (draw.randint(-8, 8), draw.randint(-8, 8))).save(root / path)
    return turns({"type": "image", "path": path}, "Which colour?", colour, "colour")


def ask_length(root: Path, name: str, draw: random.Random) -> list[dict[str, Any]]:
    """On a sound."""
    length, path = draw.choice(["long", "short"]), f"sounds/{name}.wav"
    (root / "sounds").mkdir(parents=True, exist_ok=True)
    seconds = {"long": 0.8, "short": 0.2}[length]
    times = np.arange(int(16_000 * seconds)) / 16_000
    write_sound(root / path, (0.5 * np.sin(2 * np.pi * draw.randint(200, 800) * times)).astype(np.float32), 16_000)
    return turns({"type": "sound", "path": path}, "Long or short?", length, "length")


def picture(colour: str, shift: tuple[int, int]) -> Image.Image:
    """A square on black, so many pixels from the middle."""
    image, corner = Image.new("RGB", (SIDE, SIDE)), [(SIDE - SQUARE) // 2 + each for each in shift]
    image.paste(COLOURS[colour], (*corner, corner[0] + SQUARE, corner[1] + SQUARE))
    return image


def turns(part: dict[str, str], question: str, answer: str, kind: str) -> list[dict[str, Any]]:
    """A question on a file, and its answer."""
    asked = {"role": "user", "content": [part, {"type": "text", "text": question}]}
    return [asked, {"role": "assistant", "kind": kind, "content": [{"type": "text", "text": answer}]}]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
