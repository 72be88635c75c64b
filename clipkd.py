"""Distil a CLIP teacher into a small CLIP student with the losses of CLIP-KD (CVPR 2024, arXiv 2307.12732).

    python clipkd.py                                                    # demo: a teacher and two students
    torchrun --nproc_per_node=8 clipkd.py --train-data cc3m.tsv cc12m/  # the paper's recipe
    python clipkd.py --eval-only --student local-dir:out/student --zeroshot imagenet/val --val-data coco.tsv

Read it from the top: the flags, the method (Distiller), one training step and the loop. Then comes what they
stand on: models, data, processes, evaluation, the run's folder; last the demo. The losses are in losses.py.

A run writes into --out: log.jsonl (a JSON object a line), checkpoint.pt (the same command resumes from it),
and student/ (open_clip loads it as local-dir:out/student).
Shapes: n = pairs on this process, N = pairs in the whole batch, D_s, D_t = widths of embeddings, the rows.
"""

import argparse
import contextlib
import csv
import difflib
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
from datetime import timedelta
from functools import lru_cache, partial
from multiprocessing.pool import Pool, ThreadPool
from pathlib import Path

import numpy as np
import open_clip
import safetensors.torch
import torch
import torch.distributed as dist
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import VisionTransformer
from PIL import Image, ImageDraw, ImageFont
from timm.data import ImageNetInfo
from torch import nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

import losses
from losses import afd_loss, clip_loss, crd_loss, fd_loss, gather, gd_loss, icl_loss, mfd_loss

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
LOSSES = ("clip", "crd", "fd", "mfd", "gd", "icl", "afd")  # all but the first need a teacher
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets these
LOCAL_RANK, LOCAL_WORLD = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class BadInput(Exception):
    """A mistake in a flag or a file. Its message is all the user sees: what is wrong, where, what to do."""


def need(condition, message):
    if not condition:
        raise BadInput(message)


@contextlib.contextmanager
def explain(message, hint=""):
    """Whatever fails inside ends as one line: message: reason; hint."""
    try:
        yield
    except Exception as error:  # open_clip, Pillow and torch raise nearly anything on a bad file
        reason = " ".join((str(error) or repr(error)).split())[:500]
        raise BadInput("; ".join(filter(None, (f"{message}: {reason}", hint)))) from error


# ---- Flags. With --train-data and no other flag it is the paper's recipe (Sec. 4.1); without it, the demo.
def get_args(argv=None):
    usage = "clipkd.py [--flag ...]   (without --train-data: a demo on pictures that it draws)"
    parser = argparse.ArgumentParser(None, usage, __doc__.splitlines()[0], allow_abbrev=False)
    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--train-data", nargs="+", metavar="FILE", help="TSV, CSV (filepath, title), tars, folders of tars")
    add("--val-data", nargs="+", default=[], metavar="[NAME=]FILE", help="retrieval: as --train-data")
    add("--zeroshot", nargs="+", default=[], metavar="[NAME=]DIR", help="folders of class folders")
    add("--workers", type=int, default=min(8, CORES // LOCAL_WORLD // 2), help="(half the cores, at most 8)")
    forms = "NAME, NAME:TAG, NAME:FILE, NAME:TAG=FILE, local-dir:DIR, hf-hub:ORG/NAME, or a FILE.json"
    add = parser.add_argument_group("models", forms).add_argument
    add("--student", default="ViT-T-16", help="(ViT-T-16) also mobilevit_s, swin_tiny, resnet18, "
        "mobilenetv3_small_100, efficientnet_b0; for 32 pixels: demo-student, demo-vit")
    add("--teacher", default="ViT-B-16:laion400m_e32", help="(ViT-B-16:laion400m_e32)")
    add = parser.add_argument_group("losses", "total = sum of lambda * loss; 0 = not computed").add_argument
    add("--lambda-clip", type=float, default=1, help="(1) task loss, nats")
    add("--lambda-crd", type=float, default=1, help="(1) contrastive relational distillation, nats")
    add("--lambda-fd", type=float, default=2000, help="(2000) feature distillation; demo: 250")
    add("--lambda-icl", type=float, default=1, help="(1) interactive contrastive learning, nats")
    add("--lambda-mfd", type=float, default=0, help="(0) masked feature distillation; ablation: 2000")
    add("--lambda-gd", type=float, default=0, help="(0) gradient distillation; ablation: 1e8 (N/1024)^2")
    add("--lambda-afd", type=float, default=0, help="(0) augmented feature distillation, nats; ablation: 1")
    add("--mask-ratio", type=float, default=0.75, help="(0.75) share of the patches that MFD hides")
    add = parser.add_argument_group("optimiser: AdamW, linear warm-up, then cosine to 0").add_argument
    add("--epochs", type=int, default=32, help="(32)")
    add("--batch-size", type=int, default=1024, help="(1024) pairs a step, over all processes")
    add("--lr", type=float, default=1e-3, help="(1e-3) peak learning rate")
    add("--weight-decay", type=float, default=0.1, help="(0.1) not on biases, norms and scales")
    add("--warmup", type=int, metavar="STEPS", help="(10000, but at most a tenth of the run)")
    add = parser.add_argument_group("run").add_argument
    add("--out", default="out", metavar="DIR", help="(out) its folder; a checkpoint there is continued")
    add("--grad-checkpointing", action="store_true", help="less memory, but the student is run forward twice")
    add("--seed", type=int, default=0, help="(0)")
    add("--log-every", type=int, default=50, metavar="STEPS", help="(50)")
    add("--save-every", type=int, metavar="STEPS", help="(an epoch) write checkpoint.pt, student/")
    add("--eval-every", type=int, default=1, metavar="EPOCHS", help="(1) 0 = only at the end")
    add("--eval-only", action="store_true", help="score --student on --val-data and --zeroshot")
    # fmt: on
    args = parser.parse_args(argv)
    if demo := not (args.train_data or args.eval_only):
        parser.set_defaults(**DEMO)  # what the user typed still wins over the demo's own values
    args = parser.parse_args(argv, argparse.Namespace(demo=demo))
    for name, value in vars(args).items():
        low = name in ("epochs", "batch_size", "log_every", "save_every")
        high = 1 if name == "mask_ratio" else math.inf
        if type(value) in (int, float) and not low <= value < high:
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be a number in [{low:d}, {high})")
    if args.batch_size % WORLD and not args.eval_only:
        raise BadInput(f"--batch-size {args.batch_size}: over all processes, so a multiple of {WORLD}")
    need(any(getattr(args, f"lambda_{name}") for name in LOSSES), "--lambda-*: all are 0; give one a weight")
    if (args.eval_only or demo) and args.eval_only != bool(args.val_data + args.zeroshot):
        raise BadInput("--val-data, --zeroshot: need --eval-only or --train-data; --eval-only needs them")
    return args


# ---- The method. Hard in it: the softmax of a contrastive loss runs over the pairs of all processes; and FD,
# MFD, GD and ICL compare student and teacher coordinate by coordinate, so widths that differ are projected.
class Distiller(nn.Module):
    """The student and the few trainable parts its losses need. DDP wraps it: all is synchronised and saved.

    student: a net of open_clip; lambdas: {loss: weight}; parts are built, losses computed where it is not 0.
    Parts: proj_* if D_s != D_t, a Linear with bias on the raw student embedding, for FD, MFD, GD and ICL;
    fuse_* for AFD; a log-scale each for ICL and AFD that starts at ln(1/0.07), where CLIP's own starts.
    """

    def __init__(self, student, dim_s, dim_t, lambdas, mask_ratio=0.75):
        super().__init__()
        self.student, self.mask_ratio = student, mask_ratio
        self.on = on = [name for name in LOSSES if lambdas.get(name, 0) > 0]
        self.project = dim_s != dim_t and not {"fd", "mfd", "gd", "icl"}.isdisjoint(on)
        if self.project:
            self.proj_img, self.proj_txt = nn.Linear(dim_s, dim_t), nn.Linear(dim_s, dim_t)
        if "icl" in on:
            self.icl_log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if "afd" in on:
            self.fuse_img, self.fuse_txt = nn.Linear(dim_s + dim_t, dim_s), nn.Linear(dim_s + dim_t, dim_s)
            self.afd_log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        student.logit_scale.requires_grad_(bool({"clip", "crd", "gd"} & {*on}))  # DDP: no idle parameters

    def forward(self, images, tokens, img_t=None, txt_t=None, scale_t=None):
        """Normalised images [n, 3, H, W], tokens [n, context], the teacher's unit rows [n, D_t] and 1/tau ->
        {loss: its value [], unweighted, of the pairs of this process}."""
        with autocast(images.device):
            x, y = self.student.encode_image(images), encode_text(self.student, tokens)  # raw [n, D_s]
            m = self.encode_masked(images) if "mfd" in self.on else x  # else not used
        x, y, m = (e.to(self.student.logit_scale.dtype) for e in (x, y, m))  # bfloat16 ends here
        img_s, txt_s = img_p, txt_p = gather(normalize(x)), gather(normalize(y))  # [N, D_s]; _p: projected
        if self.project:
            x, y, m = self.proj_img(x), self.proj_txt(y), self.proj_img(m)
            img_p, txt_p = gather(normalize(x)), gather(normalize(y))  # [N, D_t]
        if img_t is not None:
            img_t, txt_t = gather(img_t), gather(txt_t)  # [N, D_t]
        own = slice(RANK * len(x), RANK * len(x) + len(x))  # anchors this process answers for; GD takes all
        scale = self.student.logit_scale.exp()  # 1/tau
        compute = {  # called for those that are on
            "clip": lambda: clip_loss(img_s, txt_s, scale, own),
            "crd": lambda: crd_loss(img_s, txt_s, img_t, txt_t, scale, scale_t, own),
            "fd": lambda: fd_loss(img_p[own], txt_p[own], img_t[own], txt_t[own]),
            "mfd": lambda: mfd_loss(normalize(m), txt_p[own], img_t[own], txt_t[own]),
            "gd": lambda: gd_loss(img_p, txt_p, img_t, txt_t, scale, scale_t),
            "icl": lambda: icl_loss(img_p, txt_p, img_t, txt_t, self.icl_log_scale.exp(), own),
            "afd": lambda: afd_loss(
                img_s, txt_s, img_t, txt_t, self.fuse_img, self.fuse_txt, self.afd_log_scale.exp(), own
            ),
        }
        return {name: compute[name]() for name in self.on}

    def encode_masked(self, images):
        """Raw embedding [n, D_s] of images without mask_ratio of the patches, for MFD (Eq. 12): dropped from
        the sequence of a ViT, as in MAE, blanked for any other image tower."""
        tower, ratio = self.student.visual, self.mask_ratio
        if not isinstance(tower, VisionTransformer):
            return self.student.encode_image(losses.blank_patches(images, ratio))
        with tower.patch_dropout.register_forward_hook(lambda _, args, x: losses.drop_patches(x, ratio)):
            return self.student.encode_image(images)  # (a GPU would wait for open_clip's own PatchDropout)


@torch.no_grad()
def clamp_scales(model):
    """Keep every 1/tau in [1, 100], as CLIP does; after each optimiser step."""
    for name, parameter in model.named_parameters():
        if parameter.numel() == 1 and parameter.requires_grad and name.endswith(("logit_scale", "log_scale")):
            parameter.clamp_(0, math.log(100))


# ---- Training. Hard in it: a run of days must end, to the bit, where it would have ended had nothing stopped
# it. So what is random depends on (seed, step, rank), a step that has begun is ended, checkpoints are whole.
def make_optimizer(distiller, lr, weight_decay):
    """AdamW; no decay on biases, norms and scales; betas and eps by family, as in the authors' scripts."""
    decayed, plain = [], []
    for name, p in distiller.named_parameters():
        if p.requires_grad:
            (plain if p.ndim < 2 or "bias" in name else decayed).append(p)  # Swin has biases of 2 axes
    tower = distiller.student.visual
    trunk = getattr(tower, "trunk", None)  # of timm
    vit = "vit" in trunk.default_cfg["architecture"] if trunk else isinstance(tower, VisionTransformer)
    betas, eps = ((0.9, 0.98), 1e-6) if vit else ((0.9, 0.999), 1e-8)  # mobilevit is of the first, too
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def lr_at(step, steps, warmup, peak):
    """Learning rate of step 0..steps-1: linear to the peak over `warmup` steps, then half a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def train_step(model, optimizer, lambdas, student, teacher, images, tokens):
    """One step on uint8 images [n, 3, S, S] and tokens (see encode_text) for the student, then the teacher.
    Returns {loss: its value [], unweighted} and the weighted "total", and waits for no GPU."""
    from_teacher = teacher.teach(images, tokens[-1]) if teacher else ()  # unit rows [n, D_t] twice, 1/tau
    values = model(student.normalise(images), tokens[0], *from_teacher)
    total = sum(lambdas[name] * value for name, value in values.items())
    optimizer.zero_grad()
    total.backward()  # DDP averages the gradients of all processes here
    optimizer.step()
    clamp_scales(model)
    return {**values, "total": total}


def train(args, device):
    """Train --student, or go on where its checkpoint is; returns the last record of log.jsonl with scores."""
    list(map(list, map(sources, args.train_data)))  # a wrong path is told before the models are loaded
    torch.manual_seed(args.seed)  # the same start on every process
    lambdas = {name: getattr(args, f"lambda_{name}") for name in LOSSES}
    student, teacher = OpenClip(args.student, "--student", device), None
    if any(lambdas[name] for name in LOSSES[1:]):
        teacher = OpenClip(args.teacher, "--teacher", device, frozen=True)
    student.net.set_grad_checkpointing(args.grad_checkpointing)
    both = [student, teacher] if teacher else [student]  # so [-1] is the teacher, if there is one
    distiller = Distiller(student.net, student.dim, both[-1].dim, lambdas, args.mask_ratio).to(device).train()
    optimizer = make_optimizer(distiller, args.lr, args.weight_decay)
    zeroshot, retrieval = read_evaluations(args)

    with Run(args, student, distiller, optimizer) as run:
        size, tokenizers = max(model.size for model in both), [model.tokenizer for model in both]
        pairs = Pairs(args.train_data, size, tokenizers, args.seed, run.out / "scans")
        per_epoch = len(pairs) // args.batch_size  # pairs that fill no batch wait for another permutation
        need(per_epoch, f"--batch-size {args.batch_size}: more than the {len(pairs)} pairs of --train-data")
        steps = args.epochs * per_epoch
        warmup = min(10_000, steps // 10) if args.warmup is None else args.warmup
        run.resume(len(pairs), teacher, steps, per_epoch)
        batches = run.batches(pairs, steps, device)
        save_every, score_every = args.save_every or per_epoch, args.eval_every * per_epoch or steps
        model = nn.parallel.DistributedDataParallel(distiller) if WORLD > 1 else distiller
        while True:
            due = run.step and (run.step == steps or run.step % score_every == 0)
            if due and run.result.get("step") != run.step:  # also one that a kill cut off
                run.patient = False  # all is saved: a signal ends it at once
                scores = evaluate(student, zeroshot, retrieval, args.workers, teacher)
                distiller.train()  # evaluate leaves the student in evaluation mode
                run.patient, count = True, sum(p.numel() for p in student.net.parameters())
                run.result = run.write(eval=scores, parameters=count)
                run.save()
            if run.step == steps:
                return run.result
            for group in optimizer.param_groups:
                group["lr"] = lr = lr_at(run.step, steps, warmup, args.lr)
            values = train_step(model, optimizer, lambdas, student, teacher, *next(batches))
            stop = run.end_step()
            if run.step % args.log_every == 0 or run.step == steps:
                run.log_losses(values, lr=lr, scale=student.net.logit_scale.exp().item())
            if stop or run.step == steps or 0 in (run.step % save_every, run.step % score_every):
                run.save(values, stop)


# ---- Models, all from open_clip. Hard in it: with another mean and std of the pixels, another activation or
# another tokenizer the same weights compute something else, and a file of weights says nothing of them.
def clip_config(vision, embed_dim=512, width=384, heads=6, layers=12, context=77):
    text = {"context_length": context, "vocab_size": 49408, "width": width, "heads": heads, "layers": layers}
    return {"embed_dim": embed_dim, "vision_cfg": {"image_size": 224, **vision}, "text_cfg": text}


STUDENTS = {  # of the paper's students (Table 2) open_clip lacks these six; they share one text tower
    "ViT-T-16": clip_config({"layers": 12, "width": 192, "patch_size": 16}),  # 3 heads of 64
    "swin_tiny": clip_config({"timm_model_name": "swin_tiny_patch4_window7_224", "timm_pool": ""}),
    # timm's last layer is the projection: open_clip's would expect 576 inputs where timm now gives 1024
    "mobilenetv3_small_100": clip_config({"timm_model_name": "mobilenetv3_small_100", "timm_proj": ""}),
    "mobilevit_s": clip_config({"timm_model_name": "mobilevit_s", "timm_pool": ""}),
    "efficientnet_b0": clip_config({"timm_model_name": "efficientnet_b0", "timm_pool": ""}),
    "resnet18": clip_config({"timm_model_name": "resnet18", "timm_pool": ""}),
    # for the demo: 32 x 32 pixels, 20 tokens
    "demo-teacher": clip_config({"image_size": 32, "layers": [1, 1, 1, 1], "width": 12}, 64, 64, 2, 1, 20),
    "demo-student": clip_config({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}, 64, 32, 2, 1, 20),
    "demo-vit": clip_config({"image_size": 32, "layers": 2, "width": 64, "patch_size": 4}, 48, 32, 2, 1, 20),
}


def find_model(spec, frozen):
    """(open_clip's name, a tag or a file of weights, what the tag tells) of any form that --help lists."""
    if spec.startswith(("local-dir:", "hf-hub:")):
        return spec, None, {}
    name, _, weights = spec.partition(":")
    name = name if name.endswith(".json") else name.replace("/", "-")  # the paper writes ViT-B/16
    if name in STUDENTS or name.endswith(".json"):
        config = STUDENTS.get(name) or json.loads(Path(name).read_text("utf-8"))
        need({"embed_dim", "vision_cfg", "text_cfg"} <= {*config}, "needs embed_dim, vision_cfg and text_cfg")
        name = "clipkd-model"  # hides no name of open_clip
        with tempfile.TemporaryDirectory() as folder:  # open_clip takes new architectures from files only
            Path(folder, f"{name}.json").write_text(json.dumps(config))
            open_clip.add_model_config(folder)
    near = difflib.get_close_matches(name, [*open_clip.list_models(), *STUDENTS], 3, 0.3)  # itself, if known
    need(name in near, f"unknown model; the nearest names are {', '.join(near)}; a folder is local-dir:DIR")
    tags = {t: open_clip.get_pretrained_cfg(name, t) for t in open_clip.list_pretrained_tags_by_model(name)}
    tag, _, file = weights.rpartition("=")
    tag, file = (tag, file) if open_clip.get_pretrained_cfg(name, tag) else (weights, weights)
    told = open_clip.get_pretrained_cfg(name, tag)  # {} if it is a file
    there = os.path.isfile(file) or (told and file == weights) or not (file or frozen)
    need(there, f"no weights; give NAME:FILE or NAME:TAG, tags: {', '.join(tags) or 'none'}")
    usual = {**vars(PreprocessCfg()), "quick_gelu": open_clip.get_model_config(name).get("quick_gelu", False)}
    other = [t for t in tags if any(tags[t].get(key, value) != value for key, value in usual.items())]
    if file and not told and other:  # a file does not say what it wants
        say(f"warning: {spec}: pixels, activation are the usual; for those of {other[:4]} {name}:TAG={file}")
    return name, file, told


class OpenClip:
    """A model `net` of open_clip with its tokenizer, its configuration, and mean and std of its pixels.
    spec: any form that --help lists; flag: its origin, for messages; frozen: it needs weights and gets no
    gradient. dim: the width D of its embeddings; size: of its pictures, in pixels."""

    def __init__(self, spec, flag, device="cpu", frozen=False):
        with explain(f"{flag} {spec}: cannot be loaded"):
            name, weights, told = find_model(spec, frozen)
            options = {"force_preprocess_cfg": told, "force_quick_gelu": told.get("quick_gelu", False)}
            self.net = open_clip.create_model(name, weights, require_pretrained=frozen, **options)
            self.tokenizer, self.config = open_clip.get_tokenizer(name), open_clip.get_model_config(name)
        self.config |= {"quick_gelu": True} if told.get("quick_gelu") else {}
        self.net.to(device).eval()
        if frozen:
            self.net.requires_grad_(False)
        self.pixels = pixels = self.net.visual.preprocess_cfg
        self.device, self.dim, self.size = device, self.config["embed_dim"], int(np.max(pixels["size"]))
        self.mean, self.std = torch.tensor([pixels["mean"], pixels["std"]], device=device).view(2, 3, 1, 1)

    def normalise(self, images):
        """uint8 [n, 3, S, S] -> float [n, 3, H, W] of this image tower's size, mean and std."""
        resized = v2.functional.resize(images, self.pixels["size"], v2.InterpolationMode.BICUBIC)
        return (resized.float() / 255 - self.mean) / self.std

    @torch.no_grad()
    def teach(self, images, tokens):
        """All that a student hears of its teacher: unit rows [n, D_t] of images and of tokens, and 1/tau."""
        with autocast(images.device):
            img, txt = self.net.encode_image(self.normalise(images)), encode_text(self.net, tokens)
        return normalize(img.float()), normalize(txt.float()), self.net.logit_scale.exp()

    @torch.no_grad()
    def embed(self, encode, items, collate=list, workers=0, batch=256):
        """Unit rows [len(items), D] of encode(collate(items)), for all processes; each computes a share."""
        batches = [range(i, min(i + batch, len(items))) for i in range(0, len(items), batch)]
        options = {"collate_fn": collate, "num_workers": workers, "worker_init_fn": ignore_signals}
        loader = DataLoader(items, batch_sampler=batches[RANK::WORLD], **options)
        rows = torch.zeros(len(items), self.dim, device=self.device)
        for i, x in zip(batches[RANK::WORLD], tqdm(loader, "embed", leave=False, disable=RANK > 0)):
            rows[i.start : i.stop] = normalize(encode(x).float())
        if WORLD > 1:
            dist.all_reduce(rows)  # each row is zero on all processes but one
        return rows

    def embed_pictures(self, pictures, workers=0):
        """Unit rows of places as read_pair gives them, with open_clip's own preprocessing."""
        read = partial(self.read, image_transform_v2(PreprocessCfg(**self.pixels), is_train=False))
        return self.embed(lambda x: self.net.encode_image(x.to(self.device)), pictures, read, workers)

    @staticmethod
    def read(transform, pictures):  # a loader that is spawned, not forked, takes nothing local and no lambda
        return torch.stack([transform(open_picture(*picture)) for picture in pictures])

    def embed_captions(self, captions):
        return self.embed(lambda x: self.net.encode_text(self.tokenizer(x).to(self.device)), captions)

    def embed_pairs(self, pairs, workers):
        """Unit rows of pictures, each once, [I, D]; of captions [C, D]; and whose picture is whose [C]."""
        pictures, captions = zip(*pairs)
        number = {picture: i for i, picture in enumerate(dict.fromkeys(pictures))}
        owner = torch.tensor([number[picture] for picture in pictures], device=self.device)
        return self.embed_pictures([*number], workers), self.embed_captions(captions), owner

    def export(self, folder):
        """As open_clip does: its create_model_and_transforms("local-dir:FOLDER") needs nothing of ours."""
        pixels = {key: self.pixels[key] for key in ("mean", "std", "interpolation", "resize_mode")}
        config = json.dumps({"model_cfg": self.config, "preprocess_cfg": pixels}, indent=2)
        weights = {key: value.detach().cpu().contiguous() for key, value in self.net.state_dict().items()}
        replace(folder / "open_clip_config.json", config.encode())
        replace(folder / "open_clip_model.safetensors", safetensors.torch.save(weights))
        if hasattr(self.tokenizer, "save_pretrained"):  # one of transformers; CLIP's own is in open_clip
            self.tokenizer.save_pretrained(folder)


def encode_text(net, tokens):
    """net.encode_text [n, D] of tokens [n, context], or of their parts [(tokens, place of the last end), ...]
    without computing the padding. Exact: in a causal tower no place sees the later ones, and the row that is
    taken is the end token's. (Multiples of 16 keep even the bits.) Any other tower computes all places."""
    text = getattr(net, "text", net)
    parts = tokens if isinstance(tokens, list) else [(tokens, tokens.shape[1])]
    pool, ends = getattr(text, "text_pool_type", getattr(text, "pool_type", None)), [end for _, end in parts]
    if pool != "argmax" or text.attn_mask is None or getattr(text, "cls_emb", None) is not None:
        return net.encode_text(torch.cat([part for part, _ in parts]))

    def cut(module, args, kwargs):  # once for each part
        k = 16 * (ends.pop(0) // 16 + 1)
        return (args[0][:, :k],), {"attn_mask": kwargs["attn_mask"][:k, :k]}

    with text.transformer.register_forward_pre_hook(cut, with_kwargs=True):
        return torch.cat([net.encode_text(part) for part, _ in parts])


def autocast(device):
    """bfloat16 in the towers on a GPU that has it (Ampere on), else float32. float16 would need a scaler."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


# ---- Data. Hard in it: 12.9 million pairs, 64 loaders. So a pair is five numbers in a table mapped from disk
# and its crop depends on (seed, epoch, index) alone: loaders, processes, resuming or tars change nothing.
def sources(name):
    """Yields (file, columns, separator) of a file or of a folder of tars; a tar has no columns."""
    for file in sorted(map(str, Path(name).glob("[!.]*.tar"))) or [name]:
        need(os.path.isfile(file), f"{file}: no such file; expected a TSV, a CSV, a .tar or a folder of .tar")
        columns = separator = None
        if not file.endswith(".tar"):
            with open(file, encoding="utf-8-sig", errors="replace") as lines:
                header = lines.readline().rstrip("\n")
            separator, word = ("\t", "tab") if "\t" in header else (",", "comma")
            columns = [column.strip('" ') for column in header.split(separator)]
            known = {"filepath", "title"} <= {*columns}
            need(known, f"{file}: needs columns filepath and title; found {columns} (separator: {word})")
        yield file, columns, separator


def scan(source):
    """Where the pairs lie, int64 [pairs, 4]: start and length of the caption (of its line in a TSV, CSV), and
    of the picture in a tar, where KEY.txt belongs to KEY.jpg, .jpeg, .png or .webp, and ._KEY is macOS's."""
    file, columns, _ = source
    if columns:
        with open(file, "rb") as lines:  # by line, so that no stray quote swallows the next ones
            ends = np.cumsum(np.fromiter(map(len, lines), np.int64))
        rows = np.pad(np.stack([ends[:-1], np.diff(ends)], axis=1), ((0, 0), (0, 2)))
        return rows[rows[:, 1] > 2]  # not the empty lines
    pairs, size, damaged = {}, os.path.getsize(file), False
    with open(file, "rb") as data:
        while data.tell() < size:
            try:  # tarfile passes over most damaged headers; over the others by beginning again behind them
                for member in tarfile.open(fileobj=data, mode="r:", ignore_zeros=True):
                    key, kind = os.path.splitext(member.name)
                    at = 0 if kind.lower() == ".txt" else 2 if kind.lower() in PICTURES else -1
                    if at >= 0 and key.split("/")[-1][0] != "." and member.offset_data + member.size <= size:
                        pairs.setdefault(key, [0] * 4)[at : at + 2] = member.offset_data, member.size
                break
            except Exception:
                damaged = True
        data.seek(max(0, size - 512))
        if damaged or any(data.read()):  # a tar ends with zeros
            say(f"warning: {file}: cut off or damaged; only the pairs that are whole in it are used")
    return np.array([row for row in pairs.values() if row[1] and row[3]], np.int64).reshape(-1, 4)


def read_pair(source, row):
    """((path, start, length) of a picture in a tar or (path,) of one in a file of its own, caption)."""
    (file, columns, separator), (start, length, *place) = source, map(int, row)
    with open(file, "rb") as data:
        data.seek(start)
        caption = data.read(length).decode("utf-8", "replace")
    if columns:
        line, place = re.sub("[\r\n\0]+", " ", caption).rstrip(" "), ()
        cells = next(csv.reader([line], delimiter=separator)) if '"' in line and len(line) < 2**17 else []
        if len(cells) != len(columns):  # not quoted: a title that is last may have the separator in it
            cells = line.split(separator, len(columns) - 1 if columns[-1] == "title" else -1)
        need(len(cells) == len(columns), f"{file}: {len(cells)} instead of {len(columns)} cells: {line}")
        pair = dict(zip(columns, cells))
        file, caption = os.path.join(os.path.dirname(file), pair["filepath"]), pair["title"]
    need(caption.strip(), f"{file}: no caption")
    return (file, *place), caption[:1000]  # enough for any context; an endless word takes the BPE minutes


def open_picture(path, start=0, length=-1):
    with explain(f"{path}: this picture cannot be read"), open(path, "rb") as file:
        file.seek(start)
        image = Image.open(io.BytesIO(file.read(length)))
        image.load()
        if image.mode.startswith("I;16"):  # convert would clip 16 bits to white
            image = image.point(lambda value: value / 256).convert("L")
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


table = lru_cache(4)(partial(np.load, mmap_mode="r"))  # from disk: processes and loaders share its memory


class Pairs(Dataset):
    """Training pairs. n keys (epoch, index) give images uint8 [n, 3, size, size], tokens [n, context] of each
    tokenizer, sorted by the captions' length; and how many could not be read: each gives way to the next one.
    Teacher and student share one random crop (FD compares two looks at one view), uint8 until on the device.
    Where the pairs lie, int64 [pairs, 5] (number of the file, then as scan() says), is kept in `folder`."""

    def __init__(self, names, size, tokenizers, seed, folder):
        self.size, self.tokenizers, self.seed = [size, size], tokenizers, seed
        self.sources = [source for name in names for source in sources(name)]
        self.path = from_process_0(self.find(folder) if RANK == 0 else None)  # all that loaders are handed
        need(len(self), f"{self.sources[0][0]}: no pair of a picture and a caption in it")
        with explain("--train-data", "a filepath is absolute, or relative to the folder of its file"):
            self[[(0, 0)]]  # a wrong folder shows here

    def find(self, folder):
        """Path of the table; it is made where there is none, or none that is whole."""
        stats = [(os.path.abspath(f), os.path.getsize(f), os.path.getmtime(f)) for f, *_ in self.sources]
        path = Path(folder, hashlib.sha256(repr(stats).encode()).hexdigest()[:16] + ".npy")
        with contextlib.suppress(Exception):
            return table(path) is not None and path
        with (Pool if len(self.sources) > 1 else ThreadPool)(min(len(self.sources), CORES)) as pool:
            bar = tqdm(pool.imap(scan, self.sources), "scan", len(self.sources), leave=False)
            rows = np.concatenate([np.insert(part, 0, i, axis=1) for i, part in enumerate(bar)])
        replace(path, partial(np.save, arr=rows))
        return path

    def __len__(self):
        return len(table(self.path))

    def keys(self, batch, first, last):
        """For each of the steps first..last-1 the n keys of this process; a new order every epoch."""
        for step in range(first, last):
            epoch, k = divmod(step, len(self) // batch)
            if step == first or k == 0:
                generator = torch.Generator().manual_seed(hash((self.seed, epoch)))
                order = torch.randperm(len(self), generator=generator)
            yield [(epoch, index) for index in order[k * batch :][:batch].chunk(WORLD)[RANK].tolist()]

    def __getitem__(self, keys):
        images, captions, unread = torch.empty(len(keys), 3, *self.size, dtype=torch.uint8), [], 0
        for epoch, index in keys:
            while True:
                try:
                    images[len(captions)], caption = self.load(epoch, index % len(self))
                    break
                except Exception as error:  # whatever is wrong with one pair, a run of days goes on
                    unread, index = unread + 1, index + 1
                    need(unread < min(1000, len(self)), f"{unread} pairs of a batch cannot be read: {error}")
            captions.append(caption)
        tokens = [tokenize(captions) for tokenize in self.tokenizers]
        order = tokens[0].argmax(1).argsort(stable=True)  # by length: the end token has the highest number
        return images[order], [t[order] for t in tokens], unread

    def load(self, epoch, index):
        """A crop, uint8 [3, size, size], and its caption."""
        source, *row = table(self.path)[index]
        picture, caption = read_pair(self.sources[source], row)
        pixels = torch.from_numpy(np.array(open_picture(*picture))).permute(2, 0, 1)  # uint8: twice as fast
        with torch.random.fork_rng([]):  # get_params draws from torch's own generator
            torch.default_generator.manual_seed(hash((self.seed, epoch, index)))  # of the CPU alone, so quick
            crop = v2.RandomResizedCrop.get_params(pixels, scale=(0.9, 1), ratio=(3 / 4, 4 / 3))  # y, x, h, w
        return v2.functional.resized_crop(pixels, *crop, self.size, v2.InterpolationMode.BICUBIC), caption


def ignore_signals(worker):
    """For loaders. Schedulers signal every process, but the main one still needs batches to end its step."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


# ---- Processes. Together they compute the gradient of one with the whole batch: by gather (losses.py), DDP.
def setup():
    """The device of this process, after joining the others."""
    gpus = torch.cuda.device_count()
    need(not 0 < gpus < LOCAL_WORLD, f"{gpus} GPUs for {LOCAL_WORLD} processes: use --nproc_per_node={gpus}")
    device = torch.device("cuda", LOCAL_RANK) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    if WORLD > 1:
        store = next(dist.rendezvous("env://"))[0]
        if WORLD == LOCAL_WORLD:  # torchrun --max-restarts can keep the store, with the addresses of the dead
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"  # what the hosts agree on does not wait for GPUs
        options = {"store": store, "rank": RANK, "world_size": WORLD, "device_id": device if gpus else None}
        dist.init_process_group(backend, timeout=timedelta(hours=3), **options)  # process 0 may scan long
    return device


def from_process_0(value=None):
    values = [value]
    if WORLD > 1:
        dist.broadcast_object_list(values)  # the others wait here, so without a value it is a barrier
    return values[0]


# ---- Evaluation, with open_clip's own preprocessing and prompts. Hard in it: what belongs together. Folders
# are sorted as words but classes are numbers, a picture has several captions, a process embeds its share.
def class_folders(root):
    """Labels, pictures, class names and prompt templates of a folder of class folders."""
    folders = sorted(path.name for path in Path(root).glob("[!.]*") if path.is_dir())
    names, templates = [folder.replace("_", " ") for folder in folders], ["a photo of a {}"]
    numbers = folders and all(folder.isdigit() for folder in folders)
    if numbers or any(re.fullmatch(r"n\d{8}", folder) for folder in folders):
        # ImageNet, -R, -A, -Sketch (scored among the classes present), or -V2, with folder "10" before "2"
        keys = [str(i) for i in range(1000)] if numbers else ImageNetInfo().label_names()
        odd = sorted({*folders} ^ {*keys}) if numbers else sorted({*folders} - {*keys})
        need(not odd, f"--zeroshot {root}: {odd[:3]} missing or not of ImageNet's 1000 wnids or numbers")
        names = [open_clip.IMAGENET_CLASSNAMES[keys.index(folder)] for folder in folders]
        templates = open_clip.OPENAI_IMAGENET_TEMPLATES
    files = [(i, p) for i, folder in enumerate(folders) for p in sorted(Path(root, folder).glob("[!.]*"))]
    found = [(label, (str(path),)) for label, path in files if path.suffix.lower() in PICTURES]
    need(found, f"--zeroshot {root}: no such folder, or no class folders with pictures in it")
    return *zip(*found), names, templates


def zero_shot(model, labels, pictures, names, templates, workers):
    """{"top-1": percent of pictures that are nearest to the mean of their class's sentences}."""
    build = partial(open_clip.build_zero_shot_classifier, model.net, model.tokenizer, templates=templates)
    head = model.embed(lambda x: build(x, device=model.device).T, names, batch=10)  # [classes, D]
    nearest = (model.embed_pictures(pictures, workers) @ head.T).argmax(1).cpu()
    return {"top-1": 100 * (nearest == torch.tensor(labels)).double().mean().item()}


def evaluate(model, zeroshot, retrieval, workers, teacher=None):
    """{set: {metric: value}} of what read_evaluations gives; with a teacher also how similar its rows are."""
    result = {name: {} for name in [*zeroshot, *retrieval]}
    model.net.eval()
    for buffer in model.net.buffers() if WORLD > 1 else ():  # batch norm's; student/ has those of process 0
        dist.broadcast(buffer, 0)
    for name, folder in zeroshot.items():
        result[name] |= zero_shot(model, *folder, workers)
    for name, pairs in retrieval.items():
        rows_t = teacher.embed_pairs(pairs, workers)[:2] if teacher else ()
        scores = losses.retrieval(*model.embed_pairs(pairs, workers), *rows_t)
        result[name] |= {key: score for key, score in scores.items() if math.isfinite(score)}
    return result


def caption_pairs(file):
    """[(picture, caption)] of a file as --train-data takes it; without a bad row the score would change."""
    with explain(f"--val-data {file}"):
        pairs = [read_pair(source, row) for source in sources(file) for row in scan(source)]
        need(pairs, "no captions in it")
        open_picture(*pairs[0][0])
    return pairs


def read_evaluations(args):
    """{name: class folders} of --zeroshot, {name: captioned pictures} of --val-data; read before any work."""
    sets = {}, {}
    for found, read, values in zip(sets, (class_folders, caption_pairs), (args.zeroshot, args.val_data)):
        for value in values:
            name, path = value.split("=", 1) if "=" in value and not os.path.exists(value) else (value, value)
            need(name not in found, f"{value}: a set is named {name} already; give this one another NAME=")
            found[name] = read(path)
    return sets


# ---- The run's folder. Hard in it: a kill can come at any moment, and a second run at any time. So files are
# renamed into place, checkpoint.pt last, with the length of the log by then; and a lock keeps others out.
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
PROGRESS = ("step", "seconds", "waited", "skipped", "result", "log_end")
RECIPE = re.compile("lambda_.*|mask_ratio|epochs|batch_size|lr|weight_decay|warmup|seed")  # of the flags


def say(message):
    if RANK == 0:
        tqdm.write(f"clipkd.py: {message}", sys.stderr)


def replace(path, content):
    """Whatever happens, even to the power, `path` holds what it held or all of content (bytes, a writer)."""
    with explain(f"{path}: cannot be written", "what it held before is kept"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.tmp", "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)


class Run(contextlib.ExitStack):
    """A run's folder, as a context that gives back what it takes: the lock, and the signals, which wait for
    the end of a step while it is patient. step: how many are done; result: the last record with scores."""

    def __init__(self, args, student, distiller, optimizer):
        super().__init__()
        self.args, self.student, self.out = args, student, Path(args.out)
        self.step, self.seconds, self.skipped, self.waited, self.result, self.log_end = 0, 0.0, 0, 0.0, {}, 0
        self.parts, self.signals, self.patient = {"model": distiller, "optimizer": optimizer}, [], True
        if RANK == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            with explain(f"--out {args.out}", "another run is at work there? End it, or give another --out"):
                lock = sqlite3.connect(self.out / "lock", timeout=0, isolation_level=None)
                lock.executescript("PRAGMA journal_mode = MEMORY; BEGIN EXCLUSIVE")  # until this process ends
            self.callback(lock.close)

    def on_signal(self, number, frame):
        if not self.patient:
            raise KeyboardInterrupt
        self.signals.append(number)

    def resume(self, pairs, teacher, steps, per_epoch):
        """Go on from checkpoint.pt, if there is one of this recipe; open the log; from here signals wait."""
        recipe = {f"--{k.replace('_', '-')}": v for k, v in vars(self.args).items() if RECIPE.fullmatch(k)}
        recipe |= {"pairs": pairs, "--student": re.sub("(?<=[:=])[^:=]*/", "", self.args.student)}  # may move
        bits = teacher and sum(w.view(torch.int).sum().item() for w in teacher.net.parameters())
        recipe["teacher's weights, as a sum"] = bits  # of integers, which is the same in any order
        self.recipe, self.per_epoch, path = recipe, per_epoch, self.out / "checkpoint.pt"
        if path.exists():
            with explain(f"{path}: cannot be read", "if it is damaged, move the folder away to start afresh"):
                saved = torch.load(path, map_location="cpu", weights_only=True)
                before = saved["recipe"]
            for key, value in recipe.items():
                words = f"{path}: is of a run with {key} {before.get(key)}, this command has {value}"
                need(before.get(key) == value, f"{words}; give the same flags, or another --out")
            with explain(f"{path}: is of another student"):
                for name, part in self.parts.items():
                    part.load_state_dict(saved[name])
            vars(self).update((name, saved[name]) for name in PROGRESS)
        self.begin = time.perf_counter() - self.seconds  # of the run, without the time that it was not there
        self.log = self.enter_context(open(self.out / "log.jsonl" if RANK == 0 else os.devnull, "a"))
        if RANK == 0:  # lines that came after the checkpoint will come again
            self.log.truncate(min(self.log_end, os.path.getsize(self.log.name)))
        if not self.step:
            self.write(args=vars(self.args), ranks=WORLD, versions=[torch.__version__, open_clip.__version__])
        bar = tqdm(total=steps, desc=self.args.out, initial=self.step, unit="step", disable=RANK > 0)
        self.bar = self.enter_context(bar)
        for number in STOPS:
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # which nohup sets
                self.callback(signal.signal, number, signal.signal(number, self.on_signal))

    def write(self, **record):
        self.seconds = time.perf_counter() - self.begin
        record = {"step": self.step, "epoch": self.step / self.per_epoch, "seconds": self.seconds, **record}
        print(json.dumps(record), file=self.log, flush=True)
        return record

    def batches(self, pairs, steps, device):
        """Images and tokens of each step on the device; adds up the seconds waited and the pairs skipped."""
        keys = pairs.keys(self.args.batch_size, self.step, steps)
        options = {"num_workers": self.args.workers, "pin_memory": device.type == "cuda"}
        loader = DataLoader(pairs, None, sampler=keys, worker_init_fn=ignore_signals, **options)
        begin = time.perf_counter()
        for images, tokens, unread in loader:
            self.waited, self.skipped = self.waited + time.perf_counter() - begin, self.skipped + unread
            torch.manual_seed(hash((self.args.seed, self.step, RANK)))  # of the step: masks, stochastic depth
            k = min(1 + len(images) // 32, len((tokens[0].argmax(1) // 32).unique()))  # parts, no small ones
            move = partial(torch.Tensor.to, device=device, non_blocking=True)
            yield move(images), [[(move(p), int(p.argmax(1).max())) for p in t.chunk(k)] for t in tokens]
            begin = time.perf_counter()

    def end_step(self):
        """The number of a signal that any process got, or 0. The hosts agree on it: no GPU is waited for."""
        self.step += 1
        self.bar.update()
        number = torch.tensor(max(self.signals, default=0))
        if WORLD > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()

    def means(self, values, weights=()):
        """{loss: mean over the processes}; waits for the device. What is not finite ends the run, unsaved."""
        means = torch.stack([*values.values()]).detach()
        if WORLD > 1:
            dist.all_reduce(means)
        means = dict(zip(values, (means / WORLD).tolist()))
        bad = [name for name, mean in means.items() if not math.isfinite(mean)]
        bad += [name for name, weight in weights if not weight.isfinite().all()]
        advice = "try a lower --lr or lambda, with another --out; what was saved before is kept"
        need(not bad, f"--lr {self.args.lr}: at step {self.step} not finite: {', '.join(bad[:3])}; {advice}")
        return means

    def log_losses(self, values, **more):
        means = self.means(values)
        speed = self.step * self.args.batch_size / (time.perf_counter() - self.begin)
        self.write(**means, **more, data_wait=self.waited, pairs_per_s=speed, skipped=self.skipped)
        self.bar.set_postfix(loss=f"{means['total']:.3f}", skipped=self.skipped)

    def save(self, values=None, stop=0):
        """student/, then checkpoint.pt; no loss or weight that is not finite. stop: the signal to end by."""
        if values:
            self.means(values, self.parts["model"].named_parameters())
        if RANK == 0:
            self.student.export(self.out / "student")
            self.seconds, self.log_end = time.perf_counter() - self.begin, os.path.getsize(self.log.name)
            state = {"recipe": self.recipe, **{name: getattr(self, name) for name in PROGRESS}}
            state |= {name: part.state_dict() for name, part in self.parts.items()}
            replace(self.out / "checkpoint.pt", partial(torch.save, state))
        from_process_0()  # from here on both are there for every process
        if stop:
            say(f"saved at step {self.step}; the same command continues from there")
            sys.exit(128 + stop)


# ---- Demo: Table 5 in miniature. A teacher that saw many clean pairs, students with few and noisy ones, in a
# world of coloured letters. Real files, and the same train() as any run.
DEMO = {"student": "demo-student", "teacher": "demo-teacher", "epochs": 16, "batch_size": 64}
DEMO |= {"lambda_fd": 250.0, "save_every": 300, "eval_every": 0}
TEACHER_EPOCHS, TEACHER_PAIRS, STUDENT_PAIRS = 3, 20_000, 2_000
COLOURS = "red green blue yellow orange purple pink cyan brown olive".split()
LETTERS = "C E H L O S T V X Z".split()
SIZES = {"small": 20, "large": 28}  # of the font, pixels
PLACES = {"in the middle": (16, 16), "in the top left": (11, 11), "in the top right": (21, 11)}  # x, y
PLACES |= {"in the bottom left": (11, 21), "in the bottom right": (21, 21)}
GROUNDS = "black gray white navy".split()


def draw(colour, letter, size, place, ground, random):
    """A picture of 32 x 32 pixels, with jitter, rotation and noise."""
    picture, centre = Image.new("RGB", (32, 32), ground), tuple(PLACES[place] + random.uniform(-1, 1, 2))
    font = ImageFont.load_default(SIZES[size] + random.uniform(-2, 2))
    ImageDraw.Draw(picture).text(centre, letter, colour, font, anchor="mm", stroke_width=1)
    pixels = picture.rotate(random.uniform(-8, 8), Image.Resampling.BILINEAR, 0, centre, None, ground)
    return Image.fromarray((pixels + random.uniform(-12, 12, (32, 32, 3))).clip(0, 255).astype(np.uint8))


def make_world(folder, seed):
    """Write four sets, each a TSV of captions and a tree of class folders at once. As on the web, a caption
    may leave attributes out (one is kept with chance `kept`) or, with chance `wrong`, name another kind."""
    random, temporary = np.random.default_rng(seed), folder.with_suffix(".tmp")
    kinds = [*itertools.product(COLOURS, LETTERS)]
    hidden = [kind for i, kind in enumerate(kinds) if (i // 10 + 3 * i) % 5 == 0]  # 20 are never trained on
    every = [*itertools.product(COLOURS, LETTERS, SIZES, PLACES, GROUNDS)]  # 4000
    seen, unseen = ([row for row in every if (row[:2] in hidden) == held_out] for held_out in (False, True))
    sets = {"teacher": (random.choice(seen, TEACHER_PAIRS), 0.6, 0)}
    sets["students"] = random.choice(seen, STUDENT_PAIRS), 0.6, 0.1
    sets["seen"] = random.permutation(seen)[:1000], 1, 0  # 1000 different captions
    sets["held-out"] = random.permutation(unseen)[:500], 1, 0
    for name, (rows, kept, wrong) in sets.items():
        for kind in kinds:  # all 100 in every set: the same choice for seen and held-out pictures
            (temporary / name / " ".join(kind)).mkdir(parents=True, exist_ok=True)
        lines = ["filepath\ttitle"]
        for i, row in enumerate(rows):
            file = f"{name}/{row[0]} {row[1]}/{i:05d}.jpg"
            draw(*row, random).save(temporary / file, quality=90)
            colour, letter = random.choice(seen)[:2] if random.random() < wrong else row[:2]
            colour, size, place, ground = (x if random.random() < kept else "" for x in (colour, *row[2:]))
            start = random.choice(["a", "a photo of a", "a picture of a"])
            words = (start, size, colour, letter, place, ground and f"on a {ground} background")
            lines.append(f"{file}\t{' '.join(filter(None, words))}")
        (temporary / f"{name}.tsv").write_text("\n".join(lines))
    temporary.rename(folder)


def demo(args, device):
    """Write the world; train teacher, student alone and student with CLIP-KD; print a table of the three."""
    torch.set_num_threads(max(1, CORES // LOCAL_WORLD // 2))  # the other half is for loading
    for flag in ("student", "teacher"):
        OpenClip(getattr(args, flag), f"--{flag}")  # a wrong name is told before anything is written
    root = f"{args.out}/seed{args.seed}"
    if RANK == 0 and not os.path.exists(f"{root}/data"):
        make_world(Path(root, "data"), args.seed)
    from_process_0()
    args.val_data, args.train_data = [f"seen={root}/data/seen.tsv"], [f"{root}/data/students.tsv"]
    args.zeroshot = [f"{name}={root}/data/{name}" for name in ("seen", "held-out")]
    alone = {f"lambda_{name}": float(name == "clip") for name in LOSSES}
    runs = {"teacher": {**alone, "student": args.teacher, "epochs": TEACHER_EPOCHS}}
    runs["teacher"]["train_data"] = [f"{root}/data/teacher.tsv"]
    runs |= {"student alone": alone, "student + CLIP-KD": {"teacher": f"local-dir:{root}/teacher/student"}}
    report = ["| | zero-shot, seen | held-out | I2T R@1 | T2I R@1 | parameters | time |", "|---" * 7 + "|"]
    for name, changes in runs.items():
        out = f"{root}/{re.sub('[^a-z]+', '-', name.lower())}"
        row = train(argparse.Namespace(**{**vars(args), **changes, "out": out}), device)
        a, b = row["eval"].values()  # seen, held-out
        cells = " | ".join(f"{x:.1f}" for x in (a["top-1"], b["top-1"], a["I2T R@1"], a["T2I R@1"]))
        report.append(f"| {name} | {cells} | {row['parameters'] / 1e6:.1f} M | {row['seconds']:.0f} s |")
    if RANK == 0:
        print("", *report, sep="\n")


def main():
    logging.disable(), logging.captureWarnings(True)  # new students have no weights, pictures are odd
    args, scores, device = get_args(), {}, setup()
    if args.demo:
        demo(args, device)
    elif args.eval_only:
        sets = read_evaluations(args)
        scores = evaluate(OpenClip(args.student, "--student", device, frozen=True), *sets, args.workers)
    else:
        scores = train(args, device)["eval"]
        say(f"the student is in {args.out}/student")
    for name, values in scores.items() if RANK == 0 else ():
        print(f"{name}: " + ", ".join(f"{metric} {value:.4g}" for metric, value in values.items()))
    if WORLD > 1:
        dist.barrier(), dist.destroy_process_group()  # without the barrier gloo may abort


if __name__ == "__main__":
    try:
        main()
    except (BadInput, OSError) as error:
        time.sleep(2 * (RANK > 0))  # torchrun ends all once rank 0 has ended: one message instead of many
        print("clipkd.py: error:", str(error).split("BadInput: ")[-1].strip(), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nclipkd.py: stopped; the same command goes on from what was saved", file=sys.stderr)
        sys.exit(130)
