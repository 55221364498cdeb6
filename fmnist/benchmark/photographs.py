"""Photographs for the race in colour, made from the two that scikit-learn brings: nothing is fetched."""

from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from fmnist.data.fashion_mnist import INFO, NUM_CLASSES
from fmnist.data.sources.arrays import statistics
from fmnist.data.split import Split

PHOTO_OUTPUT, STORED, NUM_PHOTOS = 224, 256, 512  # pixels, pixels, images: 100 MB


def photographs(device: torch.device) -> Split:
    """Cut random squares out of the photos and resize them: uint8 [512, 3, 256, 256], the same ones for ever."""
    rng, pieces = np.random.default_rng(0), []
    photos = load_sample_images().images  # uint8 [427, 640, 3]
    for index in range(NUM_PHOTOS):
        photo = photos[index % len(photos)]
        side = rng.integers(STORED // 2, photo.shape[0] + 1)
        top, left = (rng.integers(0, edge - side + 1) for edge in photo.shape[:2])
        piece = Image.fromarray(photo[top : top + side, left : left + side])
        pieces.append(np.asarray(piece.resize((STORED, STORED), Image.Resampling.BICUBIC)))
    images = torch.from_numpy(np.stack(pieces)).movedim(-1, 1).contiguous()
    mean, std = statistics(images)
    info = replace(INFO, shape=(3, STORED, STORED), mean=mean, std=std)
    return Split(images=images.to(device), labels=torch.arange(NUM_PHOTOS, device=device) % NUM_CLASSES, info=info)
