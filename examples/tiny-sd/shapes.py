"""Pictures of coloured shapes with captions, drawn by formulas, and the judge that reads them back.

Everything is a function of a seed. Pictures are float tensors [N,3,H,W] in -1..1.

    python shapes.py FOLDER --shape ring --name "sks shape" --count 12 --seed 7 --plain

draws the training pictures of `examples/quickstart` (PNG) and their captions.
"""

import argparse
from pathlib import Path

import torch

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (150, 60, 190),
    "orange": (240, 130, 30),
}
BACKGROUNDS = {
    "white": (245, 245, 245),
    "black": (20, 20, 20),
    "gray": (130, 130, 130),
    "pink": (250, 190, 200),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond")
TEXTURES = ("plain", "striped", "dotted")
POSITIONS = {
    "": (0.0, 0.0),
    "on the left": (-0.3, 0.0),
    "on the right": (0.3, 0.0),
    "at the top": (0.0, -0.3),
    "at the bottom": (0.0, 0.3),
}
# The shape that the base model never sees; a LoRA teaches it.
CONCEPT = "ring"
# How dark the second tone of a texture is.
SHADE = 0.7


def distance(shape, x, y):
    """Signed distance (roughly) from the outline of a shape of radius 1 at the origin; y grows downwards."""
    ax, ay = x.abs(), y.abs()
    if shape == "circle":
        return (x * x + y * y).sqrt() - 0.95
    if shape == "square":
        return torch.maximum(ax, ay) - 0.85
    if shape == "diamond":
        return (ax + ay - 1.1) * 0.7071
    if shape == "triangle":
        return torch.maximum(ax * 0.894 - (y + 1.0) * 0.447, y - 0.85)
    if shape == "cross":
        return torch.minimum(torch.maximum(ax - 0.95, ay - 0.32), torch.maximum(ax - 0.32, ay - 0.95))
    if shape == "ring":
        return ((x * x + y * y).sqrt() - 0.72).abs() - 0.23
    raise ValueError(shape)


def draw(scenes, size, generator):
    """Draws scenes (dicts of shape, colour, texture, background, centre, radius)."""
    grid = (torch.arange(size, dtype=torch.float32) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    pictures = torch.empty(len(scenes), 3, size, size)
    for picture, scene in zip(pictures, scenes):
        cx, cy = scene["centre"]
        u, v = (x - cx) / scene["radius"], (y - cy) / scene["radius"]
        soft = size / 2 * scene["radius"]
        cover = (0.5 - distance(scene["shape"], u, v) * soft).clamp(0, 1)
        tone = torch.ones_like(x)
        if scene["texture"] == "striped":
            dark = (0.5 + (((u + v) * 2.0) % 1 - 0.5).abs().sub(0.25) * soft * 0.5).clamp(0, 1)
            tone = 1 - (1 - SHADE) * dark
        elif scene["texture"] == "dotted":
            du, dv = (u * 2.5) % 1 - 0.5, (v * 2.5) % 1 - 0.5
            dark = (0.5 - ((du * du + dv * dv).sqrt() - 0.27) / 2.5 * soft).clamp(0, 1)
            tone = 1 - (1 - SHADE) * dark
        front = torch.tensor(COLOURS[scene["colour"]]).view(3, 1, 1) * tone
        back = torch.tensor(BACKGROUNDS[scene["background"]], dtype=torch.float32).view(3, 1, 1)
        picture[:] = (back + (front - back) * cover) / 127.5 - 1
    return pictures + torch.randn(pictures.shape, generator=generator) * 0.01


def pick(choices, generator):
    choices = list(choices)
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def scene(generator, shapes=SHAPES):
    """A random scene."""
    jitter = (torch.rand(3, generator=generator) * 2 - 1).tolist()
    position = pick([""] * 3 + [p for p in POSITIONS if p], generator)
    cx, cy = POSITIONS[position]
    return {
        "shape": pick(shapes, generator),
        "colour": pick(COLOURS, generator),
        "background": pick(BACKGROUNDS, generator),
        "texture": pick(("plain", "plain", "striped", "dotted"), generator),
        "position": position,
        "centre": (cx + 0.08 * jitter[0], cy + 0.08 * jitter[1]),
        "radius": 0.5 + 0.08 * jitter[2],
    }


def caption(scene, generator=None):
    """What a scene shows. With a generator a part is left out now and then, as captions of people do."""
    def keep():
        return generator is None or float(torch.rand((), generator=generator)) > 0.1

    shape = scene.get("name", scene["shape"])
    if generator is not None and float(torch.rand((), generator=generator)) < 0.05:
        shape = "shape"
    words = ["a"]
    if scene["texture"] != "plain" and keep():
        words.append(scene["texture"])
    if keep():
        words.append(scene["colour"])
    words.append(shape)
    if scene["position"] and keep():
        words.append(scene["position"])
    text = " ".join(words)
    return f"{text}, {scene['background']} background" if keep() else text


# The judge: a histogram of colours and the outline of what is not background.

CELLS = 24


def judge(picture):
    """(shape, colour, background) of one picture [3,H,W] in -1..1; shape is None where none fits.

    Every pixel goes to the nearest colour of the palette (a texture's second tone counts as its
    colour). What covers most of the border is the background; what else is there, the object; its
    outline, scaled to a square of cells, is compared with each shape's by intersection over union.
    """
    names, values = [], []
    for name, rgb in COLOURS.items():
        names += [name, name]
        values += [rgb, tuple(SHADE * c for c in rgb)]
    for name, rgb in BACKGROUNDS.items():
        names.append(name)
        values.append(rgb)
    pixels = ((picture + 1) * 127.5).clamp(0, 255).permute(1, 2, 0)
    palette = torch.tensor(values, dtype=torch.float32)
    nearest = ((pixels[:, :, None] - palette) ** 2).sum(-1).argmin(-1)
    border = torch.cat([nearest[:4].flatten(), nearest[-4:].flatten(), nearest[:, :4].flatten(), nearest[:, -4:].flatten()])
    counts = torch.bincount(border, minlength=len(names))
    counts[: 2 * len(COLOURS)] = 0
    back = int(counts.argmax())
    far = ((pixels - palette[back]) ** 2).sum(-1).sqrt() > 60
    if int(far.sum()) < 64:
        return None, None, names[back]
    inside = torch.bincount(nearest[far], minlength=len(names))[: 2 * len(COLOURS)]
    colour = names[2 * int(inside.view(-1, 2).sum(1).argmax())]
    # Rows and columns that hold more than a stray pixel.
    rows = (far.sum(1) >= 3).nonzero().flatten()
    columns = (far.sum(0) >= 3).nonzero().flatten()
    if len(rows) < 8 or len(columns) < 8:
        return None, colour, names[back]
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    best, shape = 0.0, None
    for name in (*SHAPES, CONCEPT):
        want = outline(name)
        ys = top + ((torch.arange(CELLS) + 0.5) * (bottom - top) / CELLS).long()
        xs = left + ((torch.arange(CELLS) + 0.5) * (right - left) / CELLS).long()
        have = far[ys][:, xs]
        overlap = float((have & want).sum()) / float((have | want).sum())
        if overlap > best:
            best, shape = overlap, name
    return (shape if best >= 0.75 else None), colour, names[back]


def outline(shape):
    """A shape's cells, its bounding box scaled to the square."""
    fine = 480
    grid = (torch.arange(fine) + 0.5) / fine * 2.4 - 1.2
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    mask = distance(shape, x, y) <= 0
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    ys = rows[0] + ((torch.arange(CELLS) + 0.5) * (rows[-1] + 1 - rows[0]) / CELLS).long()
    xs = columns[0] + ((torch.arange(CELLS) + 0.5) * (columns[-1] + 1 - columns[0]) / CELLS).long()
    return mask[ys][:, xs]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=(*SHAPES, CONCEPT))
    parser.add_argument("--name", help="what the captions call it (default: by its name)")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--plain", action="store_true", help="no textures")
    parser.add_argument("--no_captions", action="store_true", help="pictures alone")
    args = parser.parse_args()
    from PIL import Image
    args.folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(args.seed)
    for number in range(1, args.count + 1):
        one = scene(generator, args.shape)
        # A few pictures show every colour, and each on several backgrounds.
        turn, place = divmod(number - 1, len(COLOURS))
        one["colour"] = list(COLOURS)[place]
        one["background"] = list(BACKGROUNDS)[(place + 2 * turn) % len(BACKGROUNDS)]
        if args.plain:
            one["texture"] = "plain"
        pixels = ((draw([one], args.size, generator)[0] + 1) * 127.5).round().clamp(0, 255).byte()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(args.folder / f"{number:02}.png")
        if not args.no_captions:
            words = caption({**one, "name": args.name or one["shape"]})
            (args.folder / f"{number:02}.txt").write_text(words + "\n")


if __name__ == "__main__":
    main()
