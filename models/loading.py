"""Official checkpoints into our modules: unchanged keys, safe unpickling; a wrong file is named."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketsam import registry
from pocketsam.errors import CheckpointError, MissingDependency, UsageError, first_line
from pocketsam.models.catalog import spec as spec_of
from pocketsam.models.checkpoints import FINGERPRINTS, HQ_KEY
from pocketsam.models.keys import rename
from pocketsam.models.sam import SegmentAnything

StateDict = dict[str, Tensor]
WRAPPERS = ("state_dict", "model", "model_state_dict", "ema", "module")
# What wrappers of modules put before their keys: data parallelism and averaged weights, and compilation.
PREFIXES = ("module.", "_orig_mod.")
# Keys that transformers' conversions of these models have, and official files have not.
CONVERTED = ("vision_encoder.", "shared_image_embedding.")
COUNTERS = ".num_batches_tracked"


def load_model(name: str, checkpoint: Path, image_size: int | None = None) -> SegmentAnything:
    """Build a model, for its native input side or another, and fill it strictly from a checkpoint file.

    Raises:
        CheckpointError: unreadable, unsafe, or keys and shapes of another model.
        UsageError: the model has no other input side than its own.
    """
    build = registry.load("model", name)
    if image_size not in (None, spec_of(name).image_size):
        if "image_size" not in signature(build).parameters:
            raise UsageError(f"{name} has one input side, {spec_of(name).image_size}, and cannot be loaded for "
                             f"{image_size}; leave the image size out.")
        build = partial(build, image_size=image_size)
    official = read_state_dict(checkpoint)
    state = translate(spec_of(name).family, official)
    with torch.device("meta"):
        wanted = build().state_dict()
    _check_keys(name, checkpoint, state, {k: v.shape for k, v in wanted.items()}, official)
    _check_kinds(checkpoint, state, wanted)
    model: SegmentAnything = build()
    model.load_state_dict(state, strict=False, assign=False)
    del state, official
    _check_finite(model, checkpoint)
    return model.eval().requires_grad_(False)


def read_state_dict(path: Path) -> StateDict:
    """Tensors of a ``.pt``/``.pth`` or ``.safetensors`` file, unwrapped, never executing pickled code.

    Raises:
        CheckpointError: missing, damaged, or holding anything but tensors and plain containers.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {what}; pass the file that `pocketsam models` lists for this model.")
    try:
        if zipfile.is_zipfile(path):
            _check_stored(path)
        if path.suffix == ".safetensors" or _is_safetensors(path):
            from safetensors.torch import load_file

            data: Any = load_file(path)
        else:
            # Mapped, the file's tensors need no memory beside the model's own.
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except CheckpointError:
        raise
    except ModuleNotFoundError as e:
        raise MissingDependency(str(e.name), "torch", f"reading {path.name}") from e
    except PermissionError as e:
        raise CheckpointError(f"checkpoint {path} may not be read ({e.strerror}); change its permissions.") from e
    except pickle.UnpicklingError as e:
        raise CheckpointError(f"checkpoint {path} is damaged or holds more than weights, and was not executed "
                              f"({first_line(e)}); download it again from the official place.") from e
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, zipfile.BadZipFile, AttributeError) as e:
        raise CheckpointError(f"checkpoint {path} is damaged ({first_line(e)}); download it again.") from e
    except Exception as e:  # safetensors raises its own class, which must not be imported to be caught
        raise CheckpointError(f"checkpoint {path} is damaged ({first_line(e)}); download it again.") from e
    return _unwrap(data, path)


def _is_safetensors(path: Path) -> bool:
    """Whether a file of any name begins as safetensors do: the header's length, then JSON."""
    with path.open("rb") as f:
        start = f.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _check_stored(path: Path) -> None:
    """Refuse packed archives: torch writes none, and a small one may unfold to any size. TorchScript is code."""
    with zipfile.ZipFile(path) as archive:
        if any(Path(name).name == "constants.pkl" for name in archive.namelist()):
            raise CheckpointError(f"checkpoint {path} is a TorchScript program; expected the official weights, which "
                                  "`pocketsam models` lists.")
        if any(i.compress_type != zipfile.ZIP_STORED for i in archive.infolist()):
            raise CheckpointError(f"checkpoint {path} is a compressed archive; expected a file of torch.save, so "
                                  "unpack it first.")


def translate(family: str, official: StateDict) -> StateDict:
    """Our names for an official state dict; what image mode never reads is left out (``models/keys.py``)."""
    named = ((rename(family, key), tensor) for key, tensor in official.items())
    return {key: tensor for key, tensor in named if key is not None}


def weights_sha256(model: torch.nn.Module) -> str:
    """Identity of a model's weights: sha256 over sorted keys and tensor bytes, without BatchNorm step counters."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        if not key.endswith(COUNTERS):
            digest.update(key.encode())
            digest.update(tensor.detach().contiguous().numpy().data)
    return digest.hexdigest()


def identify(keys: dict[str, tuple[int, ...]]) -> str | None:
    """The known architecture that a state dict's keys and shapes look like, or None."""
    for name, prints in FINGERPRINTS.items():
        # Plain SAM is part of an HQ model, of which some sizes are not known here.
        if HQ_KEY in keys and HQ_KEY not in prints:
            continue
        if all(keys.get(k) == shape for k, shape in prints.items()):
            return name
    return None


def recognise(checkpoint: Path) -> str:
    """The registry name of the architecture that a checkpoint file holds, from its keys and shapes.

    Raises:
        CheckpointError: unreadable, or of no architecture that is known here.
    """
    state = read_state_dict(checkpoint)
    name = identify({k: tuple(v.shape) for k, v in state.items()})
    if name is None:
        _check_official(checkpoint, state)
    if name is None or name not in registry.MODELS:
        raise CheckpointError(f"checkpoint {checkpoint} holds no model that PocketSAM knows ({len(state)} tensors, "
                              f"{_some(list(state))}); name the model if it is one of those in `pocketsam models`.")
    return name


def _check_official(path: Path, state: StateDict) -> None:
    """Raise CheckpointError for a known model in another library's layout."""
    if any(k.startswith(CONVERTED) for k in state):
        raise CheckpointError(f"checkpoint {path} is a conversion for the transformers library, with other keys; pass "
                              "the official file, which `pocketsam models` lists.")


def _unwrap(data: Any, path: Path) -> StateDict:
    # A dictionary may hold itself.
    for _ in WRAPPERS:
        held = data if isinstance(data, dict) else {}
        inner = next((held[k] for k in WRAPPERS if isinstance(held.get(k), dict)), None)
        # Numbers of a training run may lie beside the weights, tensors among them.
        if inner is None or (_tensors(data) > _tensors(inner) and _tensors(inner)):
            break
        data = inner
    if not isinstance(data, dict) or not _tensors(data):
        raise CheckpointError(f"checkpoint {path} holds no weights; expected a state dict, bare or wrapped in one of "
                              f"{', '.join(WRAPPERS)}.")
    tensors = {str(k): v for k, v in data.items() if isinstance(v, Tensor)}
    for prefix in PREFIXES:
        # A counter or two, such as that of averaged weights, stand without it.
        inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        tensors = inside if 2 * len(inside) > len(tensors) else tensors
    return tensors


def _tensors(data: Any) -> int:
    return sum(isinstance(v, Tensor) for v in data.values())


def _check_keys(name: str, path: Path, state: StateDict, expected: dict[str, torch.Size],
                official: StateDict) -> None:
    missing = [k for k in expected if k not in state and not k.endswith(COUNTERS)]
    unexpected = [k for k in state if k not in expected]
    reshaped = [k for k in expected if k in state and state[k].shape != expected[k]]
    if not (missing or unexpected or reshaped):
        return
    kinds = ((missing, "missing"), (unexpected, "unexpected"), (reshaped, "differently shaped"))
    parts = [f"{len(keys)} {kind} keys ({_some(keys)})" for keys, kind in kinds if keys]
    _check_official(path, official)
    looks = identify({k: tuple(v.shape) for k, v in official.items()})
    hint = (f"it is a changed copy of {name}" if looks == name else f"it looks like {looks}" if looks
            else "it looks like no model that PocketSAM knows")
    raise CheckpointError(f"checkpoint {path} is not {name}: {', '.join(parts)}; {hint}.")


def _check_kinds(path: Path, state: StateDict, wanted: StateDict) -> None:
    """Plain numbers of the right kind: codes of a quantized model, for one, would be copied as if they were weights."""
    for key, tensor in state.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_floating_point() != wanted[key].is_floating_point() or tensor.is_complex():
            raise CheckpointError(f"checkpoint {path} holds {key} as {tensor.layout} {tensor.dtype} on "
                                  f"{tensor.device.type}; expected the plain {wanted[key].dtype} weights of the "
                                  "official file.")


def _check_finite(model: torch.nn.Module, path: Path) -> None:
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"checkpoint {path} holds NaN or infinity in {key}; download it again.")


def _some(keys: list[str], most: int = 3) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
