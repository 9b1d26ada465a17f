"""The judge: its distances against closed forms, its shifts by hand, and what it says about good and bad samples."""

import math
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from minidiff.mnist import data, judge, models
from minidiff.mnist.judge import Judge
from minidiff.weights import WEIGHTS
from tests.mnist.real import fails


def gaussian(mean, covariance):
    return torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64)


def test_the_frechet_distance_by_hand():
    """One dimension: (3 - 1)^2 + (2 - 5)^2 = 13. Diagonal: variances 4, 9 against 1, 1: (2-1)^2 + (3-1)^2 = 5."""
    assert judge.frechet(gaussian([3.0], [[4.0]]), gaussian([1.0], [[25.0]])) == pytest.approx(13, abs=1e-10)
    a, b = gaussian([0.0, 1.0], [[4.0, 0], [0, 9]]), gaussian([0.0, 1.0], [[1.0, 0], [0, 1]])
    assert judge.frechet(a, b) == pytest.approx(5, abs=1e-10)


def test_the_frechet_distance_uses_the_whole_covariance():
    """Against the root found by Denman and Beavers' iteration on the product itself; symmetric; 0 for equals."""
    x, y = torch.randn(2, 50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mix = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a, b = judge.gaussian(x), judge.gaussian(y @ mix + 1)
    root, inverse = a[1] @ b[1], torch.eye(6, dtype=torch.float64)
    for _ in range(60):
        root, inverse = (root + inverse.inverse()) / 2, (inverse + root.inverse()) / 2
    expected = (a[0] - b[0]).square().sum() + (a[1] + b[1] - 2 * root).trace()
    assert judge.frechet(a, b) == pytest.approx(expected.item(), rel=1e-8)
    assert judge.frechet(b, a) == pytest.approx(expected.item(), rel=1e-8)
    assert judge.frechet(a, a) == pytest.approx(0, abs=1e-9)
    singular = judge.gaussian(x[:3])  # fewer samples than features
    assert judge.frechet(singular, singular) == pytest.approx(0, abs=1e-6)


def test_agreement_and_entropy_by_hand():
    verdicts = torch.tensor([0, 0, 1, 1])
    assert judge.agreement(verdicts, torch.tensor([0, 1, 1, 1])) == 0.75
    assert judge.entropy(verdicts) == pytest.approx(math.log(2))
    assert judge.entropy(torch.zeros(4, dtype=torch.long)) == 0
    assert judge.entropy(torch.arange(10)) == pytest.approx(math.log(10))


def test_the_confidence_interval_by_hand():
    """z^2 = 3.8416. 93 of 100: (0.93 + 0.019208 +- 1.96 sqrt(0.000651 + 0.00009604)) / 1.038416 = 0.8625 and 0.9657.
    Of 100 of 100 the lower end is n / (n + z^2) = 0.9630, of none of 100 the upper one is z^2 / (n + z^2)."""
    assert judge.wilson(0.93, 100) == pytest.approx((0.862503, 0.965681), abs=1e-6)
    assert judge.wilson(1.0, 100) == pytest.approx((100 / 103.8416, 1))
    assert judge.wilson(0.0, 100) == pytest.approx((0, 3.8416 / 103.8416))


def test_the_border_by_hand():
    """Of 2 * 108 outermost pixels one is 0.5, one above 1 (it counts as 1), one below 0 (as 0). No other counts."""
    x = torch.zeros(2, 1, 28, 28)
    x[0, 0, 1:-1, 1:-1], x[0, 0, 0, 0], x[1, 0, -1, -1], x[1, 0, 5, 0] = 1, 0.5, 1.8, -0.7
    assert judge.border(x) == pytest.approx(1.5 / 216)
    assert judge.border(torch.ones(3, 1, 28, 28)) == 1


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1000, "0.2 for 1000"), (300, "1.0 for 100, 0.2 for 1000"), (70, "1.0 for 100"), (20000, "0.1 for 5000")],
)
def test_the_distance_of_real_digits_is_at_the_same_number_or_at_both_neighbours(n, expected):
    shown = judge.near({"100": 1.0, "1000": 0.2, "5000": 0.1}, n)
    assert shown == expected.replace(" for", "00 for")


def test_values_are_judged_as_an_image_holds_them(digits):
    """Values outside [0, 1] count as 0 and 1, in features, verdicts and every line of the report."""
    loaded, x = judge.load(judge.EMBEDDED), digits.images[:80]
    net, *_ = loaded
    wide = torch.where(x == 0, -0.15, torch.where(x == 1, 1.3, x))
    for found, expected in zip(judge.look(net, wide), judge.look(net, x)):
        assert torch.equal(found, expected)
    reports = [judge.report(loaded, images, digits.labels[:80], 0, "mnist") for images in (x, wide)]
    assert reports[0] == reports[1] and "border: 0.000" in reports[0][3]
    assert (net.features(wide) - net.features(x)).abs().max() > 0.05


def test_shifting_moves_each_image_by_itself_and_brings_in_black():
    x = torch.zeros(300, 1, 28, 28)
    x[:, 0, 10, 20] = 1
    moved = judge.shifted(x, torch.Generator().manual_seed(0))
    places = {tuple((p - torch.tensor([10, 20])).tolist()) for p in moved[:, 0].nonzero()[:, 1:]}
    assert places == {(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)} and (moved.sum((1, 2, 3)) == 1).all()
    assert judge.shifted(torch.ones(50, 1, 28, 28), torch.Generator().manual_seed(0)).amin((1, 2, 3)).min() == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits):
    """A few steps on 500 digits: enough to tell most of them apart."""
    torch.manual_seed(0)
    net = Judge()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3  # so that averages follow so short a training
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for i in range(60):
        part = digits[torch.arange(50 * i, 50 * i + 50) % 500]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(part.images), part.labels).backward()
        optimizer.step()
    features, verdicts = judge.look(net, digits.images)
    mean, covariance = judge.gaussian(features)
    folder = tmp_path_factory.mktemp("judge")
    accuracy = judge.agreement(verdicts, digits.labels)
    config = {"kind": "judge", "dataset": "mnist", "accuracy": accuracy, "floors": {"100": 0.5}}
    models.write(folder, net, config, {"feature_mean": mean, "feature_covariance": covariance})
    return folder


def test_the_distances_of_real_digits_are_means_over_shuffled_parts(monkeypatch):
    """Sorted features, whose first half is nothing like the whole: the level for half of them is still small."""
    monkeypatch.setattr(judge, "LEVEL_SIZES", (500, 1000, 2000))
    features = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort(0).values
    found = judge.real_distances(features, judge.gaussian(features))
    assert list(found) == ["500", "1000"] and abs(found["1000"]) < 1e-9 and found["500"] < 0.05
    assert judge.frechet(judge.gaussian(features[:500]), judge.gaussian(features)) > 1


def test_score_prints_everything_that_makes_its_numbers_comparable(trained, digits, tmp_path, capsys):
    some = digits[:100]
    save_file(
        {"images": some.images, "labels": (some.labels + 1) % 10, "seed": torch.tensor(7)},
        tmp_path / "s.safetensors",
        {"dataset": "mnist"},
    )
    judge.main(["score", str(tmp_path / "s.safetensors"), "--judge", str(trained)])
    shown = capsys.readouterr().out
    net, _, reference = judge.load(trained)
    features, verdicts = judge.look(net, some.images)
    wrong = judge.agreement(verdicts, (some.labels + 1) % 10)
    assert "N = 100, seeds 7 to 106, values clamped to [0, 1]; the judge is right about" in shown and wrong < 0.2
    low, high = judge.wilson(wrong, 100)
    assert f"agreement with the class asked for: {wrong:.2%} (95 % interval {low:.2%} to {high:.2%})" in shown
    assert f"entropy {judge.entropy(verdicts):.3f} of" in shown and f"border: {judge.border(some.images):.4f}," in shown
    distance = judge.frechet(judge.gaussian(features), reference)
    assert f"the training digits, in the judge's 64 features: {distance:.3f};" in shown and distance > 0.001
    assert "of real test digits drawn at random: 0.500 for 100" in shown
    few = judge.report(judge.load(trained), some.images[:5], None, 0, "mnist")
    assert len(few) == 3 and "Frechet" not in "".join(few)


def test_training_keeps_weights_accuracy_and_levels(fashion, tmp_path, capsys):
    """Accuracy and levels are those of the test images, which here have all wrong labels; what samples are compared
    with is of the training images."""
    shutil.copytree(fashion, tmp_path / "data")
    labels = tmp_path / "data" / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:8] + bytes((label + 1) % 10 for label in labels.read_bytes()[8:]))
    flags = ["--quick", "--lr", "1e-3", "--epochs", "3", "--dataset", "fashion", "--data", str(tmp_path / "data")]
    judge.main(["train", *flags, "--out", str(tmp_path / "j")])
    net, config, (mean, covariance) = judge.load(tmp_path / "j")
    train, test = (data.load(tmp_path / "data", "fashion", part) for part in (True, False))
    features, verdicts = judge.look(net, test.images)
    expected = judge.gaussian(judge.look(net, train.images)[0])
    assert mean.dtype == torch.float64
    torch.testing.assert_close(mean, expected[0], rtol=0.01, atol=0.01)  # the weights are kept in half precision
    torch.testing.assert_close(covariance, expected[1], rtol=0.01, atol=0.01)
    assert config["floors"] == pytest.approx(judge.real_distances(features, expected), rel=0.05)
    assert abs(config["accuracy"] - judge.agreement(verdicts, test.labels)) < 0.035 and config["dataset"] == "fashion"
    assert "of 100 test digits; Frechet distance of test to training digits" in capsys.readouterr().out


def test_only_training_sees_shifted_images(digits):
    seen = []

    class Undecided(nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.zeros(len(x), 10)

    net, some = Undecided(), digits[:8]
    for training in (True, False):
        found = judge.loss(net.train(training), some, torch.Generator().manual_seed(5))
        assert found.item() == pytest.approx(math.log(10))
    assert torch.equal(seen[0], judge.shifted(some.images, torch.Generator().manual_seed(5)))
    assert torch.equal(seen[1], some.images) and not torch.equal(seen[0], seen[1])


def test_bad_input_is_named(tmp_path, trained, capsys):
    file = tmp_path / "s.safetensors"
    assert "invalid choice: 'what'" in fails(capsys, judge.main, "what")
    assert "holds no samples" in fails(capsys, judge.main, "score", tmp_path / "none.safetensors")
    one = {"images": torch.zeros(1, 1, 28, 28), "seed": torch.tensor(0)}
    for wrong, metadata in (({"other": torch.zeros(1)}, {"dataset": "mnist"}), (one, None)):
        save_file(wrong, file, metadata)
        assert "write it with sample --tensors" in fails(capsys, judge.main, "score", file)
    images = torch.rand(3, 1, 28, 28)
    for wrong, message in (
        ({"images": images[:0]}, "digits must be (N, 1, 28, 28) of float32, got (0, 1, 28, 28)"),
        ({"images": images[:, 0]}, "of float32, got (3, 28, 28)"), ({"images": torch.rand(3, 1, 32, 32)}, "32, 32)"),
        ({"images": images.half()}, "of torch.float16"), ({"images": images * math.nan}, "the digits hold NaN or inf"),
        ({"images": images, "labels": torch.tensor([3])}, "3 images need as many labels, got (1,)"),
        ({"images": images, "seed": torch.tensor([0, 1])}, "holds no samples"),
    ):  # fmt: skip
        save_file(one | wrong, file, {"dataset": "mnist"})
        assert message in fails(capsys, judge.main, "score", file)
    save_file(one, file, {"dataset": "fashion"})
    assert "no trained judge in" in fails(capsys, judge.main, "score", file, "--judge", tmp_path)


def test_a_judge_without_a_part_is_named_when_it_is_loaded(tmp_path):
    config, tensors = models.read(judge.EMBEDDED, "judge")
    models.write(tmp_path, judge.Judge(), config, {"feature_covariance": tensors["feature_covariance"]})
    with pytest.raises(ValueError, match="holds only part of a judge: .*feature_mean"):
        judge.load(tmp_path)


def test_the_embedded_judge_knows_real_digits(digits):
    """Its config says 99.3 % of 10,000 test digits; on 500 of the training set it is right about at least 97.4 %, five
    standard errors less. Upside down most of them are other digits, or none."""
    loaded, config, (mean, covariance) = judge.load(WEIGHTS / "mnist" / "judge")
    assert config["accuracy"] >= 0.993 and mean.shape == (64,) and covariance.shape == (64, 64)
    features, verdicts = judge.look(loaded, digits.images)
    assert judge.agreement(verdicts, digits.labels) > 0.974
    _, turned = judge.look(loaded, digits.images.rot90(2, (-2, -1)))
    assert judge.agreement(turned, digits.labels) < 0.6
    lines = judge.report(judge.load(judge.EMBEDDED), digits.images[:100], digits.labels[:100], 0, "mnist")
    assert lines[0].endswith("right about 99.31% of test digits")
    assert lines[-1].endswith("; of real test digits drawn at random: 1.082 for 100")


def test_noise_blur_and_other_classes_look_worse_to_the_embedded_judge_step_by_step(digits):
    net, _, reference = judge.load(judge.EMBEDDED)
    x, ones = digits.images[:250], digits.images[digits.labels == 1].repeat(8, 1, 1, 1)[:250]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    ladders = [[x + s * noise for s in (0, 0.1, 0.2, 0.4)],
               [nn.functional.avg_pool2d(x, k, 1, k // 2) for k in (1, 3, 5, 7)],
               [torch.cat([ones[:k], x[k:]]) for k in (0, 50, 120, 200)]]  # fmt: skip
    for ladder in ladders:
        found = [judge.frechet(judge.gaussian(judge.look(net, images)[0]), reference) for images in ladder]
        assert all(1.2 * lower < higher for lower, higher in zip(found, found[1:])), found
