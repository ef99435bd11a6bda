"""Files beside an exported vision model that Hugging Face's processors read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data2vec_jax.core.files import write_json
from data2vec_jax.modalities.vision.model import VisionModel
from data2vec_jax.modalities.vision.processor import Processor


def write_processor(config: Mapping[str, Any], model: VisionModel, folder: Path) -> None:
    """Adds the image processor: the whole image resized to the model's size, bicubic, normalised
    by the model's mean and deviation."""
    path = folder / "preprocessor_config.json"
    if not path.exists():
        processor = Processor(size=model.image, mean=model.mean, std=model.std)
        write_json(path, processor.to_json())
