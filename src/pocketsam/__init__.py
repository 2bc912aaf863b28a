"""PocketSAM: Segment Anything models on phones, browsers and boards.

``load`` opens a bundle or a checkpoint and returns a predictor; ``export`` makes a bundle. Importing this package
needs numpy and Pillow only.
"""

from pocketsam.api import export, load
from pocketsam.embedding import Embedding
from pocketsam.errors import PocketSamError
from pocketsam.predictor import Predictor, Result
from pocketsam.prompts import Prompt
from pocketsam.specs import ModelSpec

__version__ = "0.1.0"
__all__ = ["Embedding", "ModelSpec", "PocketSamError", "Predictor", "Prompt", "Result", "__version__", "export", "load"]
