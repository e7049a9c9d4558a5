"""Normal noise by coordinate: the same for a pixel in any batch, tile or crop, and on any device."""

from .op import KERNEL, noise_field, noise_field_bytes, noise_field_flops

__all__ = ["KERNEL", "noise_field", "noise_field_bytes", "noise_field_flops"]
