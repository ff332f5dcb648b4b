"""4-bit model weights for PyTorch."""
