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


def test_of_each_class_are_in_order_and_told_if_too_few(digits):
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


def test_without_data_and_network_the_way_out_is_told(tmp_path, monkeypatch):
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(ValueError, match=r"(?s)no MNIST in .*none to be had.*copy the folder `data` here"):
        data.load(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="no MNIST in"):
        data.load(tmp_path / "file")


def test_broken_and_unequal_files_are_told(folder, tmp_path, monkeypatch):
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    shutil.copytree(folder, tmp_path / "data")
    raw = tmp_path / "data" / "MNIST" / "raw"

    def told(name, broken):
        (raw / name).write_bytes(broken)
        with pytest.raises(
            ValueError, match=r"(?s)the MNIST in .* is damaged or incomplete \(.+\); delete .*MNIST, so"
        ):
            data.load(tmp_path / "data")

    whole = (raw / "train-labels-idx1-ubyte").read_bytes()
    for broken in (b"\0\0\x08\x01" + (10).to_bytes(4, "big") + whole[8:18], b"\1\1\1\1" + whole[4:], b"",
                   whole[:2] + b"\x0d" + whole[3:], whole[:2] + b"\x0a" + whole[3:], whole[:-1] + b"\x0a"):  # fmt: skip
        told("train-labels-idx1-ubyte", broken)
    (raw / "train-labels-idx1-ubyte").write_bytes(whole)
    whole = (raw / "train-images-idx3-ubyte").read_bytes()
    told("train-images-idx3-ubyte", whole[:8] + (20).to_bytes(4, "big") * 2 + whole[16 : 16 + 400 * 400])
    (raw / "train-images-idx3-ubyte").write_bytes(whole)
    assert len(data.load(tmp_path / "data")) == 400
