"""Data sets divided among clients, and batches of them."""

from fl_lightning.data.augmentation import PerImageTransform, RandomCrop, RandomHorizontalFlip
from fl_lightning.data.client_data import ClientData
from fl_lightning.data.digits import Digits
from fl_lightning.data.federated_data import Examples, FederatedData
from fl_lightning.data.folder import Folder
from fl_lightning.data.image_files import ImageFiles
from fl_lightning.data.image_pool import ImagePool
from fl_lightning.data.index_batches import IndexBatches
from fl_lightning.data.normalization import Normalization
from fl_lightning.data.partition import ClientIndices, Partition

__all__ = [
    "ClientData",
    "ClientIndices",
    "Digits",
    "Examples",
    "FederatedData",
    "Folder",
    "ImageFiles",
    "ImagePool",
    "IndexBatches",
    "Normalization",
    "Partition",
    "PerImageTransform",
    "RandomCrop",
    "RandomHorizontalFlip",
]
