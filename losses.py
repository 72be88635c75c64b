"""The losses of CLIP-KD (Yang et al., CVPR 2024, arXiv 2307.12732), one pure function each, without state.

name            shape         paper     contract
img_s, txt_s    [N, D_s]      v^S, s^S  student rows, unit length; row k of both belongs to pair k
img_t, txt_t    [N, D_t]      v^T, s^T  teacher rows, unit length, computed without gradient
scale, scale_*  []            1/tau     inverse temperature, after exp(): 14.3 at the start, 100 at most
N               |B|           the whole batch that the softmax sees; on several processes gather() it first
rows            k             the anchors to average over, all by default. A process that passes its own, of
                              gathered rows, does its share of the work: the loss is the processes' mean

Normalise the rows before the call: F.normalize(x, dim=1). Every function computes in float32 (float64 stays),
whatever autocast says around it: in bfloat16 a logit near 100 has a step of 0.5.
To use one elsewhere, copy that function and the two imports (AFD also needs clip_loss, MFD fd_loss).
"""

import torch
import torch.nn.functional as F


def clip_loss(img, txt, scale, rows=slice(None)):
    """Task loss: each image finds its text among N, and each text its image. Eq. 1-3.

        L_I->T = -1/N sum_k log( exp(v_k . s_k / tau) / sum_b exp(v_k . s_b / tau) )
        L_T->I = the same with v and s exchanged,    L_CLIP = (L_I->T + L_T->I) / 2

    Shapes: img, txt [N, D], unit rows; scale [] = 1/tau.
    Returns: [] in nats; log N when all rows are equal.
    Reduction: mean over the anchors k in `rows` and over the two directions; weight --lambda-clip 1.
    Authors' code: the same.
    """
    with torch.autocast(img.device.type, enabled=False):
        img, txt = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (img, txt))
        pair = torch.arange(len(img), device=img.device)[rows]  # the right answer of anchor k is k
        i2t = F.cross_entropy(scale * img[rows] @ txt.T, pair)  # logits [rows, N]: image k against every text
        t2i = F.cross_entropy(scale * txt[rows] @ img.T, pair)
        return (i2t + t2i) / 2


def crd_loss(img_s, txt_s, img_t, txt_t, scale_s, scale_t, rows=slice(None)):
    """Contrastive relational distillation: copy the teacher's softmax over the batch. Eq. 4-10.

        p_k[j] = exp(v_k . s_j / tau) / sum_b exp(v_k . s_b / tau)  p^T: of the teacher, p^S: of the student
        L_I->T = 1/N sum_k sum_j p^T_k[j] log(p^T_k[j] / p^S_k[j]),  L_T->I = the same with v and s exchanged
        L_CRD = (L_I->T + L_T->I) / 2

    Shapes: img_s, txt_s [N, D_s]; img_t, txt_t [N, D_t]; unit rows; D_s and D_t may differ; scale_* []: 1/tau
    Returns: [] in nats; 0 when scale_s times the student's similarities are scale_t times the teacher's.
    Reduction: mean over the anchors k in `rows` and over the two directions; weight --lambda-crd 1.
    Authors' code: the same. Eq. 10 prints the sum of the directions, twice this value.
    """
    with torch.autocast(img_s.device.type, enabled=False):
        img_s, txt_s, img_t, txt_t = (
            x.to(torch.promote_types(x.dtype, torch.float32)) for x in (img_s, txt_s, img_t, txt_t)
        )
        directions = []
        for v_s, s_s, v_t, s_t in ((img_s, txt_s, img_t, txt_t), (txt_s, img_s, txt_t, img_t)):
            log_p_s = (scale_s * v_s[rows] @ s_s.T).log_softmax(1)  # [rows, N]: anchor k against all partners
            log_p_t = (scale_t * v_t[rows] @ s_t.T).log_softmax(1)
            kl = F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True)  # KL(p^T || p^S)
            directions.append(kl)
        return sum(directions) / 2


def fd_loss(img_s, txt_s, img_t, txt_t):
    """Feature distillation: put every student row where the teacher's is. Eq. 11.

        L_FD = 1/(N D) sum_k ( |v^T_k - v^S_k|^2 + |s^T_k - s^S_k|^2 ) = (4 - 2 cos_img - 2 cos_txt) / D

    Shapes: all [N, D], unit rows; needs D_s == D_t: project the student first where they differ.
    Returns: [] in squared distance per dimension; 0 when student = teacher, about 4/D for a random student.
    Reduction: mean over N AND D, image term + text term; this is what the weight --lambda-fd 2000 belongs to.
    Authors' code: the same. Eq. 11 prints the sum over D: there this pull has the weight 2000/D, 3.9 at 512.
    """
    img_s, txt_s, img_t, txt_t = (
        x.to(torch.promote_types(x.dtype, torch.float32)) for x in (img_s, txt_s, img_t, txt_t)
    )
    return F.mse_loss(img_s, img_t) + F.mse_loss(txt_s, txt_t)


def mfd_loss(img_s_masked, txt_s, img_t, txt_t):
    """Masked feature distillation: FD, but the student saw only part of each image. Eq. 12.

        L_MFD = 1/(N D) sum_k ( |v^T_k - v~^S_k|^2 + |s^T_k - s^S_k|^2 ),  v~ = row of the masked image

    Shapes: all [N, D], unit rows; needs D_s == D_t. The teacher sees the whole image, and no text is masked.
    The masking itself is Distiller.encode_masked in clipkd.py.
    Returns: [] in squared distance per dimension; equals fd_loss at mask ratio 0.
    Reduction: as fd_loss; weight --lambda-mfd 2000.
    Authors' code: computes the masked row, then overwrites it with the whole image's, so that MFD is FD.
    """
    return fd_loss(img_s_masked, txt_s, img_t, txt_t)


def gd_loss(img_s, txt_s, img_t, txt_t, scale_s, scale_t):
    """Gradient distillation: feel the same pull of the task loss on every row as the teacher. Eq. 13, 19-25.

        dL_CLIP/dv_k = 1/(N tau) sum_b G[k,b] s_b,    dL_CLIP/ds_b = 1/(N tau) sum_k G[k,b] v_k
        G = (P + Q)/2 - I,    P[k,b] = softmax_b(v_k . s_b / tau),    Q[k,b] = softmax_k(v_k . s_b / tau)
        L_GD = 1/(N D) sum_k ( |dL^T/dv^T_k - dL^S/dv^S_k|^2 + |dL^T/ds^T_k - dL^S/ds^S_k|^2 )

    Shapes: all [N, D], unit rows; needs D_s == D_t; scale_* [] = 1/tau. No tensor exceeds N x N or N x D.
    Returns: [] in squared gradient per dimension; 0 when student = teacher and the scales are equal.
    Reduction: mean over N and D of gradients that carry the 1/N of L_CLIP, so the value falls as 1/N^2:
    the paper's --lambda-gd 1e8 is for N = 1024.
    Authors' code: passes 1/tau as tau, builds N x N x D, compares the four one-directional gradients apart.
    """

    def task_gradient(img, txt, scale):
        logits = scale * img @ txt.T  # [N, N]
        g = (logits.softmax(1) + logits.softmax(0)) / 2
        g.diagonal().sub_(1)
        return scale / len(img) * (g @ txt), scale / len(img) * (g.T @ img)  # [N, D] of images, of texts

    with torch.autocast(img_s.device.type, enabled=False):
        img_s, txt_s, img_t, txt_t = (
            x.to(torch.promote_types(x.dtype, torch.float32)) for x in (img_s, txt_s, img_t, txt_t)
        )
        gi_t, gt_t = task_gradient(img_t, txt_t, scale_t)
        gi_s, gt_s = task_gradient(img_s, txt_s, scale_s)
        return F.mse_loss(gi_s, gi_t) + F.mse_loss(gt_s, gt_t)


def icl_loss(img_s, txt_s, img_t, txt_t, scale, rows=slice(None)):
    """Interactive contrastive learning: a student row finds its partner among the teacher's rows. Eq. 14-16.

        L_I->T = -1/N sum_k log( exp(v^S_k . s^T_k / tau) / sum_b exp(v^S_k . s^T_b / tau) )
        L_T->I = -1/N sum_k log( exp(s^S_k . v^T_k / tau) / sum_b exp(s^S_k . v^T_b / tau) );  L_ICL: the mean

    Shapes: all [N, D], unit rows; needs D_s == D_t; scale [] = 1/tau, learnable, ICL's own.
    Returns: [] in nats; clip_loss of the teacher when student = teacher, log N when all rows are equal.
    Reduction: mean over the anchors k in `rows` and over the two directions; weight --lambda-icl 1.
    Authors' code: multiplies by the parameter ln(1/0.07) = 2.66 itself, without exp() and without a clamp.
    """
    with torch.autocast(img_s.device.type, enabled=False):
        img_s, txt_s, img_t, txt_t = (
            x.to(torch.promote_types(x.dtype, torch.float32)) for x in (img_s, txt_s, img_t, txt_t)
        )
        pair = torch.arange(len(img_s), device=img_s.device)[rows]  # the right answer of anchor k is k
        i2t = F.cross_entropy(scale * img_s[rows] @ txt_t.T, pair)  # logits [rows, N]
        t2i = F.cross_entropy(scale * txt_s[rows] @ img_t.T, pair)
        return (i2t + t2i) / 2


def afd_loss(img_s, txt_s, img_t, txt_t, fuse_img, fuse_txt, scale, rows=slice(None)):
    """Augmented feature distillation: the task loss on student and teacher rows fused. Eq. 17.

        v^A_k = phi_v([v^S_k ; v^T_k]),  s^A_k = phi_t([s^S_k ; s^T_k]),  L_AFD = L_CLIP(v^A/|v^A|, s^A/|s^A|)

    Shapes: img_s, txt_s [N, D_s]; img_t, txt_t [N, D_t]; unit rows; D_s and D_t may differ.
    fuse_img, fuse_txt: callables [N, D_s + D_t] -> [N, D], a linear layer each; scale [] = 1/tau, AFD's own.
    Returns: [] in nats; equals clip_loss of the student when the fusion keeps just the student's part.
    Reduction: as clip_loss; weight --lambda-afd 1 (the paper does not give it).
    Authors' code: scale without exp() as in ICL; a shape error when D_s != D_t.
    """
    with torch.autocast(img_s.device.type, enabled=False):
        img_s, txt_s, img_t, txt_t = (
            x.to(torch.promote_types(x.dtype, torch.float32)) for x in (img_s, txt_s, img_t, txt_t)
        )
        img = F.normalize(fuse_img(torch.cat([img_s, img_t], dim=1)), dim=1)  # [N, D]
        txt = F.normalize(fuse_txt(torch.cat([txt_s, txt_t], dim=1)), dim=1)
        return clip_loss(img, txt, scale, rows)


# ---- Not losses: the gather that they need on several processes, what hides patches for MFD, the measures.


class Gather(torch.autograd.Function):
    """Rows of every process in rank order: [n, D] -> [N, D]. In backward a row gets the gradients of all
    processes: they sum up here and DDP divides by their number, so the mean of the processes' losses has the
    gradient that one process would compute."""

    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient)
        return gradient.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def gather(x):
    """[n, D] -> [N, D] with a gradient, after torch.distributed.init_process_group; one process: x itself."""
    return Gather.apply(x) if torch.distributed.is_available() and torch.distributed.is_initialized() else x


def blank_patches(images, ratio, grid=14):
    """Images [n, 3, H, W] with `ratio` of the patches of a grid x grid set to 0 (the mean colour), at random.

    Stands in for the patch dropping of Eq. 12 where the image tower is no ViT: patches of 16 pixels at 224.
    """
    noise = torch.rand(len(images), grid**2, device=images.device)
    keep = noise.argsort(1).argsort(1) < int(grid**2 * (1 - ratio))  # exactly so many in each image
    return images * F.interpolate(keep.view(-1, 1, grid, grid).to(images.dtype), images.shape[2:])


def drop_patches(x, ratio):
    """[n, 1 + L, width] -> [n, 1 + keep, width]: the class token and a random 1 - ratio of the patches.

    The patch dropping of Eq. 12, as in MAE, after a ViT has added the positions; drawn on the device of x.
    """
    patches = x.shape[1] - 1
    kept = torch.rand(len(x), patches, device=x.device).topk(max(1, int(patches * (1 - ratio)))).indices
    return torch.cat([x[:, :1], x[:, 1:].take_along_dim(kept[:, :, None], dim=1)], dim=1)


def recalls(query, key, query_owner, key_owner):
    """{"R@k": percent of queries [Q, D] with a key [K, D] of the same owner (a number) among the k nearest}.

    By 1024 queries at a time: never a Q x K matrix.
    """
    hits = []
    for q, q_owner in zip(query.split(1024), query_owner.split(1024)):
        nearest = (q @ key.T).topk(min(10, len(key))).indices  # [1024, 10]
        hits.append(q_owner[:, None] == key_owner[nearest])
    hits = torch.cat(hits)
    return {f"R@{k}": 100 * hits[:, :k].any(1).double().mean().item() for k in (1, 5, 10)}


def pair_gap(img, txt, owner):
    """Mean similarity of matching minus others (Fig. 2b); img [I, D], txt [C, D], owner [C]: its image."""
    img, txt = img.double(), txt.double()
    matching, every = (img[owner] * txt).sum(), img.sum(0) @ txt.sum(0)  # no I x C matrix: sums are linear
    return matching / len(txt) - (every - matching) / (len(img) * len(txt) - len(txt))


def linear_cka(x, y):
    """Linear CKA of rows x [N, D], y [N, E] (Fig. 3), 0..1: |Y^T X|^2 / (|X^T X| |Y^T Y|), columns centred.

    Frobenius norms; does not change when either side is rotated or scaled (Kornblith et al. 2019).
    """
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    return (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


def retrieval(img, txt, owner, img_t=None, txt_t=None):
    """{metric: value} of images [I, D] and captions [C, D]; owner [C]: its image, numbered as they come.

    Recalls in percent both ways, where every caption of an image counts, and R@1 with its first caption only,
    as in the paper's tables; pair_gap (Fig. 2b); with the teacher's rows linear CKA and mean cosine (Fig. 3).
    """
    own = torch.arange(len(img), device=img.device)
    scores = {f"I2T {k}": v for k, v in recalls(img, txt, own, owner).items()}
    scores |= {f"T2I {k}": v for k, v in recalls(txt, img, owner, own).items()}
    if len(txt) > len(img):
        first = owner.cummax(0).values.diff(prepend=owner[:1] - 1) > 0  # where an image is new
        scores["first-caption I2T R@1"] = recalls(img, txt[first], own, own)["R@1"]
        scores["first-caption T2I R@1"] = recalls(txt[first], img, own, own)["R@1"]
    scores["positive - negative"] = pair_gap(img, txt, owner).item()
    for kind, s, t in ("image", img, img_t), ("text", txt, txt_t):
        if t is not None:
            scores[f"{kind} CKA"] = linear_cka(s, t).item()
            scores |= {f"{kind} cosine": (s * t).sum(1).mean().item()} if s.shape == t.shape else {}
    return scores
