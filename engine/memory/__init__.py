"""How much memory a run takes. Torch-free.

`sizes` are what headers tell, `constants` what was derived, `forecast` what follows from both for a run's settings, and
`calibration` what was measured.
"""

from lorasmith.engine.memory.constants import GIB as GIB
from lorasmith.engine.memory.constants import MIB as MIB
from lorasmith.engine.memory.constants import BlockGroup as BlockGroup
from lorasmith.engine.memory.constants import Law as Law
from lorasmith.engine.memory.constants import ModelMemory as ModelMemory
from lorasmith.engine.memory.constants import PartMemory as PartMemory
from lorasmith.engine.memory.constants import StepLaws as StepLaws
from lorasmith.engine.memory.constants import StepMemory as StepMemory
from lorasmith.engine.memory.constants import find_memory as find_memory
from lorasmith.engine.memory.constants import model_memories as model_memories
from lorasmith.engine.memory.sizes import AdaptedLayers as AdaptedLayers
from lorasmith.engine.memory.sizes import adapted_layers as adapted_layers
from lorasmith.engine.memory.sizes import denoiser_tensors as denoiser_tensors
from lorasmith.engine.memory.sizes import num_parameters as num_parameters
from lorasmith.engine.memory.sizes import unfound_patterns as unfound_patterns
from lorasmith.engine.memory.sizes import weights_bytes as weights_bytes
