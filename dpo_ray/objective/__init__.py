"""The mathematics of preference optimization: pure functions of tensors."""
