"""How the students of this grid's runs were started: what `xp` in their options means.

`experiment` ran behind `copy_teacher_weights` and `fit_gate`, in front of the calibration. A record; nothing calls it.

Options: `ks`: factor of K, Q is divided by it; `twins`: the second half of the states has K and Q with their signs
turned, so that `silu(k) silu(q) + silu(-k) silu(-q)` is `k q / 2` and something positive; `tX`, `tB`: factors of the
taps of x, and of B and C; `cX`, `cB`: the convolution's biases there; `const`: one state of B and C is a constant, of
that product; `G`: time steps `G` times as long, of decays that are slower by as much; `groups`: B of three groups, the
teacher's key heads, C the mean of the query heads of each.

Shapes: `g` group, `n` state, `d` width.
"""

import math

import torch

from cab_hf.models.mixers import inverse_softplus


@torch.no_grad()
def experiment(student, teacher, o):
    c = student.config
    g, n, width, H = c.n_groups, c.state_size, c.mixer_width, c.num_heads
    b0, c0, d0 = 2 * width, 2 * width + g * n, 2 * width + 2 * g * n
    act = c.conv_activation
    for index, blk in enumerate(student.base_model.layers):
        m = blk.mixer
        W = m.in_proj.weight
        B, C = W[b0:c0].unflatten(0, (g, n)), W[c0:d0].unflatten(0, (g, n))
        if o.get("groups"):  # GQA: keys as groups, mean of queries
            a = teacher.model.layers[index].self_attn
            p = c.head_dim
            kv = len(a.v_proj.weight) // p
            r = H // kv
            W[width:b0] = a.v_proj.weight.unflatten(0, (kv, p)).repeat_interleave(r, 0).flatten(0, 1)
            B.zero_()
            B[:, :p] = a.k_proj.weight.unflatten(0, (kv, p))
            C[:, :p] = a.q_proj.weight.unflatten(0, (kv, r, p)).mean(1) * p**-0.5
            m.out_proj.weight.copy_(a.o_proj.weight)
            W[d0:] = 0
        ks = o.get("ks", 1.0)
        B *= ks
        C /= ks
        if o.get("twins"):
            h = c.head_dim
            B[:, h : 2 * h] = -B[:, :h]
            C[:, h : 2 * h] = -C[:, :h]
        cw, cb = m.conv1d.weight, m.conv1d.bias
        cw[:width] *= o.get("tX", 1.0)
        cw[width:] *= o.get("tB", 1.0)
        cb[:width] = o.get("cX", 0.0)
        cb[width:] = o.get("cB", 0.0)
        if o.get("const"):
            B[:, -1] = 0
            C[:, -1] = 0
            cb[width : width + g * n].view(g, n)[:, -1] = 1.0 if act is None else 1.2785
            cb[width + g * n :].view(g, n)[:, -1] = o["const"]
        G = o.get("G", 1.0)
        if G != 1.0:
            m.A_log.fill_(-math.log(G))
            m.dt_bias.copy_(inverse_softplus(m.averaging_time_steps(H) * G))
