"""What runs an exported directory: ONNX Runtime, OpenVINO or TensorRT; no module here imports torch."""
