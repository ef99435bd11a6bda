"""Exchange of checkpoints with other code bases.

tables     rows of (their names, our path, change), read in both directions
pickles    PyTorch's files, without PyTorch and without running what is in them
layouts    `Source` (an opened path), `Layout` (one kind of checkpoint), and the list of all layouts
fields     options of their configs and of ours as tables
hf, hf_vision, hf_v2, fairseq, fairseq_v2, beit     the layouts
peft       adapters (LoRA, DoRA) beside a base in one of these layouts
ours       our own checkpoints, and `Checkpoint`, which every conversion passes through
loaded     `load(PATH)`: a checkpoint as a callable
export     writes a checkpoint in any layout
report, verify, card, __main__           the command

Reading is a chain of four steps. A layout supplies the last three:

    open_source(path) -> Source                 their config and lazily read arrays, by their names
    layout.configure(source) -> config          a converted config: plain JSON, see below
    layout.table(config) -> tables.Table        parameter names of that config, for both directions
    layout.describe(config) -> their config     for export; UserError for what they lack

A converted config, stored as config.json, has the entries

    modality      name of the modality
    model         options of its model, as in a training config
    head          absent without one; else `name` and options of a head (models/heads.py)
    conv_adapter  absent without one; else options of `heads.ConvAdapter`, which shortens the
                  encoder's output (speech)
    adapters      LoRA and DoRA, see peft.py
    teacher       absent without one; 'encoder' or 'model', whichever it averages
    labels        names of the head's classes, if known
    prenet        2.0: number of lowest blocks that fairseq stores with the modality's encoder
    hf_major      4 if a segmentation head has the names of transformers 4
    origin        {"layout": name, "config": their config}: options without effect on the forward
                  pass come back when the same layout is exported again

Older files call `head` task and `conv_adapter` adapter (`fields.RENAMED`). Parameter paths have not
changed: the student's are at the top (encoder/blocks/..., as in training), the head's below
`task/`, the convolutional adapter's below `adapter/`, LoRA's below `adapters/`, the teacher's below
`teacher/`.

The forward pass is `loaded.forward(config, params, inputs) -> models.outputs.Outputs`. It calls the
`inference` of the modality's record (modalities/contract.py).
"""
