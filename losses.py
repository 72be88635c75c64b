"""The losses of CLIP-KD (Yang et al., CVPR 2024, https://arxiv.org/abs/2307.12732).

Each loss is a function of embeddings, with no state and no trainable parameters of its own. All of
them use these names and shapes:

    img_s, txt_s    [N, D_s]  the student's embeddings of N images and their N texts (v^S and s^S)
    img_t, txt_t    [N, D_t]  the teacher's embeddings of them, without gradient (v^T and s^T)
    scale, scale_*  []        1/tau, an inverse temperature: it starts at 14.3 and is at most 100

Row k of all four belongs to pair k. Normalise the rows to unit length before the call, with
F.normalize(x, dim=1). N is the number of pairs that a softmax runs over, which the paper calls |B|.
When several processes share a batch, gather() collects the embeddings of all of them.

Some losses average over `anchors`, a slice of the N pairs, which is all of them by default. A
process that passes just its own pairs computes only its share, and the loss of the whole batch is
the mean over the processes.

To use a loss in your own project, copy its function and in_float32 below. afd_loss also needs
clip_loss, and mfd_loss needs fd_loss.
"""

import functools

import torch
import torch.distributed as dist
import torch.nn.functional as F


def in_float32(loss):
    """Decorator: compute the loss in float32, even if it is called under autocast.

    Near 100, which logits can reach, neighbouring numbers in bfloat16 are 0.5 apart. Arguments in
    float64 stay in float64. You can read the losses below as if this decorator were not there.
    """

    def widen(x):
        if isinstance(x, torch.Tensor) and x.dtype in (torch.float16, torch.bfloat16):
            return x.float()
        return x

    @functools.wraps(loss)
    def wide_loss(*args, **kwargs):
        args = [widen(x) for x in args]
        kwargs = {name: widen(x) for name, x in kwargs.items()}
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return loss(*args, **kwargs)

    return wide_loss


@in_float32
def clip_loss(img, txt, scale, anchors=slice(None)):
    """The task itself: each image finds its text among N, and each text finds its image. Eq. 1-3.

        L_I->T = -1/N sum_k log( exp(v_k . s_k / tau) / sum_b exp(v_k . s_b / tau) )
        L_T->I = the same with v and s exchanged
        L_CLIP = (L_I->T + L_T->I) / 2

    Shapes: img, txt [N, D]; scale [] is 1/tau.
    Returns: [] in nats. It is log N when all embeddings are equal.
    Reduction: the mean over the anchors k and over both directions. The weight lambda is 1.
    Authors' code: the same.
    """
    target = torch.arange(len(img), device=img.device)[anchors]  # anchor k's partner is row k
    # Both products are logits [anchors, N]: one row for each anchor, one column for each candidate.
    i2t = F.cross_entropy(scale * img[anchors] @ txt.T, target)
    t2i = F.cross_entropy(scale * txt[anchors] @ img.T, target)
    return (i2t + t2i) / 2


@in_float32
def crd_loss(img_s, txt_s, img_t, txt_t, scale_s, scale_t, anchors=slice(None)):
    """Contrastive relational distillation: copy the teacher's softmax over the batch. Eq. 4-10.

        p_k[j] = exp(v_k . s_j / tau) / sum_b exp(v_k . s_b / tau)    for both models: p^T, p^S
        L_I->T = 1/N sum_k sum_j p^T_k[j] log( p^T_k[j] / p^S_k[j] )
        L_T->I = the same with v and s exchanged
        L_CRD  = (L_I->T + L_T->I) / 2

    Shapes: img_s, txt_s [N, D_s]; img_t, txt_t [N, D_t]; scale_* [] is 1/tau. D_s, D_t may differ.
    Returns: [] in nats. It is 0 when student and teacher have the same logits.
    Reduction: the mean over the anchors k and over both directions. The weight lambda is 1.
    Authors' code: the same. Eq. 10 shows the sum of both directions, which is twice this value.
    """

    def one_direction(from_s, to_s, from_t, to_t):
        log_p_s = (scale_s * from_s[anchors] @ to_s.T).log_softmax(dim=1)  # [anchors, N]
        log_p_t = (scale_t * from_t[anchors] @ to_t.T).log_softmax(dim=1)
        return F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True)  # KL(p^T || p^S)

    i2t = one_direction(img_s, txt_s, img_t, txt_t)
    t2i = one_direction(txt_s, img_s, txt_t, img_t)
    return (i2t + t2i) / 2


@in_float32
def fd_loss(img_s, txt_s, img_t, txt_t):
    """Feature distillation: put every embedding where the teacher's is. Eq. 11.

        L_FD = 1/(N D) sum_k ( |v^T_k - v^S_k|^2 + |s^T_k - s^S_k|^2 )
             = (4 - 2 cos_img - 2 cos_txt) / D                 where cos_* are mean cosines

    Shapes: all [N, D]. If the student's width differs, project its embeddings first.
    Returns: [] in squared distance per dimension. It is about 4/D for a student that knows nothing.
    Reduction: the mean over N *and* D of each squared difference, as the weight of 2000 assumes.
    Authors' code: the same. Eq. 11 sums over D instead, so its weight would be 2000/D.
    """
    return F.mse_loss(img_s, img_t) + F.mse_loss(txt_s, txt_t)


@in_float32
def mfd_loss(img_s_masked, txt_s, img_t, txt_t):
    """Masked feature distillation: FD, but the student sees only a part of each image. Eq. 12.

        L_MFD = 1/(N D) sum_k ( |v^T_k - v~^S_k|^2 + |s^T_k - s^S_k|^2 )   v~: from masked images

    Shapes: all [N, D]. The teacher sees the whole image, and no text is masked. encode_masked
    (clipkd.py) masks the images, with drop_patches or blank_patches below.
    Returns: [] in squared distance per dimension. It equals fd_loss when nothing is masked.
    Reduction: as in fd_loss. The weight lambda is 2000 in the paper.
    Authors' code: overwrites the masked embedding with the whole image's, which leaves plain FD.
    """
    return fd_loss(img_s_masked, txt_s, img_t, txt_t)


@in_float32
def gd_loss(img_s, txt_s, img_t, txt_t, scale_s, scale_t):
    """Gradient distillation: match the gradients of the teacher's task loss. Eq. 13, 19-25.

        P[k,b] = softmax_b(v_k . s_b / tau),   Q[k,b] = softmax_k(v_k . s_b / tau)
        G = (P + Q)/2 - I
        dL_CLIP/dv_k = 1/(N tau) sum_b G[k,b] s_b,    dL_CLIP/ds_b = 1/(N tau) sum_k G[k,b] v_k
        L_GD = 1/(N D) sum_k ( |dL^T/dv^T_k - dL^S/dv^S_k|^2 + |dL^T/ds^T_k - dL^S/ds^S_k|^2 )

    Shapes: all [N, D]; scale_* [] is 1/tau. No intermediate tensor exceeds N x N or N x D.
    Returns: [] in squared gradient per dimension. It is 0 when student and teacher are equal.
    Reduction: the mean over N and D of squared differences between gradients, which contain the 1/N
    of L_CLIP. The value therefore shrinks as 1/N^2, and the paper's weight 1e8 is for N = 1024.
    Authors' code: passes 1/tau as tau, builds an N x N x D tensor and compares the gradients of the
    two directions separately.
    """

    def task_gradients(img, txt, scale):
        logits = scale * img @ txt.T  # [N, N]
        g = (logits.softmax(dim=1) + logits.softmax(dim=0)) / 2
        g.diagonal().sub_(1)
        img_gradient = scale / len(img) * (g @ txt)  # [N, D]
        txt_gradient = scale / len(img) * (g.T @ img)
        return img_gradient, txt_gradient

    img_gradient_s, txt_gradient_s = task_gradients(img_s, txt_s, scale_s)
    img_gradient_t, txt_gradient_t = task_gradients(img_t, txt_t, scale_t)
    return F.mse_loss(img_gradient_s, img_gradient_t) + F.mse_loss(txt_gradient_s, txt_gradient_t)


@in_float32
def icl_loss(img_s, txt_s, img_t, txt_t, scale, anchors=slice(None)):
    """Interactive contrastive learning: find the partner among the teacher's embeddings. Eq. 14-16.

        L_I->T = -1/N sum_k log( exp(v^S_k . s^T_k / tau) / sum_b exp(v^S_k . s^T_b / tau) )
        L_T->I = -1/N sum_k log( exp(s^S_k . v^T_k / tau) / sum_b exp(s^S_k . v^T_b / tau) )
        L_ICL  = (L_I->T + L_T->I) / 2

    Shapes: all [N, D]; scale [] is 1/tau. ICL has a learnable scale of its own.
    Returns: [] in nats. It equals the teacher's clip_loss when student and teacher are equal.
    Reduction: the mean over the anchors k and over both directions. The weight lambda is 1.
    Authors' code: multiplies by the log scale, ln(1/0.07) = 2.66 at first, with no exp() or clamp.
    """
    target = torch.arange(len(img_s), device=img_s.device)[anchors]  # anchor k's partner is row k
    i2t = F.cross_entropy(scale * img_s[anchors] @ txt_t.T, target)
    t2i = F.cross_entropy(scale * txt_s[anchors] @ img_t.T, target)
    return (i2t + t2i) / 2


@in_float32
def afd_loss(img_s, txt_s, img_t, txt_t, fuse_img, fuse_txt, scale, anchors=slice(None)):
    """Augmented feature distillation: the task loss on fused embeddings. Eq. 17.

        v^A_k = fuse_img([v^S_k ; v^T_k]),  s^A_k = fuse_txt([s^S_k ; s^T_k])
        L_AFD = L_CLIP(v^A / |v^A|, s^A / |s^A|)

    Shapes: img_s, txt_s [N, D_s]; img_t, txt_t [N, D_t]. D_s, D_t may differ. fuse_img and fuse_txt
    are linear layers [N, D_s + D_t] -> [N, D]; scale [] is 1/tau, learned for AFD alone.
    Returns: [] in nats. It equals the student's clip_loss if the layers copy the student's part.
    Reduction: as in clip_loss. The paper does not give the weight; 1 is a natural choice.
    Authors' code: takes no exp() of the scale, as in ICL, and fails if D_s and D_t differ.
    """
    img = F.normalize(fuse_img(torch.cat([img_s, img_t], dim=1)), dim=1)  # [N, D]
    txt = F.normalize(fuse_txt(torch.cat([txt_s, txt_t], dim=1)), dim=1)
    return clip_loss(img, txt, scale, anchors)


# --------------------------------------------------------------------------------------------------
# Two things that the losses rely on: gathering embeddings from all processes, and masking images.


class Gather(torch.autograd.Function):
    """The embeddings of all processes, in the order of their ranks: [n, D] -> [N, D].

    In the backward pass an embedding receives gradients from the losses of all processes. They are
    summed here, and DDP later divides by the number of processes. The result is the gradient of the
    mean of the processes' losses, which is what one process would compute on the whole batch.
    """

    @staticmethod
    def forward(ctx, x):
        everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, x.contiguous())
        return torch.cat(everyone)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """[n, D] -> [N, D], with gradients. If there are no other processes, it returns x itself."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    return Gather.apply(x)


def drop_patches(tokens, ratio):
    """Drop a random share of the patches from a ViT's sequence, as MAE does. Eq. 12.

    tokens: [n, 1 + L, width], a class token and L patches, with positional embeddings added.
    Returns [n, 1 + kept, width]. Each image loses different patches, and the class token stays.
    """
    num_patches = tokens.shape[1] - 1
    num_kept = max(1, int(num_patches * (1 - ratio)))
    noise = torch.rand(len(tokens), num_patches, device=tokens.device)
    kept = noise.topk(num_kept).indices  # [n, kept]
    class_token = tokens[:, :1]
    patches = tokens[:, 1:].take_along_dim(kept[:, :, None], dim=1)
    return torch.cat([class_token, patches], dim=1)


def blank_patches(images, ratio, grid=14):
    """In normalised images [n, 3, H, W], set a random share of the patches to 0, the mean colour.

    This stands in for drop_patches where the image tower is not a ViT and has no sequence to drop
    from. The grid is 14 x 14, like that of 16 x 16 pixel patches in an image of 224 x 224.
    """
    noise = torch.rand(len(images), grid**2, device=images.device)
    rank = noise.argsort(dim=1).argsort(dim=1)  # each patch's random rank in its image
    num_kept = max(1, int(grid**2 * (1 - ratio)))
    kept = rank < num_kept
    mask = kept.view(-1, 1, grid, grid).to(images.dtype)
    return images * F.interpolate(mask, images.shape[2:])
