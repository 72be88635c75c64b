"""Distil a CLIP teacher into a small CLIP student with the losses of CLIP-KD (CVPR 2024, arXiv 2307.12732).

    python clipkd.py                                                      # demo: teacher, student, student + CLIP-KD
    torchrun --nproc_per_node=8 clipkd.py --train-data cc3m.tsv cc12m/    # the paper's recipe: 32 epochs, batch 1024
    python clipkd.py --eval-only --student local-dir:out/student --zeroshot imagenet/val --val-data coco.json

A run writes into --out: log.jsonl (one JSON object a line: the command, then losses and evaluations), checkpoint.pt
(the same command again resumes from it) and student/ (open_clip loads it as local-dir:out/student, without this file).
The losses are in losses.py. Symbols: n = pairs on this process, N = pairs in the whole batch, D = embedding width.
"""
import argparse, contextlib, csv, difflib, hashlib, io, itertools, json, logging, math, multiprocessing, os, re, shutil
import signal, sys, tarfile, tempfile, time, warnings
from functools import partial
from pathlib import Path

RANK, WORLD, LOCAL_RANK, LOCAL_WORLD = (int(os.environ.get(name, default)) for name, default in (
    ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))  # torchrun sets these
CORES = os.cpu_count() // LOCAL_WORLD  # for each process; may be 0
LOSSES = ("clip", "crd", "fd", "mfd", "gd", "icl", "afd")
PICTURES = (".jpg", ".jpeg", ".png", ".webp")

class BadInput(Exception):
    """A mistake in a flag or a file. Its message is all the user sees: what is wrong, where, and what to do."""

# ---- Flags. With --train-data and no other flag a run is the paper's recipe (Sec. 4.1); without it, the demo. ----
def get_args(argv=None):
    about = __doc__.split("\n")[0] + " Without --train-data and --eval-only: a demo on pictures that it draws."
    parser = argparse.ArgumentParser(usage="clipkd.py [--flag value ...]", description=about, allow_abbrev=False)
    add = parser.add_argument_group("data").add_argument
    add("--train-data", nargs="+", metavar="FILE", help="TSV or CSV with columns filepath (from FILE on) and title; "
        "tars of KEY.jpg and KEY.txt, also as a folder or 'cc12m/{00000..01242}.tar'")
    add("--val-data", nargs="+", default=[], metavar="[NAME=]FILE", help="retrieval: the same, where an image may have "
        "several rows, or COCO's captions.json, or Flickr30k's .txt")
    add("--zeroshot", nargs="+", default=[], metavar="[NAME=]DIR", help="folders of class folders, ImageNet's or any")
    add("--workers", type=int, default=min(8, CORES // 2), help="(half the cores, at most 8) loaders for each process")
    forms = "NAME, NAME:TAG, NAME:FILE, local-dir:DIR, hf-hub:ORG/NAME of open_clip, or a configuration FILE.json"
    add = parser.add_argument_group("models", forms).add_argument
    add("--student", default="ViT-T-16", help="(ViT-T-16) also mobilevit_s, swin_tiny, mobilenetv3_small_100, "
        "efficientnet_b0, resnet18, and for 32 pixels demo-student, demo-vit")
    add("--teacher", default="ViT-B-16:laion400m_e32", help="(ViT-B-16:laion400m_e32) read for KD losses and --inherit")
    add("--inherit", action="store_true", help="start as a cut-out of the teacher, a larger ViT or RN (TinyCLIP)")
    add = parser.add_argument_group("losses", "total = sum of lambda * loss, unscaled; 0 = not computed").add_argument
    add("--lambda-clip", type=float, default=1, help="(1) task loss, nats")
    add("--lambda-crd", type=float, default=1, help="(1) contrastive relational distillation, nats")
    add("--lambda-fd", type=float, default=2000, help="(2000) feature distillation, mean over N and D; demo: 250")
    add("--lambda-icl", type=float, default=1, help="(1) interactive contrastive learning, nats")
    add("--lambda-mfd", type=float, default=0, help="(0) masked feature distillation; the paper's ablation: 2000")
    add("--lambda-gd", type=float, default=0, help="(0) gradient distillation; ablation: 1e8 (N/1024)^2")
    add("--lambda-afd", type=float, default=0, help="(0) augmented feature distillation, nats; the paper gives none")
    add("--crd-scale", type=float, metavar="1/TAU", help="(none) fix both scales of CRD; TinyCLIP: 50")
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
    add("--bench", type=int, metavar="STEPS", help="print where the time of a step goes, with or without --train-data")
    args = parser.parse_args(argv)
    if demo := not (args.train_data or args.eval_only or args.bench):
        parser.set_defaults(**DEMO)  # what the user typed still wins over the demo's own values
    args = parser.parse_args(argv, argparse.Namespace(demo=demo))
    for name, value in vars(args).items():
        low = name in ("epochs", "batch_size", "log_every", "save_every", "bench", "crd_scale")
        high = 1 if name == "mask_ratio" else math.inf
        if type(value) in (int, float) and not low <= value < high:
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be a number in [{low:d}, {high})")
    if args.batch_size % WORLD and not args.eval_only:
        raise BadInput(f"--batch-size {args.batch_size}: is over all processes, so it must be a multiple of {WORLD}")
    if not any(getattr(args, f"lambda_{name}") for name in LOSSES):
        raise BadInput("--lambda-*: all are 0, so there is nothing to learn; give one a weight")
    if args.crd_scale and not args.lambda_crd:
        raise BadInput(f"--crd-scale {args.crd_scale}: is for CRD, which --lambda-crd 0 switches off")
    if (args.eval_only or demo) and args.eval_only != bool(args.val_data + args.zeroshot):
        raise BadInput("--val-data, --zeroshot: need --eval-only or --train-data, and --eval-only needs one of them")
    return args

if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:
    get_args()  # prints the help and leaves: the imports below take seconds

import numpy as np
import open_clip
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageDraw, ImageFont
from timm.data import ImageNetInfo
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T
from torchvision.transforms import v2
from tqdm import tqdm

from losses import (afd_loss, blank_patches, clip_loss, crd_loss, fd_loss, gd_loss, icl_loss, linear_cka, mfd_loss,
                    pair_gap, recalls)

# ---- Data. A pair is five numbers that say where it lies in which file: no strings in memory. What is random depends
# on (seed, epoch, index) alone, so that workers, processes, resuming and TSV or tar change nothing. ----
def sources(name):
    """[(file, columns, separator)] of a file, a folder of tars, or a range {00000..01242}; a tar has no columns."""
    files = sorted(map(str, Path(name).glob("*.tar"))) or [name]
    if ends := re.search(r"\{(\d+)\.\.(\d+)\}", name):
        files = [name.replace(ends[0], f"{i:0{len(ends[1])}}") for i in range(int(ends[1]), int(ends[2]) + 1)]
    found = [(file, None, None) for file in files]
    for i, file in enumerate(files):
        if not os.path.isfile(file):
            raise BadInput(f"{file}: no such file, nor a folder of tars; expected TSV or CSV files, or .tar shards")
        if not file.endswith(".tar"):
            with open(file, encoding="utf-8-sig", errors="replace") as lines:
                header = lines.readline().rstrip("\n")
            separator, word = ("\t", "tab") if "\t" in header else (",", "comma")
            columns = [column.strip('" ') for column in header.split(separator)]
            if not {"filepath", "title"} <= {*columns}:
                raise BadInput(f"{file}: needs the columns filepath and title; found {columns} (separator: {word})")
            found[i] = file, columns, separator
    return found

def scan(source):
    """Where the pairs lie, int64 [pairs, 4]: start and length of the caption (of its line, in a TSV or CSV), then of
    the picture in a tar, where KEY.txt belongs to KEY.jpg, .jpeg, .png or .webp."""
    file, columns, separator = source
    if columns:
        with open(file, "rb") as lines:  # by line, so that no stray quote swallows the next ones
            ends = np.fromiter(itertools.accumulate(map(len, lines)), np.int64)
        rows = np.pad(np.stack([ends[:-1], np.diff(ends)], axis=1), ((0, 0), (0, 2)))
        return rows[rows[:, 1] > 2]  # not the empty lines
    pairs, size, damaged = {}, os.path.getsize(file), False
    with open(file, "rb") as data:
        while data.tell() < size:
            try:
                for member in tarfile.open(fileobj=data, mode="r:", ignore_zeros=True):  # passes over damaged headers
                    key, kind = os.path.splitext(member.name)
                    if kind.lower() in (".txt", *PICTURES) and member.offset_data + member.size <= size:
                        place = slice(0, 2) if kind.lower() == ".txt" else slice(2, 4)
                        pairs.setdefault(key, [0, 0, 0, 0])[place] = member.offset_data, member.size
                break
            except Exception:  # what tarfile does not pass over; go on behind it
                damaged = True
        data.seek(max(0, size - 512))
        damaged |= any(data.read())  # a tar ends with zeros
    rows = [row for row in pairs.values() if row[1] and row[3]]
    if damaged:
        tqdm.write(f"clipkd.py: warning: {file}: cut off or damaged; {len(rows)} pairs in it are whole", sys.stderr)
    return np.array(rows, np.int64).reshape(-1, 4)

def read_pair(source, row):
    """((path, start, length) of a picture in a tar or (path,) of one in a file of its own, caption)."""
    (file, columns, separator), (start, length, *place) = source, map(int, row)
    with open(file, "rb") as data:
        data.seek(start)
        caption = data.read(length).decode("utf-8", "replace")
    if columns:
        line, place = re.sub("[\r\n\0]+", " ", caption).rstrip(" "), ()
        quoted = next(csv.reader([line], delimiter=separator)) if '"' in line and len(line) < 2**17 else []
        pair = dict(zip(columns, quoted if len(quoted) == len(columns) else line.split(separator)))
        file, caption = os.path.join(os.path.dirname(file), pair["filepath"]), pair["title"]
    if not caption.strip():
        raise ValueError(f"{file}: no caption")
    return (file, *place), caption[:1000]  # more than 77 tokens; an endless word would take the tokenizer minutes

def open_picture(path, start=0, length=-1):
    try:
        with open(path, "rb") as file:
            file.seek(start)
            image = Image.open(io.BytesIO(file.read(length)))
        image.load()
        if image.mode.startswith("I;16"):  # convert would clip 16 bits to white
            image = image.point(lambda value: value / 256).convert("L")
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy
    except Exception as error:  # Pillow raises nearly anything on a damaged picture
        raise BadInput(f"{path}: this picture cannot be read: {error}") from error

class Pairs(Dataset):
    """Training pairs. A list of n keys (epoch, index) gives images uint8 [n, 3, size, size], tokens [n, context] for
    each tokenizer, and how many pairs could not be read: each gives way to the next one, so shapes never change.
    Teacher and student share one random crop (FD compares two looks at one view), uint8 until it is on the device.
    Where the pairs lie is kept in `folder` and mapped from there, so that all processes share its memory."""

    def __init__(self, names, size, tokenizers, seed, folder):
        self.size, self.tokenizers, self.seed = size, tokenizers, seed
        self.sources = [source for name in names for source in sources(name)]
        stats = [(os.path.abspath(file), os.path.getsize(file), os.path.getmtime(file)) for file, *_ in self.sources]
        path = Path(folder, hashlib.sha256(repr(stats).encode()).hexdigest()[:16] + ".npy")
        if RANK == 0 and not path.exists():
            with multiprocessing.Pool(min(len(self.sources), os.cpu_count())) as pool:
                bar = tqdm(pool.imap(scan, self.sources), "scan", len(self.sources), unit="file", leave=False)
                rows = np.concatenate([np.insert(rows, 0, i, axis=1) for i, rows in enumerate(bar)])
            replace(path, partial(np.save, arr=rows))
        barrier()
        self.rows = np.load(path, "r")  # [pairs, 5]: number of the source, then what scan() says
        if not len(self):
            raise BadInput(f"{self.sources[0][0]}: no pair of a picture and a caption in it")
        self[[(0, 0)]]  # a wrong folder shows here

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, keys):
        images, captions, unread = torch.empty(len(keys), 3, self.size, self.size, dtype=torch.uint8), [], 0
        for epoch, index in keys:
            while True:
                try:
                    images[len(captions)], caption = self.load(epoch, index % len(self))
                    break
                except Exception as error:  # whatever is wrong with one pair, a run of days goes on
                    unread, index = unread + 1, index + 1
                    if unread >= min(1000, len(self)):
                        raise BadInput(f"--train-data: {unread} pairs of a batch cannot be read, the last: {error}; a "
                                       "filepath is absolute, or relative to the folder of its file") from error
            captions.append(caption)
        return images, [tokenize(captions) for tokenize in self.tokenizers], unread

    def load(self, epoch, index):
        """A crop, uint8 [3, size, size], and its caption."""
        source, *row = self.rows[index]
        picture, caption = read_pair(self.sources[source], row)
        pixels = torch.from_numpy(np.array(open_picture(*picture))).permute(2, 0, 1)  # uint8: resizes twice as fast
        torch.default_generator.manual_seed(hash((self.seed, epoch, index)) % 2**63)  # get_params draws from it
        crop = T.RandomResizedCrop.get_params(pixels, scale=(0.9, 1), ratio=(3 / 4, 4 / 3))  # y, x, h, w
        size = [self.size, self.size]
        return v2.functional.resized_crop(pixels, *crop, size, T.InterpolationMode.BICUBIC), caption

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
    torch.set_num_threads(max(1, CORES // 2))  # the other half is for the loaders
    device = torch.device("cuda", LOCAL_RANK) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    if WORLD > 1:
        store = next(dist.rendezvous("env://"))[0]
        if WORLD == LOCAL_WORLD:  # torchrun --max-restarts can keep the store, and in it the addresses of the dead
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"  # what only the hosts agree on does not wait for GPUs
        dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD, device_id=device if gpus else None)
    return device

def barrier():
    if WORLD > 1:
        dist.barrier()

class Gather(torch.autograd.Function):
    """Rows of every process in rank order: [n, D] -> [N, D]. In backward each row gets the gradients of all processes:
    they sum up here and DDP divides by WORLD, so the mean of the processes' losses has the one-process gradient."""

    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(WORLD)]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(WORLD)[RANK]

def gather(x):
    return Gather.apply(x) if WORLD > 1 else x

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
    name, weights = (spec, None) if spec.startswith(("local-dir:", "hf-hub:")) else spec.partition(":")[::2]
    try:
        if name.endswith(".json"):
            open_clip.add_model_config(name)
            name = Path(name).stem
        elif name in STUDENTS:
            with tempfile.TemporaryDirectory() as folder:  # open_clip takes new architectures from JSON files only
                Path(folder, f"{name}.json").write_text(json.dumps(STUDENTS[name]))
                open_clip.add_model_config(folder)
        model = open_clip.create_model(name, weights, require_pretrained=need_weights, weights_only=True)
        return model, open_clip.get_tokenizer(name), open_clip.get_model_config(name)
    except Exception as error:  # a wrong file or a missing package can make open_clip stumble anywhere
        reason, known = " ".join(str(error).split())[:300], [*open_clip.list_models(), *STUDENTS]
        if weights is not None and name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, 3, 0.3))
            reason = f"unknown model; the nearest names are {near}; a folder is local-dir:FOLDER"
        elif weights is not None and not os.path.isfile(weights):
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            reason += f"; give NAME:FILE or NAME:TAG, tags: {tags}"
        raise BadInput(f"{flag} {spec}: cannot be loaded: {reason}") from error

@torch.no_grad()
def inherit(student, teacher, path=""):
    """Cut the student out of the teacher, in place: the manual weight inheritance of TinyCLIP (Wu et al., ICCV 2023).

    Goes down both models side by side. Of L_t layers the student's number i takes number i * (L_t // L_s). Every
    tensor becomes the leading slice of the teacher's, in attention that of q, of k and of v: its first heads, whole.
    """
    def look(module):
        """What must be equal, since else the same weights would compute something else; tensors; parts."""
        tensors = dict([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])
        equal = {key: value for key, value in vars(module).items() if type(value) in (bool, str) and key != "training"}
        if hasattr(module, "num_heads"):
            equal["width of a head"] = next(module.parameters()).shape[-1] // module.num_heads
        return {"class": type(module).__name__, "tensors": [*tensors], **equal}, tensors, [*module.named_children()]

    def need(fits, what, ours, theirs):
        if not fits:
            raise BadInput(f"--inherit: {path}{what}: {ours} in the student, {theirs} in the teacher; the student must "
                           "be an open_clip ViT or ResNet like the teacher, only narrower or shallower")

    (equal, tensors, parts), (equal_t, tensors_t, parts_t) = look(student), look(teacher)
    for key, value in equal.items():
        need(value == equal_t.get(key) and value not in ("TimmModel", "HFTextEncoder"), key, value, equal_t.get(key))
    need(len(parts) <= len(parts_t), "number of parts", len(parts), len(parts_t))
    for i, (name, part) in enumerate(parts):
        inherit(part, parts_t[i * (len(parts_t) // len(parts))][1], f"{path}{name}.")
    for name, new in tensors.items():
        old = tensors_t[name]
        fixed = slice(1) if re.search("visual.*positional|token_embedding", path + name) else slice(2, None)
        need(new.ndim == old.ndim and all(n <= m for n, m in zip(new.shape, old.shape))
             and new.shape[fixed] == old.shape[fixed], name, [*new.shape], [*old.shape])  # positions, words, pixels
        if name.startswith("in_proj"):
            new, old = new.unflatten(0, (3, -1)), old.unflatten(0, (3, -1))  # q, k, v
        new.copy_(old[tuple(map(slice, new.shape))])

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
    crd_scale: a fixed 1/tau for both softmaxes of CRD (TinyCLIP); None: the student's learned and the teacher's own.
    """
    lap = staticmethod(lambda name: None)  # bench() takes the time here

    def __init__(self, student, dim_s, dim_t, lambdas, mask_ratio=0.75, crd_scale=None):
        super().__init__()
        self.student, self.mask_ratio, self.crd_scale = student, mask_ratio, crd_scale
        self.on = on = [name for name in LOSSES if lambdas.get(name, 0) > 0]
        self.project = dim_s != dim_t and not {"fd", "mfd", "gd", "icl"}.isdisjoint(on)
        if self.project:
            self.proj_img, self.proj_txt = nn.Linear(dim_s, dim_t), nn.Linear(dim_s, dim_t)
        if "icl" in on:
            self.icl_log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if "afd" in on:
            self.fuse_img, self.fuse_txt = nn.Linear(dim_s + dim_t, dim_s), nn.Linear(dim_s + dim_t, dim_s)
            self.afd_log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        learns_scale = {"clip", "gd"} if crd_scale else {"clip", "gd", "crd"}
        student.logit_scale.requires_grad_(not learns_scale.isdisjoint(on))  # DDP: no idle parameters
        if crd_scale and learns_scale.isdisjoint(on):
            nn.init.constant_(student.logit_scale, math.log(crd_scale))  # exported with the scale it is trained at
        if "mfd" in on and isinstance(student.visual, open_clip.transformer.VisionTransformer):
            student.visual.patch_dropout = open_clip.transformer.PatchDropout(0.0)  # on in encode_masked only

    def forward(self, images, tokens, img_t=None, txt_t=None, scale_t=None):
        """Normalised images [n, 3, H, W], tokens [n, context], unit rows [n, D_t] -> {loss: its value, unweighted, of
        the pairs of this process}."""
        with autocast(images.device):
            x, y = self.student.encode_image(images), self.student.encode_text(tokens)  # raw [n, D_s]
            m = self.encode_masked(images) if "mfd" in self.on else x
        x, y, m = (e.to(self.student.logit_scale.dtype) for e in (x, y, m))
        self.lap("student forward")
        if torch.is_grad_enabled():  # autograd comes back first to the embedding that was made last
            (m if "mfd" in self.on else y).register_hook(lambda gradient: self.lap("losses backward"))
        img_s, txt_s = img_p, txt_p = rows(x), rows(y)  # [N, D_s]
        if self.project:
            m, img_p, txt_p = self.proj_img(m), rows(self.proj_img(x)), rows(self.proj_txt(y))  # [N, D_t]
        if img_t is not None:
            img_t, txt_t = gather(img_t), gather(txt_t)  # [N, D_t]
        self.lap("gather")
        scale_s, fuse = self.student.logit_scale.exp(), (self.fuse_img, self.fuse_txt) if "afd" in self.on else ()
        fixed = self.crd_scale
        own = slice(RANK * len(x), RANK * len(x) + len(x))  # the pairs this process answers for; GD is not divided
        compute = {
            "clip": lambda: clip_loss(img_s, txt_s, scale_s, own),
            "crd": lambda: crd_loss(img_s, txt_s, img_t, txt_t, fixed or scale_s, fixed or scale_t, own),
            "fd": lambda: fd_loss(img_p[own], txt_p[own], img_t[own], txt_t[own]),
            "mfd": lambda: mfd_loss(F.normalize(m, dim=1), txt_p[own], img_t[own], txt_t[own]),
            "gd": lambda: gd_loss(img_p, txt_p, img_t, txt_t, scale_s, scale_t),
            "icl": lambda: icl_loss(img_p, txt_p, img_t, txt_t, self.icl_log_scale.exp(), own),
            "afd": lambda: afd_loss(img_s, txt_s, img_t, txt_t, *fuse, self.afd_log_scale.exp(), own),
        }
        losses = {name: compute[name]() for name in self.on}
        self.lap("losses forward")
        return losses

    def encode_masked(self, images):
        """Raw embedding [n, D_s] of images that lost mask_ratio of their patches (Eq. 12); a ViT drops them, as MAE."""
        drop = getattr(self.student.visual, "patch_dropout", None)
        if drop is None:
            return self.student.encode_image(blank_patches(images, self.mask_ratio))
        drop.prob = self.mask_ratio
        masked = self.student.encode_image(images)
        drop.prob = 0.0
        return masked

    @torch.no_grad()
    def clamp_scales(self):
        """Keep every 1/tau in [1, 100]; call it after each optimiser step."""
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and name.endswith(("logit_scale", "log_scale")):
                parameter.clamp_(0, math.log(100))

def rows(embedding):
    """[n, D] -> unit rows of all processes [N, D]."""
    return gather(F.normalize(embedding, dim=1))

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

# ---- Evaluation, with open_clip's own preprocessing and prompts. ----
@contextlib.contextmanager
def on_signal(handler):
    """Ctrl-C and SIGTERM call handler(number, frame)."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

def ignore_signals(worker):
    """For loaders. Ctrl-C and schedulers signal every process, but the main one still needs batches to end its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, signal.SIG_IGN)

@torch.no_grad()
def embed(encode, items, collate, device, workers=0, batch=256):
    """Unit rows [len(items), D] of encode(collate(items)), on every process. Each takes every WORLD-th batch."""
    batches = [range(i, min(i + batch, len(items))) for i in range(0, len(items), batch)]
    loader = DataLoader(items, batch_sampler=batches[RANK::WORLD], collate_fn=collate, num_workers=workers,
                        worker_init_fn=ignore_signals)
    rows = torch.zeros(len(items), encode(collate(items[:1])).shape[1], device=device)
    for i, x in zip(batches[RANK::WORLD], tqdm(loader, "evaluate", leave=False, disable=RANK > 0)):
        rows[i.start : i.stop] = F.normalize(encode(x).float(), dim=1)
    if WORLD > 1:
        dist.all_reduce(rows)  # each row is zero on all processes but one
    return rows

def embed_pictures(model, pictures, device, workers):
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    def read(pictures):
        return torch.stack([transform(open_picture(*picture)) for picture in pictures])
    return embed(lambda x: model.encode_image(x.to(device)), pictures, read, device, workers)

def embed_captions(model, tokenizer, captions, device):
    return embed(lambda captions: model.encode_text(tokenizer(captions).to(device)), captions, list, device)

def class_folders(root):
    """Labels, pictures, class names and prompt templates of a folder of class folders."""
    folders = sorted(name for name in next(os.walk(root), ("", []))[1] if name[0] != ".")
    names, templates = [folder.replace("_", " ") for folder in folders], ["a photo of a {}"]
    if any(re.fullmatch(r"n\d{8}", folder) for folder in folders) or {*folders} == {str(i) for i in range(1000)}:
        # ImageNet, -R, -A, -Sketch (scored among the classes present), or -V2, where folder "10" sorts before "2"
        number = {key: i for i, wnid in enumerate(ImageNetInfo().label_names()) for key in (wnid, str(i))}
        if strange := [folder for folder in folders if folder not in number]:
            raise BadInput(f"--zeroshot {root}: {strange[0]} is not one of ImageNet's 1000 classes")
        names = [open_clip.IMAGENET_CLASSNAMES[number[folder]] for folder in folders]
        templates = open_clip.OPENAI_IMAGENET_TEMPLATES
    files = [(label, (str(path),)) for label, folder in enumerate(folders)
             for path in sorted(Path(root, folder).iterdir()) if path.suffix.lower() in PICTURES]
    if not files:
        raise BadInput(f"--zeroshot {root}: no such folder, or no class folders with pictures in it")
    return *zip(*files), names, templates

def caption_pairs(name):
    """[(picture, caption)] of COCO's JSON or Flickr30k's TXT, whose pictures lie beside the file or in a folder beside
    it, or of any file that can be trained on."""
    try:
        if not name.endswith((".json", ".txt")):
            return [read_pair(source, row) for source in sources(name) for row in scan(source)]
        text, folder = Path(name).read_text("utf-8"), Path(name).parent
        if name.endswith(".txt"):
            pairs = re.findall(r"^(.+?\.jpg),(.+)$", text, re.MULTILINE)
        else:
            coco = json.loads(text)
            files = {image["id"]: image["file_name"] for image in coco["images"]}
            pairs = [(files[row["image_id"]], row["caption"]) for row in coco["annotations"]]
    except (OSError, ValueError, LookupError, TypeError) as error:  # leaving a row out would change the score
        raise BadInput(f"--val-data {name}: not as --help says, or a row is damaged: {error!r}") from error
    folders = [folder, *filter(Path.is_dir, folder.iterdir())]
    path = {file: next((f / file for f in folders if (f / file).is_file()), folder / file) for file, _ in pairs}
    return [((str(path[file]),), caption) for file, caption in pairs]

def read_evaluations(args):
    """{name: class folders} of --zeroshot and {name: captioned pictures} of --val-data, checked before any work."""
    named = [[value.split("=", 1) if "=" in value and not os.path.exists(value) else (value, value) for value in values]
             for values in (args.zeroshot, args.val_data)]
    zeroshot = {name: class_folders(root) for name, root in named[0]}
    retrieval = {name: caption_pairs(file) for name, file in named[1]}
    for name, pairs in retrieval.items():
        if not pairs:
            raise BadInput(f"--val-data {name}: no captions in it")
        open_picture(*pairs[0][0])
    return zeroshot, retrieval

@torch.no_grad()
def evaluate(model, tokenizer, zeroshot, retrieval, device, workers, teacher=None, rows_t=None):
    """{set: {metric: value}}. Percent: top-1; recalls both ways, where every caption of an image counts, and R@1 with
    only its first caption, as in the paper's tables. Similarity: of positive minus of negative pairs (Fig. 2b); with
    the teacher (model, tokenizer), whose rows are kept in the dictionary rows_t, linear CKA and cosine (Fig. 3)."""
    was_training, result = model.training, {name: {} for name in [*zeroshot, *retrieval]}
    model.eval()
    for buffer in model.buffers() if WORLD > 1 else ():  # batch-norm statistics differ; student/ has those of rank 0
        dist.broadcast(buffer, 0)
    for name, (labels, pictures, classes, templates) in zeroshot.items():
        build = partial(open_clip.build_zero_shot_classifier, model, tokenizer, templates=templates, device=device)
        head = embed(lambda names: build(names).T, classes, list, device, batch=10)  # [classes, D]
        best = (embed_pictures(model, pictures, device, workers) @ head.T).argmax(1)
        result[name]["top-1"] = 100 * (best == torch.tensor(labels, device=device)).double().mean().item()
    for name, pairs in retrieval.items():
        (pictures, captions), scores = zip(*pairs), result[name]
        number = {picture: i for i, picture in enumerate(dict.fromkeys(pictures))}  # each picture once
        owner = torch.tensor([number[picture] for picture in pictures], device=device)
        own, first = torch.arange(len(number), device=device), np.unique(owner.cpu(), return_index=True)[1]
        def embed_both(model, tokenizer):
            return embed_pictures(model, [*number], device, workers), embed_captions(model, tokenizer, captions, device)
        img, txt = embed_both(model, tokenizer)
        scores |= {f"I2T {k}": v for k, v in recalls(img, txt, own, owner).items()}
        scores |= {f"T2I {k}": v for k, v in recalls(txt, img, owner, own).items()}
        if len(first) < len(txt):
            scores["first-caption I2T R@1"] = recalls(img, txt[first], own, own)["R@1"]
            scores["first-caption T2I R@1"] = recalls(txt[first], img, own, own)["R@1"]
        scores["positive - negative"] = pair_gap(img, txt, owner).item()
        if teacher:
            rows_t[name] = rows_t.get(name) or embed_both(*teacher)
            for kind, s, t in zip(("image", "text"), (img, txt), rows_t[name]):
                scores[f"{kind} CKA"] = linear_cka(s, t).item()
                scores |= {f"{kind} cosine": (s * t).sum(1).mean().item()} if s.shape == t.shape else {}
    model.train(was_training)
    return result

# ---- Files of a run, written under another name and then renamed: a kill leaves the old or the new one, whole. ----
# Flags that may differ when a run is continued; any other difference would make it another run.
FREE = {*"demo train_data val_data zeroshot workers out log_every save_every eval_every eval_only".split()}

def replace(path, write):
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.tmp", "wb") as file:
            write(file)
        os.replace(f"{path}.tmp", path)
    except Exception as error:
        raise BadInput(f"{path}: cannot be written: {error}; what it held before is kept") from error

def load_checkpoint(path, recipe):
    """What save() wrote; refuses a damaged file and another recipe."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["recipe"]
    except Exception as error:
        raise BadInput(f"{path}: cut off, or not a checkpoint of clipkd.py; move it away to start afresh") from error
    for key, value in recipe.items():
        if before.get(key) != value:
            raise BadInput(f"{path}: is of a run with {key} {before.get(key)}, this command has {value}; give the same "
                           "flags to continue it, or another --out")
    return state

def export(student, config, folder):
    """The student in open_clip's format: its create_model_and_transforms("local-dir:FOLDER") needs no code of ours."""
    preprocess = {key: student.visual.preprocess_cfg[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    replace(folder / "open_clip_config.json", lambda file: file.write(text.encode()))
    weights = {key: value.detach().cpu().contiguous() for key, value in student.state_dict().items()}
    replace(folder / "open_clip_model.safetensors", lambda file: file.write(safetensors.torch.save(weights)))

# ---- Training. ----
def train(args, device, lap=Distiller.lap):
    """Train --student, or continue; returns the last record of log.jsonl that has an evaluation."""
    for name in args.train_data:
        sources(name)  # a wrong path is told before the models are loaded
    torch.manual_seed(args.seed)  # the same start on every process
    lambdas, out = {name: getattr(args, f"lambda_{name}") for name in LOSSES}, Path(args.out)
    student, tokenizer, config = load_model(args.student, "--student")
    teacher, tokenizers, reference, dim_t = None, [tokenizer], (), config["embed_dim"]
    distils = any(lambdas[name] for name in LOSSES[1:])
    if distils or args.inherit:
        teacher, tokenizer_t, config_t = load_model(args.teacher, "--teacher", need_weights=True)
        if args.inherit:  # a checkpoint, if there is one, is loaded over it
            inherit(student, teacher)
            student.visual.preprocess_cfg |= {key: teacher.visual.preprocess_cfg[key] for key in ("mean", "std")}
        teacher.to(device).eval().requires_grad_(False)
        normalise_t, scale_t, dim_t = normaliser(teacher, device), teacher.logit_scale.exp(), config_t["embed_dim"]
        tokenizers, reference = [tokenizer, tokenizer_t], ((teacher, tokenizer_t), {})
    size = max(np.max(model.visual.preprocess_cfg["size"]) for model in (student, teacher or student))
    evaluations = read_evaluations(args)
    data = Pairs(args.train_data, int(size), tokenizers, args.seed, out / "scans")
    per_epoch = len(data) // args.batch_size  # pairs that fill no batch wait for another epoch's permutation
    if not per_epoch:
        raise BadInput(f"--batch-size {args.batch_size}: more than the {len(data)} pairs of --train-data")
    steps = args.bench or args.epochs * per_epoch
    warmup = min(10_000, steps // 10) if args.warmup is None else args.warmup
    distiller = Distiller(student, config["embed_dim"], dim_t, lambdas, args.mask_ratio, args.crd_scale)
    distiller.to(device)
    optimizer, normalise = make_optimizer(distiller, args), normaliser(student, device)

    recipe = {f"--{k.replace('_', '-')}": v for k, v in vars(args).items() if k not in FREE} | {"pairs": len(data)}
    state = {"recipe": recipe, "step": 0, "seconds": 0.0, "skipped": 0, "log_end": 0, "result": {}}
    if (out / "checkpoint.pt").exists():
        state = load_checkpoint(out / "checkpoint.pt", recipe)
        distiller.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
    first, before, skipped, result = (state[key] for key in ("step", "seconds", "skipped", "result"))
    log = open(out / "log.jsonl" if RANK == 0 else os.devnull, "a")
    if RANK == 0:  # lines newer than the checkpoint will come again
        log.truncate(min(state["log_end"], os.path.getsize(log.name)))
        log.seek(0, os.SEEK_END)
    if not first:
        print(json.dumps({"argv": sys.argv, "args": vars(args), "processes": WORLD, "torch": torch.__version__,
                          "open_clip": open_clip.__version__}), file=log)
    distiller.lap = lap
    model = distiller.train()
    if WORLD > 1:
        model = nn.parallel.DistributedDataParallel(distiller, [device.index] if device.type == "cuda" else None)

    def save(done):
        if RANK == 0:
            log.flush()
            export(student, config, out / "student")
            state.update(step=done, seconds=time.perf_counter() - start, skipped=skipped, result=result,
                         log_end=log.tell(), model=distiller.state_dict(), optimizer=optimizer.state_dict())
            replace(out / "checkpoint.pt", partial(torch.save, state))
        barrier()  # from here on both are there for every process

    def score(done):
        with on_signal(signal.default_int_handler):  # all is saved
            scores = evaluate(student, tokenizer, *evaluations, device, args.workers, *reference)
        result.update(step=done, epoch=done / per_epoch, eval=scores, seconds=time.perf_counter() - start,
                      parameters=sum(parameter.numel() for parameter in student.parameters()))
        print(json.dumps(result), file=log)
        save(done)  # once more, with the scores

    def due(done):
        return done == steps or args.eval_every and done % (args.eval_every * per_epoch) == 0

    begin = time.perf_counter()
    start = begin - before  # of the first run
    if first and due(first) and result.get("step") != first:  # interrupted while it was evaluating
        score(first)
    keys, signals = batch_keys(len(data), args.batch_size, args.seed, first, steps), []
    loader = DataLoader(data, None, sampler=keys, num_workers=args.workers, pin_memory=device.type == "cuda",
                        worker_init_fn=ignore_signals)
    bar = tqdm(total=steps, initial=first, desc=args.out, unit="step", mininterval=1, disable=RANK > 0)
    waited, end = 0.0, time.perf_counter()
    with on_signal(lambda number, frame: signals.append(number)):  # the step in progress ends first
        for step, (images, tokens, unread) in enumerate(loader, first):
            waited, skipped = waited + time.perf_counter() - end, skipped + unread
            lap("wait for data")
            images, tokens = images.to(device, non_blocking=True), [t.to(device, non_blocking=True) for t in tokens]
            torch.manual_seed(hash((args.seed, step, RANK)) % 2**63)  # for MFD's masks, Swin's stochastic depth
            from_teacher = (*teach(teacher, normalise_t(images), tokens[-1]), scale_t) if distils else ()
            lap("teacher forward")
            losses = model(normalise(images), tokens[0], *from_teacher)
            total = sum(lambdas[name] * loss for name, loss in losses.items())
            optimizer.zero_grad()
            total.backward()
            lap("student backward")
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, steps, warmup, args.lr)
            optimizer.step()
            distiller.clamp_scales()
            lap("optimiser")
            bar.update()

            done, stop = step + 1, torch.tensor(max(signals, default=0))
            if WORLD > 1:
                dist.all_reduce(stop, dist.ReduceOp.MAX)  # on the hosts: no GPU is waited for
            log_now = done % args.log_every == 0 or done == steps
            save_now = done % (args.save_every or per_epoch) == 0 or due(done) or stop > 0
            if log_now or save_now:  # .tolist() waits for the device, so only here
                values = torch.stack([*losses.values(), total]).detach()
                if WORLD > 1:
                    dist.all_reduce(values)
                *values, total = (values / WORLD).tolist()
                values = dict(zip(losses, values))
                bad = [name for name, value in values.items() if not math.isfinite(value)]
                bad += [name for name, p in distiller.named_parameters() if save_now and not p.isfinite().all()]
                if bad:
                    raise BadInput(f"--lr {args.lr}: at step {done} not finite: {', '.join(bad[:3])}; {out} holds step "
                                   f"{state['step']}. Try a lower --lr or lambda, with another --out")
            if log_now:
                now = time.perf_counter()
                record = {"step": done, "epoch": done / per_epoch, "total": total, **values, "lr": group["lr"],
                          "scale": student.logit_scale.exp().item(), "seconds": now - start, "data_wait": waited,
                          "pairs_per_s": (done - first) * args.batch_size / (now - begin), "skipped": skipped}
                print(json.dumps(record), file=log, flush=True)
                bar.set_postfix(loss=f"{record['total']:.3f}", skipped=skipped)
            if save_now:
                save(done)
            if stop:
                if RANK == 0:
                    bar.write(f"clipkd.py: saved at step {done}; the same command continues from there")
                sys.exit(128 + stop.item())
            if due(done):
                score(done)
            end = time.perf_counter()
    bar.close()
    return result

def bench(args, device):
    """Run train() for --bench steps in a folder of its own and print where their time goes: medians of this process."""
    parts, last, n, folder = {}, [0.0], args.batch_size // WORLD, Path(args.out, "bench")

    def clock():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(name):
        now = clock()
        parts.setdefault(name, []).append(1000 * (now - last[0]))  # ms
        last[0] = now

    if RANK == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        Image.effect_noise((512, 384), 50).convert("RGB").save(folder / "0.jpg")  # without --train-data, always this
        rows = "0.jpg\ta photo of noise\n" * (args.batch_size * (args.bench + 1))
        (folder / "0.tsv").write_text("filepath\ttitle\n" + rows)
    barrier()
    changes = {"train_data": args.train_data or [f"{folder}/0.tsv"], "log_every": 10**9, "save_every": 10**9}
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see into it
    with FlopCounterMode(display=False) as counter:
        small = {"out": f"{folder}/count", "bench": 1, "batch_size": 2 * WORLD}
        train(argparse.Namespace(**vars(args) | changes | small), device)
    torch.backends.mha.set_fastpath_enabled(True)
    train(argparse.Namespace(**vars(args) | changes | {"out": f"{folder}/time", "bench": args.bench + 1}), device, lap)
    barrier()
    if RANK == 0:
        shutil.rmtree(folder)
        parts = {name: np.array(values[1:]) for name, values in parts.items()}  # without the first step
        median = {name: float(np.median(values)) for name, values in parts.items()}
        step = float(np.median(sum(parts.values())))
        models = sum(median[name] for name in ("teacher forward", "student forward", "student backward", "optimiser"))
        flops = counter.get_total_flops() / 2  # of one pair, without the losses' share that grows with N
        print(f"\n| {n} of {args.batch_size} pairs on {device} | ms | share |\n|---|---|---|")
        for name, value in {**median, "whole step": step}.items():
            print(f"| {name} | {value:.1f} | {100 * value / step:.1f} % |")
        print(f"\n{1000 * args.batch_size / step:.1f} pairs/s, {flops / 1e9:.2f} GFLOP a pair, "
              f"{flops * n / step / 1e9:.3f} TFLOP/s a process; (step - wait) / (teacher + student + optimiser) = "
              f"{(step - median['wait for data']) / models:.3f}")
        if device.type == "cuda":
            x = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
            start, _ = clock(), [x @ x for _ in range(50)]
            ceiling = 50 * 2 * 8192**3 / (clock() - start)
            print(f"{100000 * flops * n / step / ceiling:.0f} % of what bfloat16 products of 8192 x 8192 reach here, "
                  f"{ceiling / 1e12:.0f} TFLOP/s")

# ---- Demo: Table 5 in miniature. A teacher that saw many clean pairs, students with few and noisy ones, in a world of
# coloured letters. Real files, and the same train() as any run. ----
DEMO = {"student": "demo-student", "teacher": "demo-teacher", "epochs": 16, "batch_size": 64, "lambda_fd": 250.0,
        "save_every": 300, "eval_every": 0}
TEACHER_EPOCHS, TEACHER_PAIRS, STUDENT_PAIRS = 3, 20_000, 2_000
COLOURS = "red green blue yellow orange purple pink cyan brown olive".split()
LETTERS = "C E H L O S T V X Z".split()
SIZES = {"small": 20, "large": 28}  # of the font, pixels
PLACES = {"in the middle": (16, 16), "in the top left": (11, 11), "in the top right": (21, 11),
          "in the bottom left": (11, 21), "in the bottom right": (21, 21)}  # x, y, pixels
GROUNDS = "black gray white navy".split()

def draw(colour, letter, size, place, ground, random):
    """A picture of 32 x 32 pixels, with jitter, rotation and noise."""
    picture, centre = Image.new("RGB", (32, 32), ground), tuple(PLACES[place] + random.uniform(-1, 1, 2))
    font = ImageFont.load_default(SIZES[size] + random.uniform(-2, 2))
    ImageDraw.Draw(picture).text(centre, letter, colour, font, anchor="mm", stroke_width=1)
    pixels = picture.rotate(random.uniform(-8, 8), Image.Resampling.BILINEAR, center=centre, fillcolor=ground)
    return Image.fromarray((pixels + random.uniform(-12, 12, (32, 32, 3))).clip(0, 255).astype(np.uint8))

def make_world(folder, seed):
    """Write four sets, each a TSV of captions and a tree of class folders at once. As on the web, a caption may leave
    attributes out (each is kept with chance `kept`) or, with chance `wrong`, name another colour and letter."""
    random, temporary = np.random.default_rng(seed), folder.with_suffix(".tmp")
    kinds = [*itertools.product(COLOURS, LETTERS)]
    hidden = [kind for i, kind in enumerate(kinds) if (i // 10 + 3 * i) % 5 == 0]  # 20 of 100 are never trained on
    every = [*itertools.product(COLOURS, LETTERS, SIZES, PLACES, GROUNDS)]  # 4000
    seen, unseen = [row for row in every if row[:2] not in hidden], [row for row in every if row[:2] in hidden]
    for name, rows, kept, wrong in (("teacher", random.choice(seen, TEACHER_PAIRS), 0.6, 0),
                                    ("students", random.choice(seen, STUDENT_PAIRS), 0.6, 0.1),
                                    ("seen", random.permutation(seen)[:1000], 1, 0),  # 1000 different captions
                                    ("held-out", random.permutation(unseen)[:500], 1, 0)):
        for kind in kinds:  # all 100 in every set: the same choice for seen and held-out pictures
            (temporary / name / " ".join(kind)).mkdir(parents=True, exist_ok=True)
        lines = ["filepath\ttitle"]
        for i, row in enumerate(rows):
            file = f"{name}/{row[0]} {row[1]}/{i:05d}.jpg"
            draw(*row, random).save(temporary / file, quality=90)
            colour, letter = random.choice(seen)[:2] if random.random() < wrong else row[:2]
            colour, size, place, ground = (x if random.random() < kept else "" for x in (colour, *row[2:]))
            start = random.choice(["a", "a photo of a", "a picture of a"])
            words = filter(None, (start, size, colour, letter, place, ground and f"on a {ground} background"))
            lines.append(f"{file}\t{' '.join(words)}")
        (temporary / f"{name}.tsv").write_text("\n".join(lines))
    temporary.rename(folder)

def demo(args, device):
    """Write the world, train teacher, student alone and student with CLIP-KD, and print a table of the three."""
    models = [load_model(getattr(args, flag), f"--{flag}")[0] for flag in ("student", "teacher")]
    if args.inherit:
        inherit(*models)  # as a wrong name, a pair that does not fit is told before anything is written
    root = f"{args.out}/seed{args.seed}"
    if RANK == 0 and not os.path.exists(f"{root}/data"):
        make_world(Path(root, "data"), args.seed)
    barrier()
    common = vars(args) | {"train_data": [f"{root}/data/students.tsv"], "val_data": [f"seen={root}/data/seen.tsv"],
                           "zeroshot": [f"{name}={root}/data/{name}" for name in ("seen", "held-out")]}
    alone = {f"lambda_{name}": float(name == "clip") for name in LOSSES} | {"inherit": False}
    of_teacher = {"student": args.teacher, "epochs": TEACHER_EPOCHS, "train_data": [f"{root}/data/teacher.tsv"]}
    table = ["| | zero-shot, seen | zero-shot, held-out | I2T R@1 | T2I R@1 | parameters | time |", "|---" * 7 + "|"]
    for name, changes in (("teacher", alone | of_teacher), ("student alone", alone),
                          ("student + CLIP-KD", {"teacher": f"local-dir:{root}/teacher/student"})):
        out = f"{root}/{re.sub('[^a-z]+', '-', name.lower())}"
        row = train(argparse.Namespace(**common | changes | {"out": out}), device)
        seen, held_out = row["eval"]["seen"], row["eval"]["held-out"]
        scores = [f"{score:.1f}" for score in (seen["top-1"], held_out["top-1"], seen["I2T R@1"], seen["T2I R@1"])]
        scores += [f"{row['parameters'] / 1e6:.1f} M", f"{row['seconds']:.0f} s"]
        table.append(f"| {name} | {' | '.join(scores)} |")
    if RANK == 0:
        print("", *table, sep="\n")

def main():
    logging.disable()  # open_clip warns that a new student has no weights
    warnings.filterwarnings("ignore", module="PIL")  # of odd pictures
    args = get_args()
    device = setup()
    if args.bench:
        bench(args, device)
    elif args.demo:
        demo(args, device)
    else:
        if args.eval_only:
            model, tokenizer, _ = load_model(args.student, "--student", need_weights=True)
            scores = evaluate(model.to(device), tokenizer, *read_evaluations(args), device, args.workers)
        else:
            scores = train(args, device)["eval"]
        if RANK == 0 and not args.eval_only:
            print(f"the student is in {args.out}/student")
        for name, values in scores.items() if RANK == 0 else ():
            print(f"{name}: " + ", ".join(f"{metric} {value:.4g}" for metric, value in values.items()))
    if WORLD > 1:
        dist.barrier()  # a process that leaves while another still talks makes gloo abort
        dist.destroy_process_group()

if __name__ == "__main__":
    try:
        main()
    except (BadInput, OSError) as error:
        time.sleep(2 * (RANK > 0))  # torchrun ends all once rank 0 has ended: one message instead of many
        print("clipkd.py: error:", str(error).split("BadInput: ")[-1].strip(), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nclipkd.py: stopped; training continues from its checkpoint with the same command", file=sys.stderr)
        sys.exit(130)
