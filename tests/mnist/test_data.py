"""The digits are what they should be, random sources are repeatable, and a missing data set says what to do."""

import gzip
import shutil

import pytest
import torch

from minidiff.mnist import data


def test_real_digits_are_read_with_their_labels(folder, digits):
    train, test = data.load(folder), data.load(folder, train=False)
    assert (len(train), len(test)) == (400, 100) and train.images.dtype == torch.float32
    assert torch.equal(torch.cat([train.images, test.images]), digits.images)
    assert torch.equal(torch.cat([train.labels, test.labels]), digits.labels)
    assert digits.images.min() == 0 and digits.images.max() == 1
    assert 0.12 < digits.images.mean() < 0.14 and 0.29 < digits.images.std() < 0.32  # all of MNIST: 0.1307, 0.3081


def test_each_data_set_is_read_from_its_own_folder(fashion, digits, monkeypatch):
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    assert torch.equal(data.load(fashion, "fashion").images, digits.images[:400])
    with pytest.raises(ValueError, match="no MNIST in"):
        data.load(fashion, "mnist")


def test_of_each_class_are_in_order_or_too_few(digits):
    some = digits.of_each_class(3)
    assert some.labels.tolist() == [k for k in range(10) for _ in range(3)]
    assert torch.equal(some.images[3], digits.images[digits.labels == 1][0])
    with pytest.raises(ValueError, match=r"need 51 of each class, but there are fewer of \[0, 1, 2"):
        digits.of_each_class(51)


def test_one_hot_by_hand():
    assert data.one_hot(torch.tensor([3])).tolist() == [[0, 0, 0, 1, 0, 0, 0, 0, 0, 0]]


def test_a_generator_knows_all_its_numbers_and_their_order():
    def draw(*numbers):
        return torch.rand(4, generator=data.generator("cpu", *numbers)).tolist()

    several = [draw(0), draw(1), draw(0, 1), draw(1, 0), draw(0, 1, 2), draw(2**40, 1)]
    assert draw(0, 1) == several[2] and len({tuple(x) for x in several}) == len(several)


def test_without_data_and_network_there_is_a_way_out(tmp_path, monkeypatch):
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(ValueError, match=r"(?s)no MNIST in .*none to be had.*copy the folder `data` here"):
        data.load(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="no MNIST in"):
        data.load(tmp_path / "file")


@pytest.fixture
def offline(monkeypatch):
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])


FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@pytest.mark.parametrize("place", ["MNIST/raw", "MNIST", "."])
@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_files_are_found_by_each_of_their_names(folder, digits, tmp_path, offline, place, dotted, packed):
    """As archives and browsers leave them: train-images.idx3-ubyte, .gz, in the folder itself."""
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for name in FILES:
        content = (folder / "MNIST" / "raw" / name).read_bytes()
        name = name.replace("-idx", ".idx") if dotted else name
        (tmp_path / place / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    parts = [data.load(tmp_path, train=part) for part in (True, False)]
    assert torch.equal(torch.cat([part.images for part in parts]), digits.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), digits.labels)


@pytest.mark.parametrize("deep", ["MNIST", "MNIST/raw", "MNIST/"])
def test_the_inner_folder_is_recognised(folder, digits, deep, offline, monkeypatch):
    assert torch.equal(data.load(f"{folder}/{deep}").images, digits.images[:400])
    monkeypatch.chdir(folder / "MNIST")
    assert torch.equal(data.load("raw").images, digits.images[:400]) and len(data.load(".")) == 400
    for wrong in (folder, folder / deep):  # the digits are not taken for clothes
        with pytest.raises(ValueError, match="no FashionMNIST in"):
            data.load(wrong, "fashion")


@pytest.mark.parametrize("deep", ["", "MNIST", "MNIST/raw"])
def test_a_download_goes_where_the_files_are_looked_for(tmp_path, monkeypatch, deep):
    import torchvision.datasets

    roots = []
    monkeypatch.setattr(torchvision.datasets, "MNIST", lambda root, download: roots.append(root) or 1 / 0)
    with pytest.raises(ValueError, match="none to be had"):
        data.load(tmp_path / deep)
    assert roots == [str(tmp_path)]


def test_broken_and_unequal_files_are_named_and_no_other_is_to_be_deleted(folder, tmp_path, offline):
    shutil.copytree(folder, tmp_path / "data")
    raw = tmp_path / "data" / "MNIST" / "raw"
    labels, images = raw / FILES[1], raw / FILES[0]

    def fails(path, content, message):
        whole = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            data.load(tmp_path / "data")
        path.write_bytes(whole)

    whole = labels.read_bytes()
    for broken in (b"\1\1\1\1" + whole[4:], b"", whole[:2] + b"\x0d" + whole[3:], whole[:-1], whole[:6],
                   gzip.compress(whole)[:-9]):  # fmt: skip
        fails(labels, broken, r"train-labels-idx1-ubyte is damaged or cut short \(.+\); .*delete this one file, so")
    ten = b"\0\0\x08\x01" + (10).to_bytes(4, "big") + whole[8:18]
    for wrong in (ten, whole[:-1] + b"\x0a"):
        fails(labels, wrong, r"images-idx3-ubyte of \(400, 28, 28\) and .*labels-idx1-ubyte of .* delete both")
    whole = images.read_bytes()
    fails(images, whole[:8] + (20).to_bytes(4, "big") * 2 + whole[16 : 16 + 400 * 400], r"of \(400, 20, 20\)")
    assert len(data.load(tmp_path / "data")) == 400
    images.unlink()
    with pytest.raises(ValueError, match=r"no MNIST in .*data \(no train-images or no train-labels-idx\?-ubyte\)"):
        data.load(tmp_path / "data")


def test_some_are_drawn_from_all_and_always_the_same(digits):
    found = data.some(digits, 100)
    assert torch.equal(found.images, data.some(digits, 100).images) and len(found) == 100
    where = [(digits.images == x).flatten(1).all(1).nonzero()[0].item() for x in found.images]
    assert len(set(where)) == 100 and max(where) > 400 and min(where) < 100
    assert len(data.some(digits, 10**6)) == len(digits)
