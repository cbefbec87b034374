"""Reading LoRA files of any layout, and beginning a run with one."""

from __future__ import annotations

from lorasmith.engine.lora_files.reading import LoraFile as LoraFile
from lorasmith.engine.lora_files.reading import read_lora as read_lora
from lorasmith.engine.lora_files.start import start_adapter as start_adapter
