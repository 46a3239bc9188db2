"""The model that is handed out: a folder that holds it, and what runs it without TensorFlow."""
