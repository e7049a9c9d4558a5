"""What the processor can do, where that decides on what is fast."""

import torch

# Without AVX-512 oneDNN is slow at other things.
AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
