"""From bytes to cells: decoding, locating, cropping. Knows nothing of learning."""
