"""Examples that run, and the pretrained networks they share."""
