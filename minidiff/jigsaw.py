"""A jigsaw puzzle of 4x4 pieces, and which pixel goes where when pieces change places: a view of `views.py`.

    c0 e0 f0 c1         c: corners, e and f: borders, i: inner pieces. The index counts quarter turns of the whole
    f3 i0 i1 e1         board, and e and f have the same outline, so that a border piece may also change place with
    e3 i3 i2 f1         its neighbour.
    c3 f2 e2 c2

Skim it. Source: moves and random stream of dangeng/visual_anagrams visual_anagrams/views/permutations.py@1d06220; the
outlines of the pieces are our own.
"""

import numpy as np

LAYOUT = np.array([[0, 8, 12, 1], [15, 4, 5, 9], [11, 7, 6, 13], [3, 14, 10, 2]])  # c 0-3, i 4-7, e 8-11, f 12-15
KNOB, KNOB_RADIUS = 0.10, 0.17  # how far a knob's centre lies beyond the border, and its radius, in pieces
# Each knob is a disc that one piece has across a border of its neighbour: (y, x) in pieces, and the piece.
KNOBS = [(0.5, 1.0 + KNOB, 0), (0.5, 2.0 + KNOB, 8), (0.5, 3.0 + KNOB, 12), (1.0 + KNOB, 1.5, 8), (1.0 + KNOB, 2.5, 12),
         (1.5, 2.0 + KNOB, 4)]  # fmt: skip


def order(size: int, seed: int) -> np.ndarray:
    """(size, size) int64: pixel p of the puzzle with its pieces moved is pixel order[p] of the image.

    Corners, borders and inner pieces change places with their like, by quarter turns; the seed chooses how.
    """
    random = np.random.RandomState(seed)
    turned = np.concatenate([random.permutation(4) for _ in range(4)])  # of c, i, e, f: the piece's index afterwards
    swapped = random.randint(2, size=4).astype(bool)  # do e and f of this side change places?
    numbers, centre = pieces(size), (size - 1) / 2
    y, x = np.indices((size, size)) - centre
    quarters = (turned[numbers] - numbers) % 4  # a piece's number modulo 4 is its index
    place = (y + 1j * x) * np.array([1, -1j, -1, 1j])[quarters]  # turned about the centre
    y, x = ((part + centre).round().astype(int) for part in (place.real, place.imag))
    there = numbers[y, x]
    index, is_border = there % 4, there >= 8
    step = size // 4 * np.where(there >= 12, -1, 1) * np.where(index >= 2, -1, 1) * (is_border & swapped[index])
    x = x + np.where(index % 2 == 0, step, 0)
    y = y + np.where(index % 2 == 1, step, 0)
    return y * size + x


def pieces(size: int) -> np.ndarray:
    """The number of the piece that each pixel belongs to, (size, size). Raises ValueError unless 4 divides size."""
    if size % 4:
        raise ValueError(f"a jigsaw of 4x4 pieces needs a side divisible by 4, got {size}")
    numbers = LAYOUT.repeat(size // 4, 0).repeat(size // 4, 1)
    row, column = (np.indices((size, size), dtype=np.float32) + np.float32(0.5)) / np.float32(size // 4)
    for y, x, owner in KNOBS:
        for turn in range(4):
            numbers[(row - y) ** 2 + (column - x) ** 2 < KNOB_RADIUS**2] = owner + turn
            y, x = x, 4 - y
    return numbers
