"""The contract of the click graphs: what many single clicks on one image pass between encoder and masks."""

from __future__ import annotations

from functools import cache

from pocketsam.specs import GraphSpec, ModelSpec, TensorSpec

# Of the two-way transformer in every family; keys and values are half as wide as tokens.
HEADS = 8
# Clicks at once: fixed, so that every format has one form of a graph and converts it once. Two to sixteen are about
# equally fast, and memory grows with them.
BATCH = 4
# Tokens 1 to 3, the ambiguous masks.
MASKS = 3
# What stands for one click between the score graph and the mask graph.
FACTORS = ("hyper", "weights", "basis", "scales")


@cache
def click_graphs(spec: ModelSpec) -> tuple[GraphSpec, ...]:
    """``click_image``, run once an image; ``click_scores``, a batch of clicks; ``click_masks``, those that are kept.

    With N = h * w positions, d channels a head, C1 = C / 4 and C0 = C / 8 channels of the two upscalings, T tokens (own
    ones, the click, the padding point) and R = 2 * heads * T rows of the factors that stand for a prompt's image; the
    meaning of each tensor is with ``pocketsam.models.click_decoder``. None for a model that is not clickable.
    """
    if not spec.clickable:
        return ()
    n, c = spec.embed_size ** 2, spec.embed_dim
    d = c // 2 // HEADS
    rows = 2 * HEADS * (7 + spec.object_score)
    columns = TensorSpec("columns", "float32", (8 * HEADS, d, n))
    values = TensorSpec("values", "float32", (3 * HEADS, n, d))
    norms = TensorSpec("norms", "float32", (3, n))
    fine = [TensorSpec("fine", "float32", (n, c))]
    if spec.high_res_channels:
        fine += [TensorSpec("skip_1", "float32", (n, c)), TensorSpec("skip_0", "float32", (16 * n, c // 8))]
    shapes = (MASKS, c // 8), (rows, n), (rows, c), (2, n)
    factors = tuple(TensorSpec(k, "float32", (BATCH, *shape)) for k, shape in zip(FACTORS, shapes, strict=True))
    coords = TensorSpec("point_coords", "float32", (BATCH, 1, 2))
    scores = TensorSpec("iou_predictions", "float32", (BATCH, 4))
    masks = TensorSpec("low_res_masks", "float32", (BATCH, MASKS, spec.mask_size, spec.mask_size))
    return (GraphSpec("click_image", spec.feature_specs(), (columns, values, norms, *fine)),
            GraphSpec("click_scores", (columns, values, norms, coords), (scores, *factors)),
            GraphSpec("click_masks", (*fine, *factors), (masks,)))
