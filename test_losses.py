"""Tests of losses.py and clipkd.py: pytest -q test_losses.py (CPU, no network, under 5 minutes on 2 cores).

Expected values come from the paper's equations written as loops, from hand-computed numbers, from identities,
from autograd, or from open_clip; never from a copy of the code under test.
"""

import argparse
import ast
import contextlib
import ctypes
import inspect
import io
import json
import math
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

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
ALL = dict.fromkeys(clipkd.LOSSES, 1.0)
N, D = 5, 4
SCALE_S, SCALE_T = 3.0, 7.0
torch.set_num_threads(1)  # as in the processes that tests start: more threads sum in another order


def unit_rows(seed, n=N, d=D):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, dtype=torch.float64, generator=generator), dim=1)


@pytest.fixture
def rows():
    return [unit_rows(seed) for seed in range(4)]  # img_s, txt_s, img_t, txt_t


def fuse(x):  # stands in for AFD's linear layers
    return x @ torch.linspace(-1, 1, 2 * D * D, dtype=torch.float64).view(2 * D, D)


def students_part(x):
    return x[:, :D]


CALLS = {  # every loss as a function of the four row matrices and the two scales
    "clip": lambda v, s, vt, st, a=SCALE_S, b=SCALE_T: clip_loss(v, s, a),
    "crd": lambda v, s, vt, st, a=SCALE_S, b=SCALE_T: crd_loss(v, s, vt, st, a, b),
    "fd": lambda v, s, vt, st, a=SCALE_S, b=SCALE_T: fd_loss(v, s, vt, st),
    "mfd": lambda v, s, vt, st, a=SCALE_S, b=SCALE_T: mfd_loss(v, s, vt, st),
    "gd": lambda v, s, vt, st, a=SCALE_S, b=SCALE_T: gd_loss(v, s, vt, st, a, b),
    "icl": lambda v, s, vt, st, a=SCALE_S, b=SCALE_T: icl_loss(v, s, vt, st, a),
    "afd": lambda v, s, vt, st, a=SCALE_S, b=SCALE_T: afd_loss(v, s, vt, st, fuse, fuse, a),
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
    if name in ("fd", "mfd"):
        return square_loop(v, vt) + square_loop(s, st)
    if name == "crd":
        return (kl_loop(vt, st, v, s) + kl_loop(st, vt, s, v)) / 2
    if name == "gd":
        both = zip(gradient_loop(v, s, SCALE_S), gradient_loop(vt, st, SCALE_T))
        return sum(square_loop(a, b) for a, b in both)
    if name == "afd":
        fused = [fuse(torch.cat(pair, 1)).tolist() for pair in ((v, vt), (s, st))]
        v, s = ([[x / math.sqrt(dot(row, row)) for x in row] for row in rows] for rows in fused)
    v_keys, s_keys = (vt, st) if name == "icl" else (v, s)
    return (nce_loop(v, s_keys, SCALE_S) + nce_loop(s, v_keys, SCALE_S)) / 2


@pytest.mark.parametrize("name", CALLS)
def test_a_loss_is_its_equation_as_loops_and_its_gradient_a_finite_difference(name, rows):
    assert CALLS[name](*rows).item() == pytest.approx(expected(name, *rows), rel=1e-10)
    scales = [torch.tensor(x, dtype=torch.float64) for x in (SCALE_S, SCALE_T)]
    assert torch.autograd.gradcheck(CALLS[name], [x.clone().requires_grad_() for x in rows + scales])


@pytest.mark.parametrize("name", CALLS)
def test_autocast_and_half_precision_rows_do_not_change_the_precision_inside(name, rows):
    half = [x.bfloat16() for x in rows]
    afd = partial(afd_loss, fuse_img=students_part, fuse_txt=students_part, scale=SCALE_S)
    loss = afd if name == "afd" else CALLS[name]
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*half)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(*(x.double() for x in half)).item(), rel=2e-5)


def test_two_orthonormal_pairs_give_the_values_worked_out_by_hand():
    e, swapped = torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64).flip(0)
    softplus = math.log(1 + math.exp(-1))  # each row's logits are 1 for its own text and 0 for the other
    p = 1 / (1 + math.exp(-1))
    assert clip_loss(e, e, 1.0).item() == pytest.approx(softplus)
    assert icl_loss(swapped, swapped, e, e, 1.0).item() == pytest.approx(softplus + 1)
    kl = 2 * p - 1  # KL((p, 1-p) || (1-p, p))
    assert crd_loss(swapped, e, e, e, 1.0, 1.0).item() == pytest.approx(kl)
    assert fd_loss(-e, e, e, e).item() == pytest.approx(2)  # (2^2 + 0) / 2 for the images, 0 for the texts
    assert fd_loss(swapped, swapped, e, e).item() == pytest.approx(2)  # (4 - 0 - 0) / D
    # dL/dV = scale / N * [[p-1, 1-p], [1-p, p-1]], p = 1/(1+e^-scale): all elements differ by the same amount
    q = 1 / (1 + math.exp(-2))
    assert gd_loss(e, e, e, e, 2.0, 1.0).item() == pytest.approx(2 * ((2 * (1 - q) - (1 - p)) / 2) ** 2)


def test_identities_that_follow_from_the_equations(rows):
    v, s, vt, st = rows
    same, turn = unit_rows(0, 1).expand(N, D), torch.linalg.qr(unit_rows(9, D)).Q
    assert clip_loss(same, same, 9.0).item() == pytest.approx(math.log(N))  # nothing to tell the rows apart
    assert icl_loss(v, s, same, same, 9.0).item() == pytest.approx(math.log(N))
    assert fd_loss(vt, st, vt, st) == mfd_loss(vt, st, vt, st) == gd_loss(vt, st, vt, st, 7.0, 7.0) == 0
    assert abs(crd_loss(vt, st, vt, st, 7.0, 7.0).item()) < 1e-14  # a student equal to its teacher
    assert icl_loss(vt, st, vt, st, 7.0).item() == pytest.approx(clip_loss(vt, st, 7.0).item())
    fused = afd_loss(*rows, students_part, students_part, 3.0)
    assert fused.item() == pytest.approx(clip_loss(v, s, 3.0).item())
    turned = crd_loss(v @ turn, s @ turn, vt, st, 3.0, 7.0)  # CRD does not see the student's axes, FD does
    assert turned.item() == pytest.approx(crd_loss(*rows, 3.0, 7.0).item())
    assert fd_loss(v @ turn, s @ turn, vt, st).item() != pytest.approx(fd_loss(*rows).item(), rel=1e-3)


def test_gd_compares_what_autograd_says_of_the_task_loss(rows):
    gradients = []
    for (v, s), scale in ((rows[:2], SCALE_S), (rows[2:], SCALE_T)):
        leaves = [v.clone().requires_grad_(), s.clone().requires_grad_()]
        gradients.append(torch.autograd.grad(clip_loss(*leaves, scale), leaves))
    (vs, ss), (vt, st) = gradients
    difference = F.mse_loss(vs, vt) + F.mse_loss(ss, st)
    assert gd_loss(*rows, SCALE_S, SCALE_T).item() == pytest.approx(difference.item())


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_gd_makes_no_tensor_larger_than_n_by_n():
    x = [torch.randn(64, 16, requires_grad=True) for _ in range(4)]
    with LargestTensor() as mode:
        gd_loss(*x, torch.tensor(10.0), torch.tensor(10.0)).backward()
    assert mode.numel == 64 * 64


def test_losses_py_needs_only_torch_and_each_loss_fits_on_a_page_and_can_be_copied_alone():
    tree = ast.parse((ROOT / "losses.py").read_text())
    imports = [ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imports == ["import torch", "import torch.nn.functional as F"]
    for name in CALLS:
        loss = getattr(losses, f"{name}_loss")
        assert len(inspect.getsource(loss).splitlines()) <= 30
        needs = {"afd": {"clip_loss"}, "mfd": {"fd_loss"}}.get(name, set())
        assert set(inspect.getclosurevars(loss).globals) <= {"torch", "F"} | needs


@pytest.mark.parametrize("name", ["clip", "crd", "icl", "afd"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_shares_of_eight_processes_average_to_the_whole_loss_and_gradient(name, dtype, tolerance):
    n, d = 64, 16
    fuse = torch.randn(2 * d, d, dtype=dtype, generator=torch.Generator().manual_seed(5))
    inputs = [unit_rows(seed, n, d).to(dtype).requires_grad_() for seed in range(4)]
    inputs += [torch.tensor(scale, dtype=dtype, requires_grad=True) for scale in (14.0, 50.0)]
    v, s, vt, st, a, b = inputs
    value = {
        "clip": lambda rows: clip_loss(v, s, a, rows),
        "crd": lambda rows: crd_loss(v, s, vt, st, a, b, rows),
        "icl": lambda rows: icl_loss(v, s, vt, st, a, rows),
        "afd": lambda rows: afd_loss(v, s, vt, st, lambda x: x @ fuse, lambda x: x @ fuse, a, rows),
    }[name]
    whole, shares = value(slice(None)), sum(value(slice(k, k + 8)) for k in range(0, n, 8)) / 8
    assert shares.item() == pytest.approx(whole.item(), rel=tolerance)
    for x, y in zip(*(torch.autograd.grad(value, inputs, allow_unused=True) for value in (whole, shares))):
        assert x is y or (x - y).abs().max() <= tolerance * x.abs().max()  # both None: not used


# ---- Distiller. ----
def load(spec, seed=0, **options):
    torch.manual_seed(seed)
    return clipkd.OpenClip(str(spec), "--student", **options)


def small_batch(n=8, dim_t=64, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    captions = [f"a {c} {s}" for c, s in zip(clipkd.COLOURS, clipkd.LETTERS)]
    tokens = open_clip.SimpleTokenizer(context_length=20)(captions[:n])
    img_t, txt_t = (F.normalize(torch.randn(n, dim_t, generator=draw), dim=1).to(dtype) for _ in range(2))
    images = torch.randn(n, 3, 32, 32, generator=draw).to(dtype)
    return images, tokens, img_t, txt_t, torch.tensor(50.0, dtype=dtype)


def new_distiller(student, lambdas, dim_t=64, **options):
    model = load(student)
    return Distiller(model.net, model.dim, dim_t, lambdas, **options).train()


@pytest.mark.parametrize("student", ["demo-vit", "demo-student"])  # D_s = 48 and 64, D_t = 64
@pytest.mark.parametrize("names", [*clipkd.LOSSES, "all"])
def test_every_loss_alone_and_all_together_decrease_in_training(names, student):
    lambdas = {n: w for n, w in zip(clipkd.LOSSES, (1, 1, 50, 50, 1e3, 1, 1)) if names in (n, "all")}
    distiller, batch, history = new_distiller(student, lambdas), small_batch(), []
    optimizer = torch.optim.AdamW(distiller.parameters(), 2e-3)
    for _ in range(12):
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
    parts = {"clip": "", "crd": "", "fd": "proj_img proj_txt", "mfd": "proj_img proj_txt"}
    parts |= {"icl": "proj_img proj_txt icl_log_scale", "afd": "fuse_img fuse_txt afd_log_scale"}
    for loss, expected in parts.items():
        distiller = new_distiller("demo-vit", {**dict.fromkeys(ALL, 0), loss: 1})
        names = {name.split(".")[0] for name, _ in distiller.named_parameters()}
        assert names == {"student", *expected.split()}


def test_the_masked_pass_sees_a_quarter_of_the_patches_and_the_others_see_all():
    distiller, (images, *rest) = new_distiller("demo-vit", ALL), small_batch()
    seen, transformer = [], distiller.student.visual.transformer
    transformer.register_forward_pre_hook(lambda module, x: seen.append(x[0].shape[1]))
    distiller(images, *rest)
    assert seen == [65, 17]  # 64 patches and the class token; 16 and the class token
    conv = new_distiller("demo-student", ALL)
    conv.student.encode_image = lambda x: x
    kept = (conv.encode_masked(torch.ones(3, 3, 28, 28)) > 0).float().mean(dim=(1, 2, 3))
    assert kept.tolist() == [0.25, 0.25, 0.25]


def same_noise(n, length, device=None):  # masks without chance: else each process draws its own
    return torch.linspace(0, 1, length, device=device).expand(n, -1)


@pytest.mark.parametrize("student", ["demo-vit", "demo-student"])
def test_masks_are_drawn_by_torch_rand_alone_and_on_the_device_of_the_images(student, monkeypatch):
    distiller, (images, *_), devices = new_distiller(student, ALL), small_batch(), []
    monkeypatch.setattr(torch, "rand", lambda *n, device: devices.append(device) or same_noise(*n, device))
    before = torch.get_rng_state()
    distiller.encode_masked(images)
    assert devices == [images.device] and torch.equal(torch.get_rng_state(), before)


def test_the_teacher_gets_no_gradient_and_the_scales_stay_between_1_and_100():
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    img_t, txt_t, _ = load("demo-teacher").teach(images, small_batch()[1])
    assert not img_t.requires_grad and not txt_t.requires_grad
    distiller = new_distiller("demo-vit", ALL)
    distiller.student.logit_scale.data.fill_(9), distiller.icl_log_scale.data.fill_(-1)
    clipkd.clamp_scales(distiller)
    assert distiller.student.logit_scale.exp().item() == pytest.approx(100)
    assert distiller.icl_log_scale.item() == 0


def in_parts(tokens, k):
    """As Run.batches hands tokens to encode_text."""
    return [(part, int(part.argmax(1).max())) for part in tokens.chunk(k)]


def gradients(rank, world, file):
    """One backward pass of all losses on this process's share of the batch; rank 0 saves every gradient."""
    model = distiller = new_distiller("demo-vit", ALL).double()
    if world > 1:
        torch.set_num_threads(1)
        options = {"init_method": f"file://{file}.init", "rank": rank, "world_size": world}
        torch.distributed.init_process_group("gloo", **options)
        model = torch.nn.parallel.DistributedDataParallel(distiller)
    *batch, scale_t = small_batch(dtype=torch.float64)
    n = 8 // world
    batch = [x[rank * n : (rank + 1) * n] for x in batch]
    batch[1] = in_parts(batch[1], 2)  # the text tower computes no padding
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clipkd, "RANK", rank), patch.setattr(clipkd, "WORLD", world)
        patch.setattr(torch, "rand", same_noise)
        sum(model(*batch, scale_t).values()).backward()
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
    assert {"student.logit_scale", "proj_img.bias", "fuse_txt.weight", "icl_log_scale"} <= set(one)
    for name, gradient in one.items():
        largest = gradient.abs().max()
        assert 0 < largest and (many[name] - gradient).abs().max() <= 1e-10 * largest, name


# ---- Models. ----
def text_tower(folder, **changes):
    config = clipkd.clip_config(
        {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}, 24
    )
    config["text_cfg"] = {
        "context_length": 77,
        "vocab_size": 512,
        "width": 32,
        "heads": 2,
        "layers": 2,
        **changes,
    }
    (folder / "tower.json").write_text(json.dumps(config | {"custom_text": bool(changes)}))
    return load(folder / "tower.json").net.train()


def every_length(context=77):
    """Captions of 2, 3, .. 77 tokens between a start and an end."""
    tokens = torch.zeros(context - 1, context, dtype=torch.long)
    for i, row in enumerate(tokens):
        row[: i + 2] = torch.randint(1, 500, (i + 2,), generator=torch.Generator().manual_seed(i))
        row[0], row[i + 1] = 510, 511
    return tokens


@pytest.mark.parametrize("changes", [{}, {"mlp_ratio": 3}])  # CLIP, and a CustomTextCLIP
@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_text_tower_without_its_padding_has_the_same_bits_and_gradients(changes, k, tmp_path):
    net, tokens, seen = text_tower(tmp_path, **changes), every_length(), []
    text = getattr(net, "text", net)
    hook = text.transformer.resblocks[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[1])
    )
    results = []
    for given in (tokens, in_parts(tokens, k)):
        net.zero_grad()
        rows = clipkd.encode_text(net, given)
        (rows * torch.linspace(-1, 1, rows.numel()).view_as(rows)).sum().backward()
        results.append((rows, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}))
    hook.remove()
    assert seen == [77, *{1: [77], 2: [48, 77], 4: [32, 48, 64, 77]}[k]]
    (a, grads), (b, others) = results
    assert torch.equal(a, net.encode_text(tokens)) and torch.equal(a, b) and len(grads) > 20
    for name, gradient in grads.items():
        assert (others[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("changes", [{"no_causal_mask": True}, {"pool_type": "last"}, {"embed_cls": True}])
def test_a_text_tower_that_could_notice_the_padding_computes_it(changes, tmp_path):
    net, tokens = text_tower(tmp_path, **changes), every_length()
    with torch.no_grad():
        assert torch.equal(clipkd.encode_text(net, in_parts(tokens, 4)), net.encode_text(tokens))


@pytest.mark.parametrize("student", ["demo-vit", "demo-student", "timm"])
def test_checkpointing_changes_no_bit_of_any_gradient(student, tmp_path):
    config = clipkd.clip_config({"timm_model_name": "vit_tiny_patch16_224"}, 64, 32, 2, 1, 20)
    (tmp_path / "timm.json").write_text(json.dumps(config))
    (images, tokens, *rest), results = small_batch(), []
    images = F.interpolate(images, 224) if student == "timm" else images
    for checkpointing in (False, True):
        distiller = new_distiller(tmp_path / "timm.json" if student == "timm" else student, ALL)
        distiller.student.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        sum(distiller(images, in_parts(tokens, 2), *rest).values()).backward()
        results.append({name: p.grad for name, p in distiller.named_parameters()})
    assert equal(*results) and len(results[0]) > 30


def configuration(path, name):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(clipkd.STUDENTS[name]))
    return path


def test_a_tag_gives_a_file_its_pixels_and_activation_and_an_export_has_them(tmp_path, monkeypatch, capsys):
    tag = {"quick_gelu": True, "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bilinear"}
    usual = {"mean": open_clip.OPENAI_DATASET_MEAN}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS})
    monkeypatch.setitem(
        open_clip.pretrained._PRETRAINED, "tiny-4", {"plain": usual, "odd": {"url": "", **tag}}
    )
    open_clip.add_model_config(configuration(tmp_path / "tiny-4.json", "demo-vit"))
    file = tmp_path / "tiny.pt"
    torch.save(load("demo-vit", seed=5).net.state_dict(), file)
    plain = load(f"tiny-4:plain={file}")
    assert capsys.readouterr().err == ""
    odd = load(f"tiny/4:odd={file}", frozen=True)  # the paper writes ViT-B/16
    odd.export(tmp_path / "student")
    again = load(f"local-dir:{tmp_path}/student", frozen=True)
    images, tokens, *_ = small_batch()
    images = (images.clamp(-1, 1) * 127 + 128).to(torch.uint8)
    for model in (odd, again):
        pixels = model.net.visual.preprocess_cfg
        assert [*pixels["mean"], *pixels["std"]] == [0.5] * 3 + [0.25] * 3
        assert pixels["interpolation"] == "bilinear"
        assert type(model.net.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
        assert torch.allclose(model.normalise(images), (images / 255 - 0.5) / 0.25)
    for a, b, c in zip(*(model.teach(images, tokens)[:2] for model in (odd, again, plain))):
        assert torch.equal(a, b) and not torch.allclose(a, c)
    load(f"tiny-4:{file}")
    warning = capsys.readouterr().err
    assert f"tiny-4:{file}: pixels" in warning and f"for those of ['odd'] tiny-4:TAG={file}" in warning
    assert clipkd.find_model("ViT-B-32:LAION2b-s34b-b79k", True)[2]["mean"]  # as open_clip takes it


def test_a_json_named_like_a_built_in_model_does_not_change_that_model(tmp_path):
    before = open_clip.get_model_config("RN50")
    assert load(configuration(tmp_path / "RN50.json", "demo-vit")).dim == 48
    assert open_clip.get_model_config("RN50") == before
    (tmp_path / "bad.json").write_text('{"embed_dim": 5}')
    with pytest.raises(
        BadInput, match="bad.json: cannot be loaded: needs embed_dim, vision_cfg and text_cfg"
    ):
        load(tmp_path / "bad.json")


def test_a_tokenizer_that_can_be_saved_lies_beside_the_export(tmp_path):
    model = load("demo-vit")
    model.tokenizer.save_pretrained = lambda folder: Path(folder, "tokenizer.json").touch()
    (tmp_path / "student").mkdir()
    model.export(tmp_path / "student")
    names = {path.name for path in (tmp_path / "student").iterdir()}
    assert names == {"tokenizer.json", "open_clip_config.json", "open_clip_model.safetensors"}


def test_biases_norms_and_scales_are_not_decayed():
    distiller = new_distiller("demo-vit", ALL)
    names = {id(p): name for name, p in distiller.named_parameters()}
    groups = clipkd.make_optimizer(distiller, 1e-3, 0.1).param_groups
    decayed, plain = ([names[id(p)] for p in group["params"]] for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0] and len(decayed + plain) == len(names)
    assert {"proj_img.weight", "fuse_txt.weight"} <= {*decayed}
    assert all(name.endswith(("weight", "embedding", "proj", "projection")) for name in decayed)
    assert all("ln_" in name or name.endswith(("bias", "scale", "class_embedding")) for name in plain)


def test_betas_follow_the_family_of_the_student_and_not_its_path(tmp_path):
    load("demo-vit").export(tmp_path / "resnet")
    vit, other = (0.9, 0.98, 1e-6), (0.9, 0.999, 1e-8)
    students = {"mobilevit_s": vit, f"local-dir:{tmp_path}/resnet": vit, "swin_tiny": other}
    students |= {configuration(tmp_path / "vit/vit.json", "resnet18"): other, "demo-student": other}
    for spec, expected in students.items():
        distiller = new_distiller(spec, {"clip": 1}, 512)
        optimizer = clipkd.make_optimizer(distiller, 1e-3, 0.1)
        assert (*optimizer.defaults["betas"], optimizer.defaults["eps"]) == expected
        plain = {id(p) for p in optimizer.param_groups[1]["params"]}  # with Swin's biases that are matrices
        assert plain >= {id(p) for name, p in distiller.named_parameters() if "bias" in name}


def test_the_papers_six_students_have_the_sizes_of_its_table_2_and_run():
    millions = {"ViT-T-16": 5.6, "mobilevit_s": 5.3, "swin_tiny": 27.9}  # image towers
    millions |= {"mobilenetv3_small_100": 2.0, "resnet18": 11.4, "efficientnet_b0": 4.7}
    for name, size in millions.items():
        net = load(name).net
        assert sum(p.numel() for p in net.visual.parameters()) / 1e6 == pytest.approx(size, abs=0.11)
        assert net.encode_image(torch.zeros(2, 3, 224, 224)).shape == (2, 512)


# ---- The script. ----
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """24 small JPEGs with a TSV, a folder of class folders, a teacher in each format that --teacher reads."""
    folder = tmp_path_factory.mktemp("world")
    random, lines = np.random.default_rng(0), ["filepath\ttitle"]
    for i in range(24):
        colour, letter = clipkd.COLOURS[i % 4], clipkd.LETTERS[i % 3]
        file = f"{colour} {letter}/{i}.jpg"
        (folder / "classes" / file).parent.mkdir(parents=True, exist_ok=True)
        picture = clipkd.draw(colour, letter, "large", "in the middle", "white", random)
        picture.resize((40, 36)).save(folder / "classes" / file)
        lines.append(f"classes/{file}\ta {colour} {letter}")
    (folder / "pairs.tsv").write_text("\n".join(lines))
    teacher = load("demo-teacher")
    teacher.export(folder / "dir")
    state = teacher.net.state_dict()
    torch.save(state, folder / "bare.pt")
    safetensors.torch.save_file(state, folder / "teacher.safetensors")
    state = {f"module.{key}": value for key, value in state.items()}
    torch.save({"state_dict": state, "epoch": 3}, folder / "wrapped.pt")
    return folder


def flags(world, out, **changes):
    known = {"train-data": world / "pairs.tsv", "student": "demo-vit", "teacher": f"local-dir:{world}/dir"}
    known |= {"out": out, "epochs": 2, "batch-size": 8, "log-every": 1, "workers": 0, "lambda-fd": 250}
    known |= {"eval-every": 0, **{name.replace("_", "-"): value for name, value in changes.items()}}
    used = [f"--{name} {value}" for name, value in known.items() if value is not None]
    return " ".join(used).split()


def read_log(out):  # NaN and Infinity are no JSON
    return [json.loads(line, parse_constant=pytest.fail) for line in open(out / "log.jsonl")]


def totals(log):
    return [line["total"] for line in log if "lr" in line]


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """main() in this process with small settings; keyword arguments replace flags, None drops one."""

    def run(out=tmp_path / "out", **changes):
        monkeypatch.setattr(sys, "argv", ["clipkd.py", *flags(world, out, **changes)])
        clipkd.main()
        return read_log(out)

    return run


signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and the processes below would inherit that


def start(*words, cwd=ROOT, **environment):
    env, pipe = {**os.environ, "OMP_NUM_THREADS": "1", **environment}, subprocess.PIPE
    words = [sys.executable, *map(str, words)]
    return subprocess.Popen(words, cwd=cwd, env=env, text=True, stdout=pipe, stderr=pipe)


SCRIPT = ROOT / "clipkd.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--max-restarts=1", "--nproc_per_node=2", SCRIPT)


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, finish(process)
        time.sleep(0.01)


def hold(folder):
    """As a run that is alive there."""
    return clipkd.Run(argparse.Namespace(out=str(folder)), None, None, None)


def student_weights(out):
    return safetensors.torch.load_file(Path(out) / "student/open_clip_model.safetensors")


def equal(a, b):
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_logs_every_loss_saves_and_ends_with_its_scores(run, world, tmp_path, capsys):
    log = run(zeroshot=f"letters={world}/classes", val_data=f"val={world}/pairs.tsv")
    assert log[0]["args"]["epochs"] == 2 and log[0]["versions"][0] == torch.__version__
    steps = [line for line in log if "lr" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        total = pytest.approx(line["clip"] + line["crd"] + 250 * line["fd"] + line["icl"], rel=1e-5)
        assert line["total"] == total
        assert {"epoch", "scale", "pairs_per_s", "seconds", "data_wait", "skipped"} <= set(line)
    scores, recalls = log[-1]["eval"], {f"{way} R@{k}" for way in ("I2T", "T2I") for k in (1, 5, 10)}
    assert set(scores) == {"letters", "val"} and set(scores["letters"]) == {"top-1"}
    other = {"image CKA", "text CKA", "positive - negative"}  # no cosine: 48 and 64 wide
    assert set(scores["val"]) == recalls | other
    (letters, val), err = map(str.splitlines, capsys.readouterr())
    assert f"clipkd.py: the student is in {tmp_path}/out/student" in err and val.startswith("val: I2T R@1 ")
    assert letters == f"letters: top-1 {scores['letters']['top-1']:.4g}"


@pytest.mark.parametrize("file", ["bare.pt", "wrapped.pt", "teacher.safetensors"])
def test_a_teacher_from_a_file_equals_the_one_from_a_folder(file, world):
    specs = (f"demo-teacher:{world}/{file}", f"local-dir:{world}/dir")
    assert equal(*(load(spec, seed, frozen=True).net.state_dict() for seed, spec in enumerate(specs)))


@pytest.mark.parametrize("name", clipkd.LOSSES)
def test_each_lambda_alone_runs_and_logs_just_its_loss(name, run):
    log = run(**{f"lambda_{n}": float(n == name) for n in clipkd.LOSSES}, epochs=1)
    assert {key for key in log[1] if key in clipkd.LOSSES} == {name}


def interrupted(run, **settings):
    """Run as far as the fourth step; --save-every 2 has saved two."""
    rate = clipkd.lr_at
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(clipkd, "lr_at", lambda step, *rest: rate(step, *rest) if step < 3 else 1 / 0)
        run(**settings, save_every=2)


def test_an_interrupted_run_continues_to_the_weights_of_an_uninterrupted_one(run, tmp_path):
    whole = run(save_every=2, lambda_mfd=1, out=tmp_path / "whole")
    interrupted(run, lambda_mfd=1)
    resumed = run(save_every=2, lambda_mfd=1, workers=1)  # loader processes change nothing either
    assert totals(whole) == totals(resumed) and len(totals(whole)) == 6
    assert equal(student_weights(tmp_path / "whole"), student_weights(tmp_path / "out"))
    before = (tmp_path / "out/log.jsonl").read_text()
    run(save_every=2, lambda_mfd=1)
    assert (tmp_path / "out/log.jsonl").read_text() == before  # a finished run has nothing left to do


@pytest.mark.parametrize(
    "stop, data", [("KILL", "pairs.tsv"), ("TERM", "pairs.tar"), ("HUP", "pairs.tsv"), ("INT", "pairs.tsv")]
)
def test_a_killed_or_terminated_process_loses_nothing_and_frees_its_folder(stop, data, run, world, tmp_path):
    shard(world, world / "pairs.tar")
    settings = {"epochs": 20, "save_every": 5, "eval_every": 10, "val_data": f"val={world}/pairs.tsv"}
    settings["lambda_mfd"], again = 1, tmp_path / "again"
    whole = run(**settings)
    changes = {**settings, "train-data": world / data, "workers": 1}
    process = start(SCRIPT, *flags(world, again, **changes))
    log = again / "log.jsonl"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 8, process)
    with pytest.raises(BadInput, match=f"--out {again}: .*another run is at work there.* give another --out"):
        hold(again)
    process.send_signal(number := signal.Signals[f"SIG{stop}"])
    code, *output = finish(process)
    step = torch.load(again / "checkpoint.pt")["step"]
    assert code == (-9 if stop == "KILL" else 128 + number) and 5 <= step < 60, output
    if stop != "KILL":  # it ends the step, saves and says so
        assert f"saved at step {step}; the same command continues" in output[1] and "Trace" not in output[1]
    resumed = run(**settings, out=again)
    for line in whole + resumed:
        line.update(dict.fromkeys(("seconds", "data_wait", "pairs_per_s")))
    assert whole[1:] == resumed[1:]
    assert equal(student_weights(tmp_path / "out"), student_weights(again))


def test_an_evaluation_on_the_way_changes_nothing_and_a_signal_ends_it_at_once(
    run, world, tmp_path, monkeypatch
):
    sets = {"val_data": f"val={world}/pairs.tsv", "student": "demo-student"}  # which has batch norm
    plain, weights = run(**sets), student_weights(tmp_path / "out")
    scored = run(**sets, eval_every=1, out=tmp_path / "scored")
    assert totals(plain) == totals(scored) and equal(weights, student_weights(tmp_path / "scored"))
    evaluate = clipkd.evaluate
    monkeypatch.setattr(clipkd, "evaluate", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        run(**sets, eval_every=1, out=tmp_path / "cut")
    monkeypatch.setattr(clipkd, "evaluate", evaluate)
    again = run(**sets, eval_every=1, out=tmp_path / "cut")
    assert [line.get("eval") for line in again] == [line.get("eval") for line in scored]


def test_a_second_run_in_a_folder_is_refused_and_a_run_gives_back_folder_signals_and_threads(run, tmp_path):
    first = hold(tmp_path / "out")
    with pytest.raises(BadInput, match=f"--out {tmp_path}/out: .*another run is at work there"):
        run()
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"lock"}
    first.close(), torch.set_num_threads(3)
    handlers = [signal.getsignal(number) for number in clipkd.STOPS]
    assert len(totals(run())) == 6 and torch.get_num_threads() == 3 and len(handlers) == 3
    assert [signal.getsignal(number) for number in clipkd.STOPS] == handlers
    torch.set_num_threads(1), hold(tmp_path / "out").close()


def test_torchrun_restarts_after_a_process_died_and_ends_as_if_nothing_had_happened(run, world, tmp_path):
    whole = run(epochs=20, save_every=5)
    process = start(*TORCHRUN, *flags(world, tmp_path / "two", epochs=20, save_every=5))
    wait_for((tmp_path / "two/checkpoint.pt").exists, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(max(map(int, children)), signal.SIGKILL)
    code, _, output = finish(process)
    assert code == 0 and "exitcode: -9" in output, output
    log = read_log(tmp_path / "two")
    assert [line["step"] for line in log if "lr" in line] == [*range(1, 61)]
    assert totals(log) == pytest.approx(totals(whole), rel=1e-3)


def test_torchrun_with_two_processes_takes_the_same_steps_as_one(run, world, tmp_path):
    # a ViT student: batch norm keeps its statistics per process
    sets = {"zeroshot": world / "classes", "val_data": f"val={world}/pairs.tsv"}
    settings = {"lambda_gd": 1e3, "lambda_afd": 1, **sets}
    one = run(**settings)
    code, _, output = finish(start(*TORCHRUN, *flags(world, tmp_path / "two", **settings)))
    assert code == 0, output
    two = read_log(tmp_path / "two")
    assert totals(two) == pytest.approx(totals(one), rel=1e-4) and len(totals(one)) == 6
    for key, value in one[-1]["eval"]["val"].items():
        if "CKA" in key or "-" in key:
            assert two[-1]["eval"]["val"][key] == pytest.approx(value, rel=1e-3)


def test_loaders_that_are_not_forked_train_and_evaluate_too(world, tmp_path):
    changes = {"workers": 1, "epochs": 1, "zeroshot": world / "classes", "val_data": f"val={world}/pairs.tsv"}
    changes |= {f"lambda_{name}": float(name == "clip") for name in clipkd.LOSSES}
    processes = []
    for method in ("spawn", "forkserver"):
        code = f"import multiprocessing\nmultiprocessing.set_start_method('{method}', force=True)\n"
        (tmp_path / method).mkdir()
        (tmp_path / method / "sitecustomize.py").write_text(code)  # Python runs it first
        words = flags(world, tmp_path / method / "out", **changes)
        processes.append(start(SCRIPT, *words, PYTHONPATH=str(tmp_path / method)))
    for code, out, err in map(finish, processes):
        assert code == 0 and "val: I2T R@1" in out and "Traceback" not in err, err


def test_weights_that_are_not_finite_stop_the_run_and_are_not_saved(run, tmp_path, monkeypatch):
    schedule = clipkd.lr_at
    monkeypatch.setattr(clipkd, "lr_at", lambda step, *rest: math.inf if step == 3 else schedule(step, *rest))
    with pytest.raises(BadInput, match="at step 4 not finite: student.*; try a lower --lr .* is kept"):
        run(save_every=2, log_every=100)
    assert torch.load(tmp_path / "out/checkpoint.pt")["step"] == 2
    assert all(value.isfinite().all() for value in student_weights(tmp_path / "out").values())
    with pytest.raises(BadInput, match="at step 6 not finite"):  # nor before an evaluation
        run(save_every=100, log_every=100, eval_every=2, epochs=3, out=tmp_path / "unsaved")
    assert not (tmp_path / "unsaved/checkpoint.pt").exists()
    monkeypatch.setattr(clipkd, "lr_at", schedule)
    monkeypatch.setattr(clipkd, "fd_loss", lambda *rows: rows[0].sum() * math.nan)
    with pytest.raises(BadInput, match="at step 3 not finite: fd, total; "):
        run(save_every=2)


def test_a_file_is_on_the_disk_before_it_has_its_name_and_stays_if_that_is_full(run, tmp_path, monkeypatch):
    calls, sync, rename, path = [], os.fsync, os.replace, tmp_path / "c.pt"
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(os.fstat(file).st_size), sync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append(new), rename(old, new)))
    clipkd.replace(path, b"12345"), clipkd.replace(path, partial(torch.save, torch.ones(9)))
    assert calls == [5, path, path.stat().st_size, path] and torch.equal(torch.load(path), torch.ones(9))
    Path(f"{path}.tmp").symlink_to("/dev/full")
    with pytest.raises(BadInput, match="c.pt: cannot be written: .*; what it held before is kept"):
        clipkd.replace(path, partial(torch.save, torch.zeros(10**5)))
    assert torch.equal(torch.load(path), torch.ones(9))
    (tmp_path / "out").write_text("a file, no folder")
    with pytest.raises(OSError, match="File exists: .*out"):  # ends with exit code 2, as BadInput
        run()


def test_the_student_folder_opens_with_open_clip_alone_and_gives_the_same_features(run, world, tmp_path):
    run()
    picture, folder = next((world / "classes").glob("*/*.jpg")), f"local-dir:{tmp_path}/out/student"
    code = f"""if True:
        import open_clip, torch
        from PIL import Image
        model, _, preprocess = open_clip.create_model_and_transforms({folder!r})
        tokens = open_clip.get_tokenizer({folder!r})(["a red circle"])
        image = preprocess(Image.open({str(picture)!r}))[None]
        torch.save([model.eval().encode_image(image), model.encode_text(tokens)], "features")"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    student, state = load("demo-vit"), torch.load(tmp_path / "out/checkpoint.pt")["model"]
    student.net.load_state_dict({key: state[f"student.{key}"] for key in student.net.state_dict()})
    image = open_clip.image_transform(32, is_train=False)(Image.open(picture))
    img, txt = torch.load(tmp_path / "features")
    assert torch.equal(img, student.net.encode_image(image[None]))
    assert torch.equal(txt, student.net.encode_text(student.tokenizer(["a red circle"])))


def test_a_widths_mismatch_and_another_image_size_and_context_train_too(run, tmp_path):
    vision = {"image_size": 48, "layers": 1, "width": 64, "patch_size": 16}
    (tmp_path / "tiny.json").write_text(json.dumps(clipkd.clip_config(vision, 40, 32, 2, 1, 12)))
    log = run(student=tmp_path / "tiny.json", lambda_mfd=100, lambda_gd=1, lambda_afd=1)
    assert np.isfinite(totals(log)).all() and len(totals(log)) == 6
    assert open_clip.create_model(f"local-dir:{tmp_path}/out/student").context_length == 12


# ---- Data. ----
def captions(name):
    """What read_pair gives for every row of a file; None for a row that cannot be used."""
    (source,), found = clipkd.sources(str(name)), []
    for row in clipkd.scan(source):
        found.append(None)
        with contextlib.suppress(BadInput):
            found[-1] = clipkd.read_pair(source, row)[1]
    return found


# fmt: off
@pytest.mark.parametrize("content, expected", [
    (b'i,title,filepath\r\n1,"a, ""b""",a.png\r\n2,"lone,a.png\r\n3,c,a.png\r\n', ['a, "b"', '"lone', "c"]),
    ("\ufefffilepath\ttitle\na.png\t5\" disk\na.png\t\"5\na.png\t\n\na.png\t\0\7 é \r\u732b\n".encode(),
     ['5" disk', "5", None, " \7 é  \u732b"]),
    (b"filepath,title\na.png,a dog, running\na.png,a \"b\", c\na.png", ["a dog, running", 'a "b", c', None]),
    (b"title,filepath\na dog, running,a.png\nb,a.png\n", [None, "b"]),
])
# fmt: on
def test_odd_rows_are_read_as_they_are_meant_or_counted_and_lose_no_other(content, expected, tmp_path):
    (tmp_path / "a.csv").write_bytes(content)
    assert captions(tmp_path / "a.csv") == expected


def write_tar(path, members, **kind):
    with tarfile.open(path, "w", **kind) as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size, header.mtime = len(content), 0.5 if kind.get("format") == tarfile.PAX_FORMAT else 0
            tar.addfile(header, io.BytesIO(content))


def shard(world, path, rows=slice(None), **kind):
    """The pairs of world as img2dataset writes them."""
    members = []
    for i, line in enumerate((world / "pairs.tsv").read_text().splitlines()[1:][rows]):
        file, title = line.split("\t")
        parts = {"jpg": (world / file).read_bytes(), "txt": title.encode(), "json": b"{}"}
        members += [(f"{i:05d}.{kind}", content) for kind, content in parts.items()]
    write_tar(path, members, **kind)
    return members


FORMATS = [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]


def test_tars_give_the_batches_and_the_weights_that_a_tsv_gives(run, world, tmp_path):
    (tmp_path / "tars").mkdir()
    for i in range(3):
        shard(world, tmp_path / f"tars/{i:02d}.tar", slice(8 * i, 8 * i + 8), format=FORMATS[i])
    shard(world, tmp_path / "tars/._00.tar", slice(8))  # as macOS may put there
    lines = (world / "pairs.tsv").read_text().replace("classes/", f"{world}/classes/").splitlines(True)
    (tmp_path / "half.tsv").write_text("".join(lines[:9]))
    mixed = [tmp_path / name for name in ("half.tsv", "tars/01.tar", "tars/02.tar")]
    names = (f"{world}/pairs.tsv", f"{tmp_path}/tars", " ".join(map(str, mixed)))
    logs = [totals(run(train_data=name, out=tmp_path / f"run{i}")) for i, name in enumerate(names)]
    assert logs[0] == logs[1] == logs[2] and len(logs[0]) == 6
    weights = [student_weights(tmp_path / f"run{i}") for i in range(3)]
    assert equal(weights[0], weights[1]) and equal(weights[0], weights[2])


def test_a_cut_off_or_damaged_tar_gives_what_is_whole_and_names_itself(world, tmp_path, capsys):
    members = shard(world, tmp_path / "whole.tar")
    whole, titles = (tmp_path / "whole.tar").read_bytes(), [text.decode() for _, text in members[1::3]]
    assert captions(tmp_path / "whole.tar") == titles and capsys.readouterr().err == ""
    ends = np.cumsum([512 + -(-len(content) // 512) * 512 for _, content in members])
    for at in (0, 700, ends[1] - 600, ends[1], ends[30] + 100, ends[31], ends[32] - 512):
        (tmp_path / "cut.tar").write_bytes(whole[:at])
        assert captions(tmp_path / "cut.tar") == [t for t, end in zip(titles, ends[1::3]) if end <= at]
        assert "cut.tar: cut off or damaged" in capsys.readouterr().err or at == 0
    for k in (0, 1, 3, 40):  # a bit of the k-th header
        start = ([0] + ends.tolist())[k]
        flipped = bytes([whole[start + 5] ^ 1])
        (tmp_path / "bad.tar").write_bytes(whole[: start + 5] + flipped + whole[start + 6 :])
        assert captions(tmp_path / "bad.tar") == [t for i, t in enumerate(titles) if i != k // 3]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_dotted_hidden_and_other_names_and_loose_files_in_a_tar_pair_up_or_not(kind, tmp_path):
    key = "deep/" * 30 + "a.b"
    names = f"{key}.PNG x.jpg {key}.txt empty.txt empty.webp c.txt c.jpeg ._c.jpg ._c.txt d/.e.jpg d/.e.txt"
    content = {f"{key}.txt": b"long", "empty.txt": b"", "c.txt": b"c"}
    write_tar(tmp_path / "a.tar", [(name, content.get(name, b"x")) for name in names.split()], format=kind)
    assert captions(tmp_path / "a.tar") == ["long", "c"]


def save_odd_pictures(folder):
    random = np.random.default_rng(0)
    rgb = Image.fromarray(random.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    deep = Image.fromarray(np.full((9, 9), 25700, np.uint16))
    good = {"rgb.jpg": rgb, "grey.png": rgb.convert("L"), "cmyk.jpg": rgb.convert("CMYK"), "webp.webp": rgb}
    good |= {"rgba.png": rgb.convert("RGBA"), "palette.gif": rgb.convert("P"), "one.png": rgb.resize((1, 1))}
    good |= {"thin.png": rgb.resize((900, 1)), "bit.png": rgb.convert("1"), "deep.png": deep}
    for name, picture in good.items():
        picture.save(folder / name)
    rgb.save(folder / "moving.gif", save_all=True, append_images=[rgb.rotate(90)])
    (folder / "cut.jpg").write_bytes((folder / "rgb.jpg").read_bytes()[:500])
    (folder / "text.jpg").write_text("no picture"), (folder / "empty.png").touch()
    Image.new("1", (20000, 20000)).save(folder / "huge.png")  # 50 kB that would unpack to 1.2 GB
    return [*good, "moving.gif"], ["cut.jpg", "text.jpg", "empty.png", "huge.png", "missing.jpg"]


def numbers(captions):
    """A tokenizer: the last number in a caption, which is of one length."""
    return torch.tensor([[int((re.findall(r"\d+", caption) or ["0"])[-1]), -1] for caption in captions])


def new_pairs(folder, lines, size=32, tokenizers=(numbers,)):
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "pairs.tsv").write_text("\n".join(["filepath\ttitle", *lines]))
    return clipkd.Pairs([str(folder / "pairs.tsv")], size, tokenizers, 0, folder)


def test_odd_pictures_are_read_and_broken_ones_give_way_and_are_counted(run, tmp_path):
    good, bad = save_odd_pictures(tmp_path)
    rows = [f"{name}\tpicture {i}" for i, name in enumerate(good + bad + good[:1])]
    data, before = new_pairs(tmp_path, rows), torch.get_rng_state()
    images, (titles,), unread = data[[(0, i) for i in range(len(rows))]]
    assert titles[:, 0].tolist() == [*range(len(good))] + [len(rows) - 1] * 6
    assert unread == sum(range(1, len(bad) + 1))
    assert (images[good.index("deep.png")] == 100).all()  # 25700 of 65535
    assert torch.equal(torch.get_rng_state(), before)  # it draws nothing from the generator of all
    log = run(train_data=tmp_path / "pairs.tsv")
    assert len(totals(log)) == 4 and log[-2]["skipped"] > 0


def mutate(data, random):
    """A cut, random bytes or bit flips; the new bytes, and the first and the last place that may differ."""
    size, start, kind = len(data), int(random.integers(len(data))), random.integers(3)
    end = min(size, start + int(random.integers(1, 1000)))
    if kind == 0:
        return data[:start], start, size
    middle = bytearray(random.bytes(end - start) if kind == 1 else data[start:end])
    for place in random.integers(0, end - start, 5) if kind == 2 else ():
        middle[place] ^= 1 << int(random.integers(8))
    return data[:start] + middle + data[end:], start, end


def mutated_table(world, folder, random):
    """Captions of a TSV with mutated rows, and those that it must still have."""
    header, rows = (world / "pairs.tsv").read_bytes().split(b"\n", 1)
    data, start, end = mutate(rows, random)
    (folder / "m.tsv").write_bytes(header + b"\n" + data)
    lines = re.finditer(rb"[^\t\n]+\t([^\n]+)\n?", rows)
    good = [line[1].decode() for line in lines if line.end() < start or line.start() > end]
    return captions(folder / "m.tsv"), good


def mutated_tar(world, folder, random):
    """The same of a tar."""
    members = shard(world, folder / "m.tar", format=FORMATS[random.integers(2)])
    data, start, end = mutate((folder / "m.tar").read_bytes(), random)
    with tarfile.open(folder / "m.tar") as tar:
        places = [member.offset for member in tar] + [tar.offset]
    (folder / "m.tar").write_bytes(data)
    whole = [i for i in range(0, len(members), 3) if places[i + 2] <= start or places[i] >= end]
    return captions(folder / "m.tar"), [members[i + 1][1].decode() for i in whole]


def mutated_picture(world, folder, random):  # it is read or refused, but neither crashes nor hangs
    pictures = sorted((folder / "pictures").iterdir())
    picture = pictures[random.integers(len(pictures))]  # each small format there is
    (folder / "m").write_bytes(mutate(picture.read_bytes(), random)[0])
    with contextlib.suppress(BadInput):
        assert np.array(clipkd.open_picture(folder / "m")).shape[2] == 3
    return [], []


@pytest.mark.parametrize("mutated", [mutated_table, mutated_tar, mutated_picture])
def test_mutated_files_lose_no_good_pair_and_crash_nothing(mutated, world, tmp_path, capfd, count=150):
    pictures = tmp_path / "pictures"
    pictures.mkdir(), save_odd_pictures(pictures)
    (pictures / "huge.png").unlink(), (pictures / "empty.png").unlink()
    for seed in range(count):
        found, good = mutated(world, tmp_path, np.random.default_rng(seed))
        assert not Counter(good) - Counter(found), seed


def test_a_batch_is_sorted_by_the_length_of_its_captions_and_pictures_stay_with_them(tmp_path):
    for i in range(9):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    lines = [f"{i}.png\t{i}" + " a" * (5 * i % 9) for i in range(9)]  # lengths 0, 5, 1, 6, 2, 7, 3, 8, 4
    tokenizers = [open_clip.SimpleTokenizer(), open_clip.SimpleTokenizer(context_length=20)]
    data = new_pairs(tmp_path, lines, 8, tokenizers)
    images, (long, short), _ = data[[(0, i) for i in range(9)]]
    assert long.argmax(1).tolist() == short.argmax(1).tolist() == [*range(2, 11)]  # start, number, words
    order = [0, 2, 4, 6, 8, 1, 3, 5, 7]
    assert torch.equal(long, tokenizers[0]([lines[i].split("\t")[1] for i in order]))
    assert images[:, 0, 0, 0].tolist() == [20 * i for i in order]


def test_odd_captions_are_tokenised_in_no_time(tmp_path):
    odd = ["a" * 10**6, "\x00\x1b[31m\x7f", "\u732b \U0001f408 \u0642", "same", "same", "\ufffd" * 50, "<a>"]
    data = new_pairs(tmp_path, [f"a.png\t{text}" for text in odd], 8, [open_clip.get_tokenizer("ViT-B-32")])
    start = time.perf_counter()
    images, (tokens,), unread = data[[(0, i) for i in range(len(odd))]]
    assert tokens.shape == (7, 77) and unread == 0 and time.perf_counter() - start < 20


def test_a_loader_is_handed_no_table_and_a_damaged_table_is_made_again(tmp_path):
    lines = ["a.png\ta title"] * 9000
    data = new_pairs(tmp_path, lines)
    whole = data.path.read_bytes()
    assert len(data) == 9000 and len(whole) > 300_000 and len(pickle.dumps(data)) < 2000
    for content in (whole[:1000], b"", b"something else"):
        data.path.unlink()  # not in place: it is mapped
        data.path.write_bytes(content)
        clipkd.table.cache_clear()
        again = clipkd.Pairs([str(tmp_path / "pairs.tsv")], 32, [numbers], 0, tmp_path)
        assert again.path == data.path and data.path.read_bytes() == whole


def test_other_processes_take_the_table_of_process_0_whatever_the_times_of_their_copy(tmp_path, monkeypatch):
    first = new_pairs(tmp_path, ["a.png\ta title"])
    os.utime(tmp_path / "pairs.tsv", (1, 1))
    monkeypatch.setattr(clipkd, "RANK", 1)
    monkeypatch.setattr(clipkd, "from_process_0", lambda value=None: value or first.path)
    second = clipkd.Pairs([str(tmp_path / "pairs.tsv")], 32, [numbers], 0, tmp_path)
    assert second.path == first.path and len(second) == 1 and len([*tmp_path.glob("*.npy")]) == 1


def test_a_thousand_shards_need_no_thousand_open_files(world, tmp_path):
    picture = next(world.glob("classes/*/*.jpg")).read_bytes()
    for i in range(300):
        write_tar(tmp_path / f"{i:04d}.tar", [("a.txt", b"x"), ("a.jpg", picture)])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, hard))
    try:
        data = clipkd.Pairs([str(tmp_path)], 32, [numbers], 0, tmp_path)
        images, _, unread = data[[(0, i) for i in range(300)]]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert images.shape == (300, 3, 32, 32) and unread == 0


# fmt: off
@pytest.mark.parametrize("changes, words", [
    ({"train-data": "{tmp}/columns.csv"}, r"columns.csv: .*filepath and title; found .'path', 'text'.*comma"),
    ({"train-data": "{tmp}/empty.tsv"}, "empty.tsv: no pair of a picture"),
    ({"train-data": "{tmp}/lost.tsv"}, "cannot be read: .*gone.jpg.*; .*relative to"),
    ({"train-data": "{tmp}"}, "{tmp}: no such file; expected .*a folder of .tar"),
    ({"val-data": "{tmp}/bad.json"}, "bad.json: needs columns filepath and title"),
    ({"val-data": "{tmp}/empty.tsv"}, "empty.tsv: no captions in it"),
    ({"val-data": "{tmp}/lost.tsv"}, "gone.jpg: this picture cannot be read"),
    ({"val-data": "{tmp}/row.tsv"}, "row.tsv: 1 instead of 2 cells: no second column"),
    ({"val-data": "a={tmp}/one.tsv a={tmp}/one.tsv"}, "one.tsv: a set is named a already; .*another NAME="),
    ({"zeroshot": "{world}/classes {world}/classes"}, "classes: a set is named .* already; .*another NAME="),
    ({"student": "ViT-T-61"}, "--student ViT-T-61: .*nearest names are .*ViT-T-16"),
    ({"teacher": "ViT-B-61:openai"}, "--teacher ViT-B-61:openai: .*nearest names are .*ViT-B-16"),
    ({"teacher": "ViT-B-16"}, "--teacher ViT-B-16: .*no weights; give .*NAME:TAG, tags: .*laion400m_e32"),
    ({"teacher": "ViT-B-16:laion"}, "--teacher ViT-B-16:laion: .*no weights; .*tags: .*laion400m_e32"),
    ({"teacher": "demo-student:{world}/bare.pt"}, "cannot be loaded: text pos_embed width changed"),
    ({"teacher": "demo-teacher:{tmp}/empty.tsv"}, "--teacher .*empty.tsv: cannot be loaded"),
    ({"batch-size": 25}, "--batch-size 25: more than the 24 pairs"),
    ({"mask-ratio": 1}, r"--mask-ratio 1.0: .*\[0, 1\)"),
    ({"lambda-fd": "nan"}, "--lambda-fd nan: must be a number"),
    ({"lambda-crd": -1}, "--lambda-crd -1.0: must be a number"),
    ({"lambda-icl": "inf"}, "--lambda-icl inf: must be a number"),
    ({"epochs": 0}, "--epochs 0: must be a number"),
    ({f"lambda-{name}": 0 for name in clipkd.LOSSES}, "--lambda-.*: all are 0"),
    ({"student": "{tmp}/columns.csv.json"}, "--student .*columns.csv.json: cannot be loaded: .*No such file"),
    ({"student": "ViT-T-61", "train-data": None}, "--student ViT-T-61: .*unknown model"),  # the demo
    ({"val-data": "nowhere.tsv"}, "nowhere.tsv: no such file"),
    ({"val-data": "x.tsv", "train-data": None}, "--val-data, --zeroshot: need --eval-only or --train-data"),
    ({"train-data": "nowhere.tsv", "teacher": "ViT-B-61"}, "nowhere.tsv: no such file"),
    ({"zeroshot": "nowhere"}, "--zeroshot nowhere: no such folder"),
])
# fmt: on
def test_a_mistake_is_named_before_anything_is_written(changes, words, run, world, tmp_path):
    rows = {"empty": "", "lost": "gone.jpg\tgone", "row": "no second column"}
    for name, row in {**rows, "one": f"{next(world.glob('classes/*/*.jpg'))}\tone"}.items():
        (tmp_path / f"{name}.tsv").write_text(f"filepath\ttitle\n{row}\n")
    (tmp_path / "columns.csv").write_text("path,text\na,b\n")
    (tmp_path / "bad.json").write_text('{"images": [{"id": 1}]}')
    changes = {k: v and str(v).format(tmp=tmp_path, world=world) for k, v in changes.items()}
    with pytest.raises(BadInput, match=words.replace("{tmp}", str(tmp_path))) as error:
        run(**changes)
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.glob("out/*")} <= {"lock", "scans"}


def test_an_unreadable_picture_of_an_evaluation_is_named_and_the_training_is_not_lost(run, world, tmp_path):
    (tmp_path / "classes/a").mkdir(parents=True), (tmp_path / "classes/.cache").mkdir()
    (tmp_path / "classes/a/bad.png").write_text("not a picture")
    (tmp_path / "classes/a/.DS_Store").touch(), (tmp_path / "classes/a/._0.jpg").touch()
    with pytest.raises(BadInput, match="bad.png: this picture cannot be read"):
        run(zeroshot=tmp_path / "classes")
    assert torch.load(tmp_path / "out/checkpoint.pt")["step"] == 6
    (tmp_path / "classes/a/bad.png").write_bytes(next((world / "classes").glob("*/*.jpg")).read_bytes())
    assert run(zeroshot=tmp_path / "classes")[-1]["eval"] == {str(tmp_path / "classes"): {"top-1": 100}}


def test_a_checkpoint_of_another_run_or_cut_off_is_refused_and_kept(run, tmp_path):
    run(epochs=1)
    checkpoint = tmp_path / "out/checkpoint.pt"
    whole = checkpoint.read_bytes()
    with pytest.raises(BadInput, match="is of a run with --student demo-vit, this command has demo-student"):
        run(epochs=1, student="demo-student")
    with pytest.raises(BadInput, match="--seed 0, this command has 1"):
        run(epochs=1, seed=1)
    assert checkpoint.read_bytes() == whole
    reasons = {whole[: len(whole) // 2]: ".*archive", b"": "Ran out of input|EOF", b"something else": ".+"}
    for content, reason in reasons.items():
        checkpoint.write_bytes(content)
        with pytest.raises(BadInput, match=f"t.pt: cannot be read: ({reason}).*; if it is damaged, move"):
            run(epochs=1)
        assert checkpoint.read_bytes() == content
    checkpoint.unlink(), checkpoint.mkdir()
    with pytest.raises(BadInput, match="checkpoint.pt: cannot be read: .*Is a directory"):
        run(epochs=1)


def test_a_run_goes_on_with_its_teacher_from_another_place_but_not_with_another_teacher(run, world, tmp_path):
    whole = run(out=tmp_path / "whole")
    interrupted(run)
    load("demo-teacher", seed=1).export(tmp_path / "dir")
    with pytest.raises(BadInput, match="checkpoint.pt: is of a run with teacher's weights.*; give the same"):
        run(save_every=2, teacher=f"local-dir:{tmp_path}/dir")
    (tmp_path / "moved").symlink_to(world / "dir")
    assert totals(run(save_every=2, teacher=f"local-dir:{tmp_path}/moved")) == totals(whole)


def test_processes_and_gpus_are_checked(monkeypatch):
    monkeypatch.setattr(clipkd, "WORLD", 3)
    with pytest.raises(BadInput, match="--batch-size 1024: .*multiple of 3"):
        clipkd.get_args(["--train-data", "x.tsv"])
    monkeypatch.setattr(clipkd, "LOCAL_WORLD", 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(BadInput, match="2 GPUs for 3 processes: .*--nproc_per_node=2"):
        clipkd.setup()


def test_a_mistake_ends_with_one_line_and_exit_code_2(tmp_path):
    code, out, err = finish(start(SCRIPT, "--train-data", "nowhere.tsv", cwd=tmp_path))
    assert code == 2 and out == "" and not list(tmp_path.iterdir())
    line = "nowhere.tsv: no such file; expected a TSV, a CSV, a .tar or a folder of .tar"
    assert err == f"clipkd.py: error: {line}\n"


def test_importing_clipkd_does_nothing_and_its_cores_are_those_this_process_may_use(tmp_path):
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "import clipkd; print(clipkd.CORES)"
    assert finish(start("-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))) == (0, "1\n", "")
    assert not list(tmp_path.iterdir())


def test_help_names_every_flag_and_each_group_fits_a_terminal_page():
    code, out, err = finish(start(SCRIPT, "--help", COLUMNS="100"))
    assert code == 0 and err == "" and all(len(group.splitlines()) < 24 for group in out.split("\n\n"))
    flags = {f"--{name.replace('_', '-')}" for name in vars(clipkd.get_args([])) if name != "demo"}
    assert set(re.findall(r"^  (--[a-z-]+)", out, re.M)) == flags


def test_without_flags_a_run_is_the_papers_recipe():
    args = clipkd.get_args(["--train-data", "cc3m.tsv", "cc12m.tsv"])
    assert (args.student, args.teacher, args.warmup) == ("ViT-T-16", "ViT-B-16:laion400m_e32", None)
    weights = [getattr(args, f"lambda_{name}") for name in ("clip", "crd", "fd", "icl", "mfd", "gd", "afd")]
    assert weights == [1, 1, 2000, 1, 0, 0, 0]
    assert (args.batch_size, args.epochs, args.lr, args.weight_decay) == (1024, 32, 1e-3, 0.1)
    demo = clipkd.get_args(["--lambda-fd", "7"])
    assert demo.demo and demo.student == "demo-student" and demo.lambda_fd == 7  # what is typed wins


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    rates = [clipkd.lr_at(step, 12, 4, 2.0) for step in range(12)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0] and rates[8] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(1 + math.cos(0.75 * math.pi))
    assert rates[4:] == sorted(rates[4:], reverse=True)


# ---- Evaluation. ----
def test_recalls_count_every_caption_of_an_image():
    img, txt = unit_rows(1, 3, 3), unit_rows(2, 7, 3)
    owner = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    similar = [[dot(v, s) for s in txt] for v in img]
    i2t = [owner[max(range(7), key=lambda j: similar[i][j])].item() == i for i in range(3)]  # noqa: B023
    t2i = [max(range(3), key=lambda i: similar[i][j]) == owner[j].item() for j in range(7)]  # noqa: B023
    assert losses.recalls(img, txt, torch.arange(3), owner)["R@1"] == pytest.approx(100 * sum(i2t) / 3)
    assert losses.recalls(txt, img, owner, torch.arange(3))["R@1"] == pytest.approx(100 * sum(t2i) / 7)
    gap = [(similar[i][j], owner[j].item() == i) for i in range(3) for j in range(7)]
    positive, negative = ([x for x, match in gap if match == wanted] for wanted in (True, False))
    assert losses.pair_gap(img, txt, owner).item() == pytest.approx(np.mean(positive) - np.mean(negative))


def test_linear_cka_is_the_centred_alignment_of_the_gram_matrices_and_ignores_rotations(rows):
    x, y = unit_rows(1, 9, 4), unit_rows(2, 9, 6)
    centre, grams = np.eye(9) - 1 / 9, (np.array([[dot(a, b) for b in z] for a in z]) for z in (x, y))
    k, m = (centre @ gram @ centre for gram in grams)  # [9, 9]
    expected = pytest.approx((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()), rel=1e-6)
    assert losses.linear_cka(x, y).item() == expected == losses.linear_cka(x.float(), y.float()).item()
    turn = torch.linalg.qr(unit_rows(3, 4)).Q
    assert losses.linear_cka(x, 3 * x @ turn).item() == pytest.approx(1)


def test_tsv_csv_and_tar_give_the_same_scores_and_first_captions_their_own(world, tmp_path):
    pictures, model = sorted((world / "classes").glob("*/*.jpg"))[:6], load("demo-vit")
    said = [(i, f"{t}, {clipkd.COLOURS[i]}") for i in range(6) for t in ("a letter", "one, more", 'a "b"')]
    for name, separator in (("tsv", "\t"), ("csv", ",")):
        rows = [("filepath", "title"), *((str(pictures[i]), title) for i, title in said)]
        (tmp_path / f"a.{name}").write_text("\n".join(map(separator.join, rows)))
    members = [(f"{i}.jpg", picture.read_bytes()) for i, picture in enumerate(pictures)]
    write_tar(tmp_path / "a.tar", members + [(f"{i}.txt", said[3 * i][1].encode()) for i in range(6)])
    sets = {name: clipkd.caption_pairs(f"{tmp_path}/a.{name}") for name in ("tsv", "csv", "tar")}
    scores = clipkd.evaluate(model, {}, {**sets, "first": sets["tsv"][::3]}, 0, model)
    assert scores["csv"] == scores["tsv"] and scores["tar"] == scores["first"]
    assert scores["tsv"]["text CKA"] == pytest.approx(1) == scores["tsv"]["image cosine"]
    for way in ("I2T", "T2I"):
        assert scores["tsv"][f"first-caption {way} R@1"] == scores["first"][f"{way} R@1"]


def test_one_picture_with_two_captions_leaves_out_what_it_has_no_number_for(run, world, tmp_path):
    picture = next((world / "classes").glob("*/*.jpg"))
    (tmp_path / "one.tsv").write_text(f"filepath\ttitle\n{picture}\ta red C\n{picture}\tone more\n")
    scores = run(val_data=f"one={tmp_path}/one.tsv", epochs=1)[-1]["eval"]["one"]
    assert scores["T2I R@1"] == 100 and "positive - negative" not in scores and "image CKA" not in scores


def test_an_evaluation_on_two_and_three_processes_gives_the_digits_of_one(world, capsys, monkeypatch):
    words = ["--eval-only", "--student", f"local-dir:{world}/dir", "--val-data", f"val={world}/pairs.tsv"]
    words += ["--zeroshot", f"letters={world}/classes", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", ["clipkd.py", *words])
    clipkd.main()
    one = capsys.readouterr().out
    for processes in (2, 3):
        code, out, err = finish(start(*TORCHRUN[:-1], f"--nproc_per_node={processes}", SCRIPT, *words))
        assert code == 0 and out.endswith(one), err  # before it gloo of torch 2.8 prints its connections
        assert one.count("letters: top-1") == out.count("letters: top-1") == 1


def test_class_folders_named_by_number_or_wnid_are_imagenets_classes(tmp_path):
    wnids = ("subset/n01440764", "subset/n15075141")  # the first and the last class
    for name in (*(f"v2/{i}" for i in range(1000)), *wnids, "ten/0", "ten/9"):
        (tmp_path / name).mkdir(parents=True), (tmp_path / name / "a.jpg").touch()
    labels, pictures, names, templates = clipkd.class_folders(tmp_path / "v2")
    for (path,), label in zip(pictures, labels):
        assert names[label] == open_clip.IMAGENET_CLASSNAMES[int(Path(path).parent.name)]
    assert len(templates) == 80 and len(labels) == 1000
    assert clipkd.class_folders(tmp_path / "subset")[2] == ["tench", "toilet paper"]
    (tmp_path / "subset/n99999999").mkdir()
    with pytest.raises(BadInput, match="--zeroshot .*subset: .*n99999999.*ImageNet's 1000 wnids"):
        clipkd.class_folders(tmp_path / "subset")
    with pytest.raises(BadInput, match="--zeroshot .*ten: .*missing.*ImageNet's 1000 wnids or numbers"):
        clipkd.class_folders(tmp_path / "ten")


def test_zero_shot_top_1_agrees_with_a_classifier_built_by_hand(world):
    model, preprocess, right = load("demo-vit", seed=3), open_clip.image_transform(32, is_train=False), 0
    labels, pictures, names, _ = folder = clipkd.class_folders(world / "classes")
    score = clipkd.evaluate(model, {"x": folder}, {}, 0)["x"]["top-1"]
    with torch.no_grad():
        sentences = model.tokenizer([f"a photo of a {name}" for name in names])
        texts = model.net.encode_text(sentences, normalize=True)
        for (path,), label in zip(pictures, labels):
            row = model.net.encode_image(preprocess(Image.open(path))[None], normalize=True)[0]
            right += max(range(len(names)), key=lambda c, row=row: dot(row, texts[c])) == label
    assert score == pytest.approx(100 * right / len(labels))


def test_the_readmes_example_of_one_loss_runs_and_prints_what_it_says():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    result, out, err = finish(start("-c", code))
    assert result == 0 and out.split() == re.findall(r"# prints (\S+)", code), err


def test_the_readmes_snippet_turns_coco_and_flickr_into_tsvs_of_the_same_pairs(tmp_path):
    said = ["a dog, running", 'the "thing"', '"All" of\tit ']
    coco = {"images": [{"id": 7 * i, "file_name": f"{i}.jpg"} for i in range(3)], "annotations": []}
    coco["annotations"] = [{"image_id": 7 * (k % 3), "id": k, "caption": said[k % 3]} for k in range(6)]
    (tmp_path / "coco_test_karpathy.json").write_text(json.dumps(coco))
    lines = ["image,caption", *(f"{k % 3}.jpg,{said[k % 3]}" for k in range(6))]
    (tmp_path / "flickr30k_test_karpathy.txt").write_text("\n".join(lines))
    code = re.search(r"```python\n(import csv.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    assert len([line for line in code.splitlines() if line]) <= 10
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    for name, folder in (("coco", "val2014"), ("flickr30k", "flickr30k-images")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / folder / "0.jpg")
        pairs = clipkd.caption_pairs(f"{tmp_path}/{name}.tsv")
        assert [caption for _, caption in pairs] == [" ".join(said[k % 3].split()) for k in range(6)]
        assert [path for (path,), _ in pairs] == [f"{tmp_path}/{folder}/{k % 3}.jpg" for k in range(6)]


def test_a_notebook_alone_fetches_the_files_it_needs_and_all_ask_one_address(tmp_path):
    notebooks = [json.loads(file.read_text("utf-8")) for file in ROOT.glob("notebooks/*.ipynb")]
    cells = {"".join(notebook["cells"][1]["source"]) for notebook in notebooks}
    assert len({re.search(r'^REPO = .*', cell, re.M).group() for cell in cells}) == 1
    for cell in cells:
        code = re.sub(r"%pip.*", "pass", re.sub(r'https://[^"]+', ROOT.as_uri(), cell))
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=folder)
        assert {file.name for file in folder.iterdir()} == {"clipkd.py", "losses.py", "matplotlibrc"}


# ---- Benchmarks: `python test_losses.py` prints ratios against named baselines, measured side by side. ----
def gd_expanded(img_s, txt_s, img_t, txt_t, scale_s, scale_t):
    """The baseline: the gradient for the keys as a sum over an N x D x N expansion, each direction alone."""

    def gradients(a, b, scale):
        e = (scale * a @ b.T).softmax(1) - torch.eye(len(a))
        expanded = e.T[:, None].repeat(1, a.shape[1], 1)  # [N, D, N]
        return scale / len(a) * e @ b, scale / len(a) * (expanded * a.T).sum(2)

    i2t = zip(gradients(img_s, txt_s, scale_s), gradients(img_t, txt_t, scale_t))
    t2i = zip(gradients(txt_s, img_s, scale_s), gradients(txt_t, img_t, scale_t))
    return sum(F.mse_loss(a, b) for a, b in (*i2t, *t2i))


def recipe(rows, own):
    v, s, vt, st, a, b = rows
    total = clip_loss(v, s, a, own) + crd_loss(v, s, vt, st, a, b, own) + icl_loss(v, s, vt, st, a, own)
    return total + 2000 * fd_loss(v[own], s[own], vt[own], st[own])


def measure(loss, n, d, repeats, pipe):
    """Median seconds of forward + backward and peak MiB above the inputs, in a process of its own."""
    mmap_threshold, allocator = -3, ctypes.CDLL(None)
    allocator.mallopt(mmap_threshold, 2**18)  # what is freed counts as free

    def run(inputs):
        begin = time.perf_counter()
        loss(inputs).backward()
        return time.perf_counter() - begin

    def inputs(n):
        rows = [F.normalize(torch.randn(n, d), dim=1).requires_grad_(i < 2) for i in range(4)]
        return [*rows, torch.tensor(14.0, requires_grad=True), torch.tensor(50.0)]

    run(inputs(64))  # the libraries' own buffers
    rows = inputs(n)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first, peak = run(rows), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    allocator.mallopt(mmap_threshold, 2**25)
    pipe.send((float(np.median([run(rows) for _ in range(repeats)] or [first])), (peak - start) / 1024))


def kept_for_backward(name, checkpointing, n=4):
    """MiB a pair of what a student's forward pass keeps for its backward pass, float32, 77 tokens."""
    student, sizes = load(name), {}
    student.net.set_grad_checkpointing(checkpointing)
    distiller = Distiller(student.net, student.dim, student.dim, {"clip": 1}).train()
    weights = {p.untyped_storage().data_ptr() for p in distiller.parameters()}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        values = distiller(torch.randn(n, 3, 224, 224), torch.full((n, 77), 49407))
    del values
    return sum(sizes.values()) / n / 2**20


def seconds_a_step(mean_length, n=64, rounds=3):
    """Median seconds of train_step, ViT-B-16 into ViT-T-16, on all tokens and without padding, in turn."""
    student, teacher = load("ViT-T-16"), load("ViT-B-16")
    lambdas, times = dict(zip(("clip", "crd", "fd", "icl"), (1, 1, 2000, 1))), ([], [])
    model = Distiller(student.net, student.dim, teacher.dim, lambdas).train()
    optimizer, random = clipkd.make_optimizer(model, 1e-3, 0.1), np.random.default_rng(0)
    lengths = np.sort((3 + random.gamma(3, (mean_length - 3) / 3, n)).round().clip(3, 77).astype(int))
    tokens = torch.zeros(n, 77, dtype=torch.long)
    for row, length in zip(tokens, lengths):
        row[:length], row[length - 1] = torch.randint(1, 49000, (int(length),)), 49407
    images = torch.randint(256, (n, 3, 224, 224), dtype=torch.uint8)
    k = min(1 + n // 32, len({*(lengths - 1) // 32}))  # as Run.batches
    for _ in range(rounds):
        for spent, given in zip(times, (tokens, in_parts(tokens, k))):
            begin = time.perf_counter()
            clipkd.train_step(model, optimizer, lambdas, student, teacher, images, [given, given])
            spent.append(time.perf_counter() - begin)
    return (*map(np.median, times), lengths.mean())


def benchmark():
    fork = torch.multiprocessing.get_context("fork")

    def cost(loss, n, repeats):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=measure, args=(loss, n, 512, repeats, theirs))
        process.start(), process.join()
        return ours.recv()

    def compare(title, fast, baseline, n, repeats):
        (t, m), (t0, m0) = cost(fast, n, repeats), cost(baseline, n, 0 if "GD" in title else repeats)
        row = f"{t0:.2f} s, {m0:.0f} MiB | {t:.3f} s, {m:.0f} MiB | {t0 / t:.1f}x, {m0 / m:.1f}x"
        print(f"| {title} | {row} |")

    print("| forward + backward, one core, D = 512 | baseline | here | time, memory |\n|---|---|---|---|")
    gd = (lambda x: gd_loss(*x)), (lambda x: gd_expanded(*x))
    compare("GD, N = 1024, against the N x D x N expansion", *gd, 1024, 5)
    for n in (1024, 4096):
        share, whole = (lambda x, n=n: recipe(x, slice(n // 8))), (lambda x: recipe(x, slice(None)))
        compare(f"recipe, N = {n}, one of 8 processes against N x N", share, whole, n, 5)
    seconds, mib = cost(lambda x: recipe(x, slice(4096)), 32768, 0)
    print(f"recipe, N = 32768, one of 8 processes: {seconds:.1f} s, {mib:.0f} MiB")

    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(32):  # smooth noise, about 40 kB as photographs of this size
            noise = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)).resize((512, 384))
            noise = (noise + random.normal(0, 6, (384, 512, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(noise).save(f"{folder}/{i}.jpg", quality=85)
        Path(folder, "x.tsv").write_text("filepath\ttitle\n" + "".join(f"{i}.jpg\tx\n" for i in range(32)))
        data = clipkd.Pairs([f"{folder}/x.tsv"], 224, [numbers], 0, folder)
        theirs = open_clip.image_transform(224, is_train=True)
        times = {"open_clip": [], "here": []}
        for name in [*times] * 9:
            begin = time.process_time()
            for i in range(32):
                data.load(0, i) if name == "here" else theirs(Image.open(f"{folder}/{i}.jpg"))
            times[name].append((time.process_time() - begin) / 32)
    a, b = (np.median(times[name]) for name in ("open_clip", "here"))
    print(f"loading 512 x 384 JPEGs: open_clip {1 / a:.0f} pictures/s a core, here {1 / b:.0f}, {a / b:.2f}x")


    torch.set_num_threads(clipkd.CORES)
    print("| kept for backward, MiB a pair, float32 | plain | --grad-checkpointing |\n|---|---|---|")
    for name in ("ViT-T-16", "ViT-B-16"):
        print(f"| {name} | {kept_for_backward(name, False):.1f} | {kept_for_backward(name, True):.1f} |")
    for mean in (12.6, 27):
        plain, ours, length = seconds_a_step(mean)
        print(f"a step, ViT-B-16 into ViT-T-16, N = 64, captions of {length:.1f} tokens on average:")
        print(f"all 77 tokens {plain:.1f} s, without padding {ours:.1f} s, {plain / ours:.2f}x")


if __name__ == "__main__":
    benchmark()
