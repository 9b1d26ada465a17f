"""Record the pixel permutations of dangeng/visual_anagrams, for tests/test_views.py to compare with.

    git clone https://github.com/dangeng/visual_anagrams && git -C visual_anagrams checkout 1d06220
    python tests/reference/views.py visual_anagrams

Needs torch, torchvision, einops and pillow. Writes views.json beside itself: the SHA-256 of each permutation as
little-endian int64, for 64 and 256 pixels. (The committed one was recorded from the two functions below typed over from
that commit, as its recorded_from says; run from a checkout, this drops that line.) The jigsaw there has outlines drawn
by hand, ours are drawn by a formula; tests check its moves piece by piece instead.
"""

import hashlib
import json
import sys
from pathlib import Path


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    from visual_anagrams.views import permutations as theirs

    orders = {
        f"{name}.{size}": hashlib.sha256(order.numpy().astype("<i8").tobytes()).hexdigest()
        for size in (64, 256)
        for name, order in (
            ("inner_circle", theirs.make_inner_circle_perm(size, 3 * size // 8)),
            ("square_hinge", theirs.make_square_hinge(size)),
        )
    }
    found = {"source": "dangeng/visual_anagrams visual_anagrams/views/permutations.py@1d06220", "sha256": orders}
    (Path(__file__).parent / "views.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
