"""Models for other runtimes: a folder for a hub, ONNX, GGUF; each says how far its logits are."""
