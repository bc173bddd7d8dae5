"""A CIFAR-10 ResNet fine-tuned by timm's own training loop, to set beside `resode finetune`. A program, not a test.

    python tests/training/timm_loop.py resnet20 WEIGHTS.th FOLDER --model MODEL.safetensors [--images 12800] [--seed 0]

Dataset, loader, optimizer, scheduler and metric are timm's, and so is the loop, as its train.py has it: one epoch, the
learning rate set before each step. Network, weights, images, augmentation (crops of padded images, mirrored ones),
batch, optimizer, schedule and BatchNorm are those of

    resode finetune MODEL --data FOLDER --images 12800 --batch-size 128 --epochs 1 --lr 0.01 --bn batch --seed 0

The order of images and the draws of the augmentation are not, unless --our-batches says so.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy
from torch import nn
from torch.utils.data import Subset
from torchvision import transforms

from resode_cli.data import open_labelled
from resode_cli.files import model_file
from resode_cli.sources.cifar import build
from resode_cli.training.loop import training_batches

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network(name: str, weights: Path) -> nn.Module:
    saved = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
    net = build(name)
    net.load_state_dict({key.removeprefix("module."): value for key, value in saved.items()}, strict=False)
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("weights", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="The network's model file, which says which images.")
    parser.add_argument("--images", type=int, default=12800)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--our-batches", action="store_true", help="Those of finetune, instead of timm's loader.")
    given = parser.parse_args()

    torch.manual_seed(given.seed)
    net = network(given.network, given.weights)
    whole = create_dataset("", root=str(given.folder / "train"))
    # The images that `resode finetune --images N` takes.
    info = model_file.load(given.model).info
    taken = open_labelled(str(given.folder), info, "train", augment=True, seed=given.seed, images=given.images)
    places = {Path(whole.filename(i, absolute=True)).resolve(): i for i in range(len(whole))}
    chosen = [places[Path(taken.file_of(i)).resolve()] for i in range(len(taken))]
    held_out = create_dataset("", root=str(given.folder / "test"))

    def loader(data: Any, *, training: bool) -> Any:
        return create_loader(
            data, input_size=(3, 32, 32), batch_size=given.batch_size, is_training=training, use_prefetcher=False,
            mean=MEAN, std=STD, num_workers=0, persistent_workers=False, crop_pct=1.0,
        )  # fmt: skip

    test = loader(held_out, training=False)
    train = loader(Subset(whole, chosen), training=True)
    if given.our_batches:
        ours = training_batches(taken, range(len(taken)), given.batch_size, seed=given.seed, epoch=0)
        train = ((batch.images, batch.labels) for batch in ours)
    normalise = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    whole.transform = transforms.Compose(
        [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *normalise]
    )
    optimizer = create_optimizer_v2(net, opt="momentum", lr=given.lr, weight_decay=5e-4, momentum=0.9)
    steps = len(chosen) // given.batch_size
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=steps, min_lr=0.0, step_on_epochs=False, updates_per_epoch=1
    )
    measure = nn.CrossEntropyLoss()

    print(f"before: top-1 {evaluated(net, test):.2f}% on {len(held_out)} images", flush=True)
    began = time.perf_counter()
    net.train()
    losses = AverageMeter()
    for done, (images, labels) in enumerate(train):
        if done == steps:
            break
        scheduler.step_update(done)
        loss = measure(net(images), labels)
        losses.update(loss.item(), len(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - began
    print(f"after: top-1 {evaluated(net, test):.2f}%; {steps} steps in {seconds:.0f} s, mean loss {losses.avg:.3f}")


@torch.no_grad()
def evaluated(net: nn.Module, test: Any) -> float:
    net.eval()
    top1 = AverageMeter()
    for images, labels in test:
        top1.update(accuracy(net(images), labels)[0].item(), len(labels))
    return top1.avg


if __name__ == "__main__":
    main()
