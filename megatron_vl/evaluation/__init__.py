"""Questions, scores of predictions, and the forward pass for comparisons."""
