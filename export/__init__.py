"""Export and deploy: ONNX graphs, TensorRT engines, a serving layout, and a runner that needs no PyTorch.

Importing this package, `pdae_fast.export.manifest` and `pdae_fast.export.runtime` imports neither torch nor onnx.
"""
