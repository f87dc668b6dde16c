"""How an image is augmented into a view: one literal table of defaults a modality, each key overridable."""

from typing import Literal, Self

from pydantic import Field, model_validator

from wardround.config.strict import Strict

Modality = Literal["generic", "chest", "cells", "ct", "mr", "dermoscopy"]

# Where a modality departs from the fields' own defaults, which are those of `generic`. docs/views.md says why.
PRESETS: dict[Modality, dict[str, float | bool]] = {
    "generic": {},
    "chest": {"horizontal_flip": False, "rotation": 10.0, "gamma": 0.2, "blur": 0.01},
    "cells": {"vertical_flip": True, "rotation": 180.0},
    "ct": {"horizontal_flip": False, "rotation": 10.0, "brightness": 0.0, "contrast": 0.0, "window_jitter": 0.2},
    "mr": {"rotation": 10.0, "brightness": 0.2, "contrast": 0.2, "gamma": 0.5},
    "dermoscopy": {
        "vertical_flip": True,
        "rotation": 180.0,
        "brightness": 0.2,
        "contrast": 0.2,
        "saturation": 0.2,
        "hue": 0.02,
        "blur": 0.01,
    },
}

# Of methods that compare two views of an image: under mild crops the two are nearly the same picture.
COMPARED_CROP = (0.3, 1.0)


class ViewsConfig(Strict):
    """How an image is augmented into a view; a key that is not given is as the modality has it (docs/views.md).

    The defaults below are those of generic. Keys from brightness on are for methods that compare views: mae and
    ijepa leave intensities alone.
    """

    modality: Modality = Field(default="generic", description="What the images are, which sets the other defaults.")
    crop_scale: tuple[float, float] = Field(
        default=(0.6, 1.0),
        description="Smallest and largest share of the area, or of the volume, that a random crop keeps, in (0, 1]. "
        "Unset: [0.6, 1.0] for mae and ijepa, [0.3, 1.0] for the methods that compare views.",
    )
    horizontal_flip: bool = Field(default=True, description="Mirror left and right in half of the views.")
    vertical_flip: bool = Field(
        default=False,
        description="Mirror top and bottom in half of the views; of volumes also first and last slice, by itself.",
    )
    rotation: float = Field(
        default=0.0,
        ge=0.0,
        le=180.0,
        description="Largest rotation either way, in degrees; of volumes about each axis.",
    )
    window_jitter: float = Field(
        default=0.0,
        ge=0.0,
        le=0.5,
        description="The intensity window's width changes by at most this share of the stored range, and its centre "
        "by half of it.",
    )
    brightness: float = Field(default=0.4, ge=0.0, le=1.0, description="The factor is drawn from 1 - b to 1 + b.")
    contrast: float = Field(default=0.4, ge=0.0, le=1.0, description="The factor is drawn from 1 - c to 1 + c.")
    saturation: float = Field(
        default=0.0, ge=0.0, le=1.0, description="Of colour: the factor is drawn from 1 - s to 1 + s."
    )
    hue: float = Field(
        default=0.0, ge=0.0, le=0.5, description="Of colour: largest turn of the hues either way; 1 is full circle."
    )
    gamma: float = Field(
        default=0.0, ge=0.0, le=4.0, description="The exponent is drawn log-uniformly from 1 / (1 + g) to 1 + g."
    )
    blur: float = Field(
        default=0.0,
        ge=0.0,
        le=0.1,
        description="Largest standard deviation of a Gaussian blur, as a share of the view's edge, in half of the "
        "views; SimCLR's is 0.009.",
    )
    noise: float = Field(
        default=0.0, ge=0.0, le=0.5, description="Largest standard deviation of Gaussian noise on [0, 1]."
    )

    @model_validator(mode="after")
    def _the_modality_sets_what_is_not_given(self) -> Self:
        # After the others and past the frozen attributes: a validator before them would see lists where
        # strict JSON takes a tuple, and pydantic would refuse them.
        missing = {key: value for key, value in PRESETS[self.modality].items() if key not in self.model_fields_set}
        self.__dict__.update(missing)
        return self

    @model_validator(mode="after")
    def _crop_is_a_range(self) -> Self:
        low, high = self.crop_scale
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"crop_scale = [{low}, {high}]: expected 0 < smallest <= largest <= 1")
        return self
