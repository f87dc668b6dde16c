"""A backbone probed at the site, on the labels that the site lends to it; of what is found, scores alone leave.

A score tells little of any one patient, and promises nothing: it bears no noise. So none is given where the
federation promises privacy by differential privacy, whose budget pays for training alone, and none of few patients.
"""

from typing import TYPE_CHECKING

import numpy as np

from wardround.backbones import released_model
from wardround.client import correction
from wardround.config import Protocol, SiteConfig
from wardround.data import LabelledImages, read_labelled, select_site
from wardround.data.patients import pseudonym, read_opt_outs, read_salt
from wardround.errors import DataError, PolicyRefusal
from wardround.probe.site_scores import Figures, SiteScores
from wardround.update import State

if TYPE_CHECKING:
    from wardround.probe.evaluation import Evaluation


def refuse_scores(site: SiteConfig, protocol: Protocol) -> None:
    """Raise PolicyRefusal where this site gives no scores at all."""
    if site.evaluation is None:
        raise PolicyRefusal("this site answers no evaluation ([evaluation] in site.toml).")
    if protocol.privacy.unit != "none":
        raise PolicyRefusal(
            f"scores bear no noise, and [privacy] unit = '{protocol.privacy.unit}' promises that what leaves does."
        )


def scores(site: SiteConfig, protocol: Protocol, state: State, device: str) -> SiteScores:
    """Return the scores of a state's backbone beside its random initialisation and raw pixels, by `evaluate`'s probes.

    Raises PolicyRefusal as `refuse_scores` does and where a class has few test patients; DataError for a labelled
    folder that is wrong.
    """
    refuse_scores(site, protocol)
    from wardround.downstream.arms import (  # scikit-learn takes seconds to import
        Arm,
        Network,
        raw_pixels,
        untrained_arm,
    )
    from wardround.downstream.evaluate import evaluate

    assert site.evaluation is not None
    lent = site.evaluation
    salt = read_salt(site.work)
    outs = read_opt_outs(site.images.opt_out, site.name, salt)

    def opted_out(patient: str) -> bool:
        return pseudonym(salt, patient) in outs

    found = read_labelled(lent.folder, protocol.data, lent.label, opted_out=opted_out)
    images = select_site(found, lent.site)
    _refuse_few(images, lent.patients)
    own, _ = correction.parted(state)
    backbone = Network(lambda shown: released_model(protocol, own, shown), protocol, device=device)
    arms: dict[str, Arm] = {
        "backbone": backbone,
        "random": untrained_arm(protocol, device=device),
        "raw pixels": raw_pixels,
    }
    measured = evaluate(arms, images, fractions=(1.0,), draws=1, seed=protocol.seed)
    return SiteScores(
        classes=len(measured.classes),
        train_images=measured.images["train"],
        train_patients=measured.patients["train"],
        test_images=measured.images["test"],
        test_patients=measured.patients["test"],
        linear=_figures(measured, "linear"),
        nearest=_figures(measured, "k-NN"),
    )


def _refuse_few(images: LabelledImages, least: int) -> None:
    """Raise PolicyRefusal where so few test patients have a class that a score would tell of each."""
    for label in range(len(images.classes)):
        rows = (images.labels == label) & (images.splits == "test")
        if len(np.unique(images.patients[rows])) < least:
            raise PolicyRefusal(f"a class has fewer than {least} test patients ([evaluation] patients in site.toml).")


def _figures(found: "Evaluation", probe: str) -> dict[str, Figures]:
    """Return a probe's scores by arm, to three digits: more would tell of single images."""
    figures = {}
    for row in found.rows:
        if row.probe == probe:
            if row.low is None or row.high is None:
                raise DataError("the labelled images have too few test patients for an interval.")
            ends = (row.mean.headline[0], row.low.headline[0], row.high.headline[0])
            areas = (row.mean.auc, row.low.auc, row.high.auc)
            figures[row.arm] = Figures(*(round(float(value), 3) for value in (*ends, *areas)))
    return figures
