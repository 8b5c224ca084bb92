"""The mathematics of preference optimisation: pure functions of tensors."""
