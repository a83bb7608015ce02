"""Attacks on a classifier: PGD in the forms that the trainings use, and adversarial weight perturbation."""
