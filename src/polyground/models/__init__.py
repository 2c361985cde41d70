"""Model folders and their families: the only place that knows how an architecture takes images and writes boxes."""

from polyground.conventions import model_folder
from polyground.models.family import NO_IMAGES, Family, ImageFeatures, Loaded, Prompt
from polyground.models.loading import best_device, load_family, load_model, save_processor_files

__all__ = [
    "NO_IMAGES",
    "Family",
    "ImageFeatures",
    "Loaded",
    "Prompt",
    "best_device",
    "load_family",
    "load_model",
    "model_folder",
    "save_processor_files",
]
