"""What tests of regions share."""

import numpy as np


def covered_slowly(mask, frame, window, size):
    """The share of each cell of the window that is in the mask, cell pair by cell pair."""
    (h, w), (fx0, fy0, fx1, fy1), (x0, y0, x1, y1) = mask.shape, frame, window
    result = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            top, bottom = (y0 + (y1 - y0) * k / size for k in (i, i + 1))
            left, right = (x0 + (x1 - x0) * k / size for k in (j, j + 1))
            for a in range(h):
                for b in range(w):
                    mt, mb = (fy0 + (fy1 - fy0) * k / h for k in (a, a + 1))
                    ml, mr = (fx0 + (fx1 - fx0) * k / w for k in (b, b + 1))
                    high = max(0.0, min(bottom, mb) - max(top, mt))
                    wide = max(0.0, min(right, mr) - max(left, ml))
                    result[i, j] += mask[a, b] * high * wide
            result[i, j] /= (bottom - top) * (right - left)
    return result
