"""The newest state probed at the sites: each on its own labels, of which scores alone come back.

RUN/evaluations/00012.json   what the sites said of round 12, and why others said nothing
"""

import json
from pathlib import Path

from wardround.encoding import inflate
from wardround.errors import CheckpointError, ConfigError, UpdateError
from wardround.probe.site_scores import Asked, SiteScores
from wardround.registry.durable import write_file
from wardround.server.rounds import Ask, whole_state
from wardround.server.run_folder import RunFolder
from wardround.update import Refusal, Task


def refuse_unfit(run: RunFolder) -> None:
    """Raise ConfigError where no site may answer or could, or there is nothing to ask about."""
    if (unit := run.config.privacy.unit) != "none":
        raise ConfigError(
            f"--federated: scores bear no noise, and this federation promises [privacy] unit = '{unit}'; evaluate on "
            "labelled images of your own."
        )
    if run.config.data.dimensions == 3:
        raise ConfigError(
            "--federated: this federation is of volumes, and only backbones of flat images are probed; let the sites "
            "measure the release in MONAI ('wardround export --format monai')."
        )
    if not run.committed()[-1]:
        raise CheckpointError(f"{run.path}: no round is committed yet, so there is nothing to evaluate.")


def ask_sites(run: RunFolder, ask: Ask) -> Asked:
    """Ask every member for its scores of the newest state, wait as for a round, and keep them in the run folder."""
    refuse_unfit(run)
    last = run.newest()
    protocol = json.dumps(run.protocol.model_dump(mode="json"), sort_keys=True)
    task = Task(last.round, protocol, 0, whole_state(run, last), kind="evaluation")
    asked = Asked(last.round, last.hash, {}, {})
    for site, answer in ask(dict.fromkeys(run.members, task)):
        found = _scores(answer)
        if isinstance(found, Refusal):
            asked.refused[site] = f"{found.code}: {found.text}"
        else:
            asked.scores[site] = found
    write_file(kept_at(run, last.round), asked.to_json().encode())
    return asked


def _scores(answer: bytes | Refusal) -> SiteScores | Refusal:
    """Return the scores in an answer; or why there are none, as it may be kept and printed."""
    if isinstance(answer, Refusal):
        return answer.shown()
    try:
        return SiteScores.from_bytes(inflate(answer, {}, "float32", "its scores"))
    except UpdateError as error:
        return Refusal("invalid", str(error)).shown()


def read_asked(run: RunFolder) -> Asked:
    """Return what was last asked about the newest round."""
    return Asked.from_json(kept_at(run, run.committed()[-1]).read_text())


def kept_at(run: RunFolder, round: int) -> Path:
    """Return where the answers of a round are kept."""
    return run.path / "evaluations" / f"{round:05d}.json"
