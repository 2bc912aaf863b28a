"""What each operator kind costs besides matrix products, for the four formats at once.

The formats spell one operator in several ways (``Sub``, ``SUB``, ``Subtract``, ``sub``), so names are compared in lower
case without underscores.
"""

from __future__ import annotations

import math
from typing import Literal

Cost = Literal["view", "move", "elementwise", "normal", "reduction"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The result is the same bytes under another shape.
VIEWS = _words("""
    reshape squeeze unsqueeze expanddims flatten flatten2d identity
""")
# Values travel or change their type; nothing is computed.
MOVES = _words("""
    transpose concat concatenation stack pack unpack split splitv variadicsplit slice stridedslice slicebyindex
    slicebysize gather gathernd gatherelements gatheralongaxis embeddinglookup pad padv2 mirrorpad tile expand
    broadcast broadcastto fill constantofshape range range1d shape shapeof size cast castlike convert convertlike
    quantize dequantize quantizelinear dequantizelinear dynamicquantizelinear fakequantize reverse reversev2
    reversesequence depthtospace spacetodepth batchtospacend spacetobatchnd pixelshuffle pixelunshuffle
    resizenearestneighbor upsamplenearestneighbor scatternd scatterelements scatterndupdate scatterelementsupdate
    onehot eyelike nonzero roll trilu dropout
""")
# One operation for each output element; activations count as one however they are approximated.
ELEMENTWISE = _words("""
    add addn addv2 sub subtract mul multiply div divide realdiv floordiv mod floormod pow power neg negative abs sign
    sqrt rsqrt square squareddifference exp exp2 log erf sin cos tan tanh sigmoid logistic hardsigmoid sigmoidhard
    relu relu6 reluclipped relun1to1 prelu leakyrelu elu selu celu gelu silu swish hswish hardswish mish softplus
    softsign clip clamp thresholdedrelu floor ceil ceiling round roundtiesatezero reciprocal inverse max min maximum
    minimum equal notequal greater greaterequal greaterorequal less lessequal lessorequal and or not xor logicaland
    logicalor logicalnot logicalxor where select selectv2 isnan isinf resizebilinear upsamplebilinear interpolate resize
    upsample cumsum bitwiseand bitwiseor bitwisenot
""")
# Several passes over the data, which no engine folds into the operator before; one operation an element like the rest.
NORMALS = _words("""
    softmax logsoftmax layernorm layernormalization batchnorm batchnormalization batchnorminference
    instancenorm instancenormalization groupnorm groupnormalization rmsnorm rmsnormalization
    simplifiedlayernormalization mvn normalizel2 l2normalization lpnormalization l2norm
""")
# One operation for each input element.
REDUCTIONS = _words("""
    mean sum reducemean reducesum reducemax reducemin reduceprod reducel1 reducel2 reducel2norm reducesumsquare
    reduceargmax reduceargmin reduceall reduceany argmax argmin topk globalaveragepool globalmaxpool
    reducelogicaland reducelogicalor
""")
# Engines read the small numbers themselves: what these return is never written.
DEQUANTIZERS = frozenset({"dequantize", "dequantizelinear"})
# Done while the result of the operator before is written.
CONVERSIONS = _words("cast castlike convert convertlike quantize quantizelinear fakequantize")
# Their results depend on shapes alone, which are fixed once the batch is.
SHAPE_ONLY = frozenset({"shape", "shapeof", "size", "eyelike"})

_TABLE: dict[str, Cost] = {
    **dict.fromkeys(VIEWS, "view"), **dict.fromkeys(MOVES, "move"), **dict.fromkeys(ELEMENTWISE, "elementwise"),
    **dict.fromkeys(NORMALS, "normal"), **dict.fromkeys(REDUCTIONS, "reduction"),
}


def plain(kind: str) -> str:
    """The operator kind as the tables above spell it."""
    return kind.lower().replace("_", "")


def cost(kind: str) -> Cost | None:
    """What an operator kind costs, or None for a kind that is in no table."""
    return _TABLE.get(plain(kind))


def attention(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], masked: bool) -> int:
    """Operations of softmax(query key^T * scale + mask) value for shapes (..., L, E), (..., S, E), (..., S, V)."""
    scores = math.prod(query[:-1]) * key[-2]
    return 2 * scores * (query[-1] + value[-1]) + scores * (2 + masked)
