"""TensorRT engines from exported ONNX graphs: built here, run by `pdae_fast.export.backends.tensorrt`."""
