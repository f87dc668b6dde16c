"""How the notes begin without which scores must not be read: wherever the scores go, these go along."""

FORCED = "FORCED: "
NO_PATIENT = "NO PATIENT: "
