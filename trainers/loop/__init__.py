"""The loop that every training shares, and what a training is made of."""
