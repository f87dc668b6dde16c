"""What every method, probe and release needs of a backbone."""

from torch import Tensor, nn

from wardround.errors import ConfigError


class Backbone(nn.Module):
    """An encoder of images; its parameters are the kept part of the state."""

    dim: int  # width of the features

    def features(self, images: Tensor) -> Tensor:
        """Return one vector an image, as a probe sees it: [B, C, S, S] or [B, C, S, S, S] -> [B, D]."""
        raise NotImplementedError

    def stages(self) -> list[list[str]]:
        """Return the names of the parameters, stage by stage from the input up; every parameter once."""
        raise NotImplementedError

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass from now on. Raises ConfigError where the family cannot."""
        raise ConfigError("site.toml: checkpointing = true: this federation's backbone cannot; remove the line.")
