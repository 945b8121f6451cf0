"""Train the demo's model, digits/digits_cnn.onnx, on the calibration rows of digits and never on its test rows.

    pip install torch scikit-learn onnx onnxscript && python calibration/train_digits_cnn.py [FILE.onnx]

The same torch version on the same kind of processor gives the same weights; torch 2.13.0 on x86_64 made the committed
file. It keeps its BatchNormalization nodes, as models that users bring often do.
"""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
TEST_START = 1437  # as in digits/dataset.toml
EPOCHS = 40
BATCH = 64
LEARNING_RATE = 0.01


def block(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """Convolution, BatchNormalization, Relu."""
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=convolution, norm=nn.BatchNorm2d(channels_out), relu=nn.ReLU()))


def make_model() -> nn.Sequential:
    """Return the untrained model: (N, 1, 8, 8) pictures to (N, 10) logits."""
    layers = OrderedDict[str, nn.Module](
        block1=block(1, 24),
        block2=block(24, 32),
        block3=block(32, 48, stride=2),
        block4=block(48, 64),
        pool=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        dropout=nn.Dropout(0.3),
        hidden=nn.Linear(256, 64),
        relu=nn.ReLU(),
        logits=nn.Linear(64, 10),
    )
    return nn.Sequential(layers)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move the pictures of a batch by up to one pixel, all the same way."""
    rows, columns = torch.randint(0, 3, (2,), generator=generator).tolist()
    return nn.functional.pad(images, (1, 1, 1, 1))[:, :, rows : rows + 8, columns : columns + 8]


def train(model: nn.Sequential, images: Tensor, labels: Tensor) -> None:
    """Train in place: Adam, one learning-rate cycle, label smoothing."""
    generator = torch.Generator().manual_seed(0)
    steps = -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=EPOCHS * steps)
    model.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            optimizer.zero_grad()
            logits = model(shifted(images[rows], generator))
            nn.functional.cross_entropy(logits, labels[rows], label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()


def write(model: nn.Sequential, destination: Path) -> None:
    """Export with a free batch, BatchNormalization kept and no note of the machine that it was made on."""
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.zeros(2, 1, 8, 8),), destination, dynamo=False, opset_version=17, do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE, input_names=["image"], output_names=["logits"],
            dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
        )  # fmt: skip
    proto = onnx.load(destination)
    for node in proto.graph.node:
        node.doc_string = ""
    onnx.save(proto, destination)


def main(destination: Path) -> None:
    """Train, report the accuracy on the held-out rows, write."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # sums in one order: the same weights on every run
    torch.use_deterministic_algorithms(True)
    with np.load(HERE / "digits" / "digits.npz") as archive:
        images = torch.from_numpy(archive["images"].astype(np.float32) / 16).unsqueeze(1)
        labels = torch.from_numpy(archive["labels"].astype(np.int64))
    model = make_model()
    train(model, images[:TEST_START], labels[:TEST_START])
    model.eval()
    with torch.no_grad():
        right = model(images[TEST_START:]).argmax(1) == labels[TEST_START:]
    write(model, destination)
    size = destination.stat().st_size
    print(f"{100 * right.float().mean():.2f} % of {len(right)} test digits, {size:,} bytes in {destination}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "digits" / "digits_cnn.onnx")
