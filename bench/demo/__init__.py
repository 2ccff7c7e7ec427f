"""DeepFM and DIN trained from data, in torch-rechub and in ours."""
