"""Probes: what a frozen backbone's features are worth, on images it was not trained on. scikit-learn takes a second."""
