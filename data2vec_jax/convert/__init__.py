"""Exchange of checkpoints with other code bases. What each file does, and how to add a layout:

tables     rows of (their names, our path, change), read in both directions
files      safetensors, read lazily and written as a stream; targets that are complete or absent
pickles    PyTorch's files, without PyTorch and without running what is in them
layouts    `Source` (an opened path), `Layout` (one kind of checkpoint), and the list `LAYOUTS`
hf, hf_vision, fairseq, fairseq_v2, beit   the layouts
peft       adapters (LoRA, DoRA) beside a base in one of these layouts
ours       our own checkpoints, and what every conversion passes through: `Checkpoint`
loaded     `load(PATH)`: a checkpoint as a callable
report, verify, card, __main__           the command

Everything is a chain of four steps, and a layout supplies the middle two:

    open_source(path) -> Source                 their config and lazily read arrays, by their names
    layout.configure(source) -> config          ours: plain JSON, see below
    layout.table(config) -> tables.Table        of that config, for both directions
    layout.describe(config) -> their config     for export; what we cannot say raises UserError

A config of ours is {"modality": "speech", "model": {...}, "adapter": {...}, "task": {...},
"origin": {...}}. `model` is a training config's section. `task` (absent: none) is
{"name": ..., options of the head in models/heads.py or models/segmentation.py}. `adapter`
(speech): what shortens the encoder's output. `teacher` (absent: none): 'encoder' or 'model', what
it averages. `prenet` (2.0): how many of the blocks are called that there. `adapters`: see peft.
`hf_major`: 4 if a segmentation head has the names of transformers 4. `origin`: {"layout": name,
"config": their config as it was}, so that fields without effect on the forward pass return when the
layout is exported again.

Our paths: the student's parameters at the top (encoder/blocks/..., as in training), the head's
below `task/`, the adapter's below `adapter/`, those of LoRA below `adapters/`, the teacher's below
`teacher/`.

The forward pass is `loaded.forward(config, params, inputs) -> Outputs`. Its fields have Hugging
Face's names: last_hidden_state [B, T, D], hidden_states (tuple: the first block's input, then each
block's output), and of what a head or modality adds: logits, pooler_output, extract_features,
start_logits, end_logits, embeddings. A modality's part is one function in `loaded.FORWARD`.
"""
