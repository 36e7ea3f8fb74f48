"""What vLLM loads: model classes, and backbones as grouped decoder layers."""
