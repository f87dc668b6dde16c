"""Low-rank additions to fixed weights (LoRA, Hu et al. 2022, arXiv:2106.09685), by peft."""

import re
from typing import Any

from torch import nn

from wardround.errors import ConfigError

RANK, ALPHA = 8, 16  # W + (ALPHA / RANK) B A


def add_lora(encoder: nn.Module) -> None:
    """Fix a network's weights and add low-rank ones to the layers that `lora_layers` names, in place.

    Raises ConfigError where peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model  # takes seconds: it imports transformers
    except ImportError as error:
        raise ConfigError("--finetune lora: peft is not installed; pip install 'wardround[lora]'.") from error
    names = lora_layers(encoder)
    # The whole name: as a list, peft would also take layers whose name ends like one of them.
    target = "|".join(re.escape(name) for name in names)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=target), encoder)


def lora_layers(encoder: Any) -> list[str]:
    """Return the layers that get additions: in transformers attention's linear layers, else all ungrouped convolutions.

    Transformers: ViT, Swin, XCiT and MONAI's, whose attention is `attn` by name. Hybrids such as MobileViT
    have both, and only their attention is taken.
    """
    attention = [n for n, layer in encoder.named_modules() if isinstance(layer, nn.Linear) and "attn." in n]
    return attention or [
        name
        for name, layer in encoder.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Conv3d) and layer.groups == 1
    ]
