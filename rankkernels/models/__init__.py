"""The models, with torch-rechub's arguments, parameter names and numbers."""

from rankkernels.models.deepfm import DeepFM
from rankkernels.models.din import DIN

__all__ = ["DIN", "DeepFM"]
