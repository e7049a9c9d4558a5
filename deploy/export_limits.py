"""What some runtimes cannot do with an exported graph, and which switch of which block avoids it."""

from collections.abc import Collection

from torch import nn

FOURIER = ("DFT",)
BITS = ("BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor")


def limits(ops: Collection[str], net: nn.Module) -> tuple[str, ...]:
    """Notes on the operators of an ONNX graph that TensorRT and others lack, or are slow at.

    >>> limits(["Conv", "DFT"], nn.Identity())
    ('DFT: TensorRT and most runtimes of phones have no Fourier transform',)
    """
    notes = []
    if any(op in ops for op in FOURIER):
        notes.append(f"DFT: TensorRT and most runtimes of phones have no Fourier transform{_instead(net)}")
    if any(op in ops for op in BITS):
        notes.append("BitShift, BitwiseXor: TensorRT has no operators on bits, of which a field of noise is made")
    if "Scan" in ops:
        notes.append("Scan: a selective scan goes one pixel a turn, in float32; few runtimes are fast at that")
    return tuple(notes)


def _instead(net: nn.Module) -> str:
    """Blocks with another form for such runtimes say so by a method `export_form`."""
    found = [name or "the net" for name, block in net.named_modules() if hasattr(block, "export_form")]
    return f"; block.export_form('dct') or ('blur') replaces {', '.join(found)}" if found else ""
