"""Transfer learning: backbones, frozen features, training, evaluation. The only room with Keras."""
