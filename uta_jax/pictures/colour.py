"""Numbers and features to colours: uint8 RGB arrays."""

import colorsys

import numpy as np

# Five points of a scale that is read alike with all kinds of colour vision, dark to light.
_SCALE = np.array(
    [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float32
)
_GREY = 128  # of what was not seen
_CLIPPED = 1.0  # percent of the values beyond either end of a colour's range


def scale(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """Numbers [...] -> colours [..., 3] from dark (``low`` and below) to light (``high``)."""
    place = np.clip((value - low) / max(high - low, 1e-9), 0, 1) * (len(_SCALE) - 1)
    points = np.arange(len(_SCALE))
    channels = [np.interp(place, points, _SCALE[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


class Principal:
    """Features as colours: their three principal components as red, green and blue."""

    def __init__(self, feature_ne: np.ndarray):
        """Fit the components and the range of each to these features [n, e]."""
        self._mean = feature_ne.mean(axis=0)
        _, _, right_ee = np.linalg.svd(feature_ne - self._mean, full_matrices=False)
        axes_3e = np.zeros((3, feature_ne.shape[1]), right_ee.dtype)
        axes_3e[: min(3, len(right_ee))] = right_ee[:3]
        # The sign of a component is arbitrary: its largest entry shall be positive.
        largest = np.take_along_axis(axes_3e, np.abs(axes_3e).argmax(axis=1)[:, None], axis=1)
        self._axes = axes_3e * np.where(largest < 0, -1, 1)
        spread_n3 = (feature_ne - self._mean) @ self._axes.T
        self._low, self._high = np.percentile(spread_n3, (_CLIPPED, 100 - _CLIPPED), axis=0)

    def colours(self, feature_xe: np.ndarray) -> np.ndarray:
        """Features [..., e] -> colours [..., 3]; those beyond the range fitted are clipped."""
        place = (feature_xe - self._mean) @ self._axes.T
        share = (place - self._low) / np.maximum(self._high - self._low, 1e-9)
        return (255 * np.clip(share, 0, 1)).round().astype(np.uint8)


def seen(image_hwc: np.ndarray, shown_gg: np.ndarray) -> np.ndarray:
    """The image with the patches that are not shown in grey."""
    side = len(image_hwc) // len(shown_gg)
    shown = np.kron(shown_gg, np.ones((side, side), bool))[..., None]
    return np.where(shown, image_hwc, np.uint8(_GREY))


def class_colour(number: int) -> tuple[int, int, int]:
    """A colour of its own for every class; neighbours by number differ much in hue."""
    hue = number * 0.618034 % 1
    value = 0.95 - 0.25 * (number % 3) / 2
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.8, value))


def overlay(image_hwc: np.ndarray, class_hw: np.ndarray, shown_hw: np.ndarray) -> np.ndarray:
    """Classes as colours over the image, where they are shown; the rest pale and grey."""
    grey = image_hwc.mean(axis=-1, keepdims=True) * 0.25 + 180
    mixed = np.broadcast_to(grey, image_hwc.shape).copy()
    for number in np.unique(class_hw[shown_hw]):
        there = shown_hw & (class_hw == number)
        mixed[there] = 0.35 * image_hwc[there] + 0.65 * np.array(class_colour(int(number)))
    return mixed.round().astype(np.uint8)


def mosaic(rows: list[list[np.ndarray]], gap: int = 4) -> np.ndarray:
    """Pictures [h, w, 3] in rows of equal length as one, on white; small ones are enlarged."""
    side = max(len(picture) for row in rows for picture in row)
    out = np.full(
        (len(rows) * (side + gap) - gap, len(rows[0]) * (side + gap) - gap, 3), 255, np.uint8
    )
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            near = np.arange(side) * len(picture) // side
            top, left = i * (side + gap), j * (side + gap)
            out[top : top + side, left : left + side] = picture[near][:, near]
    return out
