"""The tasks that ship: their data, their splits, and that their models learn."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from data_echo import Draws
from trainer.tasks import classification
from trainer.tasks.cifar10 import Cifar10
from trainer.tasks.digits import Digits, read_digits, stratified
from trainer.tasks.shakespeare import SHARES, Shakespeare

SPLITS = ("train", "validation", "test")


def batch_of(task, split: str, indices) -> dict[str, torch.Tensor]:
    """Prepared examples as a micro-batch."""
    source = task.source(split)
    examples = [task.prepare(source[int(index)], None) for index in indices]
    return {key: torch.from_numpy(np.stack([example[key] for example in examples])) for key in examples[0]}


def draws(indices) -> Draws:
    index = np.asarray(indices, np.int64)
    return Draws(0, "augment", np.zeros_like(index), index, np.zeros_like(index), "cpu")


def test_digits_are_scikit_learn_s():
    sklearn = pytest.importorskip("sklearn.datasets").load_digits()
    pixels, labels = read_digits()
    np.testing.assert_array_equal(pixels, sklearn.data)
    np.testing.assert_array_equal(labels, sklearn.target)
    assert pixels.dtype == np.uint8


def test_digits_splits_are_disjoint_whole_and_in_equal_parts():
    pixels, labels = read_digits()
    task, seen = Digits(), []
    for split, length in zip(SPLITS, (1297, 250, 250), strict=True):
        batch = batch_of(task, split, range(length))
        seen.append(batch["pixels"].numpy())
        shares = np.bincount(batch["label"], minlength=10) / length
        np.testing.assert_allclose(shares, np.bincount(labels) / len(labels), atol=1 / 250)
    whole = np.concatenate(seen)
    order = np.lexsort(pixels.T)
    np.testing.assert_array_equal(whole[np.lexsort(whole.T)], pixels[order])


def test_stratified_holds_in_every_stretch():
    labels = np.random.default_rng(0).integers(0, 4, 1000)
    order = stratified(labels)
    assert sorted(order) == list(range(1000))
    for start in range(0, 1000, 100):
        counts = np.bincount(labels[order[start : start + 100]], minlength=4)
        np.testing.assert_allclose(counts, np.bincount(labels) / 10, atol=1.01)


def test_classification_is_cross_entropy_and_accuracy():
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).double()
    label = torch.arange(12) % 5
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    nll = -log_p[torch.arange(12), label].sum()
    total, count = classification.loss(logits, label)
    assert count == 12
    torch.testing.assert_close(total, nll)
    smooth, _ = classification.loss(logits, label, label_smoothing=0.2)
    torch.testing.assert_close(smooth, 0.8 * nll - 0.2 * log_p.mean(1).sum())
    metrics = classification.metrics(logits, label)
    assert metrics["accuracy"][0] == sum(
        int(row.argmax()) == int(y) for row, y in zip(logits, label, strict=True)
    )
    torch.testing.assert_close(metrics["loss"][0], nll)


@pytest.mark.parametrize("arguments", [{"hidden": 0}, {"label_smoothing": 1.0}, {"label_smoothing": -0.1}])
def test_arguments_of_digits_are_checked(arguments):
    with pytest.raises(ValueError, match="; give "):
        Digits(**arguments)


def trained(task, indices, steps: int, lr: float) -> tuple[float, float]:
    """Loss before and after a few plain steps on one batch."""
    torch.manual_seed(0)
    model, batch = task.model(), batch_of(task, "train", indices)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for _ in range(steps):
        total, count = task.loss(model, task.augment(batch, draws(indices)))
        losses.append(total.item() / count.item())
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    return losses[0], losses[-1]


def test_digits_learn():
    before, after = trained(Digits(), range(256), steps=40, lr=0.1)
    assert before == pytest.approx(np.log(10), abs=0.3)
    assert after < 0.3


@pytest.fixture
def cifar(shared_data) -> Cifar10:
    return Cifar10(str(shared_data / "cifar10"), width=8)


def test_cifar_splits_are_disjoint_and_whole(cifar):
    sources = {split: cifar.source(split) for split in SPLITS}
    assert {split: len(source) for split, source in sources.items()} == {
        "train": 45_000,
        "validation": 5_000,
        "test": 10_000,
    }
    origins = {
        split: {source.origin(i) for i in range(0, len(source), 7)} for split, source in sources.items()
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not origins[one] & origins[other]
    held_out = {sources["validation"].origin(i) for i in range(20)}
    assert all(int(origin.rpartition(":")[2]) % 10 == 9 for origin in held_out)
    assert sources["train"].fingerprint() == sources["validation"].fingerprint()


def test_cifar_learns_from_decoded_cropped_and_mirrored_images(cifar):
    indices = np.arange(64)
    batch = batch_of(cifar, "train", indices)
    assert batch["image"].shape == (64, 32, 32, 3)
    assert batch["image"].dtype == torch.uint8
    augmented = cifar.augment(batch, draws(indices))
    assert augmented["image"].shape == batch["image"].shape
    assert augmented["label"] is batch["label"]
    changed = (augmented["image"] != batch["image"]).flatten(1).any(1)
    assert changed.float().mean() > 0.9
    before, after = trained(cifar, indices, steps=30, lr=0.1)
    assert after < before / 2


@pytest.mark.parametrize(("split", "length"), [("train", 90), ("validation", 10), ("test", 4)])
def test_a_folder_of_parquet_files_in_cifar_s_layout(tmp_path, split, length):
    write_images(tmp_path / "train-0.parquet", labels=[0] * 100)
    write_images(tmp_path / "test-0.parquet", labels=[1] * 4)
    assert len(Cifar10(str(tmp_path)).source(split)) == length


@pytest.mark.parametrize(
    ("label", "side", "message"),
    [
        (10, 32, "the label is 10; labels are 0 to 9"),
        (-1, 32, "the label is -1"),
        (3, 28, "the image is 28 × 28; "),
    ],
)
def test_rows_that_are_not_cifar_s_are_refused(tmp_path, label, side, message):
    write_images(tmp_path / "test-0.parquet", labels=[label], side=side)
    task = Cifar10(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        task.prepare(task.source("test")[0], None)


@pytest.fixture
def shakespeare(tmp_path) -> Shakespeare:
    """A text of 2,000 bytes in which every byte follows from the one before."""
    (tmp_path / "text").write_bytes(bytes(i * 7 % 251 for i in range(2000)))
    return Shakespeare(str(tmp_path / "text"), context=16, width=32, stride=5)


def test_windows_cover_the_text_in_order_without_meeting_across_splits(shakespeare):
    text = np.fromfile(shakespeare.path, np.uint8)
    for split, (first, last) in SHARES.items():
        part = text[round(first * 2000) : round(last * 2000)]
        stride = 5 if split == "train" else 16
        source = shakespeare.source(split)
        assert len(source) == len(range(0, len(part) - 16, stride))
        for index in (0, len(source) - 1):
            window = source[index]["bytes"]
            np.testing.assert_array_equal(window, part[index * stride : index * stride + 17])
        assert len(part) - ((len(source) - 1) * stride + 17) < stride  # no further window fits


def test_the_transformer_sees_no_byte_before_its_turn(shakespeare):
    torch.manual_seed(0)
    model = shakespeare.model()
    text = torch.randint(0, 256, (1, 16))
    changed = text.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 256
    apart = (model(text) - model(changed)).abs().amax(2)[0]
    assert (apart[:9] == 0).all()
    assert (apart[9:] > 0).all()


def test_shakespeare_counts_bytes_and_learns(shakespeare):
    torch.manual_seed(0)
    model, batch = shakespeare.model(), batch_of(shakespeare, "train", range(64))
    total, count = shakespeare.loss(model, batch)
    assert count == 64 * 16
    assert total.item() / count.item() == pytest.approx(np.log(256), rel=0.2)
    before, after = trained(shakespeare, range(64), steps=60, lr=0.05)
    assert after < before / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"width": 30}, "width 30 is not a multiple of heads 4"), ({}, "there is no file")],
)
def test_arguments_of_shakespeare_are_checked(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        Shakespeare(str(tmp_path / "absent"), **arguments).source("train")


def write_images(path, labels: list[int], side: int = 32) -> None:
    import io

    import pyarrow as arrow
    import pyarrow.parquet as parquet
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, 30)).save(stream, "JPEG")
    images = [{"bytes": stream.getvalue(), "path": None}] * len(labels)
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    parquet.write_table(arrow.table({"img": arrow.array(images, kind), "label": labels}), path)


def test_the_pool_prepares_examples_without_torch():
    modules = ["digits", "cifar10", "shakespeare"]
    code = f"""
import sys
{"; ".join(f"import trainer.tasks.{module}" for module in modules)}
task = trainer.tasks.digits.Digits()
task.prepare(task.source("train")[0], None)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
