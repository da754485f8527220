"""How good a classifier is: predictions counted, metrics, plots."""
