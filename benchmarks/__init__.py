"""What convnorm costs, as ratios to a bare read of the same weights: ``pytest --benchmark``."""
