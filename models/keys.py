"""Official state_dict keys that are named differently here, and those that image mode never reads. No torch.

Modules carry the official names wherever one network serves several families; where a family names the same layer
otherwise, the difference is one line of a table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

Rules = tuple[tuple[str, str], ...]

_SAM2_DECODER: Rules = (
    (r"^no_mem_embed$", "image_encoder.no_mem_embed"),
    (r"^sam_mask_decoder\.conv_s([01])\.", r"image_encoder.conv_s\1."),
    (r"^sam_mask_decoder\.", "mask_decoder."),
    (r"^sam_prompt_encoder\.", "prompt_encoder."),
    (r"^(mask_decoder\.transformer\.layers\.\d+\.mlp)\.layers\.0\.", r"\1.lin1."),
    (r"^(mask_decoder\.transformer\.layers\.\d+\.mlp)\.layers\.1\.", r"\1.lin2."),
    (r"^image_encoder\.neck\.convs\.(\d)\.conv\.", r"image_encoder.laterals.\1."),
    (r"^(image_encoder\.trunk\.blocks\.\d+\.mlp)\.layers\.0\.", r"\1.lin1."),
    (r"^(image_encoder\.trunk\.blocks\.\d+\.mlp)\.layers\.1\.", r"\1.lin2."),
)


def _edgetam_trunk() -> Rules:
    """timm's stages in the order of EdgeSAM's list of layers (first block of each stage at 1, 5, 9 and 25)."""
    def layer(n: int) -> str:
        return f"image_encoder.trunk.features.{n}."

    rules = [(r"^image_encoder\.trunk\.body\.stem\.conv1\.", layer(0) + "0."),
             (r"^image_encoder\.trunk\.body\.stem\.conv2\.", layer(0) + "2.")]
    for stage, (start, blocks) in enumerate(((1, 2), (5, 2), (9, 14), (25, 2))):
        old = rf"^image_encoder\.trunk\.body\.stages_{stage}\."
        rules += [(old + rf"blocks\.{i}\.", layer(start + i)) for i in range(blocks)]
        rules += [(old + r"downsample\.pre_block\.", layer(start - 2)),
                  (old + r"downsample\.spatial_downsample\.", layer(start - 1) + "token_mixer.0."),
                  (old + r"downsample\.channel_downsample\.", layer(start - 1) + "token_mixer.2."),
                  (old + r"downsample\.ffn\.", layer(start - 1) + "channel_mixer.")]
    inside = r"^(image_encoder\.trunk\.features\.\d+)\."
    return (*rules,
            (inside + r"token_mixer\.(conv1?)\.", r"\1.token_mixer.0.\2."),
            (inside + r"se\.", r"\1.token_mixer.1."),
            (inside + r"channel_mixer\.conv1\.", r"\1.channel_mixer.m.0."),
            (inside + r"channel_mixer\.conv2\.", r"\1.channel_mixer.m.2."))


RENAMES: dict[str, Rules] = {
    "edge_sam": ((r"^image_encoder\.fuse_stage3\.op_list\.0\.", "image_encoder.fuse_stage3."),),
    "sam_hq": (
        (r"^image_encoder\.", "image_encoder.trunk."),
        (r"^mask_decoder\.(compress_vit_feat|embedding_encoder)\.", r"image_encoder.\1."),
    ),
    "efficient_sam": (
        (r"\.mlp\.fc1\.", ".mlp.lin1."),
        (r"\.mlp\.fc2\.", ".mlp.lin2."),
        (r"^(mask_decoder\.transformer\.layers\.\d+\.mlp)\.layers\.0\.0\.", r"\1.lin1."),
        (r"^(mask_decoder\.transformer\.layers\.\d+\.mlp)\.fc\.", r"\1.lin2."),
        (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d|iou_prediction_head))\.layers\.(\d)\.0\.",
         r"\1.layers.\2."),
        (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d|iou_prediction_head))\.fc\.", r"\1.layers.2."),
        (r"^mask_decoder\.final_output_upscaling_layers\.0\.([01])\.", r"mask_decoder.output_upscaling.\1."),
        (r"^mask_decoder\.final_output_upscaling_layers\.1\.0\.", "mask_decoder.output_upscaling.3."),
        (r"^prompt_encoder\.invalid_points\.", "prompt_encoder.not_a_point_embed."),
        (r"^prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embeddings.1."),
        (r"^prompt_encoder\.bbox_top_left_embeddings\.", "prompt_encoder.point_embeddings.2."),
        (r"^prompt_encoder\.bbox_bottom_right_embeddings\.", "prompt_encoder.point_embeddings.3."),
    ),
    "sam2": _SAM2_DECODER,
    "edgetam": (*_SAM2_DECODER, *_edgetam_trunk()),
    "efficienttam": (
        *_SAM2_DECODER,
        (r"^image_encoder\.trunk\.", "image_encoder."),
        (r"^(image_encoder\.blocks\.\d+\.mlp)\.layers\.0\.", r"\1.lin1."),
        (r"^(image_encoder\.blocks\.\d+\.mlp)\.layers\.1\.", r"\1.lin2."),
        (r"^image_encoder\.neck\.convs\.0\.conv_1x1\.", "image_encoder.neck.0."),
        (r"^image_encoder\.neck\.convs\.0\.norm_0\.", "image_encoder.neck.1."),
        (r"^image_encoder\.neck\.convs\.0\.conv_3x3\.", "image_encoder.neck.2."),
        (r"^image_encoder\.neck\.convs\.0\.norm_1\.", "image_encoder.neck.3."),
    ),
}

_VIDEO = {
    "memory_attention.": "attends to earlier frames of a video",
    "memory_encoder.": "writes a frame's mask into the video memory",
    "maskmem_tpos_enc": "time encoding of the video memory",
    "no_mem_pos_enc": "position of the empty video memory, read by memory attention only",
    "no_obj_ptr": "object pointer of video frames without the object",
    "no_obj_embed_spatial": "memory entry of video frames without the object",
    "mask_downsample.": "prepares mask inputs of the video memory",
    "obj_ptr_proj.": "object pointers of the video memory",
    "obj_ptr_tpos_proj.": "time encoding of object pointers",
    "spatial_perceiver.": "compresses the video memory (EdgeTAM)",
}
# Key prefixes that image mode never reads, and why.
IGNORED: dict[str, dict[str, str]] = {
    "sam2": _VIDEO,
    "edgetam": _VIDEO,
    "efficienttam": _VIDEO,
    "edge_sam": {"fpn.": "feature pyramid of the optional region proposals", "rpn_head.": "optional region proposals"},
}


def rename(family: str, key: str) -> str | None:
    """Our name of an official key, or None for a key that is ignored on purpose.

    A key that is already ours stays as it is, unless a rule happens to match it.
    """
    if any(key.startswith(prefix) for prefix in IGNORED.get(family, ())):
        return None
    for pattern, replacement in RENAMES.get(family, ()):
        key = re.sub(pattern, replacement, key)
    return key


def ignored(family: str, keys: Iterable[str]) -> dict[str, str]:
    """The keys among ``keys`` that image mode leaves out, with the reason for each."""
    reasons = IGNORED.get(family, {})
    return {k: why for k in keys for prefix, why in reasons.items() if k.startswith(prefix)}
