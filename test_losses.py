"""Tests of losses.py and clipkd.py. They need no GPU and no network, and take minutes on 2 cores:

    python -m pytest -q test_losses.py

What a test expects comes from the paper's equations written as loops, from values worked out by
hand, from identities, from autograd or from open_clip. It never comes from the code under test.
`python test_losses.py` runs no test. It prints the measurements at the end of this file.
"""

import ast
import base64
import contextlib
import csv
import ctypes
import inspect
import io
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

# On the CPU everywhere: the script wants a GPU for each process, and a GPU may not repeat bits.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import clipkd
import losses
from clipkd import BadInput, Distiller
from losses import afd_loss, clip_loss, crd_loss, fd_loss, gd_loss, icl_loss, mfd_loss

ROOT = Path(__file__).parent
SCRIPT = ROOT / "clipkd.py"
torch.set_num_threads(1)  # as in the processes that the tests start: sums have the same order

# --------------------------------------------------------------------------------------------------
# The losses. N pairs of embeddings of width D, in float64, with other temperatures than 1.

N = 5
D = 4
SCALE_S = 3.0
SCALE_T = 7.0


def unit(seed, n=N, d=D):
    """n random embeddings of unit length."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    return F.normalize(x, dim=1)


@pytest.fixture
def four():
    """img_s, txt_s, img_t, txt_t"""
    return [unit(0), unit(1), unit(2), unit(3)]


def fuse(x):
    """Stands in for AFD's linear layers."""
    weight = torch.linspace(-1, 1, 2 * D * D, dtype=x.dtype).view(2 * D, D)
    return x @ weight


def keep_student(x):
    return x[:, :D]


def loss_of(name, img_s, txt_s, img_t, txt_t, scale_s=SCALE_S, scale_t=SCALE_T, fuse=fuse):
    if name == "clip":
        return clip_loss(img_s, txt_s, scale_s)
    if name == "crd":
        return crd_loss(img_s, txt_s, img_t, txt_t, scale_s, scale_t)
    if name == "fd":
        return fd_loss(img_s, txt_s, img_t, txt_t)
    if name == "mfd":
        return mfd_loss(img_s, txt_s, img_t, txt_t)
    if name == "gd":
        return gd_loss(img_s, txt_s, img_t, txt_t, scale_s, scale_t)
    if name == "icl":
        return icl_loss(img_s, txt_s, img_t, txt_t, scale_s)
    return afd_loss(img_s, txt_s, img_t, txt_t, fuse, fuse, scale_s)


# The equations as loops


def dot(a, b):
    total = 0.0
    for x, y in zip(a, b):
        total += float(x) * float(y)
    return total


def softmax_loop(anchor, partners, scale):
    powers = [math.exp(scale * dot(anchor, partner)) for partner in partners]
    return [power / sum(powers) for power in powers]


def nce_loop(anchors, partners, scale):
    """Eq. 1 and 2, with the mean over the batch."""
    total = 0.0
    for k, anchor in enumerate(anchors):
        total -= math.log(softmax_loop(anchor, partners, scale)[k])
    return total / len(anchors)


def kl_loop(anchors_t, partners_t, anchors_s, partners_s):
    """Eq. 8 and 9."""
    total = 0.0
    for k in range(len(anchors_t)):
        p_t = softmax_loop(anchors_t[k], partners_t, SCALE_T)
        p_s = softmax_loop(anchors_s[k], partners_s, SCALE_S)
        for j in range(len(p_t)):
            total += p_t[j] * math.log(p_t[j] / p_s[j])
    return total / len(anchors_t)


def square_loop(a, b):
    total = 0.0
    for row, other in zip(a, b):
        for x, y in zip(row, other):
            total += (float(x) - float(y)) ** 2
    return total / (len(a) * len(a[0]))


def gradient_loop(v, s, scale):
    """Eq. 19-24, with the 1/N of the batch's mean: dL/dv and dL/ds."""
    n = len(v)
    dv = torch.zeros_like(v)
    ds = torch.zeros_like(s)
    for k in range(n):
        p = softmax_loop(v[k], s, scale)
        q = softmax_loop(s[k], v, scale)
        for b in range(n):
            same = float(b == k)
            dv[k] += scale * (p[b] - same) * s[b] / (2 * n)  # Eq. 19
            ds[b] += scale * (p[b] - same) * v[k] / (2 * n)  # Eq. 20
            ds[k] += scale * (q[b] - same) * v[b] / (2 * n)  # Eq. 21
            dv[b] += scale * (q[b] - same) * s[k] / (2 * n)  # Eq. 22
    return dv, ds


def fuse_loop(a, b):
    """Eq. 17: rows of [a ; b] through `fuse`, of unit length."""
    fused = fuse(torch.cat([a, b], dim=1)).tolist()
    result = []
    for row in fused:
        length = math.sqrt(dot(row, row))
        result.append([x / length for x in row])
    return result


def expected(name, v, s, v_t, s_t):
    if name == "clip":
        return (nce_loop(v, s, SCALE_S) + nce_loop(s, v, SCALE_S)) / 2
    if name == "crd":
        return (kl_loop(v_t, s_t, v, s) + kl_loop(s_t, v_t, s, v)) / 2
    if name in ("fd", "mfd"):
        return square_loop(v, v_t) + square_loop(s, s_t)
    if name == "gd":
        dv, ds = gradient_loop(v, s, SCALE_S)
        dv_t, ds_t = gradient_loop(v_t, s_t, SCALE_T)
        return square_loop(dv, dv_t) + square_loop(ds, ds_t)
    if name == "icl":
        return (nce_loop(v, s_t, SCALE_S) + nce_loop(s, v_t, SCALE_S)) / 2
    v = fuse_loop(v, v_t)
    s = fuse_loop(s, s_t)
    return (nce_loop(v, s, SCALE_S) + nce_loop(s, v, SCALE_S)) / 2


@pytest.mark.parametrize("name", clipkd.LOSSES)
def test_a_loss_is_its_equation_as_loops(name, four):
    assert loss_of(name, *four).item() == pytest.approx(expected(name, *four), rel=1e-10)


@pytest.mark.parametrize("name", clipkd.LOSSES)
def test_the_gradient_of_a_loss_is_a_finite_difference(name, four):
    scales = [torch.tensor(SCALE_S).double(), torch.tensor(SCALE_T).double()]
    inputs = [x.clone().requires_grad_() for x in four + scales]
    assert torch.autograd.gradcheck(lambda *x: loss_of(name, *x), inputs)


@pytest.mark.parametrize("name", clipkd.LOSSES)
def test_a_loss_is_float32_inside_autocast(name, four):
    half = [x.bfloat16() for x in four]
    exact = loss_of(name, *[x.double() for x in half], fuse=keep_student)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss_of(name, *half, fuse=keep_student)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=2e-5)


# Two orthonormal pairs. The logits of each embedding are `scale` for its partner and 0 for the
# other. With scale 1 the softmax is (p, 1 - p), where p = 1 / (1 + 1/e).
E = torch.eye(2, dtype=torch.float64)
SWAPPED = E.flip(0)  # each embedding lies where the other pair's is
P = 1 / (1 + math.exp(-1))


def test_clip_loss_by_hand():
    assert clip_loss(E, E, 1.0).item() == pytest.approx(math.log(1 + math.exp(-1)))


def test_icl_loss_by_hand():
    value = icl_loss(SWAPPED, SWAPPED, E, E, 1.0)  # -log(1 - p), which is 1 more than -log(p)
    assert value.item() == pytest.approx(math.log(1 + math.exp(-1)) + 1)


def test_crd_loss_by_hand():
    value = crd_loss(SWAPPED, E, E, E, 1.0, 1.0)  # KL((p, 1 - p) || (1 - p, p))
    assert value.item() == pytest.approx(2 * P - 1)


def test_fd_loss_by_hand():
    assert fd_loss(-E, E, E, E).item() == pytest.approx(2)  # (2^2 + 0)/2 for images, 0 for texts
    assert fd_loss(SWAPPED, SWAPPED, E, E).item() == pytest.approx(2)  # (4 - 0 - 0) / D


def test_gd_loss_by_hand():
    # dL/dV = scale/N * [[p - 1, 1 - p], [1 - p, p - 1]]: all elements differ by the same amount.
    p_2 = 1 / (1 + math.exp(-2))
    difference = (2 * (1 - p_2) - (1 - P)) / 2
    assert gd_loss(E, E, E, E, 2.0, 1.0).item() == pytest.approx(2 * difference**2)


def test_equal_embeddings_cost_log_n(four):
    same = unit(0, 1).expand(N, D)
    assert clip_loss(same, same, 9.0).item() == pytest.approx(math.log(N))
    assert icl_loss(four[0], four[1], same, same, 9.0).item() == pytest.approx(math.log(N))


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(four):
    v, s = four[2:]
    assert fd_loss(v, s, v, s) == 0
    assert mfd_loss(v, s, v, s) == 0
    assert gd_loss(v, s, v, s, 7.0, 7.0) == 0
    assert abs(crd_loss(v, s, v, s, 7.0, 7.0).item()) < 1e-14


def test_icl_of_an_equal_student_is_the_teachers_task_loss(four):
    v, s = four[2:]
    assert icl_loss(v, s, v, s, 7.0).item() == pytest.approx(clip_loss(v, s, 7.0).item())


def test_afd_that_keeps_the_student_is_its_task_loss(four):
    value = afd_loss(*four, keep_student, keep_student, 3.0)
    assert value.item() == pytest.approx(clip_loss(four[0], four[1], 3.0).item())


def test_crd_does_not_see_a_rotation_and_fd_does(four):
    v, s, v_t, s_t = four
    turn = torch.linalg.qr(unit(9, D)).Q
    turned = crd_loss(v @ turn, s @ turn, v_t, s_t, 3.0, 7.0)
    assert turned.item() == pytest.approx(crd_loss(*four, 3.0, 7.0).item())
    assert abs(fd_loss(v @ turn, s @ turn, v_t, s_t) - fd_loss(*four)) > 1e-3


def autograd_of_task(v, s, scale):
    v = v.clone().requires_grad_()
    s = s.clone().requires_grad_()
    return torch.autograd.grad(clip_loss(v, s, scale), (v, s))


def test_gd_compares_what_autograd_says_of_the_task_loss(four):
    dv, ds = autograd_of_task(four[0], four[1], SCALE_S)
    dv_t, ds_t = autograd_of_task(four[2], four[3], SCALE_T)
    difference = F.mse_loss(dv, dv_t) + F.mse_loss(ds, ds_t)
    assert gd_loss(*four, SCALE_S, SCALE_T).item() == pytest.approx(difference.item())


class LargestTensor(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        for x in outputs:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


def test_gd_makes_no_tensor_larger_than_n_by_n():
    x = [torch.randn(64, 16, requires_grad=True) for _ in range(4)]
    with LargestTensor() as largest:
        gd_loss(*x, torch.tensor(10.0), torch.tensor(10.0)).backward()
    assert largest.numel == 64 * 64


def anchored(name, x, anchors):
    """The loss of some anchors. x: four embeddings, two scales."""
    img_s, txt_s, img_t, txt_t, scale_s, scale_t = x
    if name == "clip":
        return clip_loss(img_s, txt_s, scale_s, anchors)
    if name == "crd":
        return crd_loss(img_s, txt_s, img_t, txt_t, scale_s, scale_t, anchors)
    if name == "icl":
        return icl_loss(img_s, txt_s, img_t, txt_t, scale_s, anchors)
    return afd_loss(img_s, txt_s, img_t, txt_t, fuse, fuse, scale_s, anchors)


@pytest.mark.parametrize("name", ["clip", "crd", "icl", "afd"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_the_shares_of_eight_processes_average_to_the_whole_loss(name, dtype, tolerance):
    n = 64
    x = [unit(seed, n).to(dtype).requires_grad_() for seed in range(4)]
    for scale in (14.0, 50.0):
        x.append(torch.tensor(scale, dtype=dtype, requires_grad=True))
    whole = anchored(name, x, slice(None))
    shares = 0
    for begin in range(0, n, 8):
        shares = shares + anchored(name, x, slice(begin, begin + 8)) / 8
    assert shares.item() == pytest.approx(whole.item(), rel=tolerance)
    a = torch.autograd.grad(whole, x, allow_unused=True)
    b = torch.autograd.grad(shares, x, allow_unused=True)
    for one, other in zip(a, b):
        if one is None:
            assert other is None
        else:
            assert (one - other).abs().max() <= tolerance * max(1, one.abs().max())


def test_losses_py_needs_only_torch():
    tree = ast.parse((ROOT / "losses.py").read_text())
    imports = [ast.unparse(node) for node in tree.body if "Import" in type(node).__name__]
    assert imports == [
        "import functools",
        "import torch",
        "import torch.distributed as dist",
        "import torch.nn.functional as F",
    ]


@pytest.mark.parametrize("name", clipkd.LOSSES)
def test_a_loss_fits_on_a_page(name):
    loss = getattr(losses, f"{name}_loss")
    assert len(inspect.getsource(loss).splitlines()) <= 31  # with its decorator


@pytest.mark.parametrize("name", clipkd.LOSSES)
def test_a_loss_can_be_copied_alone(name, four):
    code = "import functools\nimport torch\nimport torch.nn.functional as F\n\n"
    needs = {"afd": [losses.clip_loss], "mfd": [losses.fd_loss]}
    loss = getattr(losses, f"{name}_loss")
    for function in [losses.in_float32, *needs.get(name, []), loss]:
        code += inspect.getsource(function) + "\n"
    pasted = {}
    exec(code, pasted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), f"{name}_loss", pasted[f"{name}_loss"])
        value = loss_of(name, *four)
    assert value == loss_of(name, *four)


# --------------------------------------------------------------------------------------------------
# Distiller: the student, its projections and scales, and what several processes compute together.

ALL = dict.fromkeys(clipkd.LOSSES, 1.0)


def load(name, pretrained=None, seed=0, **options):
    torch.manual_seed(seed)
    return clipkd.OpenClip(str(name), pretrained, **options)


def small_batch(dim_t=64, dtype=torch.float32):
    """8 pairs for the demo's models: images, tokens, and what a teacher might say."""
    generator = torch.Generator().manual_seed(0)
    captions = [f"a {clipkd.COLOURS[i]} {clipkd.LETTERS[i]}" for i in range(8)]
    tokens = open_clip.SimpleTokenizer(context_length=20)(captions)
    images = torch.randn(8, 3, 32, 32, generator=generator).to(dtype)
    img_t = F.normalize(torch.randn(8, dim_t, generator=generator), dim=1).to(dtype)
    txt_t = F.normalize(torch.randn(8, dim_t, generator=generator), dim=1).to(dtype)
    return images, [tokens], img_t, txt_t, torch.tensor(50.0, dtype=dtype)


def new_distiller(student, lambdas, dim_t=64, cls=Distiller):
    model = load(student)
    return cls(model.net, model.dim, dim_t, lambdas).train()


class WithCosine(Distiller):
    """The example of Distiller's docstring."""

    own_losses = {"cosine": 10.0}  # its weight, which the flag --lambda-cosine changes
    needs_projection = Distiller.needs_projection | {"cosine"}

    def compare(self, batch):
        losses = super().compare(batch)
        cosine = (batch.img_p * batch.img_t).sum(dim=1)  # [N]
        losses["cosine"] = 1 - cosine.mean()
        return losses


WEIGHTS = {"clip": 1, "crd": 1, "fd": 50, "mfd": 50, "gd": 1e3, "icl": 1, "afd": 1}


@pytest.mark.parametrize("student", ["demo-vit", "demo-student"])  # D_s = 48 and 64, D_t = 64
@pytest.mark.parametrize("name", [*clipkd.LOSSES, "all"])
def test_a_loss_falls_in_training(name, student):
    lambdas = WEIGHTS if name == "all" else {name: WEIGHTS[name]}
    distiller = new_distiller(student, lambdas)
    optimizer = torch.optim.AdamW(distiller.parameters(), 2e-3)
    history = []
    for _ in range(12):
        torch.manual_seed(1)  # the same mask each time
        values = distiller(*small_batch())
        assert set(values) == set(lambdas)
        total = sum(lambdas[name] * value for name, value in values.items())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(total.item())
    assert np.isfinite(history).all()
    assert history[-1] < history[0]


@pytest.mark.parametrize("student", ["demo-vit", "demo-student"])
@pytest.mark.parametrize("name", clipkd.LOSSES)
def test_every_trainable_parameter_gets_a_gradient(name, student):
    distiller = new_distiller(student, {name: 1})
    distiller(*small_batch())[name].backward()
    for parameter_name, parameter in distiller.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name  # or DDP would fail


PARTS = {
    "clip": set(),
    "crd": set(),
    "fd": {"proj_img", "proj_txt"},
    "mfd": {"proj_img", "proj_txt"},
    "gd": {"proj_img", "proj_txt"},
    "icl": {"proj_img", "proj_txt", "icl_log_scale"},
    "afd": {"fuse_img", "fuse_txt", "afd_log_scale"},
}


@pytest.mark.parametrize("name", clipkd.LOSSES)
def test_parts_are_built_only_for_losses_that_are_on(name):
    distiller = new_distiller("demo-vit", {**dict.fromkeys(ALL, 0), name: 1})
    names = {parameter.split(".")[0] for parameter, _ in distiller.named_parameters()}
    assert names == {"student_net"} | PARTS[name]


def test_a_vit_drops_three_quarters_of_the_patches_for_mfd():
    distiller = new_distiller("demo-vit", {"mfd": 1})
    lengths = []
    transformer = distiller.student_net.visual.transformer
    transformer.register_forward_pre_hook(lambda module, x: lengths.append(x[0].shape[1]))
    distiller(*small_batch())
    assert lengths == [65, 17]  # the class token with 64 patches, and with 16


def test_any_other_image_tower_sees_blank_patches_for_mfd():
    net = new_distiller("demo-student", {"mfd": 1}).student_net
    net.encode_image = lambda images: images
    images = clipkd.encode_masked(net, torch.ones(3, 3, 28, 28), 0.75)
    share_visible = (images > 0).float().mean(dim=(1, 2, 3))
    assert share_visible.tolist() == [0.25, 0.25, 0.25]


def same_noise(*shape, device=None):
    """In place of torch.rand, so that each process draws the same mask."""
    return torch.linspace(0, 1, shape[-1], device=device).expand(shape)


@pytest.mark.parametrize("student", ["demo-vit", "demo-student"])
def test_masks_are_drawn_on_the_device_of_the_images(student, monkeypatch):
    devices = []

    def rand(*shape, device):
        devices.append(device)
        return same_noise(*shape)

    monkeypatch.setattr(torch, "rand", rand)
    images = small_batch()[0]
    clipkd.encode_masked(load(student).net, images, 0.75)
    assert devices == [images.device]


def test_the_teachers_embeddings_carry_no_gradient():
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    img_t, txt_t, scale_t = load("demo-teacher").embed(images, small_batch()[1])
    assert not (img_t.requires_grad or txt_t.requires_grad or scale_t.requires_grad)


def test_scales_stay_between_1_and_100():
    student = load("demo-student")
    distiller = Distiller(student.net, 64, 64, ALL)
    distiller.student_net.logit_scale.data.fill_(9)
    distiller.icl_log_scale.data.fill_(-1)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.0)
    teacher = load("demo-teacher")
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    tokens = small_batch()[1]
    clipkd.train_step(distiller, optimizer, ALL, student, teacher, images, tokens, tokens)
    assert distiller.student_net.logit_scale.exp().item() == pytest.approx(100)
    assert distiller.icl_log_scale.item() == 0


def gradients(rank, world, file):
    """One backward pass of all losses on this process's share. Process 0 saves every gradient."""
    lambdas = {**ALL, "cosine": 1.0}
    distiller = new_distiller("demo-vit", lambdas, cls=WithCosine).double()
    model = distiller
    if world > 1:
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{file}.init", rank=rank, world_size=world
        )
        model = torch.nn.parallel.DistributedDataParallel(distiller)
    images, (tokens,), img_t, txt_t, scale_t = small_batch(dtype=torch.float64)
    own = slice(rank * 8 // world, (rank + 1) * 8 // world)
    parts = list(tokens[own].chunk(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clipkd, "RANK", rank)
        patch.setattr(clipkd, "WORLD", world)
        patch.setattr(torch, "rand", same_noise)
        values = model(images[own], parts, img_t[own], txt_t[own], scale_t)
        sum(values.values()).backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in distiller.named_parameters()}, file)
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_have_the_gradient_of_one(world, tmp_path):
    gradients(0, 1, tmp_path / "one")
    torch.multiprocessing.spawn(gradients, (world, tmp_path / "many"), nprocs=world)
    one = torch.load(tmp_path / "one")
    many = torch.load(tmp_path / "many")
    assert {"student_net.logit_scale", "proj_img.bias", "fuse_txt.weight"} <= set(one)
    for name, gradient in one.items():
        largest = gradient.abs().max()
        assert largest > 0, name
        assert (many[name] - gradient).abs().max() <= 1e-10 * largest, name


def test_the_docstrings_example_of_a_loss_is_the_one_that_is_tested():
    doc = inspect.getdoc(Distiller)
    example = re.search(r"class WithCosine.*?return losses\n", doc, re.S).group()
    tested = re.sub(r'    """.*"""\n\n', "", inspect.getsource(WithCosine))
    assert inspect.cleandoc(example).split() == tested.split()


# --------------------------------------------------------------------------------------------------
# Models

TEXT = {"context_length": 77, "vocab_size": 512, "width": 32, "heads": 2, "layers": 2}


def small_net(folder, **changes):
    """A CLIP with a text tower of 77 places. With changes it is a CustomTextCLIP."""
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {**TEXT, **changes}}
    config["custom_text"] = bool(changes)
    (folder / "small.json").write_text(json.dumps(config))
    return load(folder / "small.json").net.train()


def every_length():
    """Tokens of captions with 2, 3, ... 77 tokens: a start, words and an end."""
    tokens = torch.zeros(76, 77, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    for i, row in enumerate(tokens):
        row[: i + 2] = torch.randint(1, 500, (i + 2,), generator=generator)
        row[0] = 510
        row[i + 1] = 511
    return tokens


def embeddings_and_gradients(net, parts):
    net.zero_grad()
    embeddings = clipkd.encode_text(net, parts)
    weights = torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings)
    (embeddings * weights).sum().backward()
    return embeddings, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("changes", [{}, {"mlp_ratio": 3}])  # CLIP, and a CustomTextCLIP
def test_captions_without_padding_have_the_same_embeddings_and_gradients(changes, tmp_path):
    net = small_net(tmp_path, **changes)
    tokens = every_length()
    parts = clipkd.cut_padding(tokens)
    shapes = [tuple(part.shape) for part in parts]
    assert shapes == [(19, 32), (19, 48), (19, 64), (19, 77)]
    a, gradients_a = embeddings_and_gradients(net, [tokens])
    b, gradients_b = embeddings_and_gradients(net, parts)
    assert torch.equal(a, net.encode_text(tokens))
    assert (a - b).abs().max() <= 1e-6 * a.abs().max()
    assert len(gradients_a) > 20
    for name, gradient in gradients_a.items():
        assert (gradients_b[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_only_towers_that_ignore_padding_skip_it(tmp_path):
    assert clipkd.can_skip_padding(small_net(tmp_path))
    assert clipkd.can_skip_padding(small_net(tmp_path, mlp_ratio=3))
    for changes in (
        {"no_causal_mask": True},
        {"pool_type": "last"},
        {"embed_cls": True},
        {"proj_bias": True},
    ):
        assert not clipkd.can_skip_padding(small_net(tmp_path, **changes))


def timm_vit(folder, size=224):
    config = clipkd.clip_config({"timm_model_name": "vit_tiny_patch16_224"}, 64, 32, 2, 1, 20)
    config["vision_cfg"]["image_size"] = size
    (folder / "timm.json").write_text(json.dumps(config))
    return str(folder / "timm.json")


def all_gradients(distiller, images):
    torch.manual_seed(1)
    _, tokens, *teacher = small_batch()
    sum(distiller(images, tokens, *teacher).values()).backward()
    return {name: p.grad for name, p in distiller.named_parameters()}


@pytest.mark.parametrize("student", ["demo-vit", "demo-student", "timm"])
def test_checkpointing_changes_no_bit_of_a_gradient(student, tmp_path):
    images = small_batch()[0]
    if student == "timm":
        student = timm_vit(tmp_path)
        images = F.interpolate(images, 224)
    plain = all_gradients(new_distiller(student, ALL), images)
    distiller = new_distiller(student, ALL)
    distiller.student_net.set_grad_checkpointing()
    assert equal(plain, all_gradients(distiller, images))


def equal(a, b):
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_checkpointing_says_where_it_cannot_help(capsys):
    load("demo-student").recompute_activations()
    assert "cannot do this for this image tower" in capsys.readouterr().err
    load("demo-vit").recompute_activations()
    assert capsys.readouterr().err == ""


@pytest.fixture
def odd_tag(tmp_path, monkeypatch):
    """An architecture tiny-4 of open_clip with two tags, one of which wants other pixels."""
    config = tmp_path / "tiny-4.json"
    config.write_text(json.dumps(clipkd.STUDENTS["demo-vit"]))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS})
    open_clip.add_model_config(config)
    tags = {"usual": {"mean": open_clip.OPENAI_DATASET_MEAN}, "odd": {"mean": (0.5, 0.5, 0.5)}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-4", tags)
    torch.save(load("demo-vit").net.state_dict(), tmp_path / "tiny.pt")
    return str(tmp_path / "tiny.pt")


def test_a_file_whose_architecture_has_odd_tags_is_warned_of(odd_tag, capsys):
    load("tiny/4", odd_tag, frozen=True)  # the paper writes ViT-B/16
    assert "this model's tag odd has others" in capsys.readouterr().err


def test_a_folder_keeps_pixels_and_activation(tmp_path):
    model = load("demo-vit")
    model.preprocess_cfg.update(mean=[0.5] * 3, std=[0.25] * 3, interpolation="bilinear")
    model.config["quick_gelu"] = True
    model.export(tmp_path / "odd")
    again = load(f"local-dir:{tmp_path}/odd", frozen=True)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.allclose(again.preprocess(images), (images / 255 - 0.5) / 0.25)
    assert again.preprocess_cfg["interpolation"] == "bilinear"
    block = again.net.visual.transformer.resblocks[0]
    assert type(block.mlp.gelu).__name__ == "QuickGELU"


def test_a_json_hides_no_model_of_open_clip(tmp_path):
    before = open_clip.get_model_config("RN50")
    (tmp_path / "RN50.json").write_text(json.dumps(clipkd.STUDENTS["demo-vit"]))
    assert load(tmp_path / "RN50.json").dim == 48
    assert open_clip.get_model_config("RN50") == before


def test_a_tokenizer_that_can_be_saved_lies_beside_the_weights(tmp_path):
    model = load("demo-vit")
    model.tokenizer.save_pretrained = lambda folder: (folder / "tokenizer.json").touch()
    model.export(tmp_path / "student")
    names = {path.name for path in (tmp_path / "student").iterdir()}
    assert names == {"tokenizer.json", "open_clip_config.json", "open_clip_model.safetensors"}


class OpenAI(torch.nn.Module):
    """OpenAI's files are programs of TorchScript that hold the weights of a CLIP."""

    def __init__(self, net):
        super().__init__()
        for name, child in net.named_children():
            self.add_module(name, Holder(child))
        for name, parameter in net.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for key in ("input_resolution", "context_length", "vocab_size"):
            self.register_buffer(key, torch.tensor(0))

    def forward(self):
        return self.logit_scale


class Holder(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, Holder(child))
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer)

    def forward(self):
        return 0


def test_a_file_of_torchscript_like_openais_loads(tmp_path):
    model = load("demo-student", seed=3)
    torch.jit.script(OpenAI(model.net)).save(str(tmp_path / "openai.pt"))
    again = load("demo-student", str(tmp_path / "openai.pt"), frozen=True)
    assert equal(model.net.state_dict(), again.net.state_dict())


def test_bfloat16_weights_of_an_image_tower_give_the_same_bits_under_autocast():
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    for name in ("demo-vit", "demo-student"):
        model = load(name, frozen=False)
        model.net.requires_grad_(False)
        embeddings = []
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                embeddings.append(model.net.encode_image(model.preprocess(images)))
            open_clip.model.convert_weights_to_lp(model.net.visual, torch.bfloat16)
        assert torch.equal(*embeddings)


def test_biases_norms_and_scales_are_not_decayed():
    distiller = new_distiller("demo-vit", ALL)
    names = {id(p): name for name, p in distiller.named_parameters()}
    decayed, not_decayed = clipkd.make_optimizer(distiller, 1e-3, 0.1).param_groups
    assert decayed["weight_decay"] == 0.1
    assert not_decayed["weight_decay"] == 0
    assert len(decayed["params"]) + len(not_decayed["params"]) == len(names)
    for p in decayed["params"]:
        assert names[id(p)].endswith(("weight", "embedding", "proj", "projection"))
    for p in not_decayed["params"]:
        name = names[id(p)]
        assert "ln_" in name or name.endswith(("bias", "scale", "class_embedding"))


VIT = ((0.9, 0.98), 1e-6)
OTHER = ((0.9, 0.999), 1e-8)


@pytest.mark.parametrize(
    "student, family",
    [("demo-vit", VIT), ("mobilevit_s", VIT), ("swin_tiny", OTHER), ("demo-student", OTHER)],
)
def test_betas_follow_the_family_of_the_student(student, family):
    optimizer = clipkd.make_optimizer(new_distiller(student, {"clip": 1}, 512), 1e-3, 0.1)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == family


def test_swins_biases_that_are_matrices_are_not_decayed():
    distiller = new_distiller("swin_tiny", {"clip": 1}, 512)
    not_decayed = clipkd.make_optimizer(distiller, 1e-3, 0.1).param_groups[1]["params"]
    ids = {id(p) for p in not_decayed}
    biases = [p for name, p in distiller.named_parameters() if "bias" in name]
    assert any(p.ndim > 1 for p in biases)
    assert all(id(p) in ids for p in biases)


MILLIONS = {  # parameters of the image towers in the paper's Table 2
    "ViT-T-16": 5.6,
    "mobilevit_s": 5.3,
    "swin_tiny": 27.9,
    "mobilenetv3_small_100": 2.0,
    "resnet18": 11.4,
    "efficientnet_b0": 4.7,
}


@pytest.mark.parametrize("name", MILLIONS)
def test_the_papers_students_have_the_sizes_of_its_table_2(name):
    net = load(name).net
    millions = sum(p.numel() for p in net.visual.parameters()) / 1e6
    assert millions == pytest.approx(MILLIONS[name], abs=0.11)
    assert net.encode_image(torch.zeros(2, 3, 224, 224)).shape == (2, 512)


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    rates = [clipkd.lr_at(step, 40, 4, 2.0) for step in range(40)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[22] == pytest.approx(1.0)  # half of the way down
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert clipkd.lr_at(0, 40, 10_000, 2.0) == 0.5  # the warm-up is at most a tenth


# --------------------------------------------------------------------------------------------------
# Runs. `run` calls main() in this process. Where a process must end or be killed, a real one is
# started, with loader processes.


def draw_letter(colour, letter):
    random = np.random.default_rng(0)
    return clipkd.draw(colour, letter, "large", "in the middle", "white", random)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """24 pairs: pairs.tsv, pairs.tar, a folder `classes` of class folders, a folder `teacher`."""
    folder = tmp_path_factory.mktemp("world")
    lines = ["filepath\ttitle"]
    members = []
    for i in range(24):
        colour = clipkd.COLOURS[i % 4]
        letter = clipkd.LETTERS[i % 3]
        file = folder / f"classes/{colour} {letter}/{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        draw_letter(colour, letter).resize((40, 36)).rotate(i).save(file)
        lines.append(f"{file.relative_to(folder)}\ta {colour} {letter}")
        members.append((f"{i:05d}.jpg", file.read_bytes()))
        members.append((f"{i:05d}.txt", f"a {colour} {letter}".encode()))
        members.append((f"{i:05d}.json", b"{}"))  # img2dataset writes these too
    (folder / "pairs.tsv").write_text("\n".join(lines))
    write_tar(folder / "pairs.tar", members)
    load("demo-teacher").export(folder / "teacher")
    return folder


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def flags(world, out, **changes):
    """A command of a small run. A change of None drops a flag, True gives it without a value."""
    values = {
        "train_data": world / "pairs.tsv",
        "student": "demo-vit",
        "teacher": f"local-dir:{world}/teacher",
        "out": out,
        "epochs": 2,
        "batch_size": 8,
        "log_every": 1,
        "eval_every": 0,
        "workers": 0,
        "lambda_fd": 250,
        **changes,
    }
    words = []
    for name, value in values.items():
        if value is not None:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else str(value).split()
    return words


def read_log(out):
    lines = (out / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]  # NaN is no JSON


def totals(log):
    return [record["total"] for record in log if "total" in record]


def student_weights(out):
    return safetensors.torch.load_file(out / "student/open_clip_model.safetensors")


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """run(out=..., flag=value, ...) is main() with small settings, and returns the log."""

    def run(out=tmp_path / "out", **changes):
        monkeypatch.setattr(sys, "argv", ["clipkd.py", *flags(world, out, **changes)])
        clipkd.main()
        return read_log(out)

    return run


TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


def start(*words, cwd=ROOT, **environment):
    """A Python process in a group of its own, which gets no signals that are meant for pytest."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process, seconds=300):
    """Exit code, stdout and stderr."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


def test_a_run_logs_every_loss_and_their_weighted_sum(run):
    log = run()
    assert log[0]["args"]["epochs"] == 2
    steps = [record for record in log if "total" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    for record in steps:
        total = record["clip"] + record["crd"] + 250 * record["fd"] + record["icl"]
        assert record["total"] == pytest.approx(total, rel=1e-5)
        assert {"lr", "scale", "pairs_per_s", "seconds", "data_wait", "skipped"} <= set(record)


def test_a_run_ends_with_its_scores(run, world, tmp_path, capsys):
    log = run(zeroshot=f"letters={world}/classes", val_data=f"val={world}/pairs.tsv")
    scores = log[-1]["eval"]
    assert set(scores) == {"letters", "val"}
    assert set(scores["val"]) == {f"{way} R@{k}" for way in ("I2T", "T2I") for k in (1, 5, 10)}
    out, err = capsys.readouterr()
    assert out.startswith(f"letters: top-1 {scores['letters']['top-1']:.4g}\nval: I2T R@1 ")
    assert f"the student is in {tmp_path}/out/student" in err


@pytest.mark.parametrize("name", clipkd.LOSSES)
def test_a_lambda_alone_logs_just_its_loss(name, run):
    lambdas = {f"lambda_{other}": 0 for other in clipkd.LOSSES}
    lambdas[f"lambda_{name}"] = 1
    log = run(**lambdas, epochs=1)
    assert set(log[1]) & set(clipkd.LOSSES) == {name}


def test_a_log_file_gets_lines_and_no_progress_bar(run, capfd):
    run(log_every=2)
    err = capfd.readouterr().err
    assert "clipkd.py: step 2 of 6: loss" in err
    assert "\r" not in err


def interrupted(run, steps, **changes):
    """A run whose training step number `steps` raises."""
    step = clipkd.train_step
    done = []

    def train_step(*args):
        done.append(1)
        if len(done) == steps:
            raise ZeroDivisionError
        return step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clipkd, "train_step", train_step)
        with pytest.raises(ZeroDivisionError):
            run(**changes)


def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(run, tmp_path):
    whole = run(out=tmp_path / "whole", save_every=2, lambda_mfd=1)
    interrupted(run, 4, save_every=2, lambda_mfd=1)
    resumed = run(save_every=2, lambda_mfd=1, workers=1)  # loaders change nothing either
    assert totals(whole) == totals(resumed)
    assert len(totals(whole)) == 6
    assert equal(student_weights(tmp_path / "whole"), student_weights(tmp_path / "out"))


def test_a_finished_run_has_nothing_left_to_do(run, tmp_path, capsys):
    run()
    before = (tmp_path / "out/log.jsonl").read_text()
    run()
    assert (tmp_path / "out/log.jsonl").read_text() == before
    assert "this run has already finished" in capsys.readouterr().err


def test_an_evaluation_on_the_way_changes_nothing(run, world, tmp_path):
    sets = {"val_data": f"val={world}/pairs.tsv", "student": "demo-student"}  # with batch norm
    plain = run(**sets)
    scored = run(**sets, eval_every=1, out=tmp_path / "scored")
    assert totals(plain) == totals(scored)
    assert equal(student_weights(tmp_path / "out"), student_weights(tmp_path / "scored"))
    assert len([record for record in scored if "eval" in record]) == 2


@pytest.mark.parametrize(
    "stop, data, processes",
    [("KILL", "pairs.tsv", 1), ("TERM", "pairs.tar", 2), ("INT", "pairs.tsv", 1)],
)
def test_a_stopped_run_continues_to_the_same_bits(stop, data, processes, world, tmp_path):
    settings = {"epochs": 20, "save_every": 5, "lambda_mfd": 1, "workers": 1}
    settings["train_data"] = world / data
    command = [SCRIPT] if processes == 1 else [*TORCHRUN, "--nproc_per_node=2", SCRIPT]
    again = tmp_path / "again"
    process = start(*command, *flags(world, again, **settings))
    log = again / "log.jsonl"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 12, process)
    os.killpg(process.pid, signal.Signals[f"SIG{stop}"])
    code, _, err = finish(process, 60)
    step = torch.load(again / "checkpoint.pt")["progress"]["step"]
    assert code != 0
    assert 10 <= step < 60, err
    if stop == "INT":
        assert "the same command continues from its last checkpoint.pt" in err
        assert "Traceback" not in err
    whole = tmp_path / "whole"
    processes = []
    for out in (whole, again):
        processes.append(start(*command, *flags(world, out, **settings)))
    for process in processes:
        assert finish(process)[0] == 0
    assert totals(read_log(whole)) == totals(read_log(again))
    assert len(totals(read_log(again))) == 60
    assert equal(student_weights(whole), student_weights(again))


# How a process ends when something fails. All of its processes must be gone within 20 seconds.

FAIL_IN_STEP = """
import runpy, sys, losses
sys.argv = sys.argv[1:]
clip_loss, calls = losses.clip_loss, []
def failing(*args):
    calls.append(1)
    if len(calls) == 3:
        raise RuntimeError("out of memory")
    return clip_loss(*args)
losses.clip_loss = failing
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def processes_with(mark):
    """The processes whose environment has this mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (folder / "environ").read_bytes()
            state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
            if mark.encode() in environment and state != "Z":
                found.append(int(folder.name))
    return found


def loaders_of(mark):
    """The processes that forked from a process of the script."""
    marked = processes_with(mark)
    parents = {}
    for pid in marked:
        with contextlib.suppress(OSError):
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return [pid for pid, parent in parents.items() if is_script(parent) and is_script(pid)]


def is_script(pid):
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"clipkd.py" in command and b"torch.distributed.run" not in command
    return False


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "way", ["step fails", "loader killed", "bad evaluation", "Ctrl-C", "Ctrl-C, loader hangs"]
)
def test_a_run_that_fails_ends_with_its_loaders(way, processes, world, tmp_path):
    out = tmp_path / "out"
    changes = {"workers": 2, "epochs": 1000}
    if way == "bad evaluation":
        (tmp_path / "classes/a").mkdir(parents=True)
        (tmp_path / "classes/a/bad.png").write_text("not an image")
        changes.update(zeroshot=tmp_path / "classes", eval_every=1)
    if way == "Ctrl-C, loader hangs":
        os.mkfifo(tmp_path / "hangs.jpg")  # whoever opens it waits for ever
        rows = (world / "pairs.tsv").read_text().replace("classes/", f"{world}/classes/")
        (tmp_path / "pairs.tsv").write_text(f"{rows}\n{tmp_path}/hangs.jpg\tnothing")
        changes.update(train_data=tmp_path / "pairs.tsv")
    command = [SCRIPT, *flags(world, out, **changes)]
    if way == "step fails":
        (tmp_path / "clipkd.py").write_text(FAIL_IN_STEP)
        command = [tmp_path / "clipkd.py", *command]
    if processes == 2:
        command = [*TORCHRUN, "--nproc_per_node=2", *command]
    mark = str(uuid.uuid4())
    process = start(*command, MARK=mark, PYTHONPATH=str(ROOT))
    log = out / "log.jsonl"
    try:
        if way == "loader killed":
            wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 3, process)
            os.kill(loaders_of(mark)[0], signal.SIGKILL)
        elif way == "Ctrl-C":
            wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 3, process)
            os.killpg(process.pid, signal.SIGINT)
        elif way == "Ctrl-C, loader hangs":
            wait_for(lambda: log.exists() and len(loaders_of(mark)) >= 2 * processes, process)
            time.sleep(3)
            os.killpg(process.pid, signal.SIGINT)
        else:
            wait_for(log.exists, process)
        code, _, err = finish(process, 40)
        assert code != 0
        end = time.monotonic() + 20
        while processes_with(mark) and time.monotonic() < end:
            time.sleep(0.1)
        assert not processes_with(mark), err
        if way == "bad evaluation":
            assert "bad.png: this image cannot be read" in err
    finally:
        for pid in processes_with(mark):
            os.kill(pid, signal.SIGKILL)


def with_missing_images(world, folder):
    """The TSV of the world, where 8 of the 24 images are gone."""
    lines = (world / "pairs.tsv").read_text().replace("classes/", f"{world}/classes/").splitlines()
    lines[1:9] = [f"gone/{i}.jpg\tgone" for i in range(8)]
    (folder / "missing.tsv").write_text("\n".join(lines))
    return folder / "missing.tsv"


def test_a_second_run_in_a_folder_is_refused(run, tmp_path):
    with clipkd.locked(tmp_path / "out"):
        with pytest.raises(BadInput, match="another run is using it; give another --out"):
            run()
    assert len(totals(run())) == 6  # and afterwards it is free


def test_a_second_run_under_torchrun_is_refused_in_one_line(world, tmp_path):
    with clipkd.locked(tmp_path / "out"):
        command = [*TORCHRUN, "--nproc_per_node=2", SCRIPT, *flags(world, tmp_path / "out")]
        code, _, err = finish(start(*command))
    assert code != 0
    assert err.count("another run is using it") == 1
    assert "gloo" not in err


def test_a_folder_that_cannot_be_locked_is_named_with_the_reason(run, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(BadInput, match="--out .*out cannot be used or locked .*File exists"):
        run()


def test_torchrun_with_two_processes_takes_the_steps_of_one(run, world, tmp_path):
    # The student is a ViT, since batch norm has statistics of its own on each process.
    settings = {"lambda_gd": 1e3, "lambda_afd": 1}
    settings["train_data"] = with_missing_images(world, tmp_path)
    one = run(**settings)
    out = tmp_path / "two"
    command = [*TORCHRUN, "--nproc_per_node=2", SCRIPT, *flags(world, out, **settings)]
    code, _, err = finish(start(*command))
    assert code == 0, err
    two = read_log(out)
    assert totals(two) == pytest.approx(totals(one), rel=1e-4)
    assert len(totals(one)) == 6
    assert two[-1]["skipped"] == one[-1]["skipped"] == 16  # counted on both processes


def train_with_cosine(rank, world_size, words):
    if world_size > 1:
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ.update(MASTER_ADDR="127.0.0.1")
        os.environ.update(MASTER_PORT="29777")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clipkd, "RANK", rank)
        patch.setattr(clipkd, "WORLD", world_size)
        device = clipkd.setup()
        args = clipkd.get_args(words, WithCosine)
        clipkd.train(args, device, WithCosine)
        if world_size > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def test_a_loss_of_your_own_trains_on_one_and_on_two_processes(world, tmp_path):
    one = flags(world, tmp_path / "one", lambda_fd=0, lambda_icl=0)
    two = flags(world, tmp_path / "two", lambda_fd=0, lambda_icl=0)
    train_with_cosine(0, 1, one)
    torch.multiprocessing.spawn(train_with_cosine, (2, two), nprocs=2)
    log = read_log(tmp_path / "one")
    steps = [record for record in log if "total" in record]
    for record in steps:
        total = record["clip"] + record["crd"] + 10 * record["cosine"]
        assert record["total"] == pytest.approx(total, rel=1e-5)
    assert steps[-1]["cosine"] < steps[0]["cosine"]
    assert totals(read_log(tmp_path / "two")) == pytest.approx(totals(log), rel=1e-4)


def test_loaders_that_are_not_forked_train_and_evaluate_too(world, tmp_path):
    changes = {"workers": 1, "epochs": 1, "val_data": f"val={world}/pairs.tsv"}
    processes = []
    for method in ("spawn", "forkserver"):
        code = f"import multiprocessing\nmultiprocessing.set_start_method('{method}', force=True)\n"
        (tmp_path / method).mkdir()
        (tmp_path / method / "sitecustomize.py").write_text(
            code
        )  # Python runs it before the script
        words = flags(world, tmp_path / method / "out", **changes)
        processes.append(start(SCRIPT, *words, PYTHONPATH=str(tmp_path / method)))
    for process in processes:
        code, out, err = finish(process)
        assert code == 0, err
        assert "val: I2T R@1" in out


def test_weights_that_are_not_finite_end_the_run_unsaved(run, tmp_path, monkeypatch):
    rate = clipkd.lr_at
    monkeypatch.setattr(
        clipkd, "lr_at", lambda step, *rest: math.inf if step == 3 else rate(step, *rest)
    )
    with pytest.raises(BadInput, match="at step 4 the losses or the weights are not finite"):
        run(save_every=2, log_every=100)
    assert torch.load(tmp_path / "out/checkpoint.pt")["progress"]["step"] == 2
    assert all(value.isfinite().all() for value in student_weights(tmp_path / "out").values())


def test_a_file_keeps_what_it_held_until_all_of_the_new_is_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), clipkd.replacing(path) as file:
        file.write(b"half of the n")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    with clipkd.replacing(path) as file:
        file.write(b"new")
    assert path.read_text() == "new"


def test_a_full_disk_ends_a_run_and_keeps_its_files(run, tmp_path):
    run(epochs=1)
    before = (tmp_path / "out/checkpoint.pt").read_bytes()
    (tmp_path / "out/checkpoint.pt.tmp").symlink_to("/dev/full")
    state = torch.load(tmp_path / "out/checkpoint.pt")
    with (
        pytest.raises(OSError, match="No space left"),
        clipkd.replacing(tmp_path / "out/checkpoint.pt") as file,
    ):
        torch.save(state, file)
    assert (tmp_path / "out/checkpoint.pt").read_bytes() == before


def test_the_student_opens_with_open_clip_alone(run, world, tmp_path):
    run()
    folder = f"local-dir:{tmp_path}/out/student"
    picture = next(world.glob("classes/*/*.jpg"))
    code = f"""if True:
        import open_clip, torch
        from PIL import Image
        model, _, preprocess = open_clip.create_model_and_transforms({folder!r})
        tokens = open_clip.get_tokenizer({folder!r})(["a red circle"])
        image = preprocess(Image.open({str(picture)!r}))[None]
        torch.save([model.eval().encode_image(image), model.encode_text(tokens)], "embeddings")"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    img, txt = torch.load(tmp_path / "embeddings")
    student = load("demo-vit")
    state = torch.load(tmp_path / "out/checkpoint.pt")["distiller"]
    weights = {key: state[f"student_net.{key}"] for key in student.net.state_dict()}
    student.net.load_state_dict(weights)
    image = open_clip.image_transform(32, is_train=False)(Image.open(picture))[None]
    assert torch.equal(img, student.net.encode_image(image))
    assert torch.equal(txt, student.net.encode_text(student.tokenizer(["a red circle"])))


def test_the_export_is_what_open_clip_itself_has_for_the_architecture(tmp_path):
    model = load("ViT-T-16")
    model.export(tmp_path / "student")
    config = json.loads((tmp_path / "student/open_clip_config.json").read_text())["model_cfg"]
    assert "custom_text" not in config
    assert "token_embedding.weight" in student_weights(tmp_path)


@pytest.mark.parametrize("file", ["bare.pt", "wrapped.pt", "teacher.safetensors"])
def test_a_teacher_from_a_file_equals_the_one_from_a_folder(file, world, tmp_path):
    teacher = load(f"local-dir:{world}/teacher", frozen=True)
    state = teacher.net.state_dict()
    if file == "bare.pt":
        torch.save(state, tmp_path / file)
    elif file == "wrapped.pt":
        wrapped = {f"module.{key}": value for key, value in state.items()}
        torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / file)
    else:
        safetensors.torch.save_file(state, tmp_path / file)
    again = load("demo-teacher", str(tmp_path / file), seed=1, frozen=True)
    assert equal(state, again.net.state_dict())


def test_a_file_of_the_authors_layout_scores_as_the_weights_in_it(world, tmp_path):
    student = load("demo-student", seed=5)
    optimizer = torch.optim.AdamW(student.net.parameters())
    student.net.encode_text(student.tokenizer(["a red C"])).sum().backward()
    optimizer.step()  # so that the optimiser has a state
    wrapped = {f"module.{key}": value for key, value in student.net.state_dict().items()}
    released = {
        "epoch": 32,
        "name": "ViT-T-16",
        "state_dict": wrapped,
        "scaler": {"scale": 65536.0},
    }
    released["optimizer"] = optimizer.state_dict()
    torch.save(released, tmp_path / "ep32.pt")
    words = f"--eval-only --student demo-student --student-pretrained {tmp_path}/ep32.pt".split()
    words += ["--zeroshot", f"classes={world}/classes", "--val-data", f"pairs={world}/pairs.tsv"]
    result, out, err = finish(start(SCRIPT, *words))
    assert result == 0, err

    by_hand = load("demo-student", seed=6)
    classes = clipkd.read_class_folders(world / "classes")
    pairs = clipkd.read_captioned_images(f"{world}/pairs.tsv")
    data = {"classes": classes}, {"pairs": pairs}
    fresh = clipkd.evaluate(by_hand, *data)
    by_hand.net.load_state_dict(student.net.state_dict())
    scores = clipkd.evaluate(by_hand, *data)
    assert scores != fresh  # so that the weights matter
    for name, metrics in scores.items():
        for metric, value in metrics.items():
            assert f"{metric} {value:.4g}" in out.split(f"{name}: ")[1].splitlines()[0]


def test_another_image_size_and_context_and_width_train_too(run, tmp_path):
    vision = {"image_size": 48, "layers": 1, "width": 64, "patch_size": 16}
    config = clipkd.clip_config(vision, 40, 32, 2, 1, context=12)
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    log = run(student=tmp_path / "tiny.json", lambda_mfd=100, lambda_gd=1, lambda_afd=1)
    assert np.isfinite(totals(log)).all()
    student = open_clip.create_model(f"local-dir:{tmp_path}/out/student")
    assert student.context_length == 12


# --keep-teacher-text


def kept(run, tmp_path, **changes):
    log = run(keep_teacher_text=True, val_data=None, **changes)
    return log, load(f"local-dir:{tmp_path}/out/student", frozen=True)


@pytest.mark.parametrize("student", ["demo-vit", "demo-student"])  # 48 wide, the teacher is 64
def test_a_kept_text_tower_has_the_teachers_embeddings(student, run, world, tmp_path):
    log, student = kept(run, tmp_path, student=student, lambda_mfd=1, lambda_gd=1, lambda_afd=1)
    teacher = load(f"local-dir:{world}/teacher", frozen=True)
    texts = ["a red C", "a photo of a blue letter"]
    assert torch.equal(clipkd.embed_texts(student, texts), clipkd.embed_texts(teacher, texts))
    assert totals(log)[-1] < totals(log)[0]


def test_a_kept_text_tower_leaves_the_image_tower_to_train(run, world, tmp_path):
    _, student = kept(run, tmp_path)
    fresh = load("demo-vit").net.visual.state_dict()
    assert not equal(student.net.visual.state_dict(), fresh)
    assert {name for name, _ in student.net.visual.named_parameters()} <= set(fresh)


def test_a_kept_text_tower_is_frozen_and_in_evaluation_mode(world, tmp_path):
    args = clipkd.get_args(flags(world, tmp_path, keep_teacher_text=True))
    student, _ = clipkd.load_models(args, clipkd.get_lambdas(args), torch.device("cpu"))
    assert student.net.visual.training
    assert not student.net.transformer.training
    for name, parameter in student.net.named_parameters():
        assert parameter.requires_grad == name.startswith(("visual.", "logit_scale")), name


def test_a_run_with_a_kept_text_tower_resumes_to_the_same_bits(run, tmp_path):
    whole = run(out=tmp_path / "whole", keep_teacher_text=True)
    interrupted(run, 5, keep_teacher_text=True, save_every=2)
    resumed = run(keep_teacher_text=True, save_every=2)
    assert totals(whole) == totals(resumed)
    assert equal(student_weights(tmp_path / "whole"), student_weights(tmp_path / "out"))


def test_a_run_with_a_kept_text_tower_trains_on_two_processes(run, world, tmp_path):
    one = run(keep_teacher_text=True)
    words = flags(world, tmp_path / "two", keep_teacher_text=True)
    code, _, err = finish(start(*TORCHRUN, "--nproc_per_node=2", SCRIPT, *words))
    assert code == 0, err
    assert totals(read_log(tmp_path / "two")) == pytest.approx(totals(one), rel=1e-4)


# --------------------------------------------------------------------------------------------------
# Data


def captions_of(file):
    """The captions of each pair of a file. None for a pair that cannot be used."""
    file = Path(file)
    index, _ = clipkd.index_file(file)
    found = []
    for place in index.tolist():
        try:
            found.append(clipkd.read_pair(file, *place)[1])
        except (ValueError, csv.Error):
            found.append(None)
    return found


TABLES = {
    "quotes and CRLF": (
        b'i,title,filepath\r\n1,"a, ""b""",a.png\r\n3,c,a.png\r\n',
        [['a, "b"'], ["c"]],
    ),
    "byte order mark and a file that ends without a new line": (
        "\ufefffilepath\ttitle\na.png\t\u00e9 \u732b\na.png\tb".encode(),
        [["\u00e9 \u732b"], ["b"]],
    ),
    "an empty title and empty lines": (
        b"filepath\ttitle\na.png\t \n\n\r\na.png\tb\n",
        [None, ["b"]],
    ),
    "a row of too many cells": (b"filepath,title\na.png,a dog, running\na.png,b\n", [None, ["b"]]),
    "a new line inside quotes": (
        b'filepath,title\na.png,"a dog\nthat runs"\na.png,b\n',
        [None, None, ["b"]],
    ),
    "a row that is not UTF-8": (b"filepath\ttitle\na.png\tcaf\xe9\na.png\tb\n", [None, ["b"]]),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_row_by_row(name, tmp_path):
    content, captions = TABLES[name]
    (tmp_path / "a.csv").write_bytes(content)
    assert captions_of(tmp_path / "a.csv") == captions


def test_tars_give_the_weights_that_a_tsv_gives(run, world, tmp_path):
    run(out=tmp_path / "tsv")
    run(out=tmp_path / "tar", train_data=world / "pairs.tar")
    assert totals(read_log(tmp_path / "tsv")) == totals(read_log(tmp_path / "tar"))
    assert equal(student_weights(tmp_path / "tsv"), student_weights(tmp_path / "tar"))


def test_a_tsv_and_a_folder_of_tars_can_be_mixed(run, world, tmp_path):
    lines = (world / "pairs.tsv").read_text().replace("classes/", f"{world}/classes/")
    (tmp_path / "half.tsv").write_text("\n".join(lines.splitlines()[:9]))
    with tarfile.open(world / "pairs.tar") as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars/00.tar", members[24:48], tarfile.PAX_FORMAT)
    write_tar(tmp_path / "tars/01.tar", members[48:], tarfile.GNU_FORMAT)
    mixed = run(out=tmp_path / "mixed", train_data=f"{tmp_path}/half.tsv {tmp_path}/tars")
    assert totals(mixed) == totals(run())


def test_a_folder_names_what_is_not_a_tar(run, world, tmp_path, capsys):
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/00.tar").write_bytes((world / "pairs.tar").read_bytes())
    (tmp_path / "tars/00.parquet").touch()
    (tmp_path / "tars/._00.tar").touch()  # as macOS may put there
    run(train_data=tmp_path / "tars", epochs=1)
    err = capsys.readouterr().err
    assert "1 files that are not .tar are left out; the first is 00.parquet" in err


def tar_notes(path, members):
    write_tar(path, [(name, b"x" * 600) for name in members.split()])
    return clipkd.index_file(path)


def test_a_tar_pairs_files_of_one_key_whatever_image_it_is(tmp_path):
    index, notes = tar_notes(
        tmp_path / "a.tar", "a.txt a.gif b.BMP b.txt deep/c.d.tiff deep/c.d.txt"
    )
    assert len(index) == 3
    assert not any(notes.values())


def test_a_tar_names_what_is_left_out_of_it(tmp_path):
    members = "a.txt a.jpg b.txt c.png c.heic d.jpg d.png d.txt ._a.txt ._a.jpg"
    index, notes = tar_notes(tmp_path / "a.tar", members)
    assert len(index) == 2
    assert list(notes.values()) == [["b"], ["c"], ["d.png"]]


@pytest.mark.parametrize("place", [700, 3300, 5000, 6144, 7000])
def test_a_tar_that_is_cut_off_gives_what_is_whole(place, tmp_path, capsys):
    tar_notes(tmp_path / "a.tar", "a.txt a.jpg b.txt b.jpg c.txt c.jpg")  # 1536 bytes each
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:place])
    index, notes = clipkd.index_file(tmp_path / "a.tar")
    assert len(index) == place // 3072
    assert "it is damaged or cut off; only the pairs up to about" in capsys.readouterr().err


def test_a_tar_with_a_damaged_header_gives_what_comes_before_it(tmp_path, capsys):
    tar_notes(tmp_path / "a.tar", "a.txt a.jpg b.txt b.jpg c.txt c.jpg")
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[3072 + 5] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    index, notes = clipkd.index_file(tmp_path / "a.tar")
    assert len(index) == 1
    assert "only the pairs up to about a are used" in capsys.readouterr().err


def test_mutated_files_crash_nothing(world, tmp_path):
    random = np.random.default_rng(0)
    tsv = (world / "pairs.tsv").read_bytes()
    tar = (world / "pairs.tar").read_bytes()
    for _ in range(150):
        for name, content in (("m.tsv", tsv), ("m.tar", tar)):
            begin, end = sorted(random.integers(20, len(content), 2))
            if random.random() < 0.5:
                end = min(begin + 9, end)
            (tmp_path / name).write_bytes(
                content[:begin] + random.bytes(end - begin) + content[end:]
            )
            captions_of(tmp_path / name)


def test_mutated_images_are_read_or_refused(tmp_path):
    random = np.random.default_rng(0)
    for suffix in (".jpg", ".png", ".gif", ".webp", ".bmp"):
        file = tmp_path / f"image{suffix}"
        draw_letter("red", "S").save(file)
        content = file.read_bytes()
        for _ in range(30):
            begin = int(random.integers(len(content)))
            file.write_bytes(content[:begin] + random.bytes(9) + content[begin + 9 :])
            with contextlib.suppress(ValueError):
                assert clipkd.read_image(file, 0, -1).mode == "RGB"


def numbers_in(captions):
    """Stands in for a tokenizer: the last number of each caption."""
    numbers = [int((re.findall(r"\d+", caption) or ["0"])[-1]) for caption in captions]
    return torch.tensor([[number, -1] for number in numbers])


def fake_model(tokenizer=numbers_in, size=32):
    return SimpleNamespace(size=size, tokenizer=tokenizer, skips_padding=False)


def new_pairs(folder, rows, **options):
    """Pairs of a TSV with these rows. a.png is there."""
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "pairs.tsv").write_text("\n".join(["filepath\ttitle", *rows]))
    return clipkd.Pairs([folder / "pairs.tsv"], fake_model(**options), None, 0, folder)


IMAGES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"]


@pytest.mark.parametrize("mode", IMAGES)
def test_images_of_every_mode_are_read_as_pillow_converts_them(mode, tmp_path):
    suffixes = {"CMYK": ".tiff", "YCbCr": ".jpg"}
    file = tmp_path / f"a{suffixes.get(mode, '.png')}"
    draw_letter("red", "S").convert(mode).save(file)
    assert np.array_equal(clipkd.read_image(file, 0, -1), Image.open(file).convert("RGB"))


DEEP = {
    "a.png": np.full((9, 9), 25700, np.uint16),
    "little.tiff": np.full((9, 9), 25700, "<u2"),
    "big.tiff": np.full((9, 9), 25700, ">u2"),
    "int32.tiff": np.full((9, 9), 25700, np.int32),
    "float.tiff": np.full((9, 9), 100 / 255, np.float32),
    "float255.tiff": np.full((9, 9), 100, np.float32),
}


@pytest.mark.parametrize("name", DEEP)
def test_images_of_more_than_8_bits_are_scaled(name, tmp_path):
    pixels = DEEP[name]
    mode = "I;16B" if name == "big.tiff" else None
    image = Image.frombytes(mode, (9, 9), pixels.tobytes()) if mode else Image.fromarray(pixels)
    image.save(tmp_path / name)
    if name.startswith("float2"):
        pixels[0, 0] = 200
        Image.fromarray(pixels).save(tmp_path / name)
    read = np.array(clipkd.read_image(tmp_path / name, 0, -1))
    assert (read[1:] == 100).all()


def test_pairs_that_cannot_be_read_are_replaced_and_counted(tmp_path):
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    Image.new("1", (20000, 20000)).save(tmp_path / "huge.png")  # 50 kB that unpack to 1.2 GB
    rows = [f"a.png\t{i}" for i in range(20)]
    rows[3:7] = ["cut.jpg\t3", "huge.png\t4", "missing.jpg\t5", "a.png"]
    pairs = new_pairs(tmp_path, rows)
    images, (numbers,), _, problems = pairs[[(0, i) for i in range(20)]]
    assert len(images) == 20
    assert len(problems) == 4
    assert "cut.jpg: this image cannot be read" in problems[0]
    assert not {3, 4, 5} & set(numbers[:, 0].tolist())


def test_replacements_are_spread_and_the_same_again(tmp_path):
    rows = [f"a.png\t{i}" for i in range(1000)]
    rows[:600] = [f"missing/{i}.jpg\t{i}" for i in range(600)]  # a folder that is gone
    pairs = new_pairs(tmp_path, rows)
    keys = [(0, i) for i in range(64)]
    _, (numbers,), _, problems = pairs[keys]
    assert len(problems) == 64
    assert len(set(numbers[:, 0].tolist())) > 50  # 64 draws from 400 pairs
    assert torch.equal(numbers, pairs[keys][1][0])


def test_a_run_counts_replaced_pairs_once_each(run, world, tmp_path, capsys):
    log = run(train_data=with_missing_images(world, tmp_path), log_every=3)
    assert log[-2]["skipped"] == 16  # 8 an epoch
    assert "a pair could not be read and was replaced: pair" in capsys.readouterr().err


def test_a_tar_caption_of_several_lines_is_several_captions(tmp_path):
    image = io.BytesIO()
    draw_letter("red", "S").save(image, "jpeg")
    write_tar(tmp_path / "a.tar", [("a.jpg", image.getvalue()), ("a.txt", b"1\n2\n\n3\n")])
    assert captions_of(tmp_path / "a.tar") == [["1", "2", "3"]]
    pairs = clipkd.Pairs([tmp_path / "a.tar"], fake_model(), None, 0, tmp_path)
    drawn = [pairs.load(epoch, 0)[1] for epoch in range(40)]
    assert set(drawn) == {"1", "2", "3"}
    assert drawn == [pairs.load(epoch, 0)[1] for epoch in range(40)]


def test_a_batch_is_sorted_by_the_length_of_its_captions(tmp_path):
    for i in range(9):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    rows = [f"{i}.png\t{i}" + " a" * (5 * i % 9) for i in range(9)]  # 0, 5, 1, 6, 2, 7, 3, 8, 4
    tokenizer = open_clip.SimpleTokenizer()
    pairs = new_pairs(tmp_path, rows, tokenizer=tokenizer)
    images, (tokens,), _, _ = pairs[[(0, i) for i in range(9)]]
    order = [0, 2, 4, 6, 8, 1, 3, 5, 7]
    assert torch.equal(tokens, tokenizer([rows[i].split("\t")[1] for i in order]))
    assert images[:, 0, 0, 0].tolist() == [20 * i for i in order]


def test_odd_captions_are_tokenized_in_no_time(tmp_path):
    odd = ["a" * 10**6, "\x1b[31m\x7f", "\u732b \U0001f408 \u0642", "same", "same", "<a>"]
    rows = [f"a.png\t{text}" for text in odd[1:]] + ["a.png\t" + "a" * 100_000]
    pairs = new_pairs(tmp_path, rows, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    begin = time.perf_counter()
    _, (tokens,), _, problems = pairs[[(0, i) for i in range(len(rows))]]
    assert tokens.shape == (len(rows), 77)
    assert not problems
    assert time.perf_counter() - begin < 20


def test_an_epoch_sees_every_pair_once_in_an_order_of_its_own():
    steps = list(clipkd.batch_order(24, 8, 0, 0, 6))
    first = [number for keys in steps[:3] for _, number in keys]
    second = [number for keys in steps[3:] for _, number in keys]
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second
    assert list(clipkd.batch_order(24, 8, 0, 4, 6)) == steps[4:]  # as after a stop


def test_processes_share_each_batch(monkeypatch):
    whole = next(clipkd.batch_order(24, 8, 0, 0, 1))
    monkeypatch.setattr(clipkd, "WORLD", 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(clipkd, "RANK", rank)
        shares += next(clipkd.batch_order(24, 8, 0, 0, 1))
    assert shares == whole


def test_the_index_is_kept_and_made_anew_for_other_files(tmp_path):
    new_pairs(tmp_path, ["a.png\ta"])
    new_pairs(tmp_path, ["a.png\ta", "a.png\tb"])
    assert len(list(tmp_path.glob("*.npy"))) == 2


# --------------------------------------------------------------------------------------------------
# Evaluation


def test_recalls_count_every_caption_of_an_image():
    img = unit(1, 3, 3)
    txt = unit(2, 7, 3)
    owners = [0, 0, 1, 1, 1, 2, 2]
    right_texts = 0
    for i in range(3):
        similar = [dot(img[i], txt[j]) for j in range(7)]
        right_texts += owners[int(np.argmax(similar))] == i
    right_images = 0
    for j in range(7):
        similar = [dot(img[i], txt[j]) for i in range(3)]
        right_images += int(np.argmax(similar)) == owners[j]
    themselves = torch.arange(3)
    owners = torch.tensor(owners)
    assert clipkd.recalls(img, txt, themselves, owners)[1] == pytest.approx(100 * right_texts / 3)
    assert clipkd.recalls(txt, img, owners, themselves)[1] == pytest.approx(100 * right_images / 7)


def several_captions(world, tmp_path):
    """Six images with three captions each, as TSV, CSV and tar."""
    images = sorted(world.glob("classes/*/*.jpg"))[:6]
    rows = [("filepath", "title")]
    members = []
    for i, image in enumerate(images):
        captions = [f"a letter, {i}", f"one more {clipkd.COLOURS[i]}", "a thing"]
        rows += [(str(image), f'"{caption}"') for caption in captions]
        members.append((f"{i}.jpg", image.read_bytes()))
        members.append((f"{i}.txt", "\n".join(captions).encode()))
    (tmp_path / "a.tsv").write_text("\n".join("\t".join(row) for row in rows))
    (tmp_path / "a.csv").write_text("\n".join(",".join(row) for row in rows))
    write_tar(tmp_path / "a.tar", members)


def test_tsv_csv_and_tar_give_the_same_scores(world, tmp_path):
    several_captions(world, tmp_path)
    model = load("demo-vit")
    sets = {}
    for kind in ("tsv", "csv", "tar"):
        sets[kind] = clipkd.read_captioned_images(f"{tmp_path}/a.{kind}")
    scores = clipkd.evaluate(model, {}, sets)
    assert scores["tsv"] == scores["csv"] == scores["tar"]


def test_first_captions_have_scores_of_their_own(world, tmp_path):
    several_captions(world, tmp_path)
    data = clipkd.read_captioned_images(f"{tmp_path}/a.tsv")
    first = clipkd.CaptionedImages(data.images, data.captions[::3], list(range(6)), list(range(6)))
    scores = clipkd.evaluate(load("demo-vit"), {}, {"all": data, "first": first})
    for way in ("I2T", "T2I"):
        assert scores["all"][f"first-caption {way} R@1"] == scores["first"][f"{way} R@1"]
    assert "first-caption I2T R@1" not in scores["first"]


def test_an_evaluation_on_several_processes_prints_the_digits_of_one(world, capsys, monkeypatch):
    words = ["--eval-only", "--student", f"local-dir:{world}/teacher", "--workers", "0"]
    words += ["--val-data", f"val={world}/pairs.tsv", "--zeroshot", f"letters={world}/classes"]
    monkeypatch.setattr(sys, "argv", ["clipkd.py", *words])
    clipkd.main()
    one = capsys.readouterr().out
    assert one.startswith("letters: top-1")
    started = []
    for processes in (2, 3):
        started.append(start(*TORCHRUN, f"--nproc_per_node={processes}", SCRIPT, *words))
    for process in started:
        code, out, err = finish(process)
        assert code == 0, err
        assert out.endswith(one)  # before it gloo of torch 2.8 prints its connections
        assert out.count("letters: top-1") == 1


def make_folders(root, names):
    for name in names:
        (root / name).mkdir(parents=True)
        draw_letter("red", "S").save(root / name / "a.bmp")
    return clipkd.read_class_folders(root)


def test_folders_0_to_999_are_imagenets_classes_in_the_order_of_numbers(tmp_path):
    data = make_folders(tmp_path / "v2", [str(i) for i in range(1000)])
    for (path, _, _), label in zip(data.images, data.labels):
        assert label == int(path.parent.name)
    assert data.class_names == open_clip.IMAGENET_CLASSNAMES
    assert len(data.templates) == 80


def test_folders_of_wnids_are_those_of_imagenets_classes(tmp_path):
    data = make_folders(tmp_path / "subset", ["n01440764", "n15075141"])
    assert data.class_names == ["tench", "toilet paper"]
    with pytest.raises(BadInput, match="subset: n99999999 is not an ImageNet class"):
        make_folders(tmp_path / "subset", ["n99999999"])


def test_other_folders_are_named_as_they_are(tmp_path):
    data = make_folders(tmp_path / "digits", [str(i) for i in range(10)])
    assert data.class_names == [str(i) for i in range(10)]
    data = make_folders(tmp_path / "words", ["red_fox", "dog"])
    assert data.class_names == ["dog", "red fox"]
    assert data.templates == ["a photo of a {}"]


def test_class_folders_name_what_is_not_an_image(tmp_path, capsys):
    (tmp_path / "x/dog").mkdir(parents=True)
    (tmp_path / "x/dog/readme.md").touch()
    (tmp_path / "x/dog/.DS_Store").touch()
    make_folders(tmp_path / "x", ["fox"])
    assert "1 files that are not images are left out; the first is" in capsys.readouterr().err


def test_zero_shot_agrees_with_a_classifier_built_by_hand(world):
    model = load("demo-vit", seed=3)
    data = clipkd.read_class_folders(world / "classes")
    score = clipkd.evaluate(model, {"x": data}, {})["x"]["top-1"]
    preprocess = open_clip.image_transform(32, is_train=False)
    sentences = [f"a photo of a {name}" for name in data.class_names]
    right = 0
    with torch.no_grad():
        texts = model.net.encode_text(model.tokenizer(sentences), normalize=True)
        for (path, _, _), label in zip(data.images, data.labels):
            image = preprocess(Image.open(path))[None]
            embedding = model.net.encode_image(image, normalize=True)[0]
            right += int(np.argmax([dot(embedding, text) for text in texts])) == label
    assert score == pytest.approx(100 * right / len(data.labels))


# --------------------------------------------------------------------------------------------------
# Mistakes. Each ends in one line that says what is wrong, before anything is written.

MISTAKES = [
    ({"train_data": "nowhere.tsv"}, "nowhere.tsv: not found; expected a TSV, a CSV, a .tar or"),
    ({"train_data": "{tmp}"}, "{tmp}: no .tar in this folder; list other images in a TSV or CSV"),
    ({"train_data": "{tmp}/columns.csv"}, "columns.csv: needs columns filepath and title"),
    ({"train_data": "{tmp}/coco.json"}, "coco.json: needs columns filepath and title"),
    ({"train_data": "{tmp}/empty.tsv"}, "empty.tsv: there is no pair of an image and a caption"),
    ({"train_data": "{tmp}/lost.tsv"}, "1000 pairs in a row cannot be read: .*gone.jpg.*relative"),
    ({"val_data": "{tmp}/empty.tsv"}, "empty.tsv: there is no pair of an image and a caption"),
    ({"val_data": "{tmp}/lost.tsv"}, "--val-data .*lost.tsv: .*gone.jpg"),
    ({"val_data": "{tmp}/row.tsv"}, "row.tsv: 1 instead of 2 cells in 'no second column"),
    (
        {"val_data": "a={tmp}/one.tsv a={tmp}/one.tsv"},
        "another set has the name a already",
    ),
    ({"zeroshot": "nowhere"}, "--zeroshot nowhere: there is no such folder"),
    ({"student": "ViT-T-61"}, "model ViT-T-61 is unknown; near it are .*ViT-T-16"),
    ({"teacher": "{tmp}"}, "model {tmp}: this is a folder, so write local-dir:{tmp}"),
    ({"student": "{tmp}/columns.csv.json"}, "columns.csv.json, .*cannot be loaded.*No such file"),
    ({"student": "{tmp}/bad.json"}, "bad.json, weights None: cannot be loaded: .*needs embed_dim"),
    (
        {"teacher": "ViT-B-16", "teacher_pretrained": "laion"},
        "laion is not a file, nor .*laion400m_e32",
    ),
    ({"teacher": "demo-teacher", "teacher_pretrained": "{tmp}/one.tsv"}, "cannot be loaded"),
    ({"teacher": "local-dir:{tmp}/gone"}, "gone, weights .*: cannot be loaded: .*not found"),
    ({"student": "{tmp}/timm.json"}, "timm.json: cannot encode an image: Input height .128. does"),
    ({"student": "coca_ViT-B-32"}, "coca_ViT-B-32.* a CoCa has a decoder"),
    ({"student": "local-dir:{tmp}/nan"}, "nan, weights None: its weights are not finite"),
    ({"batch_size": 25}, "--batch-size 25: there are only 24 pairs"),
    ({"batch_size": 1}, "--batch-size 1: must be at least 2"),
    ({"epochs": 0}, "--epochs: 0 is not a whole number of at least 1"),
    ({"epochs": "many"}, "--epochs: many is not a whole number of at least 1"),
    ({"lambda_fd": "nan"}, "--lambda-fd: nan is not a number of at least 0"),
    ({"lambda_crd": -1}, "--lambda-crd: .*"),
    ({f"lambda_{name}": 0 for name in clipkd.LOSSES}, "--lambda-.*: all are 0"),
    ({"mask_ratio": 1}, "--mask-ratio 1.0: must be less than 1"),
    ({"unknown": 1}, "unrecognized arguments: --unknown"),
    ({"train_data": None, "val_data": "x.tsv"}, "--val-data and --zeroshot need --train-data"),
    (
        {"keep_teacher_text": True, "student_pretrained": "x"},
        "--keep-teacher-text: needs --train-data and a",
    ),
]


@pytest.mark.parametrize("changes, words", MISTAKES)
def test_a_mistake_is_one_line(changes, words, run, world, tmp_path):
    rows = {"empty": "", "lost": "gone.jpg\tgone", "row": "no second column"}
    rows["one"] = f"{next(world.glob('classes/*/*.jpg'))}\tone"
    for name, row in rows.items():
        (tmp_path / f"{name}.tsv").write_text(f"filepath\ttitle\n{row}\n")
    (tmp_path / "columns.csv").write_text("path,text\na,b\n")
    (tmp_path / "coco.json").write_text('{"images": [' + "1, " * 10**6 + "1]}")
    (tmp_path / "bad.json").write_text('{"embed_dim": 5}')
    timm_vit(tmp_path, size=128)
    if "nan" in str(changes.get("student")):
        broken = load("demo-vit")
        broken.net.visual.proj.data.fill_(math.nan)
        broken.export(tmp_path / "nan")
    filled = {}
    for name, value in changes.items():
        filled[name] = value.format(tmp=tmp_path) if isinstance(value, str) else value
    with pytest.raises(BadInput, match=words.replace("{tmp}", str(tmp_path))) as error:
        run(**filled)
    assert len(str(error.value)) < 3000
    assert {path.name for path in tmp_path.glob("out/*")} <= {"lock", "index"}


def test_a_mistake_ends_with_one_line_and_exit_code_2(tmp_path):
    code, out, err = finish(start(SCRIPT, "--train-data", "nowhere.tsv", cwd=tmp_path))
    line = "nowhere.tsv: not found; expected a TSV, a CSV, a .tar or a folder of .tar"
    assert (code, out, err) == (2, "", f"clipkd.py: error: {line}\n")
    assert not list(tmp_path.iterdir())


def test_a_long_message_is_cut(capsys):
    assert clipkd.end_with(BadInput("x" * 10**6 + "\nthe end")) == 2
    err = capsys.readouterr().err
    assert len(err) < 1000
    assert err.count("\n") == 1
    assert err.endswith("the end\n")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        clipkd.end_with(ZeroDivisionError())


def test_an_image_that_an_evaluation_cannot_read_is_named(run, tmp_path):
    (tmp_path / "classes/a").mkdir(parents=True)
    (tmp_path / "classes/a/bad.png").write_text("not an image")
    with pytest.raises(BadInput, match="bad.png: this image cannot be read"):
        run(zeroshot=tmp_path / "classes", save_every=4)
    assert torch.load(tmp_path / "out/checkpoint.pt")["progress"]["step"] == 4


def test_a_checkpoint_of_another_run_is_refused_and_kept(run, tmp_path):
    run(epochs=1)
    before = (tmp_path / "out/checkpoint.pt").read_bytes()
    for name, value in (("student", "demo-student"), ("seed", 1), ("lambda_gd", 1)):
        flag = f"--{name.replace('_', '-')}"
        with pytest.raises(BadInput, match=f"another run: {flag} was .* and is {value}.* now"):
            run(**{"epochs": 1, name: value})
    assert (tmp_path / "out/checkpoint.pt").read_bytes() == before


def test_a_run_does_not_continue_on_other_data(run, world, tmp_path):
    lines = (world / "pairs.tsv").read_text().replace("classes/", f"{world}/classes/")
    (tmp_path / "pairs.tsv").write_text(lines)
    run(epochs=1, train_data=tmp_path / "pairs.tsv")
    (tmp_path / "pairs.tsv").write_text(lines + " ")
    with pytest.raises(BadInput, match="belongs to another run: --train-data"):
        run(epochs=1, train_data=tmp_path / "pairs.tsv")


@pytest.mark.parametrize("content", [b"", b"something else"])
def test_a_damaged_checkpoint_is_refused_and_kept(content, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/checkpoint.pt").write_bytes(content)
    with pytest.raises(BadInput, match="checkpoint.pt: cannot be read: .*; give another --out"):
        run()
    assert (tmp_path / "out/checkpoint.pt").read_bytes() == content


def test_a_batch_must_be_a_multiple_of_the_processes(monkeypatch):
    monkeypatch.setattr(clipkd, "WORLD", 3)
    with pytest.raises(BadInput, match="--batch-size 1024: must be .* multiple of the 3"):
        clipkd.get_args(["--train-data", "x.tsv"])


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(clipkd, "LOCAL_WORLD", 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(BadInput, match="3 processes for 2 GPUs; use --nproc_per_node=2"):
        clipkd.setup()


def test_half_of_torchruns_variables_are_refused():
    code, _, err = finish(start(SCRIPT, WORLD_SIZE="2"))
    assert code == 2
    assert err.startswith("clipkd.py: error: RANK or WORLD_SIZE is set, but RANK is not; ")
    assert err.count("\n") == 1


def test_a_rank_alone_is_refused(monkeypatch):
    monkeypatch.setattr(clipkd, "RANK", 1)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(BadInput, match="is set, but LOCAL_RANK is not; start with torchrun"):
        clipkd.setup()


def test_empty_variables_of_a_scheduler_mean_one_process():
    code, out, _ = finish(start(SCRIPT, "--help", WORLD_SIZE="", RANK=""))
    assert code == 0


def test_a_terminal_of_ascii_can_print_any_name(world, tmp_path):
    words = ["--eval-only", "--student", f"local-dir:{world}/teacher", "--workers", "0"]
    words += ["--val-data", f"\u732b={world}/pairs.tsv"]
    code, out, err = finish(start(SCRIPT, *words, PYTHONIOENCODING="ascii"))
    assert code == 0, err
    assert out.startswith("\\u732b: I2T R@1")


def test_a_student_with_a_bias_like_siglips_trains_on_two_processes(world, tmp_path):
    config = {**clipkd.STUDENTS["demo-vit"], "init_logit_bias": -10, "custom_text": True}
    (tmp_path / "siglip.json").write_text(json.dumps(config))
    words = flags(world, tmp_path / "out", student=tmp_path / "siglip.json", epochs=1)
    code, _, err = finish(start(*TORCHRUN, "--nproc_per_node=2", SCRIPT, *words))
    assert code == 0, err


def test_importing_clipkd_writes_nothing(tmp_path):
    code = "import clipkd; print(clipkd.RANK)"
    assert finish(start("-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))) == (0, "0\n", "")
    assert not list(tmp_path.iterdir())


def test_help_names_every_flag():
    code, out, err = finish(start(SCRIPT, "--help", COLUMNS="100"))
    assert (code, err) == (0, "")
    known = {f"--{name.replace('_', '-')}" for name in vars(clipkd.get_args([])) if name != "demo"}
    assert set(re.findall(r"^  (--[a-z-]+)", out, re.M)) == known


def test_without_flags_a_run_is_the_papers_recipe():
    args = clipkd.get_args(["--train-data", "cc3m.tsv", "cc12m.tsv"])
    assert (args.student, args.teacher) == ("ViT-T-16", "ViT-B-16")
    assert args.teacher_pretrained == "laion400m_e32"
    lambdas = {"clip": 1, "crd": 1, "fd": 2000, "icl": 1, "mfd": 0, "gd": 0, "afd": 0}
    assert clipkd.get_lambdas(args) == lambdas
    assert (args.batch_size, args.epochs, args.lr, args.weight_decay) == (1024, 32, 1e-3, 0.1)


def test_a_flag_that_is_given_counts_in_the_demo_too():
    args = clipkd.get_args(["--lambda-fd", "7"])
    assert args.demo
    assert args.student == "demo-student"
    assert args.lambda_fd == 7


def test_the_demo_gives_a_loss_of_ones_own_its_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clipkd, "TEACHER_PAIRS", 64)
    monkeypatch.setattr(clipkd, "STUDENT_PAIRS", 64)
    monkeypatch.setattr(clipkd, "TEACHER_EPOCHS", 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    words = ["--epochs", "1", "--workers", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["my_loss.py", *words])
    clipkd.main(WithCosine)
    assert "| student + WithCosine |" in capsys.readouterr().out
    assert "cosine" in read_log(tmp_path / "seed0/student-withcosine")[1]
    assert "cosine" not in read_log(tmp_path / "seed0/student-alone")[1]


# --------------------------------------------------------------------------------------------------
# README and notebooks


def read_readme():
    return (ROOT / "README.md").read_text("utf-8")


def readme_code(start_of_code):
    return re.search(rf"```python\n({start_of_code}.*?)```", read_readme(), re.S).group(1)


def read_notebooks():
    """[(name, cells), ...]"""
    notebooks = []
    for file in sorted(ROOT.glob("notebooks/*.ipynb")):
        notebooks.append((file.name, json.loads(file.read_text("utf-8"))["cells"]))
    return notebooks


def source(cell):
    return "".join(cell["source"])


def test_the_readmes_example_of_one_loss_prints_what_it_says():
    code = readme_code("import torch")
    result, out, err = finish(start("-c", code))
    assert result == 0, err
    assert out.split() == re.findall(r"# prints (\S+)", code)


def test_the_readmes_loss_of_your_own_trains(world, tmp_path):
    (tmp_path / "my_loss.py").write_text(readme_code("from clipkd"))
    words = flags(world, tmp_path / "out", epochs=1)
    result, _, err = finish(start(tmp_path / "my_loss.py", *words, PYTHONPATH=str(ROOT)))
    assert result == 0, err
    record = read_log(tmp_path / "out")[1]
    total = record["clip"] + record["crd"] + 250 * record["fd"] + record["icl"]
    assert record["total"] == pytest.approx(total + 10 * record["cosine"], rel=1e-5)


def test_a_script_with_a_loss_of_ones_own_ends_like_clipkd(world, tmp_path):
    (tmp_path / "my_loss.py").write_text(readme_code("from clipkd"))
    off = {f"lambda_{name}": 0 for name in ("clip", "crd", "fd", "icl")}
    changes = {"val_data": f"val={world}/pairs.tsv", "lambda_cosine": 3, **off}
    words = flags(world, tmp_path / "out", epochs=1, **changes)
    result, out, err = finish(start(tmp_path / "my_loss.py", *words, PYTHONPATH=str(ROOT)))
    assert result == 0, err
    assert out.startswith("val: I2T R@1")  # the scores, and no warnings of other libraries
    record = read_log(tmp_path / "out")[1]
    assert record["total"] == pytest.approx(3 * record["cosine"], rel=1e-5)
    result, _, err = finish(
        start(tmp_path / "my_loss.py", "--lambda-cosine", "-1", PYTHONPATH=str(ROOT))
    )
    assert result == 2
    assert err.startswith("clipkd.py: error: ") and err.count("\n") == 1


def test_the_readmes_links_lead_somewhere():
    text = read_readme()
    headings = re.findall(r"^## (.*)", text, re.M)
    anchors = {re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings}
    for link in re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', text):
        target = "".join(link)
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (ROOT / target).is_file(), target


def test_the_commands_of_readme_and_notebooks_have_no_wrong_flag():
    text = read_readme()
    for _, cells in read_notebooks():
        text += "".join(source(cell) for cell in cells if cell["cell_type"] == "markdown")
    commands = re.findall(r"^(?:python|torchrun .*?) clipkd\.py (--.*)", text, re.M)
    assert len(commands) > 8
    for command in commands:
        words = command.split("#")[0].replace("...", "").split()
        clipkd.get_args([*words, "--train-data", "pairs.tsv"])


def test_the_readmes_picture_is_what_notebook_2_shows():
    cells = dict(read_notebooks())["02_distil_a_clip_on_your_laptop.ipynb"]
    shown = []
    for cell in cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                shown.append(base64.b64decode(output["data"]["image/png"]))
    assert (ROOT / "notebooks/learning_curve.png").read_bytes() in shown


def test_notebook_4_makes_tsvs_of_the_captions_of_coco_and_flickr(tmp_path):
    cells = dict(read_notebooks())["04_in_your_project.ipynb"]
    code = [source(cell) for cell in cells if source(cell).startswith("import csv")][0]
    captions = ["a dog, running", 'the "thing"', '"All" of\tit ']
    images = [{"id": 7 * i, "file_name": f"{i}.jpg"} for i in range(3)]
    annotations = []
    for k in range(6):
        annotations.append({"image_id": 7 * (k % 3), "id": k, "caption": captions[k % 3]})
    coco = json.dumps({"images": images, "annotations": annotations})
    (tmp_path / "coco.json").write_text(coco)
    lines = ["image,caption"] + [f"{k % 3}.jpg,{captions[k % 3]}" for k in range(6)]
    (tmp_path / "flickr.txt").write_text("\n".join(lines))
    functions = {}
    exec(code, functions)
    functions["write_coco"](tmp_path / "coco.json", tmp_path / "coco.tsv")
    functions["write_flickr"](tmp_path / "flickr.txt", tmp_path / "flickr.tsv")
    for name, folder in (("coco", "val2014"), ("flickr", "flickr30k-images")):
        (tmp_path / folder).mkdir()
        for i in range(3):
            Image.new("RGB", (9, 9)).save(tmp_path / folder / f"{i}.jpg")
        data = clipkd.read_captioned_images(f"{tmp_path}/{name}.tsv")
        assert len(data.images) == 3
        assert data.captions == [" ".join(captions[k % 3].split()) for k in range(6)]


def test_all_notebooks_fetch_the_project_in_the_same_way():
    cells = {source(cells[1]) for _, cells in read_notebooks()}
    assert len(cells) == 1
    assert len(cells.pop().splitlines()) <= 3


# --------------------------------------------------------------------------------------------------
# Measurements, not tests: `python test_losses.py` prints how fast and how large things are, each
# beside a baseline that is measured in the same run.


def gd_expanded(img_s, txt_s, img_t, txt_t, scale_s, scale_t):
    """GD as the authors' code has it: N x D x N tensors, each direction compared alone."""

    def gradients(a, b, scale):
        errors = (scale * a @ b.T).softmax(1) - torch.eye(len(a))
        expanded = errors.T[:, None].repeat(1, a.shape[1], 1)  # [N, D, N]
        return scale / len(a) * errors @ b, scale / len(a) * (expanded * a.T).sum(2)

    total = 0
    for student, teacher in (((img_s, txt_s), (img_t, txt_t)), ((txt_s, img_s), (txt_t, img_t))):
        of_student = gradients(*student, scale_s)
        of_teacher = gradients(*teacher, scale_t)
        total = total + F.mse_loss(of_student[0], of_teacher[0])
        total = total + F.mse_loss(of_student[1], of_teacher[1])
    return total


def recipe_loss(anchors, img_s, txt_s, img_t, txt_t, scale_s, scale_t):
    """The total of the paper's recipe for some anchors."""
    total = clip_loss(img_s, txt_s, scale_s, anchors)
    total = total + crd_loss(img_s, txt_s, img_t, txt_t, scale_s, scale_t, anchors)
    total = total + icl_loss(img_s, txt_s, img_t, txt_t, scale_s, anchors)
    return total + 2000 * fd_loss(img_s, txt_s, img_t, txt_t)


def loss_inputs(n):
    x = []
    for i in range(4):
        x.append(F.normalize(torch.randn(n, 512), dim=1).requires_grad_(i < 2))
    return [*x, torch.tensor(14.0, requires_grad=True), torch.tensor(50.0)]


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB


def measure_loss(loss, n, repeats, pipe):
    """Median seconds of forward and backward, and the peak of memory above the inputs in MiB."""
    ctypes.CDLL(None).mallopt(-3, 2**18)  # memory of large tensors is given back when it is freed
    loss(*loss_inputs(64)).backward()  # the libraries' own buffers
    inputs = loss_inputs(n)
    before = peak_memory()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        loss(*inputs).backward()
        times.append(time.perf_counter() - begin)
    pipe.send((float(np.median(times)), peak_memory() - before))


def cost_of(loss, n, repeats):
    """The same in a process of its own, so that the peak is that of this loss."""
    fork = torch.multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=measure_loss, args=(loss, n, repeats, theirs))
    process.start()
    process.join()
    return ours.recv()


def compare_losses(title, baseline, here, n, baseline_repeats=5):
    seconds_0, memory_0 = cost_of(baseline, n, baseline_repeats)
    seconds, memory = cost_of(here, n, 5)
    ratios = f"{seconds_0 / seconds:.1f}x, {memory_0 / memory:.1f}x"
    costs = f"{seconds_0:.2f} s, {memory_0:.0f} MiB | {seconds:.3f} s, {memory:.0f} MiB"
    print(f"| {title} | {costs} | {ratios} |", flush=True)


def whole_recipe(*inputs):
    return recipe_loss(slice(None), *inputs)


def eighth_of_recipe(*inputs):
    return recipe_loss(slice(len(inputs[0]) // 8), *inputs)


def measure_losses():
    print("| forward + backward, one core, D = 512 | baseline | here | time, memory |")
    print("|---|---|---|---|")
    compare_losses("GD, N = 1024: the N x D x N expansion", gd_expanded, gd_loss, 1024, 1)
    for n in (1024, 4096):
        title = f"recipe, N = {n}, one of 8 processes: the whole N x N"
        compare_losses(title, whole_recipe, eighth_of_recipe, n)


def kept_for_backward(name, checkpointing, n=4):
    """MiB a pair that the student's forward pass keeps for its backward pass, in float32."""
    student = load(name)
    student.net.train()
    if checkpointing:
        student.recompute_activations()
    distiller = Distiller(student.net, student.dim, student.dim, {"clip": 1})
    weights = {p.untyped_storage().data_ptr() for p in distiller.parameters()}
    sizes = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses = distiller(torch.randn(n, 3, 224, 224), [torch.full((n, 77), 49407)])
    del losses
    return sum(sizes.values()) / n / 2**20


def measure_memory():
    print("| kept for backward, MiB a pair, float32 | plain | --grad-checkpointing |")
    print("|---|---|---|")
    for name in ("ViT-T-16", "ViT-B-16"):
        plain = kept_for_backward(name, False)
        print(f"| {name} | {plain:.1f} | {kept_for_backward(name, True):.1f} |", flush=True)


def captions_like(mean_length, n):
    """Random tokens of n captions, sorted by length, with lengths as in a web data set."""
    random = np.random.default_rng(0)
    lengths = 3 + random.gamma(3, (mean_length - 3) / 3, n)
    lengths = np.sort(lengths.round().clip(3, 77).astype(int))
    tokens = torch.zeros(n, 77, dtype=torch.long)
    for row, length in zip(tokens, lengths):
        row[:length] = torch.randint(1, 49000, (int(length),))
        row[length - 1] = 49407
    return tokens, lengths.mean()


def measure_step(mean_length, n=64, rounds=3):
    """A step of ViT-B-16 into ViT-T-16 with all tokens and without padding, in turn."""
    student = load("ViT-T-16")
    teacher = load("ViT-B-16")
    student.net.train()
    lambdas = {"clip": 1, "crd": 1, "fd": 2000, "icl": 1}
    model = Distiller(student.net, student.dim, teacher.dim, lambdas)
    optimizer = clipkd.make_optimizer(model, 1e-3, 0.1)
    tokens, length = captions_like(mean_length, n)
    images = torch.randint(256, (n, 3, 224, 224), dtype=torch.uint8)
    times = {"all": [], "cut": []}
    for _ in range(rounds):
        for name, parts in (("all", [tokens]), ("cut", clipkd.cut_padding(tokens))):
            begin = time.perf_counter()
            clipkd.train_step(model, optimizer, lambdas, student, teacher, images, parts, parts)
            times[name].append(time.perf_counter() - begin)
    all_tokens = np.median(times["all"])
    cut = np.median(times["cut"])
    print(f"a step of ViT-B-16 into ViT-T-16, N = {n}, captions of {length:.1f} tokens on average:")
    ratio = f"{all_tokens / cut:.2f}x"
    print(f"all 77 tokens {all_tokens:.1f} s, without padding {cut:.1f} s, {ratio}", flush=True)


def measure_loading():
    """CPU time of loading images of 512 x 384 pixels, of about 40 kB as photographs."""
    random = np.random.default_rng(0)
    theirs = open_clip.image_transform(224, is_train=True)
    times = {"theirs": [], "here": []}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rows = []
        for i in range(32):
            noise = random.integers(0, 256, (12, 16, 3), np.uint8)
            smooth = np.array(Image.fromarray(noise).resize((512, 384)))
            pixels = (smooth + random.normal(0, 6, (384, 512, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=85)
            rows.append(f"{i}.jpg\tx")
        pairs = new_pairs(folder, rows, size=224)
        for _ in range(9):
            for name in times:
                begin = time.process_time()
                for i in range(32):
                    if name == "here":
                        pairs.load(0, i)
                    else:
                        theirs(Image.open(folder / f"{i}.jpg"))
                times[name].append((time.process_time() - begin) / 32)
    a = np.median(times["theirs"])
    b = np.median(times["here"])
    print(f"512 x 384 JPEGs: open_clip {1 / a:.0f} images/s, here {1 / b:.0f}, {a / b:.2f}x")


if __name__ == "__main__":
    measure_losses()
    measure_loading()
    measure_memory()
    torch.set_num_threads(clipkd.available_cores())
    measure_step(12.6)
    measure_step(27)
