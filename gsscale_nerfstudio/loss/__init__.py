"""What training minimizes: Triton kernels on CUDA, a torch reference elsewhere."""

from .api import photometric_loss as photometric_loss
