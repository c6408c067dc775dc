"""What the library knows of model families: one file each."""

from adaptive._families._family import Embed, Family, Native
from adaptive._families._readout import Readout
from adaptive._families._registry import FAMILIES, family_of, layers_of

__all__ = ["FAMILIES", "Embed", "Family", "Native", "Readout", "family_of", "layers_of"]
