"""data2vec 1.0's forward pass in plain numpy, float64, from their flags and under their names.

Written from docs/spec/pretraining.md apart from the code, with loops and their axis orders, so that
flags that no recorded case has can be compared too. B rows, T positions, D width, K layers.
"""

import math

import numpy as np

erf = np.vectorize(math.erf)


def gelu(x):
    return 0.5 * x * (1.0 + erf(x / math.sqrt(2.0)))


def norm(x, axes=-1, eps=1e-5):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)


def affine(s, name, x, eps=1e-5):
    return norm(x, -1, eps) * s[f"{name}.weight"] + s[f"{name}.bias"]


def linear(s, name, x):
    return x @ s[f"{name}.weight"].T + s.get(f"{name}.bias", 0.0)


def conv(x, weight, bias, stride=1, groups=1):
    """x [B, C, T], weight [out, C / groups, taps]."""
    out, per_group, taps = weight.shape
    frames = (x.shape[-1] - taps) // stride + 1
    y = np.zeros((len(x), out, frames))
    for o in range(out):
        first = o // (out // groups) * per_group
        for f in range(frames):
            part = x[:, first : first + per_group, f * stride : f * stride + taps]
            y[:, o, f] = (part * weight[o]).sum((1, 2))
    return y + (0.0 if bias is None else bias[:, None])


def attention(q, k, v, heads, padding=None, bias=0.0):
    """q, k, v [B, T, D], padding [B, T] True at pads, bias [heads, T, T]."""
    B, T, D = q.shape
    out = np.zeros((B, T, D))
    for b in range(B):
        for h in range(heads):
            part = slice(h * D // heads, (h + 1) * D // heads)
            logits = q[b, :, part] @ k[b, :, part].T / math.sqrt(D // heads)
            logits = logits + (bias[h] if np.ndim(bias) else bias)
            if padding is not None:
                logits[:, padding[b]] = -np.inf
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            out[b, :, part] = weights / weights.sum(-1, keepdims=True) @ v[b, :, part]
    return out


def fairseq_layers(s, x, padding, depth, heads, first):
    """Outputs of layers and of their feed-forward parts. first: norms come first."""
    layers, results = [], []
    for l in range(depth):
        name = f"layers.{l}"

        def attend(x, name=f"{name}.self_attn"):
            q, k, v = (linear(s, f"{name}.{p}_proj", x) for p in "qkv")
            return linear(s, f"{name}.out_proj", attention(q, k, v, heads, padding))

        def feed(x, name=name):
            return linear(s, f"{name}.fc2", gelu(linear(s, f"{name}.fc1", x)))

        if first:
            x = x + attend(affine(s, f"{name}.self_attn_layer_norm", x))
            result = feed(affine(s, f"{name}.final_layer_norm", x))
            x = x + result
        else:
            x = affine(s, f"{name}.self_attn_layer_norm", x + attend(x))
            result = feed(x)
            x = affine(s, f"{name}.final_layer_norm", x + result)
        layers.append(x)
        results.append(result)
    return layers, results


def fairseq_targets(results, m, turn_early):
    """results: K arrays [B, T, D]. turn_early: text turns to [B, T, D] before the last norms."""
    ys = [r.transpose(1, 0, 2) for r in results]  # [T, B, D], as there
    turned = m.get("instance_norm_target_layer") or m.get("batch_norm_target_layer")
    if turned:
        ys = [y.transpose(1, 2, 0) for y in ys]  # [B, D, T]
        if m.get("batch_norm_target_layer"):
            ys = [norm(y, (0, 2)) for y in ys]
        if m.get("instance_norm_target_layer"):
            ys = [norm(y, -1) for y in ys]
        ys = [y.transpose(0, 2, 1) for y in ys]  # [B, T, D]
    if m.get("group_norm_target_layer"):
        ys = [norm(y, (-2, -1)) for y in ys]
    if m.get("layer_norm_target_layer"):
        ys = [norm(y, -1) for y in ys]
    y = sum(ys) / len(ys)
    turned_mean = y if turned else y.transpose(1, 0, 2)
    y = turned_mean if turn_early else y
    if m.get("layer_norm_targets"):
        y = norm(y, -1)
    if m.get("instance_norm_targets"):
        y = norm(y.transpose(0, 2, 1), -1).transpose(0, 2, 1)
    full = y if turn_early or turned else y.transpose(1, 0, 2)
    ys = ys if turned else [y.transpose(1, 0, 2) for y in ys]
    return dict(target_layers_normed=np.stack(ys), target_avg=turned_mean, target_full=full)


def beit_targets(results, g):
    """results: K arrays [B, T, D]."""
    ys = results
    if g.get("target_batch_norm"):
        ys = [norm(y, (0, 1)) for y in ys]
    if g.get("target_instance_norm"):
        ys = [norm(y, 1) for y in ys]
    if g.get("target_layer_norm_last", True):
        ys = [norm(y, -1) for y in ys]
    mean = full = sum(ys) / len(ys)
    if g.get("post_target_instance_norm"):
        full = norm(full, 1)
    if g.get("post_target_layer_norm"):
        full = norm(full, -1)
    return dict(target_layers_normed=np.stack(ys), target_avg=mean, target_full=full)


def fairseq_loss(pred, target, beta, scale):
    d = pred - target
    each = smooth_l1(d, beta) if beta else d**2
    return each.sum() * (scale if scale is not None else 1.0 / math.sqrt(d.shape[-1]))


def smooth_l1(d, beta):
    if beta == 0:
        return np.abs(d)
    return np.where(np.abs(d) < beta, d**2 / (2 * beta), np.abs(d) - beta / 2)


def inside(s, prefix):
    return {k.removeprefix(prefix): v for k, v in s.items() if k.startswith(prefix)}


def speech(info, a, student, teacher):
    m = info["model"]
    convs = eval(m["conv_feature_layers"])
    pads = a.get("batch/padding_mask")

    def features(s):
        x = a["batch/source"][:, None]
        for i, (_, _, stride) in enumerate(convs):
            name = f"feature_extractor.conv_layers.{i}"
            x = conv(x, s[f"{name}.0.weight"], s.get(f"{name}.0.bias"), stride)
            if m.get("extractor_mode") == "layer_norm":
                x = affine(s, f"{name}.2.1", x.transpose(0, 2, 1)).transpose(0, 2, 1)
            elif i == 0:
                x = norm(x, -1) * s[f"{name}.2.weight"][:, None] + s[f"{name}.2.bias"][:, None]
            x = gelu(x)
        return linear(s, "post_extract_proj", affine(s, "layer_norm", x.transpose(0, 2, 1)))

    def encode(s, x):
        if padding is not None:
            x = np.where(padding[..., None], 0.0, x)
        y = x.transpose(0, 2, 1)
        depth, groups = m.get("pos_conv_depth", 1), m.get("conv_pos_groups", 16)
        for i in range(depth):
            if depth == 1:
                v = s["pos_conv.0.weight_v"]
                length = np.sqrt((v**2).sum((0, 1), keepdims=True))
                weight, bias = s["pos_conv.0.weight_g"] * v / length, s["pos_conv.0.bias"]
            else:
                weight, bias = s[f"pos_conv.{i}.0.weight"], s[f"pos_conv.{i}.0.bias"]
            half = weight.shape[-1] // 2
            y = conv(np.pad(y, ((0, 0), (0, 0), (half, half))), weight, bias, 1, groups)
            y = y[:, :, : x.shape[1]]
            y = gelu(y if depth == 1 else norm(y, 1))
        first = m.get("layer_norm_first", False)
        x = x + y.transpose(0, 2, 1)
        x = x if first else affine(s, "layer_norm", x)
        heads = m["encoder_attention_heads"]
        layers, results = fairseq_layers(s, x, padding, m["encoder_layers"], heads, first)
        return layers, results, affine(s, "layer_norm", layers[-1]) if first else layers[-1]

    x, padding = features(student), None
    if pads is not None and pads.any():
        frames = (pads == 0).sum(-1)
        for _, taps, stride in convs:
            frames = (frames - taps) // stride + 1
        padding = np.arange(x.shape[1]) >= frames[:, None]
    mask = a["batch/mask_indices"] == 1
    whole = not (m.get("ema_transformer_only", True) or m.get("ema_layers_only", True))
    masked = np.where(mask[..., None], student["mask_emb"], x)
    layers, _, last = encode(inside(student, "encoder."), masked)
    own = inside(teacher, "encoder.") if whole else teacher
    _, results, _ = encode(own, features(teacher) if whole else x)
    results = results if whole else results[-m["average_top_k_layers"] :]
    out = fairseq_targets(results, m, turn_early=False)
    pred, target = linear(student, "final_proj", last[mask]), out["target_full"][mask]
    loss = fairseq_loss(pred, target, m.get("loss_beta", 0), m.get("loss_scale"))
    return out | dict(
        features_proj=x,
        student_layer_out=np.stack(layers),
        student_encoder_out=last,
        target_layers_raw=np.stack(results),
        pred=pred,
        target=target,
        loss=loss,
    )


def text(info, a, student, teacher):
    m, e, width = info["model"], info["encoder"], info["encoder"]["embed_dim"]
    first = e.get("normalize_before", False)

    def encode(s, tokens):
        padding = tokens == 1
        places = np.where(padding, 1, np.cumsum(~padding, -1) + 1)
        scale = 1.0 if info["transformer"].get("no_scale_embedding") else math.sqrt(width)
        x = s["embed_tokens.weight"][tokens] * scale + s["embed_positions.weight"][places]
        x = np.where(padding[..., None], 0.0, affine(s, "layernorm_embedding", x))
        layers, results = fairseq_layers(s, x, padding, e["layers"], e["attention_heads"], first)
        return layers, results, affine(s, "layer_norm", layers[-1]) if first else layers[-1]

    mask = a["batch/mask_indices"] == 1
    own = inside(student, "encoder.sentence_encoder.")
    layers, _, last = encode(own, a["batch/src_tokens"])
    _, results, _ = encode(teacher, a["batch/target_tokens"])
    results = results[-m["average_top_k_layers"] :]
    out = fairseq_targets(results, m, turn_early=True)
    pred, target = last[mask], out["target_full"][mask]
    for i in range(m["head_layers"]):
        pred = linear(student, f"encoder.regression_head.{2 * i}", gelu(pred) if i else pred)
    scale = m["loss_scale"] if m["loss_scale"] > 0 else None
    loss = fairseq_loss(pred, target, m.get("loss_beta", 0), scale)
    return out | dict(
        student_layer_out=np.stack(layers),
        student_encoder_out=last,
        target_layers_raw=np.stack(results),
        pred=pred,
        target=target,
        loss=loss,
    )


def vision(info, a, student, teacher):
    m, g, p = info["model"], info["engine"], info["model"]["patch_size"]
    image = a["batch/image"]
    rows, columns = image.shape[2] // p, image.shape[3] // p
    mask = a["batch/bool_masked_pos"].reshape(len(image), -1) == 1

    def index(a, b):
        if a == 0 or b == 0:
            return (2 * rows - 1) * (2 * columns - 1) + (2 if a == b else 0 if a == 0 else 1)
        ya, xa, yb, xb = *divmod(a - 1, columns), *divmod(b - 1, columns)
        return (ya - yb + rows - 1) * (2 * columns - 1) + xa - xb + columns - 1

    cells = range(rows * columns + 1)
    where = np.array([[index(a, b) for b in cells] for a in cells])

    def bias(s, name):
        return s[f"{name}.relative_position_bias_table"][where].transpose(2, 0, 1)

    def encode(s, masked):
        x = (
            np.stack(
                [
                    (
                        image[:, None, :, y * p : (y + 1) * p, c * p : (c + 1) * p]
                        * s["patch_embed.proj.weight"]
                    ).sum((2, 3, 4))
                    for y in range(rows)
                    for c in range(columns)
                ],
                1,
            )
            + s["patch_embed.proj.bias"]
        )
        patches = x
        x = np.where(masked[..., None], s["mask_token"][0], x)
        x = np.concatenate([np.broadcast_to(s["cls_token"], (len(x), 1, x.shape[-1])), x], 1)
        x = x + s.get("pos_embed", 0.0)
        eps, layers, results = m.get("norm_eps", 1e-6), [], []
        for l in range(m["depth"]):
            name = f"blocks.{l}"
            y = affine(s, f"{name}.norm1", x, eps) @ s[f"{name}.attn.qkv.weight"].T
            q, k, v = np.split(y, 3, -1)
            if m.get("qkv_bias", True):
                q, v = q + s[f"{name}.attn.q_bias"], v + s[f"{name}.attn.v_bias"]
            both = bias(s, "rel_pos_bias") if m.get("use_shared_rel_pos_bias") else 0.0
            both = both + (bias(s, f"{name}.attn") if m.get("use_rel_pos_bias") else 0.0)
            y = linear(s, f"{name}.attn.proj", attention(q, k, v, m["num_heads"], None, both))
            x = x + s.get(f"{name}.gamma_1", 1.0) * y
            y = gelu(linear(s, f"{name}.mlp.fc1", affine(s, f"{name}.norm2", x, eps)))
            y = s.get(f"{name}.gamma_2", 1.0) * linear(s, f"{name}.mlp.fc2", y)
            x = x + y
            layers.append(x)
            results.append(y)
        return patches, layers, results, affine(s, "norm", x, eps)

    patches, layers, _, last = encode(student, mask)
    _, ends, feeds, _ = encode(teacher, np.zeros_like(mask))
    results = ends if g.get("layer_results", "end") == "end" else feeds
    raw = [results[i][:, 1:] for i in info["target_layers"]]
    out = beit_targets(raw, g)
    pred, target = linear(student, "lm_head", last[:, 1:][mask]), out["target_full"][mask]
    d = pred - target
    loss = (d**2 if g.get("l2_loss") else smooth_l1(d, g.get("l1_beta", 0.12))).mean()
    spread = np.sqrt(pred.var(0, ddof=1) + 1e-6)
    penalty = np.maximum(g.get("var_margin0", 0.5) - spread, 0.0).mean()
    loss = loss + g.get("var_w0", 0.0) * penalty
    scale = g.get("loss_scale", -1)
    return out | dict(
        patch_embed=patches,
        student_blocks_out=np.stack(layers),
        student_encoder_out=last,
        target_layers_raw=np.stack(raw),
        pred=pred,
        target=target,
        variance_penalty=penalty,
        loss=loss if scale == -1 else loss * scale,
    )


def forward(info, arrays, student, teacher):
    """The arrays `fwd/...` of a case, without their prefix."""
    run = {"audio": speech, "text": text, "image": vision}[info["modality"]]
    wide = [
        {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in x.items()}
        for x in (arrays, student, teacher)
    ]
    return run(info, *wide)
