"""What training minimizes: Triton kernels on CUDA, a torch reference elsewhere."""

from .api import FUSED as FUSED
from .api import photometric_loss as photometric_loss
