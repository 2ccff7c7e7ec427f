"""The models, with torch-rechub's arguments, parameter names and numbers where it has the class."""

from rankkernels.models.ancestors import FNN, PNN, EmbeddingMLP, FactorizationMachine, WideDeep
from rankkernels.models.bst import BST
from rankkernels.models.dcn import DCN, EDCN, DCNv2
from rankkernels.models.deepfm import DeepFM
from rankkernels.models.dien import DIEN
from rankkernels.models.din import DIN

__all__ = [
    "BST",
    "DCN",
    "DIEN",
    "DIN",
    "EDCN",
    "FNN",
    "PNN",
    "DCNv2",
    "DeepFM",
    "EmbeddingMLP",
    "FactorizationMachine",
    "WideDeep",
]
