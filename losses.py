"""The losses of CLIP-KD (Yang et al., CVPR 2024, arXiv 2307.12732), one pure function each. Nothing here has state.

name            shape         paper     contract
img_s, txt_s    [N, D_s]      v^S, s^S  student rows, unit length; row k of both belongs to pair k
img_t, txt_t    [N, D_t]      v^T, s^T  teacher rows, unit length, computed without gradient
scale, scale_*  []            1/tau     inverse temperature with exp() already applied: 14.3 at the start, 100 at most
N               |B|           the whole batch that the softmax sees. On several processes gather the rows first.
rows            k             the anchors to average over, all by default. A process that passes only its own, of
                              gathered rows, does its share of the work; the loss is the mean over the processes

Normalise the rows before the call: F.normalize(x, dim=1). Every function computes in float32 (float64 stays float64),
whatever autocast says around it: in bfloat16 a logit near 100 has a step of 0.5.
To use one elsewhere, copy that function and the two imports (AFD also needs clip_loss, MFD also needs fd_loss).
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

        p_k[j] = exp(v_k . s_j / tau) / sum_b exp(v_k . s_b / tau)    p^T: teacher's rows and tau, p^S: student's
        L_I->T = 1/N sum_k sum_j p^T_k[j] log(p^T_k[j] / p^S_k[j]),    L_T->I = the same with v and s exchanged
        L_CRD = (L_I->T + L_T->I) / 2

    Shapes: img_s, txt_s [N, D_s]; img_t, txt_t [N, D_t]; unit rows; D_s and D_t may differ. scale_* [] = 1/tau.
    Returns: [] in nats; 0 when scale_s times the student's similarities is scale_t times the teacher's, on any axes.
    Reduction: mean over the anchors k in `rows` and over the two directions; weight --lambda-crd 1.
    Authors' code: the same. Eq. 10 prints the sum of the directions, twice this value.
    """
    with torch.autocast(img_s.device.type, enabled=False):
        img_s, txt_s, img_t, txt_t = (
            x.to(torch.promote_types(x.dtype, torch.float32)) for x in (img_s, txt_s, img_t, txt_t))
        directions = []
        for v_s, s_s, v_t, s_t in ((img_s, txt_s, img_t, txt_t), (txt_s, img_s, txt_t, img_t)):
            log_p_s = (scale_s * v_s[rows] @ s_s.T).log_softmax(1)  # [rows, N]: anchor k against every partner
            log_p_t = (scale_t * v_t[rows] @ s_t.T).log_softmax(1)
            directions.append(F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True))  # KL(p^T || p^S)
        return sum(directions) / 2


def fd_loss(img_s, txt_s, img_t, txt_t):
    """Feature distillation: put every student row where the teacher's is. Eq. 11.

        L_FD = 1/(N D) sum_k ( |v^T_k - v^S_k|^2 + |s^T_k - s^S_k|^2 ) = (4 - 2 mean cos_img - 2 mean cos_txt) / D

    Shapes: all [N, D], unit rows; needs D_s == D_t: project the student first where they differ.
    Returns: [] in squared distance per dimension; 0 when student = teacher, about 4/D for a random student.
    Reduction: mean over N AND D, image term + text term; this is what the weight --lambda-fd 2000 belongs to.
    Authors' code: the same. Eq. 11 prints the sum over D: there the same pull has the weight 2000/D (3.9 at D = 512).
    """
    img_s, txt_s, img_t, txt_t = (
        x.to(torch.promote_types(x.dtype, torch.float32)) for x in (img_s, txt_s, img_t, txt_t))
    return F.mse_loss(img_s, img_t) + F.mse_loss(txt_s, txt_t)


def mfd_loss(img_s_masked, txt_s, img_t, txt_t):
    """Masked feature distillation: FD, but the student saw only part of each image. Eq. 12.

        L_MFD = 1/(N D) sum_k ( |v^T_k - v~^S_k|^2 + |s^T_k - s^S_k|^2 ),    v~ = student row of the masked image

    Shapes: all [N, D], unit rows; needs D_s == D_t. The teacher sees the whole image, and no text is masked.
    The masking itself is Distiller.encode_masked in clipkd.py.
    Returns: [] in squared distance per dimension; equals fd_loss at mask ratio 0.
    Reduction: as fd_loss; weight --lambda-mfd 2000.
    Authors' code: computes the masked row, then overwrites it with that of the whole image, so that MFD is FD.
    """
    return fd_loss(img_s_masked, txt_s, img_t, txt_t)


def gd_loss(img_s, txt_s, img_t, txt_t, scale_s, scale_t):
    """Gradient distillation: feel the same pull of the task loss on every row as the teacher. Eq. 13, 19-25.

        dL_CLIP/dv_k = 1/(N tau) sum_b G[k,b] s_b,    dL_CLIP/ds_b = 1/(N tau) sum_k G[k,b] v_k
        G = (P + Q)/2 - I,    P[k,b] = softmax_b(v_k . s_b / tau),    Q[k,b] = softmax_k(v_k . s_b / tau)
        L_GD = 1/(N D) sum_k ( |dL^T/dv^T_k - dL^S/dv^S_k|^2 + |dL^T/ds^T_k - dL^S/ds^S_k|^2 )

    Shapes: all [N, D], unit rows; needs D_s == D_t; scale_* [] = 1/tau. No tensor is larger than N x N or N x D.
    Returns: [] in squared gradient per dimension; 0 when student = teacher and the scales are equal.
    Reduction: mean over N and D of gradients that carry the 1/N of L_CLIP, so the value falls as 1/N^2:
    the paper's --lambda-gd 1e8 is for N = 1024.
    Authors' code: passes 1/tau as tau, builds N x N x D, and compares the four one-directional gradients apart.
    """
    def task_gradient(img, txt, scale):
        logits = scale * img @ txt.T  # [N, N]
        g = (logits.softmax(1) + logits.softmax(0)) / 2
        g.diagonal().sub_(1)
        return scale / len(img) * (g @ txt), scale / len(img) * (g.T @ img)  # [N, D] of the images, of the texts

    with torch.autocast(img_s.device.type, enabled=False):
        img_s, txt_s, img_t, txt_t = (
            x.to(torch.promote_types(x.dtype, torch.float32)) for x in (img_s, txt_s, img_t, txt_t))
        (gi_t, gt_t), (gi_s, gt_s) = task_gradient(img_t, txt_t, scale_t), task_gradient(img_s, txt_s, scale_s)
        return F.mse_loss(gi_s, gi_t) + F.mse_loss(gt_s, gt_t)


def icl_loss(img_s, txt_s, img_t, txt_t, scale, rows=slice(None)):
    """Interactive contrastive learning: a student row finds its partner among the teacher's rows. Eq. 14-16.

        L_I->T = -1/N sum_k log( exp(v^S_k . s^T_k / tau) / sum_b exp(v^S_k . s^T_b / tau) )
        L_T->I = -1/N sum_k log( exp(s^S_k . v^T_k / tau) / sum_b exp(s^S_k . v^T_b / tau) ),    L_ICL = their mean

    Shapes: all [N, D], unit rows; needs D_s == D_t; scale [] = 1/tau, learnable, ICL's own.
    Returns: [] in nats; equals clip_loss of the teacher when student = teacher, log N when all rows are equal.
    Reduction: mean over the anchors k in `rows` and over the two directions; weight --lambda-icl 1.
    Authors' code: multiplies by the parameter ln(1/0.07) = 2.66 itself, without exp() and without a clamp.
    """
    with torch.autocast(img_s.device.type, enabled=False):
        img_s, txt_s, img_t, txt_t = (
            x.to(torch.promote_types(x.dtype, torch.float32)) for x in (img_s, txt_s, img_t, txt_t))
        pair = torch.arange(len(img_s), device=img_s.device)[rows]  # the right answer of anchor k is k
        i2t = F.cross_entropy(scale * img_s[rows] @ txt_t.T, pair)  # logits [rows, N]
        t2i = F.cross_entropy(scale * txt_s[rows] @ img_t.T, pair)
        return (i2t + t2i) / 2


def afd_loss(img_s, txt_s, img_t, txt_t, fuse_img, fuse_txt, scale, rows=slice(None)):
    """Augmented feature distillation: the task loss on student and teacher rows fused. Eq. 17.

        v^A_k = phi_v([v^S_k ; v^T_k]),    s^A_k = phi_t([s^S_k ; s^T_k]),    L_AFD = L_CLIP(v^A/|v^A|, s^A/|s^A|)

    Shapes: img_s, txt_s [N, D_s]; img_t, txt_t [N, D_t]; unit rows; D_s and D_t may differ.
    fuse_img, fuse_txt: callables [N, D_s + D_t] -> [N, D], one linear layer each; scale [] = 1/tau, AFD's own.
    Returns: [] in nats; equals clip_loss of the student when the fusion keeps just the student's part.
    Reduction: as clip_loss; weight --lambda-afd 1 (the paper does not give it).
    Authors' code: scale without exp() as in ICL; a shape error when D_s != D_t.
    """
    with torch.autocast(img_s.device.type, enabled=False):
        img_s, txt_s, img_t, txt_t = (
            x.to(torch.promote_types(x.dtype, torch.float32)) for x in (img_s, txt_s, img_t, txt_t))
        img = F.normalize(fuse_img(torch.cat([img_s, img_t], dim=1)), dim=1)  # [N, D]
        txt = F.normalize(fuse_txt(torch.cat([txt_s, txt_t], dim=1)), dim=1)
        return clip_loss(img, txt, scale, rows)


# ---- Not losses: what hides patches for MFD, and the measures of the evaluation. ----

def blank_patches(images, ratio, grid=14):
    """Images [n, 3, H, W] with `ratio` of the patches of a grid x grid set to 0 (the mean colour), at random in each.

    Stands in for the patch dropping of Eq. 12 where the image tower is no ViT: patches of 16 pixels at 224.
    """
    noise = torch.rand(len(images), grid**2, device=images.device)
    keep = noise.argsort(1).argsort(1) < int(grid**2 * (1 - ratio))  # exactly so many in each image
    return images * F.interpolate(keep.view(-1, 1, grid, grid).to(images.dtype), images.shape[2:])


def recalls(query, key, query_owner, key_owner):
    """{"R@k": percent of queries [Q, D] with a key [K, D] of the same owner (image number) among the k nearest}.

    By 1024 queries at a time: never a Q x K matrix.
    """
    hits = torch.cat([q_owner[:, None] == key_owner[(q @ key.T).topk(min(10, len(key))).indices]
                      for q, q_owner in zip(query.split(1024), query_owner.split(1024))])  # [Q, 10]
    return {f"R@{k}": 100 * hits[:, :k].any(1).double().mean().item() for k in (1, 5, 10)}


def pair_gap(img, txt, owner):
    """Mean similarity of matching minus other pairs (Fig. 2b); img [I, D], txt [C, D], owner [C]: a caption's image."""
    img, txt = img.double(), txt.double()
    matching, every = (img[owner] * txt).sum(), img.sum(0) @ txt.sum(0)  # no I x C matrix: sums are linear
    return matching / len(txt) - (every - matching) / (len(img) * len(txt) - len(txt))


def linear_cka(x, y):
    """Linear CKA of rows x [N, D] and y [N, E] (Fig. 3), 0..1: |Y^T X|^2 / (|X^T X| |Y^T Y|), columns centred.

    Frobenius norms; does not change when either side is rotated or scaled (Kornblith et al. 2019).
    """
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    return (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
