"""Data sets that tensorflow-datasets does not have, as builders of its kind."""
