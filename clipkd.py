"""Distil a CLIP teacher into a small CLIP student with the losses of CLIP-KD (CVPR 2024, arXiv 2307.12732).

    python clipkd.py                                                        # demo: teacher, student, student + CLIP-KD
    torchrun --nproc_per_node=8 clipkd.py --train-data cc3m.tsv cc12m.tsv   # the paper's recipe: 32 epochs, batch 1024
    python clipkd.py --eval-only --student local-dir:out/student --zeroshot imagenet/val --val-data coco.tsv

A run writes into --out: log.jsonl (one JSON object a line: the command, then losses and evaluations), checkpoint.pt
(the same command again resumes from it) and student/ (open_clip loads it as local-dir:out/student, without this file).
The losses are in losses.py. Symbols: n = pairs on this process, N = pairs in the whole batch, D = embedding width.
"""
import argparse, contextlib, csv, difflib, itertools, json, logging, math, os, re, sys, tempfile, time
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.factory import load_state_dict
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageColor
from timm.data import ImageNetInfo
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from losses import afd_loss, clip_loss, crd_loss, fd_loss, gd_loss, icl_loss, mfd_loss

LOSSES = ("clip", "crd", "fd", "mfd", "gd", "icl", "afd")
RANK, WORLD, LOCAL_RANK, LOCAL_WORLD = (int(os.environ.get(name, default)) for name, default in (
    ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))  # torchrun sets these
CORES = os.cpu_count() // LOCAL_WORLD  # for each process; may be 0


class BadInput(Exception):
    """A mistake in a flag or a file. Its message is all the user sees: what is wrong, where, and what to do."""


# ---- Flags. With --train-data and no other flag a run is the paper's recipe (Sec. 4.1); without it, the demo. ----
def get_args(argv=None):
    usage = "clipkd.py [--flag value ...]    without --train-data and --eval-only: the demo"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=usage)
    add = parser.add_argument_group("data").add_argument
    add("--train-data", nargs="+", metavar="FILE", help="TSV or CSV with columns filepath (relative to FILE) and title")
    add("--val-data", metavar="FILE", help="the same, for image-text retrieval; an image may have several rows")
    add("--zeroshot", nargs="+", default=[], metavar="[NAME=]DIR", help="folders of class folders, ImageNet's or any")
    add("--workers", type=int, default=min(8, CORES // 2), help="(half the cores, at most 8) loaders for each process")
    forms = "NAME, NAME:TAG, NAME:FILE, local-dir:DIR, hf-hub:ORG/NAME of open_clip, or a configuration FILE.json"
    add = parser.add_argument_group("models", forms).add_argument
    add("--student", default="ViT-T-16", help=f"(ViT-T-16) open_clip's names and {', '.join(STUDENTS)}")
    add("--teacher", default="ViT-B-16:laion400m_e32", help="(ViT-B-16:laion400m_e32) not read without KD losses")
    add = parser.add_argument_group("losses", "total = sum of lambda * loss, unscaled; 0 = not computed").add_argument
    add("--lambda-clip", type=float, default=1, help="(1) task loss, nats")
    add("--lambda-crd", type=float, default=1, help="(1) contrastive relational distillation, nats")
    add("--lambda-fd", type=float, default=2000, help="(2000) feature distillation, mean over N and D; demo: 250")
    add("--lambda-icl", type=float, default=1, help="(1) interactive contrastive learning, nats")
    add("--lambda-mfd", type=float, default=0, help="(0) masked feature distillation; the paper's ablation: 2000")
    add("--lambda-gd", type=float, default=0, help="(0) gradient distillation; ablation: 1e8 (N/1024)^2")
    add("--lambda-afd", type=float, default=0, help="(0) augmented feature distillation, nats; the paper gives none")
    add("--mask-ratio", type=float, default=0.75, help="(0.75) share of the patches that MFD hides, in [0, 1)")
    add = parser.add_argument_group("optimiser: AdamW, linear warm-up, then cosine to 0").add_argument
    add("--epochs", type=int, default=32, help="(32)")
    add("--batch-size", type=int, default=1024, help="(1024) pairs a step over all processes: the N of the losses")
    add("--lr", type=float, default=1e-3, help="(1e-3) peak learning rate")
    add("--weight-decay", type=float, default=0.1, help="(0.1) not on biases, norms and scales")
    add("--warmup", type=int, metavar="STEPS", help="(10000, but at most a tenth of the run)")
    add = parser.add_argument_group("run").add_argument
    add("--out", default="out", metavar="DIR", help="(out) folder of the run; a checkpoint in it is continued")
    add("--seed", type=int, default=0, help="(0)")
    add("--log-every", type=int, default=50, metavar="STEPS", help="(50)")
    add("--save-every", type=int, metavar="STEPS", help="(once an epoch) write checkpoint.pt and student/")
    add("--eval-every", type=int, default=1, metavar="EPOCHS", help="(1) evaluate; 0 = only at the end")
    add("--eval-only", action="store_true", help="evaluate --student on --val-data and --zeroshot, train nothing")

    args = parser.parse_args(argv)
    if demo := not (args.train_data or args.eval_only):
        parser.set_defaults(**DEMO)  # what the user typed still wins over the demo's own values
    args = parser.parse_args(argv, argparse.Namespace(demo=demo))
    for name, value in vars(args).items():
        low, high = name in ("epochs", "batch_size", "log_every", "save_every"), 1 if name == "mask_ratio" else math.inf
        if type(value) in (int, float) and not low <= value < high:
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be a number in [{low:d}, {high})")
    if args.batch_size % WORLD:
        raise BadInput(f"--batch-size {args.batch_size}: is over all processes, so it must be a multiple of {WORLD}")
    if not any(getattr(args, f"lambda_{name}") for name in LOSSES):
        raise BadInput("--lambda-*: all are 0, so there is nothing to learn; give one a weight")
    if args.eval_only and not (args.val_data or args.zeroshot):
        raise BadInput("--eval-only: nothing to evaluate on; give --val-data, --zeroshot or both")
    return args


# ---- Data. What is random depends on (seed, epoch, index) alone: workers, processes and resuming change nothing. ----
def read_pairs(files):
    """Image paths and captions of TSV or CSV files whose first line names the columns filepath and title."""
    csv.field_size_limit(2**31 - 1)  # a caption may be of any length
    paths, titles = [], []
    for file in files:
        if not os.path.isfile(file):
            raise BadInput(f"{file}: no such file; expected a TSV or CSV with the columns filepath and title")
        with open(file, encoding="utf-8-sig", errors="replace", newline="\n") as lines:
            header, first = next(lines, "").rstrip("\r\n"), len(paths)
            separator, named = ("\t", "tab") if "\t" in header else (",", "comma")
            columns = next(csv.reader([header], delimiter=separator), [])
            if not {"filepath", "title"} <= set(columns):
                raise BadInput(f"{file}: needs the columns filepath and title; found {columns} (separator: {named})")
            for line in lines:
                line = line.rstrip("\r\n")
                row = next(csv.reader([line], delimiter=separator), [])  # by line: no stray quote eats the next rows
                pair = dict(zip(columns, row if len(row) == len(columns) else line.split(separator)))
                if pair.get("filepath") and pair.get("title"):
                    paths.append(os.path.join(os.path.dirname(file), pair["filepath"]))
                    titles.append(pair["title"])
        if len(paths) == first:
            raise BadInput(f"{file}: no usable row; each needs a filepath and a title")
        for path in paths[first :: 1 + (len(paths) - first) // 20_000]:  # all of a small file, a sample of a large one
            if not os.path.isfile(path):
                raise BadInput(f"{file}: no image {path}; a filepath is absolute, or relative to this file's folder")
    return paths, titles


class Pairs(Dataset):
    """Training pairs. A list of n keys (epoch, index) gives images uint8 [n, 3, size, size], tokens [n, context] for
    each tokenizer, and how many pictures could not be decoded: each gives way to the next one, so shapes never change.

    Teacher and student share one random crop (FD compares two looks at one view); it stays uint8 until on the device.
    """

    def __init__(self, files, size, tokenizers, seed):
        self.paths, self.titles = read_pairs(files)
        self.size, self.tokenizers, self.seed = size, tokenizers, seed

    def __getitem__(self, keys):
        images, titles, skipped = torch.empty(len(keys), 3, self.size, self.size, dtype=torch.uint8), [], 0
        for row, (epoch, index) in enumerate(keys):
            while (image := self.crop(epoch, index)) is None:
                skipped, index = skipped + 1, (index + 1) % len(self.paths)
                if skipped > 1000:
                    raise BadInput(f"{self.paths[index - 1]}: cannot be decoded, nor can 1000 others of the same batch")
            images[row] = image
            titles.append(self.titles[index])
        return images, [tokenize(titles) for tokenize in self.tokenizers], skipped

    def crop(self, epoch, index):
        torch.default_generator.manual_seed(hash((self.seed, epoch, index)) % 2**63)  # get_params draws from it
        try:
            with Image.open(self.paths[index]) as image:
                image = image.convert("RGB")
        except Exception:  # Pillow raises nearly anything on a damaged file
            return None
        y, x, height, width = T.RandomResizedCrop.get_params(image, scale=(0.9, 1), ratio=(3 / 4, 4 / 3))  # as CLIP
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, (x, y, x + width, y + height))
        return T.functional.pil_to_tensor(image)


def batch_keys(pairs, batch, seed, first, last):
    """For each of the steps first..last-1 this process's n keys (epoch, index); a new permutation every epoch."""
    n = batch // WORLD
    for step in range(first, last):
        epoch, k = divmod(step, pairs // batch)
        if step == first or k == 0:
            order = torch.randperm(pairs, generator=torch.Generator().manual_seed(hash((seed, epoch)) % 2**63))
        yield [(epoch, index) for index in order[k * batch + RANK * n :][:n].tolist()]


def normaliser(model, device):
    """A function uint8 [n, 3, S, S] -> float [n, 3, H, W] as this model's image tower wants it: its size, mean, std."""
    cfg = model.visual.preprocess_cfg
    mean, std = (torch.tensor(cfg[key], device=device).view(3, 1, 1) for key in ("mean", "std"))
    resize = T.Resize(cfg["size"], T.InterpolationMode.BICUBIC)  # does nothing to pictures that have the size
    return lambda images: (resize(images).float() / 255 - mean) / std


# ---- Processes. ----
def setup():
    """The device of this process, after joining the others."""
    gpus = torch.cuda.device_count()
    if 0 < gpus < LOCAL_WORLD:
        raise BadInput(f"{LOCAL_WORLD} processes but {gpus} GPUs: start torchrun with --nproc_per_node={gpus}")
    device = torch.device("cuda", LOCAL_RANK) if gpus else torch.device("cpu")
    torch.set_num_threads(max(1, CORES // 2))  # the other half is for the loaders
    if gpus:
        torch.cuda.set_device(device)
    if WORLD > 1:
        dist.init_process_group("nccl" if gpus else "gloo", device_id=device if gpus else None)
    return device


def gather(x):
    """Rows of every process in rank order: [n, D] -> [N, D]; the identity on one process.

    all_gather has no gradient, so our own rows go back in, with their gradient times WORLD: every process computes
    the whole loss, and DDP then averages over the processes. The result is exactly the one-process gradient.
    """
    if WORLD == 1:
        return x
    rows = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(rows, x.detach().contiguous())
    rows[RANK] = x + (WORLD - 1) * (x - x.detach())  # value x, gradient WORLD * dx
    return torch.cat(rows)


# ---- Models, all from open_clip. Of the paper's students (Table 2) it lacks these six; they share one text tower. ----
def clip_config(vision, embed_dim=512, width=384, heads=6, layers=12, context=77):
    text = {"context_length": context, "vocab_size": 49408, "width": width, "heads": heads, "layers": layers}
    return {"embed_dim": embed_dim, "vision_cfg": {"image_size": 224, **vision}, "text_cfg": text}


STUDENTS = {
    "ViT-T-16": clip_config({"layers": 12, "width": 192, "patch_size": 16}),  # 3 heads of 64
    "swin_tiny": clip_config({"timm_model_name": "swin_tiny_patch4_window7_224", "timm_pool": ""}),
    # timm's last layer is the projection: open_clip's would expect 576 inputs where timm now gives 1024
    "mobilenetv3_small_100": clip_config({"timm_model_name": "mobilenetv3_small_100", "timm_proj": ""}),
    **{timm: clip_config({"timm_model_name": timm, "timm_pool": ""})
       for timm in ("mobilevit_s", "efficientnet_b0", "resnet18")},
    # for the demo: 32 x 32 pixels, 20 tokens
    "demo-teacher": clip_config({"image_size": 32, "layers": [1, 1, 1, 1], "width": 12}, 64, 64, 2, 1, 20),
    "demo-student": clip_config({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}, 64, 32, 2, 1, 20),
    "demo-vit": clip_config({"image_size": 32, "layers": 2, "width": 64, "patch_size": 4}, 48, 32, 2, 1, 20),
}


def load_model(spec, flag, need_weights=False):
    """(open_clip model, its tokenizer, its configuration) from any form that --help lists; `flag` is for messages."""
    name, weights = spec, None
    try:
        if not spec.startswith(("local-dir:", "hf-hub:")):
            name, _, weights = spec.partition(":")
            if name.endswith(".json"):
                open_clip.add_model_config(name)
                name = Path(name).stem
            elif name in STUDENTS:
                with tempfile.TemporaryDirectory() as folder:  # open_clip takes new architectures from JSON files only
                    Path(folder, f"{name}.json").write_text(json.dumps(STUDENTS[name]))
                    open_clip.add_model_config(folder)
            if name not in (known := [*open_clip.list_models(), *STUDENTS]):
                near = ", ".join(difflib.get_close_matches(name, known, 3, 0.3)) or "in open_clip.list_models()"
                near = f"local-dir:{name}" if os.path.isdir(name) else near
                raise BadInput(f"{flag} {name}: unknown model; the nearest names are {near}")
            tags = open_clip.list_pretrained_tags_by_model(name)
            if not os.path.isfile(weights) and weights not in tags and (weights or need_weights):
                found = f"{weights} is neither a file nor a tag" if weights else "needs weights, NAME:FILE or NAME:TAG"
                raise BadInput(f"{flag} {spec}: {found}; tags of {name}: {', '.join(tags) or 'none'}")
        model = open_clip.create_model(name, weights, require_pretrained=need_weights, weights_only=True)
        return model, open_clip.get_tokenizer(name), open_clip.get_model_config(name)
    except BadInput:
        raise
    except Exception as error:  # a wrong file or a missing package can make open_clip stumble anywhere
        reason, wrong = " ".join(str(error).split())[:300], []
        with contextlib.suppress(Exception):  # if the file can be read at all, say what in it does not fit
            has, wants = load_state_dict(weights), open_clip.create_model(name).state_dict()
            wrong = [k for k in {**wants, **has} if k not in has or k not in wants or has[k].shape != wants[k].shape]
        if wrong:
            reason = f"{len(wrong)} weights are missing, unknown or of another shape, first {', '.join(wrong[:3])}"
        raise BadInput(f"{flag} {spec}: cannot be loaded: {reason}") from error


def autocast(device):
    """bfloat16 inside the towers on a GPU that has it (Ampere on), else float32. Unlike float16 it needs no scaler."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


# ---- The method. ----
class Distiller(nn.Module):
    """The student and the few trainable parts its losses need. DDP wraps it, so all of it is synchronised and saved.

    lambdas: {loss: weight}; parts are built, and losses computed, only where the weight is above 0.
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
        student.logit_scale.requires_grad_(not {"clip", "crd", "gd"}.isdisjoint(on))  # DDP: no idle parameters
        if "mfd" in on and isinstance(student.visual, open_clip.transformer.VisionTransformer):
            student.visual.patch_dropout = open_clip.transformer.PatchDropout(0.0)  # on in encode_masked only

    def forward(self, images, tokens, img_t=None, txt_t=None, scale_t=None):
        """Normalised images [n, 3, H, W], tokens [n, context], unit rows [n, D_t] -> {loss: its value, unweighted}."""
        with autocast(images.device):
            x, y = self.student.encode_image(images), self.student.encode_text(tokens)  # raw [n, D_s]
            m = self.encode_masked(images) if "mfd" in self.on else x
        x, y, m = (e.to(self.student.logit_scale.dtype) for e in (x, y, m))
        def rows(embedding):  # [n, D] -> unit rows [N, D]
            return gather(F.normalize(embedding, dim=1))
        img_s, txt_s = img_p, txt_p = rows(x), rows(y)  # [N, D_s]
        if self.project:
            m, img_p, txt_p = self.proj_img(m), rows(self.proj_img(x)), rows(self.proj_txt(y))  # [N, D_t]
        if img_t is not None:
            img_t, txt_t = gather(img_t), gather(txt_t)  # [N, D_t]
        scale_s = self.student.logit_scale.exp()
        compute = {
            "clip": lambda: clip_loss(img_s, txt_s, scale_s),
            "crd": lambda: crd_loss(img_s, txt_s, img_t, txt_t, scale_s, scale_t),
            "fd": lambda: fd_loss(img_p, txt_p, img_t, txt_t),
            "mfd": lambda: mfd_loss(rows(m), txt_p, img_t, txt_t),
            "gd": lambda: gd_loss(img_p, txt_p, img_t, txt_t, scale_s, scale_t),
            "icl": lambda: icl_loss(img_p, txt_p, img_t, txt_t, self.icl_log_scale.exp()),
            "afd": lambda: afd_loss(img_s, txt_s, img_t, txt_t, self.fuse_img, self.fuse_txt, self.afd_log_scale.exp()),
        }
        return {name: compute[name]() for name in self.on}

    def encode_masked(self, images):
        """Raw student embedding [n, D_s] of images that lost mask_ratio of their patches at random (Eq. 12).

        A ViT drops the patches, as MAE does; other towers get them blanked (0 = the mean colour) on a 14 x 14 grid,
        patches of 16 pixels at 224.
        """
        drop = getattr(self.student.visual, "patch_dropout", None)
        if drop is None:
            noise = torch.rand(len(images), 196, device=images.device)
            keep = noise.argsort(1).argsort(1) < int(196 * (1 - self.mask_ratio))  # exactly so many in each image
            keep = F.interpolate(keep.view(-1, 1, 14, 14).to(images.dtype), images.shape[2:])
            return self.student.encode_image(images * keep)
        drop.prob = self.mask_ratio
        masked = self.student.encode_image(images)
        drop.prob = 0.0
        return masked

    @torch.no_grad()
    def clamp_scales(self):
        """Keep every 1/tau in [1, 100]; call it after each optimiser step."""
        for name, parameter in self.named_parameters():
            if name.endswith(("logit_scale", "log_scale")):
                parameter.clamp_(0, math.log(100))


@torch.no_grad()
def teach(teacher, images, tokens):
    """The teacher's unit rows [n, D_t], of images and of texts."""
    with autocast(images.device):
        img, txt = teacher.encode_image(images), teacher.encode_text(tokens)
    return F.normalize(img.float(), dim=1), F.normalize(txt.float(), dim=1)


def make_optimizer(model, args):
    """AdamW, no decay on biases, norms and scales; betas and eps by the student's family, as the authors' scripts."""
    groups = [{"params": [], "weight_decay": args.weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.ndim < 2 or "bias" in name]["params"].append(p)  # Swin's position biases are matrices
    betas, eps = ((0.9, 0.98), 1e-6) if "vit" in args.student.lower() else ((0.9, 0.999), 1e-8)
    return torch.optim.AdamW(groups, lr=args.lr, betas=betas, eps=eps, fused=True)


def lr_at(step, steps, warmup, peak):
    """Learning rate of step 0..steps-1: linear to the peak over `warmup` steps, then half a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


# ---- Evaluation, with open_clip's own preprocessing and prompts. Each process takes every WORLD-th batch. ----
def read_pictures(preprocess, paths):
    try:
        return torch.stack([preprocess(Image.open(path := name)) for name in paths])
    except Exception as error:  # leaving it out would change the score
        raise BadInput(f"{path}: this evaluation picture cannot be read: {error}") from error


@torch.no_grad()
def embed(encode, items, collate, device, workers, batch=256):
    """Unit rows [len(items), D] of encode(collate(items)), on every process."""
    batches = [range(i, min(i + batch, len(items))) for i in range(0, len(items), batch)]
    loader = DataLoader(items, batch_sampler=batches[RANK::WORLD], collate_fn=collate, num_workers=workers)
    rows = torch.zeros(len(items), encode(collate(items[:1]).to(device)).shape[1], device=device)
    for i, x in zip(batches[RANK::WORLD], tqdm(loader, "evaluate", leave=False, disable=RANK > 0)):
        rows[i.start : i.stop] = F.normalize(encode(x.to(device)).float(), dim=1)
    if WORLD > 1:
        dist.all_reduce(rows)  # each row is zero on all processes but one
    return rows


def class_folders(root):
    """Image paths, their labels, class names and prompt templates of a folder of class folders."""
    if not os.path.isdir(root):
        raise BadInput(f"--zeroshot {root}: no such folder; expected one folder per class, with its images in it")
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
    names, templates = [folder.replace("_", " ") for folder in folders], ["a photo of a {}"]
    if any(re.fullmatch(r"n\d{8}", folder) for folder in folders) or set(folders) == {str(i) for i in range(1000)}:
        # ImageNet, -R, -A, -Sketch (the classes present), or -V2, where folder "10" sorts before "2"
        number = {key: i for i, wnid in enumerate(ImageNetInfo().label_names()) for key in (wnid, str(i))}
        if strange := [folder for folder in folders if folder not in number]:
            raise BadInput(f"--zeroshot {root}: {strange[0]} is not one of ImageNet's 1000 classes")
        names = [open_clip.IMAGENET_CLASSNAMES[number[folder]] for folder in folders]
        templates = open_clip.OPENAI_IMAGENET_TEMPLATES
    files = [(str(path), label) for label, folder in enumerate(folders)
             for path in sorted(Path(root, folder).iterdir()) if path.suffix.lower() in IMG_EXTENSIONS]
    if not files:
        raise BadInput(f"--zeroshot {root}: no class folder with images in it")
    return *zip(*files), names, templates


def read_evaluations(args):
    """What --zeroshot and --val-data name, read and checked before any work."""
    named = [root.partition("=")[::2] if "=" in root else (root, root) for root in args.zeroshot]
    return {name: class_folders(root) for name, root in named}, args.val_data and read_pairs([args.val_data])


def recalls(query, key, query_owner, key_owner):
    """{R@k: percent of queries [Q, D] with a key [K, D] of the same owner (image number) among the k nearest}."""
    hits = torch.cat([query_owner[i, None] == key_owner[(query[i] @ key.T).topk(min(10, len(key))).indices]
                      for i in torch.arange(len(query), device=query.device).split(1024)])  # [Q, 10]
    return {f"R@{k}": 100 * hits[:, :k].any(1).double().mean().item() for k in (1, 5, 10)}


@torch.no_grad()
def evaluate(model, tokenizer, zeroshot, retrieval, workers, device):
    """{metric: percent}: top-1 of each zero-shot set; recalls both ways, where every caption of an image counts."""
    was_training, result = model.training, {}
    model.eval()
    for buffer in model.buffers() if WORLD > 1 else ():  # batch-norm statistics differ; student/ has those of rank 0
        dist.broadcast(buffer, 0)
    read = partial(read_pictures, image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False))
    for name, (paths, labels, classes, templates) in zeroshot.items():
        head = open_clip.build_zero_shot_classifier(model, tokenizer, classes, templates, device=device)  # [D, classes]
        best = (embed(model.encode_image, paths, read, device, workers) @ head).argmax(1)
        result[f"{name} top-1"] = 100 * (best == torch.tensor(labels, device=device)).double().mean().item()
    if retrieval:
        number = {path: i for i, path in enumerate(dict.fromkeys(retrieval[0]))}  # each image once
        owner = torch.tensor([number[path] for path in retrieval[0]], device=device)
        img = embed(model.encode_image, list(number), read, device, workers)
        txt = embed(model.encode_text, retrieval[1], tokenizer, device, workers)
        own = torch.arange(len(img), device=device)
        result |= {f"I2T {k}": v for k, v in recalls(img, txt, own, owner).items()}
        result |= {f"T2I {k}": v for k, v in recalls(txt, img, owner, own).items()}
    model.train(was_training)
    return result


# ---- Files of a run, written under another name and then renamed: a kill leaves the old or the new one, whole. ----

# Flags that may differ when a run is continued; any other difference would make it another run.
FREE = {*"demo train_data val_data zeroshot workers out log_every save_every eval_every eval_only".split()}


def replace(path, write):
    write(f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_checkpoint(out, recipe):
    """The checkpoint in folder `out`, or None; refuses a damaged one and one of another recipe."""
    path = Path(out, "checkpoint.pt")
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["recipe"]
    except Exception as error:
        raise BadInput(f"{path}: cut off, or not a checkpoint of clipkd.py; move it away to start afresh") from error
    for key, value in recipe.items():
        if before.get(key) != value:
            raise BadInput(f"--out {out}: holds a run with {key} {before.get(key)}, this command has {value}; "
                           "give the same flags to continue it, or another --out")
    return state


def export(student, config, folder):
    """The student in open_clip's format: its create_model_and_transforms("local-dir:FOLDER") needs no code of ours."""
    folder.mkdir(exist_ok=True)
    preprocess = {key: student.visual.preprocess_cfg[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    replace(folder / "open_clip_config.json", lambda path: Path(path).write_text(text))
    weights = {key: value.detach().cpu().contiguous() for key, value in student.state_dict().items()}
    replace(folder / "open_clip_model.safetensors", lambda path: safetensors.torch.save_file(weights, path))


# ---- Training. ----
def train(args, device):
    """Train --student, or continue; returns its last evaluation: step, eval, seconds and parameters."""
    torch.manual_seed(args.seed)  # the same start on every process
    lambdas = {name: getattr(args, f"lambda_{name}") for name in LOSSES}
    student, tokenizer, config = load_model(args.student, "--student")
    teacher, dim_t, tokenizers = None, config["embed_dim"], [tokenizer]
    if any(lambdas[name] for name in LOSSES[1:]):
        teacher, tokenizer_t, config_t = load_model(args.teacher, "--teacher", need_weights=True)
        teacher.to(device).eval().requires_grad_(False)
        normalise_t, scale_t, dim_t = normaliser(teacher, device), teacher.logit_scale.exp(), config_t["embed_dim"]
        vocabularies = [cfg["text_cfg"].get("hf_tokenizer_name") for cfg in (config, config_t)]
        if vocabularies[0] != vocabularies[1] or tokenizer.context_length != tokenizer_t.context_length:
            tokenizers.append(tokenizer_t)  # tokens[0] is for the student, tokens[-1] for the teacher
    size = max(np.max(model.visual.preprocess_cfg["size"]) for model in (student, teacher or student))
    data, evaluations = Pairs(args.train_data, int(size), tokenizers, args.seed), read_evaluations(args)
    pairs = len(data.paths)
    if pairs < args.batch_size:
        raise BadInput(f"--batch-size {args.batch_size}: more than the {pairs} pairs of --train-data")
    distiller = Distiller(student, config["embed_dim"], dim_t, lambdas, args.mask_ratio).to(device)
    optimizer, normalise = make_optimizer(distiller, args), normaliser(student, device)
    per_epoch = pairs // args.batch_size  # pairs that fill no batch wait for another epoch's permutation
    steps = args.epochs * per_epoch
    warmup = min(10_000, steps // 10) if args.warmup is None else args.warmup

    recipe = {f"--{k.replace('_', '-')}": v for k, v in vars(args).items() if k not in FREE} | {"pairs": pairs}
    first, before, log_end, result, out = 0, 0.0, 0, {}, Path(args.out)
    if state := load_checkpoint(out, recipe):
        distiller.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, before, log_end, result = (state[key] for key in ("step", "seconds", "log_end", "result"))
    if RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        log = open(out / "log.jsonl", "a")
        log.truncate(min(log_end, os.path.getsize(log.name)))  # lines newer than the checkpoint will come again
        if not first:
            print(json.dumps({"argv": sys.argv, "args": vars(args), "processes": WORLD, "torch": torch.__version__,
                              "open_clip": open_clip.__version__}), file=log)
    model = distiller.train()
    if WORLD > 1:
        model = nn.parallel.DistributedDataParallel(distiller, [device.index] if device.type == "cuda" else None)

    def save(done):
        if RANK == 0:
            export(student, config, out / "student")
            state = {"recipe": recipe, "step": done, "seconds": before + time.perf_counter() - start, "result": result,
                     "log_end": log.tell(), "model": distiller.state_dict(), "optimizer": optimizer.state_dict()}
            replace(out / "checkpoint.pt", lambda path: torch.save(state, path))

    def score(done):
        scores = evaluate(student, tokenizer, *evaluations, args.workers, device)
        result.update(step=done, epoch=done / per_epoch, eval=scores, seconds=before + time.perf_counter() - start,
                      parameters=sum(parameter.numel() for parameter in student.parameters()))
        if RANK == 0:
            print(json.dumps(result), file=log, flush=True)
        save(done)  # once more, with the scores

    keys = batch_keys(pairs, args.batch_size, args.seed, first, steps)
    loader = DataLoader(data, None, sampler=keys, num_workers=args.workers, pin_memory=device.type == "cuda")
    bar = tqdm(total=steps, initial=first, desc=args.out, unit="step", mininterval=1, disable=RANK > 0)
    start = end = time.perf_counter()
    waited, skips = 0.0, 0
    for step, (images, tokens, skipped) in enumerate(loader, first):
        waited, skips = waited + time.perf_counter() - end, skips + skipped
        images, tokens = images.to(device, non_blocking=True), [t.to(device, non_blocking=True) for t in tokens]
        torch.manual_seed(hash((args.seed, step, RANK)) % 2**63)  # for MFD's masks, Swin's stochastic depth
        from_teacher = (*teach(teacher, normalise_t(images), tokens[-1]), scale_t) if teacher else ()
        losses = model(normalise(images), tokens[0], *from_teacher)
        total = sum(lambdas[name] * loss for name, loss in losses.items())
        optimizer.zero_grad()
        total.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, steps, warmup, args.lr)
        optimizer.step()
        distiller.clamp_scales()

        bar.update()
        done = step + 1
        log_now, save_now = (done % k == 0 or done == steps for k in (args.log_every, args.save_every or per_epoch))
        if log_now or save_now:  # .item() waits for the device, so only here
            values = {name: loss.item() for name, loss in losses.items()}
            if not all(map(math.isfinite, values.values())):
                raise BadInput(f"--lr {args.lr}: at step {done} a loss is not finite: {values}; what {out} holds is of "
                               "an earlier step. Try a lower --lr or lambda, with another --out")
        if log_now and RANK == 0:
            spent = time.perf_counter() - start
            record = {"step": done, "epoch": done / per_epoch, "total": total.item(), **values, "lr": group["lr"],
                      "scale": student.logit_scale.exp().item(), "seconds": before + spent, "data_wait": waited,
                      "pairs_per_s": (done - first) * args.batch_size / spent, "skipped": skips}
            print(json.dumps(record), file=log, flush=True)
            bar.set_postfix(loss=f"{record['total']:.3f}", **({"skipped_pictures": skips} if skips else {}))
        if save_now:
            save(done)
        if args.eval_every and done % (args.eval_every * per_epoch) == 0:
            score(done)
        end = time.perf_counter()
    if result.get("step") != steps:
        score(steps)
    bar.close()
    if WORLD > 1:
        dist.barrier()  # from here on student/ is there for every process
    return result


# ---- Demo: the paper's strongest setting (Table 5) in miniature. A teacher that saw many clean pairs, students with
# few and noisy ones, in a world of captioned shapes. Real files, and the same train() as any run. ----

DEMO = {"student": "demo-student", "teacher": "demo-teacher", "epochs": 16, "batch_size": 64, "lambda_fd": 250.0,
        "save_every": 300, "eval_every": 0}
TEACHER_EPOCHS, TEACHER_PAIRS, STUDENT_PAIRS = 3, 20_000, 2_000
KEPT, WRONG = 0.6, 0.1  # chance that a caption keeps an attribute; that a student's names a wrong colour and shape
COLOURS = "red green blue yellow orange purple pink cyan brown olive".split()
SHAPES = {  # inside(u, v) in the shape's own axes, scaled to [-1, 1]
    "circle": lambda u, v: u**2 + v**2 < 1,
    "ring": lambda u, v: abs(u**2 + v**2 - 0.7) < 0.3,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.85,
    "diamond": lambda u, v: 1.5 * abs(u) + abs(v) < 1,
    "triangle": lambda u, v: (v < 0.7) & (2 * abs(u) - v < 1),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 1),
    "star": lambda u, v: u**2 + v**2 < (0.65 + 0.35 * np.cos(5 * np.arctan2(u, -v))) ** 2,
    "crescent": lambda u, v: (u**2 + v**2 < 1) & ((u - 0.5) ** 2 + v**2 > 0.6),
    "bar": lambda u, v: (abs(u) < 1) & (abs(v) < 0.3),
    "arch": lambda u, v: (abs(u**2 + v**2 - 0.7) < 0.3) & (v < 0.1),
}
SIZES = {"small": 7, "large": 11}  # radius, pixels
PLACES = {"in the middle": (0, 0), "in the top left": (-6, -6), "in the top right": (6, -6),
          "in the bottom left": (-6, 6), "in the bottom right": (6, 6)}  # x, y from the centre, pixels
GROUNDS = "black gray white navy".split()


def draw(colour, shape, size, place, ground, random):
    """A picture of 32 x 32 pixels, with jitter, rotation and noise."""
    centre, angle = PLACES[place] + random.uniform(14.5, 16.5, 2), random.uniform(-0.35, 0.35)
    y, x = (np.mgrid[:32, :32] - centre[::-1, None, None]) / (SIZES[size] + random.uniform(-1, 1))
    inside = SHAPES[shape](np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x)
    fore, back = (ImageColor.getrgb(name) + random.uniform(-15, 15, 3) for name in (colour, ground))
    pixels = np.where(inside[..., None], fore, back) + random.uniform(-12, 12, (32, 32, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def caption(colour, shape, size, place, ground, random, kept):
    """What a web text says of a picture: the shape, and each attribute with chance `kept`."""
    size, colour, place, ground = (word if random.random() < kept else "" for word in (size, colour, place, ground))
    start = random.choice(["a", "a photo of a", "a picture of a"])
    return " ".join(filter(None, (start, size, colour, shape, place, ground and f"on a {ground} background")))


def make_world(folder, seed):
    """Write the demo's pictures: four sets, each a TSV of captions and a tree of class folders at once."""
    random, temporary = np.random.default_rng(seed), folder.with_suffix(".tmp")
    kinds = [*itertools.product(COLOURS, SHAPES)]
    every = [*itertools.product(COLOURS, SHAPES, SIZES, PLACES, GROUNDS)]  # 4000
    hidden = [kind for i, kind in enumerate(kinds) if (i // 10 + 3 * i) % 5 == 0]  # 20 of 100 are never trained on
    seen, unseen = [row for row in every if row[:2] not in hidden], [row for row in every if row[:2] in hidden]

    def write(name, rows, kept=1.0, wrong=0.0):
        for colour, shape in kinds:  # all 100 classes in every set: the same choice for seen and held-out pictures
            (temporary / name / f"{colour} {shape}").mkdir(parents=True, exist_ok=True)
        lines = ["filepath\ttitle"]
        for i, row in enumerate(rows):
            file = f"{name}/{row[0]} {row[1]}/{i:05d}.jpg"
            draw(*row, random).save(temporary / file, quality=90)
            said = random.choice(seen)[:2] if random.random() < wrong else row[:2]
            lines.append(f"{file}\t{caption(*said, *row[2:], random, kept)}")
        (temporary / f"{name}.tsv").write_text("\n".join(lines))

    write("teacher", random.choice(seen, TEACHER_PAIRS), KEPT)
    write("students", random.choice(seen, STUDENT_PAIRS), KEPT, WRONG)
    write("seen", random.permutation(seen)[:1000])  # 1000 different full captions
    write("held-out", random.permutation(unseen)[:500])
    temporary.rename(folder)


def demo(args, device):
    """Write the world, train teacher, student alone and student with CLIP-KD, and print a table of the three."""
    for flag in ("student", "teacher"):
        load_model(getattr(args, flag), f"--{flag}")  # a wrong name is told before anything is written
    if args.batch_size > STUDENT_PAIRS:
        raise BadInput(f"--batch-size {args.batch_size}: more than the {STUDENT_PAIRS} pairs of the demo's students")
    root = f"{args.out}/seed{args.seed}"
    if RANK == 0 and not os.path.exists(f"{root}/data"):
        make_world(Path(root, "data"), args.seed)
    if WORLD > 1:
        dist.barrier()
    common = vars(args) | {"train_data": [f"{root}/data/students.tsv"], "val_data": f"{root}/data/seen.tsv",
                           "zeroshot": [f"{name}={root}/data/{name}" for name in ("seen", "held-out")]}
    alone = {f"lambda_{name}": float(name == "clip") for name in LOSSES}
    of_teacher = {"student": args.teacher, "epochs": TEACHER_EPOCHS, "train_data": [f"{root}/data/teacher.tsv"]}
    rows = {}
    for name, changes in (("teacher", alone | of_teacher), ("student alone", alone),
                          ("student + CLIP-KD", {"teacher": f"local-dir:{root}/teacher/student"})):
        out = f"{root}/{re.sub('[^a-z]+', '-', name.lower())}"
        rows[name] = train(argparse.Namespace(**common | changes | {"out": out}), device)
    if RANK == 0:
        print("\n| | zero-shot, seen | zero-shot, held-out | I2T R@1 | T2I R@1 | parameters | time |")
        print("|---" * 7 + "|")
        for name, row in rows.items():
            scores = [f"{row['eval'][key]:.1f}" for key in ("seen top-1", "held-out top-1", "I2T R@1", "T2I R@1")]
            print("|", " | ".join([name, *scores, f"{row['parameters'] / 1e6:.1f} M", f"{row['seconds']:.0f} s"]), "|")
        teacher, before, after = (row["eval"]["seen top-1"] for row in rows.values())
        print(f"\nFrom the same {STUDENT_PAIRS} noisy pairs the same student names {before:.0f} % of new pictures when "
              f"alone and {after:.0f} % with CLIP-KD; its teacher, from {TEACHER_PAIRS} clean pairs, {teacher:.0f} %.")


def main():
    logging.disable(logging.WARNING)  # open_clip warns that a new student has no weights
    args = get_args()
    device = setup()
    if args.demo:
        demo(args, device)
    elif args.eval_only:
        model, tokenizer, _ = load_model(args.student, "--student", need_weights=True)
        scores = evaluate(model.to(device), tokenizer, *read_evaluations(args), args.workers, device)
    else:
        scores = train(args, device)["eval"]
    if RANK == 0 and not args.demo:
        scores = [f"{name} {value:.2f}" for name, value in scores.items()]
        print(args.student if args.eval_only else f"local-dir:{args.out}/student", *scores, sep=" | ")
    if WORLD > 1:
        dist.barrier()  # a process that leaves while another still talks makes gloo abort
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        time.sleep(2 * (RANK > 0))  # torchrun ends all once rank 0 has ended: one message instead of many
        print("clipkd.py: error:", str(error).split("BadInput: ")[-1].strip(), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nclipkd.py: stopped; the same command continues from its checkpoint", file=sys.stderr)
        sys.exit(130)
