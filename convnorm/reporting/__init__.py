"""What a report is made of: layers found in a model, their norms, and the ways to show them."""
