"""FreeSOLO's formulas in float64, by loops over pixels, objects and cells.

Written from the specification, not from the code. Differentiable where a loss is.

Legend: H W pixels, h w mask pixels, S grid cells per side, K cells of all levels.
"""

import math
from fractions import Fraction

import numpy as np
import torch

# Losses. Targets are bool arrays (h, w), logits float64 tensors.


def dice(a, b):
    overlap = sum(x * y for x, y in zip(a, b, strict=True))
    return 1 - 2 * overlap / (sum(x * x for x in a) + sum(y * y for y in b) + 1e-5)


def max_projection(logits, target):
    p = torch.sigmoid(logits)
    h, w = target.shape
    columns = dice([p[:, x].max() for x in range(w)], [float(target[:, x].any()) for x in range(w)])
    rows = dice([p[y].max() for y in range(h)], [float(target[y].any()) for y in range(h)])
    return columns + rows


def avg_projection(logits, target):
    p = torch.sigmoid(logits)
    h, w = target.shape
    columns = dice([sum(p[:, x]) / h for x in range(w)], [target[:, x].sum() / h for x in range(w)])
    rows = dice([sum(p[y]) / w for y in range(h)], [target[y].sum() / w for y in range(h)])
    return columns + rows


def lab(rgb):
    """CIE Lab (D65, 2 degrees) of one sRGB colour in 0..255."""
    linear = []
    for c in rgb:
        c = float(c) / 255
        linear.append(((c + 0.055) / 1.055) ** 2.4 if c > 0.04045 else c / 12.92)
    r, g, b = linear
    xyz = (
        0.412453 * r + 0.357580 * g + 0.180423 * b,
        0.212671 * r + 0.715160 * g + 0.072169 * b,
        0.019334 * r + 0.119193 * g + 0.950227 * b,
    )
    f = []
    for value, white in zip(xyz, (0.95047, 1.0, 1.08883), strict=True):
        t = value / white
        f.append(t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def lab_of_mask_pixels(image, h, w, stride=4):
    """Lab (h, w, 3) of an RGB image (3, H, W), black where the mask is larger than the image."""
    padded = np.zeros((3, h * stride, w * stride))
    padded[:, : image.shape[1], : image.shape[2]] = image
    out = np.zeros((h, w, 3))
    for y in range(h):
        for x in range(w):
            block = padded[:, y * stride : (y + 1) * stride, x * stride : (x + 1) * stride]
            out[y, x] = lab([int(channel.sum() / stride**2) for channel in block])
    return out


def valid_mask_pixels(size, h, w, bottom, stride=4):
    """Which mask pixels may be neighbours: sampled in the image without its bottom rows."""
    valid = np.zeros((h, w), dtype=bool)
    for y in range(h):
        for x in range(w):
            row, column = stride // 2 + stride * y, stride // 2 + stride * x
            valid[y, x] = row < size[0] - bottom and column < size[1]
    return valid


def neighbours(y, x, h, w, size, dilation):
    r = size // 2
    for dy in range(-r, r + 1):
        for dx in range(-r, r + 1):
            j = (y + dy * dilation, x + dx * dilation)
            if (dy, dx) != (0, 0) and 0 <= j[0] < h and 0 <= j[1] < w:
                yield j


def similarity(colors, i, j):
    return math.exp(-0.5 * math.sqrt(((colors[i] - colors[j]) ** 2).sum()))


def threshold_margin(colors, size, dilation, threshold):
    """How near the similarity of any pair comes to the threshold."""
    h, w = colors.shape[:2]
    return min(
        (
            abs(similarity(colors, (y, x), j) - threshold)
            for y in range(h)
            for x in range(w)
            for j in neighbours(y, x, h, w, size, dilation)
        ),
        default=1.0,
    )


def pairwise(logits, target, colors, valid, size=3, dilation=2, threshold=0.3):
    """Sum of the weighted losses of a mask, and of the weights."""
    h, w = target.shape
    # 1 - sigmoid(a) is sigmoid(-a), which does not round to 0.
    p, q = torch.sigmoid(logits), torch.sigmoid(-logits)
    total, weights = logits.sum() * 0, 0
    for y in range(h):
        for x in range(w):
            if not (target[y].any() and target[:, x].any()):
                continue
            for j in neighbours(y, x, h, w, size, dilation):
                if valid[j] and similarity(colors, (y, x), j) >= threshold:
                    total = total - torch.log(p[y, x] * p[j] + q[y, x] * q[j])
                    weights += 1
    return total, weights


def by_level(values, levels):
    """Mean over each level, then over the levels there are."""
    values, means = list(values), []
    for level in sorted(set(levels)):
        own = [v for v, other in zip(values, levels, strict=True) if other == level]
        means.append(sum(own) / len(own))
    return sum(means) / len(means) if means else 0.0


def pairwise_by_level(sums, weights, levels):
    means = []
    for level in sorted(set(levels)):
        own = [i for i, other in enumerate(levels) if other == level]
        means.append(sum(sums[i] for i in own) / max(sum(weights[i] for i in own), 1))
    return sum(means) / len(means) if means else 0.0


def focal(logits, positive, alpha=0.25, gamma=2.0):
    """Logits (B, K, classes); `positive` the (image, cell) with an object, all of class 0."""
    total = logits.sum() * 0
    for b, image in enumerate(logits):
        for k, cell in enumerate(image):
            for c, a in enumerate(cell):
                sign = 1 if c == 0 and (b, k) in positive else -1
                p, q = torch.sigmoid(sign * a), torch.sigmoid(-sign * a)
                weight = alpha if sign == 1 else 1 - alpha
                total = total - weight * q**gamma * torch.log(p)
    return total / (len(positive) + 1)


def semantic(predicted, targets):
    """Mean of 1 - cosine over pairs of vectors with a target that is not 0."""
    losses = [
        1 - (p * t).sum() / (p.norm() * t.norm())
        for p, t in zip(predicted, targets, strict=True)
        if t.abs().max() > 0
    ]
    return sum(losses) / len(losses) if losses else 0.0


# Targets.


def center_of_mass(mask):
    """(x, y) exactly."""
    points = [(x, y) for y, x in zip(*np.nonzero(mask), strict=True)]
    n = max(len(points), 1)
    return Fraction(int(sum(x for x, _ in points)), n), Fraction(int(sum(y for _, y in points)), n)


def cells_of_object(box, center, padded, grids, ranges, sigma=Fraction(1, 5)):
    """[(level, row, column)] of an object, and how near it comes to another decision.

    Args:
        box: XYXY numbers.
        center: (x, y).
        padded: (H, W) of the padded image.
        grids, ranges: of the levels.
    """
    box, center = [Fraction(v) for v in box], [Fraction(v) for v in center]
    width, height = box[2] - box[0], box[3] - box[1]
    area = width * height
    cells, margin = [], Fraction(1)

    def cell(position, side, s):
        nonlocal margin
        # c / side over 1 / S
        exact = position / side / Fraction(1, s)
        margin = min(margin, abs(exact - round(exact)))
        return math.floor(exact)

    for level, (s, (least, most)) in enumerate(zip(grids, ranges, strict=True)):
        if not least**2 <= area <= most**2:
            continue
        half_w, half_h = sigma * width / 2, sigma * height / 2
        column, row = cell(center[0], padded[1], s), cell(center[1], padded[0], s)
        left = max(0, column - 1, cell(center[0] - half_w, padded[1], s))
        right = min(s - 1, column + 1, cell(center[0] + half_w, padded[1], s))
        top = max(0, row - 1, cell(center[1] - half_h, padded[0], s))
        bottom = min(s - 1, row + 1, cell(center[1] + half_h, padded[0], s))
        cells += [(level, y, x) for y in range(top, bottom + 1) for x in range(left, right + 1)]
    return cells, margin


def cell_index(level, row, column, grids):
    return sum(s * s for s in grids[:level]) + row * grids[level] + column


def bilinear(plane, out_h, out_w, scale=None):
    """Half-pixel bilinear resizing of (h, w) float64; `scale` overrides the quotient of sizes."""
    h, w = plane.shape
    out = np.zeros((out_h, out_w))
    step_y = 1 / scale if scale else h / out_h
    step_x = 1 / scale if scale else w / out_w
    for y in range(out_h):
        v = max((y + 0.5) * step_y - 0.5, 0)
        y0 = min(int(v), h - 1)
        y1 = min(y0 + 1, h - 1)
        b = v - y0
        for x in range(out_w):
            u = max((x + 0.5) * step_x - 0.5, 0)
            x0 = min(int(u), w - 1)
            x1 = min(x0 + 1, w - 1)
            a = u - x0
            top = (1 - a) * plane[y0, x0] + a * plane[y0, x1]
            low = (1 - a) * plane[y1, x0] + a * plane[y1, x1]
            out[y, x] = (1 - b) * top + b * low
    return out


def small_mask_values(mask, h, w, stride=4):
    """Values (h, w) of the shrunken mask, 0 in the padding; the mask is where they reach 0.5."""
    own_h, own_w = (max(1, math.floor(side / stride + 0.5)) for side in mask.shape)
    values = np.zeros((h, w))
    values[:own_h, :own_w] = bilinear(mask.astype(float), own_h, own_w)
    return values


# Inference.


def point_nms(scores):
    """(S, S) scores that are the largest of rows i-1, i and columns j-1, j; 0 for others."""
    out = np.zeros_like(scores)
    for i in range(scores.shape[0]):
        for j in range(scores.shape[1]):
            window = scores[max(i - 1, 0) : i + 1, max(j - 1, 0) : j + 1]
            if scores[i, j] == window.max():
                out[i, j] = scores[i, j]
    return out


def matrix_nms(masks, scores, classes, kernel="gaussian", sigma=2.0):
    """Decayed scores of binary masks in falling order of their scores."""
    n = len(masks)
    iou = np.zeros((n, n))
    for i in range(n):
        for j in range(i + 1, n):
            if classes[i] == classes[j]:
                shared = int((masks[i] & masks[j]).sum())
                iou[i, j] = shared / (int(masks[i].sum()) + int(masks[j].sum()) - shared)
    most = [max(iou[k, i] for k in range(n)) for i in range(n)]
    decayed = []
    for j in range(n):
        factors = []
        for i in range(n):
            if kernel == "gaussian":
                factors.append(math.exp(-sigma * iou[i, j] ** 2) / math.exp(-sigma * most[i] ** 2))
            else:
                factors.append((1 - iou[i, j]) / (1 - most[i]))
        decayed.append(scores[j] * min(factors))
    return np.array(decayed)


def detect(
    scores, kernels, features, strides, score_thr=0.1, mask_thr=0.5, nms_pre=500, update_thr=0.05,
    max_per_img=100, **nms
):  # fmt: skip
    """Objects of one image, best first: dicts with cell, class, probabilities and scores.

    Args:
        scores: (K, classes) after point NMS.
        kernels: (K, E).
        features: (E, h, w).
        strides: (K,).
    """
    found = []
    for k in range(scores.shape[0]):
        for c in range(scores.shape[1]):
            if not scores[k, c] > score_thr:
                continue
            logits = sum(kernels[k, e] * features[e] for e in range(len(features)))
            p = 1 / (1 + np.exp(-logits))
            mask = p > mask_thr
            if not mask.sum() > strides[k]:
                continue
            maskness = p[mask].sum() / mask.sum()
            found.append(
                {
                    "cell": k,
                    "class": c,
                    "probabilities": p,
                    "category": scores[k, c],
                    "maskness": maskness,
                    "score": scores[k, c] * maskness,
                }
            )
    found = sorted(found, key=lambda x: -x["score"])[:nms_pre]
    decayed = matrix_nms(
        [x["probabilities"] > mask_thr for x in found],
        [x["score"] for x in found],
        [x["class"] for x in found],
        **nms,
    )
    for x, score in zip(found, decayed, strict=True):
        x["score"] = score
    kept = [x for x in found if x["score"] >= update_thr]
    return sorted(kept, key=lambda x: -x["score"])[:max_per_img]


def mask_values_in_file(probabilities, input_size, output_size, ratio=4):
    """Probabilities at the size of the image file."""
    h, w = probabilities.shape
    large = bilinear(probabilities, h * ratio, w * ratio, scale=ratio)
    return bilinear(large[: input_size[0], : input_size[1]], *output_size)


def tight_box(mask):
    ys, xs = np.nonzero(mask)
    return [int(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)]


def released_box(mask):
    """Centre (mean of the occupied columns, rows) -/+ half of their number."""
    box = []
    for positions in (np.nonzero(mask.any(0))[0], np.nonzero(mask.any(1))[0]):
        center = sum(int(p) for p in positions) / len(positions)
        box.append((center - len(positions) / 2, center + len(positions) / 2))
    return [box[0][0], box[1][0], box[0][1], box[1][1]]
