"""The errors a person can meet, and what each is for.

    WardroundError
    ├── ConfigError       a config file or a command's option is wrong
    ├── DataError         a site's or a coordinator's images cannot be used as they are
    ├── PolicyRefusal     a site declines what the coordinator asks
    ├── BudgetExhausted   the privacy budget does not cover what is asked
    ├── UpdateError       an update cannot be folded
    ├── CheckpointError   a checkpoint or a run folder is damaged or belongs elsewhere
    ├── TrackingError     MLflow cannot be reached, or refuses
    └── ReleaseRefusal    a version does not pass the gate to the alias champion

A message is one line: who, what was found and what was expected, and the remedy. The command
prints it and exits with 2. Anything else that is raised is a defect of Wardround, not of its user.
"""


class WardroundError(Exception):
    """What a user can mend."""


class ConfigError(WardroundError):
    """A config file, or an option of a command, is wrong."""


class DataError(WardroundError):
    """Images cannot be used as they are. Its text stays at the site."""


class PolicyRefusal(WardroundError):
    """A site declines what the coordinator asks."""


class BudgetExhausted(WardroundError):
    """The privacy budget does not cover what is asked, or cannot be counted with it. Its text stays at the site."""


class UpdateError(WardroundError):
    """An update cannot be folded."""


class CheckpointError(WardroundError):
    """A checkpoint or a run folder is damaged, or belongs to another federation."""


class TrackingError(WardroundError):
    """MLflow cannot be reached, or refuses."""


class ReleaseRefusal(WardroundError):
    """A version does not pass the gate to the alias champion."""
