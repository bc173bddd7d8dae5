"""Images and labels: folders with splits, the embedded digits, and torchvision's data sets.

splits: what they are called · folders: which folder holds which split · holding_out: which images are held out where
no split is · tables: images that a CSV lists · listing: which files are images · classes: whose order holds ·
class_map: other names for classes · label_sets: images with several labels · images: from a file to RGB ·
transforms: from there to an input · shards: .tar files as WebDataset writes them · named: data sets with a name ·
hub: those of Hugging Face · opening: from a name and a split to images for a model · loading: what a model is fed, in
batches · selection: which images the names mean that a user gives.
"""

from .classes import OtherClasses, check_classes
from .holding_out import HoldOut, known_division
from .loading import Batch, ImageData, Key, batches, ending, read
from .named import NAMES
from .opening import (
    DEFAULT_ROOT,
    as_labelled,
    check_data_name,
    held_out_splits,
    labelled_splits,
    open_data,
    open_labelled,
)
from .transforms import Augmentation, transform

__all__ = [
    "DEFAULT_ROOT",
    "NAMES",
    "Augmentation",
    "Batch",
    "HoldOut",
    "ImageData",
    "Key",
    "as_labelled",
    "batches",
    "OtherClasses",
    "check_classes",
    "check_data_name",
    "ending",
    "held_out_splits",
    "known_division",
    "labelled_splits",
    "open_data",
    "open_labelled",
    "read",
    "transform",
]
