"""data2vec 2.0 (arXiv 2212.07525) in PyTorch: the encoder and its heads, in one file.

Written by data2vec_jax beside model.safetensors; needs only torch and safetensors:

    >>> from modeling_data2vec2 import Data2Vec2
    >>> model = Data2Vec2.load("THIS_FOLDER")
    >>> out = model(inputs, padding_mask)  # dict: last_hidden_state, hidden_states, maybe logits

or, with transformers, `AutoModel.from_pretrained("THIS_FOLDER", trust_remote_code=True)`.

inputs: speech [B, S] (16 kHz, zero mean, unit variance), images [B, C, H, W] (normalised), or
token ids [B, T]. padding_mask: bool like the inputs, True where there is nothing (speech, text).
Parameters have the names of fairseq's data2vec_multi. In the file are also the decoder and, below
`_ema.`, the teacher of pretraining, which are not used here.
"""

import json
import math
import os

import torch
import torch.nn.functional as F
from torch import nn

MODES = {"speech": "AUDIO", "vision": "IMAGE", "text": "TEXT"}


class Block(nn.Module):
    """Post-norm Transformer block: u = norm1(x + attention(x)); norm2(u + mlp(u))."""

    def __init__(self, width, heads, hidden, eps):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x, bias=None):  # [B, T, D], [B or 1, H or 1, T, T]
        B, T, D = x.shape
        q, k, v = self.attn.qkv(x).reshape(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        logits = (q @ k.transpose(-2, -1)).float() * (D // self.heads) ** -0.5
        weights = (logits if bias is None else logits + bias).softmax(-1).type_as(x)
        x = self.norm1(x + self.attn.proj((weights @ v).transpose(1, 2).reshape(B, T, D)))
        return self.norm2(x + self.mlp.fc2(F.gelu(self.mlp.fc1(x))))


class Transposed(nn.Module):
    """A layer norm over the channels of [B, C, T]."""

    def __init__(self, channels):
        super().__init__()
        self.add_module("1", nn.LayerNorm(channels))

    def forward(self, x):
        return self._modules["1"](x.transpose(1, 2)).transpose(1, 2)


def numbered(**modules):
    """A module whose children are named by numbers."""
    parent = nn.Module()
    for name, module in modules.items():
        parent.add_module(name.lstrip("_"), module)
    return parent


class Encoder(nn.Module):
    """What is between the inputs and the shared blocks: front end, positions, lowest blocks."""

    def __init__(self, c):
        super().__init__()
        self.c, m = c, c["model"]
        width, e, prenet = m["width"], m["encoder"], c.get("prenet", 0)
        eps = e.get("eps", 1e-5)
        {"speech": self.speech, "vision": self.vision, "text": self.text}[c["modality"]](m, width)
        self.context_encoder = nn.Module()
        self.context_encoder.blocks = nn.ModuleList(
            Block(width, e["heads"], e["mlp"], eps) for _ in range(prenet)
        )
        if c["modality"] != "text" or m.get("input_norm"):
            self.context_encoder.norm = nn.LayerNorm(width, eps=eps)
        alibi = m.get("alibi")
        if alibi is not None:
            rows = e["depth"] if alibi.get("per_layer") else 1
            heads = e["heads"] if alibi.get("per_head", True) else 1
            shape = (rows, 1, heads, 1, 1) if alibi.get("learned", True) else (1, 1, 1, 1, 1)
            self.alibi_scale = nn.Parameter(torch.ones(shape))

    # Front ends -----------------------------------------------------------------------------------

    def speech(self, m, width):
        front, layers, before = m.get("frontend", {}), [], 1
        for i, (channels, kernel, stride) in enumerate(front["convs"]):
            conv = nn.Conv1d(before, channels, kernel, stride, bias=front.get("bias", False))
            layer = {"_0": conv}
            if front.get("norm", "layer") == "layer":
                layer["_2"] = Transposed(channels)
            elif i == 0:
                layer["_2"] = nn.GroupNorm(channels, channels)
            layers.append(numbered(**layer))
            before = channels
        self.local_encoder = nn.Module()
        self.local_encoder.conv_layers = nn.ModuleList(layers)
        self.project_features = numbered(_1=nn.LayerNorm(before), _2=nn.Linear(before, width))
        p = m.get("positions", {})
        depth = p.get("depth", 5)
        kernel = p.get("kernel") or max(3, p.get("width", 95) // depth)
        groups = p.get("groups", 16)
        convs = {
            f"_{i + 1}": numbered(
                _0=nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
            )
            for i in range(depth)
        }
        if p.get("input_norm"):
            convs = {"_0": nn.LayerNorm(width), "_1": numbered(**convs)}
        self.relative_positional_encoder = numbered(**convs)

    def vision(self, m, width):
        channels, patch = len(m.get("mean", (0, 0, 0))), m.get("patch", 16)
        inner, patches = m.get("patch_width"), nn.Module()
        patches.proj = nn.Conv2d(channels, inner or width, patch, patch)
        self.local_encoder = patches
        if inner:
            self.local_encoder = numbered(_0=patches, _1=nn.Linear(inner, width))
        if m.get("class_tokens", 1):
            self.extra_tokens = nn.Parameter(torch.zeros(1, m.get("class_tokens", 1), width))
        if m.get("sincos"):
            image, patch = pair(m.get("image", 224)), pair(patch)
            cells = (image[0] // patch[0]) * (image[1] // patch[1])
            self.fixed_positional_encoder = nn.Module()
            self.fixed_positional_encoder.register_buffer("positions", torch.zeros(1, cells, width))

    def text(self, m, width):
        local = self.local_encoder = nn.Module()
        local.embed_tokens = nn.Embedding(m["vocab_size"], width)
        local.embed_positions = nn.Embedding(m.get("max_length", 512) + 2, width)
        local.layernorm_embedding = nn.LayerNorm(width)

    # Features -------------------------------------------------------------------------------------

    def features(self, x, padding):
        """-> (tokens [B, T, D], bool [B, T] that are not padding or None, grid or None)."""
        m, kind = self.c["model"], self.c["modality"]
        if kind == "speech":
            return *self.frames(x, padding), None
        if kind == "vision":
            patches, *projection = [self.local_encoder]
            if m.get("patch_width"):
                patches, *projection = self.local_encoder.children()
            x = patches.proj(x)
            grid = tuple(x.shape[2:])
            x = x.flatten(2).transpose(1, 2)
            for layer in projection:
                x = layer(x)
            if m.get("sincos"):
                x = x + self.fixed_positional_encoder.positions.type_as(x)
            return x, None, grid
        local = self.local_encoder
        valid = x != 1 if padding is None else ~padding.bool()
        there = (x != 1).long()
        tokens = local.embed_tokens(x) * (math.sqrt(m["width"]) if m.get("scale") else 1.0)
        x = tokens + local.embed_positions(there.cumsum(1) * there + 1)
        return local.layernorm_embedding(x * there[..., None]), valid, None

    def frames(self, x, padding):
        x = x[:, None]
        for layer in self.local_encoder.conv_layers:
            for part in layer.children():
                x = part(x)
            x = F.gelu(x)
        norm, projection = self.project_features.children()
        x = projection(norm(x.transpose(1, 2)))
        valid = None
        if padding is not None:
            lengths = (~padding.bool()).sum(-1)
            for _, kernel, stride in self.c["model"]["frontend"]["convs"]:
                lengths = (lengths - kernel) // stride + 1
            lengths = torch.where(lengths > 0, lengths, x.shape[1] + lengths)
            valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        return x + self.positions(x), valid

    def positions(self, x):
        length, layers = x.shape[1], list(self.relative_positional_encoder.children())
        if self.c["model"].get("positions", {}).get("input_norm"):
            x, layers = layers[0](x), list(layers[1].children())
        for layer in layers:
            (conv,) = layer.children()
            x = conv(x.transpose(1, 2))[..., :length].transpose(1, 2)
            x = F.gelu(F.layer_norm(x, x.shape[-1:]))
        return x

    # ALiBi ----------------------------------------------------------------------------------------

    def bias(self, tokens, grid, extra):
        """[L or 1, 1, H, T, T] to be added to the logits, of all blocks, or None."""
        m = self.c["model"]
        alibi = m.get("alibi")
        if alibi is None:
            return None
        device = self.alibi_scale.device
        places = torch.arange(tokens, device=device)
        x = places[:, None]
        if grid is not None:
            x = torch.stack([places // grid[1], places % grid[1]], -1)
        apart = (x[:, None] - x[None]).float()
        euclidean = alibi.get("distance", "manhattan") == "euclidean"
        apart = apart.square().sum(-1).sqrt() if euclidean else apart.abs().sum(-1)
        apart = F.pad(apart, (extra, 0, extra, 0))
        slope = torch.tensor(slopes(m["encoder"]["heads"]), device=device)
        return -slope[:, None, None] * apart * self.alibi_scale.clamp(min=0)


def slopes(heads):
    """2^(-8 h / H) for a power of two, else those below it and every other one above."""
    power = 2 ** int(math.log2(heads))
    below = [2.0 ** (-8.0 * h / power) for h in range(1, power + 1)]
    above = [2.0 ** (-4.0 * h / power) for h in range(1, 2 * power + 1, 2)]
    return (below + above)[:heads]


def pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def build(model, c):
    """Gives a module the parameters of a model. c: the entry `data2vec` of config.json."""
    m, options = c["model"], c.get("head") or {}
    width, e, eps = m["width"], m["encoder"], m["encoder"].get("eps", 1e-5)
    model.c = c
    model.modality_encoders = nn.ModuleDict({MODES[c["modality"]]: Encoder(c)})
    main = e["depth"] - c.get("prenet", 0)
    model.blocks = nn.ModuleList(Block(width, e["heads"], e["mlp"], eps) for _ in range(main))
    name = options.get("name")
    if name == "ctc":
        model.proj = nn.Linear(width, options["vocab_size"])
    elif name == "image":
        model.fc_norm = nn.LayerNorm(width, eps=options.get("eps", 1e-6))
        model.head = nn.Linear(width, options["classes"])
    elif name == "sequence":
        head = nn.Module()
        head.dense, head.out_proj = nn.Linear(width, width), nn.Linear(width, options["classes"])
        model.classification_heads = nn.ModuleDict({"sentence_classification_head": head})
    elif name:
        raise ValueError(f"no head '{name}'")


def run(model, inputs, padding_mask=None):
    """Outputs by name; see the file's docstring."""
    (encoder,) = model.modality_encoders.values()
    x, valid, grid = encoder.features(inputs, padding_mask)
    extra = getattr(encoder, "extra_tokens", None)
    count, tokens = 0 if extra is None else extra.shape[1], x.shape[1]
    if count:
        x = torch.cat([extra.expand(len(x), -1, -1), x], 1)
    if hasattr(encoder.context_encoder, "norm"):
        x = encoder.context_encoder.norm(x)
    hidden, biases = [x], encoder.bias(tokens, grid, count)
    least = torch.finfo(torch.float32).min
    mask = None if valid is None else torch.where(valid, 0.0, least)[:, None, None]
    for i, block in enumerate([*encoder.context_encoder.blocks, *model.blocks]):
        bias = None if biases is None else biases[i if len(biases) > 1 else 0]
        if mask is not None:
            bias = mask if bias is None else (bias + mask).clamp(min=least)
        x = block(x, bias)
        hidden.append(x)
    out = {"last_hidden_state": x, "hidden_states": tuple(hidden)}
    if hasattr(model, "proj"):
        out["logits"] = model.proj(x)
    if hasattr(model, "fc_norm"):
        out["logits"] = model.head(model.fc_norm(x[:, count:].mean(1)))
    if hasattr(model, "classification_heads"):
        (head,) = model.classification_heads.values()
        out["logits"] = head.out_proj(torch.tanh(head.dense(x[:, 0])))
    return out


UNUSED = (
    "_ema.",
    "modality_encoders.AUDIO.decoder.",
    "modality_encoders.IMAGE.decoder.",
    "modality_encoders.TEXT.decoder.",
)


class Data2Vec2(nn.Module):
    """data2vec 2.0 without transformers."""

    def __init__(self, config):
        super().__init__()
        build(self, config)

    @classmethod
    def load(cls, folder):
        """The model of an exported folder, for evaluation."""
        from safetensors.torch import load_file

        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            model = cls(json.load(file)["data2vec"])
        state = load_file(os.path.join(folder, "model.safetensors"))
        model.load_state_dict({k: v for k, v in state.items() if not k.startswith(UNUSED)})
        return model.eval()

    def forward(self, inputs, padding_mask=None):
        return run(self, inputs, padding_mask)


try:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.utils import ModelOutput
except ImportError:
    pass
else:

    class Data2Vec2Config(PretrainedConfig):
        """config.json; the model's settings are in the entry `data2vec`."""

        model_type = "data2vec2"

        def __init__(self, data2vec=None, **kwargs):
            self.data2vec = data2vec or {}
            super().__init__(**kwargs)

    class Data2Vec2Model(PreTrainedModel):
        """data2vec 2.0 as a transformers model."""

        config_class = Data2Vec2Config
        base_model_prefix = "data2vec2"
        main_input_name = "inputs"
        _keys_to_ignore_on_load_unexpected = (r"^_ema\.", r"\.decoder\.")

        def __init__(self, config):
            super().__init__(config)
            build(self, config.data2vec)
            self.post_init()

        def _init_weights(self, module):
            """Weights come from the checkpoint; new ones keep PyTorch's initialisation."""

        def forward(self, inputs=None, padding_mask=None, **arguments):
            if inputs is None:  # the names of transformers' data2vec 1.0
                names = ("input_values", "pixel_values", "input_ids")
                inputs = next(arguments[name] for name in names if name in arguments)
            if padding_mask is None and arguments.get("attention_mask") is not None:
                padding_mask = arguments["attention_mask"] == 0
            return ModelOutput(run(self, inputs, padding_mask))
