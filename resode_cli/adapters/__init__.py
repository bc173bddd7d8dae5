"""From a source model to its parts. Only the modules here know timm's and torchvision's classes."""
