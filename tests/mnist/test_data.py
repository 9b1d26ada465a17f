"""The digits are what they should be, random sources are repeatable, and a missing data set says what to do."""

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


def test_of_each_class_are_in_order(digits):
    some = digits.of_each_class(3)
    assert some.labels.tolist() == [k for k in range(10) for _ in range(3)]
    assert torch.equal(some.images[3], digits.images[digits.labels == 1][0])


def test_one_hot_by_hand():
    assert data.one_hot(torch.tensor([3])).tolist() == [[0, 0, 0, 1, 0, 0, 0, 0, 0, 0]]


def test_a_generator_knows_all_its_numbers_and_their_order():
    def draw(*numbers):
        return torch.rand(4, generator=data.generator("cpu", *numbers)).tolist()

    several = [draw(0), draw(1), draw(0, 1), draw(1, 0), draw(0, 1, 2), draw(2**40, 1)]
    assert draw(0, 1) == several[2] and len({tuple(x) for x in several}) == len(several)


@pytest.fixture
def offline(monkeypatch):
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])


def test_without_data_and_network_there_is_a_way_out(tmp_path, offline):
    with pytest.raises(ValueError, match=r"(?s)no MNIST in .*none to be had.*copy the folder `data` here"):
        data.load(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="no MNIST in"):
        data.load(tmp_path / "file")


def test_broken_files_are_named_with_the_way_out(folder, tmp_path, offline):
    shutil.copytree(folder, tmp_path / "data")
    labels = tmp_path / "data" / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    whole = labels.read_bytes()
    for broken in (b"", whole[:6], whole[:2] + b"\x0d" + whole[3:]):
        labels.write_bytes(broken)
        with pytest.raises(ValueError, match=r"(?s)no MNIST in .*raw, and none to be had .*Delete broken files"):
            data.load(tmp_path / "data")
    labels.write_bytes(whole)
    assert len(data.load(tmp_path / "data")) == 400


def test_home_is_found_without_a_shell(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    assert len(data.load("~")) == 400


def test_some_are_drawn_from_all_and_always_the_same(digits):
    found = data.some(digits, 100)
    assert torch.equal(found.images, data.some(digits, 100).images) and len(found) == 100
    where = [(digits.images == x).flatten(1).all(1).nonzero()[0].item() for x in found.images]
    assert len(set(where)) == 100 and max(where) > 400 and min(where) < 100
    assert len(data.some(digits, 10**6)) == len(digits)
