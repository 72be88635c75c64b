"""Tests of losses.py and clipkd.py: pytest -q test_losses.py (CPU, no network, three to five minutes on two cores).

Expected values come from the paper's equations written as loops, from hand-computed numbers, from identities, from
autograd, or from open_clip; never from a copy of the code under test.
"""
import ast, ctypes, inspect, io, json, math, os, re, resource, signal, subprocess, sys, tarfile, tempfile, time
from collections import Counter
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
N, D = 5, 4
SCALE_S, SCALE_T = 3.0, 7.0


def unit_rows(seed, n=N, d=D):
    return F.normalize(torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.fixture
def rows():
    return [unit_rows(seed) for seed in range(4)]  # img_s, txt_s, img_t, txt_t


def fuse(x):  # stands in for AFD's linear layers
    return x @ torch.linspace(-1, 1, 2 * D * D, dtype=torch.float64).view(2 * D, D)


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
    fused = [fuse(torch.cat(pair, 1)).tolist() for pair in ((v, vt), (s, st))]  # afd
    v, s = ([[x / math.sqrt(dot(row, row)) for x in row] for row in rows] for rows in fused)
    return (nce_loop(v, s, SCALE_S) + nce_loop(s, v, SCALE_S)) / 2


@pytest.mark.parametrize("name", CALLS)
def test_a_loss_is_its_equation_written_as_loops(name, rows):
    assert CALLS[name](*rows).item() == pytest.approx(expected(name, *rows), rel=1e-10)


@pytest.mark.parametrize("name", CALLS)
def test_the_gradient_of_a_loss_is_its_finite_difference_for_rows_and_scales(name, rows):
    scales = [torch.tensor(x, dtype=torch.float64) for x in (SCALE_S, SCALE_T)]
    assert torch.autograd.gradcheck(CALLS[name], [x.clone().requires_grad_() for x in rows + scales])


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
    # dL/dV = scale / N * [[p-1, 1-p], [1-p, p-1]], p = 1/(1+e^-scale): every element differs by the same amount
    q = 1 / (1 + math.exp(-2))
    assert gd_loss(e, e, e, e, 2.0, 1.0).item() == pytest.approx(2 * ((2 * (1 - q) - (1 - p)) / 2) ** 2)


def test_identities_that_follow_from_the_equations(rows):
    v, s, vt, st = rows
    same, turn = unit_rows(0, 1).expand(N, D), torch.linalg.qr(unit_rows(9, D)).Q
    assert clip_loss(same, same, 9.0).item() == pytest.approx(math.log(N))  # nothing to tell the rows apart
    assert icl_loss(v, s, same, same, 9.0).item() == pytest.approx(math.log(N))
    assert fd_loss(vt, st, vt, st) == mfd_loss(vt, st, vt, st) == gd_loss(vt, st, vt, st, 7.0, 7.0) == 0
    assert crd_loss(vt, st, vt, st, 7.0, 7.0).item() == pytest.approx(0, abs=1e-14)  # a student equal to its teacher
    assert icl_loss(vt, st, vt, st, 7.0).item() == pytest.approx(clip_loss(vt, st, 7.0).item())
    keep_student = afd_loss(*rows, lambda x: x[:, :D], lambda x: x[:, :D], 3.0)
    assert keep_student.item() == pytest.approx(clip_loss(v, s, 3.0).item())
    turned = crd_loss(v @ turn, s @ turn, vt, st, 3.0, 7.0)  # CRD does not see the student's axes, FD does
    assert turned.item() == pytest.approx(crd_loss(*rows, 3.0, 7.0).item())
    assert fd_loss(v @ turn, s @ turn, vt, st).item() != pytest.approx(fd_loss(*rows).item(), rel=1e-3)


def test_gd_compares_what_autograd_says_of_the_task_loss(rows):
    gradients = []
    for (v, s), scale in ((rows[:2], SCALE_S), (rows[2:], SCALE_T)):
        leaves = [v.clone().requires_grad_(), s.clone().requires_grad_()]
        gradients.append(torch.autograd.grad(clip_loss(*leaves, scale), leaves))
    (vs, ss), (vt, st) = gradients
    assert gd_loss(*rows, SCALE_S, SCALE_T).item() == pytest.approx((F.mse_loss(vs, vt) + F.mse_loss(ss, st)).item())


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
    assert [ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))] == [
        "import torch", "import torch.nn.functional as F"]
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

    def value(rows):
        v, s, vt, st, a, b = inputs
        return {"clip": lambda: clip_loss(v, s, a, rows), "crd": lambda: crd_loss(v, s, vt, st, a, b, rows),
                "icl": lambda: icl_loss(v, s, vt, st, a, rows),
                "afd": lambda: afd_loss(v, s, vt, st, lambda x: x @ fuse, lambda x: x @ fuse, a, rows)}[name]()
    whole, shares = value(slice(None)), sum(value(slice(k, k + 8)) for k in range(0, n, 8)) / 8
    assert shares.item() == pytest.approx(whole.item(), rel=tolerance)
    used = [x for x, g in zip(inputs, torch.autograd.grad(whole, inputs, allow_unused=True, retain_graph=True))
            if g is not None]
    for a, b in zip(torch.autograd.grad(whole, used), torch.autograd.grad(shares, used)):
        assert (a - b).abs().max() <= tolerance * a.abs().max()


# ---- Distiller. ----

ALL = dict.fromkeys(clipkd.LOSSES, 1.0)


def small_batch(n=8, dim_t=64, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    tokens = open_clip.get_tokenizer("demo-vit")([f"a {c} {s}" for c, s in zip(clipkd.COLOURS, clipkd.LETTERS)][:n])
    img_t, txt_t = (F.normalize(torch.randn(n, dim_t, generator=draw), dim=1).to(dtype) for _ in range(2))
    return torch.randn(n, 3, 32, 32, generator=draw).to(dtype), tokens, img_t, txt_t, torch.tensor(50.0, dtype=dtype)


def new_distiller(student, lambdas, dim_t=64, **options):
    torch.manual_seed(0)
    model, _, config = clipkd.load_model(student, "--student")
    return Distiller(model, config["embed_dim"], dim_t, lambdas, **options).train()


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
    def names(**lambdas):
        return {name.split(".")[0] for name, _ in new_distiller("demo-vit", lambdas).named_parameters()} - {"student"}
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
        assert 0 < gradient.abs().max() and (many[name] - gradient).abs().max() <= 1e-10 * gradient.abs().max(), name


# ---- TinyCLIP: weight inheritance, affinity mimicking. ----

def tower(folder, name, layers, width, text_layers, text_width, patch=16, size=32):
    """A JSON file of a CLIP whose heads are 16 wide."""
    vision = {"image_size": size, "patch_size": patch, "layers": layers, "width": width, "head_width": 16}
    config = clipkd.clip_config(vision, 32, text_width, text_width // 16, text_layers, 20)
    (folder / f"{name}.json").write_text(json.dumps(config))
    return str(folder / f"{name}.json")


def randomised(spec, seed):  # every tensor: else biases at 0 and norms at 1 would agree by chance
    model = clipkd.load_model(spec, "--student")[0].eval()
    for i, tensor in enumerate(model.state_dict().values()):
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1000 * seed + i))
        tensor.copy_(noise if tensor.is_floating_point() else 100 * noise)  # batch norm counts its batches
    return model


def test_a_student_like_its_teacher_inherits_all_of_it_and_has_its_features():
    teacher, student = randomised("demo-vit", 0), randomised("demo-vit", 1)
    clipkd.inherit(student, teacher)
    assert all(torch.equal(a, b) for a, b in zip(student.state_dict().values(), teacher.state_dict().values()))
    images, tokens, *_ = small_batch()
    assert torch.equal(student.encode_image(images), teacher.encode_image(images))
    assert torch.equal(student.encode_text(tokens), teacher.encode_text(tokens))


def cut(key, shape, source, step):
    """What `key` should hold, picked from the teacher's arrays by layer and channel: the first of each of q, k, v."""
    parts = key.split(".")
    if "resblocks" in parts:
        at = parts.index("resblocks") + 1
        parts[at] = str(int(parts[at]) * step)
    old, indices = source[".".join(parts)], [range(n) for n in shape]
    if "in_proj" in key:
        indices[0] = [len(old) // 3 * third + i for third in range(3) for i in range(shape[0] // 3)]
    return old[np.ix_(*indices)] if shape else old


@pytest.mark.parametrize("student, teacher, step", [
    ("ViT-T-16", "ViT-B-16", 1), ("half", "whole", 2), ("third", "whole", 3)])
def test_every_tensor_of_the_student_is_the_slice_of_the_teachers_that_the_docstring_names(
        student, teacher, step, tmp_path):
    files = {"whole": tower(tmp_path, "whole", 7, 96, 6, 64), "half": tower(tmp_path, "half", 3, 48, 3, 32),
             "third": tower(tmp_path, "third", 2, 96, 2, 64)}
    teacher, student = (randomised(files.get(name, name), seed) for seed, name in enumerate((teacher, student)))
    start = {key: tensor.clone() for key, tensor in student.state_dict().items()}
    clipkd.inherit(student, teacher)
    source = {key: tensor.numpy() for key, tensor in teacher.state_dict().items()}
    for key, tensor in student.state_dict().items():
        assert (tensor == start[key]).double().mean() < 1e-4, key  # nothing stayed random (floats can meet by chance)
        assert np.array_equal(tensor.numpy(), cut(key, tensor.shape, source, step)), key
    size = student.visual.image_size[0]
    assert student.encode_image(torch.randn(2, 3, size, size)).isfinite().all()
    assert student.encode_text(torch.randint(49408, (2, student.context_length))).isfinite().all()


def test_inherited_attention_computes_what_the_teachers_first_heads_compute(tmp_path):
    teacher = clipkd.load_model(tower(tmp_path, "whole", 7, 64, 6, 64), "--teacher")[0].double()
    student = clipkd.load_model(tower(tmp_path, "half", 3, 32, 3, 32), "--student")[0].double()
    torch.nn.init.normal_(teacher.visual.transformer.resblocks[2].attn.in_proj_bias)
    clipkd.inherit(student, teacher)
    new, old = student.visual.transformer.resblocks[1].attn, teacher.visual.transformer.resblocks[2].attn
    old.out_proj.weight.data[:, 32:] = 0  # the other heads have no say
    x = torch.randn(5, 3, 32, dtype=torch.float64)
    wide = F.pad(x, (0, 32))
    expected = old(wide, wide, wide)[0][..., :32]
    assert expected.abs().mean() > 0.01 and torch.allclose(new(x, x, x)[0], expected, rtol=1e-12, atol=1e-14)


def test_a_resnet_inherits_every_second_block_of_a_resnet(tmp_path):
    for name, layers, width, text in (("whole", [3, 4, 6, 3], 12, 64), ("half", [1, 2, 3, 1], 8, 32)):
        config = clipkd.clip_config({"image_size": 32, "layers": layers, "width": width}, 64, text, text // 32, 1, 20)
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    teacher, student = (randomised(str(tmp_path / f"{name}.json"), i) for i, name in enumerate(("whole", "half")))
    clipkd.inherit(student, teacher)
    source = teacher.state_dict()
    for key, tensor in student.state_dict().items():
        if "in_proj" not in key:
            stage = re.match(r"visual.layer(\d).(\d).", key)
            step = [None, 3, 2, 2, 3][int(stage[1])] if stage else 0
            name = f"visual.layer{stage[1]}.{int(stage[2]) * step}.{key[stage.end():]}" if stage else key
            assert torch.equal(tensor, source[name][tuple(slice(n) for n in tensor.shape)]), key


def refusal(folder, student, teacher):
    models = []
    for name, (vision, text) in (("student", student), ("teacher", teacher)):
        config = clipkd.clip_config({"image_size": 32, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16}
                                    | vision, 32, 32, 2, 2, 20)
        config["text_cfg"] |= text
        config |= {"quick_gelu": True} if vision.get("layers") == 4 else {}
        (folder / f"{name}.json").write_text(json.dumps(config))
        models.append(clipkd.load_model(str(folder / f"{name}.json"), "--student")[0])
    with pytest.raises(BadInput) as error:
        clipkd.inherit(*models)
    return str(error.value)


@pytest.mark.parametrize("student, teacher, words", [
    ({"patch_size": 8}, {}, "visual.conv1.weight: [32, 3, 8, 8] in the student, [32, 3, 16, 16] in the teacher"),
    ({"image_size": 48}, {}, "visual.positional_embedding: [10, 32] in the student, [5, 32] in the teacher"),
    ({"layers": 3}, {}, "visual.transformer.resblocks.number of parts: 3 in the student, 2 in the teacher"),
    ({"width": 64}, {}, "visual.conv1.weight: [64, 3, 16, 16] in the student, [32, 3, 16, 16] in the teacher"),
    ({"head_width": 8}, {}, "visual.transformer.resblocks.0.attn.width of a head: 8 in the student, 16 in the teacher"),
    ({}, {"layers": 4}, "visual.transformer.resblocks.0.mlp.gelu.class: GELU in the student, QuickGELU in the teacher"),
    ({}, {"pool_type": "avg"}, "visual.pool_type: tok in the student, avg in the teacher"),
    ({}, {"ls_init_value": 1e-4}, "visual.transformer.resblocks.0.ls_1.class: Identity in the student, LayerScale in"),
    ({"no_ln_pre": True}, {}, "visual.ln_pre.class: Identity in the student, LayerNorm in the teacher"),
])
def test_the_first_thing_that_cannot_be_inherited_is_named(student, teacher, words, tmp_path):
    assert refusal(tmp_path, (student, {}), (teacher, {})).startswith(f"--inherit: {words}")


def test_text_towers_and_timm_models_that_compute_something_else_are_refused(tmp_path):
    assert "text_pool_type: argmax in the student, last in" in refusal(tmp_path, ({}, {}), ({}, {"pool_type": "last"}))
    assert "tensors: " in refusal(tmp_path, ({}, {}), ({}, {"no_causal_mask": True}))
    with pytest.raises(BadInput, match="visual.class: TimmModel in the student, TimmModel in the teacher"):
        clipkd.inherit(*(clipkd.load_model("mobilevit_s", "--student")[0] for _ in range(2)))


def test_crd_at_fixed_scales_has_the_gradient_of_tinyclips_cross_entropy(rows):
    *teacher, scale = *rows[2:], torch.tensor(50.0, dtype=torch.float64)
    ours, theirs = ([row.clone().requires_grad_() for row in rows[:2]] for _ in range(2))
    crd_loss(*ours, *teacher, scale, scale).backward()
    affinity = 0  # TinyCLIP: cross-entropy with the teacher's softmax as soft labels, mean of the two directions
    for (v, s), (v_t, s_t) in ((theirs, teacher), (theirs[::-1], teacher[::-1])):
        for k in range(N):
            exp_s, exp_t = ([(50 * x[k] @ y[j]).exp() for j in range(N)] for x, y in ((v, s), (v_t, s_t)))
            affinity -= sum(exp_t[j] / sum(exp_t) * (exp_s[j] / sum(exp_s)).log() for j in range(N)) / N / 2
    affinity.backward()
    for a, b in zip(ours, theirs):
        assert b.grad.abs().max() > 0.1 and (a.grad - b.grad).abs().max() < 1e-10 * b.grad.abs().max()


def test_a_fixed_crd_scale_is_used_for_both_sides_and_leaves_the_learned_scale_alone():
    teacher = small_batch()
    distiller = new_distiller("demo-vit", {"crd": 1}, crd_scale=50.0)
    with torch.no_grad():
        v, s = (F.normalize(x, dim=1) for x in (distiller.student.encode_image(teacher[0]),
                                                distiller.student.encode_text(teacher[1])))
        assert torch.equal(distiller(*teacher)["crd"], crd_loss(v, s, *teacher[2:4], 50.0, 50.0))
    assert not distiller.student.logit_scale.requires_grad
    assert new_distiller("demo-vit", {"crd": 1, "clip": 1}, crd_scale=50.0).student.logit_scale.requires_grad


# ---- The script. ----

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """24 small JPEGs with a TSV, a folder of class folders, and a teacher in each format that --teacher reads."""
    folder = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    lines = ["filepath\ttitle"]
    for i in range(24):
        colour, letter = clipkd.COLOURS[i % 4], clipkd.LETTERS[i % 3]
        file = f"{colour} {letter}/{i}.jpg"
        (folder / "classes" / file).parent.mkdir(parents=True, exist_ok=True)
        picture = clipkd.draw(colour, letter, "large", "in the middle", "white", random)
        picture.resize((40, 36)).save(folder / "classes" / file)
        lines.append(f"classes/{file}\ta {colour} {letter}")
    (folder / "pairs.tsv").write_text("\n".join(lines))
    teacher, _, config = clipkd.load_model("demo-teacher", "--teacher")
    clipkd.export(teacher, config, folder / "dir")
    state = teacher.state_dict()
    torch.save(state, folder / "bare.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, folder / "wrapped.pt")
    safetensors.torch.save_file(state, folder / "teacher.safetensors")
    return folder


def flags(world, out, **changes):
    known = {"train-data": world / "pairs.tsv", "student": "demo-vit", "teacher": f"local-dir:{world}/dir", "out": out,
             "epochs": 2, "batch-size": 8, "log-every": 1, "workers": 0, "lambda-fd": 250, "eval-every": 0} | changes
    return [word for name, value in known.items() if value is not None for word in (f"--{name}", *str(value).split())]


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """main() in this process with small settings; keyword arguments replace flags, None drops one."""
    def run(**changes):
        changes = {name.replace("_", "-"): value for name, value in changes.items()}
        out = changes.pop("out", tmp_path / "out")
        monkeypatch.setattr(sys, "argv", ["clipkd.py", *flags(world, out, **changes)])
        clipkd.main()
        return [json.loads(line) for line in open(out / "log.jsonl")]
    return run


def student_weights(out):
    return safetensors.torch.load_file(Path(out) / "student/open_clip_model.safetensors")


def test_a_run_logs_every_loss_saves_and_ends_with_its_scores(run, world, tmp_path, capsys):
    log = run(zeroshot=f"letters={world}/classes", val_data=f"val={world}/pairs.tsv")
    assert log[0]["args"]["epochs"] == 2 and log[0]["torch"] == torch.__version__
    steps = [line for line in log if "lr" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        assert line["total"] == pytest.approx(line["clip"] + line["crd"] + 250 * line["fd"] + line["icl"], rel=1e-5)
        assert {"epoch", "scale", "pairs_per_s", "seconds", "data_wait", "skipped"} <= set(line)
    scores = log[-1]["eval"]
    assert set(scores) == {"letters", "val"} and set(scores["letters"]) == {"top-1"}
    assert set(scores["val"]) == {*(f"{way} R@{k}" for way in ("I2T", "T2I") for k in (1, 5, 10)), "image CKA",
                                  "text CKA", "positive - negative"}  # no cosine: 48 and 64 wide
    *_, where, letters, val = capsys.readouterr().out.splitlines()
    assert where == f"the student is in {tmp_path}/out/student" and val.startswith("val: I2T R@1 ")
    assert letters == f"letters: top-1 {scores['letters']['top-1']:.4g}"


@pytest.mark.parametrize("file", ["bare.pt", "wrapped.pt", "teacher.safetensors"])
def test_a_teacher_from_a_file_equals_the_one_from_a_folder(file, world):
    a, *_ = clipkd.load_model(f"demo-teacher:{world}/{file}", "--teacher", need_weights=True)
    b, *_ = clipkd.load_model(f"local-dir:{world}/dir", "--teacher", need_weights=True)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("name", clipkd.LOSSES)
def test_each_lambda_alone_runs_and_logs_just_its_loss(name, run):
    log = run(**{f"lambda_{n}": float(n == name) for n in clipkd.LOSSES}, epochs=1)
    assert {key for key in log[1] if key in clipkd.LOSSES} == {name}


def interrupted(run, **settings):
    """Run as far as the fourth step; --save-every 2 has saved two."""
    def stop_at_step_3(step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        return schedule(step, *rest)
    schedule = clipkd.lr_at
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(clipkd, "lr_at", stop_at_step_3)
        run(**settings, save_every=2)


def test_an_interrupted_run_continues_to_the_weights_of_an_uninterrupted_one(run, tmp_path):
    whole = run(save_every=2, lambda_mfd=1)
    weights = student_weights(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "whole")
    interrupted(run, lambda_mfd=1)
    resumed = run(save_every=2, lambda_mfd=1, workers=1)  # loader processes change nothing either
    assert [(x["step"], x["total"]) for x in whole[1:-1]] == [(x["step"], x["total"]) for x in resumed[1:-1]]
    assert all(torch.equal(weights[key], value) for key, value in student_weights(tmp_path / "out").items())
    before = (tmp_path / "out/log.jsonl").read_text()
    run(save_every=2, lambda_mfd=1)
    assert (tmp_path / "out/log.jsonl").read_text() == before  # a finished run has nothing left to do


def test_an_inherited_run_starts_as_the_teacher_and_a_resumed_one_inherits_no_second_time(run, tmp_path):
    teacher, _, config = clipkd.load_model("demo-vit", "--teacher")
    teacher.visual.preprocess_cfg |= {"mean": [0.5] * 3, "std": [0.5] * 3}  # its first layer expects these
    clipkd.export(teacher, config, tmp_path / "teacher")
    settings = {"inherit": "", "teacher": f"local-dir:{tmp_path}/teacher"}
    whole = run(**settings, out=tmp_path / "whole")
    assert whole[1]["crd"] == pytest.approx(0, abs=1e-6) and whole[1]["fd"] == pytest.approx(0, abs=1e-6)
    assert whole[-2]["crd"] > 1e-6
    interrupted(run, **settings)
    resumed, weights = run(**settings, save_every=2), student_weights(tmp_path / "whole")
    assert [(x["step"], x["total"]) for x in whole[1:-1]] == [(x["step"], x["total"]) for x in resumed[1:-1]]
    assert all(torch.equal(weights[key], value) for key, value in student_weights(tmp_path / "out").items())
    task = run(**settings, **{f"lambda-{n}": 0 for n in ("crd", "fd", "icl")}, out=tmp_path / "task")  # no distillation
    assert task[1]["clip"] == whole[1]["clip"] and "crd" not in task[1]


def test_tinyclip_is_inheritance_and_crd_alone_at_a_scale_that_the_student_keeps(run, tmp_path):
    teacher, _, config = clipkd.load_model("demo-vit", "--teacher")
    teacher.logit_scale.data.fill_(math.log(80))
    clipkd.export(teacher, config, tmp_path / "teacher")
    log = run(**{"inherit": "", "teacher": f"local-dir:{tmp_path}/teacher", "crd-scale": 50},
              **{f"lambda-{name}": 0 for name in ("clip", "fd", "icl")})
    assert log[1]["crd"] == pytest.approx(0, abs=1e-6) and "clip" not in log[1]
    assert student_weights(tmp_path / "out")["logit_scale"].exp().item() == pytest.approx(50)
    assert log[-2]["scale"] == pytest.approx(50)


def start(*words):
    return subprocess.Popen([*map(str, words)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


@pytest.mark.parametrize("stop, data, code", [(signal.SIGKILL, "pairs.tsv", -9), (signal.SIGTERM, "pairs.tar", 143)])
def test_a_killed_or_terminated_process_loses_nothing(stop, data, code, run, world, tmp_path):
    shard(world, world / "pairs.tar")
    settings = {"epochs": 20, "save-every": 5, "eval-every": 10, "val-data": f"val={world}/pairs.tsv", "lambda-mfd": 1}
    whole, weights = run(**settings), student_weights(tmp_path / "out")
    log = tmp_path / "again/log.jsonl"
    process = start(sys.executable, ROOT / "clipkd.py", *flags(world, tmp_path / "again", **settings, **{
        "train-data": world / data, "workers": 1}))
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 8, process)
    process.send_signal(stop)
    output = process.communicate(timeout=120)[0]
    step = torch.load(tmp_path / "again/checkpoint.pt")["step"]
    assert process.returncode == code and 5 <= step < 60, output
    if stop == signal.SIGTERM:  # it ends the step, saves and says so
        assert f"saved at step {step}; the same command continues" in output
    resumed = run(**settings, out=tmp_path / "again")

    def timeless(lines):
        return [{k: v for k, v in x.items() if k not in ("seconds", "data_wait", "pairs_per_s")} for x in lines[1:]]
    assert timeless(whole) == timeless(resumed)
    assert all(torch.equal(weights[key], value) for key, value in student_weights(tmp_path / "again").items())


def test_torchrun_restarts_after_a_process_died_and_ends_as_if_nothing_had_happened(run, world, tmp_path):
    settings = {"epochs": 20, "save-every": 5}
    whole = run(**settings)
    process = start(*TORCHRUN[:-1], "--max-restarts=1", TORCHRUN[-1], *flags(world, tmp_path / "two", **settings))
    wait_for((tmp_path / "two/checkpoint.pt").exists, process)
    children = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and (p / "stat").exists()
                and (p / "stat").read_text().rpartition(")")[2].split()[1] == str(process.pid)]
    os.kill(max(children), signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "exitcode: -9" in output, output
    log = [json.loads(line) for line in open(tmp_path / "two/log.jsonl")]
    assert [x["step"] for x in log if "lr" in x] == [*range(1, 61)]
    assert [x["total"] for x in log if "lr" in x] == pytest.approx([x["total"] for x in whole if "lr" in x], rel=1e-3)


def test_weights_that_are_not_finite_stop_the_run_and_are_not_saved(run, tmp_path, monkeypatch):
    schedule = clipkd.lr_at
    monkeypatch.setattr(clipkd, "lr_at", lambda step, *rest: math.inf if step == 3 else schedule(step, *rest))
    with pytest.raises(BadInput, match="at step 4 not finite: student.*out holds step 2. Try a lower --lr"):
        run(save_every=2, log_every=100)
    assert torch.load(tmp_path / "out/checkpoint.pt")["step"] == 2
    assert all(value.isfinite().all() for value in student_weights(tmp_path / "out").values())
    monkeypatch.setattr(clipkd, "lr_at", schedule)
    monkeypatch.setattr(clipkd, "fd_loss", lambda *rows: rows[0].sum() * math.nan)
    with pytest.raises(BadInput, match="at step 3 not finite: fd; "):
        run(save_every=2)


def test_a_full_disk_or_an_unwritable_folder_is_named_and_the_last_file_stays(run, tmp_path):
    old = {"x": torch.ones(9)}
    clipkd.replace(tmp_path / "c.pt", lambda file: torch.save(old, file))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # longer files fail, as on a full disk
    try:
        with pytest.raises(BadInput, match="c.pt: cannot be written: .*; what it held before is kept"):
            clipkd.replace(tmp_path / "c.pt", lambda file: torch.save(torch.zeros(10**5), file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.equal(torch.load(tmp_path / "c.pt")["x"], old["x"])
    (tmp_path / "out").write_text("a file, no folder")
    with pytest.raises(BadInput, match="out/scans/.*: cannot be written: .*Not a directory"):
        run()


def test_the_student_folder_opens_with_open_clip_alone_and_gives_the_same_features(run, world, tmp_path):
    run()
    picture = next((world / "classes").glob("*/*.jpg"))
    code = f"""if True:
        import open_clip, torch
        from PIL import Image
        model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{tmp_path}/out/student")
        tokens = open_clip.get_tokenizer("local-dir:{tmp_path}/out/student")(["a red circle"])
        image = preprocess(Image.open({str(picture)!r}))[None]
        torch.save([model.eval().encode_image(image), model.encode_text(tokens)], {str(tmp_path / 'features')!r})"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    student, tokenizer, _ = clipkd.load_model("demo-vit", "--student")
    state = torch.load(tmp_path / "out/checkpoint.pt")["model"]
    student.load_state_dict({k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")})
    student.eval()
    image = clipkd.image_transform_v2(clipkd.PreprocessCfg(size=32), is_train=False)(Image.open(picture))
    img, txt = torch.load(tmp_path / "features")
    assert torch.equal(img, student.encode_image(image[None]))
    assert torch.equal(txt, student.encode_text(tokenizer(["a red circle"])))


def command(*words, cwd=ROOT, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=cwd, env=env, timeout=300)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", ROOT / "clipkd.py")


def test_torchrun_with_two_processes_takes_the_same_steps_as_one(run, world, tmp_path):
    # a ViT student: batch norm keeps its statistics per process
    one = run(lambda_gd=1e3, lambda_afd=1, zeroshot=world / "classes", val_data=world / "pairs.tsv")
    two = command(*TORCHRUN, *flags(world, tmp_path / "two", zeroshot=world / "classes", **{
        "lambda-gd": 1e3, "lambda-afd": 1, "val-data": world / "pairs.tsv"}))
    assert two.returncode == 0, two.stderr
    log = [json.loads(line) for line in open(tmp_path / "two/log.jsonl")]
    assert [x["total"] for x in log if "lr" in x] == pytest.approx([x["total"] for x in one if "lr" in x], rel=1e-4)
    for key, value in one[-1]["eval"][f"{world}/pairs.tsv"].items():
        if "CKA" in key or "-" in key:
            assert log[-1]["eval"][f"{world}/pairs.tsv"][key] == pytest.approx(value, rel=1e-3)


def test_a_widths_mismatch_and_another_image_size_and_context_train_too(run, world, tmp_path):
    config = clipkd.clip_config({"image_size": 48, "layers": 1, "width": 64, "patch_size": 16}, 40, 32, 2, 1, 12)
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    log = run(student=tmp_path / "tiny.json", lambda_mfd=100, lambda_gd=1, lambda_afd=1)  # 40 -> 64, 48 px, 12 tokens
    assert all(np.isfinite(line["total"]) for line in log[1:-1])
    assert open_clip.create_model(f"local-dir:{tmp_path}/out/student").context_length == 12


def test_a_picture_that_cannot_be_decoded_gives_way_to_the_next_one(run, world, tmp_path):
    good = (world / "pairs.tsv").read_text().replace("classes/", f"{world}/classes/")
    (tmp_path / "broken.jpg").write_bytes(next((world / "classes").glob("*/*.jpg")).read_bytes()[:300])
    (tmp_path / "pairs.tsv").write_text(good + "\nbroken.jpg\ta broken picture\n")
    log = run(train_data=tmp_path / "pairs.tsv", epochs=8)
    assert len(log) == 8 * 3 + 2 and log[-2]["skipped"] > 0


def captions(*names):
    """What read_pair gives for every row of these files; None for a row that cannot be used."""
    def read(source, row):
        try:
            return clipkd.read_pair(source, row)[1]
        except (KeyError, ValueError):
            return None
    return [read(source, row) for name in names for source in clipkd.sources(str(name)) for row in clipkd.scan(source)]


def test_pairs_can_be_quoted_crlf_csv_with_other_columns_and_stray_quotes_lose_no_row(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'id,title,filepath\r\n1,"a, ""b""",a.png\r\n2,"lonely,a.png\r\n3,c,a.png\r\n')
    rows = 'filepath\ttitle\na.png\t5" disk\na.png\t"5\na.png\t\n\na.png\t\x00\x07 é \r\u732b\n'
    (tmp_path / "b.tsv").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    assert captions(tmp_path / "a.csv", tmp_path / "b.tsv") == [
        'a, "b"', '"lonely', "c", '5" disk', "5", None, " \x07 é  \u732b"]


def write_tar(path, members, **kind):
    with tarfile.open(path, "w", **kind) as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size, header.mtime = len(content), 0.5 if kind.get("format") == tarfile.PAX_FORMAT else 0
            tar.addfile(header, io.BytesIO(content))


def shard(world, path, rows=slice(None), **kind):
    """The pairs of world as img2dataset writes them."""
    lines = (world / "pairs.tsv").read_text().splitlines()[1:][rows]
    members = []
    for i, (file, title) in enumerate(line.split("\t") for line in lines):
        members += [(f"{i:05d}.jpg", (world / file).read_bytes()), (f"{i:05d}.txt", title.encode()),
                    (f"{i:05d}.json", b"{}")]
    write_tar(path, members, **kind)
    return members


def test_tars_give_the_batches_and_the_weights_that_a_tsv_gives(run, world, tmp_path):
    (tmp_path / "tars").mkdir()
    for i in range(3):
        shard(world, tmp_path / f"tars/{i:02d}.tar", slice(8 * i, 8 * i + 8), format=[tarfile.USTAR_FORMAT,
              tarfile.PAX_FORMAT, tarfile.GNU_FORMAT][i])
    (tmp_path / "half.tsv").write_text("".join((world / "pairs.tsv").read_text().replace(
        "classes/", f"{world}/classes/").splitlines(True)[:9]))
    logs, weights = [], []
    for files in ("pairs.tsv", f"{tmp_path}/tars", f"{tmp_path}/half.tsv {tmp_path}/tars/{{01..02}}.tar"):
        logs.append([line["total"] for line in run(train_data=" ".join(str(world / f) for f in files.split()))[1:-1]])
        weights.append(student_weights(tmp_path / "out"))
        (tmp_path / "out").rename(tmp_path / f"run{len(logs)}")
    assert logs[0] == logs[1] == logs[2]
    assert all(torch.equal(weights[0][key], other[key]) for other in weights[1:] for key in other)


def test_a_cut_off_or_damaged_tar_gives_what_is_whole_and_names_itself(world, tmp_path, capsys):
    members = shard(world, tmp_path / "whole.tar")
    whole, titles = (tmp_path / "whole.tar").read_bytes(), [content.decode() for name, content in members[1::3]]
    assert captions(tmp_path / "whole.tar") == titles and capsys.readouterr().err == ""
    ends = np.cumsum([512 + -(-len(content) // 512) * 512 for _, content in members])
    for at in (0, 700, ends[1] - 600, ends[1], ends[30] + 100, ends[31], ends[32] - 512):
        (tmp_path / "cut.tar").write_bytes(whole[:at])
        assert captions(tmp_path / "cut.tar") == [t for t, end in zip(titles, ends[1::3]) if end <= at]
        assert "cut.tar: cut off or damaged" in capsys.readouterr().err or at == 0
    for k in (0, 1, 3, 40):  # a bit of the k-th header
        start = ([0] + ends.tolist())[k]
        (tmp_path / "bad.tar").write_bytes(whole[:start + 5] + bytes([whole[start + 5] ^ 1]) + whole[start + 6 :])
        assert captions(tmp_path / "bad.tar") == [t for i, t in enumerate(titles) if i != k // 3]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_dotted_names_other_suffixes_and_loose_files_in_a_tar_pair_up(kind, tmp_path):
    key = "deep/" * 30 + "a.b"
    names = {f"{key}.PNG": b"x", "alone.jpg": b"x", f"{key}.txt": b"long", "empty.txt": b"", "empty.webp": b"x",
             "c.txt": b"c", "c.jpeg": b"x"}
    write_tar(tmp_path / "a.tar", names.items(), format=kind)
    assert captions(tmp_path / "a.tar") == ["long", "c"]


def save_odd_pictures(folder):
    random = np.random.default_rng(0)
    rgb = Image.fromarray(random.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    deep = Image.fromarray(np.full((9, 9), 25700, np.uint16))
    good = {"rgb.jpg": rgb, "grey.png": rgb.convert("L"), "cmyk.jpg": rgb.convert("CMYK"), "webp.webp": rgb,
            "rgba.png": rgb.convert("RGBA"), "palette.gif": rgb.convert("P"), "one.png": rgb.resize((1, 1)),
            "thin.png": rgb.resize((900, 1)), "bit.png": rgb.convert("1"), "deep.png": deep}
    for name, picture in good.items():
        picture.save(folder / name)
    rgb.save(folder / "moving.gif", save_all=True, append_images=[rgb.rotate(90)])
    (folder / "cut.jpg").write_bytes((folder / "rgb.jpg").read_bytes()[:500])
    (folder / "text.jpg").write_text("no picture"), (folder / "empty.png").touch()
    (folder / "huge.png").write_bytes((folder / "rgb.jpg").read_bytes()[:2])
    Image.new("1", (20000, 20000)).save(folder / "huge.png")  # 50 kB that would unpack to 1.2 GB
    return [*good, "moving.gif"], ["cut.jpg", "text.jpg", "empty.png", "huge.png", "missing.jpg"]


def test_odd_pictures_are_read_and_broken_ones_give_way_and_are_counted(tmp_path):
    good, bad = save_odd_pictures(tmp_path)
    rows = [f"{name}\tpicture {i}" for i, name in enumerate(good + bad + good[:1])]
    (tmp_path / "pairs.tsv").write_text("\n".join(["filepath\ttitle", *rows]))
    data = clipkd.Pairs([str(tmp_path / "pairs.tsv")], 32, [list], 0, tmp_path)
    images, (titles,), unread = data[[(0, i) for i in range(len(rows))]]
    assert titles == [f"picture {i}" for i in [*range(len(good))] + [len(rows) - 1] * 6]
    assert unread == sum(range(1, len(bad) + 1))
    assert (images[good.index("deep.png")] == 100).all()  # 25700 of 65535


def mutate(data, random):
    """Bit flips, a cut, or a stretch of random bytes; the new bytes, and the first and last place that may differ."""
    data, size = bytearray(data), len(data)
    start = int(random.integers(size))
    end = min(size, start + int(random.integers(1, 1000)))
    kind = random.integers(3)
    if kind == 0:
        for place in random.integers(start, end, 5):
            data[place] ^= 1 << int(random.integers(8))
    elif kind == 1:
        del data[start:]
        end = size
    else:
        data[start:end] = random.bytes(end - start)
    return bytes(data), start, end


def mutated_table(world, folder, random):
    """Captions of a mutated TSV, and those that it must still have."""
    text = (world / "pairs.tsv").read_bytes()
    data, start, end = mutate(text, random)
    header = text.index(b"\n") + 1
    if start < header:
        return [], []
    (folder / "m.tsv").write_bytes(data)
    lines = [(m.start(), m.end(), m[1].decode()) for m in re.finditer(rb"[^\t\n]+\t([^\n]+)\n?", text[header:])]
    return captions(folder / "m.tsv"), [t for a, b, t in lines if b + header < start or a + header > end]


def mutated_tar(world, folder, random):
    """The same of a tar."""
    members = shard(world, folder / "m.tar", format=[tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT][random.integers(2)])
    data, start, end = mutate((folder / "m.tar").read_bytes(), random)
    with tarfile.open(folder / "m.tar") as tar:
        places = [member.offset for member in tar] + [tar.offset]
    (folder / "m.tar").write_bytes(data)
    return captions(folder / "m.tar"), [
        members[i + 1][1].decode() for i in range(0, len(members), 3) if places[i + 2] <= start or places[i] >= end]


def mutated_picture(world, folder, random):
    """Nothing to compare: it is read or refused, but neither crashes nor hangs."""
    pictures = sorted((folder / "pictures").iterdir())
    picture = pictures[random.integers(len(pictures))]  # each small format there is
    (folder / "m").write_bytes(mutate(picture.read_bytes(), random)[0])
    try:
        image = clipkd.open_picture(folder / "m")
    except BadInput:
        return ["refused"], []
    assert np.array(image).shape[2] == 3
    return ["read"], []


@pytest.mark.parametrize("mutated", [mutated_table, mutated_tar, mutated_picture])
def test_mutated_files_lose_no_good_pair_and_crash_nothing(mutated, world, tmp_path, capfd, count=150):
    (tmp_path / "pictures").mkdir()
    save_odd_pictures(tmp_path / "pictures")
    for name in ("huge.png", "empty.png"):
        (tmp_path / f"pictures/{name}").unlink()
    for seed in range(count):
        found, good = mutated(world, tmp_path, np.random.default_rng(seed))
        assert not Counter(good) - Counter(found), seed


def test_odd_captions_are_tokenised_in_no_time(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    odd = ["a" * 10**6, "\x00\x1b[31m\x7f", "\u732b \U0001f408 \u0642\u0637", "same", "same", "\ufffd" * 50, "<a>"]
    (tmp_path / "pairs.tsv").write_text("filepath\ttitle\n" + "".join(f"a.png\t{text}\n" for text in odd), "utf-8")
    data = clipkd.Pairs([str(tmp_path / "pairs.tsv")], 8, [open_clip.get_tokenizer("ViT-B-32")], 0, tmp_path)
    start = time.perf_counter()
    images, (tokens,), unread = data[[(0, i) for i in range(len(odd))]]
    assert tokens.shape == (7, 77) and unread == 0 and time.perf_counter() - start < 20


@pytest.mark.parametrize("changes, words", [
    ({"train-data": "nowhere.tsv"}, "nowhere.tsv: no such file"),
    ({"train-data": "{tmp}/columns.csv"}, r"columns.csv: .*filepath and title; found \['path', 'text'\] .*comma"),
    ({"train-data": "{tmp}/empty.tsv"}, "empty.tsv: no pair of a picture"),
    ({"train-data": "{tmp}/lost.tsv"}, "cannot be read, the last: .*gone.jpg.*; .*relative to"),
    ({"train-data": "{tmp}"}, "{tmp}: no such file, nor a folder of tars"),
    ({"train-data": "{tmp}/{{000..002}}.tar"}, "{tmp}/000.tar: no such file"),
    ({"val-data": "{tmp}/bad.json"}, "bad.json: not as --help says"),
    ({"val-data": "{tmp}/empty.tsv"}, "empty.tsv: no captions in it"),
    ({"val-data": "{tmp}/lost.tsv"}, "gone.jpg: this picture cannot be read"),
    ({"val-data": "{tmp}/row.tsv"}, "row.tsv: .*a row is damaged: KeyError"),
    ({"student": "ViT-T-61"}, "--student ViT-T-61: .*nearest names are .*ViT-T-16"),
    ({"teacher": "ViT-B-61:openai"}, "--teacher ViT-B-61:openai: .*nearest names are .*ViT-B-16"),
    ({"teacher": "ViT-B-16"}, "--teacher ViT-B-16: .*weights.* could not be loaded.*NAME:TAG, tags: .*laion400m_e32"),
    ({"teacher": "ViT-B-16:laion"}, "laion' is not a known tag or valid file.*laion400m_e32"),
    ({"teacher": "demo-student:{world}/bare.pt"}, "cannot be loaded: text pos_embed width changed"),
    ({"teacher": "demo-teacher:{tmp}/empty.tsv"}, "--teacher .*empty.tsv: cannot be loaded"),
    ({"batch-size": 25}, "--batch-size 25: more than the 24 pairs"),
    ({"mask-ratio": 1}, r"--mask-ratio 1.0: .*\[0, 1\)"),
    ({"lambda-fd": "nan"}, "--lambda-fd nan: must be a number"),
    ({"lambda-crd": -1}, "--lambda-crd -1.0: must be a number"),
    ({"lambda-icl": "inf"}, "--lambda-icl inf: must be a number"),
    ({"epochs": 0}, "--epochs 0: must be a number"),
    ({f"lambda-{name}": 0 for name in clipkd.LOSSES}, "--lambda-.*: all are 0"),
    ({"student": "{tmp}/columns.csv.json"}, "--student .*unknown model"),
    ({"student": "ViT-T-61", "train-data": None}, "--student ViT-T-61: .*unknown model"),  # the demo
    ({"val-data": "nowhere.tsv"}, "nowhere.tsv: no such file"),
    ({"val-data": "x.tsv", "train-data": None}, "--val-data, --zeroshot: need --eval-only or --train-data"),
    ({"train-data": "nowhere.tsv", "teacher": "ViT-B-61"}, "nowhere.tsv: no such file"),
    ({"zeroshot": "nowhere"}, "--zeroshot nowhere: no such folder"),
    ({"inherit": ""}, "--inherit: visual.class: VisionTransformer in the student, ModifiedResNet in the teacher"),
    ({"inherit": "", "student": "mobilevit_s"}, "--inherit: visual.class: TimmModel in the student"),
    ({"inherit": "", "student": "demo-student"}, "attn.width of a head: 16 in the student, 32 in the teacher"),
    ({"inherit": "", "train-data": None, "student": "RN50"}, "visual.* in the student, .* in the teacher"),  # the demo
    ({"crd-scale": 0}, "--crd-scale 0.0: must be a number in"),
    ({"crd-scale": 50, "lambda-crd": 0}, "--crd-scale 50.0: is for CRD, which --lambda-crd 0 switches off"),
])
def test_a_mistake_is_named_before_anything_is_written(changes, words, run, world, tmp_path):
    (tmp_path / "columns.csv").write_text("path,text\na,b\n")
    (tmp_path / "empty.tsv").write_text("filepath\ttitle\n\n")
    (tmp_path / "lost.tsv").write_text("filepath\ttitle\ngone.jpg\tgone\n")
    (tmp_path / "bad.json").write_text('{"images": [{"id": 1}]}')
    (tmp_path / "row.tsv").write_text("filepath\ttitle\nno second column\n")
    with pytest.raises(BadInput, match=words.replace("{tmp}", str(tmp_path))) as error:
        run(**{name: value and str(value).format(tmp=tmp_path, world=world) for name, value in changes.items()})
    assert "\n" not in str(error.value) and not [path for path in tmp_path.glob("out/*") if path.name != "scans"]


def test_an_unreadable_picture_of_an_evaluation_is_named_and_the_training_is_not_lost(run, world, tmp_path):
    (tmp_path / "classes/a").mkdir(parents=True)
    (tmp_path / "classes/a/bad.png").write_text("not a picture")
    (tmp_path / "classes/a/.DS_Store").touch(), (tmp_path / "classes/.cache").mkdir()
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
    for content in (whole[: len(whole) // 2], b"", b"something else"):
        checkpoint.write_bytes(content)
        with pytest.raises(BadInput, match="checkpoint.pt: cut off, or not a checkpoint"):
            run(epochs=1)
        assert checkpoint.read_bytes() == content


def test_processes_and_gpus_are_checked(monkeypatch):
    monkeypatch.setattr(clipkd, "WORLD", 3)
    with pytest.raises(BadInput, match="--batch-size 1024: .*multiple of 3"):
        clipkd.get_args(["--train-data", "x.tsv"])
    monkeypatch.setattr(clipkd, "LOCAL_WORLD", 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(BadInput, match="3 processes but 2 GPUs: .*--nproc_per_node=2"):
        clipkd.setup()


def test_a_mistake_ends_with_one_line_and_exit_code_2(tmp_path):
    result = command(sys.executable, ROOT / "clipkd.py", "--train-data", "nowhere.tsv", "--student", "demo-vit",
                     "--lambda-crd", 0, "--lambda-fd", 0, "--lambda-icl", 0, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == "" and not list(tmp_path.iterdir())
    assert result.stderr == ("clipkd.py: error: nowhere.tsv: no such file, nor a folder of tars; expected TSV or CSV "
                             "files, or .tar shards\n")


def test_importing_clipkd_does_nothing(tmp_path):
    result = command(sys.executable, "-c", "import clipkd", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "") and not list(tmp_path.iterdir())


def test_help_answers_without_the_slow_imports_and_each_group_fits_a_terminal_page(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('imported')")
    result = command(sys.executable, ROOT / "clipkd.py", "--help", PYTHONPATH=str(tmp_path), COLUMNS="100")
    assert result.returncode == 0 and result.stderr == ""
    assert all(len(group.splitlines()) < 24 for group in result.stdout.split("\n\n"))
    flags = {f"--{name.replace('_', '-')}" for name in vars(clipkd.get_args([])) if name != "demo"}
    assert set(re.findall(r"^  (--[a-z-]+)", result.stdout, re.M)) == flags


def test_without_flags_a_run_is_the_papers_recipe():
    args = clipkd.get_args(["--train-data", "cc3m.tsv", "cc12m.tsv"])
    assert (args.student, args.teacher) == ("ViT-T-16", "ViT-B-16:laion400m_e32")
    weights = [getattr(args, f"lambda_{name}") for name in ("clip", "crd", "fd", "icl", "mfd", "gd", "afd")]
    assert weights == [1, 1, 2000, 1, 0, 0, 0]
    assert (args.batch_size, args.epochs, args.lr, args.weight_decay, args.warmup) == (1024, 32, 1e-3, 0.1, None)
    demo = clipkd.get_args(["--lambda-fd", "7"])
    assert demo.demo and demo.student == "demo-student" and demo.lambda_fd == 7  # what is typed wins


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    rates = [clipkd.lr_at(step, 12, 4, 2.0) for step in range(12)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0] and rates[8] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(1 + math.cos(0.75 * math.pi)) and rates[4:] == sorted(rates[4:], reverse=True)


def test_biases_norms_and_scales_are_not_decayed_and_betas_follow_the_family():
    args = clipkd.get_args(["--train-data", "x", "--student", "RN50"])
    distiller = new_distiller("demo-vit", ALL)
    decayed, plain = (group["params"] for group in clipkd.make_optimizer(distiller, args).param_groups)
    names = {id(p): name for name, p in distiller.named_parameters()}
    assert {"proj_img.weight", "fuse_txt.weight"} <= {names[id(p)] for p in decayed}
    decayed_names, plain_names = ([names[id(p)] for p in group] for group in (decayed, plain))
    assert all(name.endswith(("weight", "embedding", "proj", "projection")) for name in decayed_names)
    assert all("ln_" in name or name.endswith(("bias", "scale", "class_embedding")) for name in plain_names)
    assert len(decayed) + len(plain) == len(names)
    for args.student, betas, eps in (("mobilevit_s", (0.9, 0.98), 1e-6), ("RN50", (0.9, 0.999), 1e-8)):
        defaults = clipkd.make_optimizer(distiller, args).defaults
        assert (defaults["betas"], defaults["eps"]) == (betas, eps)
    swin = torch.nn.ParameterDict({"relative_position_bias_table": torch.zeros(3, 3), "weight": torch.zeros(3, 3)})
    assert [len(group["params"]) for group in clipkd.make_optimizer(swin, args).param_groups] == [1, 1]


# ---- Evaluation. ----

def test_recalls_count_every_caption_of_an_image():
    img, txt = unit_rows(1, 3, 3), unit_rows(2, 7, 3)
    owner = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    similar = [[dot(v, s) for s in txt] for v in img]
    i2t = [owner[max(range(7), key=lambda j: similar[i][j])].item() == i for i in range(3)]
    t2i = [max(range(3), key=lambda i: similar[i][j]) == owner[j].item() for j in range(7)]
    assert losses.recalls(img, txt, torch.arange(3), owner)["R@1"] == pytest.approx(100 * sum(i2t) / 3)
    assert losses.recalls(txt, img, owner, torch.arange(3))["R@1"] == pytest.approx(100 * sum(t2i) / 7)
    gap = [(similar[i][j], owner[j].item() == i) for i in range(3) for j in range(7)]
    positive, negative = ([x for x, match in gap if match == wanted] for wanted in (True, False))
    assert losses.pair_gap(img, txt, owner).item() == pytest.approx(np.mean(positive) - np.mean(negative))


def test_linear_cka_is_the_centred_alignment_of_the_gram_matrices_and_ignores_rotations(rows):
    x, y = unit_rows(1, 9, 4), unit_rows(2, 9, 6)
    centre = np.eye(9) - 1 / 9
    k, l = (centre @ np.array([[dot(a, b) for b in z] for a in z]) @ centre for z in (x, y))  # [9, 9] Gram matrices
    assert losses.linear_cka(x, y).item() == pytest.approx((k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum()))
    turn = torch.linalg.qr(unit_rows(3, 4)).Q
    assert losses.linear_cka(x, 3 * x @ turn).item() == pytest.approx(1)
    assert losses.linear_cka(x.float(), y.float()).item() == pytest.approx(losses.linear_cka(x, y).item(), rel=1e-6)


def test_coco_json_flickr_txt_and_tsv_of_the_same_captions_give_the_same_scores(world, tmp_path):
    pictures = sorted((world / "classes").glob("*/*.jpg"))[:6]
    (tmp_path / "val2014").mkdir()
    for i, picture in enumerate(pictures):
        (tmp_path / f"val2014/{i}.jpg").write_bytes(picture.read_bytes())
    said = [(i, f"{text}, {clipkd.COLOURS[i]}") for i in range(6) for text in ("a letter", "one, more", 'a "thing"')]
    (tmp_path / "coco.json").write_text(json.dumps({
        "images": [{"id": 7 * i, "file_name": f"{i}.jpg"} for i in range(6)],
        "annotations": [{"image_id": 7 * i, "id": k, "caption": text} for k, (i, text) in enumerate(said)]}))
    (tmp_path / "flickr.txt").write_text("image,caption\n" + "".join(f"{i}.jpg,{text}\n" for i, text in said))
    (tmp_path / "rows.tsv").write_text("filepath\ttitle\n" + "".join(f"val2014/{i}.jpg\t{text}\n" for i, text in said))
    torch.manual_seed(0)
    model, tokenizer, _ = clipkd.load_model("demo-vit", "--student")
    sets = {name: clipkd.caption_pairs(f"{tmp_path}/{name}") for name in ("coco.json", "flickr.txt", "rows.tsv")}
    scores = clipkd.evaluate(model, tokenizer, {}, sets, torch.device("cpu"), 0, (model, tokenizer), {})
    assert scores["coco.json"] == scores["flickr.txt"] == scores["rows.tsv"]
    assert scores["rows.tsv"]["text CKA"] == pytest.approx(1) and scores["rows.tsv"]["image cosine"] == pytest.approx(1)
    alone = {"first": [pair for k, pair in enumerate(sets["rows.tsv"]) if k % 3 == 0]}
    first = clipkd.evaluate(model, tokenizer, {}, alone, torch.device("cpu"), 0)["first"]
    for way in ("I2T", "T2I"):
        assert scores["rows.tsv"][f"first-caption {way} R@1"] == first[f"{way} R@1"]


def test_weights_that_are_not_finite_are_not_saved_before_an_evaluation_either(run, tmp_path, monkeypatch):
    schedule = clipkd.lr_at
    monkeypatch.setattr(clipkd, "lr_at", lambda step, *rest: math.inf if step == 1 else schedule(step, *rest))
    with pytest.raises(BadInput, match="at step 3 not finite"):
        run(save_every=100, log_every=100, eval_every=1)
    assert not (tmp_path / "out/checkpoint.pt").exists()


def test_a_thousand_shards_need_no_thousand_open_files(world, tmp_path):
    picture = next(world.glob("classes/*/*.jpg")).read_bytes()
    for i in range(300):
        write_tar(tmp_path / f"{i:04d}.tar", [("a.txt", b"x"), ("a.jpg", picture)])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, hard))
    try:
        data = clipkd.Pairs([f"{tmp_path}/{{0000..0299}}.tar"], 32, [list], 0, tmp_path)
        images, _, unread = data[[(0, i) for i in range(300)]]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert images.shape == (300, 3, 32, 32) and unread == 0


def test_an_evaluation_on_two_and_three_processes_gives_the_digits_of_one(world, capsys, monkeypatch):
    words = ["--eval-only", "--student", f"local-dir:{world}/dir", "--val-data", f"val={world}/pairs.tsv",
             "--zeroshot", f"letters={world}/classes", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", ["clipkd.py", *words])
    clipkd.main()
    one = capsys.readouterr().out
    for processes in (2, 3):
        many = command(*(f"--nproc_per_node={processes}" if "nproc" in str(w) else w for w in TORCHRUN), *words)
        assert many.returncode == 0 and many.stdout == one and "letters: top-1" in one, many.stderr


def test_class_folders_named_by_number_or_wnid_are_imagenets_classes(tmp_path):
    for name in [*map(str, range(1000))]:
        (tmp_path / "v2" / name).mkdir(parents=True)
        (tmp_path / "v2" / name / "a.jpg").touch()
    for wnid in ("n01440764", "n15075141"):  # tench, the first class, and toilet paper, the last
        (tmp_path / "subset" / wnid).mkdir(parents=True)
        (tmp_path / "subset" / wnid / "a.jpg").touch()
    labels, pictures, names, templates = clipkd.class_folders(tmp_path / "v2")
    for (path,), label in zip(pictures, labels):
        assert names[label] == open_clip.IMAGENET_CLASSNAMES[int(Path(path).parent.name)]
    assert len(templates) == 80
    assert clipkd.class_folders(tmp_path / "subset")[2] == ["tench", "toilet paper"]
    (tmp_path / "subset/n99999999").mkdir()
    with pytest.raises(BadInput, match="n99999999 is not one of ImageNet's 1000 classes"):
        clipkd.class_folders(tmp_path / "subset")


def test_zero_shot_top_1_agrees_with_a_classifier_built_by_hand(world):
    torch.manual_seed(3)
    model, tokenizer, _ = clipkd.load_model("demo-vit", "--student")
    labels, pictures, names, _ = folder = clipkd.class_folders(world / "classes")
    score = clipkd.evaluate(model, tokenizer, {"x": folder}, {}, torch.device("cpu"), 0)["x"]["top-1"]
    _, _, preprocess = open_clip.create_model_and_transforms("demo-vit")
    right = 0
    with torch.no_grad():
        texts = [model.eval().encode_text(tokenizer([f"a photo of a {name}"]), normalize=True)[0] for name in names]
        for (path,), label in zip(pictures, labels):
            row = model.encode_image(preprocess(Image.open(path))[None], normalize=True)[0]
            right += max(range(len(names)), key=lambda c: dot(row, texts[c])) == label
    assert score == pytest.approx(100 * right / len(labels))


def test_the_papers_six_students_have_the_sizes_of_its_table_2_and_run():
    millions = {"ViT-T-16": 5.6, "mobilevit_s": 5.3, "swin_tiny": 27.9, "mobilenetv3_small_100": 2.0, "resnet18": 11.4,
                "efficientnet_b0": 4.7}  # image towers
    for name, size in millions.items():
        model, *_ = clipkd.load_model(name, "--student")
        assert sum(p.numel() for p in model.visual.parameters()) / 1e6 == pytest.approx(size, abs=0.11)
        assert model.encode_image(torch.zeros(2, 3, 224, 224)).shape == (2, 512)


# ---- What the README promises. ----

def test_the_readmes_example_of_one_loss_runs_and_prints_what_it_says():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    result = command(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == re.findall(r"# prints (\S+)", code)


def test_bench_prints_a_table_and_leaves_nothing_behind(run, world, tmp_path, capsys):
    with pytest.raises(FileNotFoundError):  # no log: it trains in a folder of its own
        run(bench=2, train_data=None)
    table = capsys.readouterr().out
    parts = re.findall(r"\| (.+?) \| ([\d.]+) \| ([\d.]+) % \|", table)
    assert [name for name, *_ in parts] == [
        "wait for data", "teacher forward", "student forward", "gather", "losses forward", "losses backward",
        "student backward", "optimiser", "whole step"]
    *times, step = [float(ms) for _, ms, _ in parts]
    assert 0.5 * step < sum(times) < 2 * step < 60_000 and not [*(tmp_path / "out").iterdir()]


# ---- Benchmarks: `python test_losses.py` prints ratios against named baselines, measured side by side. ----

def gd_expanded(img_s, txt_s, img_t, txt_t, scale_s, scale_t):
    """The baseline: the gradient for the keys as a sum over an N x D x N expansion, each direction on its own."""
    def gradients(a, b, scale):
        e = (scale * a @ b.T).softmax(1) - torch.eye(len(a))
        expanded = e.T[:, None].repeat(1, a.shape[1], 1)  # [N, D, N]
        return scale / len(a) * e @ b, scale / len(a) * (expanded * a.T).sum(2)
    pairs = [zip(gradients(*s), gradients(*t)) for s, t in (
        ((img_s, txt_s, scale_s), (img_t, txt_t, scale_t)), ((txt_s, img_s, scale_s), (txt_t, img_t, scale_t)))]
    return sum(F.mse_loss(a, b) for pair in pairs for a, b in pair)


def recipe(rows, own):
    v, s, vt, st, a, b = rows
    return (clip_loss(v, s, a, own) + crd_loss(v, s, vt, st, a, b, own) + icl_loss(v, s, vt, st, a, own)
            + 2000 * fd_loss(v[own], s[own], vt[own], st[own]))


def measure(loss, n, d, repeats, pipe):
    """Median seconds of forward + backward and peak MiB above the inputs, in a process of its own."""
    torch.set_num_threads(1)
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


def benchmark():
    fork = torch.multiprocessing.get_context("fork")

    def cost(loss, n, repeats):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=measure, args=(loss, n, 512, repeats, theirs))
        process.start(), process.join()
        return ours.recv()

    def compare(title, fast, baseline, n, repeats):
        (t, m), (t0, m0) = cost(fast, n, repeats), cost(baseline, n, 0 if "GD" in title else repeats)
        print(f"| {title} | {t0:.2f} s, {m0:.0f} MiB | {t:.3f} s, {m:.0f} MiB | {t0 / t:.1f}x, {m0 / m:.1f}x |")

    print("| forward + backward, one core, D = 512 | baseline | here | time, memory |\n|---|---|---|---|")
    compare("GD, N = 1024, against the N x D x N expansion", lambda x: gd_loss(*x), lambda x: gd_expanded(*x), 1024, 5)
    for n in (1024, 4096):
        compare(f"recipe, N = {n}, one of 8 processes against N x N", lambda x, n=n: recipe(x, slice(n // 8)),
                lambda x: recipe(x, slice(None)), n, 5)
    print("recipe, N = 32768, one of 8 processes: {:.1f} s, {:.0f} MiB".format(
        *cost(lambda x: recipe(x, slice(4096)), 32768, 0)))

    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(32):  # smooth noise, about 40 kB as photographs of this size
            noise = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)).resize((512, 384))
            noise = (noise + random.normal(0, 6, (384, 512, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(noise).save(f"{folder}/{i}.jpg", quality=85)
        Path(folder, "x.tsv").write_text("filepath\ttitle\n" + "".join(f"{i}.jpg\tx\n" for i in range(32)))
        data = clipkd.Pairs([f"{folder}/x.tsv"], 224, [], 0, folder)
        theirs = open_clip.image_transform(224, is_train=True)
        torch.set_num_threads(1)
        times = {"open_clip": [], "here": []}
        for _ in range(9):
            for name, load in (("open_clip", lambda i: theirs(Image.open(f"{folder}/{i}.jpg"))),
                               ("here", lambda i: data.load(0, i))):
                begin = time.process_time()
                for i in range(32):
                    load(i)
                times[name].append((time.process_time() - begin) / 32)
    a, b = (np.median(times[name]) for name in ("open_clip", "here"))
    print(f"loading 512 x 384 JPEGs: open_clip {1 / a:.0f} pictures/s a core, here {1 / b:.0f}, {a / b:.2f}x")


if __name__ == "__main__":
    benchmark()
