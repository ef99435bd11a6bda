"""The pretraining step of data2vec 1.0 as most people would write it today: PyTorch, and Hugging
Face's Data2Vec classes. `bench --peer` runs it beside ours.

Same sizes, masks, dropout, losses, moving average and AdamW. The masks are ours, drawn beforehand,
so their time is not counted here. B batch, T tokens, D width, N masked positions of the batch.
"""

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from data2vec_jax.core.errors import UserError

Array = np.ndarray
RATE = 1e-4  # speed does not depend on it


class TorchBaseline:
    """One training step a call; returns the loss.

    config: of a 1.0 recipe. batch: arrays of our batch. visible: the batch that the student sees.
    mask: bool [B, T]. attention: Hugging Face's name of an implementation.

    Uses a GPU where PyTorch finds one, with `torch.compile`; otherwise as many threads as XLA.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        batch: Mapping[str, Array],
        visible: Mapping[str, Array],
        mask: Array,
        attention: str = "sdpa",
    ):
        check(config)
        torch.manual_seed(config["seed"])
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.autocast = config["dtype"] == "bfloat16"
        make = {"speech": Speech, "vision": Vision, "text": Text}[config["modality"]]
        model = make(config["model"], attention)
        self.model = model.to(self.device).train()
        self.teacher = copy.deepcopy(model.averaged()).requires_grad_(False).eval()
        self.pairs = (
            list(self.teacher.parameters()),
            list(model.averaged().parameters()),
        )
        place = lambda arrays: {  # noqa: E731
            k: torch.from_numpy(np.array(v)).to(self.device)
            for k, v in arrays.items()
            if k != "example_id"
        }
        self.batch, self.visible = place(batch), place(visible)
        self.mask = torch.from_numpy(np.array(mask)).to(self.device)
        self.objective, self.decay = dict(config["objective"]), config["ema"]["end"]
        self.clip = config["optim"].get("clip")
        self.optimiser = torch.optim.AdamW(
            model.parameters(),
            lr=RATE,
            betas=tuple(config["optim"]["betas"]),
            eps=config["optim"].get("eps", 1e-8),
            fused=True,
            weight_decay=config["optim"].get("weight_decay", 0.0),
        )
        self.forward = torch.compile(self.loss) if self.device == "cuda" else self.loss

    def loss(self) -> torch.Tensor:
        """The regression of the teacher's targets at masked positions: a mean over positions."""
        o = self.objective
        tokens = self.model.features(self.visible)
        x = self.model.encode(tokens, self.mask)  # [B, T, D]
        prediction = self.model.head(x[self.mask])  # [N, D]
        with torch.no_grad():
            layers = self.model.teach(self.teacher, self.batch, tokens)
            chosen = range(-o["top_k"], 0) if isinstance(o["top_k"], int) else o["top_k"]
            targets = sum(normalise(layers[i], o["layer_norms"]) for i in chosen) / len(chosen)
            wanted = normalise(targets, o["final_norms"])[self.mask]  # [N, D]
        if o["beta"]:
            total = F.smooth_l1_loss(prediction.float(), wanted, reduction="sum", beta=o["beta"])
        else:
            total = F.mse_loss(prediction.float(), wanted, reduction="sum")
        width = wanted.shape[-1]
        factor = {"rsqrt_width": width**-0.5, "mean": 1 / width}.get(o["scale"], o["scale"])
        return factor * total / len(wanted)

    def __call__(self) -> float:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            loss = self.forward()
        loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(*self.pairs, 1.0 - self.decay)
        return loss.item()  # waits for the GPU

    def about(self) -> dict[str, str]:
        """Versions, and how it was run."""
        mode = "torch.compile" if self.device == "cuda" else f"{torch.get_num_threads()} threads"
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "mode": mode,
        }


def check(config: Mapping[str, Any]) -> None:
    """Raises UserError for what Hugging Face's classes cannot express."""
    if config["objective"]["name"] != "data2vec1":
        raise UserError("--peer: Hugging Face has data2vec 1.0 only; use a config of 1.0")
    usual = "pre" if config["modality"] == "vision" else "post"
    if config["model"]["encoder"].get("norm", "post") != usual:
        raise UserError(f"--peer: Hugging Face's class needs config.model.encoder.norm='{usual}'")
    if config["model"].get("frontend", {}).get("kind", "waveform") != "waveform":
        raise UserError("--peer: Hugging Face's class needs config.model.frontend.kind='waveform'")
    if config["model"].get("teacher_sees", "all") != "all":
        raise UserError("--peer: use config.model.teacher_sees='all'")
    if config["accumulate"] != 1:
        raise UserError("--peer: use config.accumulate=1")


def normalise(x: torch.Tensor, norms: Any) -> torch.Tensor:
    """Target norms 'layer' and 'instance' of [B, T, D], in float32."""
    x = x.float()
    for norm in norms:
        if norm == "layer":
            x = F.layer_norm(x, x.shape[-1:])
        elif norm == "instance":
            x = F.instance_norm(x.transpose(1, 2)).transpose(1, 2)
        else:
            raise UserError(f"--peer: target norm '{norm}' is not written for the baseline")
    return x


class Recorder:
    """Outputs of the modules that it is hooked to, in the order of their calls."""

    def __init__(self, modules: Any):
        self.outputs: list[torch.Tensor] = []
        for module in modules:
            module.register_forward_hook(lambda m, args, output: self.outputs.append(output))

    def during(self, call: Callable[[], Any]) -> list[torch.Tensor]:
        """What was put out while `call` ran."""
        self.outputs.clear()
        call()
        return list(self.outputs)


def encoder_options(model: Mapping[str, Any]) -> dict[str, Any]:
    """Options that Hugging Face's three configurations have in common."""
    e = model["encoder"]
    return dict(
        hidden_size=model["width"],
        num_hidden_layers=e["depth"],
        num_attention_heads=e["heads"],
        intermediate_size=e["mlp"],
        layer_norm_eps=e.get("eps", 1e-5),
    )


class Speech(nn.Module):
    """wav2vec 2.0's front end and encoder; the teacher's is the average of blocks and norm."""

    def __init__(self, model: Mapping[str, Any], attention: str):
        super().__init__()
        e, given = model["encoder"], {}
        if convs := model.get("frontend", {}).get("convs"):
            channels, kernels, strides = zip(*convs, strict=True)
            given = dict(conv_dim=channels, conv_kernel=kernels, conv_stride=strides)
        p = model.get("positions", {})
        depth = p.get("depth", 5)
        self.config = transformers.Data2VecAudioConfig(
            **encoder_options(model),
            **given,
            num_conv_pos_embeddings=depth,
            num_conv_pos_embedding_groups=p.get("groups", 16),
            conv_pos_kernel_size=p.get("kernel") or max(3, p.get("width", 95) // depth),
            hidden_dropout=e.get("dropout", 0.0),
            attention_dropout=e.get("attention_dropout", 0.0),
            activation_dropout=e.get("activation_dropout", 0.0),
            layerdrop=e.get("layerdrop", 0.0),
            feat_proj_dropout=0.0,
            attn_implementation=attention,
        )
        self.model = transformers.Data2VecAudioModel(self.config)
        self.head = nn.Linear(model["width"], model["width"])
        self.recorder = None

    def averaged(self) -> nn.Module:
        return nn.ModuleList([self.model.encoder.layer_norm, self.model.encoder.layers])

    def features(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:  # -> [B, T, D]
        x = self.model.feature_extractor(batch["audio"]).transpose(1, 2)
        return self.model.feature_projection(x)[0]

    def encode(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.model._mask_hidden_states(tokens.clone(), mask_time_indices=mask)
        return self.model.encoder(x).last_hidden_state

    def teach(self, teacher: Any, batch: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of the feed-forward parts; positions are the student's."""
        norm, layers = teacher
        if self.recorder is None:
            self.recorder = Recorder(layer.feed_forward.output_dense for layer in layers)

        def run():
            x = tokens.detach()
            x = norm(x + self.model.encoder.pos_conv_embed(x))
            for layer in layers:
                x = layer(x)

        return self.recorder.during(run)


class Text(nn.Module):
    """RoBERTa's embeddings and encoder; the teacher's is the average of the blocks."""

    def __init__(self, model: Mapping[str, Any], attention: str):
        super().__init__()
        width = model["width"]
        self.config = transformers.Data2VecTextConfig(
            **encoder_options(model),
            vocab_size=model["vocab_size"],
            max_position_embeddings=model.get("max_length", 512) + 2,
            type_vocab_size=1,
            hidden_dropout_prob=model["encoder"].get("dropout", 0.0),
            attention_probs_dropout_prob=model["encoder"].get("attention_dropout", 0.0),
            attn_implementation=attention,
        )
        self.model = transformers.Data2VecTextModel(self.config, add_pooling_layer=False)
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.recorder = None

    def averaged(self) -> nn.Module:
        return self.model.encoder

    def features(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return batch["tokens"].long()

    def encode(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(tokens).last_hidden_state  # the mask is in the tokens

    def teach(self, teacher: Any, batch: Any, tokens: Any) -> list[torch.Tensor]:
        """Outputs of the feed-forward parts; embeddings are the student's, without dropout."""
        if self.recorder is None:
            self.recorder = Recorder(layer.output.dense for layer in teacher.layer)
        self.model.embeddings.eval()
        x = self.model.embeddings(batch["tokens"].long())
        self.model.embeddings.train()
        return self.recorder.during(lambda: teacher(x))


class Vision(nn.Module):
    """BEiT's model; the teacher is the average of all of it."""

    def __init__(self, model: Mapping[str, Any], attention: str):
        super().__init__()
        e, width = model["encoder"], model["width"]
        mean = tuple(model.get("mean", (0.485, 0.456, 0.406)))
        self.statistics = mean, tuple(model.get("std", (0.229, 0.224, 0.225)))
        self.config = transformers.Data2VecVisionConfig(
            **encoder_options(model),
            image_size=model.get("image", 224),
            patch_size=model.get("patch", 16),
            num_channels=len(mean),
            use_mask_token=True,
            use_shared_relative_position_bias=True,
            use_mean_pooling=False,
            layer_scale_init_value=e.get("layer_scale") or 0.0,
            drop_path_rate=e.get("drop_path", 0.0),
            hidden_dropout_prob=e.get("dropout", 0.0),
            attention_probs_dropout_prob=e.get("attention_dropout", 0.0),
            attn_implementation=attention,
        )
        self.model = transformers.Data2VecVisionModel(self.config)
        self.head = nn.Linear(width, width)

    def averaged(self) -> nn.Module:
        return self.model

    def features(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        mean, std = (
            torch.tensor(v, device=batch["image"].device)[:, None, None] for v in self.statistics
        )
        return (batch["image"].permute(0, 3, 1, 2) / 255.0 - mean) / std

    def encode(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, bool_masked_pos=mask).last_hidden_state[:, 1:]

    def teach(self, teacher: Any, batch: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of the blocks, patches only."""
        found = teacher(tokens, output_hidden_states=True).hidden_states[1:]
        return [x[:, 1:] for x in found]
