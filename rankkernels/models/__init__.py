"""The models, with torch-rechub's arguments, parameter names and numbers where it has the class."""

from rankkernels.models.ancestors import FNN, PNN, EmbeddingMLP, FactorizationMachine, WideDeep
from rankkernels.models.deepfm import DeepFM
from rankkernels.models.din import DIN

__all__ = ["DIN", "FNN", "PNN", "DeepFM", "EmbeddingMLP", "FactorizationMachine", "WideDeep"]
