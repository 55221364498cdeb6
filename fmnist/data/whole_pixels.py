"""Flips and shifts by whole pixels at the stored size: nothing is interpolated."""

import torch
from torch import Tensor


def shift_and_flip(images: Tensor, matrices: Tensor, size: int) -> Tensor:
    """Flip and shift by whole pixels without interpolation: what `resample` gives at the stored size, exactly.

    The matrices must be those of flips and of shifts by whole pixels: see `check_whole_pixels`.
    """
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    place = torch.arange(size, device=images.device) - (size - 1) / 2  # from the centre, pixels
    flip_x, _, move_x, _, flip_y, move_y = matrices[:, :, None].unbind(1)
    columns = (flip_x * place + move_x * (size / 2) + (size - 1) / 2).round().long()
    rows = (flip_y * place + move_y * (size / 2) + (size - 1) / 2).round().long()
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
    columns, rows = columns.clamp(0, size - 1), rows.clamp(0, size - 1)
    moved = images.movedim(1, -1)[sample, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
    return (moved * inside[:, None]).float() / 255


def check_whole_pixels(matrices: Tensor, size: int) -> None:
    """Fail, without waiting for the device, where `shift_and_flip` could not do what the matrices say.

    Args:
        matrices: float [N, 6], the table's columns MATRIX.
        size: pixels per side.
    """
    flip_x, turn_x, move_x, turn_y, flip_y, move_y = matrices.unbind(1)
    moves = torch.stack((move_x, move_y)) * (size / 2)
    whole = (flip_x.abs() == 1) & (flip_y.abs() == 1) & (turn_x == 0) & (turn_y == 0)
    whole &= ((moves - moves.round()).abs() < 1e-3).all(0)
    torch._assert_async(
        whole.all(), "an augmentation other than flips and whole shifts: it needs Plan.whole_pixels off"
    )
