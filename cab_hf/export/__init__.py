"""Students as models that run without this package."""

from cab_hf.export.gguf import export_gguf
from cab_hf.export.loading import read_student
from cab_hf.export.onnx import export_onnx, to_program
from cab_hf.export.stock import export_stock, to_stock


__all__ = ["export_gguf", "export_onnx", "export_stock", "read_student", "to_program", "to_stock"]
