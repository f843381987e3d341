"""An independent float64 reference of the model, and the file that pins it to released weights."""
