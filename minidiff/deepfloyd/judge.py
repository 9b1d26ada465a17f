"""Does the cascade draw what a prompt says? A small classifier answers, so that nobody must trust an eye.

    python -m minidiff.deepfloyd.judge train IMAGES --out out/judge
    python -m minidiff.deepfloyd.judge score
    python -m minidiff.deepfloyd.judge score --model weights/mini-IF-I --prompts FILE --seeds 0 1 2 --steps 50

The judge looks at 64 x 64 images and names three things: the concept (a dog, a volcano; all people are one concept,
"person"), the style (a set of drawings, "scene" for landscapes, oil, ...), and the traits of a person. A word of a
prompt that the judge has no class for, such as a place or a color, is not judged.

`score` prints for how many images the concept, the style and both are right, and two rows to compare with. "real" is
the judge's own accuracy on images of the set that it never saw; drawn images can pass it, for their prompts are
plainer. "floor" holds each image against the other prompts.

IMAGES is the folder that `minidiff.deepfloyd.train` reads, packed, with "kind", "concept" and "style" in captions.json.
Rows with "split": "val" measure its own accuracy alone.    Read `deepfloyd/stages.py` and `deepfloyd/vocabulary.py`
first.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import checkpoint, cli, images, training, weights
from minidiff.cascade import Cascade
from minidiff.deepfloyd import vocabulary
from minidiff.deepfloyd.dataset import CaptionedImages, read_lines
from minidiff.deepfloyd.vocabulary import PERSON_CLASS, TRAITS, Expectation
from minidiff.factorized import Part
from minidiff.solvers import STEPS

EMBEDDED = weights.WEIGHTS / "judge"
PROMPTS = (
    "a rocket ship", "a pencil", "a skull", "a castle", "a volcano", "a dog", "an old man", "a man wearing a hat",
    "a campfire", "waterfalls", "a snowy mountain village", "people around a campfire at night",
    "an oil painting of a snowy mountain village", "an oil painting of people around a campfire",
    "an oil painting of an old man", "a lithograph of a skull", "a lithograph of waterfalls", "the amalfi coast",
    "a 3d render of a rocket", "a cartoon of a cat", "a pencil sketch of a castle", "a watercolor painting of a lion",
    "pixel art of a dragon", "an oil painting of an octopus", "a lion on a beach", "a penguin in the desert",
    "a sailboat on the sea at sunset", "an astronaut in outer space",
    "a flat portrait of a man with a red beard wearing glasses", "a mountain lake at sunset",
)  # fmt: skip
SCENE_STYLE = "scene"  # of images whose style is ""
BATCH, PEAK_LR, FEATURES = 128, 3e-3, 160
DROPOUT = 0.2  # of the features, in training
SAVE_EVERY = 500  # steps
Pair = tuple[Expectation, Expectation]  # what the judge answers, and what is expected


class Judge(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] to scores of concepts, styles and traits; about 667,000 weights in the body.
    config: the "concepts" and "styles" that it knows, and "names" and "phrases" of prompts (`vocabulary.py`)."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config, self.sizes = config, [len(config["concepts"]), len(config["styles"]), len(TRAITS)]

        def block(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
            conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

        self.body = nn.Sequential(
            block(3, 40, 5, 2), block(40, 80, 3, 2), block(80, 80, 3, 1), block(80, FEATURES, 3, 2),
            block(FEATURES, FEATURES, 3, 1), block(FEATURES, FEATURES, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Dropout(DROPOUT),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, sum(self.sizes))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.head(self.body(x)).split(self.sizes, dim=1)  # (B, concepts), (B, styles), (B, traits)


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (B, 3, H, W) in [-1, 1] mirrored or not, turned, scaled, moved, recolored, noised and blurred."""
    B = len(x)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(B, *shape, generator=generator)

    angle, scale = between(-0.15, 0.15), between(0.8, 1.2)
    mirror = torch.where(between(0, 1) < 0.5, -1.0, 1.0)
    cos, sin, shift = angle.cos() * scale, angle.sin() * scale, between(-0.15, 0.15, 2)
    theta = torch.stack([cos * mirror, -sin, shift[:, 0], sin * mirror, cos, shift[:, 1]], dim=1).view(B, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * between(0.7, 1.2, 1, 1, 1)
    x = x * between(0.85, 1.15, 3, 1, 1) + between(-0.1, 0.1, 3, 1, 1)
    x = x + torch.randn(x.shape, generator=generator) * between(0, 0.15, 1, 1, 1)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)  # after the noise: some of it is coarse
    return x.lerp(blurred, between(-0.5, 1, 1, 1, 1).clamp(min=0)).clamp(-1, 1)


def loss(scores: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """Cross-entropy of concept and style, and of each trait where the image shows a person.
    scores: as of Judge.  labels: concept (B,), style (B,), traits (B, n) in {0, 1}, or -1 where no person is."""
    concept, style = (F.cross_entropy(s.float(), y, label_smoothing=0.05) for s, y in zip(scores[:2], labels[:2]))
    mask = labels[2] >= 0
    traits = F.binary_cross_entropy_with_logits(scores[2].float(), labels[2].clamp(min=0), reduction="none")
    return concept + 0.5 * style + 0.5 * (traits * mask).sum() / mask.sum().clamp(min=1)


@torch.inference_mode()
def answers_on(judge: Judge, x: Tensor) -> list[Expectation]:
    """What the judge takes each image (N, 3, 64, 64) for: one concept, one style, and the traits of a person."""
    answers = []
    for part in x.split(256):
        concept, style, traits = judge.eval()(part)
        for c, s, t in zip(concept.argmax(1).tolist(), style.argmax(1).tolist(), (traits > 0).tolist()):
            concepts = (judge.config["concepts"][c],)
            names = tuple(name for name, is_there in zip(TRAITS, t) if is_there and PERSON_CLASS in concepts)
            answers.append(Expectation(concepts, (judge.config["styles"][s],), names))
    return answers


def write(folder: Path, judge: Judge) -> None:
    """model.fp16.safetensors (matrices in half precision, vectors in float32), then config.json."""
    tensors = {key: value.half() if value.ndim > 1 else value for key, value in judge.state_dict().items()}
    checkpoint.save(tensors, folder / "model.fp16.safetensors", {"format": "pt"})
    checkpoint.write_json(folder / "config.json", judge.config)


def read(folder: Path) -> Judge:
    """A judge from its folder.    Raises ValueError, naming the folder and the command that trains another judge."""
    try:
        judge = Judge(checkpoint.read_config(folder))
        judge.load_state_dict(load_file(folder / "model.fp16.safetensors"))
    except (OSError, ValueError, LookupError, RuntimeError, SafetensorError) as error:
        why = "its weights are of another network" if isinstance(error, RuntimeError) else error
        raise ValueError(f"{folder} holds no judge ({why}); train one with `python -m minidiff.deepfloyd.judge train "
                         f"IMAGES --out {folder}`, or pass another --judge") from error  # fmt: skip
    return judge.eval()


def labels_of(rows: Sequence[Mapping], concepts: Sequence[str], styles: Sequence[str]) -> tuple[Tensor, ...]:
    """Concept (N,), style (N,) and traits (N, n), as `loss` takes them."""
    classes = [vocabulary.concept_class(row["concept"]) for row in rows]
    names = [vocabulary.traits_in(vocabulary.words_of(row["concept"]), [c]) for row, c in zip(rows, classes)]
    traits = [[float(t in n) if c == PERSON_CLASS else -1.0 for t in TRAITS] for n, c in zip(names, classes)]
    concept = [concepts.index(c) for c in classes]
    style = [styles.index(row["style"] or SCENE_STYLE) for row in rows]
    return torch.tensor(concept), torch.tensor(style), torch.tensor(traits)


def frequencies(labels: Sequence[Tensor]) -> Tensor:
    """How often to draw each image (N,): 1 / sqrt(n), n images having the same concept, style and traits."""
    keys = torch.cat([labels[0][:, None], labels[1][:, None], labels[2].long()], dim=1)
    _, group, count = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
    return count[group].float().rsqrt()


def train(folder: Path, out: Path, steps: int, seed: int) -> None:
    """Train a judge on the rows that are not held out, measure its accuracy on the others, and write it to out.

    Ctrl-C ends it without a judge; the same command goes on from out/training.    Raises ValueError without a step.
    """
    if steps < 1 or not 0 <= seed < 2**32:
        raise ValueError(f"--steps must be at least 1, --seed lie in 0..2^32 - 1, got {steps} and {seed}")
    dataset = CaptionedImages(folder, 64)
    rows, held_out = dataset.rows, dataset.held
    for i in (i for i, row in enumerate(rows) if not {"kind", "concept", "style"} <= row.keys()):
        raise ValueError(f"{folder / 'captions.json'}: row {i} lacks kind, concept or style; a judge needs them")
    concepts = sorted({vocabulary.concept_class(row["concept"]) for row in rows})
    styles, phrases = sorted({row["style"] or SCENE_STYLE for row in rows}), vocabulary.style_phrases(rows)
    config = {"kind": "judge", "images_seen": steps * BATCH, "concepts": concepts, "styles": styles,
              "phrases": phrases, "names": vocabulary.class_names(rows, phrases)}  # fmt: skip
    torch.manual_seed(seed)
    judge = Judge(config).to(memory_format=torch.channels_last)
    if not fit(judge, dataset, labels_of(rows, concepts, styles), steps, seed, out / "training"):
        return
    answers = answers_on(judge, dataset.take(held_out)) if held_out else []
    expectations = [vocabulary.expected(rows[i]["captions"][0], config["names"], phrases) for i in held_out]
    pairs = [(answer, e) for answer, e in zip(answers, expectations) if e]  # "two mice" names nothing
    config |= {"ceiling": shares(pairs), "held_out": len(pairs)}
    write(out, judge)
    print(f"{len(pairs)} held-out images: {in_words(config['ceiling'])}; wrote {out}")


def fit(judge: Judge, dataset: CaptionedImages, labels: Sequence[Tensor], steps: int, seed: int, folder: Path) -> bool:
    """AdamW on augmented batches; the rate rises for a tenth, then falls. False if Ctrl-C ended it."""
    weight = frequencies(labels)
    weight[dataset.held] = 0

    def batch_at(step: int) -> tuple[Tensor, list[Tensor]]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        torch.manual_seed(seed * 1_000_003 + step)  # the dropout's
        picks = torch.multinomial(weight, BATCH, replacement=True, generator=generator)
        x = augment(dataset.take(picks.tolist()), generator).contiguous(memory_format=torch.channels_last)
        return x, [label[picks] for label in labels]

    def lr(step: int) -> float:
        return PEAK_LR * min(1, 10 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2

    optimizer = torch.optim.AdamW(judge.parameters(), PEAK_LR, weight_decay=0.02)
    plan, settings = training.Plan(steps, SAVE_EVERY, lr), {"steps": steps, "seed": seed, "batch_size": BATCH}
    for record in training.run(judge, lambda net, batch: loss(net(batch[0]), batch[1]), batch_at, optimizer, plan,
                               folder, settings):  # fmt: skip
        tqdm.write(str(record))
    return not record.stopped


@torch.inference_mode()
def draw(cascade: Cascade, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """Stage 1 on every prompt with every seed: (len(prompts) * len(seeds), 3, 64, 64), seeds side by side."""
    states = cascade.encode(*prompts)
    return torch.cat([cascade.draw([Part(prompt)], seeds) for prompt in tqdm(states, desc="prompts", leave=False)])


def agreement(answer: Expectation, expectation: Expectation) -> tuple[bool, bool]:
    """Are (concept and traits, style) of a judge's answer what is expected?"""
    concept = answer.concepts[0] in expectation.concepts and set(expectation.traits) <= set(answer.traits)
    return concept, not expectation.styles or answer.styles[0] in expectation.styles


def shares(pairs: Sequence[Pair]) -> dict[str, float]:
    """{"concept", "style", "both"}: which share of the pairs agrees. Where no style is expected, it counts for "both"
    as right, and for "style" not at all."""
    right = [agreement(*pair) for pair in pairs]
    styles = [style for (_, style), (_, expectation) in zip(right, pairs) if expectation.styles]
    kinds = {"concept": [concept for concept, _ in right], "style": styles, "both": [all(pair) for pair in right]}
    return {name: sum(values) / max(len(values), 1) for name, values in kinds.items()}


def floor(pairs: Sequence[Pair]) -> dict[str, float]:
    """The shares when each answer is held against all other expectations: what images reach that ignore the prompt."""
    return shares([(answer, other) for answer, e in pairs for _, other in pairs if other != e])


def report(prompts: Sequence[str], pairs: Sequence[Pair], config: Mapping) -> list[str]:
    """The table that `score` prints. pairs: one for each image, n images of one prompt together."""
    n, width, successes = len(pairs) // len(prompts), max(map(len, prompts)), 0
    lines = [f"{'prompt':{width}}  right    concept  style    the judge takes the images for"]
    for i, prompt in enumerate(prompts):
        part = pairs[i * n : (i + 1) * n]
        right = [agreement(*pair) for pair in part]
        both, concept, style = sum(map(all, right)), *map(sum, zip(*right))
        successes += both >= 0.75 * n
        style_column = f"{style} of {n}" if part[0][1].styles else "any"
        names = ", ".join(in_short(*pair) for pair in part)
        lines.append(f"{prompt:{width}}  {f'{both} of {n}':7}  {f'{concept} of {n}':7}  {style_column:7}  {names}")
    return lines + [
        f"{successes} of {len(prompts)} prompts are right in at least three quarters of their {n} images",
        f"all images  {in_words(shares(pairs))}",
        f"real        {in_words(config['ceiling'])}: {config['held_out']} held-out real images",
        f"floor       {in_words(floor(pairs))}: the same images against the other prompts",
    ]


def in_short(answer: Expectation, expectation: Expectation) -> str:
    """An answer in words: "person old", or "person old (oil)" where the prompt names a style."""
    words = " ".join([answer.concepts[0], *answer.traits])
    return f"{words} ({answer.styles[0]})" if expectation.styles else words


def in_words(numbers: Mapping[str, float]) -> str:
    """concept 80 %, style 90 %, both 75 %"""
    return ", ".join(f"{name} {100 * numbers[name]:.0f} %" for name in ("concept", "style", "both"))


def sheet(prompts: Sequence[str], pairs: Sequence[Pair], x: Tensor, title: str) -> Image.Image:
    """Every image with its prompt and the judge's answer, two prompts in a row."""
    n, labels = len(pairs) // len(prompts), []
    for i, pair in enumerate(pairs):
        mark = "right" if all(agreement(*pair)) else "WRONG"
        labels.append(f"{prompts[i // n]}\n{mark}: {in_short(*pair)}")
    parts = [slice(i, i + 2 * n) for i in range(0, len(pairs), 2 * n)]
    return images.sheet([list(x[part]) for part in parts], [labels[part] for part in parts], title)


def score(args: argparse.Namespace) -> None:
    """Draw, judge, print and write the sheet."""
    images.check_output(args.out)
    judge, prompts = read(args.judge), read_lines(args.prompts) if args.prompts else PROMPTS
    names, phrases = judge.config["names"], judge.config["phrases"]
    expectations = [vocabulary.expected(prompt, names, phrases) for prompt in prompts]
    if None in expectations:
        raise ValueError(f"the judge knows nothing in {prompts[expectations.index(None)]!r}; name a thing that "
                         f"{args.judge / 'config.json'} lists")  # fmt: skip
    cascade = Cascade.load(args.model, "none", device=cli.device_of("auto"))
    used = cascade.settings[0].but(steps=args.steps, guidance_scale=args.guidance_scale, sampler=args.sampler)
    cascade.settings[0] = used
    x = draw(cascade, prompts, args.seeds)
    pairs = list(zip(answers_on(judge, x), [e for e in expectations for _ in args.seeds]))
    title = f"{args.model}, {used.sampler}, {used.steps} steps, guidance {used.guidance_scale:g}, seeds {args.seeds}"
    lines = [title, *report(prompts, pairs, judge.config)]
    written = images.save(sheet(prompts, pairs, x, title), args.out, {"report": "\n".join(lines)})
    print(*lines, f"wrote {written}", sep="\n")


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("train", help="train a judge on captioned images")
    p.add_argument("images", type=cli.file_path, metavar="IMAGES", help="a packed set of captioned images")
    p.add_argument("--out", type=cli.file_path, default=Path("out/judge"), help="folder (default %(default)s)")
    p.add_argument("--steps", type=int, default=6000, help=f"batches of {BATCH} (default %(default)s)")
    p.add_argument("--seed", type=int, default=0)
    p = commands.add_parser("score", help="judge what a cascade draws")
    p.add_argument("--model", default="mini", help="mini, a released name, or a folder (default %(default)s)")
    p.add_argument("--prompts", type=cli.file_path, help=f"a file, one prompt a line (default: {len(PROMPTS)} prompts)")
    p.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102, 103])
    p.add_argument("--steps", help="of stage 1: a count, or a name like smart27 (default: the model's)")
    p.add_argument("--sampler", choices=STEPS, help="(default: the model's)")
    p.add_argument("--guidance-scale", type=cli.finite, help="(default: the model's)")
    p.add_argument("--judge", type=cli.file_path, default=EMBEDDED, help="folder (default %(default)s)")
    p.add_argument("--out", type=cli.file_path, default=Path("out/judge.png"), help="a sheet (default %(default)s)")
    args = parser.parse_args(argv)
    if args.command == "score":
        score(args)
    else:
        train(args.images, args.out, args.steps, args.seed)


if __name__ == "__main__":
    main()
