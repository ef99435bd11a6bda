"""How long a step takes at best, by what would be busy."""

from data2vec_jax.metrics.hardware import PEAK_FLOPS
from data2vec_jax.plan import hlo
from data2vec_jax.plan.chips import Chip


def roofline(program: hlo.Program, chip: Chip, machine: int | None = None) -> dict[str, float]:
    """Seconds a step of the busiest device, by what would be busy; the longest is the estimate.

    core: instructions one after the other, each as long as its products at peak or its bytes at
    full bandwidth take, whichever is longer, and the messages that it waits for. hbm: all bytes.
    ici, dcn: all messages inside a slice, and between slices; of GPUs inside a machine of so many
    cards, and of groups that are larger. A bound: nothing starts late, no product is padded.
    """
    flops = PEAK_FLOPS[chip.device_kind] / chip.devices
    hbm, ring, dcn = (
        b / chip.devices for b in (chip.hbm_bandwidth, chip.ring, chip.dcn)
    )  # of one device
    core = memory = ici = between = 0.0
    for w in program.work:
        read = w.bytes / hbm
        memory += w.times * read
        core += 0.0 if w.overlaps else w.times * max(w.flops / flops, read)
    for c in program.collectives:
        if c.kind == hlo.BETWEEN_SLICES:
            between += c.times * c.bytes / dcn
        else:
            # Around a ring every part of the array but one's own; a sum goes around twice.
            rounds = 2 if c.kind == "all-reduce" else 1
            far = machine is not None and c.group > machine
            seconds = c.times * rounds * c.bytes * (1 - 1 / c.group) / (dcn if far else ring)
            ici, between = (ici, between + seconds) if far else (ici + seconds, between)
            core += 0.0 if c.overlaps else seconds
    return {"core": core, "hbm": memory, "ici": ici, "dcn": between}
