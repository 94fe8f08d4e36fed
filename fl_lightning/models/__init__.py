"""Models as a backbone and a head: LeNet-5, the FedAvg CNN, ResNet-8, ResNet-18, any timm name, a small ViT and GPT."""

from fl_lightning.models.cnn import cnn2, lenet5
from fl_lightning.models.export import export_state_dict, import_state_dict
from fl_lightning.models.gpt import gpt
from fl_lightning.models.model import Model
from fl_lightning.models.resnet import resnet8, resnet18
from fl_lightning.models.timm import timm_model, vit

__all__ = [
    "Model",
    "cnn2",
    "export_state_dict",
    "gpt",
    "import_state_dict",
    "lenet5",
    "resnet8",
    "resnet18",
    "timm_model",
    "vit",
]
