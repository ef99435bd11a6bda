"""data2vec 2.0 once more, as plainly as possible: the other side of `test_data2vec2`.

Works on the authors' names and layouts and on their flags, knows nothing of our package, and does
everything at full length: a student computes all tokens, but attends to visible ones only, so what
it makes of these is what it would make without the others. From a set of flags, `record` makes a
case like the recorded ones.

R rows (B examples x M masks), T tokens, E class tokens, D width, H heads.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from recorded import quick_jit

MODES = {"audio": "AUDIO", "image": "IMAGE", "text": "TEXT"}


def norm(x, axes, eps=1e-5):
    mean = x.mean(axes, keepdims=True)
    return (x - mean) / jnp.sqrt(x.var(axes, keepdims=True) + eps)


def affine(s, name, x, eps):
    return norm(x, -1, eps) * s[f"{name}.weight"] + s[f"{name}.bias"]


def linear(s, name, x):
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + jax.scipy.special.erf(x / math.sqrt(2)))


def convolution(s, name, x, stride=1, pad=0, groups=1):
    """x [R, C, ...], as PyTorch has it."""
    weight = s[f"{name}.weight"]
    axes = weight.ndim - 2
    y = jax.lax.conv_general_dilated(
        x, weight, (stride,) * axes, [(pad, pad)] * axes, feature_group_count=groups
    )
    return y + s[f"{name}.bias"].reshape(-1, *(1,) * axes) if f"{name}.bias" in s else y


def same(s, name, x, groups):
    """A convolution that keeps lengths (even kernels lose the last position), norm and GELU."""
    taps = s[f"{name}.weight"].shape[-1]
    y = convolution(s, name, x, 1, taps // 2, groups)
    if taps % 2 == 0:
        y = y[(slice(None), slice(None), *(slice(-1),) * (x.ndim - 2))]
    return gelu(norm(y, 1))


def slope(heads):
    def of_power(n):
        return [2.0 ** (-8.0 * (h + 1) / n) for h in range(n)]

    power = 2 ** math.floor(math.log2(heads))
    return np.array(of_power(power) + of_power(2 * power)[::2][: heads - power], np.float32)


class Naive:
    """One case: flags in, everything that was recorded out."""

    def __init__(self, info, batch):
        self.info, self.batch = info, batch
        self.mode = f"modality_encoders.{MODES[info['modality']]}"
        self.model, self.cfg, self.dec = info["model"], info["modality_cfg"], info["decoder"]
        self.extra = self.cfg["num_extra_tokens"]

    def local(self, s):
        """Features of every example [B, T, D] and padding [B, T], True where there is none."""
        where, batch = f"{self.mode}.local_encoder", self.batch
        if self.info["modality"] == "audio":
            x, count = batch["source"][:, None], None
            spec = eval(self.cfg["feature_encoder_spec"])
            count = (batch["padding_mask"] == 0).sum(-1)
            for i, (_, taps, stride) in enumerate(spec):
                x = convolution(s, f"{where}.conv_layers.{i}.0", x, stride)
                x = affine(s, f"{where}.conv_layers.{i}.2.1", x.swapaxes(1, 2), 1e-5)
                x, count = gelu(x).swapaxes(1, 2), (count - taps) // stride + 1
            x = affine(s, f"{self.mode}.project_features.1", x.swapaxes(1, 2), 1e-5)
            x = linear(s, f"{self.mode}.project_features.2", x)
            return x, np.arange(x.shape[1]) < count[:, None]
        if self.info["modality"] == "image":
            x = convolution(s, f"{where}.proj", batch["image"], self.cfg["patch_size"])
            return x.reshape(*x.shape[:2], -1).swapaxes(1, 2), None
        tokens, real = batch["src_tokens"], batch["padding_mask"] == 0
        places = np.where(real, np.cumsum(real, 1) + 1, 1)
        x = s[f"{where}.embed_tokens.weight"][tokens]
        x = x * (1 if self.cfg["no_scale_embedding"] else math.sqrt(x.shape[-1]))
        x = x + s[f"{where}.embed_positions.weight"][places]
        x = jnp.where(real[..., None], x, 0.0)  # rows of padding are zero, and stay so
        return affine(s, f"{where}.layernorm_embedding", x, 1e-5), real

    def bias(self, s, T):
        """ALiBi of every block [L, H, E + T, E + T], or zeros."""
        depth, heads = self.cfg["prenet_depth"] + self.model["depth"], self.model["num_heads"]
        if not self.cfg["use_alibi_encoder"]:
            return np.zeros((depth, heads, 1, 1))
        at = np.arange(T)
        if self.info["modality"] == "image":
            side = math.isqrt(T)
            at = np.stack([at // side, at % side], -1)
            d = at[:, None] - at
            far = np.abs(d).sum(-1)
            if self.cfg["alibi_distance"] == "euclidean":
                far = np.sqrt((d**2).sum(-1))
        else:
            far = np.abs(at[:, None] - at)
        far = np.pad(far, ((self.extra, 0), (self.extra, 0)))
        scale = s.get(f"{self.mode}.alibi_scale", np.full((1,) * 5, self.cfg["alibi_scale"]))
        scale = jnp.broadcast_to(jnp.maximum(scale[:, 0], 0), (depth, heads, 1, 1))
        return -slope(heads)[None, :, None, None] * scale * far

    def encode(self, s, x, real, mask, blocks=None):
        """x [B, T, D]; mask [R, T] or None. Outputs of all blocks, (context, ys, ts, positions).

        blocks: state of the main blocks, if it is not `s`.
        """
        prenet, eps, mode = self.cfg["prenet_depth"], self.model["norm_eps"], self.mode
        T, positions = x.shape[1], None
        if self.info["modality"] == "image" and self.cfg["fixed_positions"]:
            x = x + s[f"{mode}.fixed_positional_encoder.positions"]
        see = np.ones((len(x), T), bool) if real is None else real
        if mask is not None:
            clones = len(mask) // len(x)
            x, see = jnp.repeat(x, clones, 0), np.repeat(see, clones, 0) & (mask == 0)
        if self.info["modality"] == "audio":
            y = x if mask is None else x * (1 - mask[..., None])
            where = f"{mode}.relative_positional_encoder"
            if self.cfg["conv_pos_pre_ln"]:
                y, where = affine(s, f"{where}.0", y, 1e-5), f"{where}.1"
            y = y.swapaxes(1, 2)
            for i in range(self.cfg["conv_pos_depth"]):
                y = same(s, f"{where}.{i + 1}.0", y, self.cfg["conv_pos_groups"])
            positions = y.swapaxes(1, 2)
            x = x + positions
        if self.extra:
            tokens = s[f"{mode}.extra_tokens"]
            x = jnp.concatenate([jnp.tile(tokens, (len(x), 1, 1)), x], 1)
            see = np.concatenate([np.ones((len(x), self.extra), bool), see], 1)
        if f"{mode}.context_encoder.norm.weight" in s:
            x = affine(s, f"{mode}.context_encoder.norm", x, eps)
        context, ys, ts, bias = x, [], [], self.bias(s, T)
        for i in range(prenet + self.model["depth"]):
            inside = f"{mode}.context_encoder.blocks.{i}" if i < prenet else f"blocks.{i - prenet}"
            x, t = self.block(s if i < prenet else blocks or s, inside, x, bias[i], see, eps)
            ys, ts = [*ys, x], [*ts, t]
            context = x if i < prenet else context
        return context, ys[prenet:], ts[prenet:], positions

    def block(self, s, name, x, bias, see, eps):
        R, N, D = x.shape
        heads = self.model["num_heads"]
        qkv = linear(s, f"{name}.attn.qkv", x).reshape(R, N, 3, heads, D // heads)
        q, k, v = (qkv[:, :, i].swapaxes(1, 2) for i in range(3))
        logits = q @ k.swapaxes(2, 3) / math.sqrt(D // heads) + bias
        weights = jax.nn.softmax(jnp.where(see[:, None, None], logits, -jnp.inf), -1)
        y = linear(s, f"{name}.attn.proj", (weights @ v).swapaxes(1, 2).reshape(R, N, D))
        u = affine(s, f"{name}.norm1", x + y, eps)
        t = linear(s, f"{name}.mlp.fc2", gelu(linear(s, f"{name}.mlp.fc1", u)))
        y = affine(s, f"{name}.norm2", u + t, eps)
        return y, y if self.model["end_of_block_targets"] else t

    def decode(self, s, x):
        """x [R, T, D] -> [R, T, D]."""
        where, (R, T, D) = f"{self.mode}.decoder", x.shape
        x = x.swapaxes(1, 2)
        if self.info["modality"] == "image":
            x = x.reshape(R, D, math.isqrt(T), -1)
        for i in range(self.dec["decoder_layers"]):
            y = same(s, f"{where}.blocks.{i}.0", x, self.dec["decoder_groups"])
            x = x + y if self.dec["decoder_residual"] and x.shape == y.shape else y
        x = x.reshape(R, -1, T).swapaxes(1, 2)
        if f"{where}.proj.weight" in s:
            return linear(s, f"{where}.proj", x)
        for i in range(self.dec["projection_layers"]):
            x = linear(s, f"{where}.proj.{2 * i}", gelu(x) if i else x)
        return x

    def element(self, d):
        """Loss of differences [..., D], summed over channels and scaled."""
        beta, scale = self.model["loss_beta"], self.model["loss_scale"]
        each = d**2
        if beta:
            each = jnp.where(jnp.abs(d) < beta, d**2 / (2 * beta), jnp.abs(d) - beta / 2)
        return each.sum(-1) * (1 / math.sqrt(d.shape[-1]) if scale is None else scale)

    def targets(self, ts):
        m = self.model
        raw = jnp.stack(ts[-m["average_top_k_layers"] :])[:, :, self.extra :]
        normed = raw
        for flag, axes in (
            ("batch_norm_target_layer", (1, 2)),
            ("instance_norm_target_layer", 2),
            ("layer_norm_target_layer", 3),
        ):
            normed = norm(normed, axes) if m[flag] else normed
        full = average = normed.mean(0)
        full = norm(full, 2) if m["layer_norm_targets"] else full
        full = norm(full, 1) if m["instance_norm_targets"] else full
        return raw, normed, average, full

    def forward(self, student, teacher, mask, noise):
        """Everything of one pass. mask [R, T] of 0 and 1."""
        g = self.cfg["local_grad_mult"]
        student = {
            k: g * p + jax.lax.stop_gradient((1 - g) * p) if ".local_encoder." in k else p
            for k, p in student.items()
        }
        x, real = self.local(student)
        context, ys, _, positions = self.encode(student, x, real, mask)
        E, visible = self.extra, (mask == 0)
        decoder_in = jnp.where(visible[..., None], ys[-1][:, E:], noise)
        decoder_out = self.decode(student, decoder_in)
        if self.model["ema_encoder_only"]:
            main = {f"blocks.{k}": v for k, v in teacher.items()}
            seen = self.encode(student, x, real, None, main)
        else:
            whole = self.local(teacher)[0] if self.cfg["ema_local_encoder"] else x
            seen = self.encode(teacher, whole, real, None)
        raw, normed, average, full = jax.lax.stop_gradient(self.targets(seen[2]))
        clones = self.model["clone_batch"]
        wanted = jnp.repeat(full, clones, 0)[mask == 1]
        pred = decoder_out[mask == 1]
        out = dict(
            context_out=context,
            student_blocks_out=jnp.stack(ys),
            student_encoder_out=ys[-1],
            decoder_in=decoder_in,
            decoder_out=decoder_out,
            target_layers_raw=raw,
            target_layers_normed=normed,
            target_avg=average,
            target_full=full,
            target=wanted,
            pred=pred,
            loss_regression=self.model["d2v_loss"] * self.element(pred - wanted).sum(),
        )
        # Only what was visible is recorded, class tokens first.
        keep = np.argsort(mask, 1, kind="stable")[:, : visible[0].sum()]
        rows = np.arange(len(mask))[:, None]
        places = np.concatenate([np.tile(np.arange(E), (len(mask), 1)), E + keep], 1)
        for name in ("context_out", "student_blocks_out", "student_encoder_out"):
            out[name] = out[name][..., rows, places, :]
        out["loss"], self.keep = out["loss_regression"], keep
        if positions is not None:
            out["relative_positions"] = positions
        if self.model["cls_loss"]:
            out["cls_pred"] = ys[-1][:, E - 1]
            out["cls_target"] = jnp.repeat(full.mean(1), clones, 0)
            loss = self.element(out["cls_pred"] - out["cls_target"]).sum()
            out["loss_cls"] = loss * self.model["cls_loss"] * mask.sum()
            out["loss"] = out["loss"] + out["loss_cls"]
        return out


def record(info, student, teacher, batch, mask, noise, updates=2):
    """A case: arrays under the names of the goldens. fairseq's AdamW, then the average.

    Tensors of `info['frozen_params']` are constants; a teacher's leaf is averaged if it is there.
    """
    naive, count, o = Naive(info, batch), float(mask.sum()), info["optimizer"]
    prefix = "blocks." if info["model"]["ema_encoder_only"] else ""
    fixed = {k: v for k, v in student.items() if k in info["frozen_params"]}
    params = {k: v for k, v in student.items() if k not in fixed}
    first, second = dict(params), dict(teacher)

    @quick_jit
    def step(params, teacher):
        def loss(params):
            out = naive.forward(params | fixed, teacher, mask, noise)
            return out["loss"] / count, out

        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return out, grads

    m = v = {k: np.zeros_like(p) for k, p in params.items()}
    arrays, losses, norms, rates, decays = {}, [], [], [], []
    for n in range(updates + 1):
        out, grads = jax.device_get(step(params, teacher))
        losses.append(out["loss"])
        if n == 0:
            arrays |= {f"fwd/{k}": x for k, x in out.items()}
            arrays |= {f"grad/{k}": g for k, g in grads.items()}
        warmup, total = o["sched"]["warmup_updates"], o["max_update"]
        turn = math.pi * (n - warmup) / (total - warmup)
        rate = o["lr"] * (n / warmup if n < warmup else 0.5 * (1 + math.cos(turn)))
        start, end = info["model"]["ema_decay"], info["model"]["ema_end_decay"]
        decay = start + (end - start) * min(n / info["model"]["ema_anneal_end_step"], 1)
        decays.append(decay)
        if n == updates:
            break
        length = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        norms, rates = [*norms, length], [*rates, rate]
        clip = min(1.0, o["clip_norm"] / (length + 1e-6)) if o["clip_norm"] else 1.0
        b1, b2 = o["betas"]
        m = {k: b1 * m[k] + (1 - b1) * g * clip for k, g in grads.items()}
        v = {k: b2 * v[k] + (1 - b2) * (g * clip) ** 2 for k, g in grads.items()}
        size = rate * math.sqrt(1 - b2 ** (n + 1)) / (1 - b1 ** (n + 1))
        params = {
            k: p - rate * o["weight_decay"] * p - size * m[k] / (np.sqrt(v[k]) + o["eps"])
            for k, p in params.items()
        }
        after = start + (end - start) * min((n + 1) / info["model"]["ema_anneal_end_step"], 1)
        now = params | fixed
        teacher = {k: after * t + (1 - after) * now[prefix + k] for k, t in teacher.items()}
    arrays |= {
        "batch/mask": mask,
        "batch/ids_keep": naive.keep,
        "batch/decoder_noise": noise,
        "train/loss": losses,
        "train/grad_norm": norms,
        "train/lr": rates,
        "train/ema_decay": decays,
        "fwd/sample_size": count,
    }
    for name, tree in (
        ("student", first | fixed),
        ("teacher", second),
        ("final_student", params | fixed),
        ("final_teacher", teacher),
    ):
        arrays |= {f"{name}/{k}": x for k, x in tree.items()}
    arrays |= {f"batch/{k}": x for k, x in batch.items()}
    return {k: np.asarray(x) for k, x in arrays.items()}
