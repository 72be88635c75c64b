"""Tests of losses.py and clipkd.py: pytest -q test_losses.py (CPU, no network, about three minutes on two cores).

Expected values come from the paper's equations written as loops, from hand-computed numbers, from identities, from
autograd, or from open_clip; never from a copy of the code under test.
"""
import ast
import copy
import inspect
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image

import clipkd
import losses
from clipkd import BadInput, Distiller
from losses import afd_loss, clip_loss, crd_loss, fd_loss, gd_loss, icl_loss, mfd_loss

ROOT = Path(__file__).parent
N, D = 5, 4
SCALE_S, SCALE_T = 3.0, 7.0


def unit_rows(seed, n=N, d=D):
    return F.normalize(torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.fixture
def rows():
    return [unit_rows(seed) for seed in range(4)]  # img_s, txt_s, img_t, txt_t


def fuse(x):  # stands in for AFD's linear layers
    return x @ torch.linspace(-1, 1, 2 * D * D, dtype=torch.float64).view(2 * D, D)


CALLS = {  # every loss as a function of the four row matrices
    "clip": lambda v, s, vt, st: clip_loss(v, s, SCALE_S),
    "crd": lambda v, s, vt, st: crd_loss(v, s, vt, st, SCALE_S, SCALE_T),
    "fd": fd_loss,
    "mfd": mfd_loss,
    "gd": lambda v, s, vt, st: gd_loss(v, s, vt, st, SCALE_S, SCALE_T),
    "icl": lambda v, s, vt, st: icl_loss(v, s, vt, st, SCALE_S),
    "afd": lambda v, s, vt, st: afd_loss(v, s, vt, st, fuse, fuse, SCALE_S),
}


# ---- The equations, as loops. ----

def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b))


def softmax_loop(anchor, keys, scale):
    e = [math.exp(scale * dot(anchor, key)) for key in keys]
    return [x / sum(e) for x in e]


def nce_loop(anchors, keys, scale):
    return -sum(math.log(softmax_loop(a, keys, scale)[k]) for k, a in enumerate(anchors)) / len(anchors)


def kl_loop(anchors_t, keys_t, anchors_s, keys_s):
    total = 0.0
    for k in range(len(anchors_t)):
        p, q = softmax_loop(anchors_t[k], keys_t, SCALE_T), softmax_loop(anchors_s[k], keys_s, SCALE_S)
        total += sum(a * math.log(a / b) for a, b in zip(p, q))
    return total / len(anchors_t)


def square_loop(a, b):
    return sum((float(x) - float(y)) ** 2 for r, q in zip(a, b) for x, y in zip(r, q)) / (len(a) * len(a[0]))


def gradient_loop(v, s, scale):
    """Eq. 19-24 with the 1/N of the batch mean, one anchor and one key at a time: dL/dv, dL/ds."""
    n, d = v.shape
    dv, ds = torch.zeros(n, d, dtype=v.dtype), torch.zeros(n, d, dtype=v.dtype)
    for k in range(n):
        p, q = softmax_loop(v[k], s, scale), softmax_loop(s[k], v, scale)
        for b in range(n):
            dv[k] += scale * (p[b] - (b == k)) * s[b] / (2 * n)  # Eq. 19
            ds[b] += scale * (p[b] - (b == k)) * v[k] / (2 * n)  # Eq. 20
            ds[k] += scale * (q[b] - (b == k)) * v[b] / (2 * n)  # Eq. 21
            dv[b] += scale * (q[b] - (b == k)) * s[k] / (2 * n)  # Eq. 22
    return dv, ds


def expected(name, v, s, vt, st):
    if name == "clip":
        return (nce_loop(v, s, SCALE_S) + nce_loop(s, v, SCALE_S)) / 2
    if name == "crd":
        return (kl_loop(vt, st, v, s) + kl_loop(st, vt, s, v)) / 2
    if name in ("fd", "mfd"):
        return square_loop(v, vt) + square_loop(s, st)
    if name == "icl":
        return (nce_loop(v, st, SCALE_S) + nce_loop(s, vt, SCALE_S)) / 2
    if name == "gd":
        return sum(square_loop(a, b) for a, b in zip(gradient_loop(v, s, SCALE_S), gradient_loop(vt, st, SCALE_T)))
    v, s = ([[x / math.sqrt(dot(r, r)) for x in r] for r in fuse(torch.cat(pair, 1)).tolist()] for pair in ((v, vt), (s, st)))
    return (nce_loop(v, s, SCALE_S) + nce_loop(s, v, SCALE_S)) / 2


@pytest.mark.parametrize("name", CALLS)
def test_a_loss_is_its_equation_written_as_loops(name, rows):
    assert CALLS[name](*rows).item() == pytest.approx(expected(name, *rows), rel=1e-10)


@pytest.mark.parametrize("name", CALLS)
def test_the_gradient_of_a_loss_is_its_finite_difference(name, rows):
    assert torch.autograd.gradcheck(CALLS[name], [x.clone().requires_grad_() for x in rows])


def test_the_learned_scales_get_their_finite_difference_too(rows):
    s, t = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (SCALE_S, SCALE_T))
    for loss in (lambda s: clip_loss(*rows[:2], s), lambda s: crd_loss(*rows, s, t), lambda s: gd_loss(*rows, s, t),
                 lambda s: icl_loss(*rows, s), lambda s: afd_loss(*rows, fuse, fuse, s)):
        assert torch.autograd.gradcheck(loss, [s])


@pytest.mark.parametrize("name", CALLS)
def test_the_order_of_the_pairs_does_not_matter(name, rows):
    order = torch.tensor([3, 0, 4, 1, 2])
    assert CALLS[name](*(x[order] for x in rows)).item() == pytest.approx(CALLS[name](*rows).item(), rel=1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_autocast_and_half_precision_rows_do_not_change_the_precision_inside(name, rows):
    half = [x.bfloat16() for x in rows]
    loss = CALLS[name] if name != "afd" else lambda *r: afd_loss(*r, lambda x: x[:, :D], lambda x: x[:, :D], SCALE_S)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*half)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(*(x.double() for x in half)).item(), rel=2e-5)


# ---- Numbers that can be worked out by hand. ----

def test_two_orthonormal_pairs_give_the_values_worked_out_by_hand():
    e = torch.eye(2, dtype=torch.float64)
    swapped = e.flip(0)
    softplus = math.log(1 + math.exp(-1))  # each row's logits are 1 for its own text and 0 for the other
    p = 1 / (1 + math.exp(-1))
    assert clip_loss(e, e, 1.0).item() == pytest.approx(softplus)
    assert icl_loss(swapped, swapped, e, e, 1.0).item() == pytest.approx(softplus + 1)
    assert crd_loss(swapped, e, e, e, 1.0, 1.0).item() == pytest.approx(2 * p - 1)  # KL((p, 1-p) || (1-p, p)) = 2p-1
    assert fd_loss(-e, e, e, e).item() == pytest.approx(2)  # (2^2 + 0) / 2 for the images, 0 for the texts
    assert fd_loss(swapped, swapped, e, e).item() == pytest.approx(2)  # (4 - 0 - 0) / D
    # G = [[p-1, 1-p], [1-p, p-1]] for both: teacher's gradient / N is G e, the student's, at twice the scale, differs
    q = 1 / (1 + math.exp(-2))
    assert gd_loss(e, e, e, e, 2.0, 1.0).item() == pytest.approx(2 * ((2 * (1 - q) - (1 - p)) / 2) ** 2)


def test_contrastive_losses_are_log_n_when_all_rows_are_equal():
    same = unit_rows(0, 1).expand(N, D)
    for value in (clip_loss(same, same, 9.0), icl_loss(same, same, same, same, 9.0)):
        assert value.item() == pytest.approx(math.log(N))


# ---- Identities. ----

def test_a_student_equal_to_its_teacher_has_nothing_to_learn(rows):
    _, _, v, s = rows
    assert fd_loss(v, s, v, s) == mfd_loss(v, s, v, s) == gd_loss(v, s, v, s, SCALE_T, SCALE_T) == 0
    assert crd_loss(v, s, v, s, SCALE_T, SCALE_T).item() == pytest.approx(0, abs=1e-14)
    assert icl_loss(v, s, v, s, SCALE_T).item() == pytest.approx(clip_loss(v, s, SCALE_T).item())


def test_afd_is_the_task_loss_when_the_fusion_keeps_just_the_student(rows):
    value = afd_loss(*rows, lambda x: x[:, :D], lambda x: x[:, :D], SCALE_S)
    assert value.item() == pytest.approx(clip_loss(*rows[:2], SCALE_S).item())


def test_crd_ignores_a_rotation_of_the_student_and_fd_does_not(rows):
    v, s, vt, st = rows
    turn = torch.linalg.qr(unit_rows(9, D)).Q
    assert crd_loss(v @ turn, s @ turn, vt, st, 3.0, 7.0).item() == pytest.approx(crd_loss(*rows, 3.0, 7.0).item())
    assert fd_loss(v @ turn, s @ turn, vt, st).item() != pytest.approx(fd_loss(*rows).item(), rel=1e-3)


def test_fd_is_the_mean_cosine_in_another_form(rows):
    v, s, vt, st = rows
    cosines = [(a * b).sum(1).mean().item() for a, b in ((v, vt), (s, st))]
    assert fd_loss(*rows).item() == pytest.approx((4 - 2 * sum(cosines)) / D)


def test_gd_compares_what_autograd_says_of_the_task_loss(rows):
    gradients = []
    for (v, s), scale in ((rows[:2], SCALE_S), (rows[2:], SCALE_T)):
        leaves = [v.clone().requires_grad_(), s.clone().requires_grad_()]
        gradients.append(torch.autograd.grad(clip_loss(*leaves, scale), leaves))
    (vs, ss), (vt, st) = gradients
    assert gd_loss(*rows, SCALE_S, SCALE_T).item() == pytest.approx((F.mse_loss(vs, vt) + F.mse_loss(ss, st)).item())


def test_gd_keeps_no_tensor_larger_than_n_by_n():
    sizes, x = [], [torch.randn(64, 16, requires_grad=True) for _ in range(4)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        gd_loss(*x, torch.tensor(10.0), torch.tensor(10.0)).backward()
    assert max(sizes) == 64 * 64


def test_losses_py_needs_only_torch_and_each_loss_fits_on_a_page():
    tree = ast.parse((ROOT / "losses.py").read_text())
    assert [ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))] == [
        "import torch", "import torch.nn.functional as F"]
    for name in CALLS:
        source = inspect.getsource(getattr(losses, f"{name}_loss"))
        assert len(source.splitlines()) <= 30
        namespace = {"torch": torch, "F": F, "clip_loss": clip_loss, "fd_loss": fd_loss}
        exec(source, namespace)  # it can be copied alone (AFD with clip_loss, MFD with fd_loss)


# ---- Distiller. ----

ALL = dict.fromkeys(clipkd.LOSSES, 1.0)


def small_batch(n=8, dim_t=64, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    tokens = open_clip.get_tokenizer("demo-vit")([f"a {c} {s}" for c, s in zip(clipkd.COLOURS, clipkd.SHAPES)][:n])
    img_t, txt_t = (F.normalize(torch.randn(n, dim_t, generator=draw), dim=1).to(dtype) for _ in range(2))
    return torch.randn(n, 3, 32, 32, generator=draw).to(dtype), tokens, img_t, txt_t, torch.tensor(50.0, dtype=dtype)


def new_distiller(student, lambdas, dim_t=64):
    torch.manual_seed(0)
    model, _, config = clipkd.load_model(student, "--student")
    return Distiller(model, config["embed_dim"], dim_t, lambdas).train()


@pytest.mark.parametrize("student", ["demo-vit", "demo-student"])  # D_s = 48 and 64, D_t = 64
@pytest.mark.parametrize("names", [*clipkd.LOSSES, "all"])
def test_every_loss_alone_and_all_together_decrease_in_training(names, student):
    lambdas = {n: w for n, w in zip(clipkd.LOSSES, (1, 1, 50, 50, 1e3, 1, 1)) if names in (n, "all")}
    distiller, batch = new_distiller(student, lambdas), small_batch()
    optimizer = torch.optim.AdamW(distiller.parameters(), 2e-3)
    history = []
    for step in range(12):
        torch.manual_seed(1)  # the same mask each time
        values = distiller(*batch)
        assert set(values) == set(lambdas)
        total = sum(lambdas[name] * value for name, value in values.items())
        optimizer.zero_grad()
        total.backward()
        assert all(p.grad is not None for p in distiller.parameters() if p.requires_grad)  # what DDP needs
        optimizer.step()
        history.append(total.item())
    assert np.isfinite(history).all() and history[-1] < history[0]


def test_parts_are_built_only_for_losses_that_are_on():
    names = lambda **lambdas: {n.split(".")[0] for n, _ in new_distiller("demo-vit", lambdas).named_parameters()} - {"student"}
    assert names(clip=1, crd=1) == set()
    assert names(fd=1, crd=0) == {"proj_img", "proj_txt"}
    assert names(icl=1) == {"proj_img", "proj_txt", "icl_log_scale"}
    assert names(afd=1) == {"fuse_img", "fuse_txt", "afd_log_scale"}


def test_the_masked_pass_sees_a_quarter_of_the_patches_and_the_others_see_all():
    distiller, (images, *rest) = new_distiller("demo-vit", ALL), small_batch()
    seen = []
    distiller.student.visual.transformer.register_forward_pre_hook(lambda module, x: seen.append(x[0].shape[1]))
    distiller(images, *rest)
    assert seen == [65, 17]  # 64 patches and the class token; 16 and the class token
    conv = new_distiller("demo-student", ALL)
    conv.student.encode_image = lambda x: x
    kept = (conv.encode_masked(torch.ones(3, 3, 28, 28)) > 0).float().mean(dim=(1, 2, 3))
    assert kept.tolist() == [0.25, 0.25, 0.25]


def test_the_teacher_gets_no_gradient_and_the_scales_stay_between_1_and_100():
    teacher, _, _ = clipkd.load_model("demo-teacher", "--teacher")
    images, tokens, *_ = small_batch()
    img_t, txt_t = clipkd.teach(teacher, images, tokens)
    assert not img_t.requires_grad and not txt_t.requires_grad
    distiller = new_distiller("demo-vit", ALL)
    with torch.no_grad():
        distiller.student.logit_scale.fill_(9.0), distiller.icl_log_scale.fill_(-1.0)
    distiller.clamp_scales()
    assert distiller.student.logit_scale.exp().item() == pytest.approx(100) and distiller.icl_log_scale.item() == 0


class KeepFirst(torch.nn.Module):  # PatchDropout without chance: masks are drawn per process
    prob = 0.0

    def forward(self, x):
        return x[:, :10] if self.prob else x


def gradients(rank, world, file):
    """One backward pass of all seven losses on this process's share of the batch; rank 0 saves every gradient."""
    clipkd.RANK, clipkd.WORLD = rank, world
    distiller = new_distiller("demo-vit", ALL).double()
    distiller.student.visual.patch_dropout = KeepFirst()
    model = distiller
    if world > 1:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", init_method=f"file://{file}.init", rank=rank, world_size=world)
        model = torch.nn.parallel.DistributedDataParallel(distiller)
    *batch, scale_t = small_batch(dtype=torch.float64)
    n = 8 // world
    sum(model(*(x[rank * n : (rank + 1) * n] for x in batch), scale_t).values()).backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in distiller.named_parameters()}, file)
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_have_the_gradient_of_one_for_every_parameter_and_loss(world, tmp_path):
    gradients(0, 1, tmp_path / "one")
    torch.multiprocessing.spawn(gradients, (world, tmp_path / "many"), nprocs=world)
    one, many = torch.load(tmp_path / "one"), torch.load(tmp_path / "many")
    assert {"student.logit_scale", "proj_img.bias", "fuse_txt.weight", "icl_log_scale", "afd_log_scale"} <= set(one)
    for name, gradient in one.items():
        assert (many[name] - gradient).abs().max() <= 1e-10 * gradient.abs().max(), name
