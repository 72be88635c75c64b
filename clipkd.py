"""Distil a large CLIP (the teacher) into a small one (the student) with the losses of CLIP-KD.

    python clipkd.py                                               # a demo: two minutes on a CPU
    python clipkd.py --train-data pairs.tsv                        # the paper's recipe, your pairs
    torchrun --nproc_per_node=8 clipkd.py --train-data cc3m cc12m  # the paper's run on 8 GPUs

The paper is Yang et al., CVPR 2024, https://arxiv.org/abs/2307.12732. Its losses are in losses.py.

How to read this file: the first 300 lines are the whole method, from what the student computes to
the training loop. The sections after that each open with a comment on their purpose: flags, models,
data, processes, evaluation, the output folder, the demo. You can skip them until you need them.

A run writes to the folder --out: log.jsonl, with one JSON object per line; checkpoint.pt, from
which the same command continues a stopped run; and student/, which open_clip can load.

Comments give shapes, like [n, D]; a single number has the shape []. A batch has N pairs, of which
each process holds n. D_s and D_t are the widths of the student's and the teacher's embeddings. The
loaders deliver images as squares of S x S pixels.
"""

import argparse
import csv
import difflib
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import signal
import sqlite3
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import open_clip
import safetensors.torch
import torch
import torch.distributed as dist
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageDraw, ImageFont
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2
from tqdm import tqdm

import losses as kd

# --------------------------------------------------------------------------------------------------
# The method. losses.py explains the seven losses: clip (the task itself), crd (copy the teacher's
# softmax), fd (copy its embeddings), mfd (fd from a masked image), gd (copy its gradients), icl
# (find the partner among its embeddings), afd (the task on fused embeddings of both). Two things
# are not obvious. The softmax of a contrastive loss runs over the pairs of all processes, so
# embeddings are gathered before they are compared. And fd, mfd, gd and icl compare embeddings of
# equal width: if the student's are narrower or wider, linear layers project them.


@dataclass
class Batch:
    """Everything a loss can use. Embeddings are normalised, and gathered from all processes."""

    img_s: Tensor  # [N, D_s] the student's embeddings of the images
    txt_s: Tensor  # [N, D_s] the student's embeddings of the captions
    img_p: Tensor  # [N, D_t] the student's again, projected to the width D_t and then normalised
    txt_p: Tensor  # [N, D_t] (img_s and txt_s themselves if no projection is needed)
    img_t: Tensor  # [N, D_t] the teacher's embeddings, which carry no gradient
    txt_t: Tensor  # [N, D_t] (img_t, txt_t and scale_t are None in a run without a teacher)
    scale_s: Tensor  # [] 1/temperature of the student, which is learned
    scale_t: Tensor  # [] 1/temperature of the teacher
    anchors: slice  # this process's own pairs among the N
    images: Tensor  # [n, 3, H, W] this process's images, preprocessed for the student


class Distiller(nn.Module):
    """The student and the few trainable parts that its losses need.

    A part exists only if a loss needs it. All are in one module, so that DDP synchronises them.

    To add a loss, write a subclass in a file of your own that begins with `from clipkd import *`,
    and pass the subclass to run():

        class WithCosine(Distiller):
            own_losses = {"cosine": 10.0}  # its weight, which the flag --lambda-cosine changes
            needs_projection = Distiller.needs_projection | {"cosine"}

            def compare(self, batch):
                losses = super().compare(batch)
                cosine = (batch.img_p * batch.img_t).sum(dim=1)  # [N]
                losses["cosine"] = 1 - cosine.mean()
                return losses

        if __name__ == "__main__":
            run(WithCosine)

    A loss can average over all N pairs, as this one does, or over batch.anchors, which is less
    work. Both give the same gradient (forward explains why). Add its name to needs_projection if it
    uses img_p or txt_p, and to needs_scale if it uses scale_s. Create its layers in __init__. If it
    learns a temperature, store log(1/temperature) under a name that ends in log_scale, so that it
    stays in bounds as CLIP's does.
    """

    own_losses = {}  # {name: weight} of the losses that a subclass adds
    needs_projection = {"fd", "mfd", "gd", "icl"}  # losses that use img_p and txt_p
    needs_scale = {"clip", "crd", "gd"}  # losses that use scale_s

    def __init__(self, student_net, dim_s, dim_t, lambdas, mask_ratio=0.75):
        super().__init__()
        self.student_net = student_net  # an open_clip model
        self.mask_ratio = mask_ratio
        self.active = {name for name, weight in lambdas.items() if weight > 0}

        self.project = dim_s != dim_t and bool(self.active & self.needs_projection)
        if self.project:
            self.proj_img = nn.Linear(dim_s, dim_t)
            self.proj_txt = nn.Linear(dim_s, dim_t)
        if "icl" in self.active:
            self.icl_log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # starts as in CLIP
        if "afd" in self.active:
            self.fuse_img = nn.Linear(dim_s + dim_t, dim_s)
            self.fuse_txt = nn.Linear(dim_s + dim_t, dim_s)
            self.afd_log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

        # DDP expects a gradient for every trainable parameter, so an unused scale is frozen.
        student_net.logit_scale.requires_grad_(bool(self.active & self.needs_scale))

    def forward(self, images, tokens, img_t=None, txt_t=None, scale_t=None):
        """Returns {name: loss}, each of shape [] and not yet weighted.

        images: [n, 3, H, W], preprocessed for the student
        tokens: their captions in the same order, sorted by length, as a list of tensors
            [n_i, length_i] with n rows in total and little padding
        img_t, txt_t, scale_t: the teacher's embeddings [n, D_t] and its 1/temperature []
        """
        # 1. Encode, on recent GPUs in bfloat16. The embeddings are then compared in float32.
        with autocast(images.device):
            img = self.student_net.encode_image(images)  # [n, D_s], not yet of unit length
            txt = encode_text(self.student_net, tokens)  # [n, D_s]
        scale_s = self.student_net.logit_scale.exp()
        img = img.to(scale_s.dtype)
        txt = txt.to(scale_s.dtype)

        # 2. Gather. Every process gets the embeddings of all processes, in the same order.
        img_s = kd.gather(normalize(img))  # [N, D_s]
        txt_s = kd.gather(normalize(txt))
        img_p, txt_p = img_s, txt_s
        if self.project:
            img_p = kd.gather(normalize(self.proj_img(img)))  # [N, D_t]
            txt_p = kd.gather(normalize(self.proj_txt(txt)))
        if img_t is not None:
            img_t = kd.gather(img_t)  # [N, D_t]
            txt_t = kd.gather(txt_t)

        # 3. Compare. clip, crd, icl and afd are means over rows of N x N logits, so each process
        # computes only the rows of its own pairs, the anchors. Every process computes the other
        # losses in full: fd and mfd are cheap, and gd needs whole rows and columns. Either way the
        # loss of the batch is the mean of the processes' losses, and its gradient the mean of their
        # gradients: the backward pass of gather sums the gradients that an embedding receives from
        # all processes, and DDP averages the gradients of the parameters over the processes.
        first = RANK * len(images)  # RANK is the number of this process
        anchors = slice(first, first + len(images))
        batch = Batch(img_s, txt_s, img_p, txt_p, img_t, txt_t, scale_s, scale_t, anchors, images)
        return self.compare(batch)

    def compare(self, batch):
        """Returns {name: loss} for the losses that have a weight above 0."""
        img_s, txt_s = batch.img_s, batch.txt_s
        img_p, txt_p = batch.img_p, batch.txt_p
        img_t, txt_t = batch.img_t, batch.txt_t
        scale_s, scale_t = batch.scale_s, batch.scale_t
        anchors = batch.anchors
        losses = {}
        if "clip" in self.active:
            losses["clip"] = kd.clip_loss(img_s, txt_s, scale_s, anchors)
        if "crd" in self.active:
            losses["crd"] = kd.crd_loss(img_s, txt_s, img_t, txt_t, scale_s, scale_t, anchors)
        if "fd" in self.active:
            losses["fd"] = kd.fd_loss(img_p, txt_p, img_t, txt_t)
        if "mfd" in self.active:
            # one more pass of the student, which sees only a part of each image: [n, D_s]
            img_m = encode_masked(self.student_net, batch.images, self.mask_ratio)
            img_m = img_m.to(scale_s.dtype)
            if self.project:
                img_m = self.proj_img(img_m)  # [n, D_t]
            losses["mfd"] = kd.mfd_loss(kd.gather(normalize(img_m)), txt_p, img_t, txt_t)
        if "gd" in self.active:
            losses["gd"] = kd.gd_loss(img_p, txt_p, img_t, txt_t, scale_s, scale_t)
        if "icl" in self.active:
            scale = self.icl_log_scale.exp()
            losses["icl"] = kd.icl_loss(img_p, txt_p, img_t, txt_t, scale, anchors)
        if "afd" in self.active:
            scale = self.afd_log_scale.exp()
            losses["afd"] = kd.afd_loss(
                img_s, txt_s, img_t, txt_t, self.fuse_img, self.fuse_txt, scale, anchors
            )
        return losses


# --------------------------------------------------------------------------------------------------
# Training. A run that takes days will be interrupted, and should end as if it had not been. So once
# the weights are initialised, no random draw depends on earlier ones: each is seeded with a hash of
# the integers that identify its step or pair. (Python hashes integers the same way in every run.)


def train_step(model, optimizer, lambdas, student, teacher, images, tokens_s, tokens_t):
    """Take one step without waiting for the GPU. Returns {name: loss} and their weighted "total".

    model: the Distiller, or DDP around it
    student, teacher: of class OpenClip; teacher is None if no loss needs one
    images: uint8 [n, 3, S, S]; tokens_s, tokens_t: their captions as each model's tokens
    """
    images_s = student.preprocess(images)
    if teacher is None:
        losses = model(images_s, tokens_s)
    else:
        img_t, txt_t, scale_t = teacher.embed(images, tokens_t)
        losses = model(images_s, tokens_s, img_t, txt_t, scale_t)
    total = sum(lambdas[name] * loss for name, loss in losses.items())

    optimizer.zero_grad()
    total.backward()  # DDP averages the gradients of the processes here
    optimizer.step()
    clamp_scales(model)  # 1/temperature stays in [1, 100], as in CLIP
    return {**losses, "total": total}


def train(args, device, distiller_class=Distiller):
    """Train the student, or continue from its checkpoint. Returns the last evaluation's record."""
    # 1. Input data. Wrong paths are reported here, before the models are loaded.
    files = find_files(args.train_data)
    zeroshot, retrieval = read_evaluations(args)

    # 2. Models
    lambdas = get_lambdas(args)
    student, teacher = load_models(args, lambdas, device)
    dim_t = teacher.dim if teacher else student.dim
    distiller = distiller_class(student.net, student.dim, dim_t, lambdas, args.mask_ratio)
    model = distiller.to(device)  # it trains student.net itself, not a copy
    optimizer = make_optimizer(distiller, args.lr, args.weight_decay)
    if WORLD > 1:
        is_extended = distiller_class is not Distiller  # a subclass may have unused parts
        model = nn.parallel.DistributedDataParallel(distiller, find_unused_parameters=is_extended)

    with locked(args.out) as out:
        # 3. Data, and the run's progress so far
        pairs = Pairs(files, student, teacher, args.seed, out / "index")
        steps_per_epoch = count_steps(pairs, args.batch_size)
        steps = args.epochs * steps_per_epoch
        eval_every = args.eval_every * steps_per_epoch  # in steps
        recipe = get_recipe(args, files)
        progress, result, log_size = restore(out, recipe, distiller, optimizer)
        begin = progress["step"]
        log = Log(out / "log.jsonl", log_size, args)
        loader = make_loader(pairs, args, begin, steps, device)
        bar = tqdm(loader, args.out, total=steps, initial=begin, disable=HIDE_BAR)
        started = time.time() - progress["seconds"]  # as if the run had never been interrupted
        waiting_since = time.time()
        problems = []

        # 4. The loop
        for step, batch in enumerate(bar, start=begin):
            progress["data_wait"] += time.time() - waiting_since
            images, tokens_s, tokens_t, unreadable = move(batch, device)
            problems += unreadable
            lr = lr_at(step, steps, args.warmup, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(hash((args.seed, step, RANK)))  # for MFD's masks and dropout
            losses = train_step(
                model, optimizer, lambdas, student, teacher, images, tokens_s, tokens_t
            )

            # At intervals: log, evaluate, save. Every model that is evaluated is also saved.
            progress["step"] = done = step + 1
            progress["seconds"] = time.time() - started
            evaluating = done == steps or (eval_every > 0 and done % eval_every == 0)
            saving = done % args.save_every == 0 or evaluating
            if done % args.log_every == 0 or saving:
                means = mean_over_processes(losses)  # this waits for the GPU
                check_finite(means, distiller, done)
                progress["skipped"] += sum_over_processes(len(problems))
                speed = done * args.batch_size / progress["seconds"]
                scale = student.net.logit_scale.exp().item()
                log.write({**progress, **means, "lr": lr, "scale": scale, "pairs_per_s": speed})
                show(bar, done, steps, means["total"], progress["skipped"], problems)
                problems = []
            if evaluating:
                scores = evaluate(student, zeroshot, retrieval, args.workers)
                parameters = sum(p.numel() for p in student.net.parameters())
                result = log.write({**progress, "eval": scores, "parameters": parameters})
            if saving:
                save(out, student, distiller, optimizer, recipe, progress, result, log)
            waiting_since = time.time()
    return result


def load_models(args, lambdas, device):
    """The student in training mode, and the teacher, which is None if no loss needs one."""
    torch.manual_seed(args.seed)  # the same seed gives the same initial weights
    student = OpenClip(args.student, args.student_pretrained, device)
    student.net.train()
    needs_teacher = any(lambdas[name] for name in lambdas if name != "clip")
    teacher = None
    if needs_teacher or args.keep_teacher_text:
        teacher = OpenClip(args.teacher, args.teacher_pretrained, device, frozen=True)
    if args.keep_teacher_text:
        student = with_text_tower_of(teacher, student)
    if args.grad_checkpointing:
        student.recompute_activations()
    if needs_teacher and has_bfloat16(device):
        # Store the teacher's image tower in bfloat16. Autocast would round its weights in each step
        # anyway, with the same result. The text tower stays in float32: once it was converted,
        # open_clip would round its token embeddings too, which autocast does not.
        open_clip.model.convert_weights_to_lp(teacher.net.visual, torch.bfloat16)
    return student, teacher if needs_teacher else None


def make_optimizer(distiller, lr, weight_decay):
    """AdamW, without weight decay on biases, norms and scales."""
    decayed, not_decayed = [], []
    for name, parameter in distiller.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or "bias" in name:  # Swin has biases that are matrices
            not_decayed.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]

    # The authors' scripts use one setting for ViTs (and MobileViT), another for everything else.
    image_tower = distiller.student_net.visual
    is_vit = isinstance(image_tower, open_clip.transformer.VisionTransformer)
    if hasattr(image_tower, "trunk"):  # an image tower from timm
        is_vit = "vit" in image_tower.trunk.default_cfg.get("architecture", "")
    if is_vit:
        return torch.optim.AdamW(groups, lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


@torch.no_grad()
def clamp_scales(model):
    for name, parameter in model.named_parameters():
        is_scale = name.endswith(("student_net.logit_scale", "log_scale"))
        if is_scale and parameter.requires_grad:
            parameter.clamp_(0, math.log(100))


def lr_at(step, steps, warmup, peak):
    """The learning rate of a step: a linear rise to the peak, then half a cosine down to 0.

    The rise takes `warmup` steps, but at most a tenth of the run.
    """
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / (steps - warmup)  # of the way down
    return peak * (1 + math.cos(math.pi * share)) / 2


# --------------------------------------------------------------------------------------------------
# Flags. Their defaults are the paper's recipe (Sec. 4.1). Without --train-data the demo runs, which
# has a few defaults of its own.


class BadInput(Exception):
    """A mistake in a flag or a file. The user sees its message as one line, without a traceback."""


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its usage too, from every process
        raise BadInput(f"{message}; --help explains the flags")


def positive(text):
    """The type of a flag that is a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def natural(text):
    """The type of a flag that is a whole number of at least 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)


def amount(text):
    """The type of a flag that is a finite number of at least 0."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return number


def get_args(argv=None, distiller_class=Distiller):
    """The flags of the command line, and one for each loss that the class adds."""
    about = "Distil a CLIP model. Without --train-data, run a demo on generated images."
    parser = Parser("clipkd.py", "clipkd.py [--flag value ...]", about, allow_abbrev=False)
    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--train-data", nargs="+", metavar="FILE",
        help="TSV or CSV files with columns filepath and title, tars in img2dataset's layout, or "
        "folders of such tars; a text file in a tar may hold several captions, one per line")
    add("--val-data", nargs="+", default=[], metavar="[NAME=]FILE",
        help="score retrieval on these pairs, in the same formats as --train-data")
    add("--zeroshot", nargs="+", default=[], metavar="[NAME=]FOLDER",
        help="score zero-shot classification on these, with one folder of images per class")
    add("--workers", type=natural, metavar="N",
        help="data-loading processes (default: all cores but one; without a GPU, half the cores)")

    about = ("NAME is an open_clip model, local-dir:FOLDER, hf-hub:ORG/NAME or a FILE.json with "
             "an architecture; WEIGHTS is one of open_clip's tags for it, or a file of weights")
    add = parser.add_argument_group("models", about).add_argument
    add("--student", default="ViT-T-16", metavar="NAME",
        help="the model to train; besides open_clip's there are mobilevit_s, swin_tiny, resnet18, "
        "mobilenetv3_small_100, efficientnet_b0 and the tiny demo-student and demo-teacher "
        "(default: %(default)s)")
    add("--student-pretrained", metavar="WEIGHTS", help="initial weights (default: random)")
    add("--teacher", default="ViT-B-16", metavar="NAME",
        help="the model to learn from (default: %(default)s)")
    add("--teacher-pretrained", default="laion400m_e32", metavar="WEIGHTS",
        help="its weights (default: %(default)s)")
    add("--keep-teacher-text", action="store_true",
        help="train only the image tower and give it the teacher's text tower; a search index "
        "built with the teacher stays usable")

    about = "the total loss is the sum of lambda * loss; a lambda of 0 switches a loss off"
    add = parser.add_argument_group("losses", about).add_argument
    add("--lambda-clip", type=amount, default=1, metavar="X", help="the task itself (default: 1)")
    add("--lambda-crd", type=amount, default=1, metavar="X",
        help="contrastive relational distillation: copy the teacher's softmax (default: 1)")
    add("--lambda-fd", type=amount, default=2000, metavar="X",
        help="feature distillation: copy the teacher's embeddings (default: 2000, which is for "
        "embeddings of 512 numbers; in proportion for others, like 250 for the demo's 64)")
    add("--lambda-icl", type=amount, default=1, metavar="X",
        help="interactive contrastive learning: find the partner among the teacher's embeddings "
        "(default: 1)")
    add("--lambda-mfd", type=amount, default=0, metavar="X",
        help="masked feature distillation: FD from masked images (default: 0; paper: 2000)")
    add("--lambda-gd", type=amount, default=0, metavar="X",
        help="gradient distillation: copy the gradients of the teacher's task loss (default: 0; "
        "paper: 1e8 for 1024 pairs)")
    add("--lambda-afd", type=amount, default=0, metavar="X",
        help="augmented feature distillation: the task on fused embeddings (default: 0; try 1)")
    add("--mask-ratio", type=amount, default=0.75, metavar="X",
        help="share of each image that MFD hides (default: %(default)s)")
    for name, weight in distiller_class.own_losses.items():
        add(f"--lambda-{name.replace('_', '-')}", type=amount, default=weight, metavar="X",
            help=f"a loss of {distiller_class.__name__} (default: %(default)s)")

    about = "AdamW; the learning rate rises linearly to its peak, then falls along half a cosine"
    add = parser.add_argument_group("optimiser", about).add_argument
    add("--epochs", type=positive, default=32, metavar="N", help="(default: %(default)s)")
    add("--batch-size", type=positive, default=1024, metavar="N",
        help="pairs per step, over all processes (default: %(default)s)")
    add("--lr", type=amount, default=1e-3, metavar="X",
        help="peak learning rate (default: %(default)s)")
    add("--weight-decay", type=amount, default=0.1, metavar="X",
        help="for all but biases, norms and scales (default: %(default)s)")
    add("--warmup", type=natural, default=10_000, metavar="STEPS",
        help="length of the rise, capped at a tenth of the run (default: %(default)s)")

    add = parser.add_argument_group("run").add_argument
    add("--out", default="out", metavar="FOLDER",
        help="where the run writes; if a checkpoint is there, it continues (default: %(default)s)")
    add("--seed", type=natural, default=0, metavar="N", help="(default: %(default)s)")
    add("--log-every", type=positive, default=50, metavar="STEPS", help="(default: %(default)s)")
    add("--save-every", type=positive, default=1000, metavar="STEPS",
        help="steps between checkpoints, and so the most that a stop can lose; each evaluation "
        "saves one too (default: %(default)s)")
    add("--eval-every", type=natural, default=1, metavar="EPOCHS",
        help="0 means only at the end (default: %(default)s)")
    add("--eval-only", action="store_true", help="score --student without any training")
    add("--grad-checkpointing", action="store_true",
        help="save memory by computing the student's forward pass twice")
    # fmt: on
    args = parser.parse_args(argv)
    args.demo = not (args.train_data or args.eval_only)
    if args.demo:
        # Parse again with the demo's defaults. The flags that you gave keep their values.
        parser.set_defaults(**DEMO)
        args = parser.parse_args(argv, argparse.Namespace(demo=True))
    if args.workers is None:
        args.workers = available_cores() // 2
        if torch.cuda.is_available():
            args.workers = max(1, available_cores() - 1)
    check_args(args)
    return args


def check_args(args):
    """Raises BadInput for flags that do not go together."""
    evaluates = bool(args.val_data or args.zeroshot)
    if evaluates and args.demo:
        raise BadInput("--val-data and --zeroshot need --train-data, or --eval-only")
    if args.eval_only and not evaluates:
        raise BadInput("--eval-only needs --val-data or --zeroshot")
    if args.eval_only:
        return
    if args.batch_size % WORLD or args.batch_size < 2:
        must = f"must be at least 2 and a multiple of the {WORLD} processes"
        raise BadInput(f"--batch-size {args.batch_size}: {must}")
    if not any(get_lambdas(args).values()):
        raise BadInput("--lambda-*: all are 0; give at least one loss a weight")
    if args.mask_ratio >= 1:
        raise BadInput(f"--mask-ratio {args.mask_ratio}: must be less than 1")
    if args.keep_teacher_text and (args.demo or args.student_pretrained or ":" in args.student):
        raise BadInput("--keep-teacher-text: needs --train-data and a --student without weights")


def get_lambdas(args):
    """{loss: weight}, including losses that a subclass of Distiller adds as args.lambda_NAME."""
    flags = vars(args).items()
    return {name[len("lambda_") :]: value for name, value in flags if name.startswith("lambda_")}


def available_cores():
    """This process's share of the available cores."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, cores // LOCAL_WORLD)


# --------------------------------------------------------------------------------------------------
# Models. open_clip builds and loads them, and tokenizes captions. This section adds what
# distillation needs: the paper's students, preprocessing on the device, captions without their
# padding, masked images.


def clip_config(vision, embed_dim=512, width=384, heads=6, layers=12, context=77):
    """An architecture in the format of open_clip's JSON files."""
    text = {"context_length": context, "vocab_size": 49408}
    text.update(width=width, heads=heads, layers=layers)
    return {"embed_dim": embed_dim, "vision_cfg": {"image_size": 224, **vision}, "text_cfg": text}


def timm_config(name, **options):
    return clip_config({"timm_model_name": name, **options})


def demo_config(vision, embed_dim, width):
    return clip_config(
        {"image_size": 32, **vision}, embed_dim, width, heads=2, layers=1, context=20
    )


# open_clip lacks these six of the paper's students (Table 2). All have the same kind of text tower.
# An empty timm_pool keeps timm's own pooling.
STUDENTS = {
    "ViT-T-16": clip_config({"layers": 12, "width": 192, "patch_size": 16}),  # 192 is 3 heads of 64
    "swin_tiny": timm_config("swin_tiny_patch4_window7_224", timm_pool=""),
    # Here timm's own last layer serves as the projection. open_clip's would expect 576 inputs, but
    # timm's tower gives 1024.
    "mobilenetv3_small_100": timm_config("mobilenetv3_small_100", timm_proj=""),
    "mobilevit_s": timm_config("mobilevit_s", timm_pool=""),
    "efficientnet_b0": timm_config("efficientnet_b0", timm_pool=""),
    "resnet18": timm_config("resnet18", timm_pool=""),
    # These are for the demo, with images of 32 x 32 pixels and captions of up to 20 tokens. It uses
    # the first two, and you can try --student demo-vit.
    "demo-teacher": demo_config({"layers": [1, 1, 1, 1], "width": 12}, 64, 64),
    "demo-student": demo_config({"layers": [1, 1, 1, 1], "width": 8}, 64, 32),
    "demo-vit": demo_config({"layers": 2, "width": 64, "patch_size": 4}, 48, 32),
}


def add_architecture(config):
    """Register a configuration with open_clip. Returns the name by which open_clip can build it.

    Every configuration gets the same name and replaces the previous one, so build the model before
    you add another configuration.
    """
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= set(config):
        raise ValueError("the file needs embed_dim, vision_cfg and text_cfg")
    name = "clipkd-model"  # hides none of open_clip's own names
    with tempfile.TemporaryDirectory() as folder:  # open_clip reads new architectures from files
        Path(folder, f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder)
    return name


def check_name(name, pretrained):
    """Raises BadInput for a name that open_clip does not know, or weights that are not there."""
    known = open_clip.list_models()
    if name not in known:
        nearest = difflib.get_close_matches(name, known + list(STUDENTS), cutoff=0.3)
        raise BadInput(f"model {name} is unknown; near it are {', '.join(nearest)}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    is_tag = pretrained and open_clip.get_pretrained_cfg(name, pretrained)
    if pretrained and not is_tag and not os.path.isfile(pretrained):
        raise BadInput(f"model {name}: {pretrained} is not a file, nor one of its tags {tags}")


def warn_of_other_preprocessing(name, file):
    """Warn if one of open_clip's tags for this model has unusual preprocessing or activation.

    A file of weights does not say which mean, std and activation it was trained with.
    """
    usual = vars(PreprocessCfg())
    usual["quick_gelu"] = open_clip.get_model_config(name).get("quick_gelu", False)
    for tag in open_clip.list_pretrained_tags_by_model(name):
        wanted = open_clip.get_pretrained_cfg(name, tag)
        if any(wanted.get(key, value) != value for key, value in usual.items()):
            other = f"this model's tag {tag} has others, which a local-dir:FOLDER can name"
            say(f"warning: {file} gets the usual preprocessing and activation; {other}")
            return


def is_torchscript(file):
    """Whether the file is a TorchScript archive, like OpenAI's own, and not just weights."""
    if not zipfile.is_zipfile(file):
        return False
    return any("/code/" in name for name in zipfile.ZipFile(file).namelist())


def build_model(name, pretrained, frozen):
    """An open_clip model, its tokenizer and its configuration. See OpenClip for the arguments."""
    asked = f"model {name}, weights {pretrained}"
    known = {}  # what open_clip knows about the weights
    try:
        if name in STUDENTS:
            name = add_architecture(STUDENTS[name])
        elif name.endswith(".json"):
            name = add_architecture(json.loads(Path(name).read_text("utf-8")))
        elif os.path.isdir(name) and name not in open_clip.list_models():
            raise BadInput(f"model {name}: this is a folder, so write local-dir:{name}")
        elif ":" not in name:
            name = name.replace("/", "-")  # as in ViT-B/16
            check_name(name, pretrained)
            known = open_clip.get_pretrained_cfg(name, pretrained or "")
        is_file = pretrained is not None and not known  # if it is missing, open_clip complains
        quick_gelu = known.get("quick_gelu", False)  # OpenAI's activation
        net = open_clip.create_model(
            name,
            pretrained,
            require_pretrained=frozen,
            force_quick_gelu=quick_gelu,
            weights_only=not (is_file and is_torchscript(pretrained)),
        )
        tokenizer = open_clip.get_tokenizer(name)
        config = open_clip.get_model_config(name)
    except BadInput:
        raise
    except Exception as error:  # open_clip, timm and torch raise nearly anything on a bad file
        raise BadInput(f"{asked}: cannot be loaded: {error!r}") from error
    if quick_gelu:
        config["quick_gelu"] = True
    if "multimodal_cfg" in config and not frozen:
        raise BadInput(f"{asked}: a CoCa has a decoder, and no loss here trains it")
    if not all(parameter.isfinite().all() for parameter in net.parameters()):
        raise BadInput(f"{asked}: its weights are not finite (they have NaN or infinity)")
    if is_file:
        warn_of_other_preprocessing(name, pretrained)
    return net, tokenizer, config


class OpenClip:
    """An open_clip model (`net`) with its tokenizer, its configuration and its preprocessing.

    name: an open_clip name, local-dir:DIR or hf-hub:ORG/NAME; one of STUDENTS; or a FILE.json
    pretrained: one of open_clip's tags for this name, or a file of weights
    frozen: if true, the model must have weights, and they are not trained
    """

    def __init__(self, name, pretrained=None, device="cpu", frozen=False):
        if ":" in name:
            pretrained = None  # a folder or a repository has weights of its own
        self.net, self.tokenizer, self.config = build_model(name, pretrained, frozen)
        self.net.to(device).eval().requires_grad_(not frozen)
        if getattr(self.net, "logit_bias", None) is not None:
            self.net.logit_bias.requires_grad_(False)  # SigLIP's bias, which no loss here uses
        self.device = device
        self.dim = self.config["embed_dim"]  # D, the width of its embeddings
        self.skips_padding = can_skip_padding(self.net)
        self.preprocess_cfg = self.net.visual.preprocess_cfg  # size, mean, std, ...
        self.size = int(np.max(self.preprocess_cfg["size"]))
        self.mean = torch.tensor(self.preprocess_cfg["mean"], device=device).view(3, 1, 1)
        self.std = torch.tensor(self.preprocess_cfg["std"], device=device).view(3, 1, 1)
        blank = torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8, device=device)
        try:
            with torch.no_grad():
                self.net.encode_image(self.preprocess(blank))
        except AssertionError as error:  # a timm model insists on its own image size
            raise BadInput(f"model {name}: cannot encode an image: {error}") from error

    def preprocess(self, images):
        """uint8 [n, 3, S, S] on the device -> float [n, 3, H, W] as the image tower wants them."""
        size = self.preprocess_cfg["size"]
        images = v2.functional.resize(images, size, v2.InterpolationMode.BICUBIC)
        return (images.float() / 255 - self.mean) / self.std

    @torch.no_grad()
    def embed(self, images, tokens):
        """What a student learns from: embeddings of unit length of the images [n, D] and of the
        captions [n, D], and 1/temperature [].

        images: uint8 [n, 3, S, S]; tokens: captions as encode_text takes them
        """
        with autocast(images.device):
            img = self.net.encode_image(self.preprocess(images))
            txt = encode_text(self.net, tokens)
        return normalize(img.float()), normalize(txt.float()), self.net.logit_scale.exp()

    def recompute_activations(self):
        """Compute the forward pass again in the backward pass, to save memory.

        Batch norm in towers from timm then updates its statistics twice in a step.
        """
        self.net.set_grad_checkpointing()
        resnet = open_clip.modified_resnet.ModifiedResNet  # of RN50, RN101 and their relatives
        if isinstance(self.net.visual, resnet):
            say("warning: open_clip cannot do this for this image tower, so it saves little memory")

    def export(self, folder):
        """Write a folder that open_clip.create_model_and_transforms("local-dir:FOLDER") opens."""
        folder.mkdir(exist_ok=True)
        names = ("mean", "std", "interpolation", "resize_mode")
        preprocess_cfg = {name: self.preprocess_cfg[name] for name in names}
        config = {"model_cfg": self.config, "preprocess_cfg": preprocess_cfg}
        weights = {name: value.contiguous() for name, value in self.net.state_dict().items()}
        with replacing(folder / "open_clip_config.json") as file:
            file.write(json.dumps(config, indent=2).encode())
        with replacing(folder / "open_clip_model.safetensors") as file:
            file.write(safetensors.torch.save(weights))
        # A Hugging Face tokenizer must be saved. CLIP's own comes with open_clip.
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(folder)


def text_tower(net):
    """The module with the text tower's layers. In the plain CLIP class it is the net itself."""
    return getattr(net, "text", net)


def with_text_tower_of(teacher, student):
    """Build a new student from the student's image architecture and the teacher's text tower.

    The image tower is untrained. The text tower is a frozen copy, so captions have exactly the
    teacher's embeddings, and a search index built with the teacher stays usable. If the teacher
    uses OpenAI's activation, so does the image tower.
    """
    config = {**teacher.config, "vision_cfg": student.config["vision_cfg"]}
    student = OpenClip(add_architecture(config), device=student.device)
    student.net.train()
    text_tower(student.net).transformer.eval()  # it is frozen, so its dropout stays off
    weights = student.net.state_dict()
    not_text = ("visual.", "logit_scale")
    for name, value in teacher.net.state_dict().items():
        if not name.startswith(not_text):
            weights[name] = value
    student.net.load_state_dict(weights)
    for name, parameter in student.net.named_parameters():
        if not name.startswith(not_text):
            parameter.requires_grad_(False)
    student.tokenizer = teacher.tokenizer
    return student


def can_skip_padding(net):
    """Whether captions can be cut after their end token without changing their embeddings.

    In a causal tower no token sees later ones, so padding cannot change the output at the end
    token, which becomes the embedding. (A tower with a class token uses that token instead. And
    encode_text needs the projection to be a plain matrix.) Other towers get all of their tokens.
    """
    text = text_tower(net)
    pooling = getattr(text, "pool_type", getattr(text, "text_pool_type", None))
    is_causal = getattr(text, "attn_mask", None) is not None
    has_class_token = getattr(text, "cls_emb", None) is not None
    has_plain_projection = isinstance(getattr(text, "text_projection", None), nn.Parameter)
    return pooling == "argmax" and is_causal and has_plain_projection and not has_class_token


def cut_padding(tokens):
    """Split tokens [n, context], sorted by length, into parts [n_i, length_i] with less padding.

    Most of CLIP's 77 tokens are padding: a CC3M caption has 13 tokens on average. Each part is cut
    after its longest caption, with the length rounded up to a multiple of 16, which suits GPUs. A
    context as short as the demo's has little padding and stays in one part.
    """
    num_parts = 4 if tokens.shape[1] > 32 else 1
    parts = []
    for part in tokens.chunk(num_parts):
        longest = int(part.argmax(dim=1).max()) + 1  # the end token has the highest id
        parts.append(part[:, : 16 * math.ceil(longest / 16)].contiguous())
    return parts


def encode_text(net, parts):
    """Embeddings [n, D], not of unit length, of captions given as a list of parts [n_i, length_i].

    Parts of full length go through open_clip. Its plain CLIP class cannot encode shorter ones, so
    for those the loop takes the same steps itself, with the positions and the mask cut to their
    length. The embeddings are the same up to rounding.
    """
    text = text_tower(net)
    embeddings = []
    for tokens in parts:
        length = tokens.shape[1]
        if length == net.context_length:
            embeddings.append(net.encode_text(tokens))
            continue
        x = text.token_embedding(tokens)  # [n_i, length, width]
        x = x + text.positional_embedding[:length]
        x = text.transformer(x, attn_mask=text.attn_mask[:length, :length])
        x = text.ln_final(x)
        at_end = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=1)]  # [n_i, width]
        embeddings.append(at_end @ text.text_projection)
    return torch.cat(embeddings)


def encode_masked(net, images, ratio):
    """Embeddings [n, D], not of unit length, of images with the share `ratio` of each hidden.

    A ViT drops the hidden patches from its sequence. Other image towers get images in which they
    are blanked out.
    """

    def drop(module, inputs, patches):
        return kd.drop_patches(patches, ratio)

    with autocast(images.device):
        if not isinstance(net.visual, open_clip.transformer.VisionTransformer):
            return net.encode_image(kd.blank_patches(images, ratio))
        # What the hook returns takes the place of patch_dropout's own output. (patch_dropout could
        # drop patches itself, but it would make the CPU wait for the GPU.)
        with net.visual.patch_dropout.register_forward_hook(drop):
            return net.encode_image(images)


def has_bfloat16(device):
    """Whether this is an Ampere GPU or newer. Others use float32: float16 needs a loss scaler."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))


# --------------------------------------------------------------------------------------------------
# Data. If each of dozens of loader processes held the 12.9 million pairs of CC3M and CC12M, they
# would not fit into memory. So the processes share an index that is mapped from disk and has five
# numbers for each pair: which file it is in, the start and length of its text and, for a tar, the
# start and length of its image. (In a TSV the text names the image.) An image's location is
# (path, start, length), since it can be a file of its own or part of a tar.


def is_image(name):
    """Whether Pillow can open files with such a name."""
    suffix = os.path.splitext(name)[1].lower()
    return Image.registered_extensions().get(suffix) in Image.OPEN


def is_hidden(name):  # like the ._KEY.jpg that macOS puts into tars
    return os.path.basename(name).startswith(".")


def find_files(names):
    """The TSV, CSV and tar files that --train-data or --val-data stand for."""
    files = []
    for name in names:
        path = Path(name)
        found = [path]
        if path.is_dir():
            inside = [file for file in sorted(path.iterdir()) if not is_hidden(file.name)]
            found = [file for file in inside if file.suffix == ".tar"]
            others = [file.name for file in inside if file.suffix != ".tar"]
            if not found:
                raise BadInput(f"{name}: no .tar in this folder; list other images in a TSV or CSV")
            warn(name, "files that are not .tar are left out", others)
        if not found[0].is_file():
            raise BadInput(f"{name}: not found; expected a TSV, a CSV, a .tar or a folder of .tar")
        files += found
    for file in files:
        if file.suffix != ".tar":
            read_header(file)  # complains about a file of another kind
    return files


def warn(where, what, names):
    """Warn about these names: how many there are, and the first."""
    if names:
        say(f"warning: {where}: {len(names)} {what}; the first is {names[0]}")


@functools.lru_cache(maxsize=None)
def read_header(file):
    """The separator and the columns of a TSV or CSV file."""
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        header = lines.readline(10_000).strip("\r\n")
    separator = "\t" if "\t" in header else ","
    columns = next(csv.reader([header], delimiter=separator), [])
    if not {"filepath", "title"} <= set(columns):
        begins = f"its first line is {header[:100]}"
        raise BadInput(f"{file}: needs columns filepath and title; {begins}")
    return separator, columns


def index_file(file):
    """Where each pair of a file lies, int64 [pairs, 4], and notes for the user: {what: names}.

    The four numbers are the start and length of the text, then those of the image. In a TSV or CSV
    the text is a row, and the image is a file of its own. In a tar, as img2dataset writes it, the
    text is the member KEY.txt and the image is the member KEY.jpg.
    """
    if file.suffix == ".tar":
        return index_tar(file)
    with open(file, "rb") as lines:
        lengths = np.fromiter(map(len, lines), np.int64)
    index = np.zeros((len(lengths), 4), np.int64)
    index[:, 0] = lengths.cumsum() - lengths
    index[:, 1] = lengths
    is_pair = lengths > 2  # an empty line has at most two bytes
    is_pair[0] = False  # this is the header
    return index[is_pair], {}


def index_tar(file):
    """The same for a tar. If it is damaged, only the pairs before the damage are used."""
    texts, images, twice = {}, {}, []  # {key: (start, length)}, and repeated names
    key = ""
    # Where the last member ends. If reading fails it stays 0. A header lies there, so the check for
    # the final zeros fails too, as it should.
    end = 0
    try:
        with tarfile.open(file, "r:") as tar:  # uncompressed, so offsets hold in the file
            for member in tar:
                key, suffix = os.path.splitext(member.name)
                if is_hidden(member.name):
                    continue
                if suffix == ".txt":
                    found = texts
                elif is_image(member.name):
                    found = images
                else:
                    continue
                if key in found:
                    twice.append(member.name)
                found[key] = (member.offset_data, member.size)
            end = tar.offset
    except tarfile.TarError:
        texts.pop(key, None)  # the damage is in this pair
    with open(file, "rb") as data:
        data.seek(end)
        is_whole = data.read(512) == bytes(512)  # a tar ends with zeros
    index = [texts[key] + images[key] for key in texts if key in images]
    notes = {
        "captions without an image are left out": [key for key in texts if key not in images],
        "images without a caption are left out": [key for key in images if key not in texts],
        "names are duplicates, of which the last is used": twice,
    }
    if not is_whole:
        say(f"warning: {file}: it is damaged or cut off; only the pairs up to about {key} are used")
    return np.array(index, np.int64).reshape(-1, 4), notes


class FileIndexes(Dataset):
    """The indexes of files as a Dataset, so that loader processes can build them."""

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, number):
        return index_file(self.files[number])


def build_index(files, folder):
    """Build the index of all files and return its path.

    It is int64 [pairs, 5]: the number of the file, then the four numbers of index_file. For a large
    data set this takes minutes, so the index is kept, under a name that changes with the files.
    """
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime) for file in files]
    path = folder / f"{short_hash(stats)}.npy"
    if RANK == 0 and not path.exists():
        parts = []
        workers = min(len(files), available_cores())
        loader = DataLoader(
            FileIndexes(files), batch_size=None, num_workers=workers, worker_init_fn=ignore_ctrl_c
        )
        for number, (index, notes) in enumerate(tqdm(loader, "index", disable=HIDE_BAR)):
            for what, names in notes.items():
                warn(files[number], what, names)
            index = index.numpy()  # the loader turned it into a tensor
            parts.append(np.insert(index, 0, number, axis=1))
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.save(file, np.concatenate(parts))
    path = from_process_0(path)
    if not path.exists():
        raise BadInput(f"{path} is not there: on several machines all must see the same --out")
    return path


@functools.lru_cache(maxsize=None)
def open_index(path):
    return np.load(path, mmap_mode="r")  # all processes share these pages of memory


def read_bytes(file, start, length):
    with open(file, "rb") as data:
        data.seek(start)
        return data.read(length)


def read_pair(file, start, length, image_start, image_length):
    """The location of the image, (path, start, length), and its captions.

    In a tar each line of the text is a caption. Raises ValueError if there is no caption at all.
    """
    text = read_bytes(file, start, length).decode("utf-8")
    location = (file, image_start, image_length)
    captions = text.splitlines()
    if file.suffix != ".tar":
        separator, columns = read_header(file)
        cells = next(csv.reader([text.strip("\r\n")], delimiter=separator, strict=True))
        if len(cells) != len(columns):
            raise ValueError(f"{len(cells)} instead of {len(columns)} cells in {text[:100]!r}")
        row = dict(zip(columns, cells))
        location = (file.parent / row["filepath"], 0, -1)  # -1 reads the whole file
        captions = [row["title"]]
    captions = [caption for caption in captions if caption.strip()]
    if not captions:
        raise ValueError(f"no caption in {text[:100]!r}")
    # No tokenizer keeps more than 1000 characters, and a very long word can take minutes to encode.
    return location, [caption[:1000] for caption in captions]


def read_image(path, start, length):
    """An image in RGB. Errors become ValueError: Pillow raises nearly anything on a bad file."""
    try:
        image = Image.open(io.BytesIO(read_bytes(path, start, length)))
        if image.mode[0] in "IF":  # modes I;16, I and F, such as 16-bit PNGs have
            image = to_8_bits(image)
        return image.convert("RGB")
    except Exception as error:
        raise ValueError(f"{path}: this image cannot be read: {error}") from error


def to_8_bits(image):
    """For images of 16 or 32 bits a pixel, which Pillow's own conversion would clip to white."""
    pixels = np.asarray(image, dtype=np.float64)
    highest = 65535
    if image.mode == "F":  # floats, which are stored as 0 to 1 or as 0 to 255
        highest = 255 if pixels.max() > 1 else 1
    pixels = np.rint(255 / highest * pixels).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


class Pairs(Dataset):
    """Training pairs. pairs[keys] is a whole batch, where a key is (epoch, number of the pair):

    - the images, uint8 [n, 3, S, S]
    - their captions as tokens for the student, a list of parts [n_i, length_i]
    - their captions as tokens for the teacher, in the same order
    - a list of messages about pairs that could not be read

    Teacher and student see the same random crop, since FD compares their embeddings of it. The crop
    depends only on (seed, epoch, number), so neither the number of loader processes nor a restart
    changes what a run sees.
    """

    def __init__(self, files, student, teacher, seed, folder):
        self.files = files
        self.seed = seed
        models = [student, teacher or student]
        self.size = max(model.size for model in models)
        self.tokenizers = [model.tokenizer for model in models]
        self.skips_padding = [model.skips_padding for model in models]
        self.index = build_index(files, folder)
        if len(self) == 0:
            raise BadInput(f"{files[0]}: there is no pair of an image and a caption in it")
        self.load_or_replace(0, 0)  # complains now if nothing can be read

    def __len__(self):
        return len(open_index(self.index))

    def __getitem__(self, keys):
        items = [self.load_or_replace(epoch, number) for epoch, number in keys]
        images, captions, problems = zip(*items)

        # Sort images and captions by the captions' lengths, so that cut_padding can cut each part
        # short. The end token has the highest id, so argmax finds where a caption ends. If the
        # teacher has another tokenizer, its parts may keep some padding, but they never lose a
        # token. If the student's tokenizer does not end captions like this, the order is arbitrary,
        # and its tokens are not cut.
        tokens_s, tokens_t = [tokenize(list(captions)) for tokenize in self.tokenizers]
        order = tokens_s.argmax(dim=1).argsort(stable=True)
        skip_s, skip_t = self.skips_padding
        parts_s = cut_padding(tokens_s[order]) if skip_s else [tokens_s[order]]
        parts_t = cut_padding(tokens_t[order]) if skip_t else [tokens_t[order]]
        problems = [problem for problem in problems if problem]
        return torch.stack(images)[order], parts_s, parts_t, problems

    def load_or_replace(self, epoch, number):
        """Image, caption and, if the pair had to be replaced, the reason.

        One broken file must not end a run that takes days, so another pair takes its place. It is
        drawn at random, since broken files often come in a row, and this draw too depends only on
        (seed, epoch, number).
        """
        problem = ""
        drawn = number
        for attempt in range(1000):
            try:
                return *self.load(epoch, drawn), problem
            except (ValueError, OSError, csv.Error) as error:
                problem = problem or f"pair {number}: {error}"
            drawn = hash((self.seed, epoch, number, attempt)) % len(self)
        hint = "a filepath is absolute, or relative to the folder of its file"
        raise BadInput(f"--train-data: 1000 pairs in a row cannot be read: {problem}; {hint}")

    def load(self, epoch, number):
        """A random crop, uint8 [3, S, S], and a caption."""
        file_number, *row = open_index(self.index)[number].tolist()
        location, captions = read_pair(self.files[file_number], *row)
        pixels = torch.from_numpy(np.array(read_image(*location)))
        pixels = pixels.permute(2, 0, 1)  # [3, height, width]
        # torchvision draws the crop from the CPU's generator. (torch.manual_seed would seed the
        # GPUs too, which takes as long as decoding a small image.)
        seed = hash((self.seed, epoch, number))
        torch.default_generator.manual_seed(seed)
        box = v2.RandomResizedCrop.get_params(pixels, scale=(0.9, 1), ratio=(3 / 4, 4 / 3))
        size = [self.size, self.size]
        crop = v2.functional.resized_crop(pixels, *box, size, v2.InterpolationMode.BICUBIC)
        return crop, captions[seed % len(captions)]


def count_steps(pairs, batch_size):
    """The number of steps in an epoch. An incomplete last batch is dropped."""
    if len(pairs) < batch_size:
        raise BadInput(f"--batch-size {batch_size}: there are only {len(pairs)} pairs to train on")
    return len(pairs) // batch_size


def make_loader(pairs, args, first_step, steps, device):
    """The batches of the steps from first_step on."""
    if first_step == steps:
        say("this run has already finished; --eval-only can score its student on other data")
    return DataLoader(
        pairs,
        batch_size=None,  # the sampler asks for whole batches
        sampler=batch_order(len(pairs), args.batch_size, args.seed, first_step, steps),
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_ctrl_c,
    )


def batch_order(num_pairs, batch_size, seed, first_step, steps):
    """For each step from first_step on, the keys (epoch, number) of this process's pairs."""
    steps_per_epoch = num_pairs // batch_size
    share = batch_size // WORLD
    permutation = None
    for step in range(first_step, steps):
        epoch, step_of_epoch = divmod(step, steps_per_epoch)
        if permutation is None or step_of_epoch == 0:  # each epoch has an order of its own
            generator = torch.Generator().manual_seed(hash((seed, epoch)))
            permutation = torch.randperm(num_pairs, generator=generator)
        begin = step_of_epoch * batch_size + RANK * share
        yield [(epoch, number) for number in permutation[begin : begin + share].tolist()]


def move(batch, device):
    """Move tensors, including those in lists, to the device without waiting for it."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, (list, tuple)):
        return [move(item, device) for item in batch]
    return batch


def ignore_ctrl_c(worker=None):
    """Ctrl-C reaches all processes. Loaders ignore it, and stop when the main process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --------------------------------------------------------------------------------------------------
# Processes. torchrun starts one for each GPU. Together they compute the gradient that one process
# would compute on the whole batch, because gather (in losses.py) and DDP exchange embeddings and
# gradients. Two things remain separate: batch norm sees only the n pairs of its process, and each
# process draws its own masks for MFD.

# torchrun tells each process its rank and the number of processes. Without it there is one process.
RANK = int(os.environ.get("RANK") or 0)
WORLD = int(os.environ.get("WORLD_SIZE") or 1)
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # those on this machine
HIDE_BAR = True if RANK > 0 else None  # None: tqdm shows a progress bar if there is a terminal


def setup():
    """Join the other processes. Returns the device of this one."""
    if WORLD > 1 or RANK > 0:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise BadInput(f"RANK or WORLD_SIZE is set, but {name} is not; start with torchrun")
    gpus = torch.cuda.device_count()
    device = torch.device("cpu")
    if gpus:
        if LOCAL_WORLD > gpus:
            raise BadInput(f"{LOCAL_WORLD} processes for {gpus} GPUs; use --nproc_per_node={gpus}")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))
        torch.cuda.set_device(device)
    if WORLD > 1:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            timeout=timedelta(hours=3),  # process 0 may index a data set for that long
            device_id=device if gpus else None,
        )
    return device


def from_process_0(value):
    """Broadcasts the value of process 0. The others wait for it."""
    values = [value]
    if WORLD > 1:
        dist.broadcast_object_list(values)
    return values[0]


def wait_for_process_0():
    from_process_0(None)


def sum_over_processes(number):
    number = torch.tensor(number)
    if WORLD > 1:
        dist.all_reduce(number)
    return number.item()


def mean_over_processes(losses):
    """{name: mean as a float}"""
    means = torch.stack(list(losses.values())).detach()
    if WORLD > 1:
        dist.all_reduce(means)
        means /= WORLD
    return dict(zip(losses, means.tolist()))


def say(message):
    """Print a message to stderr, once rather than from every process."""
    if RANK == 0:
        tqdm.write(f"clipkd.py: {message}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# Evaluation, with open_clip's preprocessing, its class names and its prompts. Each process embeds a
# share of the images, and the scores are the same as with one process.


@dataclass
class ClassFolders:
    """Images sorted into one folder per class."""

    images: list  # their locations
    labels: list  # each image's class, as a number
    class_names: list
    templates: list  # of prompts: "a photo of a {}"


def read_class_folders(root):
    if not os.path.isdir(root):
        raise BadInput(f"--zeroshot {root}: there is no such folder")
    inside = sorted(Path(root).iterdir())
    folders = [path for path in inside if path.is_dir() and not is_hidden(path.name)]
    if is_imagenet_v2([folder.name for folder in folders]):
        folders.sort(key=lambda folder: int(folder.name))
    names = [folder.name for folder in folders]
    images, labels, others = [], [], []
    for label, folder in enumerate(folders):
        for file in sorted(folder.iterdir()):
            if is_image(file.name) and not is_hidden(file.name):
                images.append((file, 0, -1))
                labels.append(label)
            elif not is_hidden(file.name):
                others.append(file)
    if not images:
        raise BadInput(f"--zeroshot {root}: there are no class folders with images in it")
    warn(root, "files that are not images are left out", others)
    return ClassFolders(images, labels, *read_class_names(root, names))


def is_imagenet_v2(folders):
    """Whether these are ImageNet-V2's, 0 to 999. Sort them as numbers: as text 10 precedes 2."""
    return set(folders) == {str(number) for number in range(1000)}


def read_class_names(root, folders):
    """The names of the classes, and templates of prompts about them."""
    imagenet = open_clip.IMAGENET_CLASSNAMES
    wnids = ImageNetInfo().label_names()
    if is_imagenet_v2(folders):
        return imagenet, open_clip.OPENAI_IMAGENET_TEMPLATES
    if not any(re.fullmatch(r"n\d{8}", folder) for folder in folders):
        return [folder.replace("_", " ") for folder in folders], ["a photo of a {}"]
    # So this is ImageNet, or a part of it like ImageNet-R.
    unknown = sorted(set(folders) - set(wnids))
    if unknown:
        problem = f"{unknown[0]} is not an ImageNet class, although other folders are"
        raise BadInput(f"--zeroshot {root}: {problem}")
    names = [imagenet[wnids.index(folder)] for folder in folders]
    return names, open_clip.OPENAI_IMAGENET_TEMPLATES


@dataclass
class CaptionedImages:
    """Images without duplicates, and all of their captions."""

    images: list  # their locations
    captions: list
    image_of_caption: list  # which image each caption belongs to, as a number
    first_caption: list  # which caption is the first of each image, as a number


def read_captioned_images(name):
    data = CaptionedImages([], [], [], [])
    numbers = {}
    for file in find_files([name]):
        index, notes = index_file(file)
        for what, names in notes.items():
            warn(file, what, names)
        for row in index.tolist():
            try:
                image, captions = read_pair(file, *row)
                if not image[0].is_file():
                    raise ValueError(f"there is no file {image[0]}")
            except (ValueError, csv.Error) as error:
                raise BadInput(f"--val-data {name}: {error}") from error
            if image not in numbers:
                numbers[image] = len(data.images)
                data.images.append(image)
                data.first_caption.append(len(data.captions))
            data.captions += captions
            data.image_of_caption += [numbers[image]] * len(captions)
    if not data.images:
        raise BadInput(f"--val-data {name}: there is no pair of an image and a caption in it")
    return data


def read_evaluations(args):
    """The data of --zeroshot and of --val-data, each as {name: data}."""
    zeroshot, retrieval = {}, {}
    for value in args.zeroshot:
        name, path = split_name(value, zeroshot)
        zeroshot[name] = read_class_folders(path)
    for value in args.val_data:
        name, path = split_name(value, retrieval)
        retrieval[name] = read_captioned_images(path)
    return zeroshot, retrieval


def split_name(value, others):
    """Split NAME=PATH into name and path. A PATH alone is its own name."""
    name, equals, path = value.partition("=")
    if not equals or os.path.exists(value):
        name, path = value, value
    if name in others:
        raise BadInput(f"{value}: another set has the name {name} already; give this one a NAME=")
    return name, path


class ImageFiles(Dataset):
    """Images as open_clip preprocesses them for evaluation, [3, H, W]."""

    def __init__(self, locations, transform):
        self.locations = locations
        self.transform = transform

    def __len__(self):
        return len(self.locations)

    def __getitem__(self, number):
        try:
            return self.transform(read_image(*self.locations[number]))
        except ValueError as error:  # there is no replacement here: it would change the scores
            raise BadInput(str(error)) from error


@torch.no_grad()
def embed_images(model, locations, workers=0):
    """Embeddings [len(locations), D] of unit length, on every process. Each computes a share."""
    transform = image_transform_v2(PreprocessCfg(**model.preprocess_cfg), is_train=False)
    share = range(RANK, len(locations), WORLD)
    images = Subset(ImageFiles(locations, transform), share)
    loader = DataLoader(images, 256, num_workers=workers, worker_init_fn=ignore_ctrl_c)
    embeddings = torch.zeros(len(locations), model.dim, device=model.device)
    done = 0
    for batch in tqdm(loader, "embed", leave=False, disable=HIDE_BAR):
        numbers = list(share[done : done + len(batch)])
        encoded = model.net.encode_image(batch.to(model.device))
        embeddings[numbers] = normalize(encoded.float())
        done += len(batch)
    if WORLD > 1:
        dist.all_reduce(embeddings)  # each of them is zero on all processes but one
    return embeddings


@torch.no_grad()
def embed_texts(model, texts):
    """Embeddings [len(texts), D] of unit length."""
    embeddings = []
    for begin in range(0, len(texts), 256):
        tokens = model.tokenizer(texts[begin : begin + 256]).to(model.device)
        embeddings.append(normalize(model.net.encode_text(tokens).float()))
    return torch.cat(embeddings)


def zero_shot(model, data, workers):
    """Top-1 accuracy in percent: how many images are nearest to the prompts of their class."""
    classifier = open_clip.build_zero_shot_classifier(
        model.net, model.tokenizer, data.class_names, data.templates, device=model.device
    )  # [D, classes]
    nearest = (embed_images(model, data.images, workers) @ classifier).argmax(dim=1)
    right = nearest.cpu() == torch.tensor(data.labels)
    return 100 * right.sum().item() / len(right)


def recalls(queries, keys, query_images, key_images):
    """{k: percent of queries [Q, D] with a key [K, D] of the same image among the k nearest}.

    query_images [Q] and key_images [K] say which image each of them belongs to.
    """
    hits = []
    for some, images in zip(queries.split(1024), query_images.split(1024)):  # to save memory
        nearest = (some @ keys.T).topk(min(10, len(keys))).indices  # [1024, 10]
        hits.append(images[:, None] == key_images[nearest])
    hits = torch.cat(hits)
    return {k: 100 * hits[:, :k].any(dim=1).sum().item() / len(hits) for k in (1, 5, 10)}


def retrieval_scores(model, data, workers):
    """Recall at 1, 5 and 10 in percent, from images to texts (I2T) and from texts to images (T2I).

    Every caption of an image counts as right. The paper's tables use only the first caption of each
    image, so there are two scores for that too.
    """
    img = embed_images(model, data.images, workers)
    txt = embed_texts(model, data.captions)
    img_numbers = torch.arange(len(img), device=model.device)
    txt_numbers = torch.tensor(data.image_of_caption, device=model.device)
    scores = {}
    for k, recall in recalls(img, txt, img_numbers, txt_numbers).items():
        scores[f"I2T R@{k}"] = recall
    for k, recall in recalls(txt, img, txt_numbers, img_numbers).items():
        scores[f"T2I R@{k}"] = recall
    if len(txt) > len(img):
        txt = txt[data.first_caption]
        scores["first-caption I2T R@1"] = recalls(img, txt, img_numbers, img_numbers)[1]
        scores["first-caption T2I R@1"] = recalls(txt, img, img_numbers, img_numbers)[1]
    return scores


def evaluate(model, zeroshot, retrieval, workers=0):
    """{name of the set: {metric: percent}}. The model is in the same mode afterwards."""
    in_training = [module for module in model.net.modules() if module.training]
    model.net.eval()
    if WORLD > 1:
        # The last step left each process with batch norm statistics of its own.
        for buffer in model.net.buffers():
            dist.broadcast(buffer, 0)
    scores = {}
    for name, data in zeroshot.items():
        scores[name] = {"top-1": zero_shot(model, data, workers)}
    for name, data in retrieval.items():
        scores.setdefault(name, {})  # one name may stand for both, as in the demo
        scores[name].update(retrieval_scores(model, data, workers))
    for module in in_training:
        module.training = True
    return scores


# --------------------------------------------------------------------------------------------------
# The folder of a run. A run can be killed at any moment, so a file is written under another name
# and then renamed: no file is ever a mixture of old and new. The checkpoint is written last. A run
# that continues from it removes later lines from the log and does those steps again.

# A run continues only if these flags and all --lambda-* have the same values as before.
RECIPE = ("student", "student_pretrained", "teacher", "teacher_pretrained", "keep_teacher_text")
RECIPE += ("mask_ratio", "epochs", "batch_size", "lr", "weight_decay", "warmup", "seed")


@contextmanager
def replacing(path):
    """Opens a file that takes the place of `path` once all of it is on the disk."""
    with open(f"{path}.tmp", "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


@contextmanager
def locked(folder):
    """Makes the folder, and raises BadInput if another run is using it.

    SQLite can lock a file on every operating system. Loaders do not inherit such a lock, and it is
    released when its process ends, however that happens.
    """
    folder = Path(folder)
    problem = lock = None
    if RANK == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = sqlite3.connect(folder / "lock", timeout=0, isolation_level=None)
            lock.execute("PRAGMA journal_mode = MEMORY")
            lock.execute("BEGIN EXCLUSIVE")
        except (OSError, sqlite3.Error) as error:
            problem = f"--out {folder} cannot be used or locked ({error}); give another --out"
            if "is locked" in str(error):
                problem = f"--out {folder}: another run is using it; give another --out"
    problem = from_process_0(problem)
    if problem:
        raise BadInput(problem)
    try:
        yield folder
    finally:
        if lock:
            lock.close()


def get_recipe(args, files):
    """{name: value} of what must stay the same when a run is continued."""
    data = [(file.name, file.stat().st_size) for file in files]
    recipe = {"--train-data (as a hash)": short_hash(data)}
    for name, value in vars(args).items():
        if name in RECIPE or name.startswith("lambda_"):
            recipe[f"--{name.replace('_', '-')}"] = value
    return recipe


def short_hash(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def save(out, student, distiller, optimizer, recipe, progress, result, log):
    if RANK == 0:
        student.export(out / "student")
        state = {"recipe": recipe, "progress": progress, "result": result, "log_size": log.size()}
        state["distiller"] = distiller.state_dict()
        state["optimizer"] = optimizer.state_dict()
        with replacing(out / "checkpoint.pt") as file:
            torch.save(state, file)
    wait_for_process_0()


def restore(out, recipe, distiller, optimizer):
    """Load the last checkpoint, if there is one, into distiller and optimizer.

    Returns the progress, the last evaluation and the size of the log at that point.
    """
    path = out / "checkpoint.pt"
    if not path.exists():
        return {"step": 0, "seconds": 0.0, "data_wait": 0.0, "skipped": 0}, None, 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["recipe"]
    except Exception as error:  # torch raises nearly anything on a damaged file
        raise BadInput(f"{path}: cannot be read: {error!r}; give another --out") from error
    for name in {**before, **recipe}:
        if before.get(name) != recipe.get(name):
            change = f"{name} was {before.get(name)} and is {recipe.get(name)} now"
            raise BadInput(f"{path} belongs to another run: {change}; give another --out")
    distiller.load_state_dict(state["distiller"])
    optimizer.load_state_dict(state["optimizer"])
    say(f"{out}: continues after step {state['progress']['step']}")
    return state["progress"], state["result"], state["log_size"]


def check_finite(means, distiller, step):
    """Ends the run before NaN or infinity is saved."""
    weights = [parameter.isfinite().all() for parameter in distiller.parameters()]
    if not math.isfinite(means["total"]) or not torch.stack(weights).all():
        advice = "try a lower --lr or other lambdas, with another --out"
        problem = f"at step {step} the losses or the weights are not finite: {means}"
        raise BadInput(f"{problem}; {advice}")


class Log:
    """Writes JSON objects to log.jsonl, one per line, in process 0 only."""

    def __init__(self, path, size, args):
        self.file = None
        if RANK == 0:
            self.file = open(path, "ab")
            if size < self.file.tell():
                self.file.truncate(size)  # lines after the last checkpoint are written again
            if size == 0:
                self.write({"args": vars(args), "processes": WORLD, "torch": torch.__version__})

    def write(self, record):
        """Returns the record."""
        if self.file:
            self.file.write(json.dumps(record).encode() + b"\n")
            self.file.flush()
        return record

    def size(self):
        return self.file.tell()


def show(bar, step, steps, total, skipped, problems):
    """Show the loss beside the progress bar. Without a bar, print a line to stderr instead."""
    status = f"loss {total:.3f}"
    if skipped:
        status += f", {skipped} pairs were replaced"
    if problems:
        say(f"warning: a pair could not be read and was replaced: {problems[0]}")
    if bar.disable:
        say(f"step {step} of {steps}: {status}")
    else:
        bar.set_postfix_str(status)


# --------------------------------------------------------------------------------------------------
# The demo: Table 5 of the paper in miniature. The teacher learns from many clean pairs, the
# students from fewer and noisier ones. Their world is made of coloured letters. Some combinations
# of colour and letter are held out, which means that no model sees them in training.

DEMO = {
    "student": "demo-student",
    "teacher": "demo-teacher",
    "teacher_pretrained": None,
    "epochs": 16,
    "batch_size": 64,
    "lambda_fd": 250.0,  # 2000 * 64 / 512, since the demo's width is 64
    "eval_every": 0,
}
LOSSES = ("clip", "crd", "fd", "mfd", "gd", "icl", "afd")
TEACHER_EPOCHS = 3
TEACHER_PAIRS = 20_000
STUDENT_PAIRS = 2_000
COLOURS = "red green blue yellow orange purple pink cyan brown olive".split()
LETTERS = "C E H L O S T V X Z".split()
SIZES = {"small": 20, "large": 28}  # of the font
PLACES = {
    "in the middle": (16, 16),  # x and y of the letter's centre
    "in the top left": (11, 11),
    "in the top right": (21, 11),
    "in the bottom left": (11, 21),
    "in the bottom right": (21, 21),
}
GROUNDS = "black gray white navy".split()


def draw(colour, letter, size, place, ground, random):
    """Draw an image of 32 x 32 pixels, with a random shift, size, rotation and noise."""
    image = Image.new("RGB", (32, 32), ground)
    centre = tuple(PLACES[place] + random.uniform(-1, 1, 2))
    font = ImageFont.load_default(SIZES[size] + random.uniform(-2, 2))
    ImageDraw.Draw(image).text(centre, letter, colour, font, anchor="mm", stroke_width=1)
    angle = random.uniform(-8, 8)
    image = image.rotate(angle, Image.Resampling.BILINEAR, center=centre, fillcolor=ground)
    pixels = np.array(image) + random.uniform(-12, 12, (32, 32, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def describe(colour, letter, size, place, ground, complete, random):
    """A caption. Unless `complete` is true it may leave things out, like captions on the web."""

    def maybe(words):
        chance = 1 if complete else 0.6
        return words if random.random() < chance else ""

    colour = maybe(colour)
    size = maybe(size)
    place = maybe(place)
    ground = maybe(f"on a {ground} background")
    start = random.choice(["a", "a photo of a", "a picture of a"])
    words = f"{start} {size} {colour} {letter} {place} {ground}".split()
    return " ".join(words)


def write_set(folder, things, random, complete=False, share_wrong=0, seen=None):
    """Write images of things into class folders, and a TSV beside them with their captions.

    A share `share_wrong` of the captions name the colour and letter of a random seen thing.
    """
    for colour, letter in itertools.product(COLOURS, LETTERS):  # every set has all 100 classes
        (folder / f"{colour} {letter}").mkdir(parents=True, exist_ok=True)
    lines = ["filepath\ttitle"]
    for number, (colour, letter, size, place, ground) in enumerate(things):
        file = f"{colour} {letter}/{number:05d}.jpg"
        draw(colour, letter, size, place, ground, random).save(folder / file, quality=90)
        if random.random() < share_wrong:
            colour, letter = random.choice(seen)[:2]
        caption = describe(colour, letter, size, place, ground, complete, random)
        lines.append(f"{folder.name}/{file}\t{caption}")
    folder.with_suffix(".tsv").write_text("\n".join(lines))


def make_world(folder, seed):
    """Write four sets: for the teacher, for the students, and two to test on."""
    random = np.random.default_rng(seed)
    held_out = set()  # two letters in each colour, and so each letter in two colours
    for i, colour in enumerate(COLOURS):
        for j, letter in enumerate(LETTERS):
            if (i + 3 * j) % 5 == 0:
                held_out.add((colour, letter))
    things = list(itertools.product(COLOURS, LETTERS, SIZES, PLACES, GROUNDS))  # 4000
    seen = [thing for thing in things if thing[:2] not in held_out]
    unseen = [thing for thing in things if thing[:2] in held_out]
    for_teacher = random.choice(seen, TEACHER_PAIRS)
    for_students = random.choice(seen, STUDENT_PAIRS)
    test_seen = random.permutation(seen)[:1000]
    test_unseen = random.permutation(unseen)[:500]

    temporary = folder.with_suffix(".tmp")  # renamed once it is complete
    write_set(temporary / "teacher", for_teacher, random)
    write_set(temporary / "students", for_students, random, share_wrong=0.1, seen=seen)
    write_set(temporary / "seen", test_seen, random, complete=True)
    write_set(temporary / "held-out", test_unseen, random, complete=True)
    temporary.rename(folder)


def demo(args, device, distiller_class):
    """Train a teacher, a student alone, and the same student with CLIP-KD. Prints a table."""
    if device.type == "cpu":
        torch.set_num_threads(max(1, available_cores() // 2))  # the other half loads images
    root = Path(args.out, f"seed{args.seed}")
    with locked(root):
        if RANK == 0 and not (root / "data").exists():
            make_world(root / "data", args.seed)
        wait_for_process_0()

    args.train_data = [f"{root}/data/students.tsv"]
    args.val_data = [f"seen={root}/data/seen.tsv"]
    args.zeroshot = [f"seen={root}/data/seen", f"held-out={root}/data/held-out"]
    alone = {f"lambda_{name}": 0 for name in get_lambdas(args)}
    alone["lambda_clip"] = 1
    as_teacher = {"student": args.teacher, "student_pretrained": None, "epochs": TEACHER_EPOCHS}
    as_teacher["train_data"] = [f"{root}/data/teacher.tsv"]
    method = "CLIP-KD" if distiller_class is Distiller else distiller_class.__name__
    runs = {
        "teacher": {**alone, **as_teacher},  # it learns as a student alone would
        "student alone": alone,
        # The teacher was the student of its own run.
        f"student + {method}": {"teacher": f"local-dir:{root}/teacher/student"},
    }
    columns = "zero-shot | held-out | image to text R@1 | text to image R@1 | parameters | training"
    table = [f"| | {columns} |", "|---" * 7 + "|"]
    for name, changes in runs.items():
        out = f"{root}/{name.lower().replace(' + ', '-').replace(' ', '-')}"
        run_args = argparse.Namespace(**{**vars(args), **changes, "out": out})
        # A subclass may need a teacher for its losses, and the first two runs have none.
        is_distilled = "teacher" in changes
        record = train(run_args, device, distiller_class if is_distilled else Distiller)
        seen = record["eval"]["seen"]
        held_out = record["eval"]["held-out"]
        row = f"| {name} | {seen['top-1']:.1f} | {held_out['top-1']:.1f} "
        row += f"| {seen['I2T R@1']:.1f} | {seen['T2I R@1']:.1f} "
        row += f"| {record['parameters'] / 1e6:.1f} M | {record['seconds']:.0f} s |"
        table.append(row)
    if RANK == 0:
        print("", *table, sep="\n")


# --------------------------------------------------------------------------------------------------
# The program


def print_scores(scores):
    if RANK == 0:
        for name, metrics in scores.items():
            cells = [f"{metric} {value:.4g}" for metric, value in metrics.items()]
            print(f"{name}: {', '.join(cells)}")


def main(distiller_class=Distiller):
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns that a new model has no weights
    warnings.filterwarnings("ignore", module="PIL")  # odd images are read as well as they can be
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # an ASCII terminal can print any name
    args = get_args(distiller_class=distiller_class)
    device = setup()
    if args.demo:
        demo(args, device, distiller_class)
    elif args.eval_only:
        zeroshot, retrieval = read_evaluations(args)
        student = OpenClip(args.student, args.student_pretrained, device, frozen=True)
        print_scores(evaluate(student, zeroshot, retrieval, args.workers))
    else:
        record = train(args, device, distiller_class)
        print_scores(record["eval"])
        say(f"the student is in {args.out}/student")
    if WORLD > 1:
        dist.barrier()  # gloo may abort a process whose peers have left
        dist.destroy_process_group()


def end_with(error):
    """Tell the user in one line and return the exit code. Only a bug keeps its traceback."""
    if RANK > 0:
        time.sleep(5)  # if process 0 fails too, it reports why, and torchrun ends this process
    if isinstance(error, KeyboardInterrupt):
        say("stopped; the same command continues from its last checkpoint.pt, if it has one")
        return 130
    is_lost_process = isinstance(error, ConnectionError)
    if not isinstance(error, (BadInput, OSError)) or is_lost_process:
        raise error
    message = str(error).split("BadInput: ")[-1]  # a loader process puts its traceback before it
    message = " ".join(message.split())
    if len(message) > 1000:
        message = f"{message[:700]} ... {message[-200:]}"
    print(f"clipkd.py: error: {message}", file=sys.stderr)
    return 2


def run(distiller_class=Distiller):
    """The whole program, for a script of your own too: flags, training, scores, an exit code."""
    try:
        main(distiller_class)
    except BaseException as error:
        sys.exit(end_with(error))


if __name__ == "__main__":
    run()
