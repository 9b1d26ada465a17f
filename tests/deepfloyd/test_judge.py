"""The judge: its augmentation, loss and sampling by hand, a training on two colors, and the table of `score`."""

import json
import math
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff import images
from minidiff.cascade import Cascade
from minidiff.deepfloyd import judge
from minidiff.deepfloyd.vocabulary import Expectation, expected
from minidiff.factorized import Part
from tests.tiny import write_cascade


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_augmentation_mirrors_half_and_keeps_the_subject_in_view():
    """A bright right half: after a turn of at most 0.15 and a shift of at most 0.15 the bright side still tells which
    way the image looks. Of 400, 200 are mirrored, give or take 5 sigma = 50."""
    x = torch.full((400, 3, 64, 64), -0.9)
    x[:, :, :, 32:] = 0.9
    y = judge.augment(x, generator())
    difference = (y[..., 32:].mean((1, 2, 3)) - y[..., :32].mean((1, 2, 3)))
    assert (difference.abs() > 0.8).all() and abs(int((difference < 0).sum()) - 200) < 50
    assert y.abs().max() <= 1 and torch.equal(y, judge.augment(x, generator()))


def test_augmentation_of_an_even_image_moves_its_color_within_bounds():
    """Red 0.5, green and blue -0.5, mean -1/6: with saturation s, gain g and offset o red is g (-1/6 + 2/3 s) + o, so
    0.85 * 0.3 - 0.1 = 0.155 at least and 1.15 * 0.633 + 0.1 = 0.828 at most; the means do not see the noise."""
    x = torch.full((200, 3, 64, 64), -0.5)
    x[:, 0] = 0.5
    red = judge.augment(x, generator())[:, 0].mean((1, 2))
    assert 0.15 < red.min() < 0.3 and 0.65 < red.max() < 0.835


def test_the_loss_of_an_undecided_judge_by_hand():
    """ln 4 + ln 2 / 2 + ln 2 / 2; without any person the last term is 0, whatever the traits' scores."""
    scores = torch.zeros(2, 4), torch.zeros(2, 2), torch.zeros(2, 4)
    labels = torch.tensor([0, 3]), torch.tensor([1, 0]), torch.tensor([[1.0, 0, 0, 1], [-1] * 4])
    assert judge.loss(scores, labels).item() == pytest.approx(math.log(4) + math.log(2))
    nobody = labels[0], labels[1], torch.full((2, 4), -1.0)
    scores = scores[0], scores[1], torch.full((2, 4), 9.0)
    assert judge.loss(scores, nobody).item() == pytest.approx(math.log(4) + math.log(2) / 2)


def test_labels_and_frequencies_by_hand():
    rows = [{"concept": "volcano/night", "style": ""}, {"concept": "old man wearing a cap", "style": "oil"},
            {"concept": "cat", "style": "oil"}, {"concept": "cat", "style": "oil"}]  # fmt: skip
    concept, style, traits = judge.labels_of(rows, ["cat", "person", "volcano"], ["oil", "scene"])
    assert concept.tolist() == [2, 1, 0, 0] and style.tolist() == [1, 0, 0, 0]
    assert traits.tolist() == [[-1] * 4, [1, 0, 0, 1], [-1] * 4, [-1] * 4]  # hat, glasses, beard, old
    half = 0.5**0.5
    assert judge.frequencies((concept, style, traits)).tolist() == pytest.approx([1, 1, half, half])


def test_agreement_shares_and_floor_by_hand():
    cat, oil_dog = Expectation(("cat",)), Expectation(("dog",), ("oil",))
    old_man = Expectation(("person",), (), ("old",))
    assert judge.agreement(Expectation(("cat",), ("noto",)), cat) == (True, True)
    assert judge.agreement(Expectation(("dog",), ("noto",)), oil_dog) == (True, False)
    assert judge.agreement(Expectation(("person",), ("noto",), ("hat",)), old_man) == (False, True)
    assert judge.agreement(Expectation(("person",), ("noto",), ("hat", "old")), old_man) == (True, True)
    answers = [Expectation(("cat",), ("oil",)), Expectation(("dog",), ("noto",)), Expectation(("dog",), ("oil",))]
    expectations = [cat, oil_dog, oil_dog]
    pairs = list(zip(answers, expectations))
    # right: cat; dog but no oil; both
    assert judge.shares(pairs) == {"concept": 1, "style": 0.5, "both": 2 / 3}
    # cat against oil_dog twice (style right, concept not), the dogs against cat (concept wrong, no style expected)
    assert judge.floor(pairs) == {"concept": 0, "style": 1, "both": 0}


COLORS = {"apple": (220, 40, 40), "cloud": (60, 90, 230)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A judge of red apples in noto and blue clouds in oil: 12 of each to learn, 4 of each held out."""
    folder, rows = tmp_path_factory.mktemp("set"), []
    for i in range(32):
        concept, style, phrase = (("apple", "noto", "an emoji"), ("cloud", "oil", "an oil painting"))[i % 2]
        rows.append({"captions": [f"{phrase} of a {concept}", f"a {concept}"], "kind": "sprite", "concept": concept,
                     "style": style, "split": "val" if i >= 24 else "train"})  # fmt: skip
    pixels = np.stack([np.broadcast_to(np.uint8(COLORS[row["concept"]]), (64, 64, 3)) for row in rows])
    np.save(folder / "images_64.npy", pixels)
    (folder / "captions.json").write_text(json.dumps(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "BATCH", 8)
        judge.main(["train", str(folder), "--out", str(folder / "judge"), "--steps", "40"])
    return folder


def plain(*concepts):
    return torch.stack([torch.tensor(COLORS[c]) / 127.5 - 1 for c in concepts])[:, :, None, None].expand(-1, 3, 64, 64)


def test_training_tells_two_colors_apart_and_writes_what_it_measured(trained):
    network = judge.read(trained / "judge")
    config = network.config
    assert config["concepts"] == ["apple", "cloud"] and config["styles"] == ["noto", "oil"]
    assert config["ceiling"] == {"concept": 1, "style": 1, "both": 1} and config["held_out"] == 8
    assert config["images_seen"] == 320 and config["phrases"] == {"emoji": ["noto"], "oil painting": ["oil"]}
    assert config["names"] == {"apple": ["apple"], "cloud": ["cloud"]}
    assert judge.answers_on(network, plain("cloud", "apple", "cloud")) == [
        Expectation(("cloud",), ("oil",)), Expectation(("apple",), ("noto",)), Expectation(("cloud",), ("oil",))
    ]  # fmt: skip


def test_held_out_rows_are_never_drawn(trained, tmp_path, monkeypatch):
    """Two batches are drawn from the first 24 rows, and then the last 8 are judged."""
    taken, take = [], judge.CaptionedImages.take
    monkeypatch.setattr(judge.CaptionedImages, "take", lambda self, picks: taken.append(picks) or take(self, picks))
    judge.train(trained, tmp_path, 2, 0)
    assert len(taken) == 3 and len(taken[0]) == judge.BATCH and taken[2] == list(range(24, 32))
    assert set(taken[0]) | set(taken[1]) <= set(range(24)) and taken[0] != taken[1]


def test_a_training_that_was_stopped_goes_on_and_only_then_writes_its_judge(trained, tmp_path, monkeypatch):
    """Ctrl-C after step 3 of 6, then the same command: the weights of a run that nobody stopped, to the last bit."""
    monkeypatch.setattr(judge, "BATCH", 8)
    judge.train(trained, tmp_path / "whole", 6, 0)
    run = judge.training.run

    def stopped(model, loss, batch_at, optimizer, plan, *rest):
        def batches(step):
            if step == 2:
                signal.raise_signal(signal.SIGINT)
            return batch_at(step)

        return run(model, loss, batches, optimizer, plan, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(judge.training, "run", stopped)
        judge.train(trained, tmp_path / "parts", 6, 0)
    assert not (tmp_path / "parts" / "config.json").exists()
    judge.train(trained, tmp_path / "parts", 6, 0)
    one, two = (judge.read(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_score_prints_the_table_and_writes_the_sheet(trained, tmp_path, monkeypatch, capsys):
    """Two prompts, four seeds. "a cloud": three of four, good. "an emoji of an apple": two, and once a cloud in oil.

    All images: concept 5 of 8, style 2 of the 4 that name one, both 5 of 8. Floor: the cloud's images against the
    emoji of an apple: concept 1 of 4, style 1 of 4, both 1; the others against a cloud: concept 2 of 4, both 2.
    """
    drawn = plain("cloud", "cloud", "apple", "cloud", "apple", "cloud", "apple", "cloud")
    arguments = []
    monkeypatch.setattr(judge, "draw", lambda *args: arguments.append(args) or drawn)
    (tmp_path / "prompts.txt").write_text("a cloud\n\nan emoji of an apple\n")
    judge.main(["score", "--judge", str(trained / "judge"), "--prompts", str(tmp_path / "prompts.txt"), "--steps", "9",
                "--guidance-scale", "3", "--out", str(tmp_path / "sheet.png")])  # fmt: skip
    (cascade, *rest), settings = arguments[0], arguments[0][0].settings[0]
    assert rest == [["a cloud", "an emoji of an apple"], [100, 101, 102, 103]]
    assert (settings.steps, settings.guidance_scale) == ("9", 3.0) and not cascade.has_upper
    printed = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert lines[2] == "a cloud 3 of 4 3 of 4 any cloud, cloud, apple, cloud"
    assert lines[3] == "an emoji of an apple" + " 2 of 4" * 3 + " apple (noto), cloud (oil), apple (noto), cloud (oil)"
    assert lines[4] == "1 of 2 prompts are right in at least three quarters of their 4 images"
    assert lines[5] == "all images concept 62 %, style 50 %, both 62 %"
    assert lines[6].startswith("real concept 100 %, style 100 %, both 100 %: 8 held-out")
    assert lines[7].startswith("floor concept 38 %, style 25 %, both 38 %")
    assert Image.open(tmp_path / "sheet.png").width > 8 * 128
    assert images.read_metadata(tmp_path / "sheet.png")["report"] in printed


def test_the_sheet_marks_every_image(monkeypatch):
    """Prompts of one seed stand two in a row."""
    calls = []
    monkeypatch.setattr(judge.images, "sheet", lambda *args: calls.append(args))
    answers = [Expectation(("cat",), ("oil",)), Expectation(("dog",), ("oil",)), Expectation(("dog",), ("noto",))]
    expectations = [Expectation(("cat",)), Expectation(("cat",)), Expectation(("dog",), ("oil",))]
    judge.sheet(["a", "b", "c"], list(zip(answers, expectations)), torch.zeros(3, 3, 64, 64), "T")
    assert calls[0][1:] == ([["a\nright: cat", "b\nWRONG: dog"], ["c\nWRONG: dog (noto)"]], "T")


def test_drawing_is_stage_1_on_each_prompt_with_each_seed(tmp_path):
    """The second prompt with the second seed alone gives the last image, up to the rounding of a batch, which a random
    network passes on: compared with the distance to the image of the first seed."""
    cascade = Cascade.load(str(write_cascade(tmp_path)[0]), "none", dtype=torch.float32)
    cascade.settings[0] = cascade.settings[0].but(steps=4, guidance_scale=2.0)
    drawn = judge.draw(cascade, ["a castle", "a dog"], [5, 3])
    alone = cascade.draw([Part(*cascade.encode("a dog"))], [3])
    assert drawn.shape == (4, 3, 64, 64)
    assert (drawn[3] - alone[0]).abs().mean() < 0.05 * (drawn[3] - drawn[2]).abs().mean()


def fails(capsys, *argv):
    with pytest.raises(SystemExit):
        judge.main([str(a) for a in argv])
    return capsys.readouterr().err


def test_bad_input_is_explained(trained, tmp_path, capsys):
    assert "holds no judge" in fails(capsys, "score", "--judge", tmp_path, "--out", tmp_path / "s.png")
    assert "judge train IMAGES --out" in fails(capsys, "score", "--judge", tmp_path, "--out", tmp_path / "s.png")
    common = "score", "--judge", trained / "judge", "--out", tmp_path / "s.png", "--prompts", tmp_path / "p.txt"
    (tmp_path / "p.txt").write_text("a cloud\na barista\n")
    assert "knows nothing in 'a barista'; name a thing that" in fails(capsys, *common)
    (tmp_path / "p.txt").write_text("\n")
    assert "is empty; write one caption or prompt on each line" in fails(capsys, *common)
    assert "none holds neither images_64.npy nor images" in fails(capsys, "train", tmp_path / "none")
    np.save(tmp_path / "images_64.npy", np.zeros((1, 64, 64, 3), np.uint8))
    (tmp_path / "captions.json").write_text('[{"captions": ["a cat"], "concept": "cat", "kind": "sprite"}]')
    assert "row 0 lacks kind, concept or style; a judge needs them" in fails(capsys, "train", tmp_path)
    (tmp_path / "captions.json").write_text("[]")
    assert "1 images, but captions of 0; make them as many" in fails(capsys, "train", tmp_path)


@pytest.mark.parametrize("lost", ["styles", "concepts"])
def test_a_judge_that_lacks_a_part_is_refused(trained, tmp_path, lost):
    network = judge.read(trained / "judge")
    del network.config[lost]
    judge.write(tmp_path, network)
    with pytest.raises(ValueError, match=f"holds no judge .*{lost}"):
        judge.read(tmp_path)


def test_a_judge_of_another_width_is_refused_in_one_line(trained, tmp_path, monkeypatch):
    judge.write(tmp_path, judge.read(trained / "judge"))
    monkeypatch.setattr(judge, "FEATURES", 8)
    with pytest.raises(ValueError, match="holds no judge .its weights are of another network.; train one") as caught:
        judge.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_embedded_judge_understands_all_prompts():
    config = judge.read(judge.EMBEDDED).config
    assert None not in [expected(prompt, config["names"], config["phrases"]) for prompt in judge.PROMPTS]
    assert config["ceiling"]["both"] > 0.5 and config["held_out"] > 1000
