"""LLM.int8() by the words of its definition, with numpy, value by value: slow, and without the package."""

from __future__ import annotations

from typing import Any

import numpy as np

_UNIT = np.float32(1.0 / 127.0)


def eleven_bits(value: np.float32) -> np.float32:
    """The nearest number of eleven significant bits, ties to even."""
    if not np.isfinite(value) or value == 0:
        return value
    mantissa, exponent = np.frexp(np.float64(value))
    # Of float32's subnormal numbers, the last bits that are rounded away are the same thirteen.
    step = np.ldexp(1.0, int(max(exponent, -125)) - 11)
    return np.float32(np.rint(np.ldexp(mantissa, int(exponent)) / step) * step)


def quantize_rows(values: np.ndarray, threshold: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and outlier columns of float32 `[rows, columns]`."""
    rows, columns = values.shape
    codes, scales = np.zeros((rows, columns), np.int8), np.zeros(rows, np.float32)
    outliers = np.zeros(columns, bool)
    for r in range(rows):
        for c in range(columns):
            size = abs(values[r, c])
            if np.isnan(size):
                continue
            if threshold > 0 and size >= np.float32(threshold):
                outliers[c] = True
            else:
                scales[r] = max(scales[r], size)
    for r in range(rows):
        for c in range(columns):
            value = values[r, c]
            counts = not np.isnan(value) and not outliers[c] and scales[r] > 0 and np.isfinite(scales[r])
            if counts and not (threshold > 0 and abs(value) >= np.float32(threshold)):
                codes[r, c] = np.rint(value * np.float32(127) / scales[r])
    return codes, scales, outliers


def linear(
    x: np.ndarray, codes: np.ndarray, scales: np.ndarray, bias: np.ndarray | None, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """The product before its last rounding, float32 `[rows, out_features]`; and a bound of what order may change."""
    rounded = np.array([[eleven_bits(v) for v in row] for row in x], np.float32).reshape(x.shape)
    a, row_scales, outliers = quantize_rows(rounded, threshold)
    sums = a.astype(np.int64) @ codes.astype(np.int64).T
    value = sums.astype(np.float32) * (row_scales[:, None] * _UNIT)
    slack = np.zeros_like(value, np.float64)
    if outliers.any():
        left: Any = x[:, outliers].astype(np.float64)
        right: Any = codes[:, outliers].astype(np.float64)
        value = value + (left @ right.T).astype(np.float32)
        slack = (np.abs(left) @ np.abs(right).T) * 2.0**-23 * outliers.sum()
        slack = (slack + np.abs(value) * 2.0**-23) * (scales[None, :] / 127.0)
    value = value * (scales[None, :] * _UNIT)
    if bias is not None:
        value = value + bias[None, :]
    return value, slack
